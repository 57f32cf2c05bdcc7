"""A layer below `storage`, `locks` and `space` that counts system calls, and has a chosen one fail.

Every call is known by the public function that it is made in, and by its own name.
"""

import contextlib
import errno
import fcntl
import inspect
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from types import CodeType
from typing import Any

import pytest

from reshard import locks, native, space, storage

Site = tuple[str, str]  # a public function of the modules below, and a call that it makes
MODULES = (storage, locks, space)


def public_functions() -> dict[str, CodeType]:
    """Every public function and method of the modules by name, as they have them."""
    found: dict[str, Any] = {}
    for module, name, item in ((m, *pair) for m in MODULES for pair in vars(m).items()):
        if name.startswith("_") or getattr(item, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(item):
            found[name] = item
        elif inspect.isclass(item):
            methods = inspect.getmembers(item, inspect.isfunction)
            found |= {
                f"{name}.{method}": function
                for method, function in methods
                if not method.startswith("_") or method == "__init__"
            }
    return {name: inspect.unwrap(item).__code__ for name, item in found.items()}


def fails(number: int) -> Callable[..., Any]:
    """The call fails with this error, and does nothing."""

    def fault(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fault


def slow(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call takes its time."""
    time.sleep(0.02)
    return call(*args, **options)


def fails_late(number: int) -> Callable[..., Any]:
    """The call does what it should, and yet reports an error, as over a network."""

    def fault(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        call(*args, **options)
        raise OSError(number, os.strerror(number))

    return fault


def ends_early(call: Callable[..., Any], *args: Any) -> Any:
    """A read of a file that ends here."""
    return 0 if call is os.preadv else b""


def short(call: Callable[..., Any], descriptor: int, data: Any, *args: Any) -> Any:
    """The call does a part of its work, and says so."""
    if call is os.pread:
        return call(descriptor, max(1, data // 3), *args)
    if isinstance(data, list):
        first = memoryview(data[0]).cast("B")
        return call(descriptor, [first[: max(1, len(first) // 3)]], *args)
    return call(descriptor, data[: max(1, len(data) // 3)], *args)


def torn(number: int) -> Callable[..., Any]:
    """A part of the bytes is written, and then there is an error."""

    def fault(call: Callable[..., Any], *args: Any) -> Any:
        short(call, *args)
        raise OSError(number, os.strerror(number))

    return fault


@dataclass(frozen=True)
class Fault:
    """What befalls a call; a `harmless` one must not even fail the job."""

    name: str
    act: Callable[..., Any]
    harmless: bool = False


EIO = Fault("EIO", fails(errno.EIO))
FULL = Fault("ENOSPC", fails(errno.ENOSPC))
INTERRUPTED = Fault("EINTR", fails(errno.EINTR))
LATE = Fault("EIO after the deed", fails_late(errno.EIO))
SLOW = Fault("slow", slow, harmless=True)
SHORT = Fault("short", short, harmless=True)
READS = (EIO, INTERRUPTED, SHORT, Fault("end of file", ends_early), SLOW)
WRITES = (EIO, FULL, INTERRUPTED, SHORT, Fault("torn, then ENOSPC", torn(errno.ENOSPC)), LATE, SLOW)
CHANGES = (EIO, FULL, LATE, SLOW)
LOOKS = (EIO,)
OPENS = (
    EIO,
    FULL,
    Fault("EACCES", fails(errno.EACCES)),
    Fault("EMFILE", fails(errno.EMFILE)),
    SLOW,
)
UNSUPPORTED = Fault("EOPNOTSUPP", fails(errno.EOPNOTSUPP), harmless=True)
LOCKS = (EIO, Fault("ENOSYS", fails(errno.ENOSYS)), Fault("held", fails(errno.EAGAIN)))
# The calls that the modules may make, by the module that has them, each with what may befall it.
CALLS: dict[str, dict[str, tuple[Fault, ...]]] = {
    "os": {
        "open": OPENS,
        "close": (LATE,),
        "pread": READS,
        "preadv": READS,
        "pwrite": WRITES,
        "pwritev": WRITES,
        "write": WRITES,
        "ftruncate": CHANGES,
        "fsync": CHANGES,
        "posix_fadvise": LOOKS,
        "makedirs": CHANGES,
        "rename": CHANGES,
        "unlink": CHANGES,
        "stat": LOOKS,
        "fstat": LOOKS,
        "walk": LOOKS,
    },
    "shutil": {"rmtree": CHANGES, "disk_usage": LOOKS},
    "fcntl": {"flock": LOCKS},
    "native": {"fallocate": (*CHANGES, UNSUPPORTED)},
}
REAL = {"os": os, "shutil": shutil, "fcntl": fcntl, "native": native}


@dataclass
class Shim:
    """What is called, in order; and the fault that befalls the `nth` call of `site`, if any."""

    site: Site | None = None
    nth: int = 0
    fault: Callable[..., Any] | None = None
    calls: list[Site] = field(default_factory=list)
    struck: bool = False
    _counts: Counter[Site] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        site = (_function(), name)
        with self._lock:
            self.calls.append(site)
            self._counts[site] += 1
            hit = site == self.site and self._counts[site] == self.nth
            self.struck |= hit
        if hit and self.fault is not None:
            return self.fault(call, *args, **options)
        return call(*args, **options)


class Module:
    """A module whose calls go through a shim."""

    def __init__(self, shim: Shim, name: str) -> None:
        self._shim, self._name = shim, name

    def __getattr__(self, name: str) -> Any:
        item = getattr(REAL[self._name], name)
        if not callable(item) or isinstance(item, type) or name in HARMLESS:
            return item
        assert name in CALLS[self._name], f"{self._name}.{name} is called, and has no case"
        return lambda *args, **options: self._shim(name, item, *args, **options)


HARMLESS = {"fspath", "strerror"}
_NAMES = {code: name for name, code in public_functions().items()}


def _function() -> str:
    """The public function that the current call is made in."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code in _NAMES:
            return _NAMES[frame.f_code]
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


@contextlib.contextmanager
def below_storage(shim: Shim) -> Iterator[Shim]:
    """Put a shim below the modules for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in product(MODULES, CALLS):
            if hasattr(module, name):
                patch.setattr(module, name, Module(shim, name))
        yield shim
