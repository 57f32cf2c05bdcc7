"""Runs one command in a fresh process, and says how long it took, and what it read, wrote and held.

* Memory: the sum over all processes that the command started, launchers too, of the highest
  resident set of each (VmHWM, looked at every tenth of a second). Shared pages count in each.
* Bytes: rchar and wchar of /proc/PID/io, taken from the command when it has ended and before it is
  reaped; the kernel has then added what its children did. Mapped files are not in it.
"""

import json
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 0.1
PATIENCE_SECONDS = 30.0
LIMIT_SECONDS = 1800.0
PIECE_BYTES = 1 << 24
SAID_LINES = 3


class StepError(Exception):
    """A command that did not do what was asked of it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One command that was measured: times in seconds, sizes in bytes.

    `seconds` is what is compared with the copy, `total` all that the command reports of itself,
    `wall` the life of its process; `stages` are its own times. `load` is the load average before.
    """

    seconds: float
    total: float
    wall: float
    peak_rss: int
    read: int
    written: int
    exchanged: int | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    load: float = 0.0


@dataclass(frozen=True, slots=True)
class Life:
    """What is seen of a command from outside."""

    wall: float
    peak_rss: int
    read: int
    written: int


def sample(words: Sequence[str], report: Path, counted: Sequence[str], said: Path) -> Sample:
    """Run a command. `counted` are the stages in its report that are compared with the copy."""
    report.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    life = run(words, said)
    if not counted:
        return Sample(
            life.wall, life.wall, life.wall, life.peak_rss, life.read, life.written, load=load
        )
    record = json.loads(report.read_text())
    stages, moved = record["seconds"], record.get("bytes", {})
    return Sample(
        seconds=sum(stages[stage] for stage in counted),
        total=stages.get("total", sum(stages.values())),
        wall=life.wall,
        peak_rss=life.peak_rss,
        read=moved.get("read", life.read),
        written=moved.get("written", life.written),
        exchanged=moved.get("exchanged"),
        stages=stages,
        load=load,
    )


def run(words: Sequence[str], said: Path, limit: float = LIMIT_SECONDS) -> Life:
    """Run a command to its end, with what it says in a file; a failure quotes the end of that."""
    began = time.monotonic()
    child = start(words, said)
    watch = Watch(child.pid, limit)
    try:
        with watch:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            wall = time.monotonic() - began
    except BaseException:
        end(child.pid)
        child.wait()
        raise
    counters = _fields(Path(f"/proc/{child.pid}/io"))
    if child.wait() != 0:
        why = f"took longer than {limit:g} s" if watch.ended else f"exit {child.returncode}"
        raise StepError(f"{why}: {last_lines(said)}")
    return Life(wall, watch.peak_rss, counters["rchar"], counters["wchar"])


def start(words: Sequence[str], said: Path) -> subprocess.Popen[bytes]:
    """Start a command from the repository's folder."""
    with said.open("wb") as output:
        try:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError:
            raise StepError(f"there is no `{words[0]}`") from None


def environment() -> dict[str, str]:
    """Our own, in which the source tree can be imported."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return kept | {"PYTHONPATH": str(ROOT)}


def last_lines(said: Path) -> str:
    """The end of what a command said, in one line."""
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-SAID_LINES:]) or "it said nothing"


class Watch:
    """Looks at a process and all below it while they live, and ends them after `limit` seconds."""

    def __init__(self, pid: int, limit: float) -> None:
        self.ended = False
        self._pid, self._until = pid, time.monotonic() + limit
        self._peaks: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def peak_rss(self) -> int:
        """The sum of the highest resident sets of all processes that were seen, in bytes.

        A page where all ended between two looks.
        """
        return max(sum(self._peaks.values()), mmap.PAGESIZE)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            for pid in tree(self._pid):
                held = 1024 * _fields(Path(f"/proc/{pid}/status")).get("VmHWM", 0)
                self._peaks[pid] = max(held, self._peaks.get(pid, 0))
            if time.monotonic() > self._until and not self.ended:
                self.ended = True
                end(self._pid)
            self._over.wait(LOOK_SECONDS)


def tree(pid: int) -> Iterator[int]:
    """A process and all that it has started, and they in turn."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = children.read_text().split()
        except OSError:  # it has ended
            continue
        for child in below:
            yield from tree(int(child))


def end(pid: int) -> None:
    """Ask a process to end, which passes that on to its ranks; kill what outlives it."""
    pids = list(tree(pid))
    _send(pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE_SECONDS
    while _lives(pid) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    for left in filter(_lives, pids):
        _send(left, signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file in /proc by name; none where the process has ended."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines)
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if pair[1:] and pair[1].isdigit()}


def files_below(folder: Path) -> list[Path]:
    """All files below a directory."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def warm(folder: Path) -> None:
    """Read all files below a directory, so that they are in the page cache where they fit."""
    room = bytearray(PIECE_BYTES)
    for path in files_below(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def drop(folder: Path) -> None:
    """Take all files below a directory out of the page cache; they must be on the disk already."""
    for path in files_below(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
