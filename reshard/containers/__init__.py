"""The bytes of one file: where its stored tensors lie, and how an empty one is laid out up front.

Each container is a module with the same two names:

    index(root, file)             where each stored tensor of a file lies; no tensor byte is read
    skeleton(tensors, metadata)   every byte of a new file that is not tensor data, and its size

and, where the index of a file depends on another one in the same directory,

    BESIDE                        the name of that file
"""

import contextlib
import importlib
import os
import pkgutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Protocol

import torch

from reshard import storage
from reshard.encodings import Encoding
from reshard.errors import CheckpointError

Version = tuple[int, int, int]
PIECE_BYTES = 1 << 20
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 1024
_MAX_KEY_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one stored tensor lies in its file: `offset` in bytes, `strides` in elements.

    `dtype` is that of the values, which are float32 where an `encoding` says how they are stored.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    encoding: Encoding | None = None


@dataclass(frozen=True, slots=True)
class FileIndex:
    """The stored tensors of one file by key, and the metadata of its header.

    Metadata is text in all containers but GGUF. `others` are what else lies beside the tensors: at
    most 100 keys, sorted, as `shown`.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, object]
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor of a file that is to be written; row-major, all of `shape` in one run."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: Encoding | None = None


class Blob:
    """Bytes of a file that are prepared in another file, and read when they are needed.

    The other file need not be there on a rank that only has to know their number.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size

    def __len__(self) -> int:
        return self._size

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in pieces."""
        left = self._size
        with self._path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                left -= len(piece)
                yield piece
        if left:
            raise CheckpointError(
                f"`{self._path}`: {self._size - left} bytes, expected {self._size}: was changed"
            )


def pieces_of(chunk: bytes | Blob) -> Iterator[bytes]:
    """The bytes of a chunk of a file, in pieces."""
    yield from (chunk,) if isinstance(chunk, bytes) else chunk.pieces()


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A file before its tensors: its size, its other bytes, and where each tensor's bytes go.

    `chunks` are (offset, bytes) in ascending order; chunks and tensors tile the file without a gap
    or an overlap. `checksums` names, for a key, the offsets (inside chunks) of little-endian uint32
    fields that must hold the CRC32 of that tensor's bytes before the file is published. `items`
    says, for a key, the (offset, bytes) of what is stored as one item of its own inside the file.
    """

    size: int
    chunks: tuple[tuple[int, bytes | Blob], ...]
    offsets: Mapping[str, int]
    checksums: Mapping[str, tuple[int, ...]]
    items: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@cache
def _modules() -> Mapping[str, ModuleType]:
    """Every container module of this package by name."""
    found = {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    }
    return {name: module for name, module in found.items() if hasattr(module, "skeleton")}


class Absent(Protocol):
    """A file that lies on another machine, by what is known of it here."""

    def index(self, container: str) -> FileIndex:
        """Where its stored tensors lie."""

    def read(self, offset: int, count: int) -> bytes:
        """Some of its bytes."""

    def crc32_of(self, offset: int, length: int) -> int:
        """The checksum of some of its bytes."""


_find: ContextVar[Callable[[Path], Absent | None]] = ContextVar("find", default=lambda path: None)


@contextlib.contextmanager
def with_absent(find: Callable[[Path], Absent | None]) -> Iterator[None]:
    """Have `find` say, in this thread, which files are not here though their names are."""
    token = _find.set(find)
    try:
        yield
    finally:
        _find.reset(token)


def absent(path: Path) -> Absent | None:
    """A file that lies on another machine; None for one that is here, or nowhere."""
    return _find.get()(path)


def read(path: Path, offset: int, count: int) -> bytes:
    """Some bytes of a file, of which all must be there."""
    if (elsewhere := absent(path)) is not None:
        return elsewhere.read(offset, count)
    return storage.read_bytes(path, offset, count)


def crc32_of(path: Path, offset: int, length: int) -> int:
    """The CRC32 of some bytes of a file, which is read in small steps."""
    if (elsewhere := absent(path)) is not None:
        return elsewhere.crc32_of(offset, length)
    return storage.crc32_of(path, offset, length)


def index(container: str, root: Path, file: str) -> FileIndex:
    """Where each stored tensor of `root / file` lies, a file of `container` (a module's name).

    A file is read once, and again when it was written since.
    """
    if (elsewhere := absent(root / file)) is not None:
        return elsewhere.index(container)
    now = version(root / file)
    if now is None:
        raise CheckpointError(f"`{root / file}`: no such file, or no plain one")
    beside: str | None = getattr(_modules()[container], "BESIDE", None)
    return _index(container, root, file, (now, version(root / beside) if beside else None))


@lru_cache(maxsize=256)
def _index(
    container: str, root: Path, file: str, _versions: tuple[Version | None, ...]
) -> FileIndex:
    """`index`, once for each version of the file and of the one beside it."""
    found: FileIndex = _modules()[container].index(root, file)
    return found


def version(path: Path) -> Version | None:
    """What changes when a file is written again: size, time and inode; None where there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise CheckpointError(f"`{path}`: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A plain file to be read; a ValueError for anything else, of which a FIFO would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is no plain file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def is_key(name: str) -> bool:
    """Whether a tensor may be called so: text that can be printed, in one line of a message."""
    return name.isprintable() and len(name) <= _MAX_KEY_CHARACTERS


def is_inside(name: str) -> bool:
    """Whether a name that a file gives stays, as text, in the file's directory.

    What the directory itself holds is not looked at: its symlinks are followed.
    """
    parts = name.split("/")
    encoded = name.encode(errors="surrogatepass")
    return (
        name.isprintable()
        and not any(part in ("", ".", "..") for part in parts)
        and max(len(part.encode()) for part in parts) <= _MAX_NAME_BYTES
        and len(encoded) <= _MAX_PATH_BYTES
    )


def skeleton(
    container: str, tensors: Sequence[TensorSpec], metadata: Mapping[str, object]
) -> Skeleton:
    """Every byte of a new file of `container` that is not tensor data."""
    laid_out: Skeleton = _modules()[container].skeleton(tensors, metadata)
    return laid_out


def shown(value: object) -> str:
    """A value from a file or a user as it may appear in a one-line message."""
    return repr(str(value)[:80])[1:-1]
