"""Between replicas and the driver: no epoch is lost, none is counted twice."""

from __future__ import annotations

import pytest

from fppmo_ray.service.trainings import Begin, CheckpointExchange, EpochDone
from fppmo_ray.service.worker_protocol import TrainingReport


def done(training: int, epoch: int) -> EpochDone:
    report = TrainingReport(loss=1.0, seconds=1.0)
    state = f"{training} after {epoch}".encode()
    return EpochDone(training=training, epoch=epoch, state=state, report=report)


def two_trainings() -> CheckpointExchange:
    """One that goes on with its last epoch, one that begins."""
    return CheckpointExchange(
        [
            Begin(epoch=1, state=b"0 after 0", num_epochs=2),
            Begin(epoch=0, state=None, num_epochs=1),
        ]
    )


def test_trainings_are_done_one_after_the_other_from_where_they_stand() -> None:
    exchange = two_trainings()
    assert exchange.next_epoch() == (0, 1)
    assert exchange.state_before(0, 1) == b"0 after 0"
    exchange.put(done(0, 1))
    assert exchange.next_epoch() == (1, 0)
    assert exchange.state_before(1, 0) is None
    exchange.put(done(1, 0))
    assert exchange.next_epoch() is None
    assert exchange.take() == [done(0, 1), done(1, 0)]
    assert exchange.take() == []


def test_a_new_group_goes_on_from_what_was_left_whether_or_not_it_was_taken() -> None:
    exchange = CheckpointExchange([Begin(epoch=0, state=None, num_epochs=3)])
    exchange.put(done(0, 0))
    exchange.start_group()
    assert exchange.next_epoch() == (0, 1)
    assert exchange.state_before(0, 1) == b"0 after 0"


def test_what_a_lost_group_still_says_changes_nothing() -> None:
    exchange = CheckpointExchange([Begin(epoch=0, state=None, num_epochs=3)])
    exchange.put(done(0, 0))
    exchange.put(done(0, 0))
    assert len(exchange.take()) == 1
    with pytest.raises(RuntimeError, match="epoch 0 of training 0 is not the next any more"):
        exchange.state_before(0, 0)


def test_after_a_stop_the_epoch_under_way_is_the_last() -> None:
    exchange = CheckpointExchange([Begin(epoch=0, state=None, num_epochs=3)])
    exchange.next_epoch()
    assert exchange.stop()
    exchange.put(done(0, 0))
    assert exchange.next_epoch() is None
    assert not exchange.stop()
    assert exchange.take() == [done(0, 0)]


def test_a_stop_does_not_wait_for_a_group_without_a_place() -> None:
    exchange = two_trainings()
    exchange.next_epoch()
    exchange.start_group()
    assert not exchange.stop()


def test_states_are_shared_once_and_handed_out_by_reference() -> None:
    shared: list[bytes] = []

    def share(state: bytes) -> int:
        shared.append(state)
        return len(shared) - 1

    exchange = CheckpointExchange([Begin(epoch=1, state=b"0 after 0", num_epochs=3)], share)
    assert [exchange.state_before(0, 1) for _ in range(8)] == [0] * 8  # eight replicas
    exchange.put(done(0, 1))
    assert [item.state for item in exchange.take()] == [1]
    assert exchange.state_before(0, 2) == 1
    assert shared == [b"0 after 0", b"0 after 1"]
