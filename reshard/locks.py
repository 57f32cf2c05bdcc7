"""A file that only one process holds: who has it writes beside it."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from reshard.errors import StorageError
from reshard.storage import explained, opened

# What file systems say that have no flock.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock `path`, whose file goes with it; or say False where another holds it."""
    with contextlib.ExitStack() as stack:
        with explained("lock", path):
            descriptor = stack.enter_context(opened(path, os.O_RDWR | os.O_CREAT))
            ours = _taken(descriptor, path)
        if ours:
            stack.callback(_unlink, path)
        yield ours


def _unlink(path: Path) -> None:
    """Remove a file that bars nobody where it stays."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _taken(descriptor: int, path: Path) -> bool:
    """Whether the lock is ours, on the file that has the name now and not on one just removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == os.stat(path).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise StorageError(
            f"`{path}`: cannot lock: {error.strerror}; dst.path needs a file system with flock "
            "(Lustre: mounted with -o flock)"
        ) from None
