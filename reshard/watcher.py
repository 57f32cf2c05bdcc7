"""One rank's failure, death or hang ends all ranks within seconds, with one line and one exit code.

Every rank says in the rendezvous store what it is doing, and watches the next rank. The first that
finds something wrong claims it, says it, and leaves; the others see the claim and leave silently.
Leaving means `os._exit`: nothing else frees a thread that waits in a collective call.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

BEAT_SECONDS = 0.5
SILENT_SECONDS = 4.0
VERDICT_SECONDS = 6.0


def report_failure(message: str) -> None:
    """The one line that says what went wrong."""
    print(f"reshard: {message}", file=sys.stderr, flush=True)


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
    """The machine and the process namespace in which this rank's pid means something."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _lives(pid: int) -> bool:
    """Whether a process of this machine exists and is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


class Watcher(threading.Thread):
    """The thread of one rank that looks after all; `timeout` is in seconds without a step.

    It takes SIGTERM over, which launchers send to the survivors of a rank that died: the handler of
    a thread that waits in a collective call would never run, so the signal wakes this thread.
    """

    def __init__(
        self, store: distributed_c10d.Store, rank: int, world: int, timeout: float
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self._store, self._rank, self._world, self._timeout = store, rank, world, timeout
        self._parent = os.getppid()
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._stopped = False
        self._old_handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._old_bell = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self.activity = Activity(home=_home(), pid=os.getpid())
        self._heard, self._heard_at = -1, time.monotonic()
        self._steps, self._moved_at = -1, time.monotonic()
        self._seen: dict[int, Activity] = {}
        self._say()

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
                self.leave(1)
            if os.getppid() != self._parent:
                self.leave(1)

    def _look(self) -> None:
        """Leave where a rank has failed; fail where the next rank has died or this one hangs."""
        now = time.monotonic()
        if self._store.check(["failed"]):
            self.leave(json.loads(self._store.get("failed")))
        neighbour = self._peer((self._rank + 1) % self._world)
        if neighbour is not None and neighbour.beat != self._heard:
            self._heard, self._heard_at = neighbour.beat, now
        if neighbour is not None and self._gone(neighbour, now - self._heard_at):
            self._mourn((self._rank + 1) % self._world, neighbour)
        if self.activity.steps != self._steps:
            self._steps, self._moved_at = self.activity.steps, now
        if now - self._moved_at > self._timeout:
            self._too_long(now)

    def _too_long(self, now: float) -> None:
        """Fail where this rank hangs; where it waits, if no rank gets on for as long again."""
        before, self._seen = self._seen, {}
        for rank in range(self._world):
            peer = self._peer(rank)
            if peer is not None:
                self._seen[rank] = peer
        steps = {rank: peer.steps for rank, peer in self._seen.items()}
        if not self.activity.waiting or steps == {r: peer.steps for r, peer in before.items()}:
            self.fail(self._who_hangs(before), 1)
        self._moved_at = now

    def _terminated(self) -> None:
        """Say which rank has died where that is why the launcher ends this one, then leave."""
        for rank in range(self._world):
            peer = self._peer(rank)
            if peer is not None and self._gone(peer, 0.0):
                self._mourn(rank, peer)
        self.leave(128 + signal.SIGTERM)

    def _mourn(self, rank: int, peer: Activity) -> None:
        self.fail(f"rank {rank} died in phase `{peer.phase}`", 1)

    def _gone(self, other: Activity, silence: float) -> bool:
        """Whether a rank has died: on this machine its process tells, elsewhere its silence."""
        if other.done:
            return False
        if other.home == self.activity.home:
            return not _lives(other.pid)
        return silence > SILENT_SECONDS

    def stop(self) -> None:
        """This rank is done, and may go without being missed."""
        self._stopped = True
        os.write(self._bell, b"\0")
        self.join()
        self.activity.done = True
        self._say()
        signal.set_wakeup_fd(self._old_bell)
        signal.signal(signal.SIGTERM, self._old_handler)
        os.close(self._alarm)
        os.close(self._bell)

    def fail(self, message: str, code: int) -> None:
        """Claim a failure and end this process; where another rank was first, leave as it says."""
        if self._store.add("claims", 1) == 1:
            report_failure(message)
            self._store.set("failed", json.dumps(code))
            self.leave(code)
        found = self.verdict()
        self.leave(code if found is None else found)

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
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _say(self) -> None:
        self.activity.beat += 1
        self._store.set(f"alive/{self._rank}", json.dumps(asdict(self.activity)))

    def _peer(self, rank: int) -> Activity | None:
        """What a rank said last, or None where it has not begun."""
        key = f"alive/{rank}"
        return Activity(**json.loads(self._store.get(key))) if self._store.check([key]) else None

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
        return (
            f"rank {rank} made no progress for {self._timeout:g} s (engine.timeout) "
            f"in phase `{suspects[rank].phase}`, step {suspects[rank].steps}"
        )
