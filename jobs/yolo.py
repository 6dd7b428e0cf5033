"""Prune a detector of Ultralytics with their own trainer, loss and mAP.

    pip install 'fppmo-ray[yolo]'
    python jobs/yolo.py --network yolov8n.pt --data coco8.yaml --macs-cut 0.5 --run-dir runs/yolo
    yolo export model=runs/yolo/yolov8n-pruned.pt format=onnx

The network and the data set are files as Ultralytics reads them. A network's score is Ultralytics'
fitness (mAP 50-95 of boxes) on a tenth of the training images, at most 1000, which are held out.
Ultralytics' trainer fine-tunes it on the others with its own loss. ``YOLO(file)`` opens the result.
Workers must see the data set under the same paths.

Tests show this on CPUs with a handful of small images: boxes (v5n, v8n, v10n and 11n as YAML,
exported as TorchScript), masks and poses (v8n-seg and v8n-pose, exported as ONNX). A search of v8n
that was killed among its proposals and among its scores went on to the same scores. Rotated boxes
take the same way through Ultralytics' classes, but neither they nor GPUs, public ``.pt`` files or
real data sets have been tried.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from fppmo_ray import FunctionTask, Resources, SearchSettings, recalibrate_batchnorm, run_search
from fppmo_ray.job import resume_mode, run_job, show_result

_RECALIBRATION_IMAGES = 128
_BATCH = 16
_HELD_OUT = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """The task of one network and data set; workers call its methods."""

    kind: str
    """Ultralytics' name of the task: ``detect``, ``segment``, ``pose``."""
    name: str
    """Name of the network: ``yolov8n.pt``."""
    train: tuple[str, ...]
    """Paths of the images to train on."""
    held_out: tuple[str, ...]
    """Paths of the training images that score networks."""
    test: tuple[str, ...]
    """Paths of the images of the validation part, which test networks."""
    facts: dict[str, Any]
    """Further entries of the data set's file: the classes, the shape of key points."""
    image_size: int
    """Pixels of a side."""
    epochs: int
    """Epochs of a whole training."""

    def score(self, network: nn.Module, seed: int) -> float:
        """Return the fitness on the held-out images, which is mAP 50-95 for boxes.

        Args:
            network: A network on its device.
            seed: Not used: all held-out images are looked at.
        """
        return self._fitness(network, self.held_out)

    def last_look(self, network: nn.Module) -> float:
        """Return the fitness on the data set's own validation part."""
        return self._fitness(network, self.test)

    def untrained(self, description: dict[str, Any]) -> nn.Module:
        """Return a new network with as many classes as the data set has.

        Args:
            description: The content of the network's YAML file.
        """
        with self._linked(self.train, self.held_out) as folder:
            trainer = self._trainer(folder, "cpu")
            network: nn.Module = trainer.get_model(cfg=description, weights=None, verbose=False)
            trainer.model = network
            trainer.set_model_attributes()
        network.args = vars(network.args)  # type: ignore[assignment]
        return network

    def fine_tune(self, network: nn.Module) -> None:
        """Train in place by Ultralytics' trainer, and take the averaged weights."""
        device, given = next(network.parameters()).device, network.args
        with self._linked(self.train, self.held_out) as folder:
            trainer = self._trainer(folder, device)
            trainer.model = network
            trainer.train()
            network.load_state_dict(trainer.ema.ema.state_dict())
        network.to(device)
        network.args, network.criterion = given, None  # type: ignore[assignment]

    def _trainer(self, folder: str, device: torch.device | str) -> Any:
        arguments = self._arguments(folder, torch.device(device))
        return _classes(self.kind)["trainer"](
            overrides=arguments | {"epochs": self.epochs, "val": False}
        )

    def recalibrate(self, network: nn.Module) -> None:
        """Re-estimate the batch-norm statistics of a pruned network on training images."""
        device = next(network.parameters()).device
        recalibrate_batchnorm(network, self._images(device))

    def _images(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        paths, size = self.train[:_RECALIBRATION_IMAGES], (self.image_size,) * 2
        for begin in range(0, len(paths), _BATCH):
            opened = [
                Image.open(path).convert("RGB").resize(size) for path in paths[begin:][:_BATCH]
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in opened]))
            yield pixels.permute(0, 3, 1, 2).float().to(device) / 255, torch.zeros(len(opened))

    def _fitness(self, network: nn.Module, images: tuple[str, ...]) -> float:
        device = next(network.parameters()).device
        with self._linked(images, images) as folder:
            validator = _classes(self.kind)["validator"](args=self._arguments(folder, device))
            # Ultralytics fuses the batch norms of the network that it validates, in place.
            return float(validator(model=copy.deepcopy(network).eval())["fitness"])

    def _arguments(self, folder: str, device: torch.device) -> dict[str, Any]:
        return {
            **{"model": self.name, "task": self.kind, "data": f"{folder}/data.yaml"},
            **{"imgsz": self.image_size, "batch": _BATCH, "workers": 0},
            **{"device": "cpu" if device.type == "cpu" else str(device.index or 0)},
            **{"project": folder, "name": "run", "exist_ok": True},
            **{"plots": False, "verbose": False},
        }

    @contextmanager
    def _linked(self, train: tuple[str, ...], val: tuple[str, ...]) -> Iterator[str]:
        """A folder with a data set of links to images and labels.

        Ultralytics writes a cache beside labels, which workers would overwrite for each other.
        """
        from ultralytics.data.utils import img2label_paths

        with tempfile.TemporaryDirectory() as folder:
            for part, paths in {"train": train, "val": val}.items():
                images, labels = Path(folder, "images", part), Path(folder, "labels", part)
                images.mkdir(parents=True)
                labels.mkdir(parents=True)
                for number, (image, label) in enumerate(
                    zip(paths, img2label_paths(list(paths)), strict=True)
                ):
                    (images / f"{number}{Path(image).suffix}").symlink_to(image)
                    if Path(label).exists():  # there is none for an image without objects
                        (labels / f"{number}.txt").symlink_to(label)
            listed = {"path": folder, "train": "images/train", "val": "images/val"}
            Path(folder, "data.yaml").write_text(yaml.safe_dump(self.facts | listed))
            yield folder


def main(
    network: str,
    data: str,
    run_dir: Path,
    settings: SearchSettings,
    resources: Resources,
    *,
    image_size: int = 640,
    epochs: int = 30,
    resume: bool = False,
    resume_or_start: bool = False,
) -> None:
    """Search, choose, fine-tune, report, and write ``NETWORK-pruned.pt`` to the run directory.

    Args:
        network: A trained network's ``.pt`` file, or the ``.yaml`` file of a network, which is
            then trained here first and written beside the run directory.
        data: The data set's YAML file.
        run_dir: Folder for all that the search leaves.
        settings: What to search for.
        resources: Where it runs.
        image_size: Pixels of a side, a multiple of 32.
        epochs: Epochs of each training.
        resume: Go on with the search in the run directory.
        resume_or_start: The same, but begin it where there is none yet.
    """
    resuming = resume_mode(run_dir, resume=resume, resume_or_start=resume_or_start)
    yolo = _ultralytics().YOLO(network)
    task = _detection(yolo.task, network, data, image_size=image_size, epochs=epochs)
    dense = _dense(yolo, task, run_dir.with_name(f"{run_dir.name}-dense.pt"), settings.seed)
    result = run_search(
        dense,
        FunctionTask(
            example_inputs=torch.zeros(1, 3, image_size, image_size),
            score=task.score,
            fine_tune=task.fine_tune,
            test=task.last_look,
            recalibrate=task.recalibrate,
            measure="fitness",
        ),
        settings,
        run_dir=run_dir,
        resources=resources,
        resume=resuming,
    )
    show_result(run_dir)
    save_checkpoint(result.network(), run_dir / f"{Path(network).stem}-pruned.pt", yolo.task)


def save_checkpoint(network: nn.Module, path: Path, kind: str) -> None:
    """Write a network as Ultralytics does, which pickles it: ``YOLO(path)`` opens the file.

    Args:
        network: The network.
        path: Name of the file, ending in ``.pt``.
        kind: Ultralytics' name of the task.
    """
    torch.save({"model": network, "ema": None, "train_args": {"task": kind}}, path)


def _dense(yolo: Any, task: Detection, trained: Path, seed: int) -> nn.Module:
    """The trained network; one that is given as YAML is trained unless its file exists.

    Raises:
        ValueError: the network has other classes than the data set.
    """
    if task.name.endswith(".yaml"):
        if not trained.exists():
            torch.manual_seed(seed)
            network = task.untrained(yolo.model.yaml)
            task.fine_tune(network.train())
            trained.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(network, trained, task.kind)
        yolo = _ultralytics().YOLO(trained)
    dense: nn.Module = yolo.model.float().eval().requires_grad_(True)
    own, wanted = len(yolo.names), len(task.facts["names"])
    if own != wanted:
        raise ValueError(
            f"{task.name} has {own} classes and the data set {wanted}; train the network on it "
            "first, by yolo train"
        )
    return dense


def _detection(kind: str, network: str, data: str, *, image_size: int, epochs: int) -> Detection:
    """The task, with a tenth of the training images held out."""
    from ultralytics.data.utils import check_det_dataset

    found = check_det_dataset(data)
    order = np.random.default_rng(0).permutation(_images_of(found["train"])).tolist()
    if len(order) < 2:
        raise ValueError(
            f"the training part of {data} must hold 2 images or more, got {len(order)}"
        )
    count = min(max(1, len(order) // 10), _HELD_OUT)
    kept = ("names", "nc", "kpt_shape", "flip_idx", "channels")
    return Detection(
        kind=kind,
        name=network,
        train=tuple(order[count:]),
        held_out=tuple(order[:count]),
        test=tuple(_images_of(found["val"])),
        facts={key: found[key] for key in kept if key in found},
        image_size=image_size,
        epochs=epochs,
    )


def _images_of(part: str | list[str]) -> list[str]:
    """Paths of a part's images, which its folders hold and its text files list."""
    from ultralytics.data.utils import IMG_FORMATS

    paths: list[Path] = []
    for entry in map(Path, [part] if isinstance(part, str) else part):
        if entry.is_file():
            lines = entry.read_text().split("\n")
            paths += [entry.parent / line.strip() for line in lines]
        else:
            paths += entry.rglob("*")
    return sorted(str(path.absolute()) for path in paths if path.suffix[1:].lower() in IMG_FORMATS)


def _classes(kind: str) -> dict[str, Any]:
    """Ultralytics' trainer and validator of a task."""
    _ultralytics()
    from ultralytics.models import yolo

    part, name = {
        "detect": (yolo.detect, "Detection"),
        "segment": (yolo.segment, "Segmentation"),
        "pose": (yolo.pose, "Pose"),
        "obb": (yolo.obb, "OBB"),
    }[kind]
    return {way: getattr(part, f"{name}{way.title()}") for way in ("trainer", "validator")}


def _ultralytics() -> Any:
    try:
        import ultralytics
    except ImportError as error:
        raise ValueError(
            "this job needs Ultralytics; pip install 'fppmo-ray[yolo]' has it"
        ) from error
    logging.getLogger("ultralytics").setLevel(logging.WARNING)  # it tells of every score
    return ultralytics


if __name__ == "__main__":
    run_job(main)
