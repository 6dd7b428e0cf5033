"""Where the outputs of two equal networks' layers can be compared, layer by layer, in one pass.

A layer's output is compared behind the batch norm that reads it, and where that is added to another
tensor, as in a residual network, behind the sum: a layer can make up there for what went wrong on
the other branch too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fppmo_ray.pruning.calibration.consumers import STOCK_LAYERS
from fppmo_ray.training.compute import in_mode

_ADDITIONS = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer's output is compared."""

    layer: str
    """Name of a convolution, transposed convolution or linear layer that runs once."""
    norm: str | None
    """Name of the batch norm that alone reads its output; None: there is none."""
    is_summand: bool
    """Whether the output, normed, is read by nothing but a sum with a tensor of the same shape."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A layer's tensors in one pass."""

    inputs: Tensor
    output: Tensor
    """The layer's output, normed where a batch norm follows."""
    other: Tensor | None
    """The other summand, where the output is one."""

    @property
    def compared(self) -> Tensor:
        """The tensor that is compared."""
        return self.output if self.other is None else self.output + self.other


def find_places(network: nn.Module, inputs: Sequence[Tensor]) -> list[Place]:
    """Return the places of all layers whose arithmetic is known and that run once, in eval mode.

    Args:
        network: The network.
        inputs: The forward's inputs for a small batch.
    """
    record = _Record(network)
    with torch.no_grad(), in_mode(network, training=False), record.watching():
        network(*inputs)
    return record.places()


@contextmanager
def each_layer(
    network: nn.Module,
    places: Sequence[Place],
    visit: Callable[[Place, Seen], Tensor | None],
    unlisted_norm: Callable[[_BatchNorm, Tensor], None] | None = None,
) -> Iterator[None]:
    """Call a function at every place during the forward passes inside.

    Args:
        network: The network.
        places: From ``find_places`` of a network with the same code.
        visit: Called in the order of the forward. A tensor that it returns takes the place of the
            layer's output (normed). It may call the network's layers.
        unlisted_norm: Called with every batch norm that is at no place, and its input.
    """
    passage = _Passage(visit)
    with ExitStack() as hooks:
        for place in places:
            layer = network.get_submodule(place.layer)
            ends = layer if place.norm is None else network.get_submodule(place.norm)
            for module, hook in (
                (layer, partial(passage.enter, place)),
                (ends, partial(passage.leave, place)),
            ):
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        if unlisted_norm is not None:
            listed = {place.norm for place in places}
            for name, module in network.named_modules():
                if isinstance(module, _BatchNorm) and name not in listed:
                    hook = partial(passage.pass_norm, unlisted_norm)
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
        hooks.enter_context(passage)
        yield


class _Passage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls the visitor when a layer's output, or its sum, is there."""

    def __init__(self, visit: Callable[[Place, Seen], Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._visit = visit
        self._inputs: dict[str, Tensor] = {}
        self._summands: dict[int, tuple[Place, Tensor]] = {}  # by id of the output
        self._is_visiting = False

    def enter(self, place: Place, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._is_visiting:
            self._inputs[place.layer] = args[0] if args else kwargs["input"]

    def leave(
        self, place: Place, _: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        if self._is_visiting:
            return None
        if place.is_summand:
            self._summands[id(output)] = place, output  # held, so that the id stays its own
            return None
        return self._called(place, output, None)

    def pass_norm(
        self, unlisted: Callable[[_BatchNorm, Tensor], None], norm: _BatchNorm, args: Any
    ) -> None:
        if args and not self._is_visiting:
            unlisted(norm, args[0])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ADDITIONS:
            for summand, other in (args[:2], args[1::-1]):
                place, output = self._summands.pop(id(summand), (None, None))
                if place is not None and output is not None:
                    changed = self._called(place, output, other)
                    if changed is not None:
                        output.copy_(changed)
        return func(*args, **(kwargs or {}))

    def _called(self, place: Place, output: Tensor, other: Tensor | None) -> Tensor | None:
        self._is_visiting = True
        try:
            inputs = self._inputs.pop(place.layer)
            return self._visit(place, Seen(inputs=inputs, output=output, other=other))
        finally:
            self._is_visiting = False


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which operations read the tensors of one pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._network = network
        self._alive: list[Any] = []  # so that no id is used twice
        self._readers: dict[int, list[tuple[Any, tuple[Any, ...]]]] = defaultdict(list)
        self._made: dict[str, Tensor] = {}
        self._normed: dict[int, tuple[str, Tensor]] = {}  # by id of the norm's input
        self._calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive.append((args, result))
        for arg in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(arg, Tensor):
                self._readers[id(arg)].append((func, args))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the passes inside."""
        holders = Counter(
            id(parameter)
            for module in self._network.modules()
            for parameter in module._parameters.values()
        )
        with ExitStack() as hooks:
            for name, module in self._network.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(module, STOCK_LAYERS) and holders[id(weight)] == 1:
                    hook = partial(self._note_layer, name)
                elif isinstance(module, _BatchNorm):
                    hook = partial(self._note_norm, name)
                else:
                    continue
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            hooks.enter_context(self)
            yield

    def _note_layer(
        self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        self._calls[name] += 1
        if is_stock(layer, args, kwargs, output):
            self._made[name] = output

    def _note_norm(self, name: str, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._calls[name] += 1
        if args:
            self._normed[id(args[0])] = name, output

    def places(self) -> list[Place]:
        """Return the places of the recorded pass, in the order of the layers."""
        found: list[tuple[Place, int | None, int]] = []
        for name, made in self._made.items():
            norm, output = self._normed.get(id(made), (None, made))
            if norm is not None and (len(self._readers[id(made)]) > 1 or self._calls[norm] > 1):
                norm, output = None, made  # compared as the layer itself makes it
            if self._calls[name] == 1 and _can_change(self._network, norm):
                layer: Any = self._network.get_submodule(name)
                columns = layer.weight[0].numel()
                found.append(
                    (Place(layer=name, norm=norm, is_summand=False), self._sum(output), columns)
                )
        # A sum of two layers' outputs makes up for both branches by the wider layer.
        widest: dict[int, int] = {}
        for index, (_, total, columns) in enumerate(found):
            if total is not None and (total not in widest or found[widest[total]][2] < columns):
                widest[total] = index
        return [
            Place(layer=place.layer, norm=place.norm, is_summand=widest.get(total or 0) == index)
            for index, (place, total, _) in enumerate(found)
        ]

    def _sum(self, output: Tensor) -> int | None:
        """Return what tells the sum apart that alone reads an output; None where there is none."""
        readers = self._readers[id(output)]
        if not readers:
            return None
        func, args = readers[0]
        in_place = func is torch.ops.aten.add_.Tensor and args[0] is output
        if func not in _ADDITIONS or len(args) != 2 or (len(readers) > 1 and not in_place):
            return None
        others = [arg for arg in args if arg is not output]
        fits = len(others) == 1 and isinstance(others[0], Tensor)
        if not fits or others[0].shape != output.shape or isinstance(others[0], nn.Parameter):
            return None
        return id(args)


def _can_change(network: nn.Module, norm: str | None) -> bool:
    """Whether a layer's scale and offset can be written into its batch norm, or it has none."""
    if norm is None:
        return True
    module: Any = network.get_submodule(norm)
    return module.weight is not None and module.bias is not None and module.track_running_stats


def is_stock(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> bool:
    """Whether a layer computed what its stock class would, with its weight as it is.

    Args:
        layer: A consumer's module.
        args: Positional arguments of its call.
        kwargs: Named ones.
        output: What it returned.
    """
    stock = next(kind for kind in STOCK_LAYERS if isinstance(layer, kind))
    if type(layer).forward is stock.forward:
        return True
    expected: Tensor = stock.forward(layer, *args, **kwargs)  # type: ignore[arg-type]
    return expected.shape == output.shape and torch.allclose(
        expected, output, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
