"""The evaluation transforms of published weights, and those that users write of torchvision's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_EXPECTED = (
    "expected weights such as torchvision:ResNet50_Weights.IMAGENET1K_V2 or timm:resnet50.a1_in1k"
)


_STEPS = ("Resize", "CenterCrop", "Normalize")
"""Transforms of torchvision that decide something; a ``Compose`` has them in this order."""
_ANYWHERE = (
    *("ToTensor", "PILToTensor", "ToImage", "ConvertImageDtype", "ToDtype", "ToPureTensor"),
    *("MaybeToTensor", "Grayscale"),
)
"""Transforms that make a tensor in [0, 1] of an image, or grey of colours, in any place."""


def settings_of_weights(weights: object) -> dict[str, Any]:
    """Return mean, std, image_size, resize or squash, and interpolation of published weights.

    Args:
        weights: Weights of torchvision or their transform, a network or configuration of timm, or
            the name of either, which is looked up in the installed package; or a ``Compose``.

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
    if isinstance(steps := getattr(weights, "transforms", None), list | tuple):
        return _of_steps(steps)
    raise ValueError(f"{_EXPECTED}, or the object itself, got {type(weights).__name__}")


def _of_steps(steps: Sequence[Any]) -> dict[str, Any]:
    """Return the settings of transforms of torchvision, of either version, that follow each other.

    Raises:
        ValueError: they do anything but resize, cut the centre, convert and normalise.
    """
    names = [type(step).__name__ for step in steps]
    given = dict(zip(names, steps, strict=True))
    deciding = [name for name in names if name not in _ANYWHERE]
    if deciding != [name for name in _STEPS if name in given] or not _is_plain(given):
        raise ValueError(
            f"a transform must consist of {', '.join(_STEPS)}, each at most once and in this order,"
            f" and a conversion to [0, 1], got {', '.join(map(str, steps))}; take the one that "
            "networks are evaluated with, or give Transform(mean=..., std=..., image_size=...)"
        )
    settings: dict[str, Any] = {"colour": "grey"} if "Grayscale" in given else {}
    channels, normalise = 1 if settings else 3, given.get("Normalize")
    settings["mean"] = tuple(map(float, normalise.mean)) if normalise else (0.0,) * channels
    settings["std"] = tuple(map(float, normalise.std)) if normalise else (1.0,) * channels
    resize, crop = given.get("Resize"), given.get("CenterCrop")
    if resize is not None:
        method = resize.interpolation  # an enumeration, or its name
        settings["interpolation"] = _known(getattr(method, "value", method))
        sides = (resize.size,) if isinstance(resize.size, int) else tuple(resize.size)
        if crop is None and len(sides) == 2:
            return {**settings, "image_size": _single(sides), "squash": True}
        if crop is not None and len(sides) == 1:
            return {**settings, "image_size": _single(crop.size), "resize": sides[0]}
    if resize is not None or crop is not None:
        raise ValueError(
            "a transform must resize the shorter side and cut the centre, Resize(256) and "
            f"CenterCrop(224), or resize to a square, Resize((224, 224)), got {resize} and {crop}"
        )
    return settings


def _is_plain(steps: Mapping[str, Any]) -> bool:
    """Return whether tensors are scaled to [0, 1], and grey images have one channel."""
    is_scaled = getattr(steps.get("ToDtype"), "scale", True)
    return bool(is_scaled) and getattr(steps.get("Grayscale"), "num_output_channels", 1) == 1


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
