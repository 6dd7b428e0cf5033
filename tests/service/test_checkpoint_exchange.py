"""Between replicas and the driver: no epoch is lost, none is counted twice."""

from __future__ import annotations

import pytest
from fppmo_ray.service.workers.handover import Begin, EpochDone, Handover

from fppmo_ray.training import EpochReport


def done(training: int, epoch: int) -> EpochDone:
    report = EpochReport(epoch=epoch, loss=1.0, accuracy=0.5, learning_rate=0.1, seconds=1.0)
    state = f"{training} after {epoch}".encode()
    return EpochDone(training=training, epoch=epoch, state=state, report=report)


def two_trainings() -> Handover:
    """One that goes on with its last epoch, one that begins."""
    return Handover(
        [
            Begin(epoch=1, state=b"0 after 0", num_epochs=2),
            Begin(epoch=0, state=None, num_epochs=1),
        ]
    )


def test_trainings_are_done_one_after_the_other_from_where_they_stand() -> None:
    handover = two_trainings()
    assert handover.next_epoch() == (0, 1)
    assert handover.state_before(0, 1) == b"0 after 0"
    handover.put(done(0, 1))
    assert handover.next_epoch() == (1, 0)
    assert handover.state_before(1, 0) is None
    handover.put(done(1, 0))
    assert handover.next_epoch() is None
    assert handover.take() == [done(0, 1), done(1, 0)]
    assert handover.take() == []


def test_a_new_group_goes_on_from_what_was_left_whether_or_not_it_was_taken() -> None:
    handover = Handover([Begin(epoch=0, state=None, num_epochs=3)])
    handover.put(done(0, 0))
    handover.start_group()
    assert handover.next_epoch() == (0, 1)
    assert handover.state_before(0, 1) == b"0 after 0"


def test_what_a_lost_group_still_says_changes_nothing() -> None:
    handover = Handover([Begin(epoch=0, state=None, num_epochs=3)])
    handover.put(done(0, 0))
    handover.put(done(0, 0))
    assert len(handover.take()) == 1
    with pytest.raises(RuntimeError, match="epoch 0 of training 0 is not the next any more"):
        handover.state_before(0, 0)


def test_after_a_stop_the_epoch_under_way_is_the_last() -> None:
    handover = Handover([Begin(epoch=0, state=None, num_epochs=3)])
    handover.next_epoch()
    assert handover.stop()
    handover.put(done(0, 0))
    assert handover.next_epoch() is None
    assert not handover.stop()
    assert handover.take() == [done(0, 0)]


def test_a_stop_does_not_wait_for_a_group_without_a_place() -> None:
    handover = two_trainings()
    handover.next_epoch()
    handover.start_group()
    assert not handover.stop()
