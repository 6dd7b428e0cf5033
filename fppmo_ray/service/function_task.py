"""Tasks made of a user's functions, for networks that do not classify images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from fppmo_ray.distribution import BoolArray
from fppmo_ray.pruning import Score, Tracing, extract
from fppmo_ray.pruning.calibration import Calibration
from fppmo_ray.pruning.compute_trial import ComputeTrial, Timed
from fppmo_ray.service.resources import Resources
from fppmo_ray.service.settings import SearchSettings
from fppmo_ray.service.task_images import TaskImages
from fppmo_ray.service.user_functions import as_number, name_of, named_in_errors, set_seed
from fppmo_ray.service.worker_protocol import Tested, TrainingReport, TrainingTask
from fppmo_ray.training import ComputeConfig, Interface, Shard, TrainingState, capture

_DIVERGENCE = "minus divergence"
_CHOOSE_VAL, _TEST = 2, 3  # last numbers of seeds that no score of the search has

_OF_LABELS = ("rank_by", "baseline_epochs", "stages", "dtype", "autotune", "fine_tune")
"""Settings that say how labelled images are scored and trained on, which a task's functions do."""
_OF_IMAGES = (
    *("calibration_images", "refit", "start", "score_by", "distill_steps"),
    *("recalibrate_images", "score_recalibrate_images", "score_reconstruct_images"),
)
"""Settings that say what a task's unlabelled images are used for."""
_OF_DIVERGENCE = ("score_steps", "capacity_weight", "score_images", "rescore_images")
"""Settings that say how the divergence on a task's images becomes a score."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionTask:
    """A task made of plain functions, for networks that do not classify images.

    Workers call the functions, each with a network of its own: a copy on the worker's device, which
    they may change. They travel as Ray pickles functions, with copies of all that they refer to,
    for every worker; large data is better loaded by them, on the worker. An exception that they
    raise counts as an error of the mask if another worker raises it too. The generators of torch,
    numpy and Python are seeded before every call, and what an earlier call changed in the process
    (flags, threads, environment, working directory) is undone: a function that keeps no state of
    its own gives the same result again.

    A search moves by the order of scores within a generation and never looks at ``test``.

    With ``images``, the importance ``obs``, the start at the allocation and refits work as for
    image classification, and a score is not needed: masks are then scored by how far the pruned
    network's outputs on held-out images are from the dense network's.

    Raises:
        ValueError: something that must be a function is none, or there is neither a score nor
            images.
    """

    example_inputs: Tensor | tuple[Tensor, ...]
    """What the network's forward takes, with a batch axis; only shapes and types matter."""
    score: Callable[[nn.Module, int], float] | None = None
    """(network, seed) -> how good the network is, on held-out training data: finite, and higher is
    better. The seed is for what is random in it, such as the choice of data: all masks of a
    generation have the same, finalists have others. The network is in eval mode. None: minus the
    divergence from the dense network on 15 % of the images: the Kullback-Leibler divergence at
    temperature 4 for outputs of shape (n, classes >= 2), otherwise the mean squared error over the
    variance of the dense network's output."""
    images: Callable[[], Iterable[Any]] | None = None
    """() -> batches of inputs, as the network takes them in training: tensors (n, C, H, W), or
    tuples that begin with all inputs of the forward. Labels are not needed. Every worker calls it
    once and holds all images in memory. A hundred give a result, a thousand a better one."""
    fine_tune: Callable[[nn.Module], None] | None = None
    """Trains a network in place, for as long as it should be trained in the end. None: networks are
    handed out without training. The network is in training mode."""
    test: Callable[[nn.Module], float] | None = None
    """How good a network is on data that decides nothing: the figure in the result. None: the
    score, at a seed of its own."""
    recalibrate: Callable[[nn.Module], None] | None = None
    """Mends in place what a cut breaks, without training, before a pruned network is scored,
    fine-tuned or tested: ``fppmo_ray.recalibrate_batchnorm``, say. A network with batch norms
    scores badly without. None: batch norms are recalibrated on ``images``, if there are any."""
    measure: str = "score"
    """Name and unit of the number that ``score`` and ``test`` return, for tables: ``PSNR, dB``."""

    def __post_init__(self) -> None:
        for name in ("score", "images", "fine_tune", "test", "recalibrate"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ValueError(f"{name} of a task must be a function, got {given!r}")
        if self.score is None and self.images is None:
            raise ValueError(
                "a task needs a score, or images on which pruned networks are compared with the "
                "dense one; give at least one of them"
            )

    def __getstate__(self) -> dict[str, bytes]:
        """Return everything pickled: arrays in Ray's object store could not be written to."""
        pickle: Any = ray.cloudpickle
        return {"pickled": pickle.dumps(vars(self))}

    def __setstate__(self, state: dict[str, bytes]) -> None:
        """Restore what ``__getstate__`` returned."""
        pickle: Any = ray.cloudpickle
        vars(self).update(pickle.loads(state["pickled"]))

    @property
    def follows_compute(self) -> bool:
        """False: the functions compute all passes."""
        return False

    @property
    def has_images(self) -> bool:
        """Whether ``images`` were given."""
        return self.images is not None

    @property
    def shares_training(self) -> bool:
        """False: ``fine_tune`` trains in one process."""
        return False

    def inputs(self) -> tuple[Tensor, ...]:
        """Return ``example_inputs`` as a tuple, on the CPU."""
        given = self.example_inputs
        return tuple(tensor.cpu() for tensor in (given if isinstance(given, tuple) else (given,)))

    def functions(self) -> tuple[Callable[..., Any] | None, ...]:
        """Return the functions; None for each that was not given."""
        return self.score, self.images, self.fine_tune, self.test, self.recalibrate

    def num_images(self) -> dict[str, int]:
        """Return nothing: only the functions know the data."""
        return {}

    def first_lines(self) -> list[str]:
        """Return nothing: only the functions know the data."""
        return []

    def interface(self) -> Interface:
        """Return nothing: only the functions know the data."""
        return Interface()

    def identity(self) -> dict[str, Any]:
        """Return the names of the functions: nothing else can be known of them."""
        names = ("score", "fine_tune", "test", "recalibrate", *(("images",) if self.images else ()))
        called = {name: name_of(getattr(self, name)) for name in names}
        unnamed = self.measure == "score" and self.score is None and self.test is None
        return {"task": {"measure": _DIVERGENCE if unnamed else self.measure, **called}}

    def checked_settings(self, settings: SearchSettings, resources: Resources) -> SearchSettings:
        """Return the settings with all of fine-tuning counted as one epoch.

        Args:
            settings: The user's settings.
            resources: Where the search runs.

        Raises:
            ValueError: they say how labelled images are scored or trained on, they need images
                that the task does not have, or several workers are to fine-tune together.
        """
        own = _OF_LABELS + (() if self.score is None else _OF_DIVERGENCE)
        given, defaults = settings.flat(), SearchSettings(macs_cut=0.5).flat()
        names = [name for name in defaults if name in (*own, *_OF_IMAGES)]
        harmless = {"start": "uniform", "refit": False}  # what needs no images
        changed = [
            name for name in names if given[name] not in (defaults[name], harmless.get(name, ()))
        ]
        if wrong := [name for name in changed if name in own]:
            raise ValueError(
                f"a task scores and trains by its own functions, so {', '.join(wrong)} must be "
                "left at the default; do in score and fine_tune what they would do"
            )
        if settings.sampler.importance == "taylor":
            raise ValueError(
                "importance taylor needs the gradients of classified images; for a task give l1, "
                "l2, fpgm or bn_scale, or obs with images"
            )
        changed += ["importance obs"] if settings.sampler.importance == "obs" else []
        if changed and self.images is None:
            raise ValueError(
                f"{', '.join(changed)} need images of the task, without labels; give "
                "FunctionTask(images=...), or leave them at the default"
            )
        if resources.fine_tune_workers > 1:
            raise ValueError(
                "a task fine-tunes by its own function, in one process; leave fine_tune_workers at "
                f"1, got {resources.fine_tune_workers}"
            )
        recipe = replace(settings.fine_tune, epochs=0 if self.fine_tune is None else 1)
        if self.score is None:
            return settings.changed(fine_tune=recipe, score_by="divergence")
        # Weighing multiplies losses, which makes no sense for scores of any sign.
        return settings.changed(fine_tune=recipe, score_by="labels", capacity_weight=0.0)

    def check_network(self, network: nn.Module) -> None:
        """Accept every network: only the functions know what they need."""

    def open(
        self, tracing: Tracing, settings: SearchSettings, device: torch.device, *, threads: int
    ) -> FunctionsOnWorker:
        """Return the task on a worker's device; see ``Task.open``."""
        return FunctionsOnWorker(self, tracing, settings, device, threads=threads)


class FunctionsOnWorker:
    """A user's functions in a worker's process.

    Args:
        task: The functions.
        tracing: Tracing of the dense network.
        settings: Seed of fine-tuning and of the final figures, and what images are used for.
        device: The worker's device.
        threads: CPUs that calibrate.
    """

    latency_batches: Sequence[int] = (1,)  # how much memory a larger one needs is not known

    def __init__(
        self,
        task: FunctionTask,
        tracing: Tracing,
        settings: SearchSettings,
        device: torch.device,
        *,
        threads: int,
    ) -> None:
        self._task = task
        self._tracing = tracing
        self._settings = settings
        self._seed = settings.seed
        self._device = device
        self._images: TaskImages | None = None
        if task.images is not None:
            self._images = TaskImages(
                self._given_images,
                task.inputs(),
                tracing,
                settings,
                device,
                threads=threads,
                holds_out=task.score is None,
            )

    def load(self) -> None:
        """Load the images, if there are any; the functions load their data themselves."""
        if self._images is not None:
            self._images.load()

    def _given_images(self) -> Iterable[Any]:
        assert self._task.images is not None
        set_seed((self._seed,))
        with named_in_errors("images"):
            return self._task.images()

    def inputs(self) -> tuple[Tensor, ...]:
        """Return the example inputs cut to one image, on the device."""
        return tuple(tensor[:1].to(self._device) for tensor in self._task.inputs())

    def score(
        self,
        dense: nn.Module,
        keep: BoolArray,
        *,
        seed: Sequence[int],
        split: str,
        compute: ComputeConfig,
    ) -> Score:
        """Score a mask by the user's function, which cannot tell a finalist but by its seed.

        Without one, the score is minus the divergence from the dense network on the split. See
        ``TaskOnWorker.score``.
        """
        begin = time.perf_counter()
        rng, settings = np.random.default_rng(tuple(seed)), self._settings
        is_proposal = split == "search_val"
        count = settings.scoring.score_reconstruct_images if is_proposal else None
        network = self._pruned(dense, keep, rng, is_proposal=is_proposal, num_images=count)
        if self._task.score is not None:
            loss = -self._score(network, seed, self._task.score)
        else:
            assert self._images is not None  # a task has a score or images
            if steps := settings.scoring.score_steps:
                self.distill(network, dense, keep, steps=steps, seed=int(rng.integers(2**31)))
            loss = self._images.divergence(network, dense, split, rng)
        return Score(val_loss=loss, val_accuracy=None, seconds=time.perf_counter() - begin)

    def score_dense(self, dense: nn.Module) -> None:
        """Return None: what is held out is for the functions to know."""

    def try_compute(
        self, dense: nn.Module, keep: BoolArray, compute: ComputeConfig, *, of: Timed = "score"
    ) -> ComputeTrial:
        """Score a mask once, which finds errors before the search; see ``TaskOnWorker``."""
        found = self.score(dense, keep, seed=(self._seed,), split="search_val", compute=compute)
        return ComputeTrial(compute=compute, seconds=found.seconds, val_loss=found.val_loss)

    def pruned(self, dense: nn.Module, keep: BoolArray, *, for_epochs: bool = False) -> nn.Module:
        """Return the extracted network, refitted, recalibrated and reconstructed.

        Batch norms are recalibrated by the user's function; without one, on the images. See
        ``TaskOnWorker.pruned``.
        """
        rng = np.random.default_rng(self._seed)
        return self._pruned(dense, keep, rng, num_images=0 if for_epochs else None)

    def _pruned(
        self,
        dense: nn.Module,
        keep: BoolArray,
        rng: np.random.Generator,
        *,
        num_images: int | None,
        is_proposal: bool = False,
    ) -> nn.Module:
        """Return the network that a mask leaves, reconstructed on so many images; None: on all."""
        network, scoring = extract(dense, self._tracing, keep), self._settings.scoring
        fitted_on = self._images if self._settings.calibration.refit else None
        if fitted_on is not None:
            fitted_on.refit(network, dense, keep)
        if self._task.recalibrate is not None:
            set_seed((self._seed,))
            with named_in_errors("recalibrate"):
                self._task.recalibrate(network)
        elif self._images is not None:
            count = scoring.score_recalibrate_images if is_proposal else scoring.recalibrate_images
            drawn = rng.permutation(len(self._images.few))[:count]
            self._images.recalibrate(network, np.sort(drawn))
        if fitted_on is not None and num_images != 0:
            fitted_on.reconstruct(network, dense, keep, num_images)
        return network

    def importance_batches(self, seed: int) -> None:
        """Return None: there are no labelled images."""

    def calibration(self, dense: nn.Module) -> Calibration | None:
        """Return the calibration on the images, if any; see ``TaskOnWorker.calibration``."""
        return None if self._images is None else self._images.calibration(dense)

    def train_epoch(
        self,
        network: nn.Module,
        task: TrainingTask,
        epoch: int,
        state: TrainingState | None,
        *,
        teacher: nn.Module | None,
        compute: ComputeConfig,
        shard: Shard,
    ) -> tuple[TrainingState, TrainingReport]:
        """Run the user's fine-tuning as the only epoch; see ``TaskOnWorker.train_epoch``."""
        assert self._task.fine_tune is not None  # or there would be no epoch
        assert epoch == 0
        network.train()
        set_seed((self._seed,))
        begin = time.perf_counter()
        with named_in_errors("fine_tune"):
            self._task.fine_tune(network)
        report = TrainingReport(loss=None, seconds=time.perf_counter() - begin)
        return capture(network, None, 1), report

    def distill(
        self, network: nn.Module, dense: nn.Module, keep: BoolArray, *, steps: int, seed: int
    ) -> None:
        """Distil on the task's calibration images, as they are; see ``TaskOnWorker.distill``."""
        assert self._images is not None  # or the settings are refused
        self._images.distill(network, dense, keep, steps=steps, seed=seed)

    def evaluate(self, network: nn.Module, split: str, dense: nn.Module) -> Tested:
        """Return the user's score, or test, of a network at a seed that no score has.

        Without a score it is minus the divergence on choose-val. See ``TaskOnWorker.evaluate``.
        """
        if split == "test" and self._task.test is not None:
            set_seed((self._seed, 0, _TEST))
            with named_in_errors("test"):
                found = self._task.test(network.eval())
            return Tested(figures={"score": as_number(found, "test")})
        seed = (self._seed, 0, _TEST if split == "test" else _CHOOSE_VAL)
        if self._task.score is not None:
            return Tested(figures={"score": self._score(network, seed, self._task.score)})
        assert self._images is not None  # a task has a score or images
        rng = np.random.default_rng(seed)
        distance = self._images.divergence(network, dense, "choose_val", rng)
        return Tested(figures={"score": 0.0 - distance})  # and not -0.0 for the dense network

    def _score(
        self, network: nn.Module, seed: Sequence[int], score: Callable[[nn.Module, int], float]
    ) -> float:
        number = set_seed(seed)
        with named_in_errors("score"):
            found = score(network.eval(), number)
        return as_number(found, "score")
