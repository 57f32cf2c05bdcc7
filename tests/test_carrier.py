"""Messages through a device: the order of stages, whose bytes arrive, and what fails in one line.

A CPU stands in for the GPU, one that does everything as late as it may. CUDA itself is tried where
there are two GPUs.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reshard import distributed, job
from reshard.carrier import Carrier, Cuda, DeviceError, Host
from reshard.distributed import Ranks
from reshard.errors import PeerError, ReshardError, told
from tests import jobs
from tests.commands import done, move, read, write
from tests.interrupted import SMALL_ROUNDS, Undisturbed, wide
from tests.launched import SHIM, ours, start
from tests.oracles.compare import assert_same, assert_same_files
from tests.ranks import run_ranks
from tests.settings import Job, Ready

ROUND = ["copy in", "exchange", "copy out", "synchronise"]
POISON = 0xEE


class Late:
    """A device that begins nothing before it is waited for, as a stream may.

    Whatever an operation is to fill holds poison until then, and the device's memory afterwards.
    """

    name, apart = "late:0", True

    def __init__(self) -> None:
        self.queue = deque[Callable[[], object]]()
        self.rooms: list[torch.Tensor] = []
        self.order: list[str] = []

    def empty(self, nbytes: int) -> torch.Tensor:
        """Poison."""
        self.rooms.append(torch.full((nbytes,), POISON, dtype=torch.uint8))
        return self.rooms[-1]

    def _later(self, what: str, to: torch.Tensor, work: Callable[[], object]) -> None:
        self.order.append(what)
        to.fill_(POISON)
        self.queue.append(work)

    def _own(self, tensor: torch.Tensor) -> bool:
        places = [room.untyped_storage().data_ptr() for room in self.rooms]
        return tensor.untyped_storage().data_ptr() in places

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy later, from or to the memory of this device."""
        assert self._own(to) != self._own(source)
        what = "copy in" if self._own(to) else "copy out"
        self._later(what, to, lambda: to.copy_(source))

    def exchange(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Exchange later, what lies in the memory of this device."""
        assert self._own(received)
        assert self._own(sent)
        splits = list(received_bytes), list(sent_bytes)
        self._later("exchange", received, lambda: dist.all_to_all_single(received, sent, *splits))

    def synchronise(self) -> None:
        """Do it all, in turn."""
        self.order.append("synchronise")
        while self.queue:
            self.queue.popleft()()
        for room in self.rooms:
            room.fill_(POISON)


def through(device: Any) -> Ranks:
    """All ranks, whose messages go through a device."""
    ranks = Ranks()
    ranks._carrier = Carrier(device)
    return ranks


# The engine.


def convert(items: Sequence[Ready]) -> list[tuple[list[str], list[int], int]]:
    """What one rank does; what its device did of each job, and how many bytes were exchanged."""
    seen = []
    for item in items:
        late = Late()
        ranks = through(late)
        report = job.run(item.config(ranks.world), ranks, force=False, say=print)
        ranks.barrier("done")
        ranks.close()
        exchanged = sum(figures.counters.exchanged for figures in report.ranks)
        seen.append((late.order, [room.nbytes for room in late.rooms], exchanged))
    return seen


def test_a_job_through_a_device_that_is_late_has_the_bytes_of_any_other(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Rounds go through the same four stages in the same two buffers, on every rank."""
    held = write("tp2pp2", tmp_path / "src")
    items = [
        Job(undisturbed.source, tmp_path / "tp2", "tp2", (SMALL_ROUNDS,), source_spec="meta4"),
        Job(held, tmp_path / "hf", "hf", ("dst.dtype=float32",), "least", "tp2pp2"),
    ]
    ready = [item.ready() for item in items]
    by_rank = run_ranks(3, convert, ready, timeout=60)
    assert_same_files(tmp_path / "tp2", undisturbed["tp2"])
    assert_same(read("tp2", tmp_path / "tp2"), wide())
    done(*move("tp2pp2", held, "hf", tmp_path / "plain"), "dst.dtype=float32")
    assert_same_files(tmp_path / "hf", tmp_path / "plain")
    for found in by_rank:
        for (order, rooms, exchanged), least in zip(found, (6, 2), strict=True):
            rounds = len(order) // len(ROUND)
            assert order == ROUND * rounds
            assert rounds >= least
            assert len(rooms) == 2
            assert rooms[0] == rooms[1]
            assert exchanged > 0


# Messages.

WORLD, CAPACITY = 3, 1001


def splits(turn: int) -> list[list[int]]:
    """Bytes from each rank to each: odd, none to some, none at all."""
    chance = random.Random(turn)
    most = 0 if turn % 7 == 0 else CAPACITY // WORLD
    return [
        [chance.choice([0, 1, most, chance.randint(0, most)]) * (most > 0) for _ in range(WORLD)]
        for _ in range(WORLD)
    ]


def message(turn: int, writer: int, reader: int, nbytes: int) -> bytes:
    """What one rank sends to one; never poison."""
    chance = random.Random(turn * 100 + writer * 10 + reader)
    return bytes(chance.randrange(POISON) for _ in range(nbytes))


def exchange(turns: int) -> tuple[list[bool], list[int]]:
    """What one rank does: through a late device, and the host as it is."""
    late = Late()
    ranks, held = through(late), [torch.empty(CAPACITY, dtype=torch.uint8) for _ in range(2)]
    good = []
    for turn in range(turns):
        table = splits(turn)
        out, come = table[ranks.rank], [row[ranks.rank] for row in table]
        sent, received = held[0][: sum(out)], held[1][: sum(come)]
        packed = b"".join(message(turn, ranks.rank, peer, n) for peer, n in enumerate(out))
        expected = b"".join(message(turn, peer, ranks.rank, n) for peer, n in enumerate(come))
        for carrier in (ranks._carrier, Carrier(Host())):
            plain, ranks._carrier = ranks._carrier, carrier
            sent.copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else sent)
            received.fill_(POISON)
            ranks.all_to_all(received, sent, come, out)
            good.append(bytes(received.numpy()) == expected)
            ranks._carrier = plain
        if turn == turns // 2:  # as the next job of a service may have
            held = [torch.empty(2 * CAPACITY, dtype=torch.uint8) for _ in range(2)]
    ranks.barrier("done")
    ranks.close()
    return good, [room.nbytes for room in late.rooms]


def test_messages_of_any_size_arrive_in_two_buffers() -> None:
    """Made for the host's whole buffers at the first message, and again where these are larger."""
    for good, rooms in run_ranks(WORLD, exchange, 40, timeout=60):
        assert len(good) == 80
        assert all(good)
        assert rooms == [CAPACITY] * 2 + [2 * CAPACITY] * 2


def test_on_the_cpu_a_message_is_exchanged_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dist, "all_to_all_single", lambda *given: calls.append(given))
    monkeypatch.setattr(torch, "empty", None)
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    received, sent = torch.zeros(5, dtype=torch.uint8), torch.ones(3, dtype=torch.uint8)
    carrier = Carrier(Host())
    assert not carrier.lacks_room(received, sent)
    carrier.carry(received, sent, (5, 0), (1, 2))
    ((to, of, *given),) = calls
    assert to is received
    assert of is sent
    assert given == [[5, 0], [1, 2]]


# Failures.


def run_out(failing: int) -> list[str]:
    """What one rank does, whose device has no room at first; it then has, and all go on."""
    late = Late()
    ranks, full = through(late), torch.full((ranks_bytes := 1 << 20,), 7, dtype=torch.uint8)
    there = torch.empty(ranks_bytes, dtype=torch.uint8)
    half, said = [ranks_bytes // 2] * 2, []
    room, made = Late.empty, 0

    def empty(nbytes: int) -> torch.Tensor:
        nonlocal made
        made += 1
        if ranks.rank == failing and made == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.\nmore")
        return room(late, nbytes)

    late.empty = empty  # type: ignore[method-assign]
    for _ in range(2):
        try:
            ranks.all_to_all(there, full, half, half)
            said.append(f"{int(there.min())} {int(there.max())} {len(late.rooms)}")
        except ReshardError as error:
            said += map(str, told(error))
    ranks.barrier("done")
    ranks.close()
    return said


def test_a_gpu_without_room_fails_the_job_on_all_ranks_and_no_more() -> None:
    line = (
        "`late:0`: no room for two buffers of 1 MiB; end what else runs on that GPU, give a "
        "smaller engine.memory, or use engine.backend=gloo"
    )
    one, other = run_ranks(2, run_out, 1, timeout=60)
    assert one == [line, "1", "7 7 4"]
    assert other == [line, "1", "7 7 3"]


class Failing(Host):
    """A device on which CUDA fails while others wait."""

    name = "cuda:1"

    def synchronise(self) -> None:
        """Fail."""
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore lines")


def fail(rank: int) -> None:
    """Give one rank a device that fails; it then does not meet the others in the exchange."""
    if rank == 1:
        Failing.exchange = lambda *given: None  # type: ignore[method-assign]
        distributed.Host = Failing  # type: ignore[misc]


def test_a_gpu_that_fails_ends_all_ranks_in_a_line(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    with jobs.start(3, words, tmp_path / "said", fail) as ended:
        assert ended.wait(30) == [1, 1, 1]
        assert ended.err == (
            "reshard: `cuda:1` failed (CUDA error: uncorrectable ECC error encountered); look at "
            "`nvidia-smi` and `dmesg` of its machine, or use engine.backend=gloo; the same command "
            "goes on where this one stopped\n"
        )


def test_what_nccl_says_of_a_peer_is_no_failure_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*given: object) -> None:
        raise dist.DistBackendError("NCCL error: remote process exited")

    monkeypatch.setattr(Host, "exchange", lost)
    flat = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(dist.DistBackendError, match="remote process exited"):
        Carrier(Host()).carry(flat, flat, (1, 1), (1, 1))
    assert not issubclass(DeviceError, PeerError)


# CUDA.


class Stream:
    """What a stream is asked for."""

    def __init__(self, asked: list[object]) -> None:
        self._asked = asked

    def synchronize(self) -> None:
        """Take note."""
        self._asked.append("synchronised")


def test_the_calls_of_a_gpu_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be seen on a CPU."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: Stream(asked))
    monkeypatch.setattr(dist, "all_to_all_single", lambda to, of, *cut: asked.append((to, of, cut)))
    copied = torch.Tensor.copy_

    def copy(to: torch.Tensor, of: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        asked.append(non_blocking)
        return copied(to, of)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    held = torch.arange(8, dtype=torch.uint8)
    carrier = Carrier(Cuda(torch.device("cpu")))
    carrier.make_room(held, held)
    carrier.carry(held[:3], held[:5], (3, 0), (4, 1))
    into, (to, of, cut), out, waited = asked
    assert (into, out, waited) == (True, True, "synchronised")
    assert (len(to), len(of), cut) == (3, 5, ([3, 0], [4, 1]))
    assert bytes(of.numpy()) == bytes(range(5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_gives_the_bytes_of_gloo(undisturbed: Undisturbed, tmp_path: Path) -> None:
    words = move("meta4", undisturbed.source, "tp2", tmp_path / "dst")
    found = start([*SHIM, "-m", "reshard", *words, SMALL_ROUNDS, "engine.backend=nccl"], tmp_path)
    assert (found.returncode, ours(found.stderr)) == (0, [])
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])
