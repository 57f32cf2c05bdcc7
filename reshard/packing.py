"""From windows to runs: what to read or write in large steps, and how it lies in memory. Pure.

A part of a stored tensor is read as a few runs of consecutive elements, laid one after another in a
buffer. Its windows are then re-based on that buffer. In nearly all layouts a block has one run per
stored tensor.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from reshard.geometry import Region, Window, row_major
from reshard.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """`runs` are (first element, count) in the stored tensor; `windows` lie in a packed buffer."""

    runs: tuple[tuple[int, int], ...]
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy between two packed buffers, in elements."""

    shape: tuple[int, ...]
    source: tuple[int, tuple[int, ...]]
    target: tuple[int, tuple[int, ...]]

    def run(
        self, source: torch.Tensor, source_base: int, target: torch.Tensor, target_base: int
    ) -> None:
        """Copy, casting where the dtypes of the two flat tensors differ; bases are in elements."""
        there = target.as_strided(self.shape, self.target[1], target_base + self.target[0])
        there.copy_(source.as_strided(self.shape, self.source[1], source_base + self.source[0]))

    @property
    def numel(self) -> int:
        """How many elements are copied."""
        return math.prod(self.shape)

    def alike(self) -> bool:
        """Whether elements lie in the same way on both sides."""
        steps = zip(self.shape, self.source[1], self.target[1], strict=True)
        return all(size == 1 or here == there for size, here, there in steps)

    def apart(self, other: "Copy") -> tuple[int, int] | None:
        """How far behind this one a copy of the same form lies on both sides; None for others."""
        ours, theirs = ((c.shape, c.source[1], c.target[1]) for c in (self, other))
        if ours != theirs:
            return None
        steps = other.source[0] - self.source[0], other.target[0] - self.target[0]
        return steps if min(steps) > 0 else None

    def repeated(self, count: int, apart: tuple[int, int]) -> "Copy":
        """This copy and those that follow it at equal distances, as one with a dim more."""
        (source, inner), (target, outer) = self.source, self.target
        steps = (apart[0], *inner), (apart[1], *outer)
        return Copy((count, *self.shape), (source, steps[0]), (target, steps[1]))


def carry(
    steps: Sequence[Copy],
    source: torch.Tensor,
    source_base: int,
    target: torch.Tensor,
    target_base: int,
) -> int:
    """Copy from buffer to buffer; the bytes that were written."""
    for step in steps:
        step.run(source, source_base, target, target_base)
    return sum(step.numel for step in steps) * target.itemsize


@lru_cache(maxsize=1024)
def packed(
    placement: Placement, shard: int, region: Region, strides: tuple[int, ...] | None = None
) -> Packed:
    """The part `region` of a stored tensor, packed; `strides` are the file's if not row-major."""
    windows = placement.windows(shard, region)
    if strides is not None:
        shape = placement.stored_shape(shard)
        windows = tuple(_restride(window, shape, strides) for window in windows)
    runs: list[tuple[int, int]] = []
    rebased: list[Window] = []
    position = 0
    for cluster in _clusters(windows):
        start, stop = min(map(_first, cluster)), max(map(_last, cluster)) + 1
        if sum(window.region.numel for window in cluster) == stop - start:
            runs.append((start, stop - start))
            rebased += (Window(w.region, w.offset - start + position, w.strides) for w in cluster)
            position += stop - start
            continue
        for window in cluster:
            pieces, inner_strides = _row_runs(window)
            runs += pieces
            rebased.append(Window(window.region, position, inner_strides))
            position += window.region.numel
    return Packed(tuple(runs), tuple(sorted(rebased, key=lambda window: window.region.start)))


@lru_cache(maxsize=1024)
def plain(region: Region) -> Packed:
    """A region on its own, row-major, as it travels between ranks."""
    return Packed(((0, region.numel),), (Window(region, 0, row_major(region.shape)),))


@lru_cache(maxsize=2048)
def copies(source: Packed, target: Packed, region: Region) -> tuple[Copy, ...]:
    """The strided copies that carry `region` from one packed buffer to another."""
    found = []
    for ours in source.windows:
        here = ours.region & region
        for theirs in target.windows if here is not None else ():
            if theirs.region.start[0] >= ours.region.stop[0]:
                break
            common = here & theirs.region if here is not None else None
            if common is not None:
                one, other = ours.narrow(common), theirs.narrow(common)
                found.append(
                    Copy(common.shape, (one.offset, one.strides), (other.offset, other.strides))
                )
    return tuple(_merged(found))


def _merged(copies: list[Copy]) -> list[Copy]:
    """Fewer copies that do the same: halves of heads, and heads, at equal distances become one."""
    found: list[Copy] = []
    place = 0
    while place < len(copies):
        first, count = copies[place], 1
        apart = first.apart(copies[place + 1]) if place + 1 < len(copies) else None
        while apart is not None and place + count < len(copies):
            if copies[place + count - 1].apart(copies[place + count]) != apart:
                break
            count += 1
        found.append(first if apart is None else first.repeated(count, apart))
        place += count
    return found if len(found) == len(copies) else _merged(found)


@lru_cache(maxsize=2048)
def shift(source: Packed, target: Packed, region: Region) -> int | None:
    """Where in `source` a `target` of the one box `region` begins, if all of it lies there alike.

    It needs no copy then: it is already there.
    """
    found = copies(source, target, region)
    size = sum(count for _, count in target.runs)
    if sum(copy.numel for copy in found) != size:
        return None
    starts = {copy.source[0] - copy.target[0] for copy in found if copy.alike()}
    return starts.pop() if len(starts) == 1 and all(copy.alike() for copy in found) else None


def _first(window: Window) -> int:
    return window.offset


def _last(window: Window) -> int:
    """The last element that a window touches."""
    steps = zip(window.strides, window.region.shape, strict=True)
    return window.offset + sum(stride * (size - 1) for stride, size in steps)


def _clusters(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows grouped such that the elements of different groups do not interleave or touch."""
    group: list[Window] = []
    reached = -1
    for window in sorted(windows, key=_first):
        if group and window.offset > reached + 1:
            yield group
            group = []
        group.append(window)
        reached = max(reached, _last(window)) if len(group) > 1 else _last(window)
    if group:
        yield group


def _row_runs(window: Window) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """The runs of a window with gaps, in ascending order, and its strides once they are packed."""
    shape, order = (
        window.region.shape,
        sorted(range(len(window.strides)), key=lambda dim: window.strides[dim]),
    )
    inner = 1
    while order and (shape[order[0]] == 1 or window.strides[order[0]] == inner):
        inner *= shape[order.pop(0)]
    outer = order[::-1]
    offsets = [
        window.offset
        + sum(window.strides[dim] * place for dim, place in zip(outer, places, strict=True))
        for places in product(*(range(shape[dim]) for dim in outer))
    ]
    strides = list(window.strides)
    for place, dim in enumerate(outer):
        strides[dim] = inner * math.prod(shape[later] for later in outer[place + 1 :])
    return [(offset, inner) for offset in offsets], tuple(strides)


def _restride(window: Window, shape: tuple[int, ...], strides: tuple[int, ...]) -> Window:
    """The same window of a tensor that is stored with other than row-major strides."""

    def translate(distance: int) -> int:
        moved = 0
        for step, stride in zip(row_major(shape), strides, strict=True):
            places, distance = divmod(distance, step)
            moved += places * stride
        return moved

    return Window(window.region, translate(window.offset), tuple(map(translate, window.strides)))
