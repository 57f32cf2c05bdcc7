"""From written pieces to a complete directory: coverage, checksums, small files, manifest.

Every byte of every target file must be covered exactly once: by the container's own bytes, by a
journalled run, by a constant, or by declared padding. Checksums are combined from those of the
runs; nothing is read back.
"""

import contextlib
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from pathlib import Path

from isal import isal_zlib

from reshard import containers
from reshard.containers import Blob, Skeleton, TensorSpec, pieces_of
from reshard.errors import CheckpointError, StorageError
from reshard.geometry import row_major
from reshard.journal import Record
from reshard.layout import Content, Layout, StoredTensor
from reshard.storage import Files, create, sync, sync_all

ZEROS = bytes(1 << 20)
OFFSETS_KEPT = 40_000  # about 200 bytes each


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes `[start, start + length)` of a file, what they are, and their CRC32."""

    start: int
    length: int
    what: str
    crc: int

    def to_json(self) -> list[int | str]:
        """As the manifest has it."""
        return [self.start, self.length, self.what, self.crc]


class TargetPlaces:
    """Where the stored tensors of a layout lie in files that this program lays out."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        per_file = len(layout.contents(layout.files[0])) if layout.files else 1
        self.skeleton = lru_cache(maxsize=8)(self._skeleton)
        self._offsets = lru_cache(maxsize=max(8, OFFSETS_KEPT // max(per_file, 1)))(
            self._only_offsets
        )

    def _skeleton(self, file: str) -> Skeleton:
        specs = [
            TensorSpec(item.key, item.dtype, item.shape, item.encoding)
            for item in self._layout.contents(file)
        ]
        return containers.skeleton(self._layout.container, specs, self._layout.header(file))

    def _only_offsets(self, file: str) -> Mapping[str, int]:
        return self.skeleton(file).offsets

    def locate(self, stored: StoredTensor) -> tuple[int, tuple[int, ...]]:
        """The byte offset of a stored tensor, and its strides."""
        return self._offsets(stored.file)[stored.key], row_major(stored.shape)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.skeleton(file).size for file in self._layout.files)


class SourcePlaces:
    """Where the stored tensors of a checkpoint that exists lie in its files."""

    def __init__(self, root: Path, container: str) -> None:
        self._root = root
        self._container = container

    def locate(self, stored: StoredTensor) -> tuple[int, tuple[int, ...]]:
        """The byte offset of a stored tensor, and its strides."""
        try:
            entry = containers.index(self._container, self._root, stored.file).entries[stored.key]
        except CheckpointError:
            path = self._root / stored.file
            if path.is_file():
                raise
            raise StorageError(f"`{path}`: was there at the start, and is gone") from None
        return entry.offset, entry.strides


def lay_out(data: Path, layout: Layout, places: TargetPlaces, files: Iterable[str]) -> int:
    """Create `files` with everything but the stored tensors in place; the bytes written."""
    written = 0
    constants = {(item.file, item.content.key): item.data for item in layout.constants}
    for file in files:
        skeleton = places.skeleton(file)
        filled = [
            (skeleton.offsets[key], constants[file, key])
            for key in skeleton.offsets
            if (file, key) in constants
        ]
        empty = _padding(layout, file, skeleton)
        create(data / file, skeleton.size, chain(_pieces(skeleton), filled, _zeros(empty)))
        written += sum(len(chunk) for _, chunk in [*skeleton.chunks, *filled])
        written += sum(length for _, length in empty)
    return written


def _padding(layout: Layout, file: str, skeleton: Skeleton) -> list[tuple[int, int]]:
    """The (offset, length) of what no window of a stored tensor covers."""
    return [
        (skeleton.offsets[item.key] + item.nbytes - item.padding_bytes, item.padding_bytes)
        for item in layout.contents(file)
        if item.padding_bytes
    ]


def _zeros(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """Zero bytes for spans of a file, piece by piece: a file that was there may hold others."""
    for offset, length in spans:
        for start in range(0, length, len(ZEROS)):
            yield offset + start, ZEROS[: length - start]


def _pieces(skeleton: Skeleton) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file that are no tensor, each piece with its offset."""
    for start, chunk in skeleton.chunks:
        for piece in pieces_of(chunk):
            yield start, piece
            start += len(piece)


def zero_crc(length: int) -> int:
    """CRC32 of `length` zero bytes."""
    crc = 0
    while length > 0:
        crc = isal_zlib.crc32(ZEROS[:length], crc)
        length -= len(ZEROS)
    return crc


def _tensor_crc(
    file: str, content: Content, offset: int, records: Sequence[Record], data: bytes | None
) -> int:
    """The checksum of one stored tensor, whose runs must cover it exactly once."""
    if data is not None and not records:
        return isal_zlib.crc32(data)
    position, crc = offset, 0
    end = offset + content.nbytes - content.padding_bytes
    for record in records:
        if record.offset != position:
            problem = "no rank has written" if record.offset > position else "two runs have written"
            raise StorageError(
                f"`{file}`: {problem} bytes {min(position, record.offset)} to "
                f"{max(position, record.offset)} of tensor `{content.key}`; "
                "this is a bug of the program: the result is not published"
            )
        crc = isal_zlib.crc32_combine(crc, record.crc, record.length)
        position += record.length
    if position != end:
        raise StorageError(
            f"`{file}`: no rank has written bytes {position} to {end} of tensor `{content.key}`; "
            "this is a bug of the program: the result is not published"
        )
    padding = content.padding_bytes
    return isal_zlib.crc32_combine(crc, zero_crc(padding), padding)


def finish_file(
    data: Path, layout: Layout, file: str, skeleton: Skeleton, records: Iterable[Record]
) -> list[Extent]:
    """Prove that one file is complete, write its checksum fields, return its extents in order."""
    constants = {item.content.key: item.data for item in layout.constants if item.file == file}
    rest = sorted(records, key=lambda record: record.offset)
    starts = [record.offset for record in rest]
    extents: list[Extent] = []
    fields: dict[int, int] = {}
    taken: list[int] = []
    for content in sorted(layout.contents(file), key=lambda item: skeleton.offsets[item.key]):
        offset = skeleton.offsets[content.key]
        own = rest[bisect_left(starts, offset) : bisect_left(starts, offset + content.nbytes)]
        taken.append(len(own))
        crc = _tensor_crc(file, content, offset, own, constants.get(content.key))
        extents.append(Extent(offset, content.nbytes, content.key, crc))
        fields |= dict.fromkeys(skeleton.checksums.get(content.key, ()), crc)
    if len(rest) != sum(taken):
        raise StorageError(
            f"`{file}`: a run lies outside all tensors; this is a bug of the program: "
            "the result is not published"
        )
    _patch(data / file, fields)
    for start, chunk in skeleton.chunks:
        crc = _chunk_crc(chunk, {place - start: crc for place, crc in fields.items()})
        extents.append(Extent(start, len(chunk), "header", crc))
    return sorted((extent for extent in extents if extent.length), key=lambda extent: extent.start)


def _chunk_crc(chunk: bytes | Blob, fields: Mapping[int, int]) -> int:
    """The checksum of a chunk with the checksum fields in it, by their offsets, filled."""
    own = {place: crc for place, crc in fields.items() if 0 <= place < len(chunk)}
    if not own or not isinstance(chunk, bytes):
        return reduce(lambda crc, piece: isal_zlib.crc32(piece, crc), pieces_of(chunk), 0)
    patched = bytearray(chunk)
    for place, crc in own.items():
        struct.pack_into("<I", patched, place, crc)
    return isal_zlib.crc32(patched)


def _patch(path: Path, fields: Mapping[int, int]) -> None:
    """Write checksum fields in place."""
    if fields:
        files = Files(path.parent, os.O_WRONLY)
        for offset, crc in fields.items():
            files.write(path.name, offset, [memoryview(struct.pack("<I", crc))])
        files.close()


def file_record(extents: Sequence[Extent]) -> dict[str, object]:
    """A file as the manifest has it: its size, its checksum, and its extents, which tile it."""
    position, crc = 0, 0
    for extent in extents:
        if extent.start != position:
            raise StorageError(
                f"extents do not tile a file at byte {position}; this is a bug of the program"
            )
        position += extent.length
        crc = isal_zlib.crc32_combine(crc, extent.crc, extent.length)
    return {"size": position, "crc32": crc, "extents": [extent.to_json() for extent in extents]}


def write_pieces(
    path: Path, pieces: Iterable[bytes], what: str, *, fsync: bool
) -> dict[str, object]:
    """Write a file piece by piece; its record for the manifest."""
    position, crc = 0, 0
    create(path, 0, ())
    with contextlib.closing(Files(path.parent, os.O_WRONLY)) as files:
        for piece in filter(None, pieces):
            files.write(path.name, position, [memoryview(piece)])
            position, crc = position + len(piece), isal_zlib.crc32(piece, crc)
    if fsync:
        sync(path)
    return file_record([Extent(0, position, what, crc)] if position else [])


def sync_directories(root: Path, on_step: Callable[[], None]) -> None:
    """Bring every directory below `root` to the disk; `on_step` is called after each."""
    sync_all((Path(folder) for folder, _, _ in os.walk(root)), on_step)
