"""Runs a plan: read, exchange, write, overlapped, in buffers that are allocated once.

A round is a group of blocks that fits the buffers of every rank. While round `n` is exchanged and
permuted, round `n+1` is read and round `n-1` is written. In direct mode nothing crosses and ranks
do not meet.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Protocol, TypeVar

import torch
from isal import isal_zlib

from reshard.buffers import (
    ALIGN,
    Buffer,
    Part,
    Places,
    encoded,
    joined,
    load,
    place_part,
    runs_of,
)
from reshard.casts import Losses, narrows
from reshard.checks import Check, checks_of
from reshard.errors import ConfigError
from reshard.geometry import Region
from reshard.journal import Journal, Record, Table
from reshard.layout import StoredTensor
from reshard.moves import Message, Move, wire_itemsize
from reshard.packing import Packed, copies, packed, plain
from reshard.plan import Plan
from reshard.storage import Files
from reshard.units import size_text

RESERVED_BYTES = 12 << 20
MAX_ROUND_BYTES = 16 << 20
T = TypeVar("T")


class Exchange(Protocol):
    """What carries one flat message per peer and round, once all ranks are ready for it."""

    def settle(self) -> None:
        """Wait for all ranks; raise on all of them an error that one has met."""

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Send `sent`, cut by rank into `sent_bytes`; fill `received` with what ranks sent here."""


@dataclass(slots=True)
class Counters:
    """Bytes that one rank has moved."""

    read: int = 0
    exchanged: int = 0
    written: int = 0
    resumed: int = 0

    def text(self) -> str:
        """For a person."""
        return ", ".join(
            f"{item.name} {size_text(getattr(self, item.name))}" for item in fields(self)
        )


@dataclass(slots=True)
class Round:
    """The moves of one round and the buffers that they are in.

    `nbytes` counts the blocks of the round, those included that an earlier attempt has finished.
    """

    moves: Sequence[Move]
    nbytes: int
    loaded: dict[tuple[int, int], list[Part]] = field(default_factory=dict)
    pieces: list[Part] = field(default_factory=list)

    def parts(self, place: int, copy: int) -> Sequence[Part]:
        """What was read of a copy for the move at `place`."""
        return self.loaded.get((place, copy), ())


def buffers_of(plan: Plan) -> int:
    """How many buffers a plan needs: two to read, two to write, one per direction of exchange."""
    return 4 if plan.exchange == "direct" or plan.world == 1 else 6


def least_memory(plan: Plan, least_capacity: int) -> int:
    """The least engine.memory that a plan can do with, in bytes, rounded up to MiB."""
    return -(-(RESERVED_BYTES + buffers_of(plan) * least_capacity) >> 20) << 20


def planned_memory(memory: int, plan: Plan) -> int:
    """What of `memory` a rank takes, in bytes."""
    return RESERVED_BYTES + buffers_of(plan) * round_bytes(memory, plan)


def round_bytes(memory: int, plan: Plan) -> int:
    """Bytes of `memory` that each buffer gets; too little is refused with the least that works."""
    least = plan.least_capacity(ALIGN)
    needed = least_memory(plan, least)
    if memory < needed:
        raise ConfigError(
            f"engine.memory: {memory / (1 << 20):g}MiB is too little for this plan; "
            f"the least that works is {needed >> 20}MiB"
        )
    share = (memory - RESERVED_BYTES) // buffers_of(plan)
    return max(least, min(MAX_ROUND_BYTES, share // ALIGN * ALIGN))


class Engine:
    """One rank's part in a plan.

    `capacity` is the size of each buffer in bytes. `done` holds the runs that an earlier
    attempt has written and that are intact. `on_error` is told of an error in a thread of the
    engine's when it happens; `run` raises it when it comes upon it.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        capacity: int,
        source: tuple[Files, Places],
        target: tuple[Files, Places],
        exchange: Exchange | None,
        journal: Journal,
        done: Table,
        pinned: bool = False,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._plan, self._rank, self._done = plan, rank, done
        self._source_files, self._source = source
        self._target_files, self._target = target
        self._exchange, self._journal, self._on_error = exchange, journal, on_error
        self._file_numbers = {file: number for number, file in enumerate(plan.target.files)}
        self._reading = [Buffer(capacity, pinned=pinned) for _ in range(2)]
        self._writing = [Buffer(capacity, pinned=pinned) for _ in range(2)]
        crossing = exchange is not None
        self._sent = Buffer(capacity if crossing else 0, pinned=pinned)
        self._received = Buffer(capacity if crossing else 0, pinned=pinned)
        places = plan.source.places, plan.target.places
        sizes = {min(side[name][0].dtype.itemsize for side in places) for name in plan.names}
        self._unit = 1 if len(sizes) == 1 else max(sizes)
        self._capacity = capacity
        self.counters = Counters()
        self.checks: list[Check] = []
        # One for each thread that counts: where it reads, and where it codes and writes.
        self.losses = Losses(), Losses()
        self._resumed = [0, 0]

    def run(self, progress: Callable[[int], None]) -> None:
        """Go through all rounds; `progress` is called with the bytes of blocks that are done."""
        rounds = self._plan.rounds(self._rank, self._capacity, ALIGN)
        with ThreadPoolExecutor(1, "reading") as reader, ThreadPoolExecutor(1, "writing") as writer:
            number, written = 0, None
            loading = self._begin(reader, self._load, rounds, self._reading[0])
            try:
                while (current := loading.result()) is not None:
                    number += 1
                    loading = self._begin(reader, self._load, rounds, self._reading[number % 2])
                    source, target = self._reading[(number - 1) % 2], self._writing[number % 2]
                    self._assemble(current, source, target)
                    if written is not None:
                        progress(written.result())
                    written = self._begin(writer, self._write, current, target)
                if written is not None:
                    progress(written.result())
            finally:
                reader.shutdown(cancel_futures=True)
                writer.shutdown(cancel_futures=True)
        self.counters.read = self._source_files.nbytes
        self.counters.written = self._target_files.nbytes
        self.counters.resumed = sum(self._resumed)

    def _begin(
        self, thread: ThreadPoolExecutor, work: Callable[..., T], *arguments: object
    ) -> "Future[T]":
        """Have another thread do a part; its error is told at once, whatever this one waits for."""

        def told() -> T:
            try:
                return work(*arguments)
            except BaseException as error:
                self._on_error(error)
                raise

        return thread.submit(told)

    # Stage 1: read.

    def _load(self, rounds: Iterator[Sequence[Move]], buffer: Buffer) -> Round | None:
        """Read what this rank owns of the next round."""
        moves = next(rounds, None)
        if moves is None:
            return None
        blocks = sum(move.block.region.numel * move.pieces[0][1].dtype.itemsize for move in moves)
        current = Round([move for move in moves if not self._finished(move)], blocks)
        self._resumed[0] += self._own_bytes(moves) - self._own_bytes(current.moves)
        wanted = [
            (place, stored)
            for place, move in enumerate(current.moves)
            for rank, stored in move.reads
            if rank == self._rank
        ]
        buffer.clear()
        parts = load([stored for _, stored in wanted], self._source_files, self._source, buffer)
        for (place, stored), part in zip(wanted, parts, strict=True):
            current.loaded.setdefault((place, stored.copy), []).append(part)
        return current

    def _own_bytes(self, moves: Sequence[Move]) -> int:
        """Bytes of the pieces that this rank writes."""
        pieces = (pair for move in moves for pair in move.pieces)
        return sum(piece.nbytes for rank, piece in pieces if rank == self._rank)

    def _finished(self, move: Move) -> bool:
        """Whether an earlier attempt wrote all of a move, and nothing of it has to be looked at.

        Copies are compared, and losses of a cast counted, over all that is moved.
        """
        wanted = move.pieces[0][1]
        if not len(self._done) or wanted.slot.encoding is not None:
            return False
        if any(stored.copy or narrows(stored.dtype, wanted.dtype) for _, stored in move.reads):
            return False
        return all(self._written(piece) for _, piece in move.pieces)

    def _written(self, piece: StoredTensor) -> bool:
        offset, _ = self._target.locate(piece)
        number = self._file_numbers[piece.file]
        runs = packed(piece.slot.placement, piece.shard, piece.region).runs
        return all(
            self._done.get(number, offset + piece.bytes_of(first)) is not None for first, _ in runs
        )

    # Stage 2: exchange and permute.

    def _assemble(self, current: Round, source: Buffer, target: Buffer) -> None:
        """Bring everything that this rank writes into `target`."""
        target.clear()
        arrived = self._swap(current, source)
        for place, move in enumerate(current.moves):
            own = current.parts(place, 0)
            for part in own:
                self.losses[0].count(part, source, move.pieces[0][1].dtype)
            for rank, stored in move.pieces:
                if rank != self._rank:
                    continue
                piece = place_part(stored, self._target, target)
                current.pieces.append(piece)
                for part in own:
                    flat = source.view(part.stored.dtype)
                    _carry(part.packed, flat, part.element(), piece, target, part.stored.region)
                for message, base in arrived.get(place, ()):
                    dtype = _wire_dtype(message, stored)
                    flat = self._received.view(dtype)
                    box, first = plain(message.region), base // dtype.itemsize
                    _carry(box, flat, first, piece, target, message.region)
            self.checks += checks_of(move, partial(current.parts, place), source)

    def _swap(self, current: Round, source: Buffer) -> dict[int, list[tuple[Message, int]]]:
        """Exchange the messages of a round; where each that came lies in the buffer, by move."""
        if self._exchange is None or not any(move.messages for move in current.moves):
            return {}
        outgoing, sent_bytes = self._line_up(current, incoming=False)
        incoming, received_bytes = self._line_up(current, incoming=True)
        for place, message, base in outgoing:
            dtype = _wire_dtype(message, current.moves[place].pieces[0][1])
            there, first = self._sent.view(dtype), base // dtype.itemsize
            for part in current.parts(place, 0):
                for copy in copies(part.packed, plain(message.region), message.region):
                    copy.run(source.view(part.stored.dtype), part.element(), there, first)
        # Nobody waits for the messages of a rank that has failed: it meets the others here.
        self._exchange.settle()
        self._exchange.all_to_all(
            self._received.bytes[: sum(received_bytes)],
            self._sent.bytes[: sum(sent_bytes)],
            received_bytes,
            sent_bytes,
        )
        self.counters.exchanged += sum(sent_bytes)
        arrived: dict[int, list[tuple[Message, int]]] = {}
        for place, message, base in incoming:
            arrived.setdefault(place, []).append((message, base))
        return arrived

    def _line_up(
        self, current: Round, *, incoming: bool
    ) -> tuple[list[tuple[int, Message, int]], list[int]]:
        """The messages from (or to) this rank, each with its offset, and the bytes per peer.

        Both ends walk the same moves, so both find the same order. Where dtypes are mixed, wide
        elements come first and a peer's bytes are rounded up, so that every message is aligned.
        """
        by_peer: dict[int, list[tuple[int, int, Message]]] = {}
        for place, move in enumerate(current.moves):
            for message in move.messages:
                ends = (message.reader, message.writer)
                here, peer = ends[::-1] if incoming else ends
                if here == self._rank:
                    size = wire_itemsize(message, move.pieces[0][1])
                    by_peer.setdefault(peer, []).append((size, place, message))
        lined_up, per_peer, position = [], [], 0
        for peer in range(self._plan.world):
            start = position
            for size, place, message in sorted(by_peer.get(peer, ()), key=lambda item: -item[0]):
                lined_up.append((place, message, position))
                position += size * message.region.numel
            position = start + -(-(position - start) // self._unit) * self._unit
            per_peer.append(position - start)
        return lined_up, per_peer

    # Stage 3: write.

    def _write(self, current: Round, target: Buffer) -> int:
        """Write and journal the pieces of a round; the bytes of its blocks."""
        records: list[Record] = []
        runs: list[tuple[str, int, memoryview]] = []
        for piece in current.pieces:
            number = self._file_numbers[piece.stored.file]
            for offset, room in runs_of(piece, target):
                coded = encoded(piece, room)
                self.losses[1].count_coded(piece.stored.slot.parameter, coded)
                view, crc = coded.memory, isal_zlib.crc32(coded.memory)
                if self._done.get(number, offset) == crc:
                    self._resumed[1] += view.nbytes
                    continue
                records.append(Record(number, offset, view.nbytes, crc))
                runs.append((piece.stored.file, offset, view))
        for file, offset, views in joined(runs):
            self._target_files.write(file, offset, views)
            self._target_files.push(file, offset, sum(v.nbytes for v in views))
        self._journal.append(records)
        return current.nbytes


def _wire_dtype(message: Message, target: StoredTensor) -> torch.dtype:
    """The dtype in which a message travels: the narrower of the two."""
    return min(message.stored.dtype, target.dtype, key=lambda dtype: dtype.itemsize)


def _carry(
    box: Packed, flat: torch.Tensor, base: int, piece: Part, target: Buffer, region: Region
) -> None:
    """Copy what a packed box, which holds `region`, has of a piece."""
    common = region & piece.stored.region
    if common is not None:
        there = target.view(piece.stored.dtype)
        for copy in copies(box, piece.packed, common):
            copy.run(flat, base, there, piece.element())
