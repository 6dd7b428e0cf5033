"""The command line: ``fppmo-ray demo | status | extract``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console

from fppmo_ray.job import say_errors


def status(run_dir: tyro.conf.Positional[Path], /) -> None:
    """How far the search in a run directory has come."""
    from fppmo_ray.report import print_status

    print_status(run_dir, Console())


def extract(run_dir: tyro.conf.Positional[Path], /, output: Path = Path("extracted")) -> None:
    """Check a finished search's network against its recipe, and copy both to a folder.

    Args:
        run_dir: The search's run directory.
        output: The folder; made if absent.
    """
    from fppmo_ray.service.delivery import deliver

    for path in deliver(run_dir, output):
        print(path)


def main() -> None:
    """The entry point of ``fppmo-ray``."""
    from fppmo_ray.demo import demo

    commands: dict[str, Callable[..., None]] = {"demo": demo, "status": status, "extract": extract}
    say_errors(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="fppmo-ray", config=(tyro.conf.OmitArgPrefixes,)
        )
    )
