from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_example_of_the_readme_prunes_its_network(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    assert len(example.strip().splitlines()) <= 16
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    smaller, network = names["smaller"], names["network"]
    assert isinstance(smaller, nn.Sequential)
    assert isinstance(network, nn.Sequential)
    widths = [layer.out_channels for layer in smaller if isinstance(layer, nn.Conv2d)]
    assert widths == list(names["result"].best.widths.values())  # type: ignore[attr-defined]
    assert names["result"].best.macs_cut >= 0.5  # type: ignore[attr-defined]
    assert names["result"].best.test_accuracy > 0.7  # type: ignore[attr-defined]
