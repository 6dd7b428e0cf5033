"""The frame that jobs run in: flags, log, errors as sentences, the closing table."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console

from fppmo_ray.flags import comma_lists
from fppmo_ray.service.job_client import submission
from fppmo_ray.service.record.run_directory import require_fit
from fppmo_ray.service.record.storage import local_folder, location_of
from fppmo_ray.service.stopping import SearchStopped

logger = logging.getLogger(__name__)

_TRACEBACK = "FPPMO_TRACEBACK"
_STOPPED = 128 + signal.SIGTERM
_INTERRUPTED = 128 + signal.SIGINT


def run_job(job: Callable[..., None]) -> None:
    """Run a typed function with its flags from the command line; say errors in a sentence.

    The flags come from the function's signature. Set ``FPPMO_TRACEBACK=1`` to see where an error
    came from.
    """
    config = (tyro.conf.OmitArgPrefixes,)
    exit_on_error(lambda: tyro.cli(job, config=config, registry=comma_lists()))


def exit_on_error(run: Callable[[], object]) -> None:
    """Run with a log on stderr; end the process with a sentence where the user can mend it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    warnings.showwarning = _log_warning
    try:
        run()
    except SearchStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(_STOPPED)
    except KeyboardInterrupt:  # the usual way out of a log that is followed
        if os.environ.get(_TRACEBACK):
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get(_TRACEBACK):
            raise
        sys.exit(f"error: {error}")


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a line of the log: its text is for users, its place in the code is not."""
    logger.warning("%s", message)


def require_lasting(run_dir: str | Path) -> None:
    """Refuse a relative run directory inside a submitted Ray job.

    Raises:
        ValueError: see ``submission.require_lasting``.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        submission.require_lasting(run_dir)


def resume_mode(run_dir: str | Path, *, resume: bool, resume_or_start: bool = False) -> bool | None:
    """How a job is to resume; an unfit run directory is refused before anything is loaded.

    Args:
        run_dir: The job's.
        resume: Resume, or refuse where nothing began.
        resume_or_start: Resume if there is something to; for jobs that a cluster starts again.

    Returns:
        What ``search`` takes. With ``resume_or_start`` that is decided late: a cluster may start
        a job again while it still runs elsewhere, and about to begin.

    Raises:
        ValueError: the run directory does not last, cannot be reached, or does not fit the flags.
    """
    require_lasting(run_dir)
    wanted = None if resume_or_start and not resume else resume
    require_fit(run_dir, resume=wanted)
    return wanted


def show_result(run_dir: str | Path) -> None:
    """Draw a finished search's figures and print its table: the end of every job."""
    from fppmo_ray.report import draw_figures, print_result

    console = Console(width=None if sys.stdout.isatty() else 140)
    draw_figures(run_dir)
    print_result(run_dir, console)
    folder = local_folder(run_dir)
    place = location_of(run_dir) if folder is None else folder.resolve()
    console.print(f"run directory: {place}", soft_wrap=True)
