"""Figures of a search as files in its run directory."""

from __future__ import annotations

import io
from pathlib import Path

from fppmo_ray.report.drawings import draw_front, draw_probabilities, draw_scores
from fppmo_ray.report.run import read_run
from fppmo_ray.service.record.artifacts import FPPMO
from fppmo_ray.service.record.storage import location_of, open_storage


def draw_figures(run_dir: str | Path) -> None:
    """Write ``scores.png`` and ``probabilities.png`` into the run directory.

    Of a finished search with several budgets, ``front.png`` too.

    Raises:
        ValueError: it holds no journal, or nothing has been scored yet.
    """
    from matplotlib.figure import Figure

    run = read_run(run_dir)
    if run.history["score"].isna().all():
        raise ValueError(
            f"nothing has been scored yet in {location_of(run_dir)}: there is nothing to draw"
        )
    drawings = {"scores": draw_scores, "probabilities": draw_probabilities}
    if len(run.named(FPPMO)) > 1:
        drawings["front"] = draw_front
    storage = open_storage(run_dir)
    for name, draw in drawings.items():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        draw(figure, run)
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        storage.write(f"{name}.png", image.getvalue())
