"""Kinds of changes of a journal's lines and of files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

LineMutation = Callable[[list[bytes], int, random.Random], list[bytes]]
"""Returns the lines with the one at a place changed."""


def with_line(lines: Sequence[bytes], place: int, line: bytes) -> list[bytes]:
    """Return the lines with another one at a place.

    Args:
        lines: The journal's lines.
        place: Number of the line, counted from 0.
        line: What stands there instead.
    """
    return [*lines[:place], line, *lines[place + 1 :]]


def _replaced(change: Callable[[bytes, random.Random], bytes]) -> LineMutation:
    def mutate(lines: list[bytes], place: int, rng: random.Random) -> list[bytes]:
        return with_line(lines, place, change(lines[place], rng))

    return mutate


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one bit flipped.

    Args:
        content: What is changed.
        rng: Source of randomness.
    """
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def another_digit(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one of its digits replaced by another.

    Args:
        content: What is changed, with at least one digit.
        rng: Source of randomness.
    """
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    place = rng.choice(places)
    digit = rng.choice(sorted(set(b"0123456789") - {content[place]}))
    return bytes([*content[:place], digit, *content[place + 1 :]])


def cut(content: bytes, rng: random.Random) -> bytes:
    """Return the beginning of the content.

    Args:
        content: What is changed.
        rng: Source of randomness.
    """
    return content[: rng.randrange(len(content))]


def _noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content))


EntryChange = Callable[[dict[str, Any], str, random.Random], None]
"""Changes one entry of a JSON object, in place."""


def _entry(change: EntryChange) -> Any:
    """Return the change of one entry of a JSON object, written without white space."""

    def mutate(content: bytes, rng: random.Random) -> bytes:
        data = json.loads(content)
        change(data, rng.choice(sorted(data)), rng)
        return json.dumps(data, separators=(",", ":")).encode() + b"\n"

    return mutate


_VALUES: tuple[Any, ...] = (None, True, -1, 10**400, 1e308, "", "x", [], {}, [[]], {"a": {}})


def put(data: dict[str, Any], name: str, rng: random.Random) -> None:
    """Give the entry another value.

    Args:
        data: A JSON object.
        name: The entry.
        rng: Source of randomness.
    """
    data[name] = rng.choice([value for value in _VALUES if value != data[name]])


def rename(data: dict[str, Any], name: str, rng: random.Random) -> None:
    """Give the entry another name.

    Args:
        data: A JSON object.
        name: The entry.
        rng: Source of randomness.
    """
    data[f"{name}_"] = data.pop(name)


def drop(data: dict[str, Any], name: str, rng: random.Random) -> None:
    """Remove the entry.

    Args:
        data: A JSON object.
        name: The entry.
        rng: Source of randomness.
    """
    del data[name]


def _swap(lines: list[bytes], place: int, rng: random.Random) -> list[bytes]:
    other = rng.choice([number for number in range(len(lines)) if lines[number] != lines[place]])
    changed = list(lines)
    changed[place], changed[other] = lines[other], lines[place]
    return changed


LINE_MUTATIONS: dict[str, LineMutation] = {
    "a bit is flipped": _replaced(flipped),
    "a digit is another": _replaced(another_digit),
    "an entry is missing": _replaced(_entry(drop)),
    "an entry has another value": _replaced(_entry(put)),
    "an entry has another name": _replaced(_entry(rename)),
    "the line is cut": _replaced(lambda line, rng: cut(line, rng) + b"\n"),
    "the line is noise": _replaced(lambda line, rng: _noise(line, rng) + b"\n"),
    "the line is nested deeply": _replaced(lambda line, rng: 99_999 * b"[" + b"\n"),
    "the line is empty": _replaced(lambda line, rng: b"\n"),
    "the line has no end": _replaced(lambda line, rng: line.removesuffix(b"\n")),
    "the line is missing": lambda lines, place, rng: [*lines[:place], *lines[place + 1 :]],
    "the line is repeated": lambda lines, place, rng: [*lines[: place + 1], *lines[place:]],
    "the line is swapped with another": _swap,
    "the journal ends before it": lambda lines, place, rng: lines[:place],
    "the journal ends inside it": lambda lines, place, rng: [
        *lines[:place],
        cut(lines[place], rng),
    ],
}


FileMutation = Callable[[bytes, random.Random], bytes | None]
"""Returns the changed content of a file; None: it is deleted."""

FILE_MUTATIONS: dict[str, FileMutation] = {
    "a bit is flipped": flipped,
    "a digit is another": another_digit,
    "the file is cut": cut,
    "the file is noise": _noise,
    "the file is empty": lambda content, rng: b"",
    "the file is longer": lambda content, rng: content + rng.randbytes(1 + rng.randrange(99)),
    "the file is missing": lambda content, rng: None,
}
JSON_MUTATIONS: dict[str, FileMutation] = {
    "an entry is missing": _entry(drop),
    "an entry has another value": _entry(put),
    "an entry has another name": _entry(rename),
    "the file is nested deeply": lambda content, rng: 99_999 * b"[",
}
