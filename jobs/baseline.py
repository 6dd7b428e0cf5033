"""Train a dense CIFAR-10 network on search-train alone, to be pruned afterwards.

    python jobs/baseline.py --data DIR --network resnet56 --fine-tune-epochs 200 \
        --learning-rate 0.1 --gpus-per-worker 1 --output baselines/resnet56
    fppmo-ray submit jobs/baseline.py ... --output /absolute/path --address http://HEAD:8265

Public weights have seen all training images, so scores on held-out training images flatter them.
This job holds images out and leaves, in its output folder, ``weights.pt``,
``search_val_rows.npy`` (the rows that were held out: give them to the other jobs) and
``baseline.json`` (accuracies and training curve). A checkpoint is written after each epoch: the
same command continues a training that was stopped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from fppmo_ray import Recipe, Resources, Splits, load_dataset
from fppmo_ray.durable_files import write_whole
from fppmo_ray.job import require_lasting, run_job
from fppmo_ray.own_network import open_network
from fppmo_ray.service.resources import connection
from fppmo_ray.training import (
    ComputeConfig,
    DType,
    Images,
    TrainingState,
    evaluate,
    keep_freed_memory,
    open_images,
    splits_from_files,
    stratified_splits,
    train_epoch,
)
from fppmo_ray.training.checkpoints import (
    read_checkpoint,
    restore,
    training_identity,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

_HELD_OUT_SHARE = 0.1
_BATCH = 250  # images of an evaluation's forward pass
RECIPE = Recipe(distillation_weight=0.0)
"""The default recipe without distillation: there is no teacher yet."""


class Trainer:
    """A Ray actor that trains a network and evaluates it.

    Args:
        parts: References to the network before its first epoch, which is copied, to the data set,
            and to its splits: search-train is trained on; search-val and choose-val together are
            held out. Ray warns of references outside a list, since a replaced worker needs them.
        recipe: How the network is trained.
        compute: How the passes are computed.
        seed: Seed of the order and the augmentation of images, >= 0.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        parts: list[Any],
        recipe: Recipe,
        compute: ComputeConfig,
        seed: int,
        device: str,
    ) -> None:
        network, dataset, splits = ray.get(parts)
        torch.set_num_threads(compute.threads)
        if device == "cpu":
            keep_freed_memory()
        self._network = copy.deepcopy(network).to(device)
        self._recipe, self._compute, self._seed = recipe, compute, seed
        self._search_train = open_images(dataset.train, splits.search_train, dataset, device)
        self._held_out = open_images(dataset.train, held_out_rows(splits), dataset, device)
        self._test = open_images(dataset.test, None, dataset, device)

    def train_epoch(self, state: TrainingState | None) -> tuple[TrainingState, dict[str, float]]:
        """Train for one epoch.

        Args:
            state: State after the previous epoch; None before the first.

        Returns:
            The new state, and the epoch's training loss, seconds, held-out loss and accuracy.
        """
        state, report = train_epoch(
            self._network,
            self._search_train,
            self._recipe,
            epoch=0 if state is None else state.epochs_done,
            seed=self._seed,
            state=state,
            compute=self._compute,
        )
        held_out = self._look(self._held_out)
        seen = {f"held_out_{name}": value for name, value in held_out.items()}
        return state, {"train_loss": report.loss, "seconds": report.seconds, **seen}

    def look(self, state: TrainingState) -> dict[str, dict[str, float]]:
        """Return loss and accuracy on held-out and on test images.

        Args:
            state: State after the last epoch.
        """
        restore(state, self._network)
        return {"held_out": self._look(self._held_out), "test": self._look(self._test)}

    def _look(self, images: Images) -> dict[str, float]:
        return evaluate(self._network, images.batches(_BATCH)).figures()


def main(
    data: Path,
    output: Path,
    resources: Resources,
    recipe: Recipe = RECIPE,
    *,
    network: str = "resnet56",
    weights: Path | None = None,
    search_val_rows: Path | None = None,
    dtype: DType = "float32",
    cuda_graphs: bool = False,
    seed: int = 0,
) -> None:
    """Train, and keep the weights and the rows that they have never seen.

    Args:
        data: Folder with CIFAR-10 as parquet files or in torchvision's layout.
        output: Folder for weights, rows and figures.
        resources: CPUs and GPUs of the one worker that trains.
        recipe: How the network is trained; it learns from labels alone.
        network: Which network: resnet20, 32, 44, 56 or 110 (``_b``: projection shortcuts),
            vgg16_bn, or ``MODULE:FUNCTION`` that constructs one of your own.
        weights: Weights that training begins with; by default random ones.
        search_val_rows: .npy file of the rows to hold out; by default 10 % of every class.
        dtype: Of the training passes.
        cuda_graphs: Whether a GPU replays training steps as CUDA graphs.
        seed: Seed of the weights, the order of the images, and the rows.
    """
    require_lasting(output)
    if recipe.epochs < 1:
        raise ValueError("--fine-tune-epochs must be at least 1: a baseline is trained")
    if recipe.distillation_weight:
        raise ValueError(
            "--distillation-weight must be 0, the default here: there is no network to learn from, "
            f"got {recipe.distillation_weight}"
        )
    dataset = load_dataset("cifar10", data)
    dense, _ = open_network(network, weights, dataset.num_classes, seed=seed)
    splits = _splits(dataset.train.labels, search_val_rows, seed)
    compute = ComputeConfig(dtype=dtype, threads=resources.cpus, cuda_graphs=cuda_graphs)
    identity = {
        **training_identity(recipe, compute, seed),
        "network": network,
        "held_out": hashlib.sha256(held_out_rows(splits).tobytes()).hexdigest(),
    }
    output.mkdir(parents=True, exist_ok=True)
    state = read_checkpoint(output / "checkpoint.pt", identity)
    with connection(resources):
        # Held to the end: a replaced worker gets them again, and Ray would have deleted its copies.
        parts = [ray.put(value) for value in (dense, dataset, splits)]
        trainer = (
            ray.remote(Trainer)
            .options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                max_restarts=-1,  # a lost worker is replaced and does the epoch again
                max_task_retries=-1,
            )
            .remote(parts, recipe, compute, seed, resources.device_type)
        )
        figures = _train(trainer, output, state, identity, recipe.epochs)
    np.save(output / "search_val_rows.npy", held_out_rows(splits))
    for split in ("held_out", "test"):
        print(f"{split}: {100 * figures[split]['accuracy']:.2f} %")


def held_out_rows(splits: Splits) -> np.ndarray:
    """Return the sorted rows of search-val and choose-val: neither is trained on here."""
    return np.union1d(splits.search_val, splits.choose_val)


def _train(
    trainer: Any, output: Path, state: TrainingState | None, identity: dict[str, Any], epochs: int
) -> dict[str, Any]:
    """Train epoch by epoch from a state on; return the final figures, which are in a file too."""
    file = output / "baseline.json"
    curve = json.loads(file.read_bytes())["epochs"] if state is not None else []
    curve = curve[: 0 if state is None else state.epochs_done]
    while state is None or state.epochs_done < epochs:
        state, seen = ray.get(trainer.train_epoch.remote(state))
        curve.append(seen)
        # The curve is written first, so it never lacks an epoch of the checkpoint.
        write_whole(file, _json({"epochs": curve}))
        write_checkpoint(output / "checkpoint.pt", state, identity)
        logger.info(
            "epoch %d of %d  training loss %.4f  held-out accuracy %.2f %%  %.0f s",
            *(len(curve), epochs, seen["train_loss"]),
            *(100 * seen["held_out_accuracy"], seen["seconds"]),
        )
    figures = ray.get(trainer.look.remote(state))
    torch.save(state.network, output / "weights.pt")
    write_whole(file, _json({**figures, "epochs": curve, "identity": identity}))
    return dict(figures)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _splits(labels: np.ndarray, rows: Path | None, seed: int) -> Splits:
    if rows is not None:
        return splits_from_files(labels, search_val=rows, seed=seed)
    search_val, choose_val = 0.6 * _HELD_OUT_SHARE, 0.4 * _HELD_OUT_SHARE
    return stratified_splits(labels, search_val=search_val, choose_val=choose_val, seed=seed)


if __name__ == "__main__":
    run_job(main)
