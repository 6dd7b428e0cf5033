"""The searcher of a network and a task, with the space and settings of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fppmo_ray import Recipe, Resources, SearchSettings, load_dataset
from fppmo_ray.service.tune import FPPMOSearch, Problem, build_problem, image_classification
from fppmo_ray.training import build_network


class TestForAProblem:
    def problem(self, resources: Resources | None = None, **changes: Any) -> Problem:
        small = {"proposals": 4, "population": 2, "score_steps": 50, "fine_tune": Recipe(epochs=0)}
        search_settings = SearchSettings(macs_cut=0.5).changed(**small | changes)
        network = build_network("digits_cnn", 10)
        task = image_classification(load_dataset("digits"))
        return build_problem(network, task, search_settings, resources=resources)

    def test_the_space_and_the_importance_are_the_networks(self) -> None:
        problem = self.problem()
        config = FPPMOSearch.for_problem(problem, (50,)).suggest("t")
        assert isinstance(config, dict)
        assert config["macs"] <= 0.5 * problem.tracing.space.dense_macs

    def test_masks_meet_a_cut_of_parameters_too(self) -> None:
        problem = self.problem(macs_cut=0.0, params_cut=0.7)
        search = FPPMOSearch.for_problem(problem, (50,))
        space = problem.tracing.space
        for finalist in search.finalists():
            assert space.parameters(finalist.keep) <= 0.3 * space.dense_parameters

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"importance": "taylor"}, "taylor is measured on images: measure it by"),
            ({"start": "allocation"}, "start must be uniform under Tune, got allocation"),
            ({"importance": "obs"}, r"obs is measured on images: .*pruning\.calibration"),
            (
                {"stages": (0.3,), "proposals": 16},
                r"stages must be left out under Tune, got \(0",
            ),
            ({"latency_cut": 0.3}, "latency_cut must be left out under Tune, got 0.3: nothing is"),
            ({"baseline_epochs": 3}, "baseline_epochs must be 0 under Tune, got 3; train the"),
            (
                {"macs_cut": (0.4, 0.5), "population": 4},
                r"macs_cut must be a single share under Tune, got \(0\.4, 0\.5\): its schedulers",
            ),
        ],
    )
    def test_what_needs_workers_is_refused(self, changes: dict[str, Any], sentence: str) -> None:
        problem = self.problem(**changes)
        with pytest.raises(ValueError, match=sentence):
            FPPMOSearch.for_problem(problem, (50,))

    def test_another_fidelity_recipe_device_or_rung_is_another_search(self, tmp_path: Path) -> None:
        problem = self.problem()
        search = FPPMOSearch.for_problem(problem, (25, 50))
        search.save(str(tmp_path / "state"))
        for changed, rungs, named in (
            (self.problem(score_images=9), (25, 50), "settings"),
            (self.problem(fine_tune=Recipe(epochs=0, batch_size=64)), (25, 50), "settings"),
            # A device also decides on the multiple of widths.
            (
                self.problem(Resources(gpus=1.0)),
                (25, 50),
                "settings and space and device_type",
            ),
            (self.problem(Resources(cpus=2)), (25, 50), "threads"),
            (self.problem(), (5, 50), "rungs"),
        ):
            with pytest.raises(ValueError, match=f"it differs in {named};"):
                FPPMOSearch.for_problem(changed, rungs).restore(str(tmp_path / "state"))
        FPPMOSearch.for_problem(self.problem(), (25, 50)).restore(str(tmp_path / "state"))
