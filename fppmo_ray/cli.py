"""The command line: ``fppmo-ray demo | status | export | report | compare | repair``, clusters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from fppmo_ray.demo import demo
from fppmo_ray.job import exit_on_error, run_flags
from fppmo_ray.versions import package_version

_OWN_NETWORK = {"prune": "fppmo_ray.prune_command", "search": "fppmo_ray.search_command"}


def status(target: tyro.conf.Positional[str], /, *, address: str | None = None) -> None:
    """Show how far a search has come.

    Args:
        target: The search's run directory (a folder or a URI), or the id of a submitted search.
        address: URL of the cluster's dashboard. Only needed with an id.
    """
    if "/" in target or Path(target).exists():
        from fppmo_ray.report import print_status

        print_status(target, Console())
        return
    from fppmo_ray.job_client import commands as cluster_commands

    cluster_commands.status(target, address)


def export(
    run_dir: tyro.conf.Positional[str],
    /,
    format: Literal["torch", "safetensors", "torchscript", "torch.export", "onnx"] = "torch",
    output: Path = Path("exported"),
    macs_cut: float | None = None,
    constructor: str | None = None,
    fixed_batch: int | None = None,
) -> None:
    """Check a finished search's network and write it to a folder.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        format: ``torch`` and ``safetensors`` write the state dict and the recipe that rebuilds the
            network. The other formats run without the network's class; their output is compared
            with the network's. All carry preprocessing and class names.
        output: The folder to write to. It is created if it does not exist.
        macs_cut: The budget whose network to export, if the search had several budgets.
        constructor: ``MODULE:FUNCTION``, a function without arguments that constructs the dense
            network, if that is your own class. The working directory is searched for the module.
        fixed_batch: The only batch size that a TorchScript, torch.export or ONNX file has to take,
            for networks and runtimes that cannot vary it.
    """
    from fppmo_ray.service.result import export_result, load_constructor

    if constructor is not None:
        sys.path.insert(0, str(Path.cwd()))
    paths = export_result(
        run_dir,
        output,
        format=format,
        macs_cut=macs_cut,
        constructor=None if constructor is None else load_constructor(constructor),
        fixed_batch=fixed_batch,
    )
    for path in paths:
        print(path)


def report(
    run_dir: tyro.conf.Positional[str],
    /,
    *,
    output: Path = Path("report/report.html"),
) -> None:
    """Write an HTML page about a finished or running search, and its figures as SVG files.

    Args:
        run_dir: The search's run directory, a folder or a URI.
        output: The page's file name. The figures are written to the same folder.
    """
    from fppmo_ray.report import write_report

    for path in write_report(run_dir, output):
        print(path)


def compare(
    run_dirs: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    output: Path = Path("report/comparison.html"),
) -> None:
    """Write an HTML page that compares several searches.

    Args:
        run_dirs: The searches' run directories, folders or URIs.
        output: The page's file name. The figures are written to the same folder.
    """
    from fppmo_ray.report import write_comparison

    for path in write_comparison(run_dirs, output):
        print(path)


def repair(run_dir: tyro.conf.Positional[str], /) -> None:
    """Cut a damaged journal before its first damaged line, so that its search can be resumed.

    The damaged journal is kept beside it. What followed is computed again, with the same result.

    Args:
        run_dir: The search's run directory, a folder or a URI. Its driver must have ended.
    """
    from fppmo_ray.service.journal.writers import repair

    for sentence in repair(run_dir):
        print(sentence)


def prune() -> None:
    """Prune a trained network by a few images, without labels and without Ray."""


def search() -> None:
    """Search for the filters to remove from a trained network, and fine-tune what is left."""


def main() -> None:
    """Run the command ``fppmo-ray``."""
    exit_on_error(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> None:
    name, rest, flags = next(iter(arguments), ""), arguments[1:], list[str]()
    if name == "--version":
        print(f"fppmo-ray {package_version('fppmo-ray')}")
        return
    if name in _OWN_NETWORK:
        module = import_module(_OWN_NETWORK[name])  # imports torch, and Ray for a search
        run_flags(getattr(module, name), prog=f"fppmo-ray {name}", args=rest)
        return
    commands: dict[str, Callable[..., None]] = {
        "prune": prune,
        "search": search,
        "demo": demo,
        "status": status,
        "export": export,
        "report": report,
        "compare": compare,
        "repair": repair,
    }
    if name in commands:
        commands = {name: commands[name]}
    else:
        from fppmo_ray.job_client import commands as cluster_commands  # imports as much again

        if name == "submit":
            ours, flags = cluster_commands.split_flags(rest)
            arguments = ["submit", *ours]
        commands |= {
            "submit": partial(cluster_commands.submit, flags),
            "list": cluster_commands.list_searches,
            "logs": cluster_commands.logs,
            "stop": cluster_commands.stop,
        }
    if name and not name.startswith("-") and name not in commands:
        near = get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(commands)}"
        raise ValueError(f"fppmo-ray has no command {name!r}; {hint}")
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="fppmo-ray", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
    )
