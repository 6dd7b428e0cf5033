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


def test_importing_training_changes_no_global_state():
    code = """
import os, random, signal, sys, warnings
import numpy, torch

def state():
    return {
        "environment": dict(os.environ),
        "warnings": (warnings.showwarning, list(warnings.filters)),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": (random.getstate(), str(numpy.random.get_state())),
        "torch random": torch.get_rng_state().tolist(),
    }

before = state()
import fppmo_ray.pruning, fppmo_ray.training
after = state()
print([name for name in before if after[name] != before[name]])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
