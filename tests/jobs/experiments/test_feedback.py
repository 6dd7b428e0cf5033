"""The table of what scores add to the allocation."""

from __future__ import annotations

import math

from feedback import Row, feedback_table


def row(
    method: str, seed: int, accuracy: float, distilled: float = math.nan, score_steps: int = 0
) -> Row:
    return Row(
        network="resnet20",
        macs_cut=0.7,
        method=method,
        capacity_weight=0.0,
        score_images=100,
        score_steps=score_steps,
        seed=seed,
        chosen="mode",
        divergence=2.0,
        parameters=1000,
        accuracy=accuracy,
        distilled=distilled,
        seconds=40.0,
    )


def test_differences_are_paired_and_what_was_not_distilled_stays_empty():
    rows = [row("allocation", seed, 70.0 + seed, 80.0) for seed in (0, 1)]
    rows += [row("local_es 48", seed, 72.0 + seed) for seed in (0, 1)]
    rows += [row("local_es 48", 1, 70.0, 82.0, score_steps=300)]
    columns = feedback_table(rows).columns
    cells = list(zip(*[list(column.cells) for column in columns], strict=True))
    assert [line[2:8] for line in cells] == [
        ("allocation", "70.50 ± 0.71", "", "80.00 ± 0.00", "", "2"),
        ("local_es 48", "72.50 ± 0.71", "+2.00 [+2.00, +2.00]", "", "", "2"),
        ("local_es 48, score steps 300", "70.00", "-1.00 (n = 1)", "82.00", "+2.00 (n = 1)", "1"),
    ]
