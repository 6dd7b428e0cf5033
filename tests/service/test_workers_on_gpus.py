"""Workers on the GPUs of a Ray that pretends to have some: who gets which, and how much of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fppmo_ray import Resources
from fppmo_ray.service.ddp_training import scaling_of
from fppmo_ray.testing.pretended_gpu import PretendedGpu

_SCRIPT = """
import json, os, sys
import numpy as np
import ray

from fppmo_ray import Recipe, Resources, SearchSettings, load_dataset
from fppmo_ray.distribution import Proposal
from fppmo_ray.service import worker as worker_module
from fppmo_ray.service.image_task import image_classification
from fppmo_ray.service.pool.call import Call
from fppmo_ray.service.pool.worker_pool import worker_pool
from fppmo_ray.service.problem import build_problem
from fppmo_ray.service.worker import PruningWorker
from fppmo_ray.service.worker_protocol import share_weights, to_arrays
from fppmo_ray.testing.pretended_gpu import pretended_gpu
from fppmo_ray.training import build_network


class Worker(PruningWorker):
    def __init__(self, problem, slot):
        self.context = pretended_gpu()
        self.gpu = self.context.__enter__()
        worker_module.visible_gpu = lambda: self.gpu.device
        super().__init__(problem, slot)

    def where(self):
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        share = self.gpu.memory.limit / self.gpu.get_device_properties().total_memory
        return visible, share, repr(self)


gpus = int(sys.argv[1])
workers = 2 * gpus
ray.init(
    address="local", num_cpus=workers, num_gpus=gpus, include_dashboard=False, log_to_driver=False
)
resources = Resources(workers=workers, gpus=0.5)
network = build_network("digits_cnn", 10)
settings = SearchSettings(macs_cut=0.5, fine_tune=Recipe(epochs=0)).changed(dtype="float32")
problem = build_problem(
    network, image_classification(load_dataset("digits")), settings, resources=resources
)
keep = np.arange(problem.space.num_filters) % 2 == 0
proposal = Proposal(proposal_id=0, generation=0, keep=keep, macs=0)
with worker_pool(Worker, problem, num_workers=workers, demand=resources.demand) as pool:
    weights = share_weights(to_arrays(network), problem.compute)
    while pool.num_ready < workers:
        pool.run([Call("place", lambda worker: worker.where())])
    places = pool.run([Call("place", lambda worker: worker.where()) for _ in range(workers)])
    [score] = pool.run([Call("score", lambda worker: worker.score(weights.shared, proposal))])
on_cpu = PruningWorker(
    build_problem(network, image_classification(load_dataset("digits")), settings), 0
)
expected = on_cpu.score(weights.snapshot, proposal)
print(json.dumps({"places": places, "loss": score.val_loss, "expected": expected.val_loss}))
ray.shutdown()
"""


@pytest.mark.timeout(480)
@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_workers_share_each_gpu_by_halves_and_score_what_a_cpu_scores(
    gpus: int, gpu: PretendedGpu
) -> None:
    del gpu  # skips where there are no devices in Python
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(gpus)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-5)
    assert {visible for visible, _, _ in found["places"]} <= {str(index) for index in range(gpus)}
    assert {share for _, share, _ in found["places"]} == {0.5}
    for visible, _, name in found["places"]:
        assert name.startswith("Worker(")
        assert name.endswith(f"gpu={visible})")


@pytest.mark.parametrize(("gpus", "bundle"), [(0.25, {"CPU": 3, "GPU": 1}), (0, {"CPU": 3})])
def test_every_process_of_a_shared_training_holds_a_whole_gpu_if_workers_hold_any(
    gpus: float, bundle: dict[str, float]
) -> None:
    resources = Resources(gpus=gpus, cpus=3, fine_tune_workers=4)
    problem: Any = SimpleNamespace(
        device_type=resources.device_type,
        fine_tune_workers=resources.fine_tune_workers,
        replica_demand=resources.replica_demand,
    )
    scaling = scaling_of(problem)
    assert (scaling.num_workers, scaling.use_gpu) == (4, bool(gpus))
    assert scaling.resources_per_worker == bundle
