"""Boxes, strided windows on flat buffers, and how shards cut a parameter: the one idea. Pure.

A stored tensor is a flat buffer in a file. Each of its windows is a strided view of that buffer
which lies on a box (region) of one logical parameter. Resharding is: intersect boxes, copy windows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor of `shape`."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Region:
    """A half-open box `[start, stop)` of a logical parameter's index space."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The box's extent in each dim."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """How many elements the box holds."""
        return math.prod(self.shape)

    def __and__(self, other: "Region") -> "Region | None":
        """The common box, or None where the two do not meet."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Region(start, stop) if all(map(int.__lt__, start, stop)) else None

    def __sub__(self, other: "Region") -> "list[Region]":
        """What is left of this box without `other`, as disjoint boxes."""
        common = self & other
        if common is None:
            return [self]
        rest, start, stop = [], list(self.start), list(self.stop)
        for dim in range(len(start)):
            for low, high in ((start[dim], common.start[dim]), (common.stop[dim], stop[dim])):
                if low < high:
                    rest.append(
                        Region(
                            (*start[:dim], low, *start[dim + 1 :]),
                            (*stop[:dim], high, *stop[dim + 1 :]),
                        )
                    )
            start[dim], stop[dim] = common.start[dim], common.stop[dim]
        return rest


def whole(shape: Sequence[int]) -> Region:
    """The box of all of `shape`."""
    return Region((0,) * len(shape), tuple(shape))


def disjoint(regions: Sequence[Region]) -> list[Region]:
    """Boxes that cover what `regions` cover, each element once."""
    covered: list[Region] = []
    for region in regions:
        rest = [region]
        for taken in covered:
            rest = [piece for part in rest for piece in part - taken]
        covered += rest
    return covered


@dataclass(frozen=True, slots=True)
class Window:
    """A box of a parameter, and the strided view of a stored tensor's buffer that holds it.

    The element `region.start + i` is `buffer[offset + i . strides]`. Rotary heads that Meta stores
    interleaved, for instance, are two windows per head, each taking every second row:

        buffer rows   0  1  2  3  4  5        head of 6 rows
        parameter     0  3  1  4  2  5        rows 0-2: offset 0, rows 3-5: offset 1, row stride 2
    """

    region: Region
    offset: int
    strides: tuple[int, ...]

    def narrow(self, region: Region) -> "Window":
        """The part of this window that lies on `region`, which it must contain."""
        steps = zip(self.strides, region.start, self.region.start, strict=True)
        offset = self.offset + sum(stride * (new - old) for stride, new, old in steps)
        return Window(region, offset, self.strides)

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """This window of `buffer` (1-D, of the stored dtype), of shape `region.shape`."""
        return buffer.as_strided(
            self.region.shape, self.strides, buffer.storage_offset() + self.offset
        )


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

    def bounds(self, shard: int) -> tuple[int, int]:
        """The half-open range that `shard` holds; empty where the rows ran out."""
        start = min(self.size, shard // self.copies * self.step)
        return start, min(self.size, start + self.step)

    def shards(self, start: int, stop: int) -> range:
        """The shards that hold any of `[start, stop)`."""
        first, last = start // self.step, (stop - 1) // self.step
        return range(first * self.copies, min(self.parts, (last + 1) * self.copies))


def uncut(size: int, copies: int = 1) -> Cut:
    """All rows in each of `copies` shards."""
    return Cut(0, size, max(size, 1), parts=copies, copies=copies)


@dataclass(frozen=True, slots=True)
class Placement:
    """The geometry of one parameter in the shards of a stored tensor, without a name or a file.

    A shard's part of the parameter begins at element `offset` of the stored tensor and is row-major
    there. `stored` is the stored tensor's shape where it is more than that part (fused or padded).
    `interleaved` rows of a head are stored first half and second half in turn, as Meta's RoPE pairs
    them.
    """

    shape: tuple[int, ...]
    cut: Cut
    stored: tuple[int, ...] | None = None
    offset: int = 0
    interleaved: int = 0

    def region(self, shard: int) -> Region:
        """The box of the parameter that `shard` holds."""
        start, stop = [0] * len(self.shape), list(self.shape)
        start[self.cut.dim], stop[self.cut.dim] = self.cut.bounds(shard)
        return Region(tuple(start), tuple(stop))

    def stored_shape(self, shard: int) -> tuple[int, ...]:
        """The shape of the stored tensor that holds `shard`."""
        return self.stored or self.region(shard).shape

    def windows(self, shard: int, region: Region) -> tuple[Window, ...]:
        """The windows of the stored tensor of `shard` on `region`; none where they do not meet."""
        held = self.region(shard)
        common = held & region
        if common is None:
            return ()
        plain = Window(held, self.offset, row_major(held.shape))
        if not self.interleaved:
            return (plain.narrow(common),)
        return tuple(
            window.narrow(part)
            for window in self._half_heads(plain, common)
            if (part := window.region & common) is not None
        )

    def _half_heads(self, plain: Window, common: Region) -> Iterator[Window]:
        """Both halves of each head that `common` touches, each on every second stored row."""
        head, half, row = self.interleaved, self.interleaved // 2, plain.strides[0]
        origin = plain.region.start[0]
        strides = (2 * row, *plain.strides[1:])
        for first in range(common.start[0] // head * head, common.stop[0], head):
            for part in (0, 1):
                start = (first + part * half, *plain.region.start[1:])
                stop = (first + part * half + half, *plain.region.stop[1:])
                yield Window(
                    Region(start, stop), plain.offset + (first - origin + part) * row, strides
                )
