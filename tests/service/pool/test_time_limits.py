from __future__ import annotations

from fppmo_ray.service.pool.time_limits import TimeLimits


def test_a_given_limit_counts_whatever_was_learned() -> None:
    limits = TimeLimits()
    limits.learn("score", 100.0)
    assert limits.limit("score", 2.5) == 2.5


def test_without_a_call_that_has_ended_there_is_no_limit() -> None:
    limits = TimeLimits()
    limits.learn("score", 100.0)
    assert limits.limit("evaluate", None) is None


def test_the_learned_limit_is_ten_times_the_longest_call_but_one_and_five_minutes_at_least() -> (
    None
):
    limits = TimeLimits()
    limits.learn("score", 3.0)
    assert limits.limit("score", None) == 300.0
    for seconds in (90.0, 40.0, 60.0):
        limits.learn("score", seconds)
    assert limits.limit("score", None) == 600.0


def test_a_single_call_of_hours_does_not_let_others_hang_for_days() -> None:
    limits = TimeLimits()
    for seconds in (60.0, 7200.0, 50.0):
        limits.learn("score", seconds)
    assert limits.limit("score", None) == 600.0


def test_a_method_is_brief_while_its_last_call_took_seconds_whatever_came_before() -> None:
    limits = TimeLimits()
    assert not limits.is_brief("score")  # nothing is known
    for seconds, is_brief in ((60.0, False), (0.1, True), (10.0, True), (11.0, False)):
        limits.learn("score", seconds)
        assert limits.is_brief("score") is is_brief
    assert not limits.is_brief("train_epoch")
