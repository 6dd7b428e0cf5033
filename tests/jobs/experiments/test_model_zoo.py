"""The survey of networks: what it keeps, and what it does not do again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo  # jobs are run, not installed
import pytest
from archive import flattened, read_rows, unflattened, write_rows


def rows(path: Path) -> list[dict[str, Any]]:
    return [unflattened(row) for row in read_rows(path)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's own
def test_networks_are_tried_once_and_refusals_are_verdicts(tmp_path: Path) -> None:
    output = tmp_path / "zoo.csv"
    model_zoo.main(output, models=("squeezenet1_1",), macs_cut=0.5)
    [pruned] = rows(output)
    assert pruned["verdict"] == "pruned"
    assert 0.5 <= pruned["macs_cut"] <= 0.51
    write_rows(output, [flattened({**pruned, "groups": 77})])
    model_zoo.main(output, models=("squeezenet1_1", "mobilenet_v3_small"), macs_cut=0.999)
    refused, kept = rows(output)
    assert kept["groups"] == 77
    assert refused["verdict"].startswith("ValueError: macs_cut must be at most 0.")
