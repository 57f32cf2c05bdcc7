"""All that this program does to files: positional I/O in large steps, logs, directories.

No mmap, no seek, no allocation while data moves. Every system call that changes the file system is
made here (those of the lock in `locks`), so that a failure of any is one line that names the file,
and can be rehearsed.
"""

import contextlib
import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from isal import isal_zlib

from reshard import native
from reshard.errors import CheckpointError, StorageError

MAX_BUFFERS = 512
OPEN_FILES = 64
STEP_BYTES = 4 << 20
# Syncs that run at a time: each waits for the disk, which takes them together. More than a thousand
# small files one after another took 2 to 6 s on busy processors, 16 at a time less than 0.1 s.
SYNCS = 16
# Linux 6.14, include/uapi/linux/fs.h: write through the cache, and keep nothing in it.
RWF_DONTCACHE = 0x80
HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space"),
    errno.EROFS: "; choose a directory that can be written",
}
# What is shorter stays in the cache until it is synced: it may share its page with what is next.
UNCACHED_BYTES = 256 << 10

T = TypeVar("T")

# `os.preadv` or `os.pwritev`: descriptor, buffers and offset to the number of bytes done.
VectoredCall = Callable[[int, list[memoryview], int], int]


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an OSError into one line that names the file."""
    try:
        yield
    except OSError as error:
        hint = HINTS.get(error.errno or 0, "")
        raise StorageError(f"`{path}`: cannot {what}: {error.strerror or error}{hint}") from None


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor for as long as it is needed."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes, or as many as there are: one call may give fewer."""
    data = os.pread(descriptor, count, offset)
    while 0 < len(data) < count:
        more = os.pread(descriptor, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes of a file; a file that ends before is a CheckpointError."""
    with explained("read", path), opened(path, os.O_RDONLY) as descriptor:
        data = _read(descriptor, count, offset)
    if len(data) < count:
        raise CheckpointError(f"`{path}`: truncated: ends before byte {offset + count}")
    return data


def read_steps(path: Path, step: int) -> Iterator[bytes]:
    """All bytes of a file, `step` at a time."""
    position = 0
    with explained("read", path), opened(path, os.O_RDONLY) as descriptor:
        while data := _read(descriptor, step, position):
            position += len(data)
            yield data


def crc32_of(path: Path, start: int, length: int, crc: int = 0) -> int:
    """CRC32 of `length` bytes of a file, read in steps, going on from `crc`."""
    end = start + length
    with explained("read", path), opened(path, os.O_RDONLY) as descriptor:
        while start < end:
            data = os.pread(descriptor, min(STEP_BYTES, end - start), start)
            if not data:
                raise CheckpointError(f"`{path}`: truncated: ends before byte {end}")
            crc = isal_zlib.crc32(data, crc)
            start += len(data)
    return crc


def forget(path: Path) -> None:
    """Have the next reader of a file get what the disk holds, not what memory still does.

    After a failed sync the two may differ, and a second sync would not tell.
    """
    with explained("read", path), opened(path, os.O_RDONLY) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Files:
    """Descriptors of files below a directory, least recently used closed first; counts bytes.

    With `through`, what is written in large runs goes to the disk at once and does not stay in
    memory: the final sync is short, and no memory is taken from others. A cache that fills up costs
    more than the writing, where the machine is virtual and has to ask for each page, and in a job
    whose memory is limited it counts.
    """

    def __init__(self, root: Path, flags: int, *, through: bool = False) -> None:
        self._root = root
        self._flags = flags
        self._open: OrderedDict[str, int] = OrderedDict()
        self._written: set[str] = set()
        self._through, self._uncached = through, through
        self.nbytes = 0

    def read(self, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` one after another from `offset` on."""
        with explained("read", self._root / file):
            self._all(os.preadv, file, offset, buffers)

    def write(self, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write `buffers` one after another from `offset` on."""
        self._written.add(file)
        long = sum(view.nbytes for view in buffers) >= UNCACHED_BYTES
        with explained("write", self._root / file):
            self._all(
                self._uncached_call if long and self._uncached else os.pwritev,
                file,
                offset,
                buffers,
            )
        if long and self._through and not self._uncached:
            self._advise(file, offset, sum(view.nbytes for view in buffers), os.POSIX_FADV_DONTNEED)

    def _uncached_call(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        """As os.pwritev, past the cache where kernel and file system can."""
        try:
            return os.pwritev(descriptor, buffers, offset, RWF_DONTCACHE)
        except OSError as error:
            if error.errno not in native.UNSUPPORTED:
                raise
        self._uncached = False
        return os.pwritev(descriptor, buffers, offset)

    def expect(self, file: str, offset: int, length: int) -> None:
        """Have the kernel begin to fetch what will be read."""
        self._advise(file, offset, length, os.POSIX_FADV_WILLNEED)

    def _advise(self, file: str, offset: int, length: int, advice: int) -> None:
        """Have the kernel begin to fetch bytes, or to bring them to the disk, if it can."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor(file), offset, length, advice)

    def sync(self, on_step: Callable[[], None]) -> None:
        """Bring every file that was written to the disk; `on_step` is called after each."""
        _in_threads(self._sync, sorted(self._written), on_step)
        self._written.clear()

    def _sync(self, file: str) -> None:
        """Through the descriptor that wrote, if it is open still: it is told of every failure."""
        if file not in self._open:
            sync(self._root / file)
            return
        with explained("sync", self._root / file):
            os.fsync(self._open[file])

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


class Log:
    """A file that only grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained("create", path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)

    def append(self, data: bytes | bytearray) -> None:
        """Add bytes at the end."""
        rest = memoryview(data)
        with explained("write", self._path):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def sync(self) -> None:
        """Bring all that was appended to the disk."""
        with explained("sync", self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def create(path: Path, size: int, chunks: Iterable[tuple[int, bytes]]) -> None:
    """Make a file in its final size, `chunks` in place; an existing one keeps its other bytes.

    Where the file system can, it has its place on the disk: what does not fit fails here.
    """
    make_directory(path.parent)
    with explained("create", path), opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        os.ftruncate(descriptor, size)
        _reserve(descriptor, size)
        for offset, data in chunks:
            view = memoryview(data)
            while view:
                done = os.pwrite(descriptor, view, offset)
                view, offset = view[done:], offset + done


def _reserve(descriptor: int, size: int) -> None:
    """Have the disk hold room for all of a file, if its file system can promise that."""
    try:
        if size:
            native.fallocate(descriptor, size)
    except OSError as error:
        if error.errno not in native.UNSUPPORTED:
            raise


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    with explained("sync", path), opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


def sync_all(paths: Iterable[Path], on_step: Callable[[], None]) -> None:
    """Bring files or directories to the disk, several at a time; `on_step` is called after each."""
    _in_threads(sync, paths, on_step)


def _in_threads(work: Callable[[T], None], items: Iterable[T], on_step: Callable[[], None]) -> None:
    with ThreadPoolExecutor(SYNCS, "syncing") as threads:
        try:
            for _ in threads.map(work, items):
                on_step()
        finally:
            threads.shutdown(cancel_futures=True)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, where there is none."""
    with explained("create", path):
        os.makedirs(path, exist_ok=True)


def rename(old: Path, new: Path) -> None:
    """Give a file or a directory another name, at once or not at all."""
    with explained(f"rename to `{new}`", old):
        os.rename(old, new)


def remove_tree(path: Path) -> None:
    """Remove a directory with all that it holds."""
    with explained("remove", path):
        while os.path.lexists(path):
            with contextlib.suppress(FileNotFoundError):  # someone else removes there too
                shutil.rmtree(path)
