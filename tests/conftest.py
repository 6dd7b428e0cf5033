"""Fixtures of the whole suite, and the way to torchvision beside a CPU build of torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported. Ray's workers and the jobs started by tests inherit it: their networks
# are small, and threads that wait for each other on few busy cores take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from fppmo_ray.testing.pretended_gpu import PretendedGpu

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


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    """A GPU that is pretended on the CPU, which workers of this test find; see its module."""
    from fppmo_ray.service import worker
    from fppmo_ray.testing.pretended_gpu import pretended_gpu

    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python; 2.10 has")
    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "visible_gpu", lambda: gpu.device)
        yield gpu


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests, with two CPUs; never a cluster that happens to run on this machine."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, at its start
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def ray_here() -> Iterator[None]:
    """A Ray whose actors are objects of this process, in place of a real one; see its module."""
    from in_process_ray import in_process_ray

    with in_process_ray():
        yield
