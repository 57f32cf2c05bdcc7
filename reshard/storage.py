"""Positional I/O in large steps, with counters: no mmap, no seek, no allocation."""

import contextlib
import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from isal import isal_zlib

from reshard.errors import CheckpointError, ConfigError, StorageError

MAX_BUFFERS = 512
OPEN_FILES = 64
CRC_BYTES = 4 << 20

# `os.preadv` or `os.pwritev`: descriptor, buffers and offset to the number of bytes done.
VectoredCall = Callable[[int, list[memoryview], int], int]


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes of a file; a file that ends before is a CheckpointError."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), count, offset)
    except OSError as error:
        raise StorageError(f"`{path}`: cannot read: {error.strerror}") from None
    if len(data) < count:
        raise CheckpointError(f"`{path}`: truncated: ends before byte {offset + count}")
    return data


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError into one line that names the file."""
    try:
        yield
    except OSError as error:
        hint = (
            "; free some space and run the same command again to go on"
            if error.errno == errno.ENOSPC
            else ""
        )
        raise StorageError(f"`{path}`: cannot {what}: {error.strerror or error}{hint}") from None


def crc32_of(path: Path, start: int, length: int, crc: int = 0) -> int:
    """CRC32 of `length` bytes of a file, read in steps, going on from `crc`."""
    end = start + length
    with explained("read", path), open(path, "rb", buffering=0) as file:
        while start < end:
            data = os.pread(file.fileno(), min(CRC_BYTES, end - start), start)
            if not data:
                raise CheckpointError(f"`{path}`: truncated: ends before byte {end}")
            crc = isal_zlib.crc32(data, crc)
            start += len(data)
    return crc


class Files:
    """Descriptors of files below a directory, least recently used closed first; counts bytes."""

    def __init__(self, root: Path, flags: int) -> None:
        self._root = root
        self._flags = flags
        self._open: OrderedDict[str, int] = OrderedDict()
        self._written: set[str] = set()
        self.nbytes = 0

    def read(self, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` one after another from `offset` on."""
        with explained("read", self._root / file):
            self._all(os.preadv, file, offset, buffers)

    def write(self, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write `buffers` one after another from `offset` on."""
        self._written.add(file)
        with explained("write", self._root / file):
            self._all(os.pwritev, file, offset, buffers)

    def push(self, file: str, offset: int, length: int) -> None:
        """Have the kernel begin to bring written bytes to disk, so that the final sync is short."""
        os.posix_fadvise(self._descriptor(file), offset, length, os.POSIX_FADV_DONTNEED)

    def sync(self, on_step: Callable[[], None]) -> None:
        """Bring every file that was written to the disk; `on_step` is called after each."""
        for file in sorted(self._written):
            with explained("sync", self._root / file):
                os.fsync(self._descriptor(file))
            on_step()
        self._written.clear()

    def close(self) -> None:
        """Close all descriptors."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(self._root / file, self._flags | os.O_CLOEXEC)
        return self._open[file]

    def _all(
        self, call: VectoredCall, file: str, offset: int, buffers: Sequence[memoryview]
    ) -> None:
        """Repeat `call` until all buffers are done: it may stop short, and takes only so many."""
        descriptor, rest = self._descriptor(file), list(buffers)
        while rest:
            done = call(descriptor, rest[:MAX_BUFFERS], offset)
            if done == 0:
                raise CheckpointError(f"`{self._root / file}`: truncated: ends at byte {offset}")
            offset += done
            self.nbytes += done
            while rest and done >= rest[0].nbytes:
                done -= rest.pop(0).nbytes
            if done:
                rest[0] = rest[0][done:]


def create(path: Path, size: int, chunks: Iterable[tuple[int, bytes]]) -> None:
    """Make a file in its final size, `chunks` in place; an existing one keeps its other bytes."""
    with explained("create", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, size)
            for offset, data in chunks:
                view = memoryview(data)
                while view:
                    done = os.pwrite(descriptor, view, offset)
                    view, offset = view[done:], offset + done
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    with explained("sync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_space(directory: Path, needed: int, present: int) -> None:
    """Refuse a target that does not fit; `present` bytes of it are there already."""
    free = shutil.disk_usage(directory).free
    if needed - present > free:
        raise ConfigError(
            f"dst.path: needs {needed - present:,} bytes, but {free:,} are free in `{directory}`; "
            "free some space or choose another dst.path"
        )


def allocated_bytes(directory: Path) -> int:
    """Bytes that the files below `directory` take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())
