"""Runs damaged files past the readers in a process of its own, which is watched.

A reader may succeed, or refuse in one line of ours. It must not raise anything else, run or open
anything, take long, or take more memory than the limit leaves. A table of readers is a module with
`READERS`, and `case()` that damages a file. `python -m tests.fuzz.harness READER SEED NUMBER DIR`
writes the files of one case.
"""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import ReshardError

Files = dict[str, bytes]  # their bytes by relative path
MIB = 1 << 20
# A disk takes longer for a file than any reader; None is the usual place.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
TABLE = "tests.fuzz.cases"
SECONDS, PATIENCE = 5.0, 6
BATCH_SECONDS = 300
MAX_MESSAGE = 2000
RUNNING = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("exec", "compile", "import", "pickle.find_class", "ctypes.dlopen", "socket.__new__"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.putenv", "os.kill", "shutil.rmtree", "webbrowser.open", "code.__new__"),
)


# What libraries import when they first meet a name that is no UTF-8, or an expression.
LATE = ("encodings.cp437", "omegaconf._impl", "omegaconf.vendor.antlr4.LL1Analyzer")


class Hang(BaseException):
    """A case that took too long."""


@dataclass(frozen=True)
class Reader:
    """`files` are valid; one whose name ends with one of `hit` is damaged, then all are `read`."""

    files: Callable[[Path], Files]
    hit: Sequence[str]
    read: Callable[[Path], None]


@dataclass
class Report:
    """What came of a batch: how many cases there were by their end, and what is wrong."""

    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


class Watch:
    """Notes what the process does while it reads; an audit hook cannot be taken away again."""

    def __init__(self, seconds: float) -> None:
        # Of its own time, since the machine may be busy; and of all time, since it may wait.
        self.limits = ((signal.ITIMER_PROF, seconds), (signal.ITIMER_REAL, PATIENCE * seconds))
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _hang)
        self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and (event in RUNNING or (event == "open" and _writes(arguments))):
            self.seen.append(f"{event} {arguments!r:.200}")

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch what happens inside; a hang is ended."""
        self.seen.clear()
        for timer, seconds in self.limits:
            signal.setitimer(timer, seconds)
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            for timer, _ in self.limits:
                signal.setitimer(timer, 0)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def run(
    reader: str,
    seed: int,
    numbers: Sequence[int],
    *,
    table: str = TABLE,
    seconds: float = SECONDS,
) -> Report:
    """Run the cases of these numbers in a process of their own, each for at most `seconds`."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    current = context.RawValue("q", -1)
    given = sender, current, seconds, table, reader, seed, numbers
    process = context.Process(target=_batch, args=given)
    process.start()
    sender.close()
    try:
        if not receiver.poll(BATCH_SECONDS):
            return Report(findings=[f"{_name(reader, seed, current.value)}: hangs"])
        report: Report = receiver.recv()
    except EOFError:
        process.join(SECONDS)
        return Report(findings=[f"{_name(reader, seed, current.value)}: ends {process.exitcode}"])
    finally:
        process.kill()
        process.join()
    return report


def _name(reader: str, seed: int, number: int) -> str:
    return f"{reader!r} {seed} {number}"


def _batch(
    sender: Connection,
    current: Any,
    seconds: float,
    table: str,
    reader: str,
    seed: int,
    numbers: Sequence[int],
) -> None:
    """The life of the process."""
    cases = importlib.import_module(table)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY) as scratch:
        files = cases.READERS[reader].files(Path(scratch))
        root = Path(scratch) / "files"
        write(files, root)
        cases.READERS[reader].read(root)  # imports what it needs
        for module in LATE:
            with suppress(ImportError):
                importlib.import_module(module)
        watch, report = Watch(seconds), Report()
        limit_memory()
        for number in numbers:
            current.value = number
            how, end = _one(cases, (reader, seed, number), files, root, watch)
            report.ends[end.partition(":")[0]] += 1
            if end not in ("read", "refused"):
                report.findings.append(f"{_name(reader, seed, number)} ({how}): {end}")
        sender.send(report)


def limit_memory() -> None:
    """Leave this process 256 MiB more than it has."""
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    limit = held * 1024 + 256 * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _hang(number: int, frame: object) -> None:
    raise Hang


def _one(
    cases: Any, case: tuple[str, int, int], files: Files, root: Path, watch: Watch
) -> tuple[str, str]:
    """How one case is damaged, and how it ends."""
    name, how, data = cases.case(case[0], files, *case[1:])
    (root / name).write_bytes(data)
    del data  # a reader has the limit for itself
    try:
        end = attempt(lambda: cases.READERS[case[0]].read(root), watch)
    finally:
        (root / name).write_bytes(files[name])
    return f"{name}: {how}", end


def attempt(read: Any, watch: Watch) -> str:
    """How reading ends: `read`, `refused`, or what is wrong."""
    end = "read"
    try:
        with watch.on():
            read()
    except ReshardError as error:
        end = "refused" if not (fault := wrong_message(str(error))) else fault
    except Hang:
        return f"hangs: {watch.limits[0][1]:g} s"
    except BaseException:  # whatever it is, it is a finding
        end = "raises: " + traceback.format_exc(limit=-4).strip().replace("\n", "\n    ")[-1500:]
    return f"does: {watch.seen[0]}" if watch.seen else end


def wrong_message(message: str) -> str:
    """What is wrong with an error's message, if anything."""
    if len(message) > MAX_MESSAGE:
        return f"says too much: {len(message)} characters, {message[:200]!r}"
    if not message.isprintable():
        return f"prints what cannot be printed: {message[:300]!r}"
    return "says: MemoryError" if "MemoryError" in message else ""


def refusal(attempt: Callable[[], object]) -> str:
    """What an attempt is refused with, which is an error of ours in one line."""
    with pytest.raises(ReshardError) as caught:
        attempt()
    assert not wrong_message(str(caught.value))
    return str(caught.value)


def write(files: Files, root: Path) -> None:
    """Write files by their relative paths."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def main(reader: str, seed: str, number: str, folder: str) -> None:
    """Write the files of one case, to look at."""
    cases = importlib.import_module(TABLE)
    with tempfile.TemporaryDirectory() as scratch:
        files = cases.READERS[reader].files(Path(scratch))
    name, how, data = cases.case(reader, files, int(seed), int(number))
    write(files | {name: data}, Path(folder))
    print(f"{folder}/{name}: {how}")


if __name__ == "__main__":
    main(*sys.argv[1:])
