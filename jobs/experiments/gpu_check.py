"""Check on one GPU what nobody has seen on a GPU yet, and write what was found as one JSON file.

    python jobs/experiments/gpu_check.py --output gpu_check.json
    python jobs/experiments/gpu_check.py --output gpu_check.json --only graphs memory
    python jobs/experiments/gpu_check.py --output dry.json --dry

Every check is independent: one that fails is recorded with its error, and the others go on. The
file is written after every check, and checks that it holds already are not repeated. ``--dry``
uses tiny networks on a pretended GPU; its times mean nothing.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from speed.layouts import random_search, scores_per_second
from speed.passes import bare_passes
from speed.subject import Plan, Subject, make_subject
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fppmo_ray import Recipe, Resources
from fppmo_ray.durable_files import write_whole
from fppmo_ray.job import run_job
from fppmo_ray.testing.pretended_gpu import pretended_gpu
from fppmo_ray.training import ComputeConfig, DType, ImageFiles, StepTraining, evaluate, open_images
from fppmo_ray.training.device import device_module, visible_gpu
from fppmo_ray.versions import package_versions

logger = logging.getLogger(__name__)

_LAUNCHED, _GRAPHS = ComputeConfig(), ComputeConfig(cuda_graphs=True)
_SHARES = 1, 2, 4  # workers on the GPU
_FIRST_STEPS = 5  # of a training: kernels are chosen


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    small: str
    """Network of most checks."""
    trained: tuple[str, ...]
    """Networks whose training speed is measured."""
    plan: Plan
    """Images and batch size."""
    scores: int
    """Scores in the check of memory."""
    depth: int
    """Training steps of a score."""
    steps: int
    """Training steps of a measurement."""
    repeats: int
    """Medians are of so many measurements."""
    files: int
    """JPEG files that are streamed."""
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    """Number formats in which steps are timed."""
    weights: tuple[float, ...] = (0.0, 0.5)
    """Weights of the distillation with which steps are timed."""


_FULL = Size(
    small="resnet56",
    trained=("resnet56", "resnet110", "resnet50"),
    plan=Plan(device="cuda", steps=(0, 50)),
    scores=100,
    depth=60,
    steps=60,
    repeats=5,
    files=1024,
)
_DRY = Size(
    small="resnet20",
    trained=("resnet20",),
    plan=Plan(recalibrate_images=16, score_images=16, batch_size=4),
    scores=1,
    depth=4,  # the fourth step is replayed, and some of those below
    steps=1,
    repeats=1,
    files=12,
    dtypes=("bfloat16",),
    weights=(0.5,),
)


class Checks:
    """The checks, by name; each returns plain data.

    Args:
        device: The GPU.
        size: How much is measured.
        is_dry: Whether the GPU is pretended.
    """

    def __init__(self, device: torch.device, size: Size, *, is_dry: bool) -> None:
        self._device = device
        self._gpu = device_module(device)
        self._size = size
        self._is_dry = is_dry
        self._plan = replace(size.plan, device=str(device))  # type: ignore[arg-type]
        self._subjects: dict[str, Subject] = {}
        """Those that were made, since tracing takes as long as a check."""

    def graphs(self) -> dict[str, Any]:
        """Milliseconds of a training step, launched and replayed, and whether both learn alike."""
        found: dict[str, Any] = {}
        subject = self._subject()
        for dtype in self._size.dtypes:
            for weight in self._size.weights:
                recipe = replace(subject.recipe, distillation_weight=weight)
                ways = [replace(way, dtype=dtype) for way in (_LAUNCHED, _GRAPHS)]
                figures = [self._training(subject, recipe, compute) for compute in ways]
                found[f"{dtype}, distillation {weight:g}"] = {
                    "launched_ms": 1e3 * figures[0][0],
                    "replayed_ms": 1e3 * figures[1][0],
                    "launched_loss": figures[0][1],
                    "replayed_loss": figures[1][1],
                }
        return found

    def memory(self) -> dict[str, Any]:
        """Bytes that are allocated before and after many scores, without garbage collection."""
        found: dict[str, Any] = {}
        steps = self._size.depth
        for name, compute in (("launched", _LAUNCHED), ("graphs", _GRAPHS)):
            subject = replace(self._subject().at(steps), compute=compute)
            subject.score()
            gc.collect()
            gc.disable()
            try:
                held = [self._gpu.memory_allocated(self._device)]
                for _ in range(self._size.scores):
                    subject.score()
                    held.append(self._gpu.memory_allocated(self._device))
            finally:
                gc.enable()
            found[name] = {"first": held[0], "last": held[-1], "most": max(held)}
            if not self._is_dry:
                found[name]["reserved"] = self._gpu.memory_reserved(self._device)
        return found

    def out_of_memory(self) -> dict[str, Any]:
        """Whether a score that runs out of memory raises, and the next one works."""
        subject = self._subject()
        subject.score()
        before = self._gpu.memory_allocated(self._device)
        total = self._gpu.get_device_properties(self._device).total_memory
        self._gpu.empty_cache()
        self._gpu.set_per_process_memory_fraction((before + 2**20) / total)
        try:
            subject.score()
            error = "none was raised"
        except torch.OutOfMemoryError as raised:
            error = str(raised).splitlines()[0]
        finally:
            self._gpu.set_per_process_memory_fraction(1.0)
        subject.score()
        leaked = self._gpu.memory_allocated(self._device) - before
        return {"error": error, "leaked_bytes": leaked}

    def group_of_one(self) -> dict[str, Any]:
        """A process group of one, a reduction in it, and a step of a wrapped network."""
        backend = "gloo" if self._is_dry else "nccl"
        device = torch.device("cpu") if self._is_dry else self._device
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            distributed.init_process_group(
                backend, init_method=f"file://{folder}/store", rank=0, world_size=1
            )
            try:
                ones = torch.ones(1000, device=device)
                distributed.all_reduce(ones)
                network = DistributedDataParallel(nn.Linear(8, 8).to(device))
                network(torch.ones(4, 8, device=device)).sum().backward()
                total = float(ones.sum())
            finally:
                distributed.destroy_process_group()
        return {"backend": backend, "sum": total, "seconds": time.perf_counter() - begin}

    def streaming(self) -> dict[str, Any]:
        """Images per second from JPEG files to the GPU, and whether all pixels arrive."""
        side, count = 224, self._size.files
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for row in range(count):
                smooth = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                paths.append(Path(folder, f"{row}.jpg"))
                Image.fromarray(smooth).resize((500, 375)).save(paths[-1], quality=91)
            files = ImageFiles(tuple(paths), np.arange(count) % 10, side, side)
            dataset = replace(self._subject().dataset, train=files)
            on_gpu = open_images(files, None, dataset, self._device)
            on_cpu = open_images(files, None, dataset, "cpu")
            batch = min(64, count)
            begin = time.perf_counter()
            sums = [float(images.double().sum()) for images, _ in on_gpu.batches(batch)]
            seconds = time.perf_counter() - begin
            expected = [float(images.double().sum()) for images, _ in on_cpu.batches(batch)]
        worst = max(abs(a - b) / abs(b) for a, b in zip(sums, expected, strict=True))
        return {
            "images_per_second": count / seconds,
            "threads": torch.get_num_threads(),
            "largest_error": worst,
        }

    def repeatability(self) -> dict[str, Any]:
        """Losses of equal trainings, which differ where kernels add in another order."""
        subject = self._subject()
        return {
            name: [self._training(subject, subject.recipe, compute)[1] for _ in range(2)]
            for name, compute in (("launched", _LAUNCHED), ("graphs", _GRAPHS))
        }

    def waits(self) -> dict[str, Any]:
        """How often the host waits for the GPU in a score, by ``set_sync_debug_mode``."""
        found = {}
        for steps in (0, self._size.depth):
            subject = self._subject().at(steps)
            subject.score()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._gpu.set_sync_debug_mode("warn")
                subject.score()
                self._gpu.set_sync_debug_mode("default")
            places = [f"{Path(item.filename).name}:{item.lineno}" for item in caught]
            found[f"{steps} steps"] = {place: places.count(place) for place in sorted({*places})}
        return found

    def scores_on_workers(self) -> dict[str, Any]:
        """Scores per second of a search by 1, 2 and 4 workers that share the GPU."""
        if self._is_dry:
            return {"skipped": "Ray's workers find no pretended GPU"}
        found = {}
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        try:
            for count in _SHARES:
                resources = Resources(workers=count, gpus=1 / count)
                history = random_search(self._size.small, 128, self._plan, resources)
                found[f"{count} workers"] = scores_per_second(history)
        finally:
            ray.shutdown()
        return found

    def score_over_passes(self) -> dict[str, Any]:
        """Seconds of a score over those of its bare passes."""
        found = {}
        for steps in (0, self._size.depth):
            subject = self._subject().at(steps)
            score, bare = (self._median(run) for run in (subject.score, bare_passes(subject)))
            found[f"{steps} steps"] = {"score_ms": 1e3 * score, "ratio": score / bare}
        return found

    def training_speed(self) -> dict[str, Any]:
        """Trained images per second of dense and pruned networks, launched and replayed."""
        found = {}
        for name in self._size.trained:
            pruned = self._named(name)
            dense = replace(pruned, keep=np.ones_like(pruned.keep))
            for what, subject in (("dense", dense), ("pruned", pruned)):
                for way in (_LAUNCHED, _GRAPHS):
                    compute = replace(way, dtype="bfloat16")
                    seconds, _ = self._training(subject, subject.recipe, compute)
                    how = "replayed" if way.cuda_graphs else "launched"
                    found[f"{name} {what}, {how}"] = subject.recipe.batch_size / seconds
        return found

    def _subject(self) -> Subject:
        return self._named(self._size.small)

    def _named(self, name: str) -> Subject:
        if name not in self._subjects:
            self._subjects[name] = make_subject(name, self._plan)
        return self._subjects[name]

    def _training(
        self, subject: Subject, recipe: Recipe, compute: ComputeConfig
    ) -> tuple[float, float]:
        """Return the seconds of a steady step, and the loss after all steps."""
        network = subject.extracted()
        training = StepTraining(
            network,
            subject.images,
            recipe,
            steps=_FIRST_STEPS + 3 * self._size.steps,
            seed=0,
            compute=compute,
            teacher=subject.dense,
        )
        few, steps, seconds = _FIRST_STEPS, self._size.steps, []
        for end in (few, few + steps, few + 3 * steps):
            begin = time.perf_counter()
            training.run_to(end)  # waits for the GPU at its end
            seconds.append(time.perf_counter() - begin)
        metrics = evaluate(network, subject.batches().scoring)
        # Each part begins anew with launched steps and a capture, which the difference leaves out.
        return (seconds[2] - seconds[1]) / steps, metrics.loss

    def _median(self, run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(self._size.repeats + 1):
            self._gpu.synchronize()
            begin = time.perf_counter()
            run()
            self._gpu.synchronize()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:])


NAMES = tuple(name for name in vars(Checks) if not name.startswith("_"))
"""Names of all checks, in the order in which they run."""


def main(output: Path, only: tuple[str, ...] = (), *, dry: bool = False) -> None:
    """Run the checks that the output does not hold yet.

    Args:
        output: JSON file with what was found, by check.
        only: Names of the checks to run; all by default.
        dry: Run on a pretended GPU with tiny networks.

    Raises:
        ValueError: there is no such check, or no GPU.
    """
    wanted = only or NAMES
    if unknown := sorted({*wanted} - {*NAMES}):
        raise ValueError(
            f"there are no checks {', '.join(unknown)}; choose from {', '.join(NAMES)}"
        )
    with ExitStack() as stack:
        if dry:  # threads that wait for each other on busy cores take twenty times as long
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        gpu = stack.enter_context(pretended_gpu()).device if dry else visible_gpu()
        if gpu is None:
            raise ValueError("torch sees no GPU; give --dry to pretend one")
        found = json.loads(output.read_bytes()) if output.is_file() else {}
        found["environment"] = _environment(gpu)
        checks = Checks(gpu, _DRY if dry else _FULL, is_dry=dry)
        for name in wanted:
            if name not in found or "failed" in found[name]:
                found[name] = _checked(name, getattr(checks, name))
                write_whole(output, json.dumps(found, indent=1).encode())
    failed = [name for name in wanted if "failed" in found[name]]
    if failed:
        raise RuntimeError(f"checks failed: {', '.join(failed)}; {output} says how")


def _checked(name: str, check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        found = check()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        found = {"failed": f"{type(error).__name__}: {error}"}
    found["seconds"] = time.perf_counter() - begin
    logger.info("%s  %s", name, json.dumps(found))
    return found


def _environment(device: torch.device) -> dict[str, Any]:
    gpu = device_module(device)
    return {
        **package_versions(),
        "cuda": torch.version.cuda,
        "device": gpu.get_device_name(device),
        "capability": list(gpu.get_device_capability(device)),
        "memory": gpu.get_device_properties(device).total_memory,
    }


if __name__ == "__main__":
    run_job(main)
