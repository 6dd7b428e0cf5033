"""How long a call may take before its worker counts as hung."""

from __future__ import annotations

_TIMES_THE_LONGEST = 10
_AT_LEAST_S = 300.0
_BRIEF_S = 10.0


class TimeLimits:
    """Limits of calls, by method: given, or learned from the calls that have ended."""

    def __init__(self) -> None:
        self._longest: dict[str, list[float]] = {}
        """The two longest calls of each method, the shorter first."""
        self._last: dict[str, float] = {}

    def learn(self, method: str, seconds: float) -> None:
        """A call of this method has answered after so many seconds."""
        self._longest[method] = sorted([*self._longest.get(method, []), seconds])[-2:]
        self._last[method] = seconds

    def is_brief(self, method: str) -> bool:
        """Whether the last call of this method took a few seconds at most.

        The last one: first calls are long, of every worker, where devices are made ready.
        """
        return self._last.get(method, float("inf")) <= _BRIEF_S

    def limit(self, method: str, given: float | None) -> float | None:
        """Seconds a call may take; None as long as nothing is known of its method.

        That is the limit that was ``given``, else 10 times the longest call so far but one, and at
        least 5 minutes. But one: a single call on a machine that swapped would let all that hang
        afterwards hang for hours.
        """
        if given is not None or method not in self._longest:
            return given
        return max(_AT_LEAST_S, _TIMES_THE_LONGEST * self._longest[method][0])
