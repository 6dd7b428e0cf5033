"""Which classification networks of torchvision, and which CNNs of timm, can be pruned?

    python jobs/experiments/model_zoo.py --output runs/networks-torchvision.csv
    pip install timm
    python jobs/experiments/model_zoo.py --models timm --output runs/networks-timm.csv

Each network is traced (which proves on random masks that extraction is exact), cut to half of its
MACs, run, trained for a step, saved and loaded, in a process of its own. Networks that are in the
output already are not tried again.
"""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from archive import flattened, read_rows, unflattened, write_rows
from attempt import PRUNED, Attempt, attempt
from rich.console import Console
from rich.table import Table

from fppmo_ray.job import run_job

logger = logging.getLogger(__name__)

FAMILIES = (
    *("resnet50d", "seresnet50", "res2net50_26w_4s", "resnest14d", "skresnet18", "nf_resnet26"),
    *("efficientnet_b0", "tf_efficientnet_b0", "tinynet_a", "mixnet_s", "rexnet_100"),
    *("mobilenetv4_conv_small", "mobileone_s0", "ghostnet_100", "lcnet_100", "hardcorenas_a"),
    *("regnety_004", "repvgg_a0", "dla34", "hrnet_w18_small", "cspdarknet53", "darknet53"),
    *("densenet121", "dpn68", "ese_vovnet19b_dw", "selecsls42b", "xception41", "vgg11_bn"),
    *("convnextv2_atto", "poolformer_s12", "inception_next_atto", "efficientvit_b0"),
    *("edgenext_xx_small", "fastvit_t8"),
)
"""A small CNN of each of many families in timm."""


def main(
    output: Path,
    models: tuple[str, ...] = (),
    macs_cut: float = 0.5,
    patience: float = 3600.0,
    threads: int = 1,
) -> None:
    """Try the networks that are missing, keep what came of each, print the table.

    Args:
        output: CSV file with a row for each network.
        models: Names in ``torchvision.models``, or ``timm:NAME``; none: all of torchvision's that
            classify images; ``timm``: one of each of many families there.
        macs_cut: Share of the MACs to remove, in (0, 1).
        patience: Seconds that a network may take.
        threads: Of torch.
    """
    known = _read(output)
    for model in _listed(models):
        if model not in known:
            known[model] = _apart(model, macs_cut, threads, patience)
            rows = [flattened(asdict(known[name])) for name in sorted(known)]
            write_rows(output, rows)
            logger.info("%s  %s", model, known[model].verdict)
    Console(width=150).print(attempts_table(list(known.values())))


def _listed(models: tuple[str, ...]) -> list[str]:
    if models == ("timm",):
        return [f"timm:{name}" for name in FAMILIES]
    return list(models) or _classifiers()


def _classifiers() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _read(path: Path) -> dict[str, Attempt]:
    rows = [unflattened(row) for row in read_rows(path)] if path.is_file() else []
    return {row["model"]: Attempt(**row) for row in rows}


def _apart(model: str, macs_cut: float, threads: int, patience: float) -> Attempt:
    """An attempt in a process of its own, which may run out of memory or time."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, model, macs_cut, threads))
    process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            return Attempt(model=model, verdict=f"not done after {patience:.0f} s")
        found: Attempt = receiver.recv()
    except EOFError:
        process.join()
        return Attempt(model=model, verdict=f"its process ended with code {process.exitcode}")
    else:
        return found
    finally:
        process.kill()
        process.join()


def _report(sender: Connection, model: str, macs_cut: float, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        result = attempt(model, macs_cut)
    except (ValueError, RuntimeError) as error:  # a verdict too
        result = Attempt(model=model, verdict=f"{type(error).__name__}: {error}")
    sender.send(result)


def attempts_table(attempts: list[Attempt]) -> Table:
    """Return a row for each network: what can be pruned of it, and the verdict."""
    pruned = sum(attempt.verdict == PRUNED for attempt in attempts)
    columns = ("model", "GMACs", "groups", "left whole", "can go", "trace, s", "verdict")
    table = Table(*columns, title=f"{pruned} of {len(attempts)} pruned")
    for row in sorted(attempts, key=lambda row: row.model):
        table.add_row(
            row.model,
            f"{row.gigamacs:.2f}",
            str(row.groups),
            str(row.left_whole),
            f"{100 * row.removable:.0f} %",
            f"{row.trace_seconds:.1f}",
            row.verdict,
        )
    return table


if __name__ == "__main__":
    run_job(main)
