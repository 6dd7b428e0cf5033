"""How much of networks from other packages can be pruned exactly, beside Torch-Pruning?

    pip install timm segmentation-models-pytorch monai transformers open-clip-torch ultralytics
    python jobs/experiments/packages.py --output jobs/experiments/results/packages.csv

Each network has random weights and small inputs. It is traced, cut to half of its MACs, compared
with the masked dense network, and given to Torch-Pruning, all in a process of its own. Networks
that are in the output already are not tried again.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.metadata
import io
import logging
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fppmo_ray.distribution import Budget
from fppmo_ray.distribution.logits import uniform_priority
from fppmo_ray.durable_files import write_whole
from fppmo_ray.job import run_job
from fppmo_ray.pruning import check_equivalence, importance, trace
from fppmo_ray.pruning.costs import run_and_count

logger = logging.getLogger(__name__)

_TIMM = (
    *("resnet18", "resnet50d", "seresnet50", "ecaresnet26t", "res2net50_26w_4s", "resnest14d"),
    *("skresnet18", "nf_resnet26", "efficientnet_b0", "tinynet_a", "mixnet_s", "rexnet_100"),
    *("mobilenetv4_conv_small", "mobileone_s0", "ghostnet_100", "lcnet_100", "regnety_004"),
    *("repvgg_a0", "dla34", "hrnet_w18_small", "cspdarknet53", "densenet121", "dpn68"),
    *("ese_vovnet19b_dw", "selecsls42b", "vgg11_bn", "convnextv2_atto", "poolformer_s12"),
    *("inception_next_atto", "efficientvit_b0", "edgenext_xx_small", "fastvit_t8", "coat_tiny"),
)
_TORCHVISION = (
    *("resnet18", "resnext50_32x4d", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small"),
    *("efficientnet_b0", "densenet121", "googlenet", "shufflenet_v2_x1_0", "squeezenet1_1"),
    *("mnasnet0_5", "regnet_y_400mf", "convnext_tiny", "segmentation.fcn_resnet50"),
    *("segmentation.deeplabv3_resnet50", "segmentation.lraspp_mobilenet_v3_large"),
)
_SMP = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet".split()
_MONAI = "UNet BasicUNet SegResNet DynUNet AttentionUnet VNet DenseNet121 FlexibleUNet".split()
_YOLO = "yolov5n yolov8n yolov8n-seg yolov8n-pose yolov10n yolo11n".split()
_TRANSFORMERS = "ResNet MobileNetV1 MobileNetV2 RegNet ConvNext".split()
_CLIP = ("RN50",)
_SIZE = 128
_MONAI_SIZE = 64
_SMALL: dict[str, int] = {"timm:coat_tiny": 224, "open_clip:RN50": 224}
_HALF = 0.5
_SHARE = 0.3  # of the filters; half of the MACs of a chain of convolutions
_LONG = 160


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a network fared."""

    package: str
    version: str
    network: str
    gigamacs: float = 0.0
    """Of one image, dense, in 1e9."""
    can_go: float = 0.0
    """Share of the MACs that can go when every group keeps a tenth of its filters."""
    half: bool = False
    """Whether a network of half the MACs was extracted and equals the masked dense one."""
    left_whole: str = ""
    """Groups that are kept, and the reason of the first."""
    seconds: float = 0.0
    """CPU time of tracing, with its proof."""
    refused: str = ""
    """What it was refused with."""
    rival: str = ""
    """What Torch-Pruning did when asked for 30 % of all filters: MACs that went, or its error."""
    rival_seconds: float = 0.0
    """CPU time of its graph and one step."""


def main(
    output: Path, packages: tuple[str, ...] = (), patience: float = 60.0, threads: int = 1
) -> None:
    """Try the networks that are missing, and keep what came of each.

    Args:
        output: CSV file with a row for each network.
        packages: Those whose networks are tried; none: all.
        patience: Seconds of CPU time that each of the two may take.
        threads: Of torch.
    """
    rows = _read(output)
    for name in listed():
        if name not in rows and name.partition(":")[0] in (packages or _MAKERS):
            rows[name] = _apart(name, threads, patience)
            text = io.StringIO()
            writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows.values())
            write_whole(output, text.getvalue().encode())
            logger.info("%s: %s", name, rows[name])
    halves = sum(row.half for row in rows.values())
    logger.info("%d of %d networks lose half of their MACs exactly", halves, len(rows))


def listed() -> list[str]:
    """Return all networks, as ``package:name``."""
    named = {
        "torchvision": _TORCHVISION,
        "timm": _TIMM,
        "segmentation_models_pytorch": _SMP,
        "monai": _MONAI,
        "ultralytics": _YOLO,
        "transformers": _TRANSFORMERS,
        "open_clip": _CLIP,
    }
    return [f"{package}:{name}" for package, names in named.items() for name in names]


def packages_table(path: Path) -> Table:
    """Return a row for each network of a file: what can go, and what the rival did.

    Args:
        path: The CSV file.
    """
    rows = list(_read(path).values())
    halves = sum(row.half for row in rows)
    columns = ("package", "network", "can go", "half", "s", "Torch-Pruning", "s")
    table = Table(*columns, title=f"{halves} of {len(rows)} lose half")
    for row in rows:
        table.add_row(
            *(row.package, row.network, f"{100 * row.can_go:.0f} %", "yes" if row.half else "no"),
            *(f"{row.seconds:.1f}", row.rival, f"{row.rival_seconds:.1f}"),
        )
    return table


def _read(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    kinds: dict[str, Callable[[str], Any]] = {
        "float": float,
        "bool": lambda text: text == "True",
        "str": str,
    }
    with path.open() as file:
        found = [
            Row(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Row)})
            for row in csv.DictReader(file)
        ]
    return {f"{row.package}:{row.network}": row for row in found}


def _apart(name: str, threads: int, patience: float) -> Row:
    """A row from a process of its own, which may run out of memory or time."""
    package, _, network = name.partition(":")
    context = multiprocessing.get_context("fork")  # which need not import again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, name, threads, patience))
    process.start()
    sender.close()
    found = Row(package=package, version=_version(package), network=network, refused="no answer")
    with contextlib.suppress(EOFError):
        while True:  # the last row is the most complete one
            found = receiver.recv()
    process.join()
    return found


def _report(sender: Connection, name: str, threads: int, patience: float) -> None:
    torch.set_num_threads(threads)
    limit_cpu_time(2 * patience)
    row = attempt(name)
    sender.send(row)
    sender.send(Row(**asdict(row) | {"rival": f"not done after {patience:.0f} s"}))
    limit_cpu_time(patience)
    verdict, seconds = rival_attempt(name)
    sender.send(Row(**asdict(row) | {"rival": verdict, "rival_seconds": round(seconds, 2)}))


def limit_cpu_time(seconds: float) -> None:
    """End this process after so many more seconds of CPU time."""
    soft = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def attempt(name: str) -> Row:
    """Trace a network, cut it to half of its MACs, and compare it with the masked dense one.

    Args:
        name: ``package:name``.
    """
    package, _, network = name.partition(":")
    row: dict[str, Any] = {"package": package, "version": _version(package), "network": network}
    begin = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            dense, image = made(name)
            begin = time.process_time()
            tracing = trace(dense, image)
        seconds = time.process_time() - begin
        space = tracing.space.with_limits(min_keep=0.1)
        can_go = 1 - space.min_macs / space.dense_macs
        reasons = [str(one.message) for one in told if "left whole" in str(one.message)]
        why = reasons[0].partition("exactly: ")[2] if reasons else ""
        row |= {
            "gigamacs": round(space.dense_macs / 1e9, 3),
            "can_go": round(can_go, 3),
            "left_whole": f"{len(tracing.left_whole)}: {why[:_LONG]}" if why else "",
            "seconds": round(seconds, 2),
        }
        if can_go >= _HALF:
            budget = Budget.from_cut(space, _HALF)
            keep = budget.fill(uniform_priority(space, importance(dense, tracing, "l1")))
            check_equivalence(dense, tracing, image, keep=keep)
            row["half"] = space.macs(keep) <= _HALF * space.dense_macs
    except (ValueError, RuntimeError, ImportError) as error:
        row["refused"] = f"{type(error).__name__}: {error}"[: 2 * _LONG]
    return Row(**row)


@contextlib.contextmanager
def _silent() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rival_attempt(name: str) -> tuple[str, float]:
    """Return what Torch-Pruning does with a network, and its CPU time.

    Args:
        name: ``package:name``.
    """
    return rival_verdict(*made(name))


def rival_verdict(dense: nn.Module, image: Tensor) -> tuple[str, float]:
    """Return what Torch-Pruning does when asked for 30 % of all filters, and its CPU time.

    Args:
        dense: The network, in eval mode; it changes.
        image: Example input of one image.
    """
    tp = importlib.import_module("torch_pruning")
    begin = time.process_time()
    try:
        with _silent():
            _, before = run_and_count(dense, (image,))
            begin = time.process_time()
            options: dict[str, Any] = {
                "pruning_ratio": _SHARE,
                "ignored_layers": _last_layers(dense),
            }
            options["importance"] = tp.importance.MagnitudeImportance()
            pruner = tp.pruner.MetaPruner(dense, image, **options)
            pruner.step()
            seconds = time.process_time() - begin
            _, after = run_and_count(dense, (image,))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return text[:_LONG], time.process_time() - begin
    return f"{100 * (1 - after / before):.0f} % of the MACs go", seconds


def _last_layers(network: nn.Module) -> list[nn.Module]:
    """The last layer with weights, whose filters are classes."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    layers: list[nn.Module] = []
    layers += (module for module in network.modules() if isinstance(module, kinds))
    return layers[-1:]


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with random weights in eval mode, and an image.

    Args:
        name: ``package:name``.
    """
    package, _, network = name.partition(":")
    size = _SMALL.get(name, _MONAI_SIZE if package == "monai" else _SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _MAKERS[package](network, size)
    channels = 1 if package == "monai" else 3
    generator = torch.Generator().manual_seed(0)
    return model.eval(), torch.randn(1, channels, size, size, generator=generator)


def _torchvision(name: str, size: int) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    options: dict[str, Any] = {"weights": None}
    options |= {"init_weights": False} if name == "googlenet" else {}
    folder, _, name = name.rpartition(".")
    options |= {"weights_backbone": None} if folder else {}
    network: nn.Module = getattr(getattr(models, folder) if folder else models, name)(**options)
    return network


def _timm(name: str, size: int) -> nn.Module:
    network: nn.Module = importlib.import_module("timm").create_model(name)
    return network


def _smp(name: str, size: int) -> nn.Module:
    smp = importlib.import_module("segmentation_models_pytorch")
    network: nn.Module = getattr(smp, name)("resnet18", encoder_weights=None, classes=4)
    return network


def _monai(name: str, size: int) -> nn.Module:
    nets = importlib.import_module("monai.networks.nets")
    two = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    wide = {"channels": (16, 32, 64), "strides": (2, 2)}
    options: dict[str, dict[str, Any]] = {
        "UNet": two | wide | {"num_res_units": 2},
        "AttentionUnet": two | wide,
        "SegResNet": two | {"init_filters": 16},
        "DynUNet": two
        | {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        "FlexibleUNet": {
            "in_channels": 1,
            "out_channels": 3,
            "backbone": "efficientnet-b0",
            "pretrained": False,
        },
    }
    network: nn.Module = getattr(nets, name)(**options.get(name, two))
    return network


def _ultralytics(name: str, size: int) -> nn.Module:
    network: nn.Module = importlib.import_module("ultralytics").YOLO(f"{name}.yaml").model
    return network


def _transformers(name: str, size: int) -> nn.Module:
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")()
    network: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return network


def _open_clip(name: str, size: int) -> nn.Module:
    network: nn.Module = importlib.import_module("open_clip").create_model(name).visual
    return network


_MAKERS: dict[str, Callable[[str, int], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "segmentation_models_pytorch": _smp,
    "monai": _monai,
    "ultralytics": _ultralytics,
    "transformers": _transformers,
    "open_clip": _open_clip,
}


def _version(package: str) -> str:
    return importlib.metadata.version({"open_clip": "open_clip_torch"}.get(package, package))


if __name__ == "__main__":
    run_job(main)
