"""Functions of users on the workers: their code, their errors, and the state of their process."""

from __future__ import annotations

import math
import os
import random
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce, wraps
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from torch import Tensor, nn

_Worker = TypeVar("_Worker")

_ON_EVERY_WORKER = frozenset({__name__.partition(".")[0], "numpy", "ray", "torch", "torchvision"})
"""Top-level packages without which no worker starts, wherever Python finds them."""


@contextmanager
def pickled_by_value(network: nn.Module, *functions: Callable[..., Any] | None) -> Iterator[None]:
    """While the context is open, pickle code whole whose modules are not installed.

    By default, classes and functions are pickled by the names of their modules. Workers cannot
    import a module that lies beside a script: other nodes do not have it, and the folder of a
    submitted job is not on the workers' path.

    Args:
        network: A network; its own class, the classes of its submodules and all base classes are
            considered.
        functions: Functions, methods or instances of callable classes; None is skipped.
    """
    named = {kind.__module__ for part in network.modules() for kind in type(part).__mro__}
    named |= {module for function in functions for module in _modules_of(function)}
    modules = [sys.modules[name] for name in sorted(named) if name in sys.modules]
    pickle: Any = ray.cloudpickle
    already = pickle.list_registry_pickle_by_value()
    own = [module for module in modules if _is_own(module) and module.__name__ not in already]
    for module in own:
        pickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            pickle.unregister_pickle_by_value(module)


def _modules_of(function: Any) -> set[str]:
    bound_to = getattr(function, "__self__", function)
    kinds = {kind.__module__ for kind in type(bound_to).__mro__}
    return kinds | {getattr(function, "__module__", None) or "builtins"}


def _is_own(module: ModuleType) -> bool:
    """Whether only this process can import a module; ``__main__`` is pickled whole anyway."""
    name, file = module.__name__, getattr(module, "__file__", None)
    if file is None or name == "__main__" or name.partition(".")[0] in _ON_EVERY_WORKER:
        return False
    return not _is_installed(file)


def _is_installed(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in _installed())


def _installed() -> set[str]:
    """Folders of the standard library and of packages that pip or a module system installed.

    An overlay on PYTHONPATH, or a folder that a .pth file names, shows its packages' metadata.
    """
    paths = sysconfig.get_paths()
    named = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    overlays = {folder for folder in sys.path if folder and any(Path(folder).glob("*.dist-info"))}
    return named | overlays | {*site.getsitepackages(), site.getusersitepackages()}


def line_of_user(error: BaseException) -> str:
    """Return the innermost line of code that belongs to no installed package: ``file:line``.

    Args:
        error: What was raised; without a line of the user's, its innermost line is returned.
    """
    lines = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    users = [
        line
        for line in lines
        if not _is_installed(line.filename) and not Path(line.filename).is_relative_to(ours)
    ]
    last = [*lines, *users][-1]
    return f"{last.filename}:{last.lineno} in {last.name}"


def with_plain_errors(worker: type[_Worker]) -> type[_Worker]:
    """Let the public methods of a worker's class raise errors that Ray can send, in place.

    A text that is no Unicode, such as the name of a file in another encoding, ends Ray's process
    when it stands in an error.
    """

    def plain(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except Exception as error:
                if _is_unicode(str(error)):
                    raise
                raise RuntimeError(repr(error)) from None  # repr() escapes what cannot be encoded

        return call

    for name, method in list(vars(worker).items()):
        if callable(method) and not name.startswith("_"):
            setattr(worker, name, plain(method))
    return worker


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_PRECISIONS = (
    *("backends", "backends.cudnn", "backends.cudnn.conv", "backends.cudnn.rnn"),
    *("backends.cuda.matmul", "backends.mkldnn", "backends.mkldnn.conv"),
    *("backends.mkldnn.matmul", "backends.mkldnn.rnn"),
)
_HAS_PRECISIONS = hasattr(torch.backends, "fp32_precision")  # since torch 2.9
# In this order, because older switches such as allow_tf32 move the newer precisions.
_FLAGS = (
    *(("backends.cudnn", name) for name in ("allow_tf32", "enabled", "benchmark", "deterministic")),
    ("backends.mkldnn", "enabled"),
    *((place, "fp32_precision") for place in _PRECISIONS if _HAS_PRECISIONS),
)
_DEVICES = ("cpu", "cuda")


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(mode: tuple[bool, bool]) -> None:
    if mode != _deterministic():  # the setter imports dynamo, for 2 s
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def _set_autocast(modes: list[tuple[bool, torch.dtype]]) -> None:
    for device, (is_enabled, dtype) in zip(_DEVICES, modes, strict=True):
        torch.set_autocast_enabled(device, is_enabled)
        torch.set_autocast_dtype(device, dtype)


_FUNCTIONS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (os.getcwd, os.chdir),
    (np.geterr, lambda modes: np.seterr(**modes)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_deterministic, _set_deterministic),
    (
        lambda: [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES],
        _set_autocast,
    ),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
)


class ProcessState:
    """The state of this process now, to return to: flags of torch and numpy, folder, environment.

    Threads are not part of it: they belong to the compute configuration.
    """

    def __init__(self) -> None:
        self._values = [read() for read, _ in _FUNCTIONS]
        self._flags = [getattr(_part(place), name) for place, name in _FLAGS]
        self._environment = dict(os.environ)

    def restore(self) -> None:
        """Return to the state, and seed the random generators of torch, numpy and Python with 0."""
        for (_, write), value in zip(_FUNCTIONS, self._values, strict=True):
            write(value)
        for (place, name), value in zip(_FLAGS, self._flags, strict=True):
            # torch refuses to read older switches where a precision was set, even to the same.
            if name != "fp32_precision" or getattr(_part(place), name) != value:
                setattr(_part(place), name, value)
        if torch.get_default_device().type != "cpu":
            torch.set_default_device(None)
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        seed_everything(0)


def seed_everything(seed: int) -> None:
    """Seed the global random generators of torch, numpy and Python.

    Args:
        seed: In [0, 2**32).
    """
    torch.default_generator.manual_seed(seed)  # torch.manual_seed imports dynamo too
    torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)  # noqa: NPY002  (users' functions may draw from it)
    random.seed(seed)


def _part(place: str) -> Any:
    """Return a submodule of torch by its dotted name."""
    return reduce(getattr, place.split("."), torch)


def name_of(function: Any) -> str | None:
    """Return the qualified name of a function or method; of another callable, its class's."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def set_seed(seed: Sequence[int]) -> int:
    """Make a seed of 32 bits from several numbers, give it to all generators, return it."""
    number = int(np.random.SeedSequence(tuple(seed)).generate_state(1)[0])
    seed_everything(number)
    return number


@contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Name the function and its line in what a user's function raises.

    A function that calls ``sys.exit`` would otherwise end its worker without a word.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise RuntimeError(
            f"{name} of the task raised {type(error).__name__}: {error} (at {line_of_user(error)})"
        ) from error


def as_number(found: object, name: str) -> float:
    """Return the number that a user's function returned, plain or in an array of one element.

    Args:
        found: What it returned.
        name: The function's name in a task, for the message.

    Raises:
        ValueError: it is no number.
    """
    is_scalar = isinstance(found, Tensor | np.ndarray) and math.prod(found.shape) == 1
    value = found.item() if is_scalar else found  # type: ignore[attr-defined]
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise ValueError(
        f"{name} of the task must return a number, got {_described(value)}; higher is better"
    )


def _described(found: object) -> str:
    if isinstance(found, Tensor | np.ndarray):
        return f"{type(found).__name__} of shape {tuple(found.shape)}"
    return type(found).__name__
