"""Imports that the pruning package must not make."""

from __future__ import annotations

import subprocess
import sys


def test_pruning_imports_neither_ray_nor_what_it_needs_only_later() -> None:
    code = (
        "import sys, fppmo_ray.pruning; "
        "print(sorted({'ray', 'torch_pruning', 'torchvision'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
