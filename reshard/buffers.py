"""Parts of stored tensors in buffers allocated once: where they lie, how they get in and out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from reshard.encodings import Coded, Encoding, decode, encode
from reshard.geometry import Region, row_major
from reshard.layout import StoredTensor
from reshard.packing import Packed, carry, copies, packed, shift
from reshard.storage import Files

ALIGN = 64
# Buffers of a rank. What needs no change is written from where it was read, while two more rounds
# are read: so a third one to read. One more for each direction of exchange.
READING, WRITING, CROSSING = 3, 2, 2
Run = tuple[str, int, memoryview]


class Places(Protocol):
    """Where stored tensors lie in their files."""

    def locate(self, stored: StoredTensor) -> tuple[int, tuple[int, ...]]:
        """The byte offset of a stored tensor's first element, and its strides in elements."""


def as_memory(flat: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs


class Buffer:
    """Bytes allocated once and handed out in aligned steps; `clear` takes all back."""

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.memory = as_memory(self.bytes)
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self._used = 0

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole buffer as a flat tensor of `dtype`."""
        if dtype not in self._views:
            self._views[dtype] = self.bytes[: len(self.memory) // 8 * 8].view(dtype)
        return self._views[dtype]

    def clear(self) -> None:
        """Begin again."""
        self._used = 0

    def take(self, nbytes: int) -> int:
        """The offset of `nbytes` more bytes."""
        if self._used + nbytes > len(self.memory):
            raise BufferError(f"a round has more than the {len(self.memory)} bytes of a buffer")
        start, self._used = self._used, self._used + -(-nbytes // ALIGN) * ALIGN
        return start


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stored tensor, in a buffer from byte `base` on.

    The tensor begins at byte `offset` of its file.
    """

    stored: StoredTensor
    packed: Packed
    base: int
    offset: int

    def element(self) -> int:
        """The base in elements."""
        return self.base // self.stored.dtype.itemsize

    def within(self, buffer: Buffer) -> tuple[torch.Tensor, int]:
        """The buffer as elements of the part's dtype, and the base in them."""
        return buffer.view(self.stored.dtype), self.element()


def _packed(stored: StoredTensor, places: Places) -> tuple[int, Packed]:
    """Where a stored tensor begins in its file, and how its part is packed."""
    offset, strides = places.locate(stored)
    odd = strides if strides != row_major(stored.shape) else None
    return offset, packed(stored.slot.placement, stored.shard, stored.region, odd)


def place_part(stored: StoredTensor, places: Places, buffer: Buffer) -> Part:
    """Room in `buffer` for a part of a stored tensor."""
    offset, layout = _packed(stored, places)
    return Part(stored, layout, buffer.take(stored.room), offset)


def as_it_lies(part: Part, stored: StoredTensor, places: Places) -> Part | None:
    """A part of another stored tensor that `part` holds byte for byte; None where it does not."""
    if part.stored.dtype != stored.dtype or stored.slot.encoding is not None:
        return None
    offset, layout = _packed(stored, places)
    first = shift(part.packed, layout, stored.region)
    if first is None:
        return None
    return Part(stored, layout, part.base + first * stored.dtype.itemsize, offset)


def fill(
    part: Part, buffer: Buffer, box: Packed, region: Region, flat: torch.Tensor, base: int
) -> int:
    """Copy what `box` has of a part: it holds `region`, from `base` of `flat` on; the bytes."""
    common = region & part.stored.region
    if common is None:
        return 0
    return carry(copies(box, part.packed, common), flat, base, *part.within(buffer))


def runs_of(part: Part, buffer: Buffer) -> Iterator[tuple[int, memoryview]]:
    """The runs of a part: where each lies in the file, and its elements in `buffer`."""
    size, position = part.stored.dtype.itemsize, part.base
    for first, count in part.packed.runs:
        room = buffer.memory[position : position + count * size]
        yield part.offset + part.stored.bytes_of(first), room
        position += count * size


def encoded(part: Part, room: memoryview) -> Coded:
    """The elements of a run as its file has them: coded in place where the tensor is."""
    encoding = part.stored.slot.encoding
    return Coded(room) if encoding is None else encode(encoding, room)


def joined(runs: Iterable[Run]) -> Iterator[tuple[str, int, list[memoryview]]]:
    """Runs that follow each other in one file, together."""
    views: list[memoryview] = []
    file, begun, reached = "", 0, 0
    for name, offset, view in sorted(runs, key=lambda run: run[:2]):
        if views and (name, offset) != (file, reached):
            yield file, begun, views
            views = []
        if not views:
            file, begun = name, offset
        views.append(view)
        reached = offset + view.nbytes
    if views:
        yield file, begun, views


def load(
    wanted: Sequence[StoredTensor], files: Files, places: Places, buffer: Buffer
) -> list[Part]:
    """Read parts of stored tensors into `buffer`, in as few calls as the files allow."""
    parts = [place_part(stored, places, buffer) for stored in wanted]
    runs: list[Run] = []
    coded: list[tuple[Encoding, memoryview]] = []
    for part in parts:
        encoding = part.stored.slot.encoding
        for offset, room in runs_of(part, buffer):
            if encoding is None:
                runs.append((part.stored.file, offset, room))
                continue
            # Coded bytes are fewer: read to the end of the room, they unfold towards its begin.
            count = encoding.size(room.nbytes // part.stored.dtype.itemsize)
            runs.append((part.stored.file, offset, room[room.nbytes - count :]))
            coded.append((encoding, room))
    together = list(joined(runs))
    for file, begin, views in together:
        files.expect(file, begin, sum(view.nbytes for view in views))
    for file, begin, views in together:
        files.read(file, begin, views)
    for encoding, room in coded:
        decode(encoding, room)
    return parts
