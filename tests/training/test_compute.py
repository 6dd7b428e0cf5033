"""How passes are computed, as a value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fppmo_ray.training import PLAIN_COMPUTE, ComputeConfig, DType, lay_out, slow_bfloat16
from fppmo_ray.training import compute as compute_module


def test_a_compute_configuration_says_what_it_does() -> None:
    assert str(PLAIN_COMPUTE) == "float32, channels last, scored by 250, 1 thread"
    compute = ComputeConfig(
        dtype="bfloat16",
        channels_last=False,
        fold_batchnorm=True,
        cuda_graphs=True,
        scoring_batch=1000,
        threads=4,
    )
    assert str(compute) == ("bfloat16, folded batch norm, CUDA graphs, scored by 1000, 4 threads")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dtype": "float16"}, r"dtype must be one of .*, got 'float16'"),
        ({"scoring_batch": 0}, "scoring_batch must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ComputeConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_are_laid_out_as_the_compute_configuration_says(channels_last: bool) -> None:
    network = nn.Conv2d(4, 8, 3)
    lay_out(network, ComputeConfig(channels_last=not channels_last))
    lay_out(network, ComputeConfig(channels_last=channels_last))
    is_channels_last = network.weight.is_contiguous(memory_format=torch.channels_last)
    assert (is_channels_last, network.weight.is_contiguous()) == (channels_last, not channels_last)


def test_the_slowdown_of_bfloat16_is_its_least_time_over_that_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = [1.0, 0.25, 0.5, 3.0, 2.0, 4.0]  # of three passes in float32, three in bfloat16
    times = [0.0, *seconds]
    ticks = iter(sum(times[: i // 2 + 1 + i % 2]) for i in range(12))
    monkeypatch.setattr(compute_module.time, "perf_counter", lambda: next(ticks))
    assert compute_module.bfloat16_slowdown() == 2.0 / 0.25


@pytest.mark.parametrize(
    ("dtype", "device", "slowdown", "why"),
    [
        ("bfloat16", "cpu", 8.13, "bfloat16 takes 8.1 times as long as float32 on this CPU"),
        ("bfloat16", "cpu", 0.5, None),
        ("bfloat16", "cuda", 8.13, None),
        ("float32", "cpu", 8.13, None),
    ],
)
def test_bfloat16_is_spoken_against_where_the_cpu_has_no_units_for_it(
    monkeypatch: pytest.MonkeyPatch, dtype: DType, device: str, slowdown: float, why: str | None
) -> None:
    monkeypatch.setattr(compute_module, "bfloat16_slowdown", lambda: slowdown)
    said = slow_bfloat16(ComputeConfig(dtype=dtype), torch.device(device))
    assert said == (why if why is None else f"{why}, which has no units for it")
