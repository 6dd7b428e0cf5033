"""Networks of two convolutions with one operation between them, to be traced."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions, an operation between them that the subclass gives, and a head."""

    def __init__(self, channels: int = 8, read: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(read, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(features)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.between(self.bn(self.first(images))))
        return self.head(F.relu(features).mean((2, 3)))


class Flattened(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 8 * 8, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(F.relu(self.bn(self.first(images))))
        return self.head(torch.flatten(F.relu(features), 1))


class Twice(Net):
    def __init__(self) -> None:
        super().__init__(read=16)

    def between(self, features: Tensor) -> Tensor:
        return torch.cat([features, F.relu(features)], dim=1)


class PartlyAdded(Net):
    """The concatenation of two layers is added to a third, so the third has two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        joined = torch.cat([self.left(images), self.right(images)], dim=1)
        features = self.second(F.relu(self.bn(self.first(images)) + joined))
        return self.head(F.relu(features).mean((2, 3)))


class Depthwise(Net):
    def __init__(self, filters: int = 1) -> None:
        super().__init__(read=8 * filters)
        self.depthwise = nn.Conv2d(8, 8 * filters, 3, padding=1, groups=8)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.depthwise(features))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(read=12)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.grouped(features))


class Shared(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def between(self, features: Tensor) -> Tensor:
        return self.shared(F.relu(self.shared(features)))


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(read=10)
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2)

    def between(self, features: Tensor) -> Tensor:
        return F.relu(self.up(features))


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.prelu = nn.PReLU(8)

    def between(self, features: Tensor) -> Tensor:
        return self.prelu(features * self.scale)


class Normalised(Net):
    """Mixes channels without a module, so only the comparison of outputs can tell."""

    def between(self, features: Tensor) -> Tensor:
        return features.softmax(dim=1)


class GroupNormed(Net):
    def __init__(self, groups: int = 4, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, 8, affine=affine)

    def between(self, features: Tensor) -> Tensor:
        return self.norm(features)


class GroupNormedBlock(Net):
    """A grouped layer between two norms: pairs of channels go with pairs of the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside = nn.GroupNorm(4, 8), nn.GroupNorm(8, 8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.out = nn.Conv2d(8, 8, 1)

    def between(self, features: Tensor) -> Tensor:
        inner = self.inside(self.grouped(self.before(features).relu()))
        return features + self.out(inner.relu())


class Padded(Net):
    """Channels move by two, and beside them are some that always stay."""

    def __init__(self) -> None:
        super().__init__(read=12)

    def between(self, features: Tensor) -> Tensor:
        return F.pad(F.relu(features), (0, 0, 0, 0, 2, 2))


class Shuffled(Net):
    """ShuffleNet's: half of the channels go through a layer, then all change places."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(4, 4, 3, padding=1)

    def between(self, features: Tensor) -> Tensor:
        left, right = F.relu(features).chunk(2, dim=1)
        joined = torch.cat([left, self.branch(right)], dim=1)
        images, channels, height, width = joined.shape
        pairs = joined.view(images, 2, channels // 2, height, width).transpose(1, 2)
        return pairs.reshape(images, channels, height, width)


class ShuffledPixels(Net):
    def __init__(self) -> None:
        super().__init__(read=2)

    def between(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(features, 2)


class Gated(Net):
    def __init__(self) -> None:
        super().__init__(read=4)

    def between(self, features: Tensor) -> Tensor:
        return F.glu(features, dim=1)


class Excited(Net):
    """Squeeze and excitation: channels are weighted by what a small network says of them."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)

    def between(self, features: Tensor) -> Tensor:
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(features.mean((2, 3))))))
        return features * weights[:, :, None, None]


class StandardisedConv(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(images, weight, self.bias, padding=1)


class Standardised(Net):
    """The second layer's weights are standardised over what it reads, so that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.second = StandardisedConv(8, 6, 3)


class Flattening(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        rows = self.weight.reshape(1, len(self.weight), -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(images, weight, self.bias, padding=1)


class Rescaled(Net):
    """The same through a batch norm over rows of weights, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Flattening(8, 6, 3)


class DepthwiseTransposed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)

    def between(self, features: Tensor) -> Tensor:
        return self.up(features)


class GroupedTransposed(Net):
    def __init__(self) -> None:
        super().__init__(read=12)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)

    def between(self, features: Tensor) -> Tensor:
        return self.up(features)


class Attentive(Net):
    """Two convolutions make what is multiplied over their channels, without a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def between(self, features: Tensor) -> Tensor:
        alike = self.query(features).flatten(2).mT @ self.key(features).flatten(2)
        return (features.flatten(2) @ alike).unflatten(2, features.shape[2:])


class Heads(Net):
    """The number of channels of a head stands in the code."""

    def between(self, features: Tensor) -> Tensor:
        return features.reshape(len(features), 2, 4, 8, 8).flip(1).flatten(1, 2)


class Reshaped(Net):
    """A reshape whose lengths stand in the code."""

    def between(self, features: Tensor) -> Tensor:
        return features.reshape(-1, 8, 64).reshape(-1, 8, 8, 8)


class Returned(Net):
    """The first layer's channels are an output too."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.bn(self.first(images))
        logits = self.head(F.relu(self.second(features)).mean((2, 3)))
        return {"logits": logits, "features": features}


class Sorted(Net):
    """An operation that has no rule."""

    def between(self, features: Tensor) -> Tensor:
        return features.cummax(2).values


class LayerNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def between(self, features: Tensor) -> Tensor:
        return self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TrainedHead(Net):
    """A second head that runs in training mode only and reads the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = F.relu(self.bn(self.first(images)))
        logits = self.head(F.relu(self.second(features)).mean((2, 3)))
        return (logits, self.auxiliary(features).mean((2, 3))) if self.training else logits
