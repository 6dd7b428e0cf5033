from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fppmo_ray.service.device import claim_device
from fppmo_ray.training import ComputeConfig, compute


def problem(dtype: Any, device_type: str = "cpu") -> Any:
    """As much of one as a device is claimed for."""
    return SimpleNamespace(
        threads=torch.get_num_threads(),
        device_type=device_type,
        gpu_share=1.0,
        compute=ComputeConfig(dtype=dtype),
    )


def test_bfloat16_that_is_slow_on_a_cpu_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compute, "bfloat16_slowdown", lambda: 8.13)
    assert claim_device(problem("bfloat16")) == torch.device("cpu")
    [warning] = caplog.messages
    assert "bfloat16 takes 8.1 times as long as float32 on this CPU" in warning
    assert "use dtype float32, or auto" in warning


def test_bfloat16_that_is_fast_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compute, "bfloat16_slowdown", lambda: 0.5)
    claim_device(problem("bfloat16"))
    assert caplog.messages == []


def test_bfloat16_is_not_measured_where_nobody_asked_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never() -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(compute, "bfloat16_slowdown", never)
    claim_device(problem("float32"))
    assert caplog.messages == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_promised_gpu_that_torch_does_not_see_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="torch sees no CUDA device; install a CUDA build"):
        claim_device(problem("float32", "cuda"))
