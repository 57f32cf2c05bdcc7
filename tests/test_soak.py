"""Many conversions in one process, several jobs on one machine: nothing grows, nothing mixes."""

import contextlib
import ctypes
import gc
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reshard import job as program
from reshard.distributed import Ranks
from reshard.errors import ReshardError
from tests import jobs
from tests.commands import model, move, read, write
from tests.interrupted import SMALL_ROUNDS, Undisturbed, only
from tests.oracles import dcp
from tests.oracles.compare import assert_same, assert_same_files
from tests.ranks import run_ranks
from tests.sabotage import EVERY_RANK, WRITE, sabotage
from tests.settings import Job, Ready, beside

pytestmark = [pytest.mark.fault, pytest.mark.slow]

SHORT, LONG = 40, 1000
GROWTH_BYTES = 6 << 20
# What a rank has of itself: memory in bytes, descriptors, threads.
Own = tuple[int, int, int]


def resources() -> Own:
    """After all that nobody needs is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(os.listdir("/proc/self/fd"))
    return pages * os.sysconf("SC_PAGESIZE"), descriptors, threading.active_count()


def growth(seen: Sequence[int]) -> int:
    """From the first quarter to the last; of each the least: a thread may just hold a file."""
    quarter = len(seen) // 4
    return min(seen[-quarter:]) - min(seen[:quarter])


def many(ready: Sequence[Ready], count: int, every: int) -> tuple[list[Own], list[str]]:
    """What one rank has of itself, `every` so many conversions; how each kind ended."""
    ranks, seen, ends = Ranks(), list[Own](), [""] * len(ready)
    ranks.endure(lambda: None)
    for number in range(count):
        place = number % len(ready)
        ends[place] = one(ready[place], ranks, number)
        if (number + 1) % every == 0:
            ranks.barrier("measured")
            seen.append(resources())
    ranks.barrier("all jobs done")
    ranks.close()
    return seen, ends


def one(item: Ready, ranks: Ranks, number: int) -> str:
    """A conversion whose target the next one finds gone; how it ended."""
    config = item.config(ranks.world)
    try:
        report = program.run(config, ranks, force=number % 2 == 1, say=lambda line: None)
    except ReshardError as error:
        return f"{type(error).__name__}: {error}"
    ranks.barrier("seen")
    if ranks.rank == 0 and config.target.path is not None:
        kept = config.target.path.with_name(f"{config.target.path.name}.last")
        if kept.exists():
            remove(kept)
        config.target.path.rename(kept)
    ranks.barrier("put aside")
    return report.state


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def kinds(folder: Path) -> list[Job]:
    """Conversions between many formats, in both modes; two of a damaged source, one refused."""
    sources = {kind: write(kind, folder / kind) for kind in ("meta2", "hf", "tp2")}
    dcp_source = folder / "fsdp"
    beside(dcp.write_fsdp, model(), dcp_source, shards=3)
    damaged, differing = write("meta2", folder / "damaged"), write("hf", folder / "occupied")
    os.truncate(damaged / "consolidated.01.pth", 5000)
    direct = ("engine.exchange=direct",)
    return [
        Job(sources["meta2"], folder / "one", "tp4", source_spec="meta2"),
        Job(sources["hf"], folder / "two", "gguf", ("dst.dtype=float16",), source_spec="hf"),
        Job(damaged, folder / "three", "hf", source_spec="meta2"),
        Job(dcp_source, folder / "four", "hf", direct, source_spec="dcp"),
        Job(sources["hf"], folder / "five" / "run", "titan3", source_spec="hf"),
        Job(sources["tp2"], differing, "meta4", source_spec="tp2"),
        Job(sources["tp2"], folder / "six", "meta4", direct, source_spec="tp2"),
        Job(sources["hf"], folder / "seven", "fsdp2", ("engine.writers=owner",), source_spec="hf"),
    ]


def test_many_conversions_in_one_group_leave_nothing_behind(
    long: bool, tmp_path: Path, record_property: Any
) -> None:
    """From a fifth of them on, memory, descriptors and threads stay as they are."""
    count, conversions = (LONG if long else SHORT), kinds(tmp_path)
    ready = [item.ready() for item in conversions]
    found = run_ranks(2, many, ready, count, count // 20, timeout=1500)
    record_property("conversions", count)
    for seen, ends in found:
        assert [end for end in ends if end != "fresh"] == [ends[2], ends[5]]
        assert "CheckpointError" in ends[2]
        assert "consolidated.01.pth" in ends[2]
        assert "exists" in ends[5]
        memory, descriptors, threads = zip(*seen[len(seen) // 5 :], strict=True)
        assert growth(descriptors) == 0, descriptors
        assert growth(threads) == 0, threads
        assert growth(memory) < GROWTH_BYTES, [size >> 10 for size in memory]
    assert_same(read("tp4", tmp_path / "one.last"), model())
    assert_same(read("hf", tmp_path / "four.last"), model())
    assert_same(read("meta4", tmp_path / "six.last"), model())
    assert not list(tmp_path.rglob("*.partial-*"))
    assert not list(tmp_path.rglob("*.lock"))


def start(world: int, words: list[str], folder: Path) -> jobs.Job:
    """A slow job, whose words are kept in a folder of its own."""
    folder.mkdir()
    return jobs.start(world, words, folder / "said", sabotage, WRITE, EVERY_RANK, 1, "sleep 0.03")


def test_jobs_side_by_side_do_not_disturb_each_other(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Four of them, two of which make the same of the same source."""
    targets = {"a": "tp2", "b": "hf", "c": "tp2", "d": "meta2"}
    with contextlib.ExitStack() as stack:
        under_way = []
        for name, target in targets.items():
            words = [*move("meta4", undisturbed.source, target, tmp_path / name), SMALL_ROUNDS]
            under_way.append(stack.enter_context(start(2, words, tmp_path / f"said-{name}")))
        for job in under_way:
            assert (job.wait(90), job.err) == ([0, 0], "")
    for name, target in targets.items():
        assert_same_files(tmp_path / name, undisturbed[target])
    assert only(tmp_path, *targets, *(f"said-{name}" for name in targets))


def test_of_jobs_on_one_target_one_is_done_and_the_others_are_refused(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Three at the same time, two of which are the same job."""
    with contextlib.ExitStack() as stack:
        under_way = []
        for number, target in enumerate(("tp2", "tp2", "hf")):
            words = [*move("meta4", undisturbed.source, target, tmp_path / "dst"), SMALL_ROUNDS]
            under_way.append(stack.enter_context(start(2, words, tmp_path / f"said-{number}")))
        codes = [tuple(job.wait(90)) for job in under_way]
    assert sorted(codes) == [(0, 0), (2, 2), (2, 2)], [job.err for job in under_way]
    done = codes.index((0, 0))
    for number, job in enumerate(under_way):
        if number != done:
            assert re.search(r"dst`: another job is writing it \(`.*` is locked\)", job.err)
            assert job.err.count("\n") == 1, job.err
    assert_same_files(tmp_path / "dst", undisturbed["hf" if done == 2 else "tp2"])
    assert only(tmp_path, "dst", "said-0", "said-1", "said-2")
