"""Copies of networks, also of those that keep activations or compute their weights."""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


def copy_network(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network, which may keep activations of its last pass."""
    with DetachedCopies():
        return copy.deepcopy(model)


def on_cpu(model: nn.Module) -> nn.Module:
    """Return the network itself if all of it lies on the CPU, else a copy there."""
    tensors = chain(model.parameters(), model.buffers())
    is_there = all(tensor.device.type == "cpu" for tensor in tensors)
    return model if is_there else copy_network(model).cpu()


class WorkingCopy:
    """A copy on the CPU of a network, made when it is first used.

    Args:
        model: The network; not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.original = on_cpu(model)
        """The network on the CPU, to be read only."""

    @cached_property
    def network(self) -> nn.Module:
        """The copy, which may be run and changed."""
        return copy_network(self.original)


class DetachedCopies(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors that were computed with gradients, which torch refuses.

    Modules keep such tensors as attributes: activations for a loss, or weights that a hook derives.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


@torch.enable_grad()  # a weight that needs no gradient would become no parameter
def with_plain_weights(model: nn.Module) -> nn.Module:
    """Return the network itself, or a copy whose parametrized weights are parameters.

    Weight norm, spectral norm and other parametrizations compute a weight from all others of its
    layer, so fewer filters would change those that stay. In eval mode the copy computes the same.

    Args:
        model: The network; not changed.
    """
    if not any(_is_derived(module) for module in model.modules()):
        return model
    plain = copy_network(model)
    modes = {module: module.training for module in plain.modules()}
    plain.eval()  # in training mode a spectral norm would move
    for module in modes:
        if parametrize.is_parametrized(module):
            # The class is the original's too, and removing a parametrization changes it.
            own = {k: v for k, v in vars(type(module)).items() if k not in _OF_ANY_CLASS}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
        _drop_state_hooks(module)
    for module, training in modes.items():
        module.training = training
    return plain


def _drop_state_hooks(module: nn.Module) -> None:
    """Remove, in place, what weight norm and spectral norm leave to read older state dicts."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, wrapped in list(hooks.items()):
            hook = getattr(wrapped, "hook", wrapped)
            is_compat = getattr(hook, "__name__", "") == "_weight_norm_compat_hook"
            if is_compat or isinstance(hook, _SPECTRAL_STATE):
                del hooks[key]


_OF_ANY_CLASS = ("__dict__", "__weakref__")
_SPECTRAL_STATE = (SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook)


def _is_derived(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    derives = any(isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks)
    return derives or parametrize.is_parametrized(module)
