"""Classes and functions from modules that only the driver can import, on the workers."""

from __future__ import annotations

import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from torch import nn

_ON_EVERY_WORKER = frozenset({__name__.partition(".")[0], "numpy", "ray", "torch", "torchvision"})
"""Top-level packages without which no worker starts, wherever Python finds them."""


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
    if file is None or name == "__main__" or name.partition(".")[0] in _ON_EVERY_WORKER:
        return False
    return not _is_installed(file)


def _is_installed(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in _installed())


def _installed() -> set[str]:
    """Folders of the standard library and of packages that pip or a module system installed.

    An overlay on PYTHONPATH, or a folder that a .pth file names, shows its packages' metadata.
    """
    paths = sysconfig.get_paths()
    named = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    overlays = {folder for folder in sys.path if folder and any(Path(folder).glob("*.dist-info"))}
    return named | overlays | {*site.getsitepackages(), site.getusersitepackages()}


def line_of_user(error: BaseException) -> str:
    """Return the innermost line of code that belongs to no installed package: ``file:line``.

    Args:
        error: What was raised; without a line of the user's, its innermost line is returned.
    """
    lines = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[2])
    users = [
        line
        for line in lines
        if not _is_installed(line.filename) and not Path(line.filename).is_relative_to(ours)
    ]
    last = [*lines, *users][-1]
    return f"{last.filename}:{last.lineno} in {last.name}"
