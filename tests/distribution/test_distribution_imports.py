"""The probability model is plain numpy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fppmo_ray.distribution


def test_the_distribution_imports_neither_torch_nor_ray():
    code = (
        "import sys, fppmo_ray.distribution; "
        "print(sorted({'torch', 'ray', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", fppmo_ray.distribution.__all__)
def test_every_public_name_exists(name):
    assert hasattr(fppmo_ray.distribution, name)
