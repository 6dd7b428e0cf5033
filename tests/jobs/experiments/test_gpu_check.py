"""The check of a GPU runs dry on a pretended one, and goes on where an earlier run left off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch

from fppmo_ray.testing.pretended_gpu import PretendedGpu


def test_all_checks_run_dry_and_find_what_a_sound_gpu_would_show(
    gpu: PretendedGpu, tmp_path: Path
) -> None:
    output = tmp_path / "found.json"
    gpu_check.main(output, dry=True)
    found: dict[str, Any] = json.loads(output.read_bytes())
    assert set(found) == {"environment", *gpu_check.NAMES}
    assert not [name for name in found if "failed" in found[name]]
    assert found["environment"]["device"] == "pretended GPU"
    [steps] = [value for name, value in found["graphs"].items() if name != "seconds"]
    assert steps["replayed_loss"] == steps["launched_loss"]
    for way in ("launched", "graphs"):
        assert found["memory"][way]["first"] == found["memory"][way]["last"]
        assert len({*found["repeatability"][way]}) == 1
    assert found["out_of_memory"]["error"].startswith("CUDA out of memory")
    assert found["out_of_memory"]["leaked_bytes"] == 0
    assert found["group_of_one"]["sum"] == 1000
    assert found["streaming"]["largest_error"] == 0
    assert {*found["training_speed"]} - {"seconds"} == {
        f"resnet20 {network}, {way}"
        for network in ("dense", "pruned")
        for way in ("launched", "replayed")
    }


def test_what_was_found_is_kept_and_what_failed_is_tried_again(
    gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "found.json"
    output.write_text(json.dumps({"waits": {"known": 1}, "graphs": {"failed": "RuntimeError: x"}}))
    monkeypatch.setattr(gpu_check.Checks, "graphs", lambda checks: {"again": 2})
    gpu_check.main(output, ("graphs", "waits"), dry=True)
    found = json.loads(output.read_bytes())
    assert found["waits"] == {"known": 1}
    assert found["graphs"]["again"] == 2


def test_a_check_that_fails_is_recorded_and_named_in_the_end(
    gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(checks: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check.Checks, "graphs", fail)
    monkeypatch.setattr(gpu_check.Checks, "waits", lambda checks: {"fine": 1})
    output = tmp_path / "found.json"
    with pytest.raises(RuntimeError, match="checks failed: graphs"):
        gpu_check.main(output, ("graphs", "waits"), dry=True)
    found = json.loads(output.read_bytes())
    assert found["graphs"]["failed"] == "RuntimeError: no such kernel"
    assert found["waits"]["fine"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no GPU; give --dry to pretend one"):
        gpu_check.main(tmp_path / "found.json")
    with pytest.raises(ValueError, match="there are no checks speed; choose from graphs, memory"):
        gpu_check.main(tmp_path / "found.json", ("speed",))
