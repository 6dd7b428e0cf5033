"""Everything of a process that numbers depend on and that a user's function may have changed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

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
