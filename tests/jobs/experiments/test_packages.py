"""The survey of other packages' networks: what a row holds, and what is not done again."""

from __future__ import annotations

from pathlib import Path

import packages  # jobs are run, not installed
import pytest
from torch import nn

pytest.importorskip("torch_pruning", reason="pip install 'fppmo-ray[rivals]'")


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        )


@pytest.fixture
def _one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {"small": Small, "none": lambda: nn.Sequential(nn.Flatten(), nn.Linear(49152, 4))}
    monkeypatch.setitem(packages._MAKERS, "torchvision", lambda name, size: makers[name]())
    monkeypatch.setattr(packages, "listed", lambda: ["torchvision:small", "torchvision:none"])


@pytest.mark.usefixtures("_one_package")
def test_a_network_loses_half_and_the_rival_is_asked_too(tmp_path: Path) -> None:
    row = packages.attempt("torchvision:small")
    assert (row.package, row.network, row.half, row.refused) == ("torchvision", "small", True, "")
    assert 0.8 < row.can_go < 1
    verdict, seconds = packages.rival_attempt("torchvision:small")
    assert verdict.endswith("% of the MACs go")
    assert seconds > 0


@pytest.mark.usefixtures("_one_package")
def test_a_refusal_is_a_row_and_rows_are_kept(tmp_path: Path, monkeypatch) -> None:
    tried = []

    def apart(name: str, threads: int, patience: float) -> packages.Row:
        tried.append(name)
        return packages.attempt(name)

    monkeypatch.setattr(packages, "_apart", apart)
    for _ in range(2):
        packages.main(tmp_path / "rows.csv")
    assert tried == ["torchvision:small", "torchvision:none"]
    rows = packages._read(tmp_path / "rows.csv")
    assert rows["torchvision:small"].half
    assert rows["torchvision:none"].refused.startswith("ValueError: expected a network with conv")
