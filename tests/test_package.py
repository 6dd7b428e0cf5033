from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

import fppmo_ray
from fppmo_ray import versions
from fppmo_ray.cli import main


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


def test_masks_are_asked_for_and_scores_told_by_the_public_names_without_ray() -> None:
    code = """
import sys
import torch
from torch import nn
from fppmo_ray import Feedback, MaskOptimizer, OptimizerSettings, Proposal, extract, trace

torch.manual_seed(0)
layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)
network, images = nn.Sequential(*layers).eval(), torch.randn(4, 1, 8, 8)
tracing = trace(network, images)
settings = OptimizerSettings(macs_cut=0.5, num_proposals=12, population_size=4)
optimizer = MaskOptimizer(tracing.space, torch.ones(16).numpy(), settings)
scores = {}
while not optimizer.finished:
    for proposal in optimizer.ask():
        assert isinstance(proposal, Proposal)
        error = (extract(network, tracing, proposal.keep)(images) - network(images)).square().mean()
        scores[proposal.proposal_id] = float(error.detach())
        told = Feedback(proposal_id=proposal.proposal_id, val_loss=scores[proposal.proposal_id])
        assert optimizer.tell(told)
assert sorted(scores) == list(range(12))
samples = [item.name for item in optimizer.finalists() if item.name.startswith("sample")]
assert samples[0] == f"sample {min(scores, key=scores.get)}", (samples, scores)
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_copy_of_the_source_needs_no_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name == "fppmo-ray":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(versions, "version", version)
    found = versions.package_versions()
    assert (found["fppmo-ray"], found["torch"]) == ("not installed", "1.2")
    monkeypatch.setattr(sys, "argv", ["fppmo-ray", "--version"])
    main()
    assert capsys.readouterr().out == "fppmo-ray not installed\n"
