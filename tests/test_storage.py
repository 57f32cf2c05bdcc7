"""Positional I/O where the kernel does less than it was asked for, or nothing at all."""

import errno
import os
import signal
import threading
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard import native, storage
from reshard.errors import CheckpointError, ConfigError, StorageError
from reshard.space import allocated_bytes, require_space
from reshard.storage import (
    MAX_BUFFERS,
    OPEN_FILES,
    RWF_DONTCACHE,
    SYNCS,
    UNCACHED_BYTES,
    Files,
    crc32_of,
    create,
    read_bytes,
    sync,
    sync_all,
)

DATA = bytes(range(256)) * 8
files_are_rewritten = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    files = Files(tmp_path, os.O_RDONLY)
    yield files
    files.close()


@pytest.fixture
def target(tmp_path):
    create(tmp_path / "file", len(DATA), [])
    files = Files(tmp_path, os.O_WRONLY)
    yield files
    files.close()


def stops_short(call, most):
    """A vectored call that does at most `most` bytes at once."""

    def limited(descriptor, buffers, offset):
        taken, room = [], most
        for buffer in buffers:
            taken.append(buffer[:room])
            room -= len(taken[-1])
            if room == 0:
                break
        return call(descriptor, taken, offset)

    return limited


def cut(data, sizes):
    """`data` as consecutive views of the given sizes."""
    views, start = [], 0
    for size in sizes:
        views.append(memoryview(data)[start : start + size])
        start += size
    return views


sizes = st.lists(st.integers(1, 200), min_size=1, max_size=10)


@files_are_rewritten
@given(sizes=sizes, most=st.integers(1, 300), offset=st.integers(0, 40))
def test_short_reads_are_gone_on_with(monkeypatch, tmp_path, sizes, most, offset):
    (tmp_path / "file").write_bytes(DATA)
    files, into = Files(tmp_path, os.O_RDONLY), bytearray(sum(sizes))
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "preadv", stops_short(os.preadv, most))
        files.read("file", offset, cut(into, sizes))
    files.close()
    assert into == DATA[offset : offset + len(into)]
    assert files.nbytes == len(into)


@files_are_rewritten
@given(sizes=sizes, most=st.integers(1, 300), offset=st.integers(0, 40))
def test_short_writes_are_gone_on_with(monkeypatch, tmp_path, sizes, most, offset):
    create(tmp_path / "file", len(DATA), [])
    (tmp_path / "file").write_bytes(bytes(len(DATA)))
    files, count = Files(tmp_path, os.O_WRONLY), sum(sizes)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "pwritev", stops_short(os.pwritev, most))
        files.write("file", offset, cut(DATA, sizes))
    files.close()
    rest = bytes(len(DATA) - offset - count)
    assert (tmp_path / "file").read_bytes() == bytes(offset) + DATA[:count] + rest
    assert files.nbytes == count


def test_more_buffers_than_a_call_takes(tmp_path, source, target):
    into = bytearray(len(DATA))
    assert len(DATA) > 2 * MAX_BUFFERS
    source.read("file", 0, cut(into, [1] * 0))
    (tmp_path / "other").write_bytes(DATA)
    source.read("other", 0, cut(into, [1] * len(DATA)))
    assert into == DATA
    target.write("file", 0, cut(DATA, [1] * len(DATA)))
    assert (tmp_path / "file").read_bytes() == DATA


def test_signals_in_the_middle_do_no_harm(tmp_path):
    data = os.urandom(32 << 20)
    create(tmp_path / "file", len(data), [])
    files, into, hits = Files(tmp_path, os.O_RDWR), bytearray(len(data)), []
    handler = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        files.write("file", 0, cut(data, [1 << 20] * 32))
        files.read("file", 0, cut(into, [1 << 20] * 32))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        files.close()
    assert hits
    assert into == data


def test_more_files_than_stay_open(tmp_path):
    def opened():
        names = os.listdir("/proc/self/fd")
        return sum(
            os.readlink(f"/proc/self/fd/{n}").startswith(str(tmp_path))
            for n in names
            if os.path.exists(f"/proc/self/fd/{n}")
        )

    count = OPEN_FILES + 10
    for number in range(count):
        (tmp_path / f"{number}").write_bytes(b"%08d" % number)
    files, into = Files(tmp_path, os.O_RDONLY), bytearray(8)
    for number in [*range(count), 0, *range(count)]:
        files.read(f"{number}", 0, [memoryview(into)])
        assert into == b"%08d" % number
        assert opened() <= OPEN_FILES
    assert opened() == OPEN_FILES
    files.close()
    assert opened() == 0


def test_the_least_recently_used_file_is_closed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(b"x")
    files, into = Files(tmp_path, os.O_RDONLY), bytearray(1)
    seen, really = [], os.open
    monkeypatch.setattr(
        storage.os, "open", lambda path, *rest: seen.append(Path(path).name) or really(path, *rest)
    )
    for name in "abacab":
        files.read(name, 0, [memoryview(into)])
    files.close()
    assert "".join(seen) == "abcb"


@pytest.mark.parametrize("offset", [len(DATA) - 3, len(DATA), len(DATA) + 100])
def test_a_file_that_ends_too_early_is_a_checkpoint_error(source, offset):
    message = rf"file`: truncated: ends at byte {max(offset, len(DATA))}"
    with pytest.raises(CheckpointError, match=message):
        source.read("file", offset, [memoryview(bytearray(4))])
    with pytest.raises(CheckpointError, match=f"truncated: ends before byte {offset + 4}"):
        read_bytes(source._root / "file", offset, 4)


def test_read_bytes_reads_exactly_what_was_asked_for(source):
    assert read_bytes(source._root / "file", 5, 7) == DATA[5:12]


@pytest.mark.parametrize("step", [1, 7, len(DATA), len(DATA) + 1])
def test_a_checksum_is_that_of_the_bytes_whatever_the_step(source, monkeypatch, step):
    monkeypatch.setattr(storage, "STEP_BYTES", step)
    path = source._root / "file"
    assert crc32_of(path, 0, len(DATA)) == zlib.crc32(DATA)
    assert crc32_of(path, 5, 100) == zlib.crc32(DATA[5:105])
    assert crc32_of(path, 5, 0) == 0
    assert crc32_of(path, 105, 9, zlib.crc32(DATA[5:105])) == zlib.crc32(DATA[5:114])
    with pytest.raises(CheckpointError, match=f"file`: truncated: ends before byte {len(DATA)}1"):
        crc32_of(path, 3, int(f"{len(DATA)}1") - 3)
    with pytest.raises(StorageError, match=r"absent`: cannot read: No such file"):
        crc32_of(path.with_name("absent"), 0, 1)


def test_what_was_written_is_synced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    for name in "abcd":
        (tmp_path / name).write_bytes(b"....")
    files, synced, steps = Files(tmp_path, os.O_RDWR), [], []
    monkeypatch.setattr(
        storage.os,
        "fsync",
        lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name),
    )
    files.read("d", 0, [memoryview(bytearray(4))])
    for name in "cabc":
        files.write(name, 0, [memoryview(b"1234")])
    files.sync(lambda: steps.append(1))
    assert (sorted(synced), len(steps)) == (["a", "b", "c"], 3)
    files.sync(lambda: steps.append(1))
    files.close()
    assert len(synced) == 3, "synced twice"


def test_many_files_are_synced_at_a_time_and_a_failure_is_one_of_them(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}" for number in range(100)]
    for path in paths:
        path.touch()
    meeting, steps = threading.Barrier(SYNCS, timeout=10), []
    monkeypatch.setattr(storage.os, "fsync", lambda _: meeting.wait())
    sync_all(paths[: 4 * SYNCS], lambda: steps.append(1))
    assert len(steps) == 4 * SYNCS
    monkeypatch.setattr(storage.os, "fsync", lambda _: time.sleep(0.01))
    paths[3].unlink()
    with pytest.raises(StorageError, match=r"/3`: cannot sync: No such file"):
        sync_all(paths, lambda: steps.append(1))
    assert len(steps) == 4 * SYNCS + 3


LONG, SHORT = UNCACHED_BYTES + 5, UNCACHED_BYTES - 1


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("refusal", [None, errno.EOPNOTSUPP])
def test_long_runs_go_past_the_cache_where_the_kernel_can(tmp_path, monkeypatch, through, refusal):
    really, advise, flags, advised = os.pwritev, os.posix_fadvise, [], []

    def pwritev(descriptor, buffers, offset, flag=0):
        flags.append(flag)
        if flag and refusal:
            raise OSError(refusal, os.strerror(refusal))
        return really(descriptor, buffers, offset)

    def posix_fadvise(*args):
        advised.append(args[1:])
        advise(*args)

    monkeypatch.setattr(storage.os, "pwritev", pwritev)
    monkeypatch.setattr(storage.os, "posix_fadvise", posix_fadvise)
    data = os.urandom(2 * LONG + SHORT)
    create(tmp_path / "file", len(data), [])
    files, views = Files(tmp_path, os.O_WRONLY, through=through), cut(data, [LONG, LONG, SHORT])
    for offset, view in zip((0, LONG, 2 * LONG), views, strict=True):
        files.write("file", offset, [view[:100], view[100:]])
    files.close()
    assert ((tmp_path / "file").read_bytes(), files.nbytes) == (data, len(data))
    if not through:
        assert (flags, advised) == ([0, 0, 0], [])
    elif refusal:
        assert flags == [RWF_DONTCACHE, 0, 0, 0], "it is asked once"
        assert advised == [(at, LONG, os.POSIX_FADV_DONTNEED) for at in (0, LONG)]
    else:
        assert (flags, advised) == ([RWF_DONTCACHE, RWF_DONTCACHE, 0], [])


def test_an_error_past_the_cache_is_an_error(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    create(tmp_path / "file", LONG, [])
    files = Files(tmp_path, os.O_WRONLY, through=True)
    monkeypatch.setattr(storage.os, "pwritev", fails)
    with pytest.raises(StorageError, match=r"file`: cannot write: No space left on device"):
        files.write("file", 0, [memoryview(bytes(LONG))])
    files.close()


def test_a_failing_sync_names_the_file(target, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target.write("file", 0, [memoryview(b"1234")])
    monkeypatch.setattr(storage.os, "fsync", fails)
    with pytest.raises(StorageError, match=r"file`: cannot sync: Input/output error"):
        target.sync(lambda: None)


def test_a_file_that_is_not_there_is_named(tmp_path):
    files = Files(tmp_path, os.O_RDONLY)
    with pytest.raises(StorageError, match=r"absent`: cannot read: No such file or directory$"):
        files.read("absent", 0, [memoryview(bytearray(4))])
    with pytest.raises(StorageError, match=r"absent`: cannot read: No such file"):
        read_bytes(tmp_path / "absent", 0, 4)
    with pytest.raises(StorageError, match=r"absent`: cannot sync: No such file"):
        sync(tmp_path / "absent")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"No space left on device; free some space$"),
        (errno.EIO, r"Input/output error$"),
    ],
)
def test_a_failing_write_says_what_to_do(target, monkeypatch, number, message):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "pwritev", fails)
    with pytest.raises(StorageError, match=rf"file`: cannot write: {message}"):
        target.write("file", 0, [memoryview(b"1234")])


def test_a_full_device_is_told_from_others():
    files = Files(Path("/dev"), os.O_WRONLY)
    with pytest.raises(
        StorageError, match=r"`/dev/full`: cannot write: No space .*; free some space$"
    ):
        files.write("full", 0, [memoryview(b"1234")])
    files.close()


def test_create_places_chunks_and_keeps_what_is_there(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    create(path, 10, [(1, b"ab"), (7, b"cde")])
    assert path.read_bytes() == b"\0ab\0\0\0\0cde"
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(b"XY")
    create(path, 9, [(1, b"AB")])
    assert path.read_bytes() == b"\0AB\0XY\0cd"


def test_a_file_that_is_made_has_its_place_on_the_disk(tmp_path):
    path = tmp_path / "file"
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        native.fallocate(probe, 1)
    except OSError as error:
        pytest.skip(f"no fallocate here: {error.strerror}")
    finally:
        os.close(probe)
    create(path, 3_000_001, [(1_000_000, b"abc")])
    assert path.stat().st_blocks * 512 >= 3_000_001
    create(path, 2_000_000, [])
    assert path.read_bytes() == bytes(1_000_000) + b"abc" + bytes(999_997)
    with pytest.raises(StorageError, match=r"large`: cannot create: .*(space|large)"):
        create(tmp_path / "large", 1 << 50, [])
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.fallocate(probe, 1)


@pytest.mark.parametrize("number", native.UNSUPPORTED)
def test_a_file_system_without_fallocate_will_do(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    def emulated(*_):
        raise AssertionError("glibc reads and writes every block")

    monkeypatch.setattr(storage.native, "fallocate", fails)
    monkeypatch.setattr(storage.os, "posix_fallocate", emulated)
    create(tmp_path / "file", 9, [(2, b"ab")])
    assert (tmp_path / "file").read_bytes() == b"\0\0ab\0\0\0\0\0"


def test_create_goes_on_after_a_short_write(tmp_path, monkeypatch):
    really = os.pwrite
    monkeypatch.setattr(storage.os, "pwrite", lambda fd, data, at: really(fd, data[:2], at))
    create(tmp_path / "file", 8, [(0, b"abcdefgh")])
    assert (tmp_path / "file").read_bytes() == b"abcdefgh"


def test_a_target_that_does_not_fit_is_refused_before_it_is_begun(tmp_path):
    require_space(tmp_path, 1000, 0)
    with pytest.raises(ConfigError, match=r"dst.path: needs 1,152,921,504,606,846,976 bytes, but"):
        require_space(tmp_path, 1 << 60, 0)
    require_space(tmp_path, 1 << 60, 1 << 60)


def test_allocated_bytes_are_those_on_the_disk(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(10_000))
    before = allocated_bytes(tmp_path)
    assert before >= 10_000
    with open(tmp_path / "hole", "wb") as hole:
        hole.truncate(1 << 30)
    assert allocated_bytes(tmp_path) < before + (1 << 20)
