"""Classes and functions from modules that only the driver can import, on the workers."""

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
def pickled_by_value(network: nn.Module, *functions: Callable[..., Any] | None) -> Iterator[None]:
    """While the context is open, pickle code whole whose modules are not installed.

    By default, classes and functions are pickled by the names of their modules. Workers cannot
    import a module that lies beside a script: other nodes do not have it, and the folder of a
    submitted job is not on the workers' path.

    Args:
        network: A network; its own class, the classes of its submodules and all base classes are
            considered.
        functions: Functions, methods or instances of callable classes; None is skipped.
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
    """Whether only this process can import a module; ``__main__`` is pickled whole anyway."""
    name, file = module.__name__, getattr(module, "__file__", None)
    if file is None or name == "__main__" or name.partition(".")[0] == _OURS:
        return False
    return not any(Path(file).is_relative_to(folder) for folder in _installed())


def _installed() -> set[str]:
    paths = sysconfig.get_paths()
    named = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return named | {*site.getsitepackages(), site.getusersitepackages()}
