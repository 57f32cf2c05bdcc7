"""The opcodes of pickle protocol 2 that push one value: the same whatever the Python."""

import struct
from collections.abc import Sequence

START, STOP = b"\x80\x02", b"."


def named(name: str) -> bytes:
    """The class or function `module name`."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    """A text."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    """An integer of at most 63 bits, not negative."""
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def integers(values: Sequence[int]) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"
