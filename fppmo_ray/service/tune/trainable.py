"""The score of a mask as a trainable of Ray Tune, reported rung by rung."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from ray import tune

from fppmo_ray.pruning import ScoreInRungs
from fppmo_ray.service.image_task import ImageClassification
from fppmo_ray.service.journal.facts import unpack_mask
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.worker import claim_device

_CHECKPOINT = "score.pt"


def prune_trainable(problem: Problem, rungs: tuple[int, ...]) -> type[tune.Trainable]:
    """Return the trainable that scores a problem's masks, with the resources of its placement.

    Args:
        problem: The problem, which is copied to Ray's object store once.
        rungs: Fine-tuning steps after which a trial reports, ascending, each >= 0. The last one is
            the problem's ``score_steps``, over which the learning rate falls.

    Raises:
        ValueError: the rungs do not ascend to the problem's steps, or its task is not
            ``ImageClassification``.
    """
    if not isinstance(problem.task, ImageClassification):
        raise ValueError(
            "trials of Ray Tune report scores after some steps of training on images, got a task "
            "of another kind; use fppmo_ray.search, or a trainable of your own"
        )
    steps = problem.settings.score_steps
    if not rungs or list(rungs) != sorted({*rungs}) or rungs[0] < 0 or rungs[-1] != steps:
        raise ValueError(
            f"rungs must ascend from at least 0 to the {steps} steps of a score, got {rungs}; "
            "change the rungs or score_steps"
        )
    trainable: type[tune.Trainable] = tune.with_resources(
        tune.with_parameters(PruneTrainable, problem=problem, rungs=tuple(rungs)),
        {"cpu": problem.threads, "gpu": problem.gpu_share},
    )
    return trainable


class PruneTrainable(tune.Trainable):
    """Prunes, fine-tunes to the next rung, recalibrates and reports; see ``prune_trainable``.

    Every report has ``val_loss`` and ``val_accuracy`` on search-val, ``steps`` (of fine-tuning
    so far), ``macs`` and ``done``. The last report is the score that a worker of
    ``fppmo_ray.search`` computes, bit for bit on CPUs. Use it with ``reuse_actors=True``: an actor
    then keeps the data on its device, and frees the network of each trial before the next. With
    ``CheckpointConfig(checkpoint_frequency=1)``, trials that were paused or lost continue after
    their last rung.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters gives what is keyword-only
        self, config: dict[str, Any], *, problem: Problem, rungs: tuple[int, ...]
    ) -> None:
        """Load the dense network and the images onto the device, once per actor.

        Args:
            config: Config of the first trial.
            problem: The problem.
            rungs: Fine-tuning steps after which a trial reports.
        """
        self._problem = problem
        self._rungs = rungs
        self._device = claim_device(problem)
        self._dense = copy.deepcopy(problem.network).to(self._device).eval()
        assert isinstance(problem.task, ImageClassification)  # see prune_trainable
        self._images = problem.task.open(problem, self._device)
        self._images.load()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in this actor."""
        del self._score
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the workers that share the GPU
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next rung and return the report.

        Raises:
            RuntimeError: training diverged.
        """
        rung = self._rungs[self._rungs_done]
        metrics = self._score.measure_at(rung)
        self._rungs_done += 1
        return {
            "val_loss": metrics.loss,
            "val_accuracy": metrics.accuracy,
            "steps": rung,
            "macs": self._problem.tracing.space.macs(self._keep),
            "done": self._rungs_done == len(self._rungs),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state of the score; its ``network`` is the state dict that was measured."""
        state = {**self._score.state(), "rungs_done": self._rungs_done}
        torch.save(state, Path(checkpoint_dir) / _CHECKPOINT)

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Continue from a folder that ``save_checkpoint`` wrote."""
        state = read_score_state(Path(str(checkpoint)))
        self._score.restore(state)
        self._rungs_done = state["rungs_done"]

    def _begin(self, config: dict[str, Any]) -> None:
        problem = self._problem
        self._rungs_done = 0
        self._keep = unpack_mask(config["mask"], problem.tracing.space.num_filters)
        candidate = self._images.candidate(
            self._dense,
            self._keep,
            seed=config["score_seed"],
            split="search_val",
            compute=problem.compute,
        )
        self._score: ScoreInRungs = ScoreInRungs(candidate)


def read_score_state(folder: Path) -> dict[str, Any]:
    """Return the content of a trial's checkpoint, tensors and numbers only, on the CPU."""
    state: dict[str, Any] = torch.load(folder / _CHECKPOINT, weights_only=True, map_location="cpu")
    return state
