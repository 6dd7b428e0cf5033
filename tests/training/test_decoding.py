"""Parts of images, as torchvision takes them."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from fppmo_ray.training import CentreCrop, RandomResizedCrop
from fppmo_ray.training.decoding import decode, decode_random_part, decode_view, random_box


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 37), (37, 50), (27, 33), (32, 32), (32, 45), (9, 200)])
def test_centre_crops_are_torchvisions_to_the_pixel(
    size: tuple[int, int], interpolation: str
) -> None:
    from torchvision import transforms

    image = noise(*size)
    theirs = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(28),
        ]
    )(image)
    ours = decode_view(png(image), "it", 28, 28, CentreCrop(resize=32, interpolation=interpolation))
    assert np.array_equal(ours, np.array(theirs))


def test_an_image_of_the_crops_size_is_resized_and_cut_too() -> None:
    image = noise(28, 28)
    ours = decode_view(png(image), "it", 28, 28, CentreCrop(resize=32))
    assert not np.array_equal(ours, np.array(image))


def test_random_parts_have_the_areas_and_ratios_asked_for() -> None:
    rng = random.Random(0)
    crop = RandomResizedCrop(min_area=0.25, max_stretch=1.5)
    boxes = [random_box(400, 300, crop, rng) for _ in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
    areas = np.array([(r - x) * (b - y) for x, y, r, b in boxes]) / (400 * 300)
    ratios = np.log([(r - x) / (b - y) for x, y, r, b in boxes])
    assert areas.min() == pytest.approx(0.25, abs=0.02)
    assert areas.max() == pytest.approx(1, abs=0.06)
    assert np.abs(ratios).max() == pytest.approx(math.log(1.5), abs=0.02)
    assert {min(x, 1) for x, *_ in boxes} == {min(y, 1) for _, y, *_ in boxes} == {0, 1}


@pytest.mark.parametrize(
    ("size", "box"), [((400, 40), (173, 0, 226, 40)), ((40, 400), (0, 173, 40, 226))]
)
def test_the_middle_stands_in_for_parts_that_do_not_fit(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert random_box(*size, RandomResizedCrop(min_area=1.0), random.Random(0)) == box


def test_a_part_is_a_function_of_its_seed_and_half_are_mirrored() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    encoded = png(Image.fromarray(ramp))

    def part(seed: int, *, flip: bool) -> np.ndarray:
        return decode_random_part(encoded, "it", 8, 8, RandomResizedCrop(flip=flip), seed=seed)

    def falls(flip: bool) -> int:
        parts = [part(seed, flip=flip) for seed in range(200)]
        return sum(int(pixels[0, 0, 0]) > int(pixels[0, -1, 0]) for pixels in parts)

    assert np.array_equal(part(5, flip=True), part(5, flip=True))
    assert not np.array_equal(part(5, flip=True), part(6, flip=True))
    assert falls(flip=False) == 0
    assert 80 <= falls(flip=True) <= 120


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: CentreCrop(resize=256, interpolation="nearest"), "one of .*, got 'nearest'"),
        (lambda: RandomResizedCrop(min_area=0.0), "got 0.0 and 1.33"),
        (lambda: RandomResizedCrop(max_stretch=0.75), "got 0.08 and 0.75"),
    ],
)
def test_impossible_crops_are_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.mark.parametrize("view", [CentreCrop(resize=256), CentreCrop()])
def test_a_picture_of_absurd_shape_is_refused_before_it_is_resized(view: CentreCrop) -> None:
    narrow = png(Image.new("1", (60_000, 1)))
    assert len(narrow) < 200
    sentence = r"cannot resize it: its 60000 x 1 pixels would become 15360000 x 256, expected at"
    with pytest.raises(ValueError, match=sentence):
        decode_view(narrow, "it", 224, 224, view)
    part = decode_random_part(narrow, "it", 8, 8, RandomResizedCrop(), seed=0)
    assert part.shape == (8, 8, 3)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(Image.new("1", (8200, 8200)))
    assert len(bomb) < 20_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it is decoded"))
    for source in (bomb, Image.open(io.BytesIO(bomb))):
        with pytest.raises(ValueError, match="cannot decode it: it has 8200 x 8200 pixels, expec"):
            decode(source, "it")


@pytest.mark.parametrize("kind", ["EPS", "GIF", "ICO", "PDF"])
def test_formats_that_no_data_set_uses_are_not_opened(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format=kind)
    with pytest.raises(ValueError, match="cannot decode it: cannot identify image file"):
        decode(buffer.getvalue(), "it")
