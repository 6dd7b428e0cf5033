"""What compares masks at equal MACs takes one budget at a time."""

from __future__ import annotations

from pathlib import Path

import compare
import fidelity
import pytest

from fppmo_ray import Resources, SearchSettings

SETTINGS = SearchSettings(macs_cut=(0.4, 0.57))
SENTENCE = r"macs_cut must be a single one here, got 0\.4,0\.57; give one of them"


def test_a_comparison_refuses_several_budgets_before_anything_is_read(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(ValueError, match=SENTENCE):
        compare.main(absent, absent, absent, absent, SETTINGS, Resources())
    assert not absent.exists()


def test_a_comparison_refuses_other_cuts_before_anything_is_read(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    settings = SearchSettings(macs_cut=0.57, latency_cut=0.3)
    sentence = "masks are compared at equal MACs here, got latency_cut; give macs_cut alone"
    with pytest.raises(ValueError, match=sentence):
        compare.main(absent, absent, absent, absent, settings, Resources())
    assert not absent.exists()


def test_a_study_of_fidelity_refuses_several_budgets_before_anything_is_read(
    tmp_path: Path,
) -> None:
    absent = tmp_path / "absent"
    trained = fidelity.Trained(data=absent, weights=absent, search_val_rows=absent)
    with pytest.raises(ValueError, match=SENTENCE):
        fidelity.main(
            trained,
            SETTINGS,
            Resources(),
            fidelity.Plan(),
            searches=("nowhere",),
            cells=absent,
        )
    assert not absent.exists()
