"""The evaluation transforms that torchvision and timm publish with their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_EXPECTED = (
    "expected weights such as torchvision:ResNet50_Weights.IMAGENET1K_V2 or timm:resnet50.a1_in1k"
)


def settings_of_weights(weights: object) -> dict[str, Any]:
    """Return mean, std, image_size, resize or squash, and interpolation of published weights.

    Args:
        weights: Weights of torchvision or their transform, a network or configuration of timm, or
            the name of either, which is looked up in the installed package.

    Raises:
        ValueError: there are no such weights, or they have no settings.
    """
    if isinstance(weights, str):
        package, _, name = weights.partition(":")
        if package not in _PACKAGES or not name:
            raise ValueError(f"{_EXPECTED}, got {weights!r}")
        return settings_of_weights(_PACKAGES[package](name))
    config = getattr(weights, "pretrained_cfg", weights)
    if isinstance(config, Mapping) and "input_size" in config:
        return _of_timm(config)
    preset: Any = weights
    if callable(getattr(weights, "transforms", None)):
        preset = preset.transforms()
    if all(hasattr(preset, name) for name in ("crop_size", "resize_size", "mean", "std")):
        return {
            "mean": tuple(map(float, preset.mean)),
            "std": tuple(map(float, preset.std)),
            "image_size": _single(preset.crop_size),
            "resize": _single(preset.resize_size),
            "interpolation": _known(preset.interpolation.value),
        }
    raise ValueError(f"{_EXPECTED}, or the object itself, got {type(weights).__name__}")


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``pretrained_cfg`` as timm's evaluation transform reads them."""
    side = _single(config["input_size"][1:])
    settings = {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "image_size": side,
        "interpolation": _known(config["interpolation"]),
    }
    mode = config.get("crop_mode") or "center"
    if mode == "squash" and config["crop_pct"] == 1:
        return {**settings, "squash": True}
    if mode != "center":
        raise ValueError(
            f"crop_mode of the weights must be center, or squash of the whole image, got {mode} of "
            f"{config['crop_pct']}; prepare images by a torch Dataset of your own"
        )
    return {**settings, "resize": math.floor(side / config["crop_pct"])}


def _torchvision(name: str) -> object:
    from torchvision import models

    try:
        return models.get_weight(name)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"torchvision has no weights {name!r}; {_EXPECTED}") from error


def _timm(name: str) -> object:
    try:
        import timm
    except ImportError as error:
        raise ValueError("weights of timm need the package timm; pip install timm") from error
    config: Any = timm.get_pretrained_cfg(name)
    if config is None:
        raise ValueError(f"timm has no weights {name!r}; {_EXPECTED}")
    return config.to_dict()


_PACKAGES = {"torchvision": _torchvision, "timm": _timm}


def _single(size: Any) -> int:
    """Return the side of a square size, which is one number or one or two equal ones."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(
            f"images must be square, the weights were trained on {' x '.join(map(str, size))}; "
            "prepare images by a torch Dataset of your own"
        )
    return int(sides.pop())


def _known(interpolation: str) -> str:
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f"interpolation must be bilinear or bicubic, the weights were trained with "
            f"{interpolation}; prepare images by a torch Dataset of your own"
        )
    return interpolation
