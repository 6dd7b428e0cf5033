"""What Tune's experiment directory holds: the searcher's state, and Tune's own of its trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
_PARTS = {"trials", "live", "feedback"}
_ENDED = "TERMINATED", "ERROR"


def read_searcher_state(path: Path) -> Mapping[str, Any]:
    """What a searcher saved.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        state = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no state of a searcher: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= _PARTS:
        raise ValueError(f"{path} is no state of a searcher in format {FORMAT}")
    return state


def unfinished_trials(experiment: Path) -> set[str] | None:
    """Ids of the trials that Tune goes on with, by the last state it saved; None without one."""
    paths = sorted(experiment.glob("experiment_state-*.json"))
    if not paths:
        return None
    entries = json.loads(paths[-1].read_bytes())["trial_data"]
    trials = [json.loads(trial) for trial, _ in entries]
    return {trial["trial_id"] for trial in trials if trial["status"] not in _ENDED}
