"""Lets a CUDA wheel of torchvision import beside a CPU build of torch.

The wheel's compiled operators do not load there, and the import then fails on the missing schema
of ``torchvision::nms``. Models and datasets need none of these operators, so the schemas alone are
registered, at the moment they are looked for, and only if nothing else has registered them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []  # a torch.library.Library takes its operators with it when it is collected


class _NmsSchemas(MetaPathFinder):
    """Registers the schemas just before ``torchvision._meta_registrations`` is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname != "torchvision._meta_registrations":
            return
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        _libraries.append(library)
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(name + _SIGNATURE)


def install() -> None:
    """Put the finder first, once per process."""
    if not any(type(finder).__name__ == "_NmsSchemas" for finder in sys.meta_path):
        sys.meta_path.insert(0, _NmsSchemas())
