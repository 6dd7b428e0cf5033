"""Callbacks that keep a search's figures in TensorBoard or MLflow; each needs its extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fppmo_ray.service.journal.facts import EpochFinished, Started
from fppmo_ray.service.progress.callbacks import Callback
from fppmo_ray.service.progress.metrics import generation_figures, search_figures
from fppmo_ray.service.progress.observation import Generation, Observation

if TYPE_CHECKING:
    from fppmo_ray.service.result import SearchResult


class TensorBoard(Callback):
    """Writes event files for TensorBoard; needs ``pip install fppmo-ray[tensorboard]``.

    Args:
        folder: Folder of the event files.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "TensorBoard needs tensorboardX; pip install fppmo-ray[tensorboard]"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def start(self, started: Started) -> None:
        """Write the settings as a text."""
        rows = [f"| {name} | {value} |" for name, value in _settings(started)]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def generation(self, generation: Generation, seen: Observation) -> None:
        """Write the figures of a generation and of the best proposal so far."""
        for name, value in (generation_figures(generation) | search_figures(seen)).items():
            self._writer.add_scalar(f"search/{name}", value, generation.index)

    def epoch(self, epoch: EpochFinished) -> None:
        """Write the loss of an epoch."""
        if epoch.train_loss is not None:
            self._writer.add_scalar(f"train_loss/{epoch.task}", epoch.train_loss, epoch.epoch)

    def end(self, result: SearchResult | None) -> None:
        """Write the figures of the result, and close the files."""
        for name, value in _final(result).items():
            self._writer.add_scalar(f"result/{name}", value, 0)
        self._writer.close()


class MLflow(Callback):
    """Logs a run to MLflow; needs ``pip install fppmo-ray[mlflow]``. A resumed search is a new run.

    Args:
        experiment: Name of the experiment; None: MLflow's own default. The server is that of
            ``MLFLOW_TRACKING_URI``.
    """

    def __init__(self, experiment: str | None = None) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ValueError("MLflow needs mlflow; pip install fppmo-ray[mlflow]") from error
        self._mlflow = mlflow
        self._experiment = experiment

    def start(self, started: Started) -> None:
        """Begin a run with the settings as its parameters."""
        if self._experiment is not None:
            self._mlflow.set_experiment(self._experiment)
        self._mlflow.start_run(run_name=started.search_id)
        self._mlflow.log_params(dict(_settings(started)))

    def generation(self, generation: Generation, seen: Observation) -> None:
        """Log the figures of a generation and of the best proposal so far."""
        figures = generation_figures(generation) | search_figures(seen)
        self._mlflow.log_metrics(figures, step=generation.index)

    def epoch(self, epoch: EpochFinished) -> None:
        """Log the loss of an epoch."""
        if epoch.train_loss is not None:
            self._mlflow.log_metrics(
                {f"train_loss/{epoch.task}": epoch.train_loss}, step=epoch.epoch
            )

    def end(self, result: SearchResult | None) -> None:
        """Log the figures of the result, and end the run."""
        if result is not None:
            self._mlflow.log_metrics(_final(result), step=0)
        self._mlflow.end_run("KILLED" if result is None else "FINISHED")


def _settings(started: Started) -> Iterator[tuple[str, Any]]:
    """Yield every setting by its full name: ``scoring.score_images``."""
    yield from _flat(started.identity["settings"], "")


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _final(result: SearchResult | None) -> dict[str, float]:
    """Return the figures of the best network; none without a result."""
    if result is None:
        return {}
    best = result.best
    figures = {"macs_cut": best.macs_cut, "test_score": best.test_score}
    return {name: float(value) for name, value in figures.items() if value is not None}
