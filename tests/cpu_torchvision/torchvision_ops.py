"""Lets a CUDA wheel of torchvision import beside a CPU build of torch.

The wheel's compiled operators do not load there, and the import then fails on the missing schema
of ``torchvision::nms``. Models and datasets need none of these operators, so the schema alone is
registered, at the moment it is looked for, and only if nothing else has registered it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []  # a torch.library.Library takes its operators with it when it is collected


class _NmsSchema(MetaPathFinder):
    """Registers the schema just before ``torchvision._meta_registrations`` is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname != "torchvision._meta_registrations":
            return
        import torch

        if not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(_NMS)
            _libraries.append(library)


def install() -> None:
    """Put the finder first, once per process."""
    if not any(type(finder).__name__ == "_NmsSchema" for finder in sys.meta_path):
        sys.meta_path.insert(0, _NmsSchema())
