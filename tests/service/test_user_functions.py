from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fppmo_ray.service.user_functions import ProcessState, seed_everything, with_plain_errors

HAS_PRECISIONS = hasattr(torch.backends, "fp32_precision")
LEAKS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "grad mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "anomalies": (
        torch.is_anomaly_enabled,
        lambda: torch.autograd.set_detect_anomaly(not torch.is_anomaly_enabled()),
    ),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "matmul precision": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.set_autocast_enabled("cpu", True),
    ),
    "benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
    ),
    "tf32": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    ),
    "matmul tf32": (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    ),
    "onednn": (
        lambda: torch.backends.mkldnn.enabled,
        lambda: setattr(torch.backends.mkldnn, "enabled", False),
    ),
    "attention": (
        torch.backends.cuda.math_sdp_enabled,
        lambda: torch.backends.cuda.enable_math_sdp(False),
    ),
    "numpy's errors": (np.geterr, lambda: np.seterr(all="raise")),
    "environment": (lambda: dict(os.environ), lambda: os.environ.update(LEAKED="1")),
    "lost variable": (lambda: dict(os.environ), lambda: os.environ.pop("PATH")),
    "folder": (os.getcwd, lambda: os.chdir("/")),
}
if HAS_PRECISIONS:
    LEAKS["new tf32"] = (
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    )


@pytest.mark.parametrize("name", LEAKS)
def test_a_change_of_the_process_is_undone(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    read, change = LEAKS[name]
    state, before = ProcessState(), read()
    try:
        change()
        assert read() != before
    finally:
        state.restore()
    assert read() == before


def drawn() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002


def test_all_generators_begin_anew_with_a_state_and_with_a_seed() -> None:
    state = ProcessState()
    state.restore()
    first = drawn()
    assert drawn() != first
    state.restore()
    assert drawn() == first
    seed_everything(7)
    other = drawn()
    assert all(one != another for one, another in zip(first, other, strict=True))
    seed_everything(7)
    assert drawn() == other


def test_a_state_is_restored_without_importing_dynamo() -> None:
    code = (
        "import sys; from fppmo_ray.service.user_functions import ProcessState\n"
        "ProcessState().restore(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_errors_that_are_no_unicode_reach_the_driver_escaped() -> None:
    @with_plain_errors
    class Worker:
        def open(self, name: str) -> None:
            raise ValueError(f"cannot open {name}")

    with pytest.raises(RuntimeError) as raised:
        Worker().open("caf\udce9.png")
    assert str(raised.value) == "ValueError('cannot open caf\\udce9.png')"
    assert raised.value.__suppress_context__
    with pytest.raises(ValueError, match=r"cannot open café\.png"):
        Worker().open(name="café.png")
