"""Where the blocks of a parameter begin and end, and what those of alike parameters have in common.

A block is whole rows of one parameter (whole heads where rows belong to rotary heads): the unit of
work. All here follows by arithmetic from the two layouts' placements. Pure.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from reshard.encodings import stored_bytes
from reshard.geometry import Region, whole
from reshard.layout import Slot, stored_on

MAX_BLOCK_BYTES = 4 << 20
MIN_BLOCK_BYTES = 4 << 10
BLOCKS_AIMED_AT = 1024
# Where a parameter has more shards than this, those of less than an eighth of a block are taken
# together.
MANY_SHARDS = 256

# The ranks that a shard's blocks are dealt out over: a number of theirs for each shard of a place.
GroupNumbers = Sequence[int]
# The first shard of each place that a block may lie in, on both sides.
Firsts = tuple[tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=256)
def row_bounds(
    rows: int, rows_per_block: int, grain: int, cuts: frozenset[Sequence[int]]
) -> tuple[int, ...]:
    """Where the blocks of a parameter begin, and where it ends.

    A block has at most `rows_per_block` rows, a multiple of `grain`. It ends where a shard of
    either layout ends (`cuts`: the rows at which shards begin), so that its rows have one home,
    unless that would cut a head, or there are many small shards.
    """
    edges = {edge for cut in cuts for edge in cut if edge < rows and edge % grain == 0}
    ordered = sorted(edges | {0, rows})
    bounds = [0]
    for start, stop in pairwise(_merged(ordered, rows_per_block)):
        units = -(-(stop - start) // grain)
        count = -(-units * grain // max(rows_per_block, grain))
        bounds += [min(stop, start + units * part // count * grain) for part in range(1, count + 1)]
    return tuple(bounds)


def _merged(edges: Sequence[int], rows_per_block: int) -> Iterator[int]:
    """The edges, without those of small shards inside of blocks where there are many."""
    place, many = 0, len(edges) > MANY_SHARDS
    while place < len(edges):
        yield (start := edges[place])
        place += 1
        if many and place < len(edges) and edges[place] - start < rows_per_block // 8:
            place = bisect_right(edges, start + rows_per_block) - 1


def block_bytes(total: int) -> int:
    """The block size for a model of `total` bytes: 4 MiB, or less for a small model."""
    return min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, 1 << (total // BLOCKS_AIMED_AT).bit_length()))


def geometry(slots: Sequence[Slot]) -> object:
    """The places of a parameter without their names."""
    return tuple((slot.placement, slot.dtype, slot.encoding) for slot in slots)


def volume(slots: Sequence[Slot]) -> int:
    """Bytes of all places of one parameter."""
    return sum(
        stored_bytes(slot.placement.shape, slot.dtype, slot.encoding) * slot.placement.cut.copies
        for slot in slots
    )


def bounds_of(slots: Sequence[Slot], size: int) -> tuple[int, ...]:
    """The rows at which the blocks of a parameter begin, and its end; blocks of `size` bytes."""
    shape = slots[0].placement.shape
    row_numel = whole(shape[1:]).numel
    if not shape[0] * row_numel:
        return (0,)
    itemsize = max(slot.dtype.itemsize for slot in slots)
    grain = max(1, *(slot.placement.interleaved for slot in slots))
    rows = max(1, size // (row_numel * itemsize) // grain) * grain
    return row_bounds(shape[0], rows, grain, frozenset(slot.placement.edges() for slot in slots))


def rows_of(slots: Sequence[Slot], start: int, stop: int) -> Region:
    """The rows `[start, stop)` of a parameter."""
    tail = slots[0].placement.shape[1:]
    return Region((start, *(0 for _ in tail)), (stop, *tail))


class Seat(NamedTuple):
    """One part of a block: a rank of a group does it, and the ranks of a group take turns.

    `group` numbers the groups of a form, and `turn` counts the blocks of the parameter before this
    one in which a rank of the group has a part.
    """

    group: int
    turn: int


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What parameters have in common that are cut alike.

    By block: its shape (blocks of one shape have the same parts at the same distance from their
    first row), the first shard of each place on both sides, and its seats: one for each part that
    is read, and one for each piece where the target's shards have groups. `order` is that in which
    blocks are moved. `groups` are (side, group) pairs, and `taken` has for each the bytes of its
    turns. A block puts no more on a rank than `bulk` bytes in `parts` parts, read, sent, received
    or written.
    """

    order: tuple[int, ...]
    shapes: tuple[object, ...]
    firsts: tuple[Firsts, ...]
    seats: tuple[tuple[Seat, ...], ...]
    groups: tuple[tuple[int, int], ...]
    taken: tuple[tuple[int, ...], ...]
    bulk: int
    parts: int


def form_of(
    sides: Sequence[Sequence[Slot]],
    groups: Sequence[Sequence[GroupNumbers]],
    bounds: tuple[int, ...],
) -> Form:
    """The form of a parameter: its places on both sides, and for each the groups of its shards.

    A side without groups takes no seats.
    """
    shapes: list[object] = []
    firsts: list[Firsts] = []
    parts: dict[object, list[_Part]] = {}
    table = _Seats(groups)
    form_itself = object()  # tells the shapes of this form from those of all others
    for start, stop in pairwise(bounds):
        rows = rows_of(sides[0], start, stop)
        phases = [[slot.placement.phase(rows) for slot in side] for side in sides]
        first = tuple(shard for _, shard in phases[0]), tuple(shard for _, shard in phases[1])
        shape = (form_itself, stop - start, *(phase for side in phases for phase, _ in side))
        if shape not in parts:
            parts[shape] = list(_parts(sides, rows, first))
        shapes.append(shape)
        firsts.append(first)
        table.add(parts[shape], first)
    numel, messages = _most(parts.values())
    return Form(
        _shards_in_turn(sides[0][0], bounds),
        tuple(shapes),
        tuple(firsts),
        tuple(table.seats),
        tuple(table.numbers),
        tuple(map(tuple, table.taken)),
        numel * max(slot.dtype.itemsize for side in sides for slot in side),
        messages,
    )


class _Part(NamedTuple):
    """A part of a block: its shard, counted from the first one of its place, and its size."""

    side: int
    place: int
    shard: int
    nbytes: int
    numel: int


def _parts(sides: Sequence[Sequence[Slot]], rows: Region, first: Firsts) -> Iterator[_Part]:
    """What is read of some rows, and what is written, in order."""
    for side, slots in enumerate(sides):
        # Places are told apart by identity: equal ones may hold a parameter twice.
        places = {id(slot): place for place, slot in enumerate(slots)}
        for stored in stored_on(slots, rows):
            place = places[id(stored.slot)]
            shard = stored.shard - first[side][place]
            yield _Part(side, place, shard, stored.nbytes, stored.region.numel)


def _most(blocks: Iterable[Sequence[_Part]]) -> tuple[int, int]:
    """The most elements that a side of a block has, and the most messages that it takes."""
    numel = parts = 0
    for block in blocks:
        read, written = ([part for part in block if part.side == side] for side in (0, 1))
        numel = max(numel, *(sum(part.numel for part in side) for side in (read, written)))
        # Pieces of one place are disjoint. One of another place may be wanted around all others.
        boxes = len(written) ** (2 if any(part.place for part in written) else 1)
        parts = max(parts, len(read) * boxes)
    return numel, parts


class _Seats:
    """The seats of block after block."""

    def __init__(self, groups: Sequence[Sequence[GroupNumbers]]) -> None:
        self._groups = groups
        self.seats: list[tuple[Seat, ...]] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self.taken: list[list[int]] = []

    def add(self, parts: Iterable[_Part], first: Firsts) -> None:
        """Give each part of the next block a seat; all of one group have the same turn."""
        seats: list[Seat] = []
        began: dict[int, int] = {}
        for side, place, shard, nbytes, _ in parts:
            if not self._groups[side]:
                continue
            key = side, self._groups[side][place][first[side][place] + shard]
            group = self.numbers.setdefault(key, len(self.numbers))
            if group == len(self.taken):
                self.taken.append([])
            if group not in began:
                began[group] = len(self.taken[group])
                self.taken[group].append(0)
            self.taken[group][-1] += nbytes
            seats.append(Seat(group, began[group]))
        self.seats.append(tuple(seats))


def _shards_in_turn(slot: Slot, bounds: Sequence[int]) -> tuple[int, ...]:
    """The blocks, one of each source shard in turn, to keep all readers busy."""
    blocks = range(len(bounds) - 1)
    if len(slot.placement.edges()) == 1:
        return tuple(blocks)
    seen: dict[int, int] = {}
    keyed = []
    for block in blocks:
        shard = next(iter(slot.placement.shards(rows_of([slot], *bounds[block : block + 2]))))
        seen[shard] = seen.get(shard, 0) + 1
        keyed.append((seen[shard], shard, block))
    return tuple(block for *_, block in sorted(keyed))
