"""Readers with one fault each: what the harness must find."""

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from reshard.errors import CheckpointError
from tests.fuzz.harness import Files, Reader

DAMAGED = b"damaged"


def refuse(message: str) -> None:
    raise CheckpointError(message)


def recurse(root: Path) -> None:
    recurse(root)


def loop(root: Path) -> None:
    while True:
        pass


def swallow(root: Path) -> None:
    """A large allocation that a broad `except` hides."""
    try:
        bytearray(300 << 20)
    except Exception as error:
        raise CheckpointError(f"not readable: {type(error).__name__}") from None


FAULTS = {
    "a large allocation": (lambda root: bytearray(300 << 20), "raises: .*MemoryError"),
    "a hidden allocation": (swallow, "says: MemoryError"),
    "a wait": (lambda root: time.sleep(60), "hangs: "),
    "a loop": (loop, "hangs: "),
    "a foreign error": (lambda root: [][1], "raises: .*IndexError"),
    "a recursion": (recurse, "raises: .*RecursionError"),
    "many words": (lambda root: refuse("a" * 3000), "says too much"),
    "a command": (lambda root: os.system("true"), "does: os.system"),
    "a process": (lambda root: subprocess.run(["true"]), "does: subprocess.Popen"),
    "code": (lambda root: eval("1"), "does: compile"),
    "an import": (lambda root: __import__("wave"), "does: import"),
    "a written file": (lambda root: (root / "x").write_bytes(b""), "does: open"),
    "the end": (lambda root: os._exit(3), "ends 3"),
}


def only_damaged(name: str) -> Reader:
    """A reader that shows its fault on damaged files."""

    def read(root: Path) -> None:
        if (root / "file").read_bytes() == DAMAGED:
            FAULTS[name][0](root)

    return Reader(lambda folder: {"file": b"good"}, ("",), read)


READERS: Mapping[str, Reader] = {
    **{name: only_damaged(name) for name in FAULTS},
    "nothing": Reader(lambda folder: {"file": b"good"}, ("",), lambda root: None),
    "a small allocation": Reader(
        lambda folder: {"file": b""}, ("",), lambda root: bytearray(200 << 20) and None
    ),
}


def case(reader: str, files: Files, seed: int, number: int) -> tuple[str, str, bytes]:
    """Damage in every second file."""
    return "file", "planned", DAMAGED if number % 2 else b"good"
