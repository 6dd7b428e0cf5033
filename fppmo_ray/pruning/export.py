"""A network in formats that run without its class: TorchScript, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

ExchangeFormat = Literal["torchscript", "torch.export", "onnx"]

SUFFIXES: Mapping[ExchangeFormat, str] = {
    "torchscript": ".torchscript.pt",
    "torch.export": ".pt2",
    "onnx": ".onnx",
}
TOLERANCE = 1e-4
"""Largest error, in float32, relative to the largest output."""
_BATCHES = (1, 3)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_Run = Callable[[Tensor], Tensor]


def export_network(
    network: nn.Module,
    path: str | Path,
    *,
    format: ExchangeFormat,
    image_shape: tuple[int, ...],
) -> Path:
    """Write a network to a file that needs no Python class to run, and check the file.

    The file is opened again and computes what the network does, on batches of one and of three
    random images, to 1e-4 of the largest output.

    Args:
        network: Takes images (N, *image_shape), returns one tensor. Exported in eval mode and on
            the CPU; left as it is.
        path: File name; the format's suffix is added. Its folder is made.
        format: ``torchscript`` (``torch.jit.load``), ``torch.export`` (``torch.export.load``) or
            ``onnx`` (input ``images``, output ``logits``; needs ``pip install
            'fppmo-ray[export]'``).
        image_shape: Of one image, such as ``(3, 32, 32)``.

    Returns:
        The file.

    Raises:
        ValueError: the format is unknown, packages for it are missing, or the network does not run
            on such images.
        RuntimeError: the file computes something else.
    """
    if format not in get_args(ExchangeFormat):
        raise ValueError(f"format must be one of {get_args(ExchangeFormat)}, got {format!r}")
    if format == "onnx":
        _require_onnx()
    target = Path(path)
    target = target.with_name(target.name + SUFFIXES[format])
    target.parent.mkdir(parents=True, exist_ok=True)
    write, read = _WAYS[format]
    with _in_eval_mode_on_cpu(network), _without_torchs_own_warnings(), torch.no_grad():
        expected = {batch: _run(network, _images(batch, image_shape)) for batch in _BATCHES}
        write(network, _images(2, image_shape), target)
        run = read(target)
        for batch, outputs in expected.items():
            _check(run(_images(batch, image_shape)), outputs, target)
    return target


def _images(batch: int, image_shape: tuple[int, ...]) -> Tensor:
    return torch.randn((batch, *image_shape), generator=torch.Generator().manual_seed(batch))


def _run(network: nn.Module, images: Tensor) -> Tensor:
    try:
        output = network(images)
    except RuntimeError as error:
        raise ValueError(
            f"the network must run on images of shape {tuple(images.shape)}, it raised: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise ValueError(
            f"only networks that return one tensor are exported, got {type(output).__name__}"
        )
    return output


def _check(outputs: Tensor, expected: Tensor, path: Path) -> None:
    error = float((outputs - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:  # NaN fails
        raise RuntimeError(
            f"{path} computes something else than the network: off by {error:.1e} of the largest "
            "output; do not use it"
        )


def _write_torchscript(network: nn.Module, images: Tensor, path: Path) -> None:
    torch.jit.trace(network, images).save(str(path))  # type: ignore[no-untyped-call]


def _read_torchscript(path: Path) -> _Run:
    loaded: _Run = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return loaded


def _write_exported(network: nn.Module, images: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _read_exported(path: Path) -> _Run:
    return torch.export.load(path).module()


def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(path)


def _read_onnx(path: Path) -> _Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_Way = tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path], _Run]]
_WAYS: Mapping[ExchangeFormat, _Way] = {
    "torchscript": (_write_torchscript, _read_torchscript),
    "torch.export": (_write_exported, _read_exported),
    "onnx": (_write_onnx, _read_onnx),
}


def _require_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"format onnx needs {', '.join(missing)}; pip install 'fppmo-ray[export]' has them"
        )


@contextmanager
def _in_eval_mode_on_cpu(network: nn.Module) -> Iterator[None]:
    """For a while, in place."""
    was_training = [(module, module.training) for module in network.modules()]
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    network.eval().cpu()
    try:
        yield
    finally:
        network.to(device)
        for module, training in was_training:
            module.training = training


@contextmanager
def _without_torchs_own_warnings() -> Iterator[None]:
    """TorchScript is deprecated, and still what many runtimes read."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
