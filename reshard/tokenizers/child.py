"""A conversion seen from the program that asks for it: a process that is started and watched."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reshard.errors import CheckpointError, StorageError
from reshard.tokenizers import TASKS, Unavailable

LIMIT_SECONDS, STEP_SECONDS = 600.0, 1.0
# This program is found where the caller has it, and nothing else there or in the working directory.
START = (
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; import reshard; "
    "del sys.path[0]; from reshard.tokenizers.__main__ import main; main()"
)


def require(packages: Iterable[str], loses: str) -> None:
    """Refuse a conversion whose packages are not all installed; `loses` is what it would make."""
    if missing := [package for package in packages if _is_missing(package)]:
        raise Unavailable(_left_out(missing, loses))


def run_child(
    task: str,
    arguments: Mapping[str, object],
    folder: Path,
    loses: str,
    on_step: Callable[[], None] = lambda: None,
    further: Iterable[str] = (),
) -> None:
    """Run a task of `TASKS` in a process of its own, which leaves its files in `folder`.

    `on_step` is called while it runs; `further` are packages that these files take besides. A fault
    of the tokenizer's file is a CheckpointError, what is not there is Unavailable, and a process
    that does not come to its end a StorageError.
    """
    packages = (*further, *TASKS[task].packages)
    require(packages, loses)
    job = json.dumps({"task": task, "arguments": dict(arguments), "folder": str(folder)})
    code, printed, said = _ended(job, loses, on_step)
    outcome = _outcome(printed) if code == 0 else {}
    if "missing" in outcome:
        raise Unavailable(f"{_left_out(packages, loses)} ({outcome['missing']})")
    if "wrong" in outcome:
        raise CheckpointError(str(outcome["wrong"]))
    if "done" not in outcome:
        last = (said.strip().splitlines() or ["no message"])[-1]
        how = f"was killed by signal {-code}" if code < 0 else f"failed (exit code {code})"
        raise StorageError(
            f"making {loses} {how}: {outcome.get('failed', last)}; try again, or move the "
            "tokenizer elsewhere, and it is left out"
        )


def _ended(job: str, loses: str, on_step: Callable[[], None]) -> tuple[int, str, str]:
    """Start the process and wait for it: its exit code, and what it said on either stream."""
    root = str(Path(__file__).parents[2])
    until, given = time.monotonic() + LIMIT_SECONDS, [job]
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", START, root]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
    ) as child:
        try:
            while time.monotonic() < until:
                on_step()
                try:
                    said = child.communicate(given.pop() if given else None, STEP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
                return child.returncode, *said
        finally:
            child.kill()  # one that has ended takes no harm
    raise StorageError(
        f"making {loses} did not end within {LIMIT_SECONDS:g} s; is the tokenizer damaged? "
        "moved elsewhere, it is left out"
    )


def _outcome(printed: str) -> Mapping[str, object]:
    """What the process says at its end, in its last line."""
    try:
        found = json.loads((printed.splitlines() or [""])[-1])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _left_out(packages: Iterable[str], loses: str) -> str:
    *first, last = packages
    needed = f"{', '.join(first)} and {last}" if first else last
    return f"{loses} is left out: it needs {needed}; pip install {' '.join((*first, last))}"


def _is_missing(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return True
    return False
