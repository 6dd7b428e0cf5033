"""Flags that take several numbers at once: ``--macs-cut 0.4,0.57,0.7``."""

from __future__ import annotations

from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

_ONE_OR_MORE = float | tuple[float, ...]


def comma_lists() -> ConstructorRegistry:
    """For ``tyro.cli``: what is one number or a tuple of them is given with commas between."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_one_or_more)
    return registry


def _one_or_more(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type != _ONE_OR_MORE:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT[,FLOAT...]",
        instance_from_str=lambda arguments: _numbers(arguments[0]),
        is_instance=lambda value: isinstance(value, float | tuple),
        str_from_instance=lambda value: [_text(value)],
    )


def _numbers(text: str) -> float | tuple[float, ...]:
    numbers = tuple(float(number) for number in text.split(","))
    return numbers if len(numbers) > 1 else numbers[0]


def _text(value: float | tuple[float, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
