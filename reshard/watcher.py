"""One rank's failure, death or hang ends all ranks within seconds, with one line and one exit code.

Every rank says in the rendezvous store what it is doing, and watches the next rank. The first that
finds something wrong claims it, says it, and leaves; the others see the claim and leave silently.
Leaving means `os._exit`: nothing else frees a thread that waits in a collective call. A job of one
rank is watched the same way, in a store of its own.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

from reshard.lastwords import BEAT_SECONDS, report_failure, within_a_second

SILENT_SECONDS = 4.0
VERDICT_SECONDS = 6.0
GO_ON = "; the same command goes on where this one stopped"


@dataclass(slots=True)
class Activity:
    """What a rank says of itself; `home` and `pid` tell its neighbours on a machine if it lives."""

    phase: str = "start"
    steps: int = 0
    waiting: bool = False
    done: bool = False
    beat: int = 0
    home: str = ""
    pid: int = 0


def _home() -> str:
    """The machine, since it was started, and the namespace in which this rank's pid counts."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _lives(pid: int) -> bool:
    """Whether a process of this machine exists and is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands, and who launched it (None: nobody who has to live on).

    `speaks` tells the rank that says so when the store is gone, through which ranks agree who does.
    """

    rank: int
    world: int
    speaks: bool = True
    launcher: int | None = None


class Watcher(threading.Thread):
    """The thread of one rank that looks after all; `timeout` is in seconds without a step.

    It takes SIGTERM over, which launchers send to the survivors of a rank that died: the handler of
    a thread that waits in a collective call would never run, so the signal wakes this thread.
    `resumable` says that work is under way that the same command would go on with; `cleanups` are
    called before this process ends at once; `remember` by the rank whose refusal ends all. Where
    there is a `farewell`, SIGTERM is no failure: every rank calls it, and ends with 0.
    """

    def __init__(
        self,
        store: distributed_c10d.Store,
        place: Place,
        timeout: float,
        remember: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self._store, self._place, self._timeout, self._remember = store, place, timeout, remember
        self._rank, self._world = place.rank, place.world
        self.resumable = False
        self.farewell: Callable[[], None] | None = None
        self.cleanups: list[Callable[[], object]] = []
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._stopped = False
        self._handlers: Callable[[], None] | None = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = self._take_signals()
        self.activity = Activity(home=_home(), pid=os.getpid())
        self._heard, self._heard_at = -1, time.monotonic()
        self._steps, self._moved_at = -1, time.monotonic()
        self._seen: dict[int, Activity] = {}
        self._trouble: tuple[str, int] | None = None
        self._warned = False
        self._say()

    def _take_signals(self) -> Callable[[], None]:
        """Have SIGTERM ring; what undoes it."""
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)

        def undo() -> None:
            signal.set_wakeup_fd(bell)
            signal.signal(signal.SIGTERM, handler)

        return undo

    def enter(self, phase: str) -> None:
        """Say at once what this rank does from here on: if it dies, its neighbour names it."""
        self.activity.phase = phase
        if not self._stopped:
            os.write(self._bell, b"\0")

    def run(self) -> None:
        """Look around until stopped; without its store or its launcher the job is gone."""
        while True:
            rung = select.select([self._alarm], [], [], BEAT_SECONDS)[0]
            signals = os.read(self._alarm, 64) if rung else b""
            if self._stopped:
                return
            try:
                if signal.SIGTERM in signals:
                    self._terminated()
                self._say()
                self._look()
            except (dist.DistError, RuntimeError, OSError, ValueError):
                self.abandoned(signals)
            if self._place.launcher not in (None, os.getppid()):
                self.abandoned(signals)

    def abandoned(self, signals: bytes = b"") -> None:
        """Leave a job whose launcher is gone, or else the first rank, and the store with it."""
        stopped = signal.SIGTERM in signals
        keeper = "rank 0" if self._place.launcher is None else "the launcher"
        what = "stopped by SIGTERM" if stopped else f"{keeper} is gone, so the job ends"
        if stopped and self.farewell is not None:
            self.leave(0)
        if self._place.speaks:
            report_failure(self.line(f"{what}, in phase `{self.activity.phase}`", 1))
        self.leave(128 + signal.SIGTERM if stopped else 1)

    def trouble(self, message: str, code: int) -> None:
        """Fail after a beat, unless this process has failed by then: its main thread may wait."""
        self._trouble = self._trouble or (message, code)

    def _look(self) -> None:
        """Leave where a rank has failed; fail where the next rank has died or this one hangs."""
        now = time.monotonic()
        self._heed()
        if self._trouble is not None and self._warned:
            self.fail(*self._trouble)
        self._warned = self._trouble is not None
        following = (self._rank + 1) % self._world
        neighbour = self._peer(following)
        if neighbour is not None and neighbour.beat != self._heard:
            self._heard, self._heard_at = neighbour.beat, now
        silence = now - self._heard_at
        if neighbour is not None and self._gone(following, neighbour, silence):
            self._mourn(following, neighbour)
        if neighbour is not None and not neighbour.done and silence > self._timeout:
            self.fail(self._hangs(following, neighbour), 1)
        if self.activity.steps != self._steps:
            self._steps, self._moved_at = self.activity.steps, now
        if now - self._moved_at > self._timeout:
            self._too_long(now)

    def _heed(self) -> None:
        """Leave where a rank has failed, which has said why."""
        if self._store.check(["failed"]):
            self.leave(json.loads(self._store.get("failed")))

    def _too_long(self, now: float) -> None:
        """Fail where this rank hangs; where it waits, if no rank gets on for as long again."""
        before, self._seen = self._seen, self._peers()
        steps = {rank: peer.steps for rank, peer in self._seen.items()}
        if not self.activity.waiting or steps == {r: peer.steps for r, peer in before.items()}:
            self.fail(self._who_hangs(before), 1)
        self._moved_at = now

    def _terminated(self) -> None:
        """Say that the job was stopped, or which rank's death is why the launcher ends this one.

        Ranks of other machines are listened to for a while: only silence tells that one has died.
        """
        first, until = self._peers(), time.monotonic() + SILENT_SECONDS
        for rank, peer in first.items():
            if self._gone(rank, peer, 0.0):
                self._mourn(rank, peer)
        silent = {rank for rank, peer in first.items() if peer.home != self.activity.home}
        silent -= {rank for rank, peer in first.items() if peer.done}
        while silent and time.monotonic() < until:
            time.sleep(BEAT_SECONDS)
            self._say()
            self._heed()
            now = self._peers()
            silent = {rank for rank in silent if now[rank].beat == first[rank].beat}
        for rank in sorted(silent):
            self._mourn(rank, first[rank])
        if self.farewell is not None:
            if self._store.add("claims", 1) == 1:
                self._store.set("failed", json.dumps(0))
            self.leave(0)
        phase = self.activity.phase
        self.fail(f"stopped by SIGTERM, in phase `{phase}`", 128 + signal.SIGTERM)

    def _mourn(self, rank: int, peer: Activity) -> None:
        self.fail(f"rank {rank} died in phase `{peer.phase}`", 1)

    def _gone(self, rank: int, other: Activity, silence: float) -> bool:
        """Whether a rank has died: on this machine its process tells, elsewhere its silence."""
        if other.done:
            return False
        if other.home != self.activity.home:
            return silence > SILENT_SECONDS
        if _lives(other.pid):
            return False
        now = self._peer(rank)  # it may have ended well since it was asked
        return now is None or not now.done

    def stop(self) -> None:
        """This rank is done, and may go without being missed."""
        self._stopped = True
        os.write(self._bell, b"\0")
        self.join()
        self.activity.done = True
        # Where the first rank holds the store, it goes last; where another did, it may be gone.
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._say()
            until = time.monotonic() + VERDICT_SECONDS
            while self._rank == 0 and self._missed() and time.monotonic() < until:
                time.sleep(BEAT_SECONDS / 100)
        if self._handlers is not None:
            self._handlers()
        os.close(self._alarm)
        os.close(self._bell)

    def _missed(self) -> bool:
        """Whether a rank is neither done nor dead."""
        peers = self._peers().items()
        return any(not peer.done and not self._gone(rank, peer, 0.0) for rank, peer in peers)

    def fail(self, message: str, code: int) -> None:
        """Claim a failure and end this process; where another rank was first, leave as it says."""
        if self._store.add("claims", 1) == 1:
            if code == 2:
                self._remember()
            report_failure(self.line(message, code))
            self._store.set("failed", json.dumps(code))
            self.leave(code)
        found = self.verdict()
        self.leave(code if found is None else found)

    def line(self, message: str, code: int) -> str:
        """A message with what to do next; a refusal says that itself."""
        return message + (GO_ON if self.resumable and code != 2 else "")

    def verdict(self) -> int | None:
        """The exit code of the failure that a rank has claimed, or None where none comes up."""
        until = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < until:
            if self._store.check(["failed"]):
                return int(json.loads(self._store.get("failed")))
            time.sleep(BEAT_SECONDS / 5)
        return None

    def leave(self, code: int) -> None:
        """End this process at once, whatever its other threads wait for."""
        if code == 0 and self.farewell is not None:
            within_a_second(self.farewell)  # the disk that it writes to may hang
        for cleanup in self.cleanups:
            with contextlib.suppress(Exception):
                cleanup()
        within_a_second(sys.stdout.flush)
        within_a_second(sys.stderr.flush)
        os._exit(code)

    def _say(self) -> None:
        self.activity.beat += 1
        self._store.set(f"alive/{self._rank}", json.dumps(asdict(self.activity)))

    def _peer(self, rank: int) -> Activity | None:
        """What a rank said last, or None where it has not begun."""
        key = f"alive/{rank}"
        return Activity(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _peers(self) -> dict[int, Activity]:
        """What every rank that has begun said last."""
        found = {rank: self._peer(rank) for rank in range(self._world)}
        return {rank: peer for rank, peer in found.items() if peer is not None}

    def _who_hangs(self, before: Mapping[int, Activity]) -> str:
        """Name the rank that is silent since `before`, or works without getting on."""
        known = self._seen
        silent = {
            rank: peer
            for rank, peer in known.items()
            if rank in before and peer.beat == before[rank].beat
        }
        working = {rank: peer for rank, peer in known.items() if not peer.waiting}
        suspects = silent or working or known
        rank = min(suspects, key=lambda rank: suspects[rank].steps)
        return self._hangs(rank, suspects[rank])

    def _hangs(self, rank: int, peer: Activity) -> str:
        return (
            f"rank {rank} made no progress for {self._timeout:g} s (engine.timeout) "
            f"in phase `{peer.phase}`, step {peer.steps}"
        )
