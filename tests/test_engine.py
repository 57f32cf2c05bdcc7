"""What the engine does besides moving bytes: copies in memory, system calls, allocations, modes."""

import contextlib
import ctypes
import os
import stat
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from reshard import job, storage
from reshard.distributed import Ranks
from reshard.engine import Counters, Engine
from tests.commands import done, move, write
from tests.oracles.models import wide_model
from tests.ranks import run_ranks
from tests.settings import Job, Ready

DIRECT, OWNER = "engine.exchange=direct", "engine.writers=owner"
MODEL_BYTES = 24 << 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("engine"), wide_model(MODEL_BYTES)
    return {name: write(name, folder / name, model) for name in ("meta4", "hf")}


def counted(jobs: list[Ready]) -> list[list[Counters]]:
    """The counters of every job, by rank; what one rank does."""
    ranks, found = Ranks(), []
    for item in jobs:
        report = job.run(item.config(ranks.world), ranks, force=False, say=lambda line: None)
        found.append([figures.counters for figures in report.ranks])
    ranks.barrier("all jobs done")
    ranks.close()
    return found


def test_no_byte_is_copied_in_memory_without_need(sources: dict[str, Path], tmp_path: Path) -> None:
    """Not at all where it is written as it was read; else once, and once more if it crosses."""
    ways = [
        ("hf", "fsdp3", DIRECT, 0.0),  # rows are cut, nothing else
        ("hf", "meta2", DIRECT, 1.0),  # columns are cut, and rotary rows swapped
        ("meta4", "hf", DIRECT, 1.0),
        ("meta4", "tp2", OWNER, 1.0),
    ]
    jobs = [
        Job(sources[start], tmp_path / f"{start}-{end}", end, (mode,)).ready()
        for start, end, mode, _ in ways
    ]
    for (*_, mode, most), found in zip(ways, run_ranks(2, counted, jobs)[0], strict=True):
        for own in found:
            assert own.written > MODEL_BYTES // 4
            assert (own.exchanged > 0) == (mode == OWNER)
            assert own.copied <= most * own.written + own.exchanged, (mode, own)
        total = sum(own.copied for own in found)
        assert (total > 0) == (most > 0)
        assert total < 0.6 * sum(own.written for own in found) or mode == OWNER


def written_slowly(jobs: list[Ready]) -> None:
    """Do jobs whose writing takes longer than all the rest."""
    ranks, really = Ranks(), storage.Files.write

    def slow(files: storage.Files, *args: Any) -> None:
        time.sleep(0.02)
        really(files, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Files, "write", slow)
        for item in jobs:
            job.run(item.config(ranks.world), ranks, force=False, say=lambda line: None)
    ranks.close()


def test_what_is_written_from_where_it_was_read_is_not_read_over(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    options = (DIRECT, "engine.memory=20MiB")
    jobs = [Job(sources["hf"], tmp_path / end, end, options).ready() for end in ("fsdp2", "tp2")]
    run_ranks(1, written_slowly, jobs)
    for end in ("fsdp2", "tp2"):
        done(*move("hf", sources["hf"], end, tmp_path / f"plain-{end}"))
        files = [path for path in (tmp_path / f"plain-{end}").rglob("*") if path.is_file()]
        assert len(files) > 2
        for path in files:
            other = tmp_path / end / path.relative_to(tmp_path / f"plain-{end}")
            assert other.read_bytes() == path.read_bytes(), path


def test_files_are_read_and_written_in_large_calls(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, list[int]] = {"preadv": [], "pwritev": []}

    def counting(name: str) -> Any:
        really = getattr(os, name)

        def call(*args: Any) -> int:
            count: int = really(*args)
            sizes[name].append(count)
            return count

        return call

    for name in sizes:
        monkeypatch.setattr(storage.os, name, counting(name))
    done(*move("hf", sources["hf"], "hf", tmp_path / "hf", DIRECT))
    for name, counts in sizes.items():
        assert sum(counts) >= MODEL_BYTES - (64 << 10), name
        assert len(counts) <= 60, f"{name}: {len(counts)} calls for {MODEL_BYTES} bytes"


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd")
FIELDS += ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Usage(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS)


def allocated() -> int:
    """Bytes that this process holds of what malloc gives out, which tensors are made of."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Usage
    usage = ask()
    return int(usage.uordblks + usage.hblkhd)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """After each round: Python's memory, the most that it was since the last, and all memory."""
    found: list[tuple[int, int, int]] = []
    original = Engine._write

    def write_and_look(self: Engine, *args: Any) -> int:
        nbytes = original(self, *args)
        found.append((*tracemalloc.get_traced_memory(), allocated()))
        tracemalloc.reset_peak()
        return nbytes

    monkeypatch.setattr(Engine, "_write", write_and_look)
    return found


@pytest.mark.parametrize("target", ["tp2", "hf"])
def test_memory_is_the_same_after_10_rounds_and_after_100(
    target: str, sources: dict[str, Path], tmp_path: Path, seen: list[tuple[int, int, int]]
) -> None:
    for place in ("first", "second"):  # what is remembered of the first is there for the second
        seen.clear()
        words = move("meta4", sources["meta4"], target, tmp_path / place, DIRECT)
        with traced():
            done(*words, "engine.memory=13MiB")
    assert len(seen) >= 100
    (first, _, begun), (last, _, ended) = seen[9], seen[99]
    assert ended - begun < 1 << 20, "tensors"
    assert last - first < 512 << 10, "Python's objects"


@pytest.mark.parametrize("target", ["tp2", "hf"])
def test_no_round_takes_memory_for_its_bytes(
    target: str, sources: dict[str, Path], tmp_path: Path, seen: list[tuple[int, int, int]]
) -> None:
    """What comes and goes is small against what is moved."""
    with traced():
        words = move("meta4", sources["meta4"], target, tmp_path / "dst", DIRECT)
        done(*words, "engine.memory=32MiB")
    moved = MODEL_BYTES // len(seen)
    assert len(seen) >= 5
    assert moved > 3 << 20
    over = max(peak - before for (before, *_), (_, peak, _) in pairwise(seen))
    assert over < moved // 4, f"{over} bytes for a moment, of {moved} in a round"


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Python's allocations are traced."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture(params=[0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("target", ["tp2", "hf"])
def test_the_umask_holds_for_all_that_is_published(
    target: str, sources: dict[str, Path], tmp_path: Path, umask: int
) -> None:
    done(*move("meta4", sources["meta4"], target, tmp_path / "dst"))
    found = [tmp_path / "dst", *(tmp_path / "dst").rglob("*")]
    assert len(found) > 3
    for path in found:
        allowed = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == allowed, path
