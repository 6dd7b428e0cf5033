"""The user's own modules on their way to the workers."""

from __future__ import annotations

import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from torch import nn

_OURS = __name__.partition(".")[0]


@contextmanager
def carried(network: nn.Module, *functions: Callable[..., Any] | None) -> Iterator[None]:
    """For a while, have classes and functions pickled whole if their modules are not installed.

    Ray pickles by the names of modules, and a worker does not find those that lie beside a script:
    on other nodes they are not there, and a submitted job's folder is on no worker's path.

    Args:
        network: Its class, those of its parts, and what they inherit from.
        functions: Or methods, or instances of callable classes.
    """
    named = {kind.__module__ for part in network.modules() for kind in type(part).__mro__}
    named |= {module for function in functions for module in _modules_of(function)}
    modules = [sys.modules[name] for name in sorted(named) if name in sys.modules]
    pickle: Any = ray.cloudpickle
    already = pickle.list_registry_pickle_by_value()
    own = [module for module in modules if _is_own(module) and module.__name__ not in already]
    for module in own:
        pickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            pickle.unregister_pickle_by_value(module)


def _modules_of(function: Any) -> set[str]:
    bound_to = getattr(function, "__self__", function)
    kinds = {kind.__module__ for kind in type(bound_to).__mro__}
    return kinds | {getattr(function, "__module__", None) or "builtins"}


def _is_own(module: ModuleType) -> bool:
    """Whether a module lies where only this process looks; ``__main__`` travels whole anyway."""
    name, file = module.__name__, getattr(module, "__file__", None)
    if file is None or name == "__main__" or name.partition(".")[0] == _OURS:
        return False
    return not any(Path(file).is_relative_to(folder) for folder in _installed())


def _installed() -> set[str]:
    paths = sysconfig.get_paths()
    named = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return named | {*site.getsitepackages(), site.getusersitepackages()}
