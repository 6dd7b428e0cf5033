"""How images become a network's input is the caller's to say, and shown and kept as it was."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from fppmo_ray import Transform, load_dataset, transform_of
from fppmo_ray.training import (
    Augmentation,
    CentreCrop,
    Dataset,
    ImageFiles,
    Preprocessing,
    RandomResizedCrop,
    Squash,
    build_network,
    evaluate,
    interface_from_json,
    interface_of,
    load_imagenet,
    load_weights,
    open_images,
)
from fppmo_ray.training.decoding import decode, decode_view
from fppmo_ray.training.parquet import find_shards

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=32)


class TrainedOnHalves(nn.Module):
    """A network that wants pixels normalised with 0.5 and 0.5, and then does as another."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) for part in (MEAN, STD))
        return self.network((images * 0.5 + 0.5 - mean) / std)


@pytest.fixture(scope="module")
def jpegs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred JPEG files of CIFAR-10, one folder per class in ``train`` and in ``val``."""
    folder = tmp_path_factory.mktemp("jpegs")
    [shard] = find_shards(shared_data / "cifar10-jpeg", "test")
    table = next(pq.ParquetFile(shard).iter_batches(300)).to_pylist()
    for row, entry in enumerate(table):
        [label] = [value for name, value in entry.items() if "label" in name]
        [image] = [value for name, value in entry.items() if "label" not in name]
        path = folder / ("train" if row % 3 else "val") / f"{label}" / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image["bytes"])
    return folder


@pytest.fixture(scope="module")
def resnet20(shared_data: Path) -> nn.Module:
    network = build_network("resnet20", 10)
    load_weights(network, shared_data / "pretrained" / "resnet20-cifar10jpeg-rows0-44999.pt")
    return network


def accuracy(network: nn.Module, dataset: Dataset) -> float:
    return evaluate(network, open_images(dataset.train, None, dataset).batches(200)).accuracy


def test_a_network_reads_its_accuracy_only_with_the_normalisation_of_its_training(
    jpegs: Path, resnet20: nn.Module
) -> None:
    network = TrainedOnHalves(resnet20)
    as_trained = load_dataset("image_folder", jpegs, HALVES)
    as_imagenet = load_dataset("image_folder", str(jpegs), Transform(image_size=32))
    right = accuracy(network, as_trained)
    assert (
        right == accuracy(resnet20, as_imagenet) == pytest.approx(0.815, abs=0.01)
    )  # 163 of the 200 images
    assert accuracy(network, as_imagenet) < right - 0.05
    assert str(interface_of(as_trained).preprocessing) == (
        "RGB centre 32 x 32 bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    )


def test_wrong_label_order_is_mended_by_naming_the_classes_in_the_networks_order(
    jpegs: Path, resnet20: nn.Module
) -> None:
    backwards = [str(label) for label in reversed(range(10))]
    turned = nn.Sequential(resnet20, Backwards())
    as_sorted = load_dataset("image_folder", jpegs, Transform(image_size=32))
    as_named = load_dataset("image_folder", jpegs, Transform(image_size=32), class_names=backwards)
    assert as_named.class_names == tuple(backwards)
    assert accuracy(turned, as_named) == accuracy(resnet20, as_sorted)
    assert accuracy(turned, as_sorted) < 0.2
    with pytest.raises(ValueError, match=r"in another order, got cat that are no .* lack 9"):
        load_dataset("image_folder", jpegs, class_names=[*map(str, range(9)), "cat"])


class Backwards(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.flip(1)


def test_the_caller_decides_on_size_crop_interpolation_colour_and_augmentation(
    jpegs: Path,
) -> None:
    from torchvision import transforms

    transform = Transform(
        **{"image_size": 24, "squash": True, "interpolation": "bicubic", "colour": "BGR"},
        **{"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "padding": 2, "flip": False},
    )
    dataset = load_dataset("image_folder", jpegs, transform)
    files = load_dataset("image_folder", jpegs, transform, byte_limit=0)
    assert isinstance(files.train, ImageFiles)
    assert dataset.augmentation == Augmentation(padding=2, flip=False)
    theirs = transforms.Compose(
        [
            transforms.Resize((24, 24), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Lambda(lambda image: image.flip(0)),
            transforms.Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ]
    )
    wanted = theirs(Image.open(files.train.paths[7]))
    for part in (dataset, files):
        [(batch, _)] = open_images(part.train, np.array([7]), part).batches(1)
        assert torch.allclose(batch[0], wanted, atol=1e-6)
        assert torch.equal(interface_of(part).preprocessing(files.train.paths[7]), batch)
        again = interface_from_json(json.loads(json.dumps(interface_of(part).to_json())))
        assert again == interface_of(part)


def test_grey_networks_get_one_channel(jpegs: Path) -> None:
    grey = Transform(image_size=32, colour="grey", mean=(0.5,), std=(0.25,))
    for limit in (0, 2**30):
        dataset = load_dataset("image_folder", jpegs, grey, byte_limit=limit)
        [(batch, _)] = open_images(dataset.train, np.array([0]), dataset).batches(1)
        assert batch.shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="colour grey have 1 channel; give mean and std of it"):
        load_dataset("image_folder", jpegs, Transform(colour="grey"))


def test_random_crops_are_the_callers_choice_and_keep_files_on_disk(jpegs: Path) -> None:
    dataset = load_dataset("image_folder", jpegs, replace(HALVES, min_area=0.25))
    assert dataset.augmentation == RandomResizedCrop(min_area=0.25)
    assert isinstance(dataset.train, ImageFiles)
    imagenet = load_imagenet(jpegs, replace(HALVES, padding=3))
    assert imagenet.augmentation == Augmentation(padding=3, flip=True)
    assert imagenet.class_names == tuple(map(str, range(10)))


def test_named_sets_take_another_normalisation_but_no_other_size() -> None:
    digits = load_dataset("digits", transform=Transform(mean=(0.5,), std=(0.5,), padding=0))
    assert (digits.mean, digits.std, digits.augmentation.padding) == ((0.5,), (0.5,), 0)
    assert digits.class_names == tuple("0123456789")
    with pytest.raises(ValueError, match="have 8 x 8 pixels and are kept so; leave out image_size"):
        load_dataset("digits", transform=Transform(image_size=28))


def test_torchvisions_weights_bring_their_transform() -> None:
    from torchvision.models import EfficientNet_B1_Weights, ResNet50_Weights

    wanted = Transform(mean=MEAN, std=STD, image_size=224, resize=232, interpolation="bilinear")
    weights = ResNet50_Weights.IMAGENET1K_V2
    assert transform_of(weights) == transform_of(weights.transforms()) == wanted
    assert transform_of("torchvision:ResNet50_Weights.IMAGENET1K_V2") == wanted
    b1 = transform_of(EfficientNet_B1_Weights.IMAGENET1K_V1)
    assert (b1.image_size, b1.resize, b1.interpolation) == (240, 256, "bicubic")
    with pytest.raises(ValueError, match=r"torchvision has no weights 'ResNet51_Weights.V1'"):
        transform_of("torchvision:ResNet51_Weights.V1")


def test_timms_weights_bring_their_transform() -> None:
    config = {
        **{"input_size": (3, 288, 288), "crop_pct": 0.95, "interpolation": "bicubic"},
        **{"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_mode": "center"},
    }
    network = nn.Conv2d(3, 8, 3)
    network.pretrained_cfg = config  # as networks of timm have it
    halves = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "image_size": 288}
    wanted = Transform(**halves, resize=303, interpolation="bicubic")
    assert transform_of(config) == transform_of(network) == wanted
    squashed = transform_of({**config, "crop_pct": 1.0, "crop_mode": "squash"})
    assert squashed == Transform(**halves, squash=True, interpolation="bicubic")
    with pytest.raises(ValueError, match=r"must be center, or squash of the whole .* got border"):
        transform_of({**config, "crop_mode": "border"})
    with pytest.raises(ValueError, match="must be square, the weights were trained on 288 x 320"):
        transform_of({**config, "input_size": (3, 288, 320)})


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "vit_base_patch16_clip_224.openai"])
def test_networks_see_what_timms_evaluation_shows_them(name: str) -> None:
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    config = timm.get_pretrained_cfg(name).to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    given = transform_of(f"timm:{name}")
    assert given == transform_of(config)
    assert given.image_size is not None
    assert given.mean is not None
    assert given.std is not None
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
    ours = Preprocessing(
        **{"height": given.image_size, "width": given.image_size, "colour": "RGB"},
        **{"view": given.view(), "mean": given.mean, "std": given.std},
    )
    assert torch.allclose(ours(image)[0], theirs(image), atol=1e-5)
    with pytest.raises(ValueError, match="timm has no weights 'resnet51'"):
        transform_of("timm:resnet51")


def own_transforms() -> dict[str, Any]:
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    halves, cubic = ([0.5] * 3, [0.25] * 3), v2.InterpolationMode.BICUBIC
    to_floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return {
        "resize and crop": [v1.Resize(40), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(*halves)],
        "square": [v2.Resize((32, 32), cubic), *to_floats, v2.Normalize(*halves)],
        "not normalised": [v1.Resize([36]), v1.CenterCrop((32, 32)), v1.ToTensor()],
        "grey": [
            *(v1.Grayscale(), v1.Resize((32, 32)), v1.ToTensor()),
            *(v1.ConvertImageDtype(torch.float32), v1.Normalize([0.3], [0.2])),
        ],
    }


@pytest.mark.parametrize("name", ["resize and crop", "square", "not normalised", "grey"])
def test_a_transform_of_torchvision_makes_the_same_inputs(name: str) -> None:
    from torchvision import transforms

    theirs = transforms.Compose(own_transforms()[name])
    given = interface_of(transform_of(theirs), ["cat", "dog"])
    assert given.class_names == ("cat", "dog")
    assert given.preprocessing is not None
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.allclose(given.preprocessing(image)[0], theirs(image), atol=1e-5)


def test_a_transform_that_does_more_is_refused_with_the_way_out() -> None:
    from torchvision.transforms import Compose, v2

    crop, tensor = v2.CenterCrop(32), v2.ToImage()
    unscaled = v2.ToDtype(torch.float32)
    more = r"must consist of Resize, CenterCrop, .* or give\s+Transform\(mean="
    for steps in ([v2.RandomHorizontalFlip(), tensor], [crop, crop], [unscaled], [v2.Grayscale(3)]):
        with pytest.raises(ValueError, match=more):
            transform_of(Compose(steps))
    for steps in ([crop, tensor], [v2.Resize(32), tensor], [v2.Resize((40, 40)), crop]):
        with pytest.raises(ValueError, match=r"Resize\(256\) and CenterCrop\(224\), or resize to"):
            transform_of(Compose(steps))
    with pytest.raises(ValueError, match=r"got \(0.0, 0.0, 0.0\), .* and None; give all three"):
        interface_of(transform_of(Compose([tensor])))


def test_what_is_given_beats_the_weights_transform(jpegs: Path) -> None:
    name = "torchvision:ResNet50_Weights.IMAGENET1K_V2"
    plain = load_imagenet(jpegs, Transform(weights_transform=name))
    assert (plain.train.view, plain.train.height) == (CentreCrop(resize=232), 224)
    changed = Transform(weights_transform=name, image_size=64, squash=True, flip=False)
    dataset = load_imagenet(jpegs, changed)
    assert (dataset.train.view, dataset.train.height) == (Squash(), 64)
    assert dataset.augmentation == RandomResizedCrop(flip=False)
    assert dataset.mean == MEAN


def test_flags_are_the_fields() -> None:
    words = "--mean 0.5 0.4 0.3 --std 0.1 0.2 0.3 --image-size 64 --flip False --colour BGR".split()
    assert tyro.cli(Transform, args=words) == Transform(
        mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), image_size=64, flip=False, colour="BGR"
    )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"mean": (0.5,)}, r"mean and std belong together, got \(0.5,\) and None"),
        ({"squash": True, "resize": 256}, "squash resizes the whole image and resize = 256 cuts"),
        ({"padding": 4, "min_area": 0.08}, "are two ways to crop; give one of them"),
        ({"colour": "CMYK"}, "colour must be one of .*, got 'CMYK'"),
        ({"weights_transform": "resnet50"}, "expected weights such as .*, got 'resnet50'"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Transform(**fields).filled()


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    if kind == "PPM" and pixels.dtype == np.uint16:  # old versions of Pillow cannot
        height, width = pixels.shape
        return f"P5 {width} {height} 65535\n".encode() + pixels.astype(">u2").tobytes()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_images_keep_their_shades(kind: str) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    wanted = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode(encoded(deep, kind), "it")[:, :, 1], wanted)
    small = decode_view(encoded(deep, kind), "it", 8, 8, Squash())
    plain = decode_view(encoded(wanted, "PNG"), "it", 8, 8, Squash())
    assert np.array_equal(small, plain)
    brighter = np.minimum(deep, 65435) + 100  # by less than half of an 8-bit step
    assert np.array_equal(decode(encoded(brighter, kind), "it")[:, :, 2], wanted)


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [(np.full((4, 4), 0.5, np.float32), "floats"), (np.ones((4, 4), np.int32), "32-bit integers")],
)
def test_pixels_of_unknown_range_are_refused(pixels: np.ndarray, kind: str) -> None:
    with pytest.raises(ValueError, match=f"cannot decode it: its pixels are {kind}, .* scale them"):
        decode(encoded(pixels, "TIFF"), "it")
