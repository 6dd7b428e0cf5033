from __future__ import annotations

import pytest
import tyro

from fppmo_ray.flags import comma_lists
from fppmo_ray.service.settings import SearchSettings


def parsed(*flags: str) -> SearchSettings:
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(SearchSettings, args=flags, config=config, registry=comma_lists())


def test_a_number_stays_a_number_and_several_are_a_tuple() -> None:
    assert parsed("--macs-cut", "0.57").macs_cut == 0.57
    assert parsed("--macs-cut", "0.4,0.57,0.7").macs_cut == (0.4, 0.57, 0.7)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0.4,", "could not convert string to float: ''"),
        ("0.57,0.4", "must ascend, each given once"),
        ("0.57,1.4", "macs_cut must be in (0, 1), got 1.4"),
    ],
)
def test_what_makes_no_list_of_cuts_ends_with_a_sentence(
    text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("--macs-cut", text)
    printed = capsys.readouterr().err.replace("│", " ")
    assert sentence in " ".join(printed.split())


def test_a_latency_cut_needs_no_macs_cut_beside_it() -> None:
    settings = parsed("--latency-cut", "0.3", "--latency-batch", "8")
    assert (settings.macs_cut, settings.further_cuts) == (0.0, {"latency": 0.3})
    assert settings.latency_batch == 8
    beside = parsed("--macs-cut", "0.4,0.57", "--params-cut", "0.5", "--memory-cut", "0.2")
    assert beside.macs_cuts == (0.4, 0.57)
    assert beside.further_cuts == {"params": 0.5, "memory": 0.2}


def test_stages_are_given_with_commas_too() -> None:
    assert parsed("--macs-cut", "0.57").stages == ()
    stages = parsed("--macs-cut", "0.57", "--stages", "0.25,0.45,0.57").stage_settings()
    assert [stage.macs_cut for stage in stages] == [0.25, 0.45, 0.57]
    assert len(parsed("--macs-cut", "0.57", "--stages", "0.25").stage_settings()) == 2
