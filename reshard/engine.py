"""Runs a plan: read, exchange, write, overlapped, in buffers that are allocated once.

A round is a group of blocks that fits the buffers of every rank. While round `n` is exchanged and
permuted, round `n+1` is read and round `n-1` is written. In direct mode nothing crosses and ranks
do not meet.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TypeVar

from isal import isal_zlib

from reshard.buffers import (
    ALIGN,
    READING,
    WRITING,
    Buffer,
    Part,
    Places,
    as_it_lies,
    encoded,
    fill,
    joined,
    load,
    place_part,
    runs_of,
)
from reshard.casts import Losses
from reshard.checks import Check, checks_of
from reshard.earlier import Earlier
from reshard.journal import Journal, Record, Table
from reshard.layout import StoredTensor
from reshard.moves import Move
from reshard.packing import carry, copies, plain
from reshard.plan import Plan
from reshard.schedule import Round, rounds
from reshard.storage import Files
from reshard.units import size_text
from reshard.wire import Exchange, Letter, line_up

T = TypeVar("T")


@dataclass(slots=True)
class Counters:
    """Bytes that one rank has moved.

    `copied` are those that were copied in memory, between reading and writing and the exchange.
    """

    read: int = 0
    exchanged: int = 0
    written: int = 0
    resumed: int = 0
    copied: int = 0

    def text(self) -> str:
        """For a person."""
        return ", ".join(
            f"{item.name} {size_text(getattr(self, item.name))}" for item in fields(self)
        )


@dataclass(slots=True)
class _Loaded:
    """A round of which this rank has read its parts, and the moves that are still to be done."""

    round: Round
    moves: Sequence[Move]
    loaded: dict[tuple[int, int], list[Part]] = field(default_factory=dict)
    pieces: list[tuple[Part, Buffer]] = field(default_factory=list)

    def parts(self, place: int, copy: int) -> Sequence[Part]:
        """What was read of a copy for the move at `place`."""
        return self.loaded.get((place, copy), ())


class Engine:
    """One rank's part in a plan.

    `capacity` is the size of each buffer in bytes. `done` holds the runs that an earlier
    attempt has written and that are intact. `on_error` is told of an error in a thread of the
    engine's when it happens; `run` raises it when it comes upon it. `pinned` is what a GPU copies
    from and to.
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
        self._plan, self._rank = plan, rank
        self._source_files, self._source = source
        self._target_files, self._target = target
        self._exchange, self._journal, self._on_error = exchange, journal, on_error
        numbers = {file: number for number, file in enumerate(plan.target.files)}
        self._earlier = Earlier(done, self._target, numbers)
        self._reading = [Buffer(capacity) for _ in range(READING)]
        self._writing = [Buffer(capacity) for _ in range(WRITING)]
        crossing = exchange is not None
        self._sent = Buffer(capacity if crossing else 0, pinned=pinned)
        self._received = Buffer(capacity if crossing else 0, pinned=pinned)
        places = plan.source.places, plan.target.places
        sizes = {min(side[name][0].dtype.itemsize for side in places) for name in plan.names}
        self._unit = 1 if len(sizes) == 1 else max(sizes)
        self._capacity = capacity
        self.counters = Counters()
        self.checks: list[Check] = []
        # One for each thread that counts: where pieces are put together, and where it writes.
        self.losses = Losses(), Losses()
        self._resumed = [0, 0]

    def run(self, progress: Callable[[int], None]) -> None:
        """Go through all rounds; `progress` is called with the bytes of blocks that are done."""
        planned = rounds(self._plan, self._rank, self._capacity, ALIGN)
        with ThreadPoolExecutor(1, "reading") as reader, ThreadPoolExecutor(1, "writing") as writer:
            number, written = 0, None
            loading = self._begin(reader, self._load, planned, self._reading[0])
            try:
                while (current := loading.result()) is not None:
                    number += 1
                    room = self._reading[number % READING]
                    loading = self._begin(reader, self._load, planned, room)
                    source = self._reading[(number - 1) % READING]
                    target = self._writing[number % WRITING]
                    self._assemble(current, source, target)
                    if written is not None:
                        progress(written.result())
                    written = self._begin(writer, self._write, current)
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

    def _load(self, planned: Iterator[Round], buffer: Buffer) -> _Loaded | None:
        """Read what this rank owns of the next round."""
        planned_round = next(planned, None)
        if planned_round is None:
            return None
        moves = planned_round.moves
        current = _Loaded(planned_round, [move for move in moves if not self._earlier.has(move)])
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

    # Stage 2: exchange and permute.

    def _assemble(self, current: _Loaded, source: Buffer, target: Buffer) -> None:
        """Bring everything that this rank writes into `target`."""
        target.clear()
        arrived = self._swap(current, source)
        for place, move in enumerate(current.moves):
            own = current.parts(place, 0)
            for part in own:
                self.losses[0].count(part, source, move.pieces[0][1].dtype)
            for rank, stored in move.pieces:
                if rank == self._rank:
                    letters = arrived.get(place, ())
                    current.pieces.append(self._piece(stored, own, letters, source, target))
            self.checks += checks_of(move, partial(current.parts, place), source)

    def _piece(
        self,
        stored: StoredTensor,
        own: Sequence[Part],
        letters: Sequence[Letter],
        source: Buffer,
        target: Buffer,
    ) -> tuple[Part, Buffer]:
        """A piece and where it is: put together in `target`, or as it lies in `source`."""
        for part in own:
            ready = as_it_lies(part, stored, self._target)
            if ready is not None:
                return ready, source
        piece = place_part(stored, self._target, target)
        boxes = [(part.packed, part.stored.region, *part.within(source)) for part in own]
        for letter in letters:
            region, dtype = letter.message.region, letter.message.dtype
            first = letter.base // dtype.itemsize
            boxes.append((plain(region), region, self._received.view(dtype), first))
        for box in boxes:
            self.counters.copied += fill(piece, target, *box)
        return piece, target

    def _swap(self, current: _Loaded, source: Buffer) -> dict[int, list[Letter]]:
        """Exchange the messages of a round; where each that came lies in the buffer, by move."""
        if self._exchange is None or not current.round.crossing:
            return {}
        ends = current.moves, self._rank, self._plan.world, self._unit
        outgoing, sent_bytes = line_up(*ends, incoming=False)
        incoming, received_bytes = line_up(*ends, incoming=True)
        for letter in outgoing:
            region, dtype = letter.message.region, letter.message.dtype
            there, first = self._sent.view(dtype), letter.base // dtype.itemsize
            for part in current.parts(letter.place, 0):
                steps = copies(part.packed, plain(region), region)
                self.counters.copied += carry(steps, *part.within(source), there, first)
        # Nobody waits for the messages of a rank that has failed: it meets the others here.
        self._exchange.settle()
        self._exchange.all_to_all(
            self._received.bytes[: sum(received_bytes)],
            self._sent.bytes[: sum(sent_bytes)],
            received_bytes,
            sent_bytes,
        )
        self.counters.exchanged += sum(sent_bytes)
        arrived: dict[int, list[Letter]] = {}
        for letter in incoming:
            arrived.setdefault(letter.place, []).append(letter)
        return arrived

    # Stage 3: write.

    def _write(self, current: _Loaded) -> int:
        """Write and journal the pieces of a round; the bytes of its blocks."""
        records: list[Record] = []
        runs: list[tuple[str, int, memoryview]] = []
        for piece, buffer in current.pieces:
            number = self._earlier.numbers[piece.stored.file]
            for offset, room in runs_of(piece, buffer):
                coded = encoded(piece, room)
                self.losses[1].count_coded(piece.stored.slot.parameter, coded)
                view, crc = coded.memory, isal_zlib.crc32(coded.memory)
                if self._earlier.runs.get(number, offset) == crc:
                    self._resumed[1] += view.nbytes
                    continue
                records.append(Record(number, offset, view.nbytes, crc))
                runs.append((piece.stored.file, offset, view))
        for file, offset, views in joined(runs):
            self._target_files.write(file, offset, views)
        self._journal.append(records)
        return current.round.nbytes
