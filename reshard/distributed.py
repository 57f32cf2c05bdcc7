"""Ranks: how they start, meet, exchange bytes, and how one that fails ends all.

Device, backend and rank come from accelerate's PartialState. Bytes cross on its process group (NCCL
on CUDA, Gloo on CPU); everything else goes over a Gloo group or the rendezvous store, never over
NCCL.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import distributed_c10d

from reshard.errors import ConfigError, PeerError, ReshardError

T = TypeVar("T")
BEAT_SECONDS = 0.5
DEAD_SECONDS = 4.0
VERDICT_SECONDS = 6.0


def launched_rank() -> int:
    """The rank that the launcher gave this process, before any group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world() -> int:
    """The number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_backend(asked: str, local_ranks: int, devices: int) -> tuple[str, str | None]:
    """The backend for `local_ranks` on a machine with `devices` GPUs.

    The second value is a remark where the choice is not the obvious one.
    """
    if asked == "gloo":
        return "gloo", None
    if asked == "nccl":
        if devices == 0:
            raise ConfigError(
                "engine.backend=nccl: no CUDA device was found; use engine.backend=gloo"
            )
        if local_ranks > devices:
            raise ConfigError(
                f"engine.backend=nccl: {local_ranks} ranks on this machine, but {devices} GPUs; "
                f"NCCL wants a GPU for each, so start --nproc-per-node {devices}, "
                "or use engine.backend=gloo"
            )
        return "nccl", None
    if devices == 0:
        return "gloo", None
    if local_ranks > devices:
        return "gloo", f"{local_ranks} ranks on {devices} GPUs: using Gloo on CPU"
    return "nccl", None


def report_failure(message: str) -> None:
    """The one line that says what went wrong."""
    print(f"reshard: {message}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Activity:
    """What a rank is doing, for the one that looks for the rank that hangs."""

    phase: str = "start"
    steps: int = 0
    waiting: bool = False


class Watcher(threading.Thread):
    """Ends this process within seconds when any rank has failed, died, or makes no progress.

    Each rank says in the store that it lives, and watches the next rank. The first to find an error
    claims it, prints its line and leaves; the others leave with the same exit code, silently.
    """

    def __init__(
        self, store: distributed_c10d.Store, rank: int, world: int, timeout: float
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self._store, self._rank, self._world, self._timeout = store, rank, world, timeout
        self._stopped = threading.Event()
        self._parent = os.getppid()
        self.activity = Activity()

    def run(self) -> None:
        """Look around until stopped; a store that is gone means that the job is gone."""
        neighbour, last, changed = (self._rank + 1) % self._world, "", time.monotonic()
        seen, moved = -1, time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            try:
                self._say(str(now))
                if self._store.check(["failed"]):
                    self.leave(json.loads(self._store.get("failed"))["code"])
                alive = self._peer(neighbour)
                if alive != last or alive.startswith("done"):
                    last, changed = alive, now
                if self.activity.steps != seen:
                    seen, moved = self.activity.steps, now
                if now - changed > DEAD_SECONDS:
                    phase = self._phase(last)
                    self.fail(f"rank {neighbour} died or stopped answering in phase `{phase}`", 1)
                if now - moved > self._timeout:
                    self.fail(self._who_hangs(), 1)
            except (dist.DistError, RuntimeError, OSError):
                self.leave(1)
            if os.getppid() != self._parent:
                self.leave(1)

    def stop(self) -> None:
        """This rank is done, and may go without being missed."""
        self._stopped.set()
        self.join()
        self._say("done")

    def fail(self, message: str, code: int) -> None:
        """Claim a failure and end this process; where another rank was first, leave as it says."""
        if self._store.add("claims", 1) == 1:
            self._store.set("failed", json.dumps({"code": code}))
            report_failure(message)
            self.leave(code)
        self.leave(self.verdict(code))

    def verdict(self, code: int) -> int:
        """The exit code of the failure that was claimed, or `code` where none comes up."""
        until = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < until:
            if self._store.check(["failed"]):
                return int(json.loads(self._store.get("failed"))["code"])
            time.sleep(BEAT_SECONDS / 5)
        return code

    def leave(self, code: int) -> None:
        """End this process at once, whatever its other threads wait for."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _say(self, text: str) -> None:
        doing = self.activity
        self._store.set(
            f"alive/{self._rank}", f"{text}|{doing.steps}|{int(doing.waiting)}|{doing.phase}"
        )

    def _peer(self, rank: int) -> str:
        return (
            self._store.get(f"alive/{rank}").decode()
            if self._store.check([f"alive/{rank}"])
            else ""
        )

    @staticmethod
    def _phase(alive: str) -> str:
        return alive.split("|")[3] if alive.count("|") == 3 else "start"

    def _who_hangs(self) -> str:
        """Name the rank that works without getting on while the others wait for it."""
        states = [(rank, self._peer(rank).split("|")) for rank in range(self._world)]
        busy = [
            (int(state[1]), rank) for rank, state in states if len(state) == 4 and state[2] == "0"
        ]
        steps, rank = min(busy or [(self.activity.steps, self._rank)])
        phase = self._phase(self._peer(rank))
        return (
            f"rank {rank} made no progress for {self._timeout:g} s (engine.timeout) "
            f"in phase `{phase}`, step {steps}"
        )


def _own_store() -> distributed_c10d.Store:
    """The rendezvous store through a connection of our own, which no waiting call can block."""
    store = distributed_c10d._get_default_store()
    own: distributed_c10d.Store = store.clone()  # type: ignore[attr-defined]  # not in the stubs
    return distributed_c10d.PrefixStore("reshard", own)


class Ranks:
    """All ranks of a job, seen from one of them. A job of one rank needs no process group."""

    def __init__(self, backend: str = "auto", timeout: float = 1800.0) -> None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        chosen, self.remark = choose_backend(backend, local, torch.cuda.device_count())
        limit = timedelta(seconds=timeout + 60)
        state = PartialState(
            cpu=chosen == "gloo", backend=chosen if launched_world() > 1 else None, timeout=limit
        )
        self.rank, self.world = state.process_index, state.num_processes
        self.device = state.device if chosen == "nccl" else torch.device("cpu")
        self.backend = chosen
        self._watcher: Watcher | None = None
        self._control: dist.ProcessGroup | None = None
        if self.world > 1:
            torch.set_num_threads(1)
            self._control = (
                dist.new_group(backend="gloo", timeout=limit)
                if chosen == "nccl"
                else dist.group.WORLD
            )
            self._watcher = Watcher(_own_store(), self.rank, self.world, timeout)
            self._watcher.start()

    @property
    def cuda(self) -> bool:
        """Whether bytes cross between GPUs."""
        return self.device.type == "cuda"

    def phase(self, name: str) -> None:
        """Say what this rank does from here on."""
        if self._watcher is not None:
            self._watcher.activity.phase = name
            self.step()

    def step(self) -> None:
        """Say that this rank has got on."""
        if self._watcher is not None:
            self._watcher.activity.steps += 1

    def barrier(self, name: str) -> None:
        """Wait for all ranks, in the phase `name`."""
        self.phase(name)
        self._waiting(lambda: dist.barrier(group=self._control))

    def gather(self, value: T) -> list[T]:
        """What every rank gave, by rank; small picklable objects only."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        self._waiting(lambda: dist.all_gather_object(found, value, group=self._control))
        return found

    def agree(self, what: str, digest: str) -> None:
        """Stop unless all ranks computed the same."""
        found = self.gather(digest)
        if len(set(found)) > 1:
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            raise PeerError(
                f"rank {other} computed another {what} than rank 0; "
                "do all ranks see the same files?"
            )

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of some checks; an error of any rank is raised on all ranks.

        Of several errors it is the lowest rank's.
        """
        error: ReshardError | None = None
        try:
            result = work()
        except ReshardError as caught:
            error = caught
        errors = [caught for caught in self.gather(error) if caught is not None]
        if errors:
            raise errors[0]
        return result

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Exchange one flat message per peer.

        On CUDA, host buffers are pinned and staged through the device.
        """
        self.step()
        there = torch.empty_like(received, device=self.device) if self.cuda else received
        here = sent.to(self.device, non_blocking=True) if self.cuda else sent
        self._waiting(
            lambda: dist.all_to_all_single(there, here, list(received_bytes), list(sent_bytes))
        )
        if self.cuda:
            received.copy_(there)

    def _waiting(self, call: Callable[[], object]) -> None:
        """Make a collective call; a peer that is gone is the watcher's business."""
        if self.world == 1:
            return
        activity = self._watcher.activity if self._watcher is not None else Activity()
        activity.waiting = True
        try:
            call()
        except RuntimeError as error:
            first = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise PeerError(
                f"lost contact with another rank in phase `{activity.phase}` ({first[:120]})"
            ) from None
        finally:
            activity.waiting = False

    def fail(self, message: str, code: int, *, secondary: bool) -> None:
        """End all ranks with one line; a `secondary` failure first waits for its cause to show."""
        if self._watcher is None:
            report_failure(message)
            return
        if secondary:
            found = self._watcher.verdict(-1)
            if found >= 0:
                self._watcher.leave(found)
        self._watcher.fail(message, code)

    def close(self) -> None:
        """Leave the job in good order."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None
