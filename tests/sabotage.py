"""Makes a rank fail, die, hang or dawdle at a chosen call of one of the program's functions.

`python -m tests.sabotage WHERE WHICH NTH HOW NOTE ...` runs `reshard ...` with that done to rank
WHICH; NOTE may be empty.
"""

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reshard.errors import CheckpointError, StorageError

WRITE = "reshard.engine:Engine._write"
EVERY_RANK = -1


def sabotage(rank: int, where: str, which: int, nth: int, how: str, note: str = "") -> None:
    """Let rank `which` come to grief at its `nth` call of `where`, which is `module:dotted.name`.

    The file `note` is made at that moment. `HOW after` lets the call do its work first, `torn` half
    of it; `wait` lasts until the note is gone; nothing is killed `once` more where the note is.
    """
    if which not in (rank, EVERY_RANK):
        return
    calls = 0

    def suffering(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < nth or (how.endswith(" once") and os.path.exists(note)):
            return original(*args, **options)
        done = None
        if how.endswith("after"):
            done = original(*args, **options)
        if how == "torn":
            original(*map(half, args))
        if note:
            Path(note).touch()
        suffer(how)
        while how == "wait" and calls == nth and os.path.exists(note):
            time.sleep(0.01)
        return done if how.endswith("after") else original(*args, **options)

    replace(where, suffering)


def several(rank: int, *griefs: tuple[Any, ...]) -> None:
    """More than one thing that goes wrong, or is slow, in the same job."""
    for grief in griefs:
        sabotage(rank, *grief)


def replace(where: str, how: Callable[..., Any]) -> None:
    """Have every call of `where` go to `how`, which is given the original first."""
    module, _, path = where.partition(":")
    *holders, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for step in holders:
        holder = getattr(holder, step)
    original = getattr(holder, name)
    setattr(holder, name, lambda *args, **options: how(original, *args, **options))


def half(argument: Any) -> Any:
    """Half of what a call was to write, bytes or several buffers; never an even number of bytes."""
    if isinstance(argument, list):
        return [half(argument[0])]
    if isinstance(argument, bytes | bytearray | memoryview):
        return argument[: len(argument) // 2 | 1]
    return argument


def suffer(how: str) -> None:
    """What happens to the rank."""
    if how == "fail":
        raise StorageError("the disk of a test has failed")
    if how == "refuse":
        raise CheckpointError("the checkpoint of a test is refused")
    if how == "bug":
        raise KeyError("a bug")
    if how == "memory":
        raise MemoryError("no memory in a test")
    if how.startswith("kill late"):
        time.sleep(1.2)
    if how.startswith("kill") or how == "torn":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(600)
    if how == "dawdle":
        time.sleep(0.25)
    if how.startswith("sleep"):
        time.sleep(float(how.split()[1]))


def ledger(rank: int, note: str) -> None:
    """Have this rank note the bytes of every write to a file of weights, before it is made."""

    def noted(original: Callable[..., Any], files: Any, file: str, *args: Any) -> Any:
        if file.endswith(".safetensors"):
            with open(note, "a") as opened:
                opened.write(f"{sum(view.nbytes for view in args[-1])}\n")
        return original(files, file, *args)

    replace("reshard.storage:Files.write", noted)


def slowly(rank: int, note: str) -> None:
    """A job whose ranks all take their time, in moving more than elsewhere, and keep a ledger."""
    sabotage(rank, WRITE, EVERY_RANK, 1, "sleep 0.05")
    for where in ("commit:create", "commit:finish_file", "workspace:rename", "workspace:sync"):
        sabotage(rank, f"reshard.{where}", EVERY_RANK, 1, "sleep 0.005")
    ledger(rank, note)


def ledger_total(note: Path) -> int:
    """What all ranks have noted, those included that were killed."""
    with contextlib.suppress(FileNotFoundError):
        return sum(map(int, note.read_text().split()))
    return 0


if __name__ == "__main__":
    from reshard.__main__ import entry

    where, which, nth, how, note, *rest = sys.argv[1:]
    sabotage(int(os.environ.get("RANK", "0")), where, int(which), int(nth), how, note)
    sys.argv[1:] = rest
    entry()
