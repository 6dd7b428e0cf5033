from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fppmo_ray.service import device
from fppmo_ray.training import ComputeConfig


def problem(dtype: Any, device_type: str = "cpu") -> Any:
    """As much of one as a device is claimed for."""
    return SimpleNamespace(
        threads=torch.get_num_threads(),
        device_type=device_type,
        gpu_share=1.0,
        compute=ComputeConfig(dtype=dtype),
    )


@pytest.mark.parametrize(
    ("asked", "native", "warns"),
    [
        ("bfloat16", "float32", True),
        ("bfloat16", "bfloat16", False),
        ("float32", "float32", False),
    ],
)
def test_bfloat16_that_the_cpu_has_no_units_for_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: str,
    native: str,
    warns: bool,
) -> None:
    monkeypatch.setattr(device, "native_dtype", lambda cpu: native)
    assert device.claim_device(problem(asked)) == torch.device("cpu")
    assert caplog.messages == warns * [
        "this processor has no units for bfloat16 and computes it several times slower "
        "than float32; use dtype float32 or auto"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_promised_gpu_that_torch_does_not_see_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="torch sees no CUDA device; install a CUDA build"):
        device.claim_device(problem("float32", "cuda"))
