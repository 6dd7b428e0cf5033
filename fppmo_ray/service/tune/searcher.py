"""The probability model as a search algorithm of Ray Tune."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

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
from fppmo_ray.service.problem import Problem
from fppmo_ray.service.search_loop import ProbabilityModel
from fppmo_ray.service.tune.trials import config_of, feedback_from

logger = logging.getLogger(__name__)

_MODES = {"val_loss": "min", "val_accuracy": "max"}
_STATE_FORMAT = 1
_STATE_PARTS = {"trials", "live", "feedback"}
_ENDED = "TERMINATED", "ERROR"


class FPPMOSearch(Searcher):
    """Suggests masks that meet the MACs budget, and learns from the results of their trials.

    A suggestion is a flat config, see ``config_of``: ``id``, ``generation``, ``macs``,
    ``parameters``, ``mask`` (text, for ``unpack_mask``) and ``score_seed``. Trials report
    ``val_loss``, ``val_accuracy`` and, if they are scored at several depths, ``steps``. The last
    report of a trial counts. Trials that a scheduler stops early rank behind those that got
    further, whatever their scores.

    The masks depend neither on the order in which trials end nor on how many run at once, with or
    without a ``ConcurrencyLimiter``. While every further mask depends on missing feedback,
    ``suggest`` returns None. If all trials of a generation fail, the next ``suggest`` raises; a
    restored search tries that generation again, because the cause may have been removed.

    Args:
        space: The space of masks.
        importance: ``(num_filters,)``, finite and > 0: where the probabilities start.
        settings: How to search; ``rank_by`` is the metric.
        scored_by: Everything else that scores depend on, as JSON values. A restored search must
            have the same; ``for_problem`` lists all of it.

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
        """Proposal of every trial that was ever suggested, by the trial's id."""
        self._reports: dict[str, Feedback | None] = {}
        """Last report of every trial that has not ended, by its id; None before the first."""
        self._feedback: list[Feedback] = []
        self._max_live = settings.num_proposals
        self._start([])

    @classmethod
    def for_problem(cls, problem: Problem, rungs: tuple[int, ...]) -> FPPMOSearch:
        """Return a searcher over a problem's masks; the importance is measured in this process.

        Args:
            problem: The problem that the trainable is made for.
            rungs: Fine-tuning steps after which a trial reports; see ``prune_trainable``.

        Raises:
            ValueError: the settings ask for work that workers do: a baseline to train, stages, or
                an importance that is measured on images.
        """
        settings = problem.settings
        if settings.baseline.baseline_epochs:
            raise ValueError(
                f"baseline_epochs must be 0 under Tune, got {settings.baseline.baseline_epochs}; "
                "train the network first, or use fppmo_ray.search"
            )
        if settings.gradual.stages:
            raise ValueError(
                f"stages must be left out under Tune, got {settings.gradual.stages}; use "
                "fppmo_ray.search"
            )
        if settings.sampler.start != "uniform":
            raise ValueError(
                f"start must be uniform under Tune, got {settings.sampler.start}: nothing is "
                "calibrated; use fppmo_ray.search"
            )
        if settings.sampler.importance in ("taylor", "obs"):
            measured_by = "importance" if settings.sampler.importance == "taylor" else "calibration"
            raise ValueError(
                f"importance {settings.sampler.importance} is measured on images: measure it by "
                f"fppmo_ray.pruning.{measured_by}, on a machine of your choice, and give the array "
                "to FPPMOSearch"
            )
        importance = measure_importance(
            problem.network, problem.tracing, settings.sampler.importance or "fpgm"
        )
        return cls(
            problem.tracing.space,
            importance,
            settings.optimizer_settings(),
            scored_by={**problem.identity(), "rungs": rungs},
        )

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Check that Tune's metric and mode are those of the settings.

        Args:
            metric: Metric in Tune's configuration; None: not given.
            mode: ``min`` or ``max``; None: not given.
            config: Tune's ``param_space``, which is not used.
            **spec: Further properties of the experiment, which are not used.

        Returns:
            False, because ``param_space`` can only hold constants: the space of masks is given.

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
        """Limit the number of trials that live at once, for a ``ConcurrencyLimiter``.

        Returns:
            True, so that the limiter does not count trials itself. It would count those that a
            restored run does not resume.
        """
        self._max_live = max_concurrent
        return True

    def suggest(  # type: ignore[override]  # Ray's annotation forgets FINISHED
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """Return the config of a trial, None while feedback is missing, or ``FINISHED``.

        Raises:
            RuntimeError: every proposal of a generation failed.
        """
        if self._failure is not None:
            raise self._failure
        if self.num_ended == self._settings.num_proposals:
            return self.FINISHED  # only now, because Tune does not ask again after it
        if not self._waiting or len(self._reports) >= self._max_live:
            return None
        proposal = self._waiting.popleft()
        self._proposals[trial_id] = proposal.proposal_id
        self._reports[trial_id] = None
        return config_of(proposal)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep a report, in case the trial is stopped without a final result.

        Args:
            trial_id: The trial.
            result: Its report; see ``feedback_from``.
        """
        if self._is_live(trial_id):
            self._reports[trial_id] = feedback_from(self._proposals[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn from the end of a trial; late, repeated and unknown reports change nothing.

        Args:
            trial_id: The trial.
            result: Its last report; None: the last one of ``on_trial_result`` counts.
            error: Whether the trial ended with an error.
        """
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
        """Number of proposals whose trials have ended, with a score or with an error."""
        return len(self._feedback)

    def finalists(self) -> list[Finalist]:
        """Return the masks worth rescoring; see ``MaskOptimizer.finalists``."""
        return self._model.finalists()

    def save(self, checkpoint_path: str) -> None:
        """Write all suggestions and reports to a JSON file, which replaces an earlier one."""
        state = {
            "format": _STATE_FORMAT,
            **self._identity(),
            "trials": self._proposals,
            "live": {
                trial_id: report and asdict(report) for trial_id, report in self._reports.items()
            },
            "feedback": [asdict(feedback) for feedback in self._feedback],
        }
        write_whole(Path(checkpoint_path), json.dumps(state).encode())

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a file that ``save`` wrote; trials that were live then may still end.

        Raises:
            ValueError: the file is damaged, or holds a search with other settings or weights.
        """
        state = _read_state(Path(checkpoint_path))
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
        """Restore Tune's last save, and suggest proposals of trials that Tune has lost again.

        Tune saves the searcher's state and its own state one after the other. A driver that is
        killed in between leaves live trials in the searcher's state that Tune does not know.
        """
        super().restore_from_dir(checkpoint_dir)
        unfinished = _unfinished_trials(Path(checkpoint_dir))
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
        """Replay feedback to a fresh model; its proposals that no trial has are to be suggested."""
        self._model = ProbabilityModel(self._space, self._importance, self._settings)
        self._waiting: deque[Proposal] = deque()
        self._failure: RuntimeError | None = None
        self._step(feedback)

    def _step(self, feedback: list[Feedback]) -> None:
        try:
            proposals = self._model.step(feedback).proposals
        except RuntimeError as error:  # suggest raises it: Tune ignores errors while a trial ends
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
            **self._scored_by,  # its settings, if there are any, include those above
        }


def _plain(settings: OptimizerSettings) -> dict[str, Any]:
    """Return the settings as JSON values: lists for tuples, and without cuts that are None."""
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def _read_state(path: Path) -> Mapping[str, Any]:
    """Return the content of a file that ``FPPMOSearch.save`` wrote.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        state = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no state of a searcher: {error}") from error
    is_state = isinstance(state, dict) and state.keys() >= _STATE_PARTS
    if not is_state or state.get("format") != _STATE_FORMAT:
        raise ValueError(f"{path} is no state of a searcher in format {_STATE_FORMAT}")
    return cast(Mapping[str, Any], state)


def _unfinished_trials(experiment: Path) -> set[str] | None:
    """Return the ids of the trials that Tune resumes, or None if it has saved no state yet."""
    paths = sorted(experiment.glob("experiment_state-*.json"))
    if not paths:
        return None
    entries = json.loads(paths[-1].read_bytes())["trial_data"]
    trials = [json.loads(trial) for trial, _ in entries]
    return {trial["trial_id"] for trial in trials if trial["status"] not in _ENDED}
