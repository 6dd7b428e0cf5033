"""Export to formats that run without the Python class: TorchScript, torch.export, ONNX."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fppmo_ray.pruning.copying import on_cpu
from fppmo_ray.pruning.network_io import ExampleInputs, checked, random_inputs
from fppmo_ray.pruning.twin import relative_error
from fppmo_ray.training import Interface
from fppmo_ray.training.compute import in_mode
from fppmo_ray.training.outputs import flat_tensors

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
_Metadata = Mapping[str, Any]
_Opened = tuple[_Run, dict[str, Any]]
EXTRA_FILE = "interface.json"
"""Name of the file with the metadata inside TorchScript and torch.export files."""


def export_network(
    network: nn.Module,
    path: str | Path,
    *,
    format: ExchangeFormat,
    example_inputs: ExampleInputs,
    interface: Interface | None = None,
    fixed_batch: int | None = None,
) -> Path:
    """Write a network to a file that runs without its Python class, and verify the file.

    The file is loaded again, and its outputs on batches of one and of three random inputs must
    equal the network's to 1e-4 of the largest number of each output. A file that fails is removed.

    Args:
        network: The network, which may return several tensors in tuples, lists and dicts. It is
            exported in eval mode and on the CPU, and not changed.
        path: File name; the format's suffix is added. Its folder is created.
        format: ``torchscript`` (``torch.jit.load``), ``torch.export`` (``torch.export.load``) or
            ``onnx`` (needs ``pip install 'fppmo-ray[export]'``). In ONNX one input is called
            ``images`` and one output ``logits``; several are ``input_0``, ``output_0`` and so on.
            TorchScript returns outputs that are nested twice as one flat tuple.
        example_inputs: Arguments of its forward, each with a batch axis, e.g. ``(1, 3, 32, 32)``.
        interface: Preprocessing and class names, which the file then carries: ONNX as metadata with
            one JSON value per entry, the others as one JSON object in the extra file
            ``interface.json``. The shapes of inputs and outputs stand beside them.
        fixed_batch: The only batch size that the file has to take, >= 1, for networks and runtimes
            that cannot vary it; None: any.

    Returns:
        The path of the file.

    Raises:
        ValueError: the format is unknown, packages for it are missing, or the network does not run
            on such inputs.
        RuntimeError: the format cannot express the network, or the file does not compute the same
            as the network.
    """
    if fixed_batch is not None and fixed_batch < 1:
        raise ValueError(f"fixed_batch must be >= 1 or None, got {fixed_batch}")
    if format not in get_args(ExchangeFormat):
        raise ValueError(f"format must be one of {get_args(ExchangeFormat)}, got {format!r}")
    if format == "onnx":
        _require_onnx()
    examples = checked(example_inputs)
    target = Path(path)
    target = target.with_name(target.name + SUFFIXES[format])
    target.parent.mkdir(parents=True, exist_ok=True)
    write, read = _WAYS[format]
    network = on_cpu(network)
    with in_mode(network, training=False), _without_torchs_own_warnings(), torch.no_grad():
        sizes = _BATCHES if fixed_batch is None else (fixed_batch,)
        batches = {batch: _random(examples, batch) for batch in sizes}
        expected = {batch: _run(network, inputs) for batch, inputs in batches.items()}
        metadata = {
            **(interface or Interface()).to_json(),
            "inputs": describe_tensors(examples),
            "outputs": describe_tensors(expected[sizes[0]]),
        }
        varies = fixed_batch is None
        with _removed_if_refused(target), _sentences(format, varies=varies):
            write(network, _random(examples, fixed_batch or 2), target, metadata, varies)
            run, _ = read(target)
            found = {batch: run(inputs) for batch, inputs in batches.items()}
        with _removed_if_refused(target):
            for batch, outputs in expected.items():
                _check(found[batch], outputs, target)
    return target


@contextmanager
def _removed_if_refused(target: Path) -> Iterator[None]:
    """Remove the file, and the weights that ONNX puts beside large ones, if the block raises."""
    try:
        yield
    except BaseException:
        for path in (target, target.with_name(target.name + ".data")):
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _sentences(format: str, *, varies: bool) -> Iterator[None]:
    """Turn whatever torch's exporters and the runtimes raise into a sentence."""
    try:
        yield
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        way_out = "fixed_batch=1, or " if varies else ""
        raise RuntimeError(
            f"the network cannot be written as {format}, or run from it: {type(error).__name__}: "
            f"{first.strip()}; try {way_out}another format"
        ) from error


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
    for output, wanted in zip(outputs, expected, strict=True):
        if output.shape != wanted.shape:
            raise RuntimeError(
                f"{path} returns a tensor of shape {tuple(output.shape)} and the network one of "
                f"{tuple(wanted.shape)}; do not use it"
            )
    errors = [relative_error(*pair) for pair in zip(outputs, expected, strict=True)]
    if not all(error <= TOLERANCE for error in errors):  # NaN fails
        raise RuntimeError(
            f"{path} computes something else than the network: off by {max(errors):.1e} of the "
            "largest output; do not use it"
        )


def describe_tensors(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return shape and type of tensors as plain data, without the batch axis."""
    return [
        {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for tensor in tensors
    ]


def open_exported(path: Path) -> _Opened:
    """Return a function that runs an exported file, and the metadata that the file carries.

    Args:
        path: A file that ``export_network`` wrote.

    Raises:
        ValueError: there is no such file, or its suffix is not one of the formats.
    """
    format = next((name for name, suffix in SUFFIXES.items() if path.name.endswith(suffix)), None)
    if format is None or not path.is_file():
        raise ValueError(
            f"expected a file with one of the suffixes {', '.join(SUFFIXES.values())}, got {path}"
        )
    if format == "onnx":
        _require_onnx()
    with _without_torchs_own_warnings():
        return _WAYS[format][1](path)


class _Flat(nn.Module):
    """Returns the outputs of a network as a flat tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat_tensors(self.network(*inputs)))


def _is_scriptable(output: Any) -> bool:
    """Whether TorchScript can return an output: tensors in one tuple, list or dict."""
    if isinstance(output, Mapping):
        output = list(output.values())
    parts = output if isinstance(output, tuple | list) else [output]
    return all(isinstance(part, Tensor) for part in parts)


def _write_torchscript(
    network: nn.Module, inputs: _Inputs, path: Path, metadata: _Metadata, varies: bool
) -> None:
    if not _is_scriptable(network(*inputs)):
        network = _Flat(network)
    # strict=False lets the network return dicts.
    script = torch.jit.trace(network, inputs, strict=False)  # type: ignore[no-untyped-call]
    script.save(str(path), _extra_files={EXTRA_FILE: json.dumps(metadata)})


def _read_torchscript(path: Path) -> _Opened:
    extra = {EXTRA_FILE: ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)  # type: ignore[no-untyped-call]
    return lambda inputs: flat_tensors(loaded(*inputs)), _parsed(extra)


def _write_exported(
    network: nn.Module, inputs: _Inputs, path: Path, metadata: _Metadata, varies: bool
) -> None:
    dynamic = _along_batches(inputs) if varies else None
    program = torch.export.export(network, inputs, dynamic_shapes=dynamic)
    torch.export.save(program, path, extra_files={EXTRA_FILE: json.dumps(metadata)})


def _read_exported(path: Path) -> _Opened:
    extra = {EXTRA_FILE: ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    return lambda inputs: flat_tensors(loaded(*inputs)), _parsed(extra)


def _parsed(extra: Mapping[str, str | bytes]) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads(extra[EXTRA_FILE] or "{}")
    return metadata


def _along_batches(inputs: _Inputs) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def _write_onnx(
    network: nn.Module, inputs: _Inputs, path: Path, metadata: _Metadata, varies: bool
) -> None:
    num_outputs = len(flat_tensors(network(*inputs)))
    program = torch.onnx.export(
        network,
        inputs,
        dynamo=True,
        dynamic_shapes=_along_batches(inputs) if varies else None,
        input_names=_names("images", "input", len(inputs)),
        output_names=_names("logits", "output", num_outputs),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(
        {name: json.dumps(value) for name, value in metadata.items()}
    )
    program.save(path)


def _read_onnx(path: Path) -> _Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    entries = session.get_modelmeta().custom_metadata_map

    def run(inputs: _Inputs) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run, {name: json.loads(entries[name]) for name in entries}


def _names(of_one: str, of_several: str, count: int) -> list[str]:
    return [of_one] if count == 1 else [f"{of_several}_{index}" for index in range(count)]


_Write = Callable[[nn.Module, _Inputs, Path, _Metadata, bool], None]
"""Writes a network with metadata to a file whose batch axis varies, or not."""
_Way = tuple[_Write, Callable[[Path], _Opened]]
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
