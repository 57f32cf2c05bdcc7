"""A directory of torch.distributed.checkpoint (DCP): its tensors, and which box lies in which file.

    .metadata              which boxes each tensor was stored as, and where: see `dcppickle`
    __0_0.distcp, ...      items back to back, each the torch zip of one box: see `dcpfile`

File names mean nothing, and the order of boxes is that of ranks; only `.metadata` says what is
where. Objects that are no tensors are items too: they are listed, and never read.
"""

import math
import os
import re
import stat
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from reshard.containers import dcppickle, is_inside, opened, shown, tiling
from reshard.containers.dcppickle import Content, Pickled, Place
from reshard.containers.dcpwriter import Described, Item, write
from reshard.errors import CheckpointError
from reshard.geometry import Region, item_name, whole

__all__ = ["Described", "Directory", "Item", "Stored", "Tensor", "read", "require_tiled", "write"]

NAME = ".metadata"
# torch takes 130 bytes for a chunk and this package 170: the 1,138 tensors of a 405B on 2,770 ranks
# fit, or the 723 of a 70B and their optimizer on 1,450. A hostile file takes 20 times its size.
_MAX_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: its boxes that hold anything by ascending start, and the file of each.

    `spans` has two numbers for each box: where its item begins in the file, and its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Region, ...]
    files: tuple[str, ...]
    spans: "array[int]" = field(default_factory=lambda: array("q"), compare=False)


class Stored(NamedTuple):
    """One box in a file: `key` is its `item_name`, `offset` and `length` are bytes."""

    key: str
    fqn: str
    box: Region
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Directory:
    """What a DCP directory holds: `tensors` by fqn, and the fqns of `others`, which are no tensors.

    `files` are those that hold a tensor, sorted. `paths` says where each fqn was in the nested
    state dict, which its dots alone do not tell; empty where the checkpoint does not say.
    """

    tensors: Mapping[str, Tensor]
    others: tuple[str, ...]
    files: tuple[str, ...]
    paths: Mapping[str, tuple[str | int, ...]]
    _members: Mapping[str, "array[int]"]  # by file: numbers of tensor and box, by ascending offset
    _fqns: tuple[str, ...]

    def items(self, file: str) -> Iterator[Stored]:
        """The boxes that lie in `file`, by ascending offset."""
        numbers = iter(self._members.get(file, ()))
        for tensor, number in zip(numbers, numbers, strict=True):
            yield self._stored(self._fqns[tensor], number)

    def count(self, file: str) -> int:
        """How many boxes lie in `file`."""
        return len(self._members.get(file, ())) // 2

    def find(self, key: str, file: str) -> Stored | None:
        """The box that is called `key`, if it lies in `file`."""
        fqn, bracket, rest = key.rpartition("[")
        tensor = self.tensors.get(fqn)
        if not bracket or tensor is None or not re.fullmatch(r"(\d+(, \d+)*)?\]", rest):
            return None
        start = tuple(map(int, rest[:-1].split(", "))) if len(rest) > 1 else ()
        number = bisect_left(tensor.boxes, start, key=lambda box: box.start)
        known = number < len(tensor.boxes) and tensor.boxes[number].start == start
        return self._stored(fqn, number) if known and tensor.files[number] == file else None

    def _stored(self, fqn: str, number: int) -> Stored:
        tensor = self.tensors[fqn]
        box, spans = tensor.boxes[number], tensor.spans
        name = item_name(fqn, box.start)
        return Stored(name, fqn, box, spans[2 * number], spans[2 * number + 1])


def read(root: Path) -> Directory:
    """The directory at `root`, checked in full, sizes of its files included; no item is read."""
    path = root / NAME
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(_missing(root)) from None
    except OSError as error:
        raise CheckpointError(f"`{path}`: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"`{path}`: is not a file, which it must be")
    return _read(path, status.st_size, status.st_mtime_ns, status.st_ino)


def require_tiled(fqn: str, tensor: Tensor) -> None:
    """CheckpointError unless the boxes of `tensor` hold each of its elements once."""
    fault = tiling.fault(whole(tensor.shape), tensor.boxes)
    if fault:
        raise CheckpointError(f"`{NAME}`: tensor `{fqn}` of {list(tensor.shape)}: {fault}")


def _missing(root: Path) -> str:
    """What to do about a directory without `.metadata`."""
    if any(root.glob("__*.metadata")):
        return (
            f"`{root / NAME}` is missing: the checkpoint was saved with use_collectives=False; "
            "load it with dcp.load and save it with dcp.save"
        )
    if any(root.glob("*.distcp")):
        return (
            f"`{root / NAME}` is missing: the hidden file was lost when the checkpoint was copied; "
            "`cp -r` and `rsync -a` of the directory keep it"
        )
    return f"`{root / NAME}`: no such file"


@lru_cache(maxsize=4)
def _read(path: Path, size: int, _modified: int, _inode: int) -> Directory:
    """`read`, once for each version of the file."""
    if size > _MAX_BYTES:
        raise CheckpointError(f"`{path}`: takes {size} bytes, expected at most {_MAX_BYTES}")
    try:
        with opened(path) as file:
            content = dcppickle.read(file.read(size))
        return _Reader(path.parent).directory(content)
    except OSError as error:
        raise CheckpointError(f"`{path}`: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"`{path}`: {error}") from error


class _Reader:
    """Checks what a `.metadata` says; boxes, tuples and names of equal content become one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sizes: dict[str, tuple[str, int]] = {}  # of each file: its name, once, and its bytes
        self._regions: dict[str, Region] = {}
        self._tuples: dict[tuple[int, ...], tuple[Region, ...]] = {}
        self._files: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._spans: dict[str, list[tuple[int, int, int, int]]] = {}

    def directory(self, content: Content) -> Directory:
        fqns = tuple(content.tensors)
        tensors = {}
        for number, (fqn, pickled) in enumerate(content.tensors.items()):
            try:
                tensors[fqn] = self._tensor(number, fqn, pickled, content.places)
            except ValueError as error:
                raise ValueError(f"tensor `{fqn}`: {error}") from error
        files = tuple(sorted(self._spans))
        members = {file: self._packed(file, fqns) for file in files}
        return Directory(tensors, tuple(content.others), files, content.paths, members, fqns)

    def _tensor(
        self, number: int, fqn: str, pickled: Pickled, places: Mapping[str, Place]
    ) -> Tensor:
        regions = sorted(self._boxes(pickled), key=lambda box: box.start)
        files, spans = [], array("q")
        for position, box in enumerate(regions):
            place = places.get(item_name(fqn, box.start))
            if place is None:
                raise ValueError(f"the box at {list(box.start)} has no entry in `storage_data`")
            file = self._checked(place)
            files.append(file)
            spans.extend((place.offset, place.length))
            span = place.offset, place.length, number, position
            self._spans.setdefault(file, []).append(span)
        boxes = self._tuples.setdefault(tuple(map(id, regions)), tuple(regions))
        held = tuple(files)
        held = self._files.setdefault(held, held)
        return Tensor(pickled.dtype, pickled.shape, boxes, held, spans)

    def _boxes(self, pickled: Pickled) -> Iterator[Region]:
        """The chunks that hold anything: ranks without a row save empty ones."""
        if math.prod(pickled.shape) >= 1 << 63:
            raise ValueError(f"of shape {list(pickled.shape)} has more than 2^63 elements")
        for start, sizes in pickled.chunks:
            if not len(start) == len(sizes) == len(pickled.shape):
                raise ValueError(
                    f"has {len(pickled.shape)} dims, but a box of {len(start)} and {len(sizes)}"
                )
            stop = tuple(a + b for a, b in zip(start, sizes, strict=True))
            if any(map(int.__gt__, stop, pickled.shape)):
                raise ValueError(
                    f"of shape {list(pickled.shape)} has a box at {list(start)} "
                    f"of {list(sizes)}, which lies outside"
                )
            if 0 not in sizes:
                # Text for a key: tuples of integers can be made to collide.
                yield self._regions.setdefault(f"{start}{stop}", Region(start, stop))

    def _checked(self, place: Place) -> str:
        """The name of the file that a place lies in, in full."""
        if place.transformed:
            raise ValueError(
                "is stored in another encoding (`transform_descriptors`); "
                "load the checkpoint with dcp.load and save it without extensions"
            )
        if place.file not in self._sizes:
            _require_inside(place.file)
            self._sizes[place.file] = place.file, self._file_bytes(place.file)
        file, held = self._sizes[place.file]
        if place.offset < 0 or place.length < 0:
            raise ValueError(f"lies at {place.offset} in `{file}`, {place.length} bytes long")
        if place.offset + place.length > held:
            raise ValueError(
                f"`{file}` is truncated: {held} bytes, expected {place.offset + place.length}; "
                "copy the file again"
            )
        return file

    def _file_bytes(self, file: str) -> int:
        path = self._root / file
        if not path.is_file():
            raise ValueError(
                f"is in `{file}`, which is not there; copy all files of `{self._root}`"
            )
        return os.stat(path).st_size

    def _packed(self, file: str, fqns: Sequence[str]) -> "array[int]":
        """The members of a file by ascending offset; their spans must not overlap."""
        packed, position, before = array("q"), 0, 0
        for offset, length, tensor, number in sorted(self._spans.pop(file)):
            if offset < position:
                raise ValueError(
                    f"in `{file}`, items of `{fqns[before]}` and `{fqns[tensor]}` overlap: "
                    f"one ends at {position}, the next starts at {offset}"
                )
            packed.extend((tensor, number))
            position, before = offset + length, tensor
        return packed


def _require_inside(file: str) -> None:
    """ValueError unless a path, by its text, stays in the directory."""
    if not file.isprintable():
        raise ValueError(f"is in the file `{shown(file)}`, whose name cannot be printed")
    if not is_inside(file):
        raise ValueError(f"is in the file `{shown(file)}`, which lies outside the checkpoint")
