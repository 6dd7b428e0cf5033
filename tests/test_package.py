from __future__ import annotations

import subprocess
import sys

import fppmo_ray


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_public_name_can_be_had() -> None:
    for name in fppmo_ray.__all__:
        assert getattr(fppmo_ray, name).__name__ == name


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    assert {"torch", "ray"} & modules_after("import fppmo_ray") == set()


def test_reading_a_journal_needs_neither_torch_nor_ray() -> None:
    loaded = modules_after("import fppmo_ray.service.journal.run_directory")
    assert {"torch", "ray"} & loaded == set()


def test_telling_of_a_search_needs_neither_torch_nor_ray() -> None:
    assert {"torch", "ray"} & modules_after("import fppmo_ray.cli, fppmo_ray.report") == set()


def test_torchvision_is_not_imported_before_it_is_used() -> None:
    assert "torchvision" not in modules_after("import fppmo_ray.service.search")


def test_the_pool_of_workers_knows_nothing_of_pruning() -> None:
    code = "import sys; import fppmo_ray.service.pool.worker_pool; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "ray" in loaded
    rooms = ("torch", *(f"fppmo_ray.{room}" for room in ("distribution", "pruning", "training")))
    assert set(rooms) & set(loaded) == set()


def test_importing_every_public_name_changes_no_global_state() -> None:
    code = """
import logging, os, signal, warnings

def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    root = logging.getLogger()
    return dict(os.environ), handlers, warnings.showwarning, root.level, list(root.handlers)

before = state()
import fppmo_ray
for name in fppmo_ray.__all__:
    getattr(fppmo_ray, name)
import fppmo_ray.cli, fppmo_ray.job, fppmo_ray.report, fppmo_ray.service.tune
for one, other in zip(before, state(), strict=True):
    assert one == other, (one, other)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
