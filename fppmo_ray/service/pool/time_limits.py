"""How long a call may take before its worker counts as hung."""

from __future__ import annotations

_TIMES_THE_LONGEST = 10
_AT_LEAST_S = 300.0
_BRIEF_S = 10.0


class TimeLimits:
    """Limits of calls, by their kind: given, or learned from the calls that have ended."""

    def __init__(self) -> None:
        self._longest: dict[str, list[float]] = {}
        """The two longest calls of each kind, the shorter first."""
        self._last: dict[str, float] = {}

    def learn(self, kind: str, seconds: float) -> None:
        """A call of this kind has answered after so many seconds."""
        self._longest[kind] = sorted([*self._longest.get(kind, []), seconds])[-2:]
        self._last[kind] = seconds

    def is_brief(self, kind: str) -> bool:
        """Whether the last call of this kind took a few seconds at most.

        The last one: first calls are long, of every worker, where devices are made ready.
        """
        return self._last.get(kind, float("inf")) <= _BRIEF_S

    def limit(self, kind: str, given: float | None) -> float | None:
        """Seconds a call may take; None as long as nothing is known of its kind.

        That is the limit that was ``given``, else 10 times the longest call so far but one, and at
        least 5 minutes. But one: a single call on a machine that swapped would let all that hang
        afterwards hang for hours.
        """
        if given is not None or kind not in self._longest:
            return given
        return max(_AT_LEAST_S, _TIMES_THE_LONGEST * self._longest[kind][0])
