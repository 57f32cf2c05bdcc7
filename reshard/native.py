"""System calls that Python's `os` does not have."""

import ctypes
import errno
import os
from functools import lru_cache

# What kernels, file systems and C libraries say that cannot.
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, size: int) -> None:
    """Give a file `size` bytes of disk, its contents kept; OSError where it has not been done.

    This is fallocate(2) itself. `os.posix_fallocate` is not: where a file system cannot, glibc
    reads and writes a byte of every block, which is slow, and undoes what others write meanwhile.
    """
    try:
        call = _library().fallocate
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    while call(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
