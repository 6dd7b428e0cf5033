"""How long calls take on a device, one at a time and in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], object]
"""Runs something on the device."""

_TURNS = 8
_SAMPLES = 4  # of each turn
_SAMPLE_S = 1e-3  # what is over sooner is called several times in a row
_MOST_CALLS = 32


def seconds_in_turns(makers: Sequence[Callable[[], Call]], device: torch.device) -> list[float]:
    """Seconds of each call: the least of several turns that all of them take.

    What else the machine does can only add to a time, and comes and goes: so the least tells, and
    what is compared is measured in turns. Each call is made anew for each, since all of them
    together might not fit into memory.

    Args:
        makers: Each makes a call, with all that it needs, on the device.
        device: A CPU or a GPU.
    """
    least = [float("inf")] * len(makers)
    for _ in range(_TURNS):
        for index, make in enumerate(makers):
            least[index] = min(least[index], *_samples(make(), device))
    return least


def _samples(call: Call, device: torch.device) -> list[float]:
    _sample(call, 1, device)  # kernels are chosen, memory is taken
    calls = min(_MOST_CALLS, max(1, round(_SAMPLE_S / _sample(call, 1, device))))
    return [_sample(call, calls, device) for _ in range(_SAMPLES)]


def _sample(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one of several calls in a row."""
    if device.type == "cuda":
        return _cuda_sample(call, calls, device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def _cuda_sample(call: Call, calls: int, device: torch.device) -> float:
    """By the device's own clock, waiting for the next kernel included."""
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000 / calls
