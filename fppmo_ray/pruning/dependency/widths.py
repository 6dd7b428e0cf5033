"""Integers that remember which widths they were computed from.

A forward pass may ask for sizes: ``x.shape``, or numbers that its modules keep. During tracing it
is given such integers, so that the comparisons by which it decides are recorded.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fppmo_ray.distribution.space import IntArray


@dataclass(frozen=True, eq=False)
class Length:
    """The length of an axis, or a number of a module that states one."""

    positions: IntArray
    """The positions along the axis, or the units that they belong to."""
    is_number: bool = False
    """Whether it is a module's number."""


@dataclass(frozen=True, eq=False)
class Term:
    """A sum, difference, product, quotient or remainder of two expressions."""

    operator: str
    """``add``, ``sub``, ``mul``, ``floordiv`` or ``mod``."""
    left: Expression
    """The first operand."""
    right: Expression
    """The second operand."""


Expression = int | Length | Term


@dataclass(frozen=True, eq=False)
class Decision:
    """A comparison of two integers, at least one of which depends on a width."""

    comparison: str
    """``eq``, ``ne``, ``lt``, ``le``, ``gt`` or ``ge``."""
    left: Expression
    """The first operand."""
    right: Expression
    """The second operand."""
    outcome: bool
    """What it is in the dense network."""
    place: str
    """File and line of the code that compares."""


@dataclass(eq=False)
class WidthLog:
    """What a network's code did with tracked integers."""

    decisions: list[Decision] = field(default_factory=list)
    """All comparisons, in order."""
    read: set[int] = field(default_factory=set)
    """The first positions of the lengths that were used."""

    def use(self, expression: Expression) -> None:
        """Note that the code used an integer of this expression."""
        for length in lengths(expression):
            self.read.add(int(length.positions[0]))


class TrackedInt(int):
    """An integer with the expression that it was computed by.

    Sums, products and the like are tracked again. All other results are plain.
    """

    expression: Expression
    log: WidthLog

    def __deepcopy__(self, memo: Any) -> int:
        """Return the plain integer: copies of a network are not traced."""
        return int(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the plain integer."""
        return int, (int(self),)

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        """Compare with 0."""
        return bool(self != 0)


def tracked(value: int, expression: Expression, log: WidthLog) -> TrackedInt:
    """Return a tracked integer.

    Args:
        value: Its value in the dense network.
        expression: How it was computed.
        log: Where its uses are recorded.
    """
    made = TrackedInt(value)
    made.expression, made.log = expression, log
    return made


def expression_of(value: int) -> Expression:
    """Return the expression of an integer; a plain one is its own."""
    return value.expression if isinstance(value, TrackedInt) else int(value)


def lengths(expression: Expression) -> list[Length]:
    """Return all lengths that an expression is computed from."""
    if isinstance(expression, Term):
        return [*lengths(expression.left), *lengths(expression.right)]
    return [expression] if isinstance(expression, Length) else []


def with_units(expression: Expression, unit_of: Callable[[IntArray], IntArray]) -> Expression:
    """Return an expression with other positions.

    Args:
        expression: The expression.
        unit_of: Maps the positions of every length.
    """
    if isinstance(expression, Term):
        left, right = (with_units(e, unit_of) for e in (expression.left, expression.right))
        return Term(expression.operator, left, right)
    if isinstance(expression, Length):
        return Length(unit_of(expression.positions), expression.is_number)
    return expression


def evaluated(expression: Expression, length: Callable[[IntArray], int]) -> int:
    """Return the value of an expression.

    Args:
        expression: The expression.
        length: Returns the value of a length by its positions.
    """
    if isinstance(expression, Term):
        left, right = (evaluated(e, length) for e in (expression.left, expression.right))
        value: int = getattr(operator, expression.operator)(left, right)
        return value
    return length(expression.positions) if isinstance(expression, Length) else expression


def _arithmetic(name: str, *, reflected: bool) -> Any:
    plain = getattr(int, f"__{'r' if reflected else ''}{name}__")

    def method(self: TrackedInt, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented:
            return value
        own, others = self.expression, expression_of(other)
        self.log.use(own)
        self.log.use(others)
        term = Term(name, others, own) if reflected else Term(name, own, others)
        return tracked(value, term, self.log)

    return method


def _comparison(name: str) -> Any:
    plain = getattr(int, f"__{name}__")

    def method(self: TrackedInt, other: Any) -> Any:
        outcome = plain(self, other)
        if outcome is not NotImplemented:
            operands = self.expression, expression_of(other)
            for operand in operands:
                self.log.use(operand)
            self.log.decisions.append(Decision(name, *operands, outcome, _place()))
        return outcome

    return method


def _place() -> str:
    """File and line of the nearest caller outside this module."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") == __name__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TrackedInt, f"__{_name}__", _arithmetic(_name, reflected=False))
    setattr(TrackedInt, f"__r{_name}__", _arithmetic(_name, reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TrackedInt, f"__{_name}__", _comparison(_name))
