"""A checkpoint as a table: where every parameter lies, in which file, under which key.

Nothing here reads a file or knows a format. A layout is never a list of stored tensors: it is a
table of slots, and stored tensors are made on demand.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from reshard.encodings import Encoding, stored_bytes
from reshard.errors import LayoutError
from reshard.geometry import Region, Window, item_name, whole
from reshard.placement import Placement


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
class Slot:
    """One place of one parameter in a checkpoint: a stored tensor per shard of its placement.

    `file` is a template with `{shard}`. Shard `s` belongs to the mesh coordinate `coordinate + s`.
    Where a checkpoint that exists decides them, `spread` has the file and the coordinate of each
    shard instead. `boxed` keys are those of a tensor that its files hold box by box. Copies of a
    parameter must agree to the bit where `strict`; where not, the first one is taken. `dtype` is
    that of the values: float32 where an `encoding` says how they are stored.
    """

    parameter: str
    placement: Placement
    file: str
    key: str
    dtype: torch.dtype
    coordinate: int = 0
    strict: bool = True
    boxed: bool = False
    spread: tuple[tuple[str, int], ...] = ()
    encoding: Encoding | None = None

    def file_of(self, shard: int) -> str:
        """The file that holds `shard`."""
        return self.spread[shard][0] if self.spread else self.file.format(shard=shard)

    def key_of(self, shard: int) -> str:
        """The key of `shard` in its file."""
        if not self.boxed:
            return self.key
        scalar = self.placement.stored == ()
        return item_name(self.key, () if scalar else self.placement.box(shard).start)

    def coordinate_of(self, shard: int) -> int:
        """The mesh coordinate that `shard` belongs to."""
        return self.spread[shard][1] if self.spread else self.coordinate + shard


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
        """Bytes of the region in the file."""
        return self.bytes_of(self.region.numel)

    @property
    def room(self) -> int:
        """Bytes of the region in memory, where its values are plain elements."""
        return self.region.numel * self.dtype.itemsize

    def bytes_of(self, elements: int) -> int:
        """Bytes that a number of consecutive elements take in the file."""
        return stored_bytes((elements,), self.dtype, self.slot.encoding)


@dataclass(frozen=True, slots=True)
class Content:
    """A stored tensor as its file's header names it.

    The last `padding` elements belong to no parameter.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    padding: int = 0
    encoding: Encoding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stored tensor."""
        return stored_bytes(self.shape, self.dtype, self.encoding)

    @property
    def padding_bytes(self) -> int:
        """Bytes of the padding, which ends the tensor."""
        return stored_bytes((self.padding,), self.dtype, self.encoding)


@dataclass(frozen=True, slots=True)
class Constant:
    """A stored tensor that follows from the model's config: `data` is its bytes in the file."""

    file: str
    content: Content
    data: bytes


def no_metadata(template: str, shard: int) -> Mapping[str, object]:
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
    metadata: Callable[[str, int], Mapping[str, object]] = field(default=no_metadata, compare=False)

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
            if not slot.spread:
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
    def _spread(self) -> Mapping[str, list[tuple[Slot, int]]]:
        """The shards in each file that no template names."""
        table: dict[str, list[tuple[Slot, int]]] = {}
        for slot in self.slots:
            for shard, (file, _) in enumerate(slot.spread):
                table.setdefault(file, []).append((slot, shard))
        return table

    def members(self, file: str) -> Iterator[tuple[Slot, int]]:
        """The shards in `file`, each with its slot."""
        yield from self._spread.get(file, ())
        if file in self._shards_of:
            template, shard = self._shards_of[file]
            for slot in self._slots_by_template[template]:
                if not slot.spread and shard < slot.placement.cut.parts:
                    yield slot, shard

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Every file that holds a stored tensor, in a fixed order."""
        constants = (constant.file for constant in self.constants)
        return tuple(dict.fromkeys([*self._shards_of, *self._spread, *constants]))

    def contents(self, file: str) -> tuple[Content, ...]:
        """The stored tensors of `file`, in the order in which a writer lays them out."""
        covered: dict[str, int] = {}
        tensors: dict[str, tuple[Slot, tuple[int, ...]]] = {}
        for slot, shard in self.members(file):
            shape = slot.placement.stored_shape(shard)
            if slot.boxed and not slot.placement.box(shard).numel:
                continue
            key, held = slot.key_of(shard), slot.placement.regions(shard)
            tensors[key] = (slot, shape)
            covered[key] = covered.get(key, 0) + sum(region.numel for region in held)
        made = [
            Content(key, slot.dtype, shape, math.prod(shape) - covered[key], slot.encoding)
            for key, (slot, shape) in tensors.items()
        ]
        return (*made, *(constant.content for constant in self.constants if constant.file == file))

    def header(self, file: str) -> Mapping[str, object]:
        """The metadata in the header of `file`."""
        return self.metadata(*self._shards_of.get(file, (file, 0)))

    def tensors_on(self, parameter: str, region: Region) -> Iterator[StoredTensor]:
        """Every stored tensor that holds a part of `region`, as `stored_on` gives them."""
        return stored_on(self.places[parameter], region)

    def total_bytes(self) -> int:
        """Bytes of all stored tensors, padding and constants included."""
        return sum(content.nbytes for file in self.files for content in self.contents(file))


def stored_on(slots: Iterable[Slot], region: Region) -> Iterator[StoredTensor]:
    """Every stored tensor that holds a part of `region` of a parameter, given its places.

    The tensors with `copy` 0 tile the region; the others hold parts of it again.
    """
    before = 0
    for slot in slots:
        copies = slot.placement.cut.copies
        for shard in slot.placement.shards(region):
            for held in slot.placement.regions(shard):
                common = held & region
                if common is None:
                    continue
                yield StoredTensor(
                    file=slot.file_of(shard),
                    key=slot.key_of(shard),
                    dtype=slot.dtype,
                    shape=slot.placement.stored_shape(shard),
                    coordinate=slot.coordinate_of(shard),
                    region=common,
                    slot=slot,
                    shard=shard,
                    copy=before + shard % copies,
                )
        before += copies


def check_covered(layout: Layout) -> None:
    """Refuse a source whose first places do not hold every element of every parameter once."""
    known: set[object] = set()
    for name, slots in layout.places.items():
        placement = slots[0].placement
        if placement in known:
            continue
        known.add(placement)
        region = whole(placement.shape)
        held = sum(part.region.numel for part in layout.tensors_on(name, region) if not part.copy)
        if held != region.numel:
            raise LayoutError(
                f"{layout.name}: `{name}` has {region.numel} elements, but its files hold {held}"
            )


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
