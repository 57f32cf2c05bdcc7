"""Ranks: how they start, meet, exchange bytes, and how one that fails ends all.

Device, backend and rank come from accelerate's PartialState. Bytes cross on its process group (NCCL
on CUDA, Gloo on CPU); everything else goes over a Gloo group or the rendezvous store, never over
NCCL.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import distributed_c10d

from reshard.errors import ConfigError, PeerError, ReshardError
from reshard.watcher import Activity, Watcher, report_failure

PATIENCE = timedelta(days=30)
T = TypeVar("T")


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
            self._control = dist.new_group(backend="gloo") if chosen == "nccl" else dist.group.WORLD
            # Once all have met, the watcher alone tells a rank that hangs from one that takes long.
            for group in (dist.group.WORLD, self._control):
                distributed_c10d._set_pg_timeout(PATIENCE, group)
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
        splits = list(received_bytes), list(sent_bytes)

        def between_devices() -> None:
            there = torch.empty_like(received, device=self.device)
            here = sent.to(self.device, non_blocking=True)
            dist.all_to_all_single(there, here, *splits)
            received.copy_(there, non_blocking=True)
            # The host buffers are used again as soon as this returns.
            torch.cuda.current_stream(self.device).synchronize()

        if self.cuda:
            self._waiting(between_devices)
        else:
            self._waiting(lambda: dist.all_to_all_single(received, sent, *splits))

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
        if secondary and (found := self._watcher.verdict()) is not None:
            self._watcher.leave(found)
        self._watcher.fail(message, code)

    def close(self) -> None:
        """Leave the job in good order."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None
