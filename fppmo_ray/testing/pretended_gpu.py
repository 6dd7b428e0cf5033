"""A pretended GPU: a torch device written in Python, for tests on machines without a GPU.

Its numbers are computed on the CPU, so results equal the CPU's. It enforces what CUDA enforces and
counts what slows CUDA down:

- An operation that mixes tensors of the device and of the CPU raises.
- Reads of values by the host (waits), copies from memory that is not pinned, and kernel launches
  are counted. Waits and such copies raise while a graph is captured.
- Memory is counted, and a process has a limit; more raises ``torch.OutOfMemoryError``.
- CUDA graphs: a capture records operations and changes nothing; a replay repeats them on the same
  memory.

What it cannot show: speed, kernels that are missing for CUDA, races between streams.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fppmo_ray.testing.device_rules import DeviceMemory, Held, HostTraffic
from fppmo_ray.testing.recorded_graph import Recording

_NAME = "pretend"
_TOTAL_BYTES = 8 * 2**30
_CAPABILITY = 8, 0  # NVIDIA Ampere
_LOWERED = "conv1d", "conv2d", "conv3d", "linear", "matmul", "addmm", "mm", "bmm"
"""Operations that autocast computes in bfloat16."""


class PretendedGpu:
    """The state of the device, and the module that ``torch.get_device_module`` returns for it."""

    device = torch.device("cpu")  # replaced once torch knows the device's name

    def __init__(self) -> None:
        self.traffic = HostTraffic(_NAME)
        """What the host reads, copies and launches."""
        self.waits = self.traffic.waits
        self.pageable_copies = self.traffic.pageable_copies
        self.launches = self.traffic.launches
        self.memory = DeviceMemory(_TOTAL_BYTES)
        """The memory of this process's tensors."""
        self.replays = 0
        """How often a graph was replayed."""
        self.is_usable = False
        """Whether ``pretended_gpu`` is entered; torch takes devices that are available unasked."""
        self.recording: Recording | None = None
        """The graph that is being captured."""

    def reset_counts(self) -> None:
        """Set all counters to zero."""
        for counter in (self.waits, self.pageable_copies, self.launches):
            counter.clear()
        self.replays = 0

    # The functions of torch.cuda that this package uses

    def is_available(self) -> bool:
        """Return whether ``pretended_gpu`` is entered."""
        return self.is_usable

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def device_count(self) -> int:
        """Return 1, or 0 where the device is not available."""
        return int(self.is_usable)

    def get_device_name(self, device: object = None) -> str:
        """Return a name that no real GPU has."""
        return "pretended GPU"

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        """Return the capability of a GPU with units for bfloat16."""
        return _CAPABILITY

    def get_device_properties(self, device: object = None) -> Any:
        """Return an object with ``total_memory``."""
        return SimpleNamespace(total_memory=_TOTAL_BYTES, name=self.get_device_name())

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the number formats of autocast."""
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: the device draws from the CPU's generator."""

    def get_rng_state(self, device: object = None) -> Tensor:
        """Return the state of the CPU's generator, which the device draws from."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """Do nothing: the state of the CPU's generator is set by itself."""

    def synchronize(self, device: object = None) -> None:
        """Count a wait."""
        self.traffic.wait("synchronize")

    def set_sync_debug_mode(self, mode: object) -> None:
        """Do nothing: waits are always counted."""

    def set_per_process_memory_fraction(self, fraction: float, device: object = None) -> None:
        """Limit the memory of this process.

        Args:
            fraction: Share of the device's memory.
            device: Not used; there is only one.
        """
        self.memory.limit = int(fraction * _TOTAL_BYTES)

    def memory_allocated(self, device: object = None) -> int:
        """Return the bytes of all living tensors, graphs' own included."""
        return self.memory.allocated

    def max_memory_allocated(self, device: object = None) -> int:
        """Return the most bytes that were allocated at a time."""
        return self.memory.peak

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Count the most bytes from now on."""
        self.memory.peak = self.memory.allocated

    def empty_cache(self) -> None:
        """Do nothing: freed memory is not kept."""

    def is_current_stream_capturing(self) -> bool:
        """Return whether a graph is being captured."""
        return self.recording is not None

    def Stream(self, *_: object) -> Any:
        """Return a stream; there is no order to keep, since all operations run at once."""
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def Event(self, *, enable_timing: bool = False) -> Any:
        """Return an event with the CPU's clock."""
        return _Event()

    def stream(self, stream: object) -> Any:
        """Return a context that changes nothing."""
        return nullcontext()

    def CUDAGraph(self) -> Recording:
        """Return an empty graph."""
        return Recording(self.memory.is_alive, self._count_replay)

    @contextmanager
    def graph(self, graph: Recording, **_: object) -> Iterator[None]:
        """Record all operations instead of keeping what they change.

        Args:
            graph: A graph from ``CUDAGraph``.
        """
        self.recording, self.traffic.is_capturing = graph, True
        generator = torch.get_rng_state()
        try:
            yield
        finally:
            self.recording, self.traffic.is_capturing = None, False
            graph.undo()
            torch.set_rng_state(generator)

    # What tensors do

    def _count_replay(self) -> None:
        self.replays += 1

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that has a tensor of the device, or makes one.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its named arguments.

        Raises:
            RuntimeError: it mixes devices, or waits during a capture.
        """
        self.memory.raise_if_too_much()
        name = str(func)
        leaves, spec = tree_flatten((args, kwargs))
        asked = kwargs.get("device")
        on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        on_host = [
            leaf
            for leaf in leaves
            if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)
        ]
        to_device = torch.device(asked).type == _NAME if asked is not None else bool(on_device)
        self.traffic.check(func, args, kwargs, on_device, on_host, to_device)
        wrapper_of = {id(tensor.on_cpu): tensor for tensor in on_device}
        inner_args, inner_kwargs = spec.unflatten(
            [leaf.on_cpu if isinstance(leaf, DeviceTensor) else leaf for leaf in leaves]
        )
        if asked is not None:
            inner_kwargs["device"] = torch.device("cpu")
        if inner_kwargs.get("pin_memory"):
            inner_kwargs["pin_memory"] = False
        if self.recording is not None:
            out = self.recording.record(func, inner_args, inner_kwargs)
        else:
            out = func(*inner_args, **inner_kwargs)
        if name == "aten.copy_.default":
            return args[0]

        def wrap(tensor: Tensor) -> Tensor:
            known = wrapper_of.get(id(tensor))
            if known is not None or not to_device:
                return tensor if known is None else known
            return DeviceTensor(tensor)

        return tree_map_only(Tensor, wrap, out)


class _Event:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        return 1000 * (later.at - self.at)


class DeviceTensor(Tensor):
    """A tensor of the pretended device; ``on_cpu`` holds its numbers on the CPU."""

    on_cpu: Tensor
    memory: Held

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        """Return a tensor with the numbers of ``on_cpu``, which it shares."""
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_gpu().device,
        )
        made.on_cpu = inner
        made.memory = _gpu().memory.hold(inner.untyped_storage())
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the device."""
        return _gpu().run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return the numbers."""
        return f"DeviceTensor({self.on_cpu})"

    def tolist(self) -> Any:
        """Return the numbers, which waits for the device."""
        _gpu().traffic.wait("tolist")
        return self.on_cpu.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError(f"can't convert {_NAME}:0 device type tensor to numpy. Use Tensor.cpu()")

    __array__ = numpy  # type: ignore[assignment]


class _OnDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, tensors can be made on the device, and memory can be pinned."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        gpu = _gpu()
        asked = kwargs.get("device")
        leaves = tree_flatten((args, kwargs))[0]
        makes = asked is not None and torch.device(asked).type == _NAME
        if makes or any(isinstance(leaf, DeviceTensor) for leaf in leaves):
            return gpu.run(func, args, kwargs)
        if func is torch.ops.aten.is_pinned.default:
            return gpu.traffic.is_pinned(args[0])
        pins = kwargs.pop("pin_memory", None) or func is torch.ops.aten._pin_memory.default
        made = args[0].clone() if func is torch.ops.aten._pin_memory.default else None
        made = func(*args, **kwargs) if made is None else made
        if pins:
            gpu.traffic.pinned.add(made)
        return made


_libraries: list[Any] = []  # an implementation lives as long as its library object


@cache
def _gpu() -> PretendedGpu:
    """Return the device of this process, after telling torch of it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    gpu = PretendedGpu()
    _setup_privateuseone_for_python_backend(_NAME, backend_module=gpu)
    PretendedGpu.device = torch.device(_NAME, 0)
    library: Any = torch.library.Library
    passed_on = library("_", "IMPL")
    passed_on.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    lowered = library("aten", "IMPL")
    for name in _LOWERED:
        operation = getattr(torch.ops.aten, name).default
        lowered.impl(name, _in_bfloat16(operation), "AutocastPrivateUse1")
    _libraries.extend([passed_on, lowered])
    return gpu


def _in_bfloat16(operation: Any) -> Callable[..., Any]:
    internals: Any = torch._C
    keys = internals.DispatchKeySet(internals.DispatchKey.AutocastPrivateUse1)

    def cast(tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.bfloat16) if is_cast else tensor

    def run(*args: Any, **kwargs: Any) -> Any:
        with internals._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map_only(Tensor, cast, args), **kwargs)

    return run


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Make the device usable in this thread, with counters at zero and no limit of memory.

    Raises:
        RuntimeError: this version of torch has no devices in Python; 2.10 is the first with them.
    """
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        raise RuntimeError(f"torch {torch.__version__} has no devices written in Python; use 2.10")
    gpu = _gpu()
    gpu.reset_counts()
    gpu.memory.limit, gpu.memory.too_much, gpu.is_usable = _TOTAL_BYTES, None, True
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # for Module.to(device)
    try:
        # The backward pass has no thread for a device that torch was told of late.
        mode: Any = _OnDevice
        with mode(), torch.autograd.set_multithreading_enabled(False):
            yield gpu
    finally:
        gpu.is_usable = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)
