"""The searcher's state, saved and restored between any two reports."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from scripted_searcher import (
    IMPORTANCE,
    NAN,
    SPACE,
    ask_all,
    run_to_end,
    score,
    searcher,
    searcher_with_failed_generation,
    settings,
)

from fppmo_ray.service.tune import FPPMOSearch


class TestSaveAndRestore:
    def half_done(self) -> tuple[FPPMOSearch, dict[str, dict[str, Any]]]:
        """Two generations asked, three trials ended, one of them failed; and the live ones."""
        search = searcher()
        live = ask_all(search)
        for trial_id in ("t5", "t0", "t2"):
            config = live.pop(trial_id)
            search.on_trial_complete(trial_id, NAN if trial_id == "t2" else score(config))
        return search, live

    def test_a_restored_search_goes_on_with_live_trials_as_if_nothing_had_been(
        self, tmp_path: Path
    ) -> None:
        search, live = self.half_done()
        search.on_trial_result("t7", score(live["t7"]))
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        for same in (search, restored):
            same.on_trial_complete("t7")  # by what it reported before
            same.on_trial_complete("t0", NAN)  # again
        live.pop("t7")
        assert run_to_end(restored, live) == run_to_end(search, live)

    def test_a_state_file_holds_every_field_of_feedback_and_reports(self, tmp_path: Path) -> None:
        search, live = self.half_done()
        deep = {"val_loss": 0.25, "val_accuracy": 0.75, "steps": 10}
        search.on_trial_complete("t1", deep)
        search.on_trial_result("t7", {**deep, "steps": 5})
        search.save(str(tmp_path / "state"))
        state = json.loads((tmp_path / "state").read_bytes())
        by_id = {entry["proposal_id"]: entry for entry in state["feedback"]}
        assert by_id[1] == {
            "proposal_id": 1,
            "val_loss": 0.25,
            "val_accuracy": 0.75,
            "error": None,
            "steps": 10,
            "seconds": None,
            "worker": "",
            "at": None,
        }
        assert by_id[2]["error"].startswith("its trial must report val_loss as a finite number")
        assert state["live"]["t7"] == {**by_id[1], "proposal_id": 7, "steps": 5}
        assert state["live"].keys() == live.keys() - {"t1"}
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        restored.save(str(tmp_path / "again"))
        assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()

    def test_a_search_that_waits_still_waits_after_restoring(self, tmp_path: Path) -> None:
        search, _ = self.half_done()
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        assert restored.suggest("more") is None

    def test_proposals_that_no_trial_has_at_saving_are_suggested_after_restoring(
        self, tmp_path: Path
    ) -> None:
        search = searcher()
        first = [search.suggest(f"t{i}") for i in range(3)]
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        rest = ask_all(restored, "u").values()
        ids = [config["id"] for config in [*first, *rest] if isinstance(config, dict)]
        assert ids == list(range(8))

    def test_a_finished_search_stays_finished(self, tmp_path: Path) -> None:
        search = searcher()
        run_to_end(search)
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        assert restored.suggest("more") == Searcher.FINISHED
        assert [f.name for f in restored.finalists()] == [f.name for f in search.finalists()]

    def test_tunes_own_folder_is_used_through_a_limiter(self, tmp_path: Path) -> None:
        search, live = self.half_done()
        search.save_to_dir(str(tmp_path), "2026")
        assert [path.name for path in tmp_path.iterdir()] == ["searcher-state-2026.json"]
        restored = searcher()
        restored.restore_from_dir(str(tmp_path))
        assert run_to_end(restored, live) == run_to_end(search, live)

    @pytest.mark.parametrize("status", ["absent", "TERMINATED", "ERROR", "RUNNING"])
    def test_a_live_trial_that_tunes_state_does_not_go_on_with_is_suggested_again(
        self, tmp_path: Path, status: str
    ) -> None:
        search, live = self.half_done()
        search.save_to_dir(str(tmp_path), "2026")
        trials = [{"trial_id": name, "status": "RUNNING"} for name in live if name != "t3"]
        trials += [{"trial_id": "t3", "status": status}] if status != "absent" else []
        tunes = {"trial_data": [[json.dumps(trial), "{}"] for trial in trials]}
        (tmp_path / "experiment_state-2026.json").write_text(json.dumps(tunes))
        restored = searcher()
        restored.restore_from_dir(str(tmp_path))
        again = ask_all(restored, "again ")
        assert list(again.values()) == ([] if status == "RUNNING" else [live["t3"]])
        others = {name: config for name, config in live.items() if name != "t3"}
        known = live if status == "RUNNING" else others | again
        assert run_to_end(restored, known) == run_to_end(search, live)

    def test_another_searchs_state_is_refused(self, tmp_path: Path) -> None:
        searcher().save(str(tmp_path / "state"))
        with pytest.raises(ValueError, match="holds another search: it differs in settings"):
            searcher(seed=4).restore(str(tmp_path / "state"))
        other = FPPMOSearch(SPACE, IMPORTANCE + 1, settings())
        with pytest.raises(ValueError, match="it differs in importance"):
            other.restore(str(tmp_path / "state"))

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"[1]", b'{"format": 1', b'{"format": 1}', b"\x80\x04K\x01."]
    )
    def test_a_damaged_state_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(ValueError, match="state is no state of a searcher"):
            searcher().restore(str(tmp_path / "state"))

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_a_generation_that_failed_as_a_whole_is_tried_again(
        self, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        searcher_with_failed_generation(number).save(str(tmp_path / "state"))
        restored = searcher(lag=0)
        with caplog.at_level(logging.WARNING):
            restored.restore(str(tmp_path / "state"))
        last = min(4 * number + 3, 13)
        assert f"all proposals from {4 * number} to {last} failed; trying again" in caplog.text
        masks = run_to_end(searcher(lag=0))
        assert run_to_end(restored) == {i: mask for i, mask in masks.items() if i >= 4 * number}

    def test_failures_beside_a_score_are_not_tried_again(self, tmp_path: Path) -> None:
        search, _ = self.half_done()
        search.save(str(tmp_path / "state"))
        restored = searcher()
        restored.restore(str(tmp_path / "state"))
        assert restored.num_ended == 3

    def test_a_search_whose_scores_meant_something_else_is_refused(self, tmp_path: Path) -> None:
        def scored_by(**others: Any) -> FPPMOSearch:
            return FPPMOSearch(SPACE, IMPORTANCE, settings(), scored_by=others)

        scored_by(rungs=(0, 5), data="digits").save(str(tmp_path / "state"))
        scored_by(rungs=(0, 5), data="digits").restore(str(tmp_path / "state"))
        with pytest.raises(ValueError, match="it differs in rungs;"):
            scored_by(rungs=(0, 6), data="digits").restore(str(tmp_path / "state"))
        with pytest.raises(ValueError, match="it differs in rungs and data;"):
            scored_by(rungs=(5,), data="cifar10").restore(str(tmp_path / "state"))
