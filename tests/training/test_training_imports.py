from __future__ import annotations

import subprocess
import sys

HEAVY = ["ray", "torchvision", "torch_pruning", "sklearn", "pyarrow", "PIL"]
ROOMS = ["fppmo_ray.distribution", "fppmo_ray.pruning", "fppmo_ray.service"]


def test_training_knows_neither_ray_nor_the_rooms_above_and_loads_data_readers_late():
    code = (
        "import sys, fppmo_ray.training; "
        f"print([name for name in {HEAVY + ROOMS} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
