"""Fixtures of the whole suite, and the way to torchvision beside a CPU build of torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Ray's workers and the jobs started by tests inherit it.
_SHIM = Path(__file__).parent / "cpu_torchvision"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if str(_SHIM) not in sys.path:
    sys.path.insert(0, str(_SHIM))

import torchvision_ops  # noqa: E402  (found through the path above)

torchvision_ops.install()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """CIFAR-10 (JPEG) and public ResNet weights; ``FPPMO_TEST_DATA`` or ``../shared/data``."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("FPPMO_TEST_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set FPPMO_TEST_DATA to a folder that holds it")
    return path
