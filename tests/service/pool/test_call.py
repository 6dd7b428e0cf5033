from __future__ import annotations

import re
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayError

from fppmo_ray.service.pool.call import Call, max_losses
from fppmo_ray.service.pool.cluster import last_line


class Actor:
    """An actor with the methods ``score`` and ``train_epoch``; remembers how they are called."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, tuple[object, ...], dict[str, object]]] = []
        self.score = Method(self, "score")
        self.train_epoch = Method(self, "train_epoch")


class Method:
    def __init__(self, actor: Actor, method: str) -> None:
        self._actor = actor
        self._method = method
        self._name = ""

    def options(self, name: str) -> Method:
        self._name = name
        return self

    def remote(self, *arguments: object, **named: object) -> str:
        self._actor.sent.append((self._method, self._name, arguments, named))
        return f"reference {len(self._actor.sent)}"


def test_a_call_is_sent_as_the_method_call_that_ask_makes() -> None:
    actor = Actor()
    call: Call[Any, Any] = Call("epoch 3", lambda worker: worker.train_epoch("keep", method="sgd"))
    assert call.kind == ""
    call.send(actor, runs_now=True)
    assert actor.sent == [("train_epoch", "train epoch", ("keep",), {"method": "sgd"})]
    assert (call.kind, call.reference) == ("train_epoch", "reference 1")


def ask_two(worker: Any) -> Any:
    worker.score(1)
    return worker.train_epoch(2)


@pytest.mark.parametrize(
    ("ask", "fault"),
    [
        (lambda worker: 3.0, "calls none"),
        (lambda worker: worker.score, "calls none"),
        (ask_two, "calls score() and train_epoch()"),
        (lambda worker: [worker.score(1)], "returns something else than the answer of score()"),
    ],
)
def test_ask_must_call_one_method_and_return_its_answer(ask: Any, fault: str) -> None:
    call: Call[Any, Any] = Call("proposal 17", ask)
    sentence = f"ask of proposal 17 must call exactly one method .*, but it {re.escape(fault)}; "
    with pytest.raises(ValueError, match=sentence):
        call.send(Actor(), runs_now=True)


def test_only_one_method_is_sent_when_ask_calls_two() -> None:
    actor = Actor()
    with pytest.raises(ValueError, match="exactly one method"):
        Call("proposal 17", ask_two).send(actor, runs_now=True)
    assert [method for method, *_ in actor.sent] == ["score"]


def test_the_result_is_the_answer_of_a_call_that_ended_well() -> None:
    call: Call[Any, int] = Call("proposal 17", lambda worker: worker.score())
    call.end_with(7, "0@here:1")
    assert (call.has_ended, call.result, call.error, call.worker) == (True, 7, None, "0@here:1")


def test_the_result_of_a_call_that_failed_is_its_error() -> None:
    call: Call[Any, int] = Call("proposal 17", lambda worker: worker.score())
    call.fail_with("timed out twice after 3 s", "0@here:1")
    with pytest.raises(RuntimeError, match=r"^proposal 17 failed: timed out twice after 3 s$"):
        _ = call.result


def test_a_call_that_has_not_ended_has_no_result() -> None:
    call: Call[Any, int] = Call("proposal 17", lambda worker: worker.score())
    assert not call.has_ended
    with pytest.raises(RuntimeError, match=r"^proposal 17 has not ended yet"):
        _ = call.result


def test_an_ended_call_holds_no_reference_so_that_ray_can_free_the_answer() -> None:
    call: Call[Any, int] = Call("proposal 17", lambda worker: worker.score())
    call.send(Actor(), runs_now=True)
    call.end_with(7, "0@here:1")
    assert call.reference is None


def test_calls_with_equal_arguments_are_different_keys() -> None:
    first, second = (Call("proposal 17", ask_two) for _ in range(2))
    assert {first: 1, second: 2} == {second: 2, first: 1}
    assert first != second


@pytest.mark.parametrize(
    ("num_lost", "num_ended", "expected"),
    [
        (0, 0, 3),
        (0, 10_000, 3),
        (1, 0, 3),  # one of 101 calls: (1 / 101) ** 3 is less than one in a million
        (10, 200, 5),  # 10 of 310: ** 4 is 1.08 in a million
        (50, 200, 8),
        (10_000, 0, 10),
    ],
)
def test_a_call_is_blamed_for_as_many_losses_as_chance_does_not_explain(
    num_lost: int, num_ended: int, expected: int
) -> None:
    assert max_losses(num_lost, num_ended) == expected


def test_losses_with_the_node_are_not_counted_as_losses_of_the_worker() -> None:
    call: Call[Any, Any] = Call("proposal 17", lambda worker: worker.score(1))
    for _ in range(5):
        assert call.count_loss(0, "the node is gone", is_node_lost=True) is None
    assert call.count_loss(0, "killed", is_node_lost=False) is None
    assert call.count_loss(1, "killed", is_node_lost=False) is None
    assert (call.count_loss(0, "killed", is_node_lost=False) or "").startswith(
        "lost its worker 3 times, most recently: killed;"
    )


def test_the_end_of_a_very_long_error_is_left_out() -> None:
    call: Call[Any, Any] = Call("proposal 17", lambda worker: worker.score(1))
    call.fail_with("x" * 2000 + "y" * 50_000, "0@host:1")
    assert call.error == "x" * 2000 + "... and 50,000 more"


def test_the_reason_of_a_loss_is_told_without_advice() -> None:
    memory = "Memory on the node (IP: 10.0.0.1, ID: 5e) was 27.65GB / 28.80GB (0.96), which exceeds"
    of_memory = OutOfMemoryError(
        f"Task was killed due to the node running low on memory.\n{memory} the threshold of 0.95. "
        "Ray killed this worker (ID: 7f).\nRefer to the documentation on how to address it."
    )
    assert last_line(of_memory) == f"{memory} the threshold of 0.95"
    assert last_line(OutOfMemoryError("killed\nRefer to the documentation")) == "killed"
    assert last_line(RayError("")) == "RayError"
