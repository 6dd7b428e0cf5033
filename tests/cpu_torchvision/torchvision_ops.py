"""Lets a CUDA wheel of torchvision import beside a CPU build of torch.

The wheel's compiled operators do not load there, and the import then fails on the missing schema
of ``torchvision::nms``. The schemas are registered at the moment they are looked for, and only if
nothing else has registered them. Detectors call ``nms``, so it gets a plain implementation;
nothing here calls ``qnms``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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
                if name == "nms":
                    library.impl(name, nms, "CPU")
                    # torchvision.ops.boxes, which is imported later, asks it before every call.
                    sys.modules["torchvision.extension"].__dict__["_assert_has_ops"] = lambda: None


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes that no better box overlaps, by descending score.

    Args:
        dets: ``(n, 4)``: left, top, right and bottom of each box.
        scores: ``(n,)``.
        iou_threshold: Intersection over union above which the box of the lower score is dropped.
    """
    import torch

    order = scores.argsort(descending=True, stable=True)
    corners = dets[order]
    areas = (corners[:, 2:] - corners[:, :2]).prod(dim=1)
    alive, kept = torch.ones(len(order), dtype=torch.bool), []
    for place in range(len(order)):
        if not alive[place]:
            continue
        kept.append(place)
        begin = torch.maximum(corners[:, :2], corners[place, :2])
        shared = (torch.minimum(corners[:, 2:], corners[place, 2:]) - begin).clamp(min=0).prod(1)
        alive &= shared <= iou_threshold * (areas + areas[place] - shared)
    return order[torch.tensor(kept, dtype=torch.long)]


def install() -> None:
    """Put the finder first, once per process."""
    if not any(type(finder).__name__ == "_NmsSchemas" for finder in sys.meta_path):
        sys.meta_path.insert(0, _NmsSchemas())
