"""What a plan moves, counted element by element from its assignment of readers and writers.

Every element of the model has a number; windows say where in a stored tensor it stands. Nothing
else of the arithmetic by which a plan comes to its figures is used.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reshard.geometry import Window
from reshard.layout import Layout, StoredTensor
from reshard.moves import Load, Move
from reshard.plan import Plan
from reshard.schedule import least_capacity, moved, rounds

Ids = NDArray[np.int64]
Place = tuple[str, str]
Ranks = tuple[int, ...]

NOBODY = -1
NOTHING = np.zeros(0, np.int64)
# Bytes of 32 elements in ggml's quantised blocks: 4, 5 or 8 bits each, and one or two float16.
BYTES_OF_32 = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}


@dataclass(frozen=True)
class Tensor:
    """Which element stands at each place, and who has touched it; `of_32` have so many bytes."""

    number: int
    file: str
    coordinate: int
    ids: Ids
    ranks: Ids
    of_32: int

    def nbytes(self, elements: int) -> int:
        """Bytes of as many elements."""
        found, rest = divmod(elements * self.of_32, 32)
        assert not rest, "a part of a quantised block"
        return found

    def by_rank(self, world: int) -> Ids:
        """Bytes that each rank has touched."""
        counts = np.bincount(self.ranks[self.ranks != NOBODY], minlength=world)
        return np.array([self.nbytes(int(count)) for count in counts])


def over(window: Window, buffer: Ids) -> Ids:
    """The window of a buffer, as an array of the window's shape."""
    steps = [step * buffer.itemsize for step in window.strides]
    return np.lib.stride_tricks.as_strided(buffer[window.offset :], window.region.shape, steps)


def boxed(window: Window) -> tuple[slice, ...]:
    """The window's region as an index of its parameter."""
    return tuple(map(slice, window.region.start, window.region.stop))


def numbered(layout: Layout) -> dict[str, Ids]:
    """A number for every element of every parameter."""
    found: dict[str, Ids] = {}
    first = 0
    for name, slots in layout.places.items():
        shape = slots[0].placement.shape
        found[name] = np.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    return found


def tensors_of(layout: Layout, elements: Mapping[str, Ids]) -> dict[Place, Tensor]:
    """All stored tensors in the layout's order; several parameters may share one."""
    found: dict[Place, Tensor] = {}
    for slot in layout.slots:
        coded = BYTES_OF_32[slot.encoding.name] if slot.encoding else 32 * slot.dtype.itemsize
        for shard in range(slot.placement.cut.parts):
            place = slot.file_of(shard), slot.key_of(shard)
            for region in slot.placement.regions(shard):
                for window in slot.placement.windows(shard, region):
                    room = np.full(math.prod(slot.placement.stored_shape(shard)), NOBODY)
                    facts = len(found), place[0], slot.coordinate_of(shard)
                    tensor = found.setdefault(place, Tensor(*facts, room, room.copy(), coded))
                    there = over(window, tensor.ids)
                    assert (there == NOBODY).all(), f"{place}: two elements in one place"
                    there[...] = elements[slot.parameter][boxed(window)]
    return found


def first_places(tensors: Mapping[Place, Tensor], count: int) -> Ids:
    """For every element the number of the first stored tensor that holds it."""
    found = np.full(count, NOBODY)
    for tensor in reversed(tensors.values()):
        found[tensor.ids[tensor.ids != NOBODY]] = tensor.number
    assert (found != NOBODY).all(), "elements that the source does not hold"
    return found


@dataclass
class Share:
    """Bytes of some tensors by rank, of which one block has `block` at most: `ranks` share them."""

    ranks: Ranks
    touched: Ids
    block: int = 0

    def own(self) -> list[int]:
        """What those who share have touched, which is all."""
        found = [int(self.touched[rank]) for rank in self.ranks]
        assert sum(found) == self.touched.sum(), "others than those who share have touched some"
        return found


@dataclass
class Count:
    """What comes of a plan; all bytes are by rank.

    `read` and `written` are the shares of the ranks of each coordinate, told apart by who sees the
    files. `fair` is what nearest writers write where ties are split evenly. `blocks` are the most
    bytes that one block has a rank read and write. `files` has the writers of each target file.
    """

    loads: list[Load]
    read: dict[object, Share] = field(default_factory=dict)
    written: dict[object, Share] = field(default_factory=dict)
    fair: Ids = field(default_factory=lambda: np.zeros(0))
    blocks: tuple[int, int] = (0, 0)
    files: dict[str, Ids] = field(default_factory=dict)


def concerned(move: Move) -> set[int]:
    """The ranks that have a part in a move."""
    return {rank for rank, _ in (*move.reads, *move.pieces)}


def moves_of(plan: Plan) -> Iterator[Move]:
    """Every move of the job; in direct mode by rank, each of which has its own."""
    for rank in range(plan.world if plan.exchange == "direct" else 1):
        for name, blocks in moved(plan, rank):
            for block in blocks:
                yield plan.move(plan.block(name, block))


def moves_by(plan: Plan, rank: int) -> list[Move]:
    """What a rank goes through, in rounds as small as can be."""
    groups = rounds(plan, rank, least_capacity(plan, 1), 1)
    return [move for group in groups for move in group.moves]


def sharing(place: int, places: int, ranks: Sequence[int]) -> Ranks:
    """Those of some ranks that share the work of one of so many places."""
    if places >= len(ranks):
        return (ranks[place % len(ranks)],)
    return tuple(rank for number, rank in enumerate(ranks) if number % places == place)


class Ledger:
    """Goes through the moves of a plan, and marks who touches what."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.elements = plan, numbered(plan.source)
        self.count = sum(table.size for table in self.elements.values())
        self.source = tensors_of(plan.source, self.elements)
        self.target = tensors_of(plan.target, self.elements)
        self.first = first_places(self.source, self.count)
        self.readers = np.full(self.count, NOBODY)
        self.needed, self.sent, self.senders, self.received = ([NOTHING] for _ in range(4))
        self.found = Count([Load() for _ in range(plan.world)], fair=np.zeros(plan.world))
        self.shares = self._shares_of_reading()

    def _shares_of_reading(self) -> list[Share]:
        """For each source tensor, by number, the share of those who read what it belongs to."""
        plan, places = self.plan, dict[Ranks, set[int]]()
        everyone = tuple(range(plan.world))
        for slot in plan.source.slots:
            for shard in range(slot.placement.cut.parts):
                if (seen := plan.local.get(slot.file_of(shard))) is not None:
                    places.setdefault(seen, set()).add(slot.coordinate_of(shard))
        shares = []
        for tensor in self.source.values():
            seen = plan.local.get(tensor.file)
            known = range(plan.source.coordinates) if seen is None else sorted(places[seen])
            ranks = sharing(known.index(tensor.coordinate), len(known), seen or everyone)
            share = Share(ranks, np.zeros(plan.world, np.int64))
            shares.append(self.found.read.setdefault((tensor.coordinate, seen), share))
        return shares

    def touch(self, tensor: Tensor, stored: StoredTensor, rank: int) -> Ids:
        """Mark a part of a stored tensor as touched by a rank, for the first time; its elements."""
        for window in stored.windows:
            ranks = over(window, tensor.ranks)
            assert (ranks == NOBODY).all(), f"`{tensor.file}`: twice"
            ranks[...] = rank
        return np.concatenate([over(window, tensor.ids).ravel() for window in stored.windows])

    def take(self, rank: int, move: Move) -> None:
        """A rank's own part of a block."""
        of_share, read, written = Counter[int](), 0, 0
        for stored in (stored for reader, stored in move.reads if reader == rank):
            tensor = self.source[stored.file, stored.key]
            ids = self.touch(tensor, stored, rank)
            first = self.first[ids] == tensor.number
            assert first.all() if stored.copy == 0 else not first.any()
            self.readers[ids[first]] = rank
            share, nbytes = self.shares[tensor.number], tensor.nbytes(len(ids))
            of_share[id(share)] += nbytes
            share.block = max(share.block, of_share[id(share)])
            read += nbytes
        for piece in (piece for writer, piece in move.pieces if writer == rank):
            tensor = self.target[piece.file, piece.key]
            ids = self.touch(tensor, piece, rank)
            self.needed.append(ids * self.plan.world + rank)
            self._split_fairly(ids, tensor.nbytes(len(ids)))
            written += tensor.nbytes(len(ids))
        for message in move.messages:
            box = tuple(map(slice, message.region.start, message.region.stop))
            pairs = self.elements[move.block.parameter][box].ravel() * self.plan.world
            if message.reader == rank:
                self.sent.append(pairs + message.writer)
                self.senders.append(np.full(len(pairs), rank))
            if message.writer == rank:
                self.received.append(pairs + rank)
        blocks = self.found.blocks
        self.found.blocks = max(blocks[0], read), max(blocks[1], written)

    def _split_fairly(self, ids: Ids, nbytes: int) -> None:
        """Count a piece for those who may hold most of it, in equal parts."""
        held: Counter[Ranks] = Counter()
        for number, count in zip(*np.unique(self.first[ids], return_counts=True), strict=True):
            held[self.shares[number].ranks] += int(count)
        best = [ranks for ranks, count in held.items() if count == max(held.values())]
        for ranks in best:
            self.found.fair[list(ranks)] += nbytes / len(best) / len(ranks)

    def close(self) -> Count:
        """What it comes to, with every element touched wherever it stands, and none besides."""
        found, world = self.found, self.plan.world
        for tensor in (*self.source.values(), *self.target.values()):
            assert ((tensor.ids == NOBODY) == (tensor.ranks == NOBODY)).all(), tensor.file
        for tensor, share in zip(self.source.values(), self.shares, strict=True):
            touched = tensor.by_rank(world)
            share.touched += touched
            self._load("read", touched)
        places = self.plan.target.coordinates
        for tensor in self.target.values():
            touched = tensor.by_rank(world)
            ranks = sharing(tensor.coordinate, places, range(world))
            share = Share(ranks, np.zeros(world, np.int64), found.blocks[1])
            found.written.setdefault(tensor.coordinate, share).touched += touched
            found.files.setdefault(tensor.file, np.zeros(world, np.int64))
            found.files[tensor.file] += touched
            self._load("written", touched)
        self._cross()
        if self.plan.writers == "nearest" and not self.plan.machines:
            self._check_nearest()
        return found

    def _check_nearest(self) -> None:
        """Who writes a piece has read as much of it as anyone."""
        for pairs in self.needed[1:]:
            held = np.bincount(self.readers[pairs // self.plan.world], minlength=self.plan.world)
            assert held[pairs[0] % self.plan.world] == held.max(), "not the nearest"

    def _cross(self) -> None:
        """Who writes an element and has not read it gets it once, in the narrower dtype."""
        world = self.plan.world
        pairs = np.unique(np.concatenate(self.needed))
        ids, writers = pairs // world, pairs % world
        lacking = self.readers[ids] != writers
        sent = np.concatenate(self.sent)
        assert np.array_equal(np.sort(sent), pairs[lacking]), "more or less is sent than is lacking"
        assert np.array_equal(self.readers[sent // world], np.concatenate(self.senders))
        assert np.array_equal(np.sort(np.concatenate(self.received)), pairs[lacking])
        width = np.zeros(self.count, np.int64)
        for name, table in self.elements.items():
            sides = self.plan.source.places[name], self.plan.target.places[name]
            width[table] = min(slots[0].dtype.itemsize for slots in sides)
        sizes = width[ids[lacking]]
        for kind, ranks in (("received", writers), ("sent", self.readers[ids])):
            self._load(kind, np.bincount(ranks[lacking], weights=sizes, minlength=world))

    def _load(self, kind: str, nbytes: NDArray[np.generic]) -> None:
        for load, more in zip(self.found.loads, nbytes, strict=True):
            setattr(load, kind, getattr(load, kind) + int(more))


def counted(plan: Plan) -> Count:
    """What a plan moves."""
    ledger = Ledger(plan)
    for move in moves_of(plan):
        for rank in concerned(move):
            ledger.take(rank, move)
    return ledger.close()
