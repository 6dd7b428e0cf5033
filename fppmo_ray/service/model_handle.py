"""The driver's side of the probability model: whatever becomes of the actor, it answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fppmo_ray.distribution import (
    Feedback,
    Finalist,
    FloatArray,
    Inheritance,
    OptimizerSettings,
    PruningSpace,
)
from fppmo_ray.service.pool.ray_errors import end_actor, last_line
from fppmo_ray.service.probability_model import Advance, ProbabilityModel

logger = logging.getLogger(__name__)

_MAX_LOST = 5  # in a row: an actor that cannot live on the driver's node would be tried for ever
_ANSWER_S = 600.0  # a generation takes milliseconds, a long journal seconds


def _node_ip() -> str:
    ip: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return ip


class ModelHandle:
    """The probability-model actor, replayed to whenever it is lost."""

    def __init__(
        self,
        space: PruningSpace,
        importance: FloatArray,
        settings: OptimizerSettings,
        inherited: Inheritance | None = None,
    ) -> None:
        self._arguments = (space, importance, settings, inherited)
        self._told: list[Feedback] = []
        self._actor = self._start()

    def advance(self, feedback: Sequence[Feedback]) -> Advance:
        """See ``ProbabilityModel.advance``; a lost actor answers with all it ever proposed.

        Raises:
            RuntimeError: the actor is lost again and again.
        """
        new = list(feedback)
        self._told += new

        def ask(is_fresh: bool) -> Any:
            # The dashboard sums up by names; Ray's own changes with the repr after the first call.
            call = self._actor.advance.options(name="advance")
            return call.remote(self._told if is_fresh else new)

        advance: Advance = self._answer(ask)
        return advance

    def finalists(self) -> list[Finalist]:
        """See ``ProbabilityModel.finalists``.

        Raises:
            RuntimeError: the actor is lost again and again.
        """
        finalists: list[Finalist] = self._answer(self._asking("finalists"))
        return finalists

    def keep_logits(self) -> FloatArray:
        """See ``ProbabilityModel.keep_logits``.

        Raises:
            RuntimeError: the actor is lost again and again.
        """
        keep_logits: FloatArray = self._answer(self._asking("keep_logits"))
        return keep_logits

    def close(self) -> None:
        """Stop the actor."""
        end_actor(self._actor)

    def _asking(self, method: str) -> Callable[[bool], Any]:
        """A call of a method that changes nothing, for ``_answer``."""

        def ask(is_fresh: bool) -> Any:
            if is_fresh:
                self._actor.advance.remote(self._told)  # before the next call: calls keep order
            return getattr(self._actor, method).remote()

        return ask

    def _answer(self, ask: Callable[[bool], Any]) -> Any:
        """The answer to a call; whoever asks is told whether the actor knows nothing yet."""
        for num_lost in range(_MAX_LOST):
            try:
                return ray.get(ask(num_lost > 0), timeout=_ANSWER_S)
            except RayTaskError as error:
                raise error.cause from error  # the model's own sentence, without Ray's frame
            except RayError as error:
                reason = last_line(error)
                logger.warning("the probability model was lost and is replayed to: %s", reason)
                end_actor(self._actor)
                self._actor = self._start()
        raise RuntimeError(
            f"the probability model was lost {_MAX_LOST} times in a row on the driver's node "
            f"({_node_ip()}), most recently: {reason}; is that node short of "
            "memory? go on with --resume"
        )

    def _start(self) -> Any:
        # No CPU: a cluster's head often offers none, and the model needs next to nothing. Beside
        # the driver, since nodes of workers come and go.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(num_cpus=0)(ProbabilityModel)
        return actor.options(scheduling_strategy=here).remote(*self._arguments)
