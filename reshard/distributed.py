"""Ranks: how they start, meet, exchange bytes, and how one that fails ends all.

Device, backend and rank come from accelerate's PartialState. Bytes cross on its process group (NCCL
on CUDA, Gloo on CPU); everything else goes over a Gloo group or the rendezvous store, never over
NCCL.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed import (  # type: ignore[attr-defined]  # not in the stubs
    HashStore,
    PrefixStore,
    distributed_c10d,
    rendezvous,
)

from reshard.backends import Word, agreed, own_word
from reshard.carrier import Carrier, Cuda, DeviceError, Host
from reshard.errors import DisagreementError, PeerError, ReshardError, first_line, told
from reshard.lastwords import end_with, report_failure
from reshard.logs import LOG
from reshard.meeting import (
    LAUNCHER,
    first_here,
    launched_rank,
    launched_world,
    meeting_place,
    remember_refusal,
    speaks,
)
from reshard.watcher import Activity, Place, Watcher

PATIENCE = timedelta(days=30)
REFUSAL_PATIENCE = timedelta(minutes=1)
T = TypeVar("T")


def end_with_launcher(over: Callable[[], bool]) -> None:
    """End this process soon after a launcher that has to live on, until `over`."""
    if LAUNCHER is not None:
        end_with(LAUNCHER, over, speaks=first_here())


def _meeting(limit: timedelta) -> dict[str, object]:
    """Where the ranks meet, as init_process_group takes it; {}: it finds out, or has done so."""
    place = meeting_place(limit)
    if place or launched_world() == 1 or dist.is_initialized():
        return place
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return {}
    store, rank, world = next(rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    return {"store": PrefixStore("ranks", store), "rank": rank, "world_size": world}


def _agreed(asked: str, limit: timedelta) -> tuple[Word, dict[str, object]]:
    """The backend of all ranks, and where they meet to use it."""
    rank, world = launched_rank(), launched_world()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    here = max(here, int(os.environ.get("LOCAL_RANK", "0")) + 1)  # not every launcher says both
    word = own_word(asked, here, alone=world == 1)
    patience = min(limit, REFUSAL_PATIENCE) if word.refusal else limit
    return agreed(word, rank, world, lambda: _meeting(patience))


def _meet(backend: str, limit: timedelta, place: dict[str, object]) -> PartialState:
    """The state of this process once all ranks have met, for which they have until `limit`."""
    several = launched_world() > 1
    if backend == "nccl":
        # Else NCCL's watchdog aborts a process whose peer is gone, before the watcher has said why
        # ("PYTORCH ProcessGroupNCCL Environment Variables" in torch's documentation).
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    with warnings.catch_warnings():  # of accelerate's choice of threads, which is ours
        warnings.simplefilter("ignore")
        return PartialState(
            cpu=backend == "gloo" or not several,
            backend=backend if several else None,
            timeout=limit,
            **place,
        )


def _own_store() -> distributed_c10d.Store:
    """The rendezvous store through a connection of our own, which no waiting call can block."""
    store = distributed_c10d._get_default_store()
    own: distributed_c10d.Store = store.clone()  # type: ignore[attr-defined]  # not in the stubs
    return distributed_c10d.PrefixStore("reshard", own)


class Ranks:
    """All ranks of a job, seen from one of them. A job of one rank needs no process group."""

    def __init__(self, backend: str = "auto", timeout: float = 1800.0) -> None:
        limit = timedelta(seconds=timeout + 60)
        word, place = _agreed(backend, limit)
        self.backend, self.remark = word.chosen, word.remark
        try:
            state = _meet(self.backend, limit, place)
            self.rank, self.world = state.process_index, state.num_processes
            self.device = state.device if self.backend == "nccl" else torch.device("cpu")
            self._control = self._control_group(limit)
        except RuntimeError as error:
            raise PeerError(f"the ranks could not meet: {first_line(error)}") from None
        self._carrier = Carrier(Cuda(self.device) if self.cuda else Host())
        store: distributed_c10d.Store = HashStore()
        torch.set_num_threads(1)  # copies of microseconds wait for no pool of threads
        if self.world > 1:
            # Once all have met, the watcher alone tells a rank that hangs from one that takes long.
            for group in (dist.group.WORLD, self._control):
                distributed_c10d._set_pg_timeout(PATIENCE, group)
            store = _own_store()
        here = Place(self.rank, self.world, speaks(), LAUNCHER)
        self._watcher = Watcher(store, here, timeout, remember_refusal)
        self._watcher.start()

    def _control_group(self, limit: timedelta) -> dist.ProcessGroup | None:
        """The group for all but the bytes, which is Gloo's; None for a rank that is alone."""
        if self.world > 1 and self.cuda:
            return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
        return dist.group.WORLD if self.world > 1 else None

    @property
    def first_here(self) -> bool:
        """Whether this rank is the first of its machine."""
        return first_here()

    @property
    def cuda(self) -> bool:
        """Whether bytes cross between GPUs."""
        return bool(self.device.type == "cuda")

    @property
    def activity(self) -> Activity:
        """What this rank says of itself."""
        return self._watcher.activity

    def phase(self, name: str) -> None:
        """Say what this rank does from here on."""
        self.step()
        if name != self.activity.phase:
            LOG.debug("phase %s", name)
        self._watcher.enter(name)

    def step(self) -> None:
        """Say that this rank has got on."""
        self._watcher.activity.steps += 1

    def resumable(self, under_way: bool) -> None:
        """Say whether the same command would now go on with what was done, should this job fail."""
        self._watcher.resumable = under_way

    def trouble(self, error: BaseException) -> None:
        """Have an error of another thread end all ranks, even while this one's main thread waits.

        Alone there is nobody to wait for: the main thread will come upon it. In a service the ranks
        live on: they settle it when they meet. That another rank is gone is for the watcher to say,
        who will know which.
        """
        lasting = self._watcher.farewell is not None or isinstance(error, PeerError)
        if self.world > 1 and not lasting:
            self._watcher.trouble(*told(error))

    def at_exit(self, cleanup: Callable[[], object]) -> None:
        """Call `cleanup` where this process is ended at once, from another thread."""
        self._watcher.cleanups.append(cleanup)

    def settle(self, error: ReshardError | None = None) -> None:
        """Wait for all ranks; an error that any of them has met is raised on all.

        Of several errors it is the lowest rank's. Every place where ranks meet begins with this, so
        that one that has failed meets the others, wherever they are, and no rank is left behind.
        """
        if self.world > 1:
            flag = torch.tensor([error is not None], dtype=torch.uint8)
            self._waiting(lambda: dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control))
            if flag.item():
                met = self._gathered(error)
                first = next(rank for rank, caught in enumerate(met) if caught is not None)
                error = error if first == self.rank else met[first]
        if error is not None:
            error.settled = True
            raise error

    def barrier(self, name: str) -> None:
        """Wait for all ranks, in the phase `name`."""
        self.phase(name)
        self.settle()

    def gather(self, value: T) -> list[T]:
        """What every rank gave, by rank; small picklable objects only."""
        self.settle()
        return self._gathered(value)

    def _gathered(self, value: T) -> list[T]:
        found: list[T] = [value] * self.world
        self._waiting(lambda: dist.all_gather_object(found, value, group=self._control))
        return found

    def agree(self, what: str, digest: str) -> None:
        """Stop unless all ranks computed the same."""
        found = self.gather(digest)
        if len(set(found)) > 1:
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            raise DisagreementError(
                f"rank {other} computed another {what} than rank 0; "
                "do all ranks see the same files?"
            )

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of some work; an error of any rank is raised on all ranks."""
        try:
            result = work()
        except PeerError:
            raise
        except ReshardError as error:
            if not error.settled:
                self.settle(error)
            raise
        self.settle()
        return result

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Exchange one flat message per peer.

        The buffers that messages lie in are as large on one rank as on another: where a device has
        to make room for them, all do so together, and an error of one is raised on all.
        """
        self.step()
        if self._carrier.lacks_room(received, sent):
            self._make_room(received, sent)
        self._waiting(lambda: self._carrier.carry(received, sent, received_bytes, sent_bytes))

    def _make_room(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Have the device make room for messages on all ranks, or on none."""
        try:
            self.together(lambda: self._carrier.make_room(received, sent))
        except ReshardError:
            self._carrier.give_back()
            raise

    def _waiting(self, call: Callable[[], object]) -> None:
        """Make a collective call; a peer that is gone is the watcher's business."""
        if self.world == 1:
            return
        activity: Activity = self._watcher.activity
        activity.waiting = True
        try:
            call()
        except DeviceError as error:
            # The others wait for messages, where none meets them: not in a service either.
            self._watcher.trouble(*told(error))
            raise
        except RuntimeError as error:
            raise PeerError(
                f"lost contact with another rank in phase `{activity.phase}` ({first_line(error)})"
            ) from None
        finally:
            activity.waiting = False

    def fail(self, message: str, code: int, *, secondary: bool) -> None:
        """End all ranks with one line; a `secondary` failure first waits for its cause to show.

        Returns only where there is no other rank.
        """
        if self.world == 1:
            if code == 2:
                remember_refusal()
            report_failure(self._watcher.line(message, code))
            self._watcher.stop()
            return
        try:
            if secondary and (found := self._watcher.verdict()) is not None:
                self._watcher.leave(found)
            self._watcher.fail(message, code)
        except RuntimeError:  # of the store, which went with whoever kept it
            self._watcher.abandoned()

    def endure(self, farewell: Callable[[], None]) -> None:
        """From here on SIGTERM is a good end, to which this rank says `farewell`, not a failure."""
        self._watcher.farewell = farewell

    def close(self) -> None:
        """Leave the job in good order."""
        self._watcher.stop()
