"""Spaces of networks that are pruned, written out: nothing is traced."""

from __future__ import annotations

from fppmo_ray.distribution import ChannelGroup, LayerCost, PruningSpace, Width


def cifar_space(blocks: int) -> PruningSpace:
    """The inner layers of a CIFAR ResNet's basic blocks; the residual stream stays whole."""
    groups: list[ChannelGroup] = []
    costs: list[LayerCost] = []
    for stage, (width, area) in enumerate(zip([16, 32, 64], [1024, 256, 64], strict=True)):
        for block in range(blocks):
            inner, stream = Width(terms=((len(groups), 1),)), Width(constant=width)
            into = Width(constant=width // 2) if stage and not block else stream
            groups.append(ChannelGroup(name=f"layer{stage + 1}.{block}", num_filters=width))
            costs += [_cost(9 * area, inner, into), _cost(9 * area, stream, inner)]
    stem_and_classifier = 27 * 16 * 1024 + 640
    return PruningSpace(tuple(groups), tuple(costs), stem_and_classifier).with_limits()


def bottleneck_space() -> PruningSpace:
    """The two inner layers of each of ResNet-50's blocks; the residual stream stays whole."""
    groups: list[ChannelGroup] = []
    costs: list[LayerCost] = []
    into = 64
    stages = zip([64, 128, 256, 512], [3136, 784, 196, 49], [3, 4, 6, 3], strict=True)
    for stage, (width, area, blocks) in enumerate(stages):
        for block in range(blocks):
            reduced, inner = (Width(terms=((len(groups) + i, 1),)) for i in range(2))
            groups += [
                ChannelGroup(name=f"layer{stage + 1}.{block}.conv{i}", num_filters=width)
                for i in range(2)
            ]
            stream = Width(constant=4 * width)
            costs += [
                _cost(area * (4 if stage and not block else 1), reduced, Width(constant=into)),
                _cost(9 * area, inner, reduced),
                _cost(area, stream, inner),
            ]
            into = 4 * width
    stem_shortcuts_and_classifier = 479_723_520
    return PruningSpace(tuple(groups), tuple(costs), stem_shortcuts_and_classifier).with_limits()


def _cost(macs_per_pair: int, out_width: Width, in_width: Width) -> LayerCost:
    return LayerCost(
        layer="conv", macs_per_pair=macs_per_pair, out_width=out_width, in_width=in_width
    )


SPACES = {
    "resnet20": cifar_space(3),
    "resnet56": cifar_space(9),
    "resnet50": bottleneck_space(),
}
