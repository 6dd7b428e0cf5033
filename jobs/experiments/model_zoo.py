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
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from archive import flattened, read_rows, unflattened, write_rows
from packages import limit_cpu_time, rival_verdict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray, Budget
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.job import run_job
from fppmo_ray.pruning import Tracing, extract, importance, load_network, save_network, trace
from fppmo_ray.pruning.costs import run_and_count

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
    rival: bool = False,
) -> None:
    """Try the networks that are missing, keep what came of each, print the table.

    Args:
        output: CSV file with a row for each network.
        models: Names in ``torchvision.models``, or ``timm:NAME``; none: all of torchvision's that
            classify images; ``timm``: one of each of many families there.
        macs_cut: Share of the MACs to remove, in (0, 1).
        patience: Seconds that a network may take.
        threads: Of torch.
        rival: Whether Torch-Pruning is tried, too.
    """
    known = _read(output)
    for model in _listed(models):
        if model not in known:
            known[model] = _apart(model, macs_cut, threads, patience, rival)
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


def _apart(model: str, macs_cut: float, threads: int, patience: float, rival: bool) -> Attempt:
    """An attempt in a process of its own, which may run out of memory or time."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, model, macs_cut, threads, rival))
    process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            return Attempt(model=model, verdict=f"not done after {patience:.0f} s")
        found: Attempt = receiver.recv()
        with suppress(EOFError):
            while rival:  # the last one is the most complete
                found = receiver.recv()
    except EOFError:
        process.join()
        return Attempt(model=model, verdict=f"its process ended with code {process.exitcode}")
    else:
        return found
    finally:
        process.kill()
        process.join()


def _report(sender: Connection, model: str, macs_cut: float, threads: int, rival: bool) -> None:
    torch.set_num_threads(threads)
    try:
        result = attempt(model, macs_cut)
    except (ValueError, RuntimeError) as error:  # a verdict too
        result = Attempt(model=model, verdict=f"{type(error).__name__}: {error}")
    sender.send(result)
    if rival:
        sender.send(replace(result, rival=f"not done after {_RIVALS_SECONDS} s"))
        limit_cpu_time(_RIVALS_SECONDS)
        subject, images = _subject_and_images(model)
        verdict, seconds = rival_verdict(subject.network.eval(), images[:1])
        sender.send(replace(result, rival=verdict, rival_seconds=seconds))


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


PRUNED = "pruned"
_RIVALS_SECONDS = 60  # of CPU time
_SIZES = {"inception_v3": 299}
_SIZE = 224
_UNTRAINED: dict[str, dict[str, Any]] = {
    # torchvision's own constructors would warn that they draw weights, slowly.
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How a network fared."""

    model: str
    verdict: str
    """``pruned``, or what it was refused with."""
    groups: int = 0
    filters: int = 0
    left_whole: int = 0
    """Channel groups that are kept, since they cannot be cut exactly."""
    gigamacs: float = 0.0
    """Dense, one image, in 1e9."""
    removable: float = 0.0
    """Share of the MACs that go when every group keeps a tenth of its filters."""
    macs_cut: float = 0.0
    trace_seconds: float = 0.0
    """CPU time of tracing, with its proof."""
    rival: str = ""
    """What Torch-Pruning did when asked for 30 % of all filters; empty: it was not tried."""
    rival_seconds: float = 0.0
    """CPU time of its graph and one step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """A dense network, and how it was made."""

    network: nn.Module
    image_size: int
    source: dict[str, Any]
    """For its recipe; empty where a recipe may not name the constructor."""
    construct: Callable[[], nn.Module] | None
    """None: the source tells."""


def attempt(model: str, macs_cut: float) -> Attempt:
    """Prune a network with random weights.

    Args:
        model: Its name in ``torchvision.models``, or ``timm:`` and its name there.
        macs_cut: Share of the MACs to remove.

    Raises:
        ValueError: it cannot be pruned by as much, or not at all, or there is no such network.
        RuntimeError: what was pruned does not do what it must.
    """
    subject, images = _subject_and_images(model)
    dense = subject.network
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # groups left whole are counted instead
        tracing = trace(dense, images[:1])
    seconds = time.process_time() - begin
    space = tracing.space.with_limits(min_keep=0.1)
    budget = Budget.from_cut(space, macs_cut)
    keep = budget.fill(uniform_priority(space, importance(dense, tracing, "l1")))
    smaller = extract(dense, tracing, keep)
    _check_runs(smaller, images, tracing.space.macs(keep))
    _check_trains(smaller, images)
    _check_loads(smaller, tracing, keep, subject, images)
    return Attempt(
        model=model,
        verdict=PRUNED,
        groups=len(space.groups),
        filters=space.num_filters,
        left_whole=len(tracing.left_whole),
        gigamacs=space.dense_macs / 1e9,
        removable=1 - space.min_macs / space.dense_macs,
        macs_cut=1 - space.macs(keep) / space.dense_macs,
        trace_seconds=seconds,
    )


def _subject_and_images(model: str) -> tuple[_Subject, Tensor]:
    subject = _subject(model)
    shape = (2, 3, subject.image_size, subject.image_size)
    return subject, torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _subject(model: str) -> _Subject:
    library, _, name = model.rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if library == "timm":
            return _of_timm(name)
        from torchvision import models

        arguments = {"weights": None, **_UNTRAINED.get(model, {})}
        return _Subject(
            network=getattr(models, model)(**arguments),
            image_size=_SIZES.get(model, _SIZE),
            source={"constructor": f"torchvision.models:{model}", "arguments": arguments},
            construct=None,
        )


def _of_timm(name: str) -> _Subject:
    import timm

    network: Any = timm.create_model(name)
    return _Subject(
        network=network,
        image_size=network.default_cfg["input_size"][-1],
        source={},
        construct=partial(timm.create_model, name),
    )


def _check_runs(network: nn.Module, images: Tensor, macs: int) -> None:
    logits, counted = run_and_count(network.eval(), (images[:1],))
    _require(bool(torch.isfinite(logits).all()), "its output is not finite")
    _require(counted == macs, f"it has {counted} MACs instead of {macs}")


def _check_trains(network: nn.Module, images: Tensor) -> None:
    output = network.train()(images)
    logits = [output] if isinstance(output, Tensor) else list(output)  # with auxiliary heads
    loss = torch.stack([part.square().mean() for part in logits]).sum()
    torch.autograd.backward(loss)
    for name, parameter in network.named_parameters():
        finite = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        _require(finite, f"the gradient of {name} is missing or not finite")


@torch.no_grad()
def _check_loads(
    network: nn.Module,
    tracing: Tracing,
    keep: BoolArray,
    subject: _Subject,
    images: Tensor,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save_network(
            network, Path(folder) / "smaller", tracing=tracing, keep=keep, source=subject.source
        )
        loaded = load_network(path, constructor=subject.construct)
    same = torch.equal(loaded(images[:1]), network.eval()(images[:1]))
    _require(same, "what was saved computes something else when it is loaded")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


if __name__ == "__main__":
    run_job(main)
