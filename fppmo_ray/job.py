"""The frame of a command-line job: flags, log, errors as sentences, the closing table."""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fppmo_ray.service.journal.artifacts import budgets_asked, network_names, read_figures
from fppmo_ray.service.journal.run_directory import Resume, require_fit
from fppmo_ray.service.journal.storage import local_folder, location_of
from fppmo_ray.service.stopping import SearchStopped, signals_stop_searches

logger = logging.getLogger(__name__)

_TRACEBACK = "FPPMO_TRACEBACK"
_FORMAT, _CLOCK = "%(asctime)s %(message)s", "%H:%M:%S"
_STOPPED = 128 + signal.SIGTERM
_INTERRUPTED = 128 + signal.SIGINT
_FIRST_FLAGS = (
    *("--network", "--weights", "--data", "--run-dir", "--macs-cut", "--proposals", "--min-keep"),
    *("--fine-tune-epochs", "--workers", "--gpus-per-worker"),
)
"""What nearly every search needs, of all the flags."""
_ONE_OR_MORE = float | tuple[float, ...]


def run_job(job: Callable[..., None]) -> None:
    """Run a typed function with flags from the command line; report errors as a sentence.

    The flags come from the function's signature. Set ``FPPMO_TRACEBACK=1`` to get the traceback
    of an error.
    """
    exit_on_error(lambda: run_flags(job))


def run_flags(
    function: Callable[..., None], *, prog: str | None = None, args: Sequence[str] | None = None
) -> None:
    """Call a typed function with flags from the command line.

    ``--help`` names the flags that matter first, then lists all of them by group. ``-H`` explains
    every flag.

    Args:
        function: The function. Its parameters and the fields of records among them are flags.
        prog: Name of the program, for the help; None: that of the process.
        args: The flags; None: those of the process.
    """
    about, _, _ = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")
    if "settings" in inspect.signature(function).parameters:
        first = f"Flags that matter first: {', '.join(_FIRST_FLAGS)}. -H explains every flag."
        about += "\n\n" + textwrap.fill(first, width=80, break_on_hyphens=False)
    tyro.cli(
        function,
        prog=prog,
        description=about,
        args=args,
        compact_help=True,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=comma_lists(),
    )


def exit_on_error(run: Callable[[], object]) -> None:
    """Call ``run`` with a log on stderr; exit with a sentence after an error that users can fix.

    While it runs, warnings go to the log, and SIGTERM or SIGINT stops a search after the scores
    that its workers have begun. Afterwards all three are as they were before.

    Raises:
        SystemExit: with status 1 after an error, 143 after a stop, 130 after an interrupt.
    """
    with _log_on_stderr(), signals_stop_searches():
        try:
            run()
        except SearchStopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(_STOPPED)
        except KeyboardInterrupt:  # the usual end of `logs --follow`
            if os.environ.get(_TRACEBACK):
                raise
            print("interrupted", file=sys.stderr)
            sys.exit(_INTERRUPTED)
        except (ValueError, RuntimeError, OSError) as error:
            if os.environ.get(_TRACEBACK):
                raise
            sys.exit(f"error: {error}")


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Log to stderr from level INFO, warnings too, unless the process already has a log."""
    root = logging.getLogger()
    handlers, level, showwarning = root.handlers[:], root.level, warnings.showwarning
    logging.basicConfig(level=logging.INFO, format=_FORMAT, datefmt=_CLOCK)
    added = [handler for handler in root.handlers if handler not in handlers]
    warnings.showwarning = _log_warning
    try:
        yield
    finally:
        warnings.showwarning = showwarning
        root.setLevel(level)
        for handler in added:
            root.removeHandler(handler)


@contextmanager
def log_of_search() -> Iterator[None]:
    """Log this package's messages to stderr, unless the process has handlers of its own."""
    own = logging.getLogger("fppmo_ray")
    if own.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), own.level
    handler.setFormatter(logging.Formatter(_FORMAT, _CLOCK))
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        own.setLevel(level)
        own.removeHandler(handler)


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Log a warning's text without its place in the code, which users have no use for."""
    logger.warning("%s", message)


def comma_lists() -> ConstructorRegistry:
    """Return tyro's rule for a number or several: ``--macs-cut 0.57`` or ``0.4,0.57,0.7``."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_one_or_more)
    return registry


def _one_or_more(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type != _ONE_OR_MORE:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT[,FLOAT...]",
        instance_from_str=lambda arguments: _numbers(arguments[0]),
        is_instance=lambda value: isinstance(value, float | tuple),
        str_from_instance=lambda value: [_text(value)],
    )


def _numbers(text: str) -> float | tuple[float, ...]:
    numbers = tuple(float(number) for number in text.split(","))
    return numbers if len(numbers) > 1 else numbers[0]


def _text(value: float | tuple[float, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def require_lasting(run_dir: str | Path) -> None:
    """Refuse a relative run directory when this process is the driver of a submitted Ray job.

    Raises:
        ValueError: see ``submission.require_lasting``.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        from fppmo_ray.job_client import submission  # slow to import, and few jobs are submitted

        submission.require_lasting(run_dir)


def resume_mode(run_dir: str | Path, *, resume: bool, resume_or_start: bool = False) -> Resume:
    """Return ``search``'s argument ``resume``; refuse an unfit run directory before data is loaded.

    Args:
        run_dir: The job's run directory, a folder or a URI.
        resume: Resume the search in it, which must exist.
        resume_or_start: Resume the search in it if there is one. For jobs that a cluster restarts.

    Returns:
        True or False; ``auto`` with ``resume_or_start``, where the search decides as late as it
        can: a cluster may restart a job whose first instance still runs and is about to begin.

    Raises:
        ValueError: the run directory does not last, cannot be reached, or does not fit the flags.
    """
    require_lasting(run_dir)
    wanted: Resume = "auto" if resume_or_start and not resume else resume
    require_fit(run_dir, resume=wanted)
    return wanted


def show_result(run_dir: str | Path, console: Console | None = None) -> None:
    """Draw a finished search's figures; print its table and the commands that use its network.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        console: The console to print to; None: that of the process.
    """
    from fppmo_ray.report import draw_figures, print_result

    if console is None:
        console = Console(width=None if sys.stdout.isatty() else 140)
    draw_figures(run_dir)
    print_result(run_dir, console)
    folder = local_folder(run_dir)
    place = location_of(run_dir) if folder is None else folder.resolve()
    for line in (f"run directory: {place}", *_next_steps(run_dir)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _next_steps(run_dir: str | Path) -> list[str]:
    """Return the commands that show, export and load the network of a finished search."""
    from fppmo_ray.pruning.files import TRUSTED_MODULES  # imports torch

    figures = read_figures(run_dir)
    budgets = budgets_asked(figures)
    _, recipe = network_names(budgets[0] if len(budgets) > 1 else None)
    place = shlex.quote(str(run_dir))
    cut = f" --macs-cut {budgets[0]}" if len(budgets) > 1 else ""
    lines = [
        f"look:    fppmo-ray report {place}",
        f"export:  fppmo-ray export {place} --format onnx{cut}",
    ]
    if local_folder(run_dir) is not None:
        lines.append(f"load:    fppmo_ray.load_network({str(Path(run_dir) / recipe)!r})")
    constructor = figures.get("source", {}).get("constructor", "MODULE:FUNCTION")
    if constructor.partition(":")[0] not in TRUSTED_MODULES:
        lines[1:] = [
            f"{lines[1]} --constructor {constructor}",
            *(line.replace(")", ", constructor)") for line in lines[2:]),
            "         (the function, without arguments, constructs the dense network)",
        ]
    return lines
