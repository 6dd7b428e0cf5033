"""Random numbers in a forward that do not depend on the widths of the network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fppmo_ray.pruning.dependency.rules import operation_name

_DRAWN = frozenset(
    "normal uniform rand randn rand_like randn_like randint randint_like random exponential "
    "log_normal cauchy geometric".split()
)
_SAMPLE = 64  # numbers; torch draws few by another method than many


@contextmanager
def even_noise() -> Iterator[None]:
    """Make all randomness equal in every pass within the block, whatever the widths.

    Every random tensor is filled with one number, and dropout drops nothing, so that a network that
    lost channels can be compared with the dense one. Generators of torch, numpy and Python are
    seeded, and restored afterwards.
    """
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.default_generator.manual_seed(0)
        try:
            with _EvenNoise():
                yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002


class _EvenNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the results of random operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_draws = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        # A larger tensor takes more numbers from the generator, so every operation has its own.
        self._num_draws += 1
        torch.default_generator.manual_seed(self._num_draws)
        name = operation_name(func)
        if name in _DRAWN:
            number = func(*_small(args), **kwargs).flatten()[0]
            return func(*args, **kwargs).fill_(number)
        result = func(*args, **kwargs)
        if name == "bernoulli":
            return result.fill_(1)
        if name == "native_dropout" and args[2] is not False:
            return args[0] / (1 - args[1]), result[1].fill_(1)
        return result


def _small(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments for a result of few numbers: the tensor or the size is replaced."""
    small = list(args)
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            small[place] = value.new_empty(_SAMPLE)
            break
        if isinstance(value, list | tuple):
            small[place] = [_SAMPLE]
            break
    return tuple(small)
