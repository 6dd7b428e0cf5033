"""The survey of networks: what it keeps, and what it does not do again."""

from __future__ import annotations

import json
from pathlib import Path

import model_zoo  # jobs are run, not installed
import pytest


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's own
def test_networks_are_tried_once_and_refusals_are_verdicts(tmp_path: Path) -> None:
    output = tmp_path / "zoo.json"
    model_zoo.main(output, models=("squeezenet1_1",), macs_cut=0.5)
    [pruned] = json.loads(output.read_text())
    assert pruned["verdict"] == "pruned"
    assert 0.5 <= pruned["macs_cut"] <= 0.51
    output.write_text(json.dumps([{**pruned, "groups": 77}]))
    model_zoo.main(output, models=("squeezenet1_1", "mobilenet_v3_small"), macs_cut=0.999)
    refused, kept = json.loads(output.read_text())
    assert kept["groups"] == 77
    assert refused["verdict"].startswith("ValueError: macs_cut must be at most 0.")
