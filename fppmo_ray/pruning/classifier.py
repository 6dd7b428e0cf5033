"""From an image file to a class name, by any of the files that a search hands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fppmo_ray.pruning.export import open_exported
from fppmo_ray.pruning.files import load_network, read_interface
from fppmo_ray.training import Preprocessing, interface_from_json
from fppmo_ray.training.decoding import ImageSource


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """A network with its preprocessing and class names; made by ``load_classifier``."""

    run: Callable[[Tensor], Tensor]
    """Takes normalised images (N, C, H, W), and returns logits (N, classes)."""
    preprocessing: Preprocessing
    """The way from an image to an input."""
    class_names: tuple[str, ...]
    """Name of each class, in the order of the logits."""

    def __call__(self, image: ImageSource) -> str:
        """Return the name of an image's likeliest class.

        Args:
            image: An image file, its encoded bytes, or an image of Pillow.
        """
        probabilities = self.probabilities(image)
        return max(probabilities, key=lambda name: probabilities[name])

    @torch.no_grad()
    def probabilities(self, image: ImageSource) -> dict[str, float]:
        """Return the probability of every class, by name.

        Args:
            image: An image file, its encoded bytes, or an image of Pillow.
        """
        logits = self.run(self.preprocessing(image))
        return dict(zip(self.class_names, logits[0].softmax(0).tolist(), strict=True))


def load_classifier(
    path: str | Path, constructor: Callable[[], nn.Module] | None = None
) -> Classifier:
    """Load a network that classifies images, with all that it needs to read image files.

    Args:
        path: ``network.json`` of a run directory or an export, or an exported TorchScript,
            torch.export or ONNX file.
        constructor: Constructs the dense network, as for ``load_network``; not needed for exported
            files.

    Raises:
        ValueError: a file is missing or damaged, or says nothing about preprocessing or classes.
    """
    path = Path(path)
    run: Callable[[Tensor], Tensor]
    if path.suffix == ".json":
        interface, run = read_interface(path), load_network(path, constructor)
    else:
        opened, metadata = open_exported(path)
        interface = interface_from_json(metadata)

        def run(images: Tensor) -> Tensor:
            return opened((images,))[0]

    if interface.preprocessing is None:
        raise ValueError(
            f"{path} does not say how images become its input, because the search was given "
            "prepared inputs; prepare them as for the search, and call load_network"
        )
    names = interface.class_names
    if names is None:
        raise ValueError(f"{path} has no class names; give the data set class_names and search")
    return Classifier(run=run, preprocessing=interface.preprocessing, class_names=names)
