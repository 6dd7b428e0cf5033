"""The probability model as a search algorithm of Ray Tune."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from fppmo_ray.distribution import (
    Feedback,
    Finalist,
    FloatArray,
    OptimizerSettings,
    Proposal,
    PruningSpace,
)
from fppmo_ray.durable_files import write_whole
from fppmo_ray.pruning import importance as measure_importance
from fppmo_ray.service.probability_model import ProbabilityModel
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.tune.saved_states import FORMAT, read_searcher_state, unfinished_trials
from fppmo_ray.service.tune.trials import config_of, feedback_from

logger = logging.getLogger(__name__)

_MODES = {"val_loss": "min", "val_accuracy": "max"}


class FPPMOSearch(Searcher):
    """Suggests masks that meet the MACs budget, and learns from how their trials end.

    A suggestion is a flat config: ``id``, ``generation``, ``macs``, ``mask`` (text, for
    ``unpack_mask``) and ``score_seed``. Trials report ``val_loss``, ``val_accuracy`` and, where
    they are scored in several depths, ``steps``; what counts is their last report. Trials that a
    scheduler stops early rank behind those that got further, whatever their scores.

    The order in which trials end does not matter, nor how many run at once; with or without a
    ``ConcurrencyLimiter``. Once ``suggest`` has nothing until feedback comes, it answers None.
    A search whose generation failed as a whole ends by the next ``suggest``; restored, it tries
    that generation again, since what stopped it may be mended.

    Args:
        space: What can be pruned, and what it costs.
        importance: ``(num_filters,)``, finite and > 0: where the search starts.
        settings: How to search; ``rank_by`` is the metric.
        scored_by: What else scores depend on, as values of JSON: a restored search must have
            the same. ``for_problem`` says all of it.

    Raises:
        ValueError: the cut cannot be reached, the importance does not fit the space, or the
            settings have several budgets.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        *,
        scored_by: Mapping[str, Any] | None = None,
    ) -> None:
        if len(settings.macs_cuts) > 1:
            raise ValueError(
                f"macs_cut must be a single share under Tune, got {settings.macs_cuts}: its "
                "schedulers would compare trials of different budgets; use fppmo_ray.search"
            )
        if settings.latency_cut is not None and space.latency is None:
            raise ValueError(
                f"latency_cut must be left out under Tune, got {settings.latency_cut}: nothing is "
                "measured there before the first trial; use fppmo_ray.search"
            )
        super().__init__(metric=settings.rank_by, mode=_MODES[settings.rank_by])
        self._space = space
        self._importance = importance
        self._settings = settings
        self._scored_by = json.loads(json.dumps(scored_by or {}))
        self._proposals: dict[str, int] = {}
        """Of every trial that was ever suggested."""
        self._reports: dict[str, Feedback | None] = {}
        """The last report of every trial that has not ended."""
        self._feedback: list[Feedback] = []
        self._max_live = settings.num_proposals
        self._start([])

    @classmethod
    def for_problem(cls, problem: Problem, rungs: tuple[int, ...]) -> FPPMOSearch:
        """A searcher over a problem's masks, from its weights' importance, measured here.

        Args:
            problem: The problem of the trainable, with its settings.
            rungs: Fine-tuning steps after which a trial reports; see ``prune_trainable``.

        Raises:
            ValueError: the settings want what needs workers: a baseline to be trained, or an
                importance that is measured on images.
        """
        settings = problem.settings
        if settings.baseline_epochs:
            raise ValueError(
                f"baseline_epochs must be 0 under Tune, got {settings.baseline_epochs}; "
                "train the network first, or use fppmo_ray.search"
            )
        if settings.stages:
            raise ValueError(
                f"stages must be left out under Tune, got {settings.stages}; use fppmo_ray.search"
            )
        if settings.importance == "taylor":
            raise ValueError(
                "importance taylor is measured on images: measure it by "
                "fppmo_ray.pruning.importance where you want that done, and give it to FPPMOSearch"
            )
        importance = measure_importance(problem.network, problem.tracing, settings.importance)
        return cls(
            problem.tracing.space,
            importance,
            settings.optimizer_settings(),
            scored_by={**problem.identity(), "rungs": rungs},
        )

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accept Tune's metric and mode where they are the settings' own.

        Returns:
            False: the space of masks is known already, so ``param_space`` holds only constants.

        Raises:
            ValueError: metric or mode contradict the settings.
        """
        if metric not in (None, self.metric) or mode not in (None, self.mode):
            raise ValueError(
                f"this search ranks by rank_by={self.metric}, which is to be {self.mode}imal; got "
                f"metric={metric}, mode={mode}; leave them out of TuneConfig or change rank_by"
            )
        return False

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Limit the trials that live at once, for a ``ConcurrencyLimiter``.

        Returns:
            True: the limiter need not count trials, among them those that a restored run lacks.
        """
        self._max_live = max_concurrent
        return True

    def suggest(  # type: ignore[override]  # Ray's annotation forgets FINISHED
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """The config of a trial, None while feedback is waited for, or ``FINISHED``.

        Raises:
            RuntimeError: every proposal of a generation failed.
        """
        if self._failure is not None:
            raise self._failure
        if self.num_ended == self._settings.num_proposals:
            return self.FINISHED  # not before: Tune would not ask again, nor hear of a failure
        if not self._waiting or len(self._reports) >= self._max_live:
            return None
        proposal = self._waiting.popleft()
        self._proposals[trial_id] = proposal.proposal_id
        self._reports[trial_id] = None
        return config_of(proposal)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep a report, in case the trial is stopped without another word."""
        if self._is_live(trial_id):
            self._reports[trial_id] = feedback_from(self._proposals[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn how a trial ended; late, repeated and unknown reports change nothing."""
        if not self._is_live(trial_id):
            return
        proposal_id = self._proposals[trial_id]
        feedback = self._reports.pop(trial_id)
        if error:
            sentence = f"trial {trial_id} ended with an error, which Tune has logged"
            feedback = Feedback(proposal_id=proposal_id, error=sentence)
        elif result is not None:
            feedback = feedback_from(proposal_id, result)
        elif feedback is None:
            sentence = f"trial {trial_id} ended before it reported a score"
            feedback = Feedback(proposal_id=proposal_id, error=sentence)
        if feedback.failed:
            logger.warning("proposal %d failed: %s", proposal_id, feedback.error)
        self._feedback.append(feedback)
        self._step([feedback])

    @property
    def num_ended(self) -> int:
        """Proposals whose trials have ended, in one way or another."""
        return len(self._feedback)

    def finalists(self) -> list[Finalist]:
        """Masks worth rescoring, of which the best sample is only one: see ``MaskOptimizer``."""
        return self._model.finalists()

    def save(self, checkpoint_path: str) -> None:
        """Write all that was suggested and reported, as JSON, in one step."""
        state = {
            "format": FORMAT,
            **self._identity(),
            "trials": self._proposals,
            "live": {
                trial_id: report and asdict(report) for trial_id, report in self._reports.items()
            },
            "feedback": [asdict(feedback) for feedback in self._feedback],
        }
        write_whole(Path(checkpoint_path), json.dumps(state).encode())

    def restore(self, checkpoint_path: str) -> None:
        """Go on from what ``save`` wrote; trials that were live then may still end.

        Raises:
            ValueError: the file is damaged, or of a search with other settings or weights.
        """
        state = read_searcher_state(Path(checkpoint_path))
        differing = [name for name, value in self._identity().items() if state.get(name) != value]
        if differing:
            raise ValueError(
                f"{checkpoint_path} holds another search: it differs in {' and '.join(differing)}; "
                "restore with the same network, data, settings and rungs, placed alike"
            )
        self._proposals = dict(state["trials"])
        self._reports = {
            trial_id: Feedback(**report) if report else None
            for trial_id, report in state["live"].items()
        }
        self._feedback = [Feedback(**entries) for entries in state["feedback"]]
        self._forget_failed_generation()
        self._start(self._feedback)

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Restore Tune's last save; suggest trials again that Tune's own state does not go on with.

        Tune copies the two files one after the other. A driver that is killed in between leaves
        trials that only the searcher waits for.
        """
        super().restore_from_dir(checkpoint_dir)
        unfinished = unfinished_trials(Path(checkpoint_dir))
        if unfinished is None or unfinished >= self._reports.keys():
            return
        for trial_id in self._reports.keys() - unfinished:
            del self._reports[trial_id], self._proposals[trial_id]
        self._start(self._feedback)

    def _forget_failed_generation(self) -> None:
        """Forget the trials of a generation in which nothing was scored."""
        size, end = self._settings.population_size, self._settings.num_proposals
        failed = {feedback.proposal_id for feedback in self._feedback if feedback.failed}
        begins = {number // size * size for number in failed}
        whole = (range(begin, min(begin + size, end)) for begin in sorted(begins))
        again = [number for numbers in whole if failed.issuperset(numbers) for number in numbers]
        if again:
            logger.warning("all proposals from %d to %d failed; trying again", again[0], again[-1])
        self._proposals = {t: i for t, i in self._proposals.items() if i not in again}
        self._feedback = [item for item in self._feedback if item.proposal_id not in again]

    def _start(self, feedback: list[Feedback]) -> None:
        """Replay feedback to a fresh model; what it proposes and no trial has, waits."""
        self._model = ProbabilityModel(self._space, self._importance, self._settings)
        self._waiting: deque[Proposal] = deque()
        self._failure: RuntimeError | None = None
        self._step(feedback)

    def _step(self, feedback: list[Feedback]) -> None:
        try:
            proposals = self._model.step(feedback).proposals
        except RuntimeError as error:  # what is raised while a trial ends would not end the run
            self._failure = error
            return
        suggested = set(self._proposals.values())
        self._waiting += (item for item in proposals if item.proposal_id not in suggested)

    def _is_live(self, trial_id: str) -> bool:
        if trial_id in self._reports:
            return True
        if trial_id in self._proposals:
            logger.debug("a report of trial %s, which had ended, is ignored", trial_id)
        else:
            logger.warning("a report of trial %s, which was not suggested, is ignored", trial_id)
        return False

    def _identity(self) -> dict[str, Any]:
        return {
            "settings": _plain(self._settings),
            "space": self._space.fingerprint(),
            "importance": hashlib.sha256(self._importance.tobytes()).hexdigest(),
            **self._scored_by,  # whose settings, where it has any, hold the ones above
        }


def _plain(settings: OptimizerSettings) -> dict[str, Any]:
    """Settings as JSON has them: without tuples, and without the cuts that are not asked for."""
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain
