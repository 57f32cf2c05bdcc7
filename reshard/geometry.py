"""Boxes, and strided windows on flat buffers: the one idea. Pure.

A stored tensor is a flat buffer in a file. Each of its windows is a strided view of that buffer
which lies on a box (region) of one logical parameter. Resharding is: intersect boxes, copy windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub

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
        return tuple(map(sub, self.stop, self.start))

    @property
    def numel(self) -> int:
        """How many elements the box holds."""
        return math.prod(map(sub, self.stop, self.start))

    def __and__(self, other: "Region") -> "Region | None":
        """The common box, or None where the two do not meet."""
        # Most pairs do not meet, and a large plan has millions.
        for a, b, c, d in zip(self.start, other.start, self.stop, other.stop, strict=True):
            if (a if a > b else b) >= (c if c < d else d):
                return None
        return Region(
            tuple(map(max, self.start, other.start)), tuple(map(min, self.stop, other.stop))
        )

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


def disjoint(regions: Sequence[Region], apart: Sequence[Region] = ()) -> list[Region]:
    """Boxes that cover what `regions` and `apart` cover, each element once.

    Those of `apart` have no element in common.
    """
    covered = list(apart)
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


def item_name(key: str, start: Sequence[int]) -> str:
    """The name of one box of a tensor, where a file holds boxes under names of their own."""
    return f"{key}[{', '.join(map(str, start))}]"
