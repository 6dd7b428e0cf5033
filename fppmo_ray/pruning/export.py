"""Export to formats that run without the Python class: TorchScript, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fppmo_ray.pruning.network_io import ExampleInputs, checked, flat_tensors, random_inputs

ExchangeFormat = Literal["torchscript", "torch.export", "onnx"]

SUFFIXES: Mapping[ExchangeFormat, str] = {
    "torchscript": ".torchscript.pt",
    "torch.export": ".pt2",
    "onnx": ".onnx",
}
TOLERANCE = 1e-4
"""Largest allowed error in float32, relative to the largest output."""
_BATCHES = (1, 3)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_Inputs = tuple[Tensor, ...]
_Run = Callable[[_Inputs], list[Tensor]]
"""Takes inputs, and returns the outputs as a flat list."""


def export_network(
    network: nn.Module,
    path: str | Path,
    *,
    format: ExchangeFormat,
    example_inputs: ExampleInputs,
) -> Path:
    """Write a network to a file that runs without its Python class, and verify the file.

    The file is loaded again, and its outputs on batches of one and of three random inputs must
    equal the network's to 1e-4 of the largest number of each output.

    Args:
        network: The network, which may return several tensors in tuples, lists and dicts. It is
            exported in eval mode and on the CPU, and not changed.
        path: File name; the format's suffix is added. Its folder is created.
        format: ``torchscript`` (``torch.jit.load``), ``torch.export`` (``torch.export.load``) or
            ``onnx`` (needs ``pip install 'fppmo-ray[export]'``). In ONNX one input is called
            ``images`` and one output ``logits``; several are ``input_0``, ``output_0`` and so on.
        example_inputs: Arguments of its forward, each with a batch axis, e.g. ``(1, 3, 32, 32)``.

    Returns:
        The path of the file.

    Raises:
        ValueError: the format is unknown, packages for it are missing, or the network does not run
            on such inputs.
        RuntimeError: the file does not compute the same as the network.
    """
    if format not in get_args(ExchangeFormat):
        raise ValueError(f"format must be one of {get_args(ExchangeFormat)}, got {format!r}")
    if format == "onnx":
        _require_onnx()
    examples = checked(example_inputs)
    target = Path(path)
    target = target.with_name(target.name + SUFFIXES[format])
    target.parent.mkdir(parents=True, exist_ok=True)
    write, read = _WAYS[format]
    with _in_eval_mode_on_cpu(network), _without_torchs_own_warnings(), torch.no_grad():
        batches = {batch: _random(examples, batch) for batch in _BATCHES}
        expected = {batch: _run(network, inputs) for batch, inputs in batches.items()}
        write(network, _random(examples, 2), target)
        run = read(target)
        for batch, outputs in expected.items():
            _check(run(batches[batch]), outputs, target)
    return target


def _random(examples: _Inputs, batch: int) -> _Inputs:
    return random_inputs(examples, batch, torch.float32, seed=batch)


def _run(network: nn.Module, inputs: _Inputs) -> list[Tensor]:
    try:
        return flat_tensors(network(*inputs))
    except (RuntimeError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ValueError(
            f"the network must run on inputs of shapes {shapes}, it raised: {error}"
        ) from error


def _check(outputs: list[Tensor], expected: list[Tensor], path: Path) -> None:
    if len(outputs) != len(expected):
        raise RuntimeError(
            f"{path} returns {len(outputs)} tensors and the network {len(expected)}; do not use it"
        )
    errors = [
        float((output - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        for output, wanted in zip(outputs, expected, strict=True)
    ]
    if not all(error <= TOLERANCE for error in errors):  # NaN fails
        raise RuntimeError(
            f"{path} computes something else than the network: off by {max(errors):.1e} of the "
            "largest output; do not use it"
        )


def _write_torchscript(network: nn.Module, inputs: _Inputs, path: Path) -> None:
    # strict=False lets the network return dicts.
    script = torch.jit.trace(network, inputs, strict=False)  # type: ignore[no-untyped-call]
    script.save(str(path))


def _read_torchscript(path: Path) -> _Run:
    loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return lambda inputs: flat_tensors(loaded(*inputs))


def _write_exported(network: nn.Module, inputs: _Inputs, path: Path) -> None:
    program = torch.export.export(network, inputs, dynamic_shapes=_along_batches(inputs))
    torch.export.save(program, path)


def _read_exported(path: Path) -> _Run:
    loaded = torch.export.load(path).module()
    return lambda inputs: flat_tensors(loaded(*inputs))


def _along_batches(inputs: _Inputs) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def _write_onnx(network: nn.Module, inputs: _Inputs, path: Path) -> None:
    num_outputs = len(flat_tensors(network(*inputs)))
    program = torch.onnx.export(
        network,
        inputs,
        dynamo=True,
        dynamic_shapes=_along_batches(inputs),
        input_names=_names("images", "input", len(inputs)),
        output_names=_names("logits", "output", num_outputs),
        verbose=False,
    )
    assert program is not None
    program.save(path)


def _read_onnx(path: Path) -> _Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: _Inputs) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def _names(of_one: str, of_several: str, count: int) -> list[str]:
    return [of_one] if count == 1 else [f"{of_several}_{index}" for index in range(count)]


_Way = tuple[Callable[[nn.Module, _Inputs, Path], None], Callable[[Path], _Run]]
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
    """Put a network in eval mode and on the CPU within the block, in place."""
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
    """Silence torch's warnings that TorchScript is deprecated and that a batch axis is shared.

    Many runtimes still read TorchScript, and all inputs do share their batch axis.
    """
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
