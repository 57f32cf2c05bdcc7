"""The key-values of a GGUF header: their kinds, and how they are read without trusting the file.

    string     uint64 length, UTF-8
    [kind]     uint32 kind, uint64 count, the elements
    the rest   fixed numbers of bytes, little-endian

A file may claim any count, so every one is held against the bytes that are left, and no more of
the file than a window is in memory. Long arrays, such as the vocabulary, are walked over.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from reshard.containers import shown

Scalar = str | int | float | bool

ARRAY = 9
# Of each kind: its number in a file, and the letter that `struct` has for it.
KINDS: Mapping[str, tuple[int, str]] = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
_BY_NUMBER = {number: (kind, letter) for kind, (number, letter) in KINDS.items()}
_MAX_HEADER_BYTES = 64 << 20  # vocabularies of 262,144 tokens take 15 MiB
_MAX_KEPT_BYTES = 4 << 20  # as Python values they take up to 8 times this
_MAX_KEYS = 1 << 14
_MAX_KEY_BYTES = (1 << 16) - 1  # the format's own
_MAX_SHORT = 1024
_WINDOW = 1 << 18
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array of `count` elements that was left in the file, such as a vocabulary."""

    kind: str
    count: int


class Cursor:
    """Reads a file from its start on, through a window; what it cannot read is a ValueError."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self.file_bytes = os.fstat(self._descriptor).st_size
        self.position = 0
        self._start, self._window = 0, b""

    def skip(self, size: int) -> None:
        """Go past `size` bytes, which the file must have."""
        self._require(self.position + size)
        self.position += size

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        first = self.position
        self.skip(size)
        if not self._start <= first <= self.position <= self._start + len(self._window):
            self._refill(first, size)
        return self._window[first - self._start : self.position - self._start]

    def number(self, letter: str) -> int:
        """The next number, of the kind that `struct` has a letter for."""
        value: int = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]
        return value

    def skip_strings(self, count: int) -> None:
        """Go past so many strings: hundreds of thousands in a vocabulary, so in one loop."""
        self._require(self.position + _LENGTH.size * count)
        position, start, window = self.position, self._start, self._window
        for _ in range(count):
            if position + _LENGTH.size > start + len(window):
                self._refill(position, _LENGTH.size)
                start, window = self._start, self._window
            position += _LENGTH.size + _LENGTH.unpack_from(window, position - start)[0]
        self._require(position)
        self.position = position

    def _require(self, stop: int) -> None:
        """Refuse to go on to `stop` where the file, or what a header may take, ends before."""
        if stop > self.file_bytes:
            raise ValueError(f"truncated: {self.file_bytes} bytes, its header goes on to {stop}")
        if stop > _MAX_HEADER_BYTES:
            raise ValueError(
                f"its header goes on to byte {stop}, expected {_MAX_HEADER_BYTES} at most"
            )

    def _refill(self, position: int, size: int) -> None:
        """Read a window from `position` on that has at least `size` bytes."""
        self._require(position + size)
        self._start, self._window = (
            position,
            os.pread(self._descriptor, max(size, _WINDOW), position),
        )
        if len(self._window) < size:
            raise ValueError(f"truncated while it was read, at byte {position}")


def read_fields(cursor: Cursor, count: int) -> dict[str, tuple[str, object]]:
    """The kind and the value of each of the `count` keys that come next (ValueError)."""
    if count > _MAX_KEYS:
        raise ValueError(f"is said to have {count} keys, expected {_MAX_KEYS} at most")
    found: dict[str, tuple[str, object]] = {}
    budget = _Budget(_MAX_KEPT_BYTES)
    for number in range(count):
        key = _key(cursor, number, budget)
        if key in found:
            raise ValueError(f"key `{shown(key)}` appears twice in the header")
        try:
            found[key] = _value(cursor, budget)
        except ValueError as error:
            raise ValueError(f"key `{shown(key)}`: {error}") from error
    return found


@dataclass(slots=True)
class _Budget:
    """How many more bytes of the header may be kept in memory."""

    left: int

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError(
                f"keys and values up to here take more than {_MAX_KEPT_BYTES} bytes, "
                "without the long arrays"
            )


def _key(cursor: Cursor, number: int, budget: _Budget) -> str:
    size = cursor.number("Q")
    if not 0 < size <= _MAX_KEY_BYTES:
        raise ValueError(f"key {number} has a name of {size} bytes, expected 1 to {_MAX_KEY_BYTES}")
    budget.spend(size)
    key = _text(cursor.take(size))
    if not key.isprintable():
        raise ValueError(f"key `{shown(key)}` has characters that cannot be printed")
    return key


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"`{shown(data.decode(errors='replace'))}` is no UTF-8 text") from None


def _value(cursor: Cursor, budget: _Budget) -> tuple[str, object]:
    """The kind and the value at the cursor."""
    number = cursor.number("I")
    if number == ARRAY:
        return _array(cursor, budget)
    kind, letter = _kind(number)
    value: Scalar
    if kind == "string":
        size = cursor.number("Q")
        budget.spend(size)
        return kind, _text(cursor.take(size))
    [value] = _numbers(cursor.take(struct.calcsize(letter)), letter)
    return kind, value


def _kind(number: int) -> tuple[str, str]:
    if number not in _BY_NUMBER:
        known = ", ".join(KINDS)
        raise ValueError(f"its value is of kind {number}, expected one of {known}, or an array")
    return _BY_NUMBER[number]


def _array(cursor: Cursor, budget: _Budget) -> tuple[str, object]:
    """An array as a tuple where it is short; a long one is left in the file."""
    number = cursor.number("I")
    if number == ARRAY:
        raise ValueError("is an array of arrays, which llama.cpp does not read either")
    kind, letter = _kind(number)
    count = cursor.number("Q")
    if count > _MAX_SHORT:
        if letter:
            cursor.skip(count * struct.calcsize(letter))
        else:
            cursor.skip_strings(count)
        return f"[{kind}]", LongArray(kind, count)
    if letter:
        size = count * struct.calcsize(letter)
        budget.spend(size)
        return f"[{kind}]", _numbers(cursor.take(size), letter)
    return f"[{kind}]", tuple(_strings(cursor, count, budget))


def _strings(cursor: Cursor, count: int, budget: _Budget) -> Iterator[str]:
    for _ in range(count):
        size = cursor.number("Q")
        budget.spend(8 + size)
        yield _text(cursor.take(size))


def _numbers(data: bytes, letter: str) -> tuple[Scalar, ...]:
    """Numbers or truth values out of their bytes."""
    if letter == "?" and data.strip(b"\0\1"):
        raise ValueError(f"is no truth value: {data.strip(bytes(2))[0]}, expected 0 or 1")
    return struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data)


def pack(key: str, kind: str, value: Scalar | Sequence[Scalar]) -> bytes:
    """One key-value as the header holds it; `kind` is one of `KINDS` or [one] (ValueError)."""
    element = kind.removeprefix("[").removesuffix("]")
    number, letter = KINDS[element]
    try:
        if element == kind:
            values: Sequence[object] = [value]
            head = struct.pack("<I", number)
        else:
            values = list(value) if isinstance(value, list | tuple) else [None]
            head = struct.pack("<IIQ", ARRAY, number, len(values))
        return pack_string(key) + head + b"".join(_element(letter, item) for item in values)
    except (struct.error, OverflowError, ValueError) as error:
        raise ValueError(f"key `{shown(key)}` is to be {kind}: {error}") from error


def _element(letter: str, value: object) -> bytes:
    """One value, or one of an array; a string has no letter."""
    if isinstance(value, str) and not letter:
        return pack_string(value)
    if isinstance(value, int | float) and isinstance(value, bool) == (letter == "?") and letter:
        return struct.pack("<" + letter, value)
    raise ValueError(f"found {shown(repr(value))}")


def pack_string(text: str) -> bytes:
    """A string as the header holds it."""
    data = text.encode()
    return _LENGTH.pack(len(data)) + data
