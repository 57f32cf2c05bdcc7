"""Whether boxes cover a tensor, each element once."""

from collections.abc import Iterator, Sequence
from itertools import islice

from reshard.geometry import Region

_MAX_IRREGULAR = 512  # boxes that no straight cut divides; each may be compared with each
_MAX_CUTS = 64


def fault(region: Region, boxes: Sequence[Region]) -> str | None:
    """What is wrong with `boxes` as a tiling of `region`, in which they all lie; None if nothing.

    Straight cuts divide the boxes until each stands alone, which takes n log n steps for the grids
    that sharding makes.
    """
    if region.numel == 0:
        return None
    return _fault(region, boxes, _MAX_CUTS)


def _fault(region: Region, boxes: Sequence[Region], cuts: int) -> str | None:
    if not boxes:
        return f"no stored box holds {shown(region)}"
    if len(boxes) == 1:
        rest = region - boxes[0]
        return f"no stored box holds {shown(rest[0])}" if rest else None
    for dim in range(len(region.start)) if cuts else ():
        slabs = list(_slabs(boxes, dim))
        if len(slabs) > 1:
            return _fault_of_slabs(region, slabs, dim, cuts - 1)
    return _fault_pairwise(region, boxes)


def _slabs(boxes: Sequence[Region], dim: int) -> Iterator[tuple[int, int, list[Region]]]:
    """Groups of boxes whose ranges in `dim` meet, in ascending order, with their common range."""
    group: list[Region] = []
    start = stop = 0
    for box in sorted(boxes, key=lambda box: box.start[dim]):
        if group and box.start[dim] >= stop:
            yield start, stop, group
            group = []
        if not group:
            start = stop = box.start[dim]
        group.append(box)
        stop = max(stop, box.stop[dim])
    yield start, stop, group


def _fault_of_slabs(
    region: Region, slabs: Sequence[tuple[int, int, list[Region]]], dim: int, cuts: int
) -> str | None:
    position = region.start[dim]
    for start, stop, group in slabs:
        if start > position:
            return f"no stored box holds {shown(_part(region, dim, position, start))}"
        found = _fault(_part(region, dim, start, stop), group, cuts)
        if found:
            return found
        position = stop
    if position < region.stop[dim]:
        return f"no stored box holds {shown(_part(region, dim, position, region.stop[dim]))}"
    return None


def _part(region: Region, dim: int, start: int, stop: int) -> Region:
    """The slab of `region` between two places of `dim`."""
    return Region(
        (*region.start[:dim], start, *region.start[dim + 1 :]),
        (*region.stop[:dim], stop, *region.stop[dim + 1 :]),
    )


def _fault_pairwise(region: Region, boxes: Sequence[Region]) -> str | None:
    """For boxes that no straight cut divides: two that overlap, or many like bricks."""
    if len(boxes) > _MAX_IRREGULAR:
        return f"the {len(boxes)} stored boxes in {shown(region)} overlap or form no grid"
    ascending = sorted(boxes, key=lambda box: box.start)
    for number, box in enumerate(ascending, 1):
        for other in islice(ascending, number, None):
            if box.stop and other.start[0] >= box.stop[0]:
                break
            if box & other:
                return f"the stored boxes {shown(box)} and {shown(other)} overlap"
    missing = region.numel - sum(box.numel for box in boxes)
    return f"no stored box holds {missing} elements of {shown(region)}" if missing else None


def shown(region: Region) -> str:
    """A box as it may appear in a message, like `[0:4, 8:16]`."""
    ranges = (f"{a}:{b}" for a, b in zip(region.start, region.stop, strict=True))
    return f"[{', '.join(ranges)}]"
