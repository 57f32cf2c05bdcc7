"""How the shards of a stored tensor cut a parameter, and in which order they hold its rows. Pure.

A stored tensor has an index space of its own, the one in which it is cut: that of the parameter,
or one in which rotary rows are interleaved, several parameters alternate by groups of heads, or a
further leading dim stacks them. `Placement` maps between the two.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from reshard.geometry import Region, Window, row_major, whole


@dataclass(frozen=True, slots=True)
class Cut:
    """How `parts` shards share `size` rows or columns of `dim`: `step` each, the last maybe fewer.

    With `copies` > 1, that many consecutive shards hold the same rows. This is `torch.chunk`'s rule
    where `step` is rounded up, the exact division of tensor parallelism where it is not.
    """

    dim: int
    size: int
    step: int
    parts: int = 1
    copies: int = 1

    def box(self, shard: int, shape: tuple[int, ...]) -> Region:
        """The box of a tensor of `shape` that `shard` holds; empty where the rows ran out."""
        low = min(self.size, shard // self.copies * self.step)
        high = min(self.size, low + self.step)
        return Region(
            tuple(low if dim == self.dim else 0 for dim in range(len(shape))),
            tuple(high if dim == self.dim else size for dim, size in enumerate(shape)),
        )

    def shards(self, region: Region) -> Iterable[int]:
        """The shards that may hold any of `region`."""
        first = region.start[self.dim] // self.step
        last = (region.stop[self.dim] - 1) // self.step
        return range(first * self.copies, min(self.parts, (last + 1) * self.copies))

    def edges(self) -> Sequence[int]:
        """The rows (dim 0) at which a shard begins; none where another dim is cut."""
        return range(0, self.size, self.step) if self.dim == 0 else range(1)


@lru_cache(maxsize=256)
def uncut(size: int, copies: int = 1) -> Cut:
    """All rows in each of `copies` shards."""
    return Cut(0, size, max(size, 1), parts=copies, copies=copies)


@lru_cache(maxsize=256)
def chunked(size: int, parts: int) -> Cut:
    """Dim 0 in `parts` shards as FSDP cuts it: torch.chunk's rule, the last ones maybe empty."""
    return Cut(0, size, max(1, -(-size // parts)), parts=parts)


class Boxes:
    """Shards that are any disjoint boxes: those of a mesh with two axes, or what a file says.

    Compared and printed by their digest: there may be thousands.
    """

    copies = 1

    def __init__(self, boxes: Iterable[Region]) -> None:
        self._boxes = tuple(boxes)
        self.parts = len(self._boxes)
        record = "".join(f"{box.start}{box.stop}" for box in self._boxes)
        self._digest = hashlib.sha256(record.encode()).hexdigest()
        self._order = sorted(
            (box.start[0], shard) for shard, box in enumerate(self._boxes) if box.numel
        )
        self._longest = max((box.shape[0] for box in self._boxes), default=0)
        self._edges = tuple(sorted({start for start, _ in self._order} | {0}))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Boxes) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Boxes({self._digest})"

    def box(self, shard: int, shape: tuple[int, ...]) -> Region:
        """The box that `shard` holds."""
        return self._boxes[shard]

    def shards(self, region: Region) -> Iterable[int]:
        """The shards that may hold any of `region`."""
        first = bisect_left(self._order, (region.start[0] - self._longest + 1,))
        last = bisect_left(self._order, (region.stop[0],))
        return [
            shard for _, shard in self._order[first:last] if self._boxes[shard] & region is not None
        ]

    def edges(self) -> Sequence[int]:
        """The rows (dim 0) at which a shard begins."""
        return self._edges


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of several parameters in turn: `rows` of this one from `first` on in every `stride`."""

    rows: int
    stride: int
    first: int

    def stored(self, row: int) -> int:
        """Where a row of the parameter stands."""
        return row // self.rows * self.stride + self.first + row % self.rows

    def before(self, stored: int) -> int:
        """How many rows of the parameter stand before a stored row."""
        group, within = divmod(stored, self.stride)
        return group * self.rows + min(max(within - self.first, 0), self.rows)


@dataclass(frozen=True, slots=True)
class Placement:
    """The geometry of one parameter in the shards of a stored tensor, without a name or a file.

    `cut` is in the stored index space. A shard's box begins at element `offset` of the stored
    tensor and is row-major there; `stored` is the stored tensor's shape where it is more than that
    box (fused or padded), or () for a tensor without dims, whose parameter has the shape (1,).
    `interleaved` rows of a head are stored first half and second half in turn, as Meta's RoPE pairs
    them. `groups` says which stored rows are this parameter's where others stand between them, and
    `lead` at which index of a further leading dim the parameter stands. `whole` is the stored
    index space where it is not the parameter's shape; rows that it has more, where nothing else
    explains them, are padding after those of the parameter.
    """

    shape: tuple[int, ...]
    cut: Cut | Boxes
    stored: tuple[int, ...] | None = None
    offset: int = 0
    interleaved: int = 0
    groups: Groups | None = None
    lead: int | None = None
    whole: tuple[int, ...] | None = None

    def box(self, shard: int) -> Region:
        """The box of the stored index space that `shard` holds."""
        return _box(self.cut, shard, self.whole or self.shape)

    def regions(self, shard: int) -> tuple[Region, ...]:
        """The boxes of the parameter that `shard` holds: more than one where it cuts a head."""
        return _regions(self, shard)

    def stored_shape(self, shard: int) -> tuple[int, ...]:
        """The shape of the stored tensor that holds `shard`."""
        return self.box(shard).shape if self.stored is None else self.stored

    def shards(self, region: Region) -> Iterable[int]:
        """The shards that may hold any of `region`."""
        return self.cut.shards(self._around(region))

    def phase(self, region: Region) -> tuple[object, int]:
        """How whole rows stand to shards, heads and groups; and the first shard that may hold any.

        As many rows of the same phase lie alike in as many shards from the first on.
        """
        row, cut = region.start[0], self.cut
        if isinstance(cut, Boxes):
            return row, 0
        around = self._around(region)
        shard, low = divmod(around.start[cut.dim], cut.step)
        if low + around.stop[cut.dim] - around.start[cut.dim] <= cut.step:
            low = -1  # all in one shard, wherever
        head = row % self.interleaved if self.interleaved else 0
        group = row % self.groups.rows if self.groups is not None else 0
        return (low, head, group), shard * cut.copies

    def edges(self) -> Sequence[int]:
        """The rows of the parameter at which a shard begins, where that is between two heads."""
        if self.lead is not None:
            return range(1)
        edges = self.cut.edges()
        if self.groups is not None:
            edges = tuple(sorted({self.groups.before(edge) for edge in edges}))
        elif self.whole is not None:
            edges = tuple(edge for edge in edges if edge < self.shape[0])
        if self.interleaved:
            edges = tuple(edge for edge in edges if edge % self.interleaved == 0)
        return edges

    def windows(self, shard: int, region: Region) -> tuple[Window, ...]:
        """The windows of the stored tensor of `shard` on `region`, which lies in one of its boxes.

        None where they do not meet.
        """
        found = []
        box = self.box(shard)
        for held in self.regions(shard):
            common = held & region
            if common is not None:
                found += [
                    unit.narrow(part)
                    for unit in self._units(box, common)
                    if (part := unit.region & common) is not None
                ]
        return tuple(found)

    # From the stored index space to the parameter's, and back.

    def own(self, box: Region) -> Region | None:
        """What of a stored box is this parameter's, in stored order; None where nothing is."""
        if box.numel == 0:
            return None
        if self.lead is not None:
            if not box.start[0] <= self.lead < box.stop[0]:
                return None
            return Region(box.start[1:], box.stop[1:])
        if self.groups is None:
            return box if self.whole is None else box & whole(self.shape)
        low, high = self.groups.before(box.start[0]), self.groups.before(box.stop[0])
        if low == high:
            return None
        return Region((low, *box.start[1:]), (high, *box.stop[1:]))

    def row_ranges(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """The parameter's rows that are stored in `[low, high)`, as ranges."""
        head = self.interleaved
        if not head:
            yield low, high
            return
        first, last = -(-low // head) * head, high // head * head
        if low % head:
            yield from _halves(low - low % head, low, min(high, first), head)
        if first < last:
            yield first, last
        if high % head and last >= low:
            yield from _halves(last, last, high, head)

    def _around(self, region: Region) -> Region:
        """A box of the stored index space that holds all of `region`."""
        low, high = region.start[0], region.stop[0]
        if self.interleaved:
            low = low // self.interleaved * self.interleaved
            high = -(-high // self.interleaved) * self.interleaved
        if self.groups is not None:
            low, high = self.groups.stored(low), self.groups.stored(high - 1) + 1
        start, stop = (low, *region.start[1:]), (high, *region.stop[1:])
        if self.lead is None:
            return Region(start, stop)
        return Region((self.lead, *start), (self.lead + 1, *stop))

    def _units(self, box: Region, common: Region) -> Iterator[Window]:
        """Windows on rows that lie evenly in the stored tensor of `box`, around `common`."""
        shape = box.shape if self.lead is None else box.shape[1:]
        strides, start = row_major(shape), box.start if self.lead is None else box.start[1:]
        base = self.offset - sum(map(int.__mul__, strides, start))
        if self.lead is not None:
            base += (self.lead - box.start[0]) * math.prod(shape)
        if not self.interleaved and self.groups is None:
            yield Window(common, base + sum(map(int.__mul__, strides, common.start)), strides)
            return
        columns = sum(map(int.__mul__, strides[1:], common.start[1:]))
        for low, high, stored, step in self._even_rows(common.start[0], common.stop[0]):
            region = Region((low, *common.start[1:]), (high, *common.stop[1:]))
            steps = (step * strides[0], *strides[1:])
            yield Window(region, base + stored * strides[0] + columns, steps)

    def _even_rows(self, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """Ranges of rows around `[low, high)`, the stored row of the first, and the step."""
        unit = self.interleaved or (self.groups.rows if self.groups else high)
        half = self.interleaved // 2
        for first in range(low // unit * unit, high, unit):
            stored = first if self.groups is None else self.groups.stored(first)
            if not half:
                yield first, first + unit, stored, 1
                continue
            for part in (0, 1):
                yield first + part * half, first + part * half + half, stored + part, 2


# Blocks ask for the same few shards again and again.
@lru_cache(maxsize=4096)
def _box(cut: Cut | Boxes, shard: int, shape: tuple[int, ...]) -> Region:
    return cut.box(shard, shape)


@lru_cache(maxsize=4096)
def _regions(placement: Placement, shard: int) -> tuple[Region, ...]:
    held = placement.own(placement.box(shard))
    if held is None:
        return ()
    tail, ends = held.start[1:], held.stop[1:]
    return tuple(
        Region((low, *tail), (high, *ends))
        for low, high in placement.row_ranges(held.start[0], held.stop[0])
    )


def _halves(start: int, low: int, high: int, head: int) -> Iterator[tuple[int, int]]:
    """The rows of the head at `start` that are stored interleaved in `[low, high)`."""
    for part in (0, 1):
        first, last = (low - start - part + 1) // 2, (high - start - part + 1) // 2
        if first < last:
            yield start + part * head // 2 + first, start + part * head // 2 + last
