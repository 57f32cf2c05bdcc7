"""Where the elements of logical parameters live inside a checkpoint's files.

A stored tensor is a flat buffer in a file. Each of its windows is a strided view of that buffer
which lies on a box (region) of one logical parameter. Resharding is: intersect boxes, copy windows.
Nothing here reads a file or knows a format, and a layout is never a list: stored tensors are made
on demand.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from reshard.errors import LayoutError


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
class Parameter:
    """A logical tensor of a model, in Hugging Face's name, shape and row order.

    `dim` is the dim that tensor parallelism cuts (None: replicated). `head` is the number of rows
    of one attention head where rows belong to heads (0: they do not); `rotary` heads are the ones
    whose rows some formats interleave.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    dtype: torch.dtype
    dim: int | None = None
    head: int = 0
    rotary: bool = False


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


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of one parameter in a checkpoint: a stored tensor per shard of its placement.

    `file` is a template with `{shard}`. Shard `s` belongs to the mesh coordinate `coordinate + s`.
    Copies of a parameter must agree to the bit where `strict`; where not, the first one is taken.
    """

    parameter: str
    placement: Placement
    file: str
    key: str
    dtype: torch.dtype
    coordinate: int = 0
    strict: bool = True


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One named tensor in one file, and the part `region` of a parameter that was asked for.

    `copy` is 0 for the tensor that is read for this region, and counts the further places of it.
    """

    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    coordinate: int
    region: Region
    slot: Slot
    shard: int
    copy: int

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows of this tensor's buffer on the region."""
        return self.slot.placement.windows(self.shard, self.region)

    @property
    def nbytes(self) -> int:
        """Bytes of the region that was asked for."""
        return self.region.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Content:
    """A stored tensor as its file's header names it.

    The last `padding` elements belong to no parameter.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    padding: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stored tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Constant:
    """A stored tensor that follows from the model's config: `data` is its bytes in the file."""

    file: str
    content: Content
    data: bytes


def no_metadata(template: str, shard: int) -> Mapping[str, str]:
    """The header metadata of a format that has none."""
    return {}


@dataclass(frozen=True)
class Layout:
    """A whole checkpoint without a byte of data: a table of slots, expanded on demand.

    `container` names the module that knows the files' bytes, `coordinates` how many mesh
    coordinates own the stored tensors, `metadata` gives a file's header metadata by its template
    and shard.
    """

    name: str
    container: str
    coordinates: int
    slots: tuple[Slot, ...]
    constants: tuple[Constant, ...] = ()
    metadata: Callable[[str, int], Mapping[str, str]] = field(default=no_metadata, compare=False)

    @cached_property
    def places(self) -> Mapping[str, tuple[Slot, ...]]:
        """The slots of each parameter, in order."""
        table: dict[str, list[Slot]] = {}
        for slot in self.slots:
            table.setdefault(slot.parameter, []).append(slot)
        return {name: tuple(slots) for name, slots in table.items()}

    @cached_property
    def _shards_of(self) -> Mapping[str, tuple[str, int]]:
        """For each file, in order: the template it is named by, and its shard."""
        parts: dict[str, int] = {}
        for slot in self.slots:
            parts[slot.file] = max(parts.get(slot.file, 0), slot.placement.cut.parts)
        return {
            template.format(shard=shard): (template, shard)
            for template, count in parts.items()
            for shard in range(count)
        }

    @cached_property
    def _slots_by_template(self) -> Mapping[str, list[Slot]]:
        table: dict[str, list[Slot]] = {}
        for slot in self.slots:
            table.setdefault(slot.file, []).append(slot)
        return table

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file that holds a stored tensor, in a fixed order."""
        return tuple(
            dict.fromkeys([*self._shards_of, *(constant.file for constant in self.constants)])
        )

    def contents(self, file: str) -> tuple[Content, ...]:
        """The stored tensors of `file`, in the order in which a writer lays them out."""
        template, shard = self._shards_of[file]
        covered: dict[str, int] = {}
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for slot in self._slots_by_template[template]:
            if shard >= slot.placement.cut.parts:
                continue
            tensors[slot.key] = (slot.dtype, slot.placement.stored_shape(shard))
            covered[slot.key] = covered.get(slot.key, 0) + slot.placement.region(shard).numel
        made = [
            Content(key, dtype, shape, math.prod(shape) - covered[key])
            for key, (dtype, shape) in tensors.items()
        ]
        return (*made, *(constant.content for constant in self.constants if constant.file == file))

    def header(self, file: str) -> Mapping[str, str]:
        """The metadata in the header of `file`."""
        return self.metadata(*self._shards_of[file])

    def tensors_on(self, parameter: str, region: Region) -> Iterator[StoredTensor]:
        """Every stored tensor that holds a part of `region`, with its windows on it.

        The tensors with `copy` 0 tile the region; the others hold parts of it again.
        """
        for place, slot in enumerate(self.places[parameter]):
            cut = slot.placement.cut
            for shard in cut.shards(region.start[cut.dim], region.stop[cut.dim]):
                common = slot.placement.region(shard) & region
                if common is None:
                    continue
                yield StoredTensor(
                    file=slot.file.format(shard=shard),
                    key=slot.key,
                    dtype=slot.dtype,
                    shape=slot.placement.stored_shape(shard),
                    coordinate=slot.coordinate + shard,
                    region=common,
                    slot=slot,
                    shard=shard,
                    copy=place * cut.copies + shard % cut.copies,
                )

    def total_bytes(self) -> int:
        """Bytes of all stored tensors, padding and constants included."""
        return sum(content.nbytes for file in self.files for content in self.contents(file))


def with_dtype(layout: Layout, dtype: torch.dtype) -> Layout:
    """The same layout with every stored tensor of `dtype`."""
    return replace(layout, slots=tuple(replace(slot, dtype=dtype) for slot in layout.slots))


def check_same_parameters(source: Layout, target: Layout) -> None:
    """Refuse two layouts that do not hold the same parameters in the same shapes."""
    ours = {name: slots[0].placement.shape for name, slots in source.places.items()}
    theirs = {name: slots[0].placement.shape for name, slots in target.places.items()}
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if wrong:
        first = wrong[0]
        raise LayoutError(
            f"{len(wrong)} parameters differ between {source.name} and {target.name}, "
            f"first `{first}`: {ours.get(first, 'absent')} against {theirs.get(first, 'absent')}"
        )
