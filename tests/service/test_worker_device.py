from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fppmo_ray.service import worker
from fppmo_ray.training import ComputeConfig


def problem(dtype: Any, device_type: str = "cpu") -> Any:
    """Return the fields that a worker reads of its problem to claim a device."""
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
def test_bfloat16_on_a_cpu_without_units_for_it_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: str,
    native: str,
    warns: bool,
) -> None:
    monkeypatch.setattr(worker, "native_dtype", lambda cpu: native)
    assert worker.claim_device(problem(asked)) == torch.device("cpu")
    assert caplog.messages == warns * [
        "this processor has no units for bfloat16 and computes it several times slower "
        "than float32; use dtype float32 or auto"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_promised_gpu_that_torch_does_not_see_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="torch sees no CUDA device; install a CUDA build"):
        worker.claim_device(problem("float32", "cuda"))
