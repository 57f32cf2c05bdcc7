"""Checksums of what a source holds more than once, taken while it is in a buffer. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from isal import isal_zlib

from reshard.buffers import Buffer, Part, as_memory
from reshard.geometry import Region
from reshard.layout import StoredTensor
from reshard.moves import Move


@dataclass(frozen=True, slots=True)
class Check:
    """The checksum of a box of a block, read from the place `copy` of its parameter."""

    parameter: str
    region: Region
    copy: int
    of: int
    crc: int
    stored: StoredTensor


def checks_of(
    move: Move, loaded: Callable[[int], Sequence[Part]], buffer: Buffer
) -> Iterator[Check]:
    """Checksum every box that a block holds more than once; `loaded` gives the parts of a copy."""
    for box, primary, further in _shared_boxes(move):
        for held in (primary, further):
            for part in loaded(held.copy):
                if part.stored == held:
                    crc = _checksum(part, buffer, box)
                    yield Check(move.block.parameter, box, held.copy, further.copy, crc, held)


def _shared_boxes(move: Move) -> Iterator[tuple[Region, StoredTensor, StoredTensor]]:
    """Boxes that both the first place and a further one hold, with the two stored tensors."""
    further = [stored for _, stored in move.reads if stored.copy]
    for stored in further:
        for _, primary in move.reads:
            box = stored.region & primary.region if primary.copy == 0 else None
            if box is not None:
                yield box, primary, stored


def _checksum(part: Part, buffer: Buffer, box: Region) -> int:
    """CRC32 of a box in the parameter's own order, whatever the order in the buffer."""
    flat, crc = buffer.view(part.stored.dtype), 0
    for window in part.packed.windows:
        common = window.region & box
        if common is not None:
            piece = window.narrow(common)
            view = flat.as_strided(common.shape, piece.strides, part.element() + piece.offset)
            crc = isal_zlib.crc32(as_memory(view.contiguous()), crc)
    return crc
