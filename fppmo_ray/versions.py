"""Versions of Python and of packages, also where a package runs from a copy of its source."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str:
    """Return a package's version; ``not installed`` if it is imported from a copy of its source.

    Args:
        name: Name of the package, as it is installed: ``fppmo-ray``.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's numbers depend on."""
    packages = ("fppmo-ray", "ray", "torch", "numpy")
    return {"python": platform.python_version()} | {
        name: package_version(name) for name in packages
    }
