"""Makes a rank fail, die, hang or dawdle at a chosen call of one of the program's functions.

`python -m tests.sabotage WHERE WHICH NTH HOW ...` runs `reshard ...` with that done to rank WHICH.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from reshard.errors import CheckpointError, StorageError

WRITE = "reshard.engine:Engine._write"


def sabotage(rank: int, where: str, which: int, nth: int, how: str, note: str = "") -> None:
    """Let rank `which` come to grief at its `nth` call of `where`, which is `module:dotted.name`.

    The file `note` is made at that moment.
    """
    if rank != which:
        return
    module, _, path = where.partition(":")
    *holders, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for step in holders:
        holder = getattr(holder, step)
    original, calls = getattr(holder, name), 0

    def replacement(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= nth:
            if note:
                Path(note).touch()
            suffer(how)
        return original(*args, **options)

    setattr(holder, name, replacement)


def suffer(how: str) -> None:
    """What happens to the rank."""
    if how == "fail":
        raise StorageError("the disk of a test has failed")
    if how == "refuse":
        raise CheckpointError("the checkpoint of a test is refused")
    if how == "bug":
        raise KeyError("a bug")
    if how == "kill late":
        time.sleep(1.2)
    if how.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(600)
    if how == "dawdle":
        time.sleep(0.25)


if __name__ == "__main__":
    from reshard.cli import main

    where, which, nth, how, *rest = sys.argv[1:]
    sabotage(int(os.environ.get("RANK", "0")), where, int(which), int(nth), how)
    sys.exit(main(rest))
