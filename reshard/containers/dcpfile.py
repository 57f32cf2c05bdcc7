"""A data file of torch.distributed.checkpoint (DCP): items one behind the other, one for each box.

    item      a torch zip of one tensor: its pickle, then `data/0`
    zeros     up to the next multiple of 64 bytes, so that elements are aligned in the file too
    item ...

An item is a file of its own in all but place: the offsets in its zip count from its first byte.
Where items lie is up to `.metadata` (see `dcpmetadata`); torch leaves no zeros between them.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from reshard.containers import (
    Entry,
    FileIndex,
    Skeleton,
    TensorSpec,
    Version,
    dcpmetadata,
    opened,
    pieces_of,
    tensorpickle,
    torchzip,
    version,
)
from reshard.containers.dcpmetadata import Stored
from reshard.containers.torchfile import check_extent
from reshard.containers.torchzip import Archive, Range
from reshard.errors import CheckpointError
from reshard.geometry import row_major

BESIDE = dcpmetadata.NAME
_ALIGNMENT = 64


def index(root: Path, file: str) -> FileIndex:
    """Where the elements of each box in a file lie, by `item_name`; bytes items are not read.

    Each item must be one row-major tensor, of the dtype and shape that `.metadata` says. An item is
    opened when its entry is asked for: those of an optimizer never are.
    """
    return FileIndex(_Entries(root, file), {})


class _Entries(Mapping[str, Entry]):
    """The entries of a file, found as they are asked for; a wrong item is a CheckpointError."""

    def __init__(self, root: Path, file: str) -> None:
        self._root, self._file, self._directory = root, file, dcpmetadata.read(root)
        self._version = version(root / file)

    def __iter__(self) -> Iterator[str]:
        return (item.key for item in self._directory.items(self._file))

    def __len__(self) -> int:
        return self._directory.count(self._file)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._directory.find(key, self._file) is not None

    def __getitem__(self, key: str) -> Entry:
        item = self._directory.find(key, self._file)
        if item is None:
            raise KeyError(key)
        dtype = self._directory.tensors[item.fqn].dtype
        return _opened(self._root, self._file, self._version, item, dtype)


@lru_cache(maxsize=4096)
def _opened(
    root: Path, file: str, _version: Version | None, item: Stored, dtype: torch.dtype
) -> Entry:
    """The entry of one item, by what its zip says; once for each version of the file."""
    try:
        with opened(root / file) as content:
            held = os.fstat(content.fileno()).st_size
            if item.offset + item.length > held:
                raise ValueError(
                    f"the file is truncated: {held} bytes, expected {item.offset + item.length}; "
                    "copy it again"
                )
            return _entry(item, dtype, Range(content, item.offset, item.length))
    except OSError as error:
        raise CheckpointError(f"`{root / file}`: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"`{root / file}`: item `{item.key}`: {error}") from error


def skeleton(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Skeleton:
    """A file of one item per tensor in the given order; without tensors, an empty file.

    `metadata` has no place in a DCP file and is not stored.
    """
    runs: list[tuple[int, bytearray]] = []
    offsets, checksums, items = {}, {}, {}
    position = 0
    for spec in tensors:
        gap = -position % _ALIGNMENT
        item_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        pickled = tensorpickle.write_one(spec)
        item = torchzip.lay_out(pickled, {spec.key: item_bytes}, names=spec.key)
        _append(runs, position, bytes(gap), item, spec.key)
        position += gap
        offsets[spec.key] = position + item.offsets[spec.key]
        checksums[spec.key] = tuple(position + place for place in item.checksums[spec.key])
        items[spec.key] = position, item.size
        position += item.size
    chunks = tuple((offset, bytes(run)) for offset, run in runs)
    return Skeleton(position, chunks, offsets, checksums, items)


def _append(
    runs: list[tuple[int, bytearray]], position: int, gap: bytes, item: Skeleton, key: str
) -> None:
    """Add the bytes before and behind an item's elements; the first go on where a run ends."""
    chunks = [(offset, piece) for offset, chunk in item.chunks for piece in pieces_of(chunk)]
    before = gap, *(chunk for offset, chunk in chunks if offset < item.offsets[key])
    behind = [(offset, chunk) for offset, chunk in chunks if offset >= item.offsets[key]]
    if not runs:
        runs.append((position, bytearray()))
    runs[-1][1].extend(b"".join(before))
    runs.append((position + len(gap) + behind[0][0], bytearray().join(c for _, c in behind)))


def _entry(item: Stored, dtype: torch.dtype, view: Range) -> Entry:
    """Where the elements of one item lie; ValueError where it is not what `.metadata` says."""
    archive = Archive(view)
    found = tensorpickle.read_one(archive.read("data.pkl"))
    start, record_bytes = archive.locate(found.storage.record)
    check_extent(found, record_bytes)
    if (found.dtype, found.shape) != (dtype, item.box.shape):
        raise ValueError(
            f"holds {_described(found.dtype, found.shape)}, "
            f"expected {_described(dtype, item.box.shape)} as in `.metadata`"
        )
    strides = row_major(found.shape)
    if any(
        size > 1 and a != b for size, a, b in zip(found.shape, found.strides, strides, strict=True)
    ):
        raise ValueError(
            f"has the strides {list(found.strides)}, expected {list(strides)}; "
            "save the tensor with .contiguous()"
        )
    offset = item.offset + start + found.offset * dtype.itemsize
    return Entry(offset, dtype, found.shape, strides)


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
