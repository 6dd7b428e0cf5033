"""Callbacks: what a user's own code, a terminal, TensorBoard or MLflow is told of a search."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from fppmo_ray.service.journal.facts import EpochFinished, Fact, Started
from fppmo_ray.service.journal.run_directory import RunDirectory
from fppmo_ray.service.observation import Generation, Listener, Observation
from fppmo_ray.service.progress import generation_figures, search_figures

if TYPE_CHECKING:
    from fppmo_ray.service.result import SearchResult

logger = logging.getLogger(__name__)

_BAR = 16  # columns of the bar


class Callback(Protocol):
    """Told of a search by its driver.

    A class of your own that derives from it may leave methods out. A callback that
    raises is not called again, with a warning; the search goes on.
    """

    def start(self, started: Started) -> None:
        """Take note that a search begins or resumes.

        Args:
            started: The search's id, settings, and sizes of the dense network.
        """
        return

    def feedback(self, seen: Observation) -> None:
        """Take note of scores that have ended.

        Args:
            seen: The new feedback, and the search at this moment. The first one has no feedback:
                it tells how many scores the journal already holds.
        """
        return

    def generation(self, generation: Generation, seen: Observation) -> None:
        """Take note of a generation whose scores have all ended.

        Args:
            generation: Its number and its scores, best first.
            seen: The search at this moment.
        """
        return

    def epoch(self, epoch: EpochFinished) -> None:
        """Take note of a finished epoch of a training.

        Args:
            epoch: Name of the training, number, training loss and seconds.
        """
        return

    def end(self, result: SearchResult | None) -> None:
        """Take note that the search has ended.

        Args:
            result: The result; None if the search was stopped or failed.
        """
        return


class ConsoleProgress(Callback):
    """Draws a bar that moves as scores end, if the console is a terminal.

    The bar goes when the last score has ended. While it is there, what the process logs to the
    terminal is written above it.

    Args:
        console: The console; by default that of the process. ``Console(quiet=True)`` shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._log = ExitStack()
        self._bar: bars.Progress | None = None
        self._task = bars.TaskID(0)

    def feedback(self, seen: Observation) -> None:
        """Move the bar, which begins with the first scores and ends with the last one."""
        if not self.console.is_terminal:
            return
        if self._bar is None and seen.num_ended < seen.num_wanted:
            self._bar = bars.Progress(
                bars.TextColumn("scores", table_column=Column(no_wrap=True)),
                bars.BarColumn(_BAR, table_column=Column(width=_BAR)),
                bars.MofNCompleteColumn(table_column=Column(no_wrap=True)),
                bars.TimeRemainingColumn(table_column=Column(no_wrap=True)),
                # What is left of the line, however little.
                bars.TextColumn(
                    "{task.fields[status]}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self.console,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task("scores", total=seen.num_wanted, status="")
            self._bar.start()
            self._log.enter_context(_log_above_bar())
        if self._bar is None:
            return
        workers = f"workers {seen.workforce.placed} of {seen.workforce.wanted}"
        status = f"{seen.touched[-1]}  {workers}" if seen.touched else ""
        self._bar.update(self._task, completed=seen.num_ended, total=seen.num_wanted, status=status)
        if seen.num_ended == seen.num_wanted:
            self.end(None)

    def end(self, result: SearchResult | None) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._log.close()
            self._bar.stop()
            self._bar = None


@contextmanager
def _log_above_bar() -> Iterator[None]:
    """Send log lines for the terminal through ``sys.stderr``, which the bar has replaced.

    A handler keeps the stream that it was made with, and would write into the bar.
    """
    loggers = (logging.getLogger(), logging.getLogger("fppmo_ray"))
    handlers = [
        handler
        for own in loggers
        for handler in own.handlers
        if isinstance(handler, logging.StreamHandler)
        and handler.stream in (sys.__stdout__, sys.__stderr__)
        and handler.stream.isatty()
    ]
    streams = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


@contextmanager
def called_back(
    callbacks: Sequence[Callback], run: RunDirectory, result: Callable[[], SearchResult]
) -> Iterator[Listener]:
    """Tell callbacks of a search: its start now, epochs as they are recorded, its end afterwards.

    Args:
        callbacks: The callbacks.
        run: The search, started.
        result: Returns the result at the end.

    Yields:
        The listener that tells them of feedback and generations.
    """
    [started] = run.all(Started)
    tell = _Tell(callbacks)

    def listen(seen: Observation) -> None:
        tell("feedback", seen)
        for generation in seen.touched:
            if generation.is_complete:
                tell("generation", generation, seen)

    def observe(fact: Fact) -> None:
        if isinstance(fact, EpochFinished):
            tell("epoch", fact)

    tell("start", started)
    run.observe(observe)
    try:
        yield listen
    except BaseException:
        tell("end", None)
        raise
    tell("end", result())


class _Tell:
    """Calls a method of all callbacks that have not failed yet."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def __call__(self, method: str, *arguments: Any) -> None:
        for callback in self._callbacks[:]:
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:  # whatever a user's code raises
                name = type(callback).__name__
                logger.warning("%s is not called again: %s raised %r", name, method, error)
                self._callbacks.remove(callback)


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
