"""Networks whose code decides by widths: masks that would make another network are refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fppmo_ray.pruning import Tracing, check_equivalence, extract, trace
from fppmo_ray.pruning.twin import mask_of_widths

IMAGE = torch.zeros(1, 3, 8, 8)
Joined = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions of eight and twelve filters, with a function of both results."""

    def __init__(self, joined: Joined, widths: tuple[int, int] = (8, 12)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joined = joined
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.second = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.head = nn.Linear(widths[1], 4)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.first(images))
        return self.head(F.relu(self.joined(features, self.second(features))).mean((2, 3)))


def residual(x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape == y.shape else y


def if_wide(x: Tensor, y: Tensor) -> Tensor:
    return y * 2 if y.size(1) > 5 else y


def if_many_elements(x: Tensor, y: Tensor) -> Tensor:
    return y.exp() if y[0].numel() >= 9 * 64 else y


def if_wider(x: Tensor, y: Tensor) -> Tensor:
    return y.sin() if y.shape[1] - x.shape[1] > 2 else y


def if_any_more(x: Tensor, y: Tensor) -> Tensor:
    return y.sin() if y.shape[1] // 4 else y


@pytest.mark.parametrize(
    ("joined", "floors"),
    [
        (residual, [1, 9]),
        (if_wide, [1, 6]),
        (if_many_elements, [1, 9]),
        (if_wider, [1, 11]),
        (if_any_more, [1, 4]),
    ],
)
def test_groups_keep_as_many_filters_as_their_decisions_need(
    joined: Joined, floors: list[int]
) -> None:
    network = Net(joined)
    with pytest.warns(UserWarning, match=rf"keep at least so many: second \({floors[1]}\)"):
        tracing = trace(network, IMAGE)
    assert tracing.left_whole == ()
    space = tracing.space.with_limits(min_keep=0.1)
    assert space.min_widths.tolist() == floors
    every_width = [[one, other] for one in range(floors[0], 9) for other in range(floors[1], 13)]
    for widths in every_width[::5] + every_width[-1:]:
        keep = mask_of_widths(space, np.array(widths), np.random.default_rng(0))
        check_equivalence(network, tracing, IMAGE, keep=keep)
    keep = mask_of_widths(space, np.array([8, floors[1] - 1]), np.random.default_rng(0))
    with pytest.raises(ValueError, match=rf"keeps {floors[1] - 1} filters of group second, exp"):
        extract(network, tracing, keep)


def of_whole(joined: Joined, widths: tuple[int, int]) -> Tracing:
    with pytest.warns(UserWarning, match=r"decides by its width in test_width_decisions.py:\d+"):
        return trace(Net(joined, widths), IMAGE)


def if_equal(x: Tensor, y: Tensor) -> Tensor:
    return y.sin() if x.shape == y.shape else y


def if_even(x: Tensor, y: Tensor) -> Tensor:
    return y * (1 + y.shape[1] % 2 == 1) if y.shape[1] % 2 == 0 else y.sin()


def test_groups_stay_whole_where_no_smaller_width_will_do() -> None:
    assert of_whole(if_even, (8, 12)).left_whole == ("second",)
    with pytest.raises(ValueError, match=r"no channel group .*by its width in test_width_dec"):
        trace(Net(if_equal, (8, 8)), IMAGE)


def aligned(x: Tensor, y: Tensor) -> Tensor:
    return y.contiguous() if y.shape[1] % 4 else y.clone()


def checked(x: Tensor, y: Tensor) -> Tensor:
    assert x.shape[1] <= 8, "too wide"
    assert y.shape[0] == x.shape[0]
    return y if min(x.shape[1], y.shape[1]) > 0 else x


def always_added(x: Tensor, y: Tensor) -> Tensor:
    y = y[:, : y.shape[1] // 2] + x
    return torch.cat([y, y], 1) if y.shape == x.shape else y


@pytest.mark.parametrize(
    ("joined", "widths"), [(aligned, (8, 12)), (checked, (8, 12)), (always_added, (6, 12))]
)
def test_decisions_that_change_nothing_limit_no_widths(
    joined: Joined, widths: tuple[int, int]
) -> None:
    tracing = trace(Net(joined, widths), IMAGE)
    assert tracing.left_whole == ()
    assert {group.floor for group in tracing.space.groups} == {1}


class Numbers(nn.Module):
    """Its widths are numbers that are compared, and mended where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = 8, 12

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.view(-1, self.inner, 8, 8), y.view(-1, self.outer, 8, 8)
        return x + y if self.inner == self.outer else y


def test_comparisons_of_module_numbers_count_too() -> None:
    network = Net(Numbers())
    with pytest.warns(UserWarning, match=r"keep at least so many: second \(9\)"):
        tracing = trace(network, IMAGE)
    assert tracing.space.min_widths.tolist() == [1, 9]


class Residual(nn.Module):
    def __init__(self, channels: int, filters: int, fits: Callable[..., bool]) -> None:
        super().__init__()
        self.conv, self.fits = nn.Conv2d(channels, filters, 3, padding=1), fits

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return x + y if self.fits(x, y, self.conv) else y


FITS = {
    "sizes": lambda x, y, conv: x.size(1) == y.size(dim=-3),
    "elements": lambda x, y, conv: x.numel() == y.numel(),
    "both ways": lambda x, y, conv: y.shape[1] <= x.shape[1] and y.shape[1] >= x.shape[1],
    "difference": lambda x, y, conv: not (x.shape[1] - y.shape[1]),
    "layer": lambda x, y, conv: conv.in_channels == conv.out_channels,
    "weight": lambda x, y, conv: conv.weight.shape[0] == conv.weight.shape[1],
    "plain integers": lambda x, y, conv: int(x.shape[1]) == int(y.shape[1]),
    "text": lambda x, y, conv: str(x.shape) == str(y.shape),
    "length of the bias": lambda x, y, conv: len(conv.bias) == conv.weight.shape[1],
}


@pytest.mark.filterwarnings("ignore:channel groups left whole")
@pytest.mark.filterwarnings("ignore:the network's code decides by widths")
@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("widths", [(8, 12, 16), (16, 12, 8), (8, 8, 12)])
def test_residuals_where_shapes_fit_are_exact_at_every_legal_width_or_refused(
    name: str, widths: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    blocks = [Residual(*pair, FITS[name]) for pair in zip((3, *widths), widths, strict=False)]
    network = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * 64, 3))
    try:
        space = (tracing := trace(network, IMAGE)).space
    except ValueError as refusal:
        assert name in ("plain integers", "text", "length of the bias")
        assert "seems to decide by widths where tracing cannot" in str(refusal)  # noqa: PT017
        return
    low, high = space.min_widths, space.dense_widths
    rng = np.random.default_rng(0)
    tried = [np.clip(np.full(len(low), width), low, high) for width in range(1, 17, 2)]
    for some in [*tried, low, *(rng.integers(low, high + 1) for _ in range(10))]:
        check_equivalence(network, tracing, IMAGE, keep=mask_of_widths(space, some, rng))


def if_it_fits(x: Tensor, y: Tensor) -> Tensor:
    try:
        return x + y
    except RuntimeError:
        return y


def test_what_an_operation_read_that_fails_and_is_caught_stays_whole() -> None:
    with pytest.raises(ValueError, match=r"first \(an operation on it fails, .* catches that\)"):
        trace(Net(if_it_fits), IMAGE)


def hidden(x: Tensor, y: Tensor) -> Tensor:
    return x + y if int(x.shape[1]) == int(y.shape[1]) else y


def test_a_decision_that_tracing_cannot_see_is_found_at_equal_widths() -> None:
    with pytest.warns(UserWarning, match="left whole"):
        tracing = trace(Net(hidden), IMAGE)
    assert tracing.left_whole == ("second",)


def test_a_single_channel_with_which_hidden_code_decides_otherwise_is_not_left_alone() -> None:
    with pytest.warns(UserWarning, match=r"keep at least so many: second \(2\)"):
        tracing = trace(Net(lambda x, y: y.abs() + 1 if int(y.shape[1]) == 1 else y), IMAGE)
    assert tracing.space.min_widths.tolist() == [1, 2]


def test_a_mask_for_which_a_hidden_decision_changes_is_found_by_the_check() -> None:
    network = Net(lambda x, y: y.sin() if int(y.shape[1]) == 10 else y)
    tracing = trace(network, IMAGE)
    keep = mask_of_widths(tracing.space, np.array([8, 10]), np.random.default_rng(0))
    with pytest.raises(ValueError, match="decide by widths: exclude the layers"):
        check_equivalence(network, tracing, IMAGE, keep=keep)
