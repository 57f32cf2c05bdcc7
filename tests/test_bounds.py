"""Bytes and memory, counted here by brute force or by the kernel; and copies that differ."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from reshard import job
from reshard.distributed import Ranks
from reshard.plan import Plan
from reshard.traffic import loads_by_rank
from tests.oracles import dcp, hf, meta, nanotron
from tests.oracles.compare import assert_same, bits
from tests.oracles.models import Model, hashed, model_a, shapes, wide_model
from tests.ranks import run_ranks
from tests.settings import (
    EVERY,
    STEP,
    TOPOLOGIES,
    Job,
    Outcome,
    Ready,
    beside,
    convert,
    must_convert,
)

REPO = Path(__file__).parents[1]
DIRECT = "engine.exchange=direct"
NEAREST = "engine.writers=nearest"
OWNER = "engine.writers=owner"
SMALL_READS = 512 << 10  # headers, configs, journals, and modules imported on the way
JOURNAL = 96 << 10
Ids = NDArray[np.int64]

# ------------------------------------------------------------------------------------- measuring


def measured(world: int, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The report of every job, with counters per rank and the kernel's view of the bytes."""
    ready = [item.ready() for item in jobs]
    reports: list[dict[str, Any]] = run_ranks(world, measure_here, ready)[0]
    return reports


def measure_here(jobs: Sequence[Ready]) -> list[dict[str, Any]]:
    """What one rank does."""
    ranks, reports = Ranks(), []
    for item in jobs:
        config = item.config(ranks.world)
        job.prepare(config)  # modules are imported, or the kernel would count their files
        ranks.barrier("begin")
        before = kernel_bytes()
        report = job.run(config, ranks, force=False, say=lambda line: None)
        after = kernel_bytes()
        moved = {key: after[key] - before[key] for key in after}
        counters = [figures.counters for figures in report.ranks]
        found = {
            key: [getattr(c, key) for c in counters] for key in ("read", "exchanged", "written")
        }
        kernel = ranks.gather(moved)
        reports.append({**json.loads(report.to_json()), "by_rank": found, "kernel": kernel})
    ranks.barrier("all jobs done")
    ranks.close()
    return reports


def kernel_bytes() -> dict[str, int]:
    """What this process has read and written; Gloo's sending counts, its receiving does not."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    counts = {key: int(count) for key, count in lines}
    return {key: counts[key] for key in ("rchar", "wchar")}


def planned(item: Job, world: int) -> Plan:
    """The plan of a job, for any number of ranks."""
    return job.prepare(item.ready().made).plan(world)


def size_of(path: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# --------------------------------------------------------------- element by element, from the files


def stored_tensors(path: Path, model: Model) -> Iterator[tuple[int, Tensor]]:
    """The tensors of all files, each with the mesh coordinate that it belongs to."""
    if (path / "params.json").exists():
        for coordinate, file in enumerate(sorted(path.glob("*.pth"))):
            for key, tensor in meta.load(file).items():
                if key != "rope.freqs":
                    yield coordinate, tensor
    elif (path / "model").exists():
        yield from nanotron_tensors(path, model.config)
    elif (path / ".metadata").exists() or (path / STEP).exists():
        yield from dcp_tensors(path if (path / ".metadata").exists() else path / STEP)
    else:
        for file in path.glob("*.safetensors"):
            yield from ((0, tensor) for tensor in load_file(file).values())


def nanotron_tensors(path: Path, config: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Coordinates are stage by stage; a replicated tensor belongs to the first of its stage."""
    tp, pp = nanotron.topology(path)
    stages = nanotron.stage_of_blocks(config, pp)
    for parameter in nanotron.parameters(config):
        stage = stages[parameter.block]
        for rank in range(tp if parameter.dim is not None else 1):
            file = path / parameter.file(stage, pp, rank, tp)
            yield stage * tp + rank, load_file(file)["data"]


@cache
def dcp_tensors(path: Path) -> list[tuple[int, Tensor]]:
    """Coordinates are the ranks that files are named after."""
    whole, boxes, found = dcp.read(path), dcp.boxes(path), []
    for index, info in dcp.metadata(path).storage_data.items():
        offset = tuple(index.offset)
        place = dcp.slices((offset, dict(boxes[index.fqn])[offset]))
        found.append((int(info.relative_path.split("_")[2]), whole[index.fqn][place]))
    return found


def ids(tensor: Tensor) -> Ids:
    """The elements, each of which is a number of its own in the whole float32 model."""
    found: Ids = tensor.flatten().to(torch.int64).numpy()
    return found


def homes(path: Path, model: Model, world: int) -> list[tuple[int, Ids]]:
    """(rank, elements) of all stored tensors, where coordinate c belongs to rank c mod world."""
    return [(coordinate % world, ids(t)) for coordinate, t in stored_tensors(path, model)]


def first_readers(path: Path, model: Model, world: int, count: int) -> Ids:
    """For every element the rank that owns its first coordinate."""
    found = np.full(count + 1, -1, dtype=np.int64)
    ordered = sorted(stored_tensors(path, model), key=lambda pair: -pair[0])
    for coordinate, tensor in ordered:
        found[ids(tensor)] = coordinate % world
    assert (found[1:] >= 0).all()
    return found


def needed(path: Path, model: Model, world: int, count: int) -> NDArray[np.bool_]:
    """[rank, element]: whether a rank, as the owner of coordinates, writes an element somewhere."""
    found = np.zeros((world, count + 1), dtype=bool)
    for rank, elements in homes(path, model, world):
        found[rank, elements] = True
    found[:, 0] = False  # padding
    return found


# as many coordinates as ranks at least, so that every coordinate is one rank's
OWNED = [
    ("meta2", "tp3", 2),
    ("meta3", "tp2pp2", 3),
    ("tp2pp2", "meta3", 2),
    ("tp2pp2", "meta2", 2),
    ("pp5", "tp3", 3),
    ("meta3", "meta3", 3),
    ("tp3", "pp5", 2),
    ("tp2pp2", "meta6", 2),
    ("pp5", "meta6", 3),
    ("fsdp3", "tp2pp2", 2),
    ("2x3", "meta2", 2),
    ("meta2", "fsdp3", 2),
    ("titan-3x2", "fsdp8", 2),
    ("fsdp8", "meta3", 3),
    ("3x2", "tp2pp2", 3),
    ("fsdp3", "titan2tp3", 3),
]


@pytest.mark.parametrize("world", [2, 3])
def test_each_element_crosses_once_for_every_owner_elsewhere(world: int, tmp_path: Path) -> None:
    model = model_a(dtype=torch.float32)
    count = sum(tensor.numel() for tensor in model.tensors.values())
    ways = [(source, target) for source, target, ranks in OWNED if ranks == world]
    jobs = []
    for source, target in ways:
        if not (tmp_path / source).exists():
            EVERY[source].write(model, tmp_path / source)
        place = tmp_path / f"{source}-{target}"
        spec, more = (
            (EVERY[target].spec, EVERY[target].overrides) if target in EVERY else (target, ())
        )
        given = (OWNER, *EVERY[source].as_source(tmp_path / source, model), *more)
        jobs.append(Job(tmp_path / source, place, spec, given, "least"))
    for item, report in zip(jobs, measured(world, jobs), strict=True):
        readers = first_readers(item.source, model, world, count)
        wanted = needed(item.target, model, world, count)
        sent = [
            4 * int((wanted & (readers == rank) & (np.arange(world) != rank)[:, None]).sum())
            for rank in range(world)
        ]
        assert report["by_rank"]["exchanged"] == sent, item
        assert report["bytes"]["exchanged"] == report["bytes"]["exchanged_bound"] == sum(sent)
        assert sum(sent) > 0 or item.spec == item.source.name == "meta3"
        read = [0] * world
        for rank, elements in homes(item.source, model, world):
            read[rank] += 4 * len(elements)
        assert report["by_rank"]["read"] == read, item
        assert report["bytes"]["read_bound"] == sum(read)
        check_written(report, item, model)


def check_written(report: dict[str, Any], item: Job, model: Model) -> None:
    """Bytes written are those of the files: the tensors, and what is around them."""
    size = size_of(item.target)
    assert report["bytes"]["written_bound"] == size
    assert report["bytes"]["written"] == sum(report["by_rank"]["written"])
    tensors = sum(t.nbytes for _, t in stored_tensors(item.target, model))
    assert tensors <= report["bytes"]["written"] <= 1.001 * size


@pytest.mark.parametrize("writers", [NEAREST, OWNER])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_what_crosses_is_what_writers_lack(world: int, writers: str, tmp_path: Path) -> None:
    """Whoever the plan makes a reader and a writer: counted element by element, casts included."""
    wide, narrow = model_a(dtype=torch.float32), model_a()
    meta.write(wide, tmp_path / "meta2", 2)
    hf.write(wide, tmp_path / "hf")
    nanotron.write(narrow, tmp_path / "tp3", 3, 1)
    ways = [
        ("meta2", "tp3", "keep", 4),
        ("meta2", "tp2pp2", "bfloat16", 2),
        ("hf", "meta3", "keep", 4),
        ("tp3", "meta2", "float32", 2),
        ("tp3", "hf", "keep", 2),
    ]
    jobs = []
    for start, end, dtype, _ in ways:
        given = (writers, f"dst.dtype={dtype}")
        jobs.append(Job(tmp_path / start, tmp_path / f"to-{start}-{end}", end, given, "least"))
    crossing = 0
    for item, (*_, width), report in zip(jobs, ways, measured(world, jobs), strict=True):
        lacking = lacking_elements(planned(item, world))
        assert report["bytes"]["exchanged"] == width * lacking, item
        assert report["bytes"]["exchanged_bound"] == width * lacking, item
        crossing += lacking > 0
    assert crossing >= 2


def lacking_elements(plan: Plan) -> int:
    """(element, writer) pairs whose reader is another rank; each element has one reader."""
    total = 0
    for name in plan.names:
        shape = plan.source.places[name][0].placement.shape
        readers = np.full(shape, -1, dtype=np.int64)
        writers = np.zeros((plan.world, *shape), dtype=bool)
        for block in plan.blocks(name):
            move = plan.move(block)
            for rank, stored in move.reads:
                box = boxed(stored.region.start, stored.region.stop)
                if stored.copy == 0:
                    assert (readers[box] == -1).all(), f"{name}: read twice"
                    readers[box] = rank
            for rank, piece in move.pieces:
                box = boxed(piece.region.start, piece.region.stop)
                writers[(rank, *box)] = True
                if plan.writers == "nearest":
                    held = np.bincount(readers[box].flatten(), minlength=plan.world)
                    assert held[rank] == held.max(), f"{name}: rank {rank} is not nearest: {held}"
        assert (readers >= 0).all(), f"{name}: elements that nobody reads"
        assert writers.any(0).all(), f"{name}: elements that nobody writes"
        foreign = readers[None] != np.arange(plan.world).reshape(-1, *[1] * len(shape))
        total += int((writers & foreign).sum())
    return total


def boxed(start: Iterable[int], stop: Iterable[int]) -> tuple[slice, ...]:
    """An index of a box."""
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


# ---------------------------------------------------------------------------- the kernel's counters


@pytest.mark.parametrize("world", [2, 3])
def test_counters_are_those_of_the_kernel(world: int, tmp_path: Path) -> None:
    model = wide_model(64 << 20)
    meta.write(model, tmp_path / "meta", 2)
    hf.write(model, tmp_path / "hf", files=2)
    ways = [("meta", "hf", DIRECT), ("hf", "meta4", DIRECT)]
    ways += [("meta", "tp4", OWNER), ("hf", "meta2", NEAREST)]
    jobs = [
        Job(tmp_path / start, tmp_path / f"{start}-{end}", end, (mode,))
        for start, end, mode in ways
    ]
    for item, report in zip(jobs, measured(world, jobs), strict=True):
        counted, source = report["bytes"], size_of(item.source)
        assert counted["read"] == counted["read_bound"], item
        assert 0.999 * source < counted["read"] <= source
        assert counted["exchanged"] == counted["exchanged_bound"], item
        assert (counted["exchanged"] > 0) == (OWNER in item.overrides)
        assert counted["written"] <= 1.001 * size_of(item.target)
        assert counted["written_bound"] == size_of(item.target)
        for rank, kernel in enumerate(report["kernel"]):
            counts = {key: found[rank] for key, found in report["by_rank"].items()}
            where = f"{item}: rank {rank}: kernel {kernel}, counted {counts}"
            assert 0 <= kernel["rchar"] - counts["read"] < SMALL_READS, where
            wrote = kernel["wchar"] - counts["written"] - counts["exchanged"]
            assert 0 <= wrote < JOURNAL, where


@pytest.mark.parametrize("world", [2, 3])
def test_chunks_are_read_once_whichever_dim_the_target_cuts(world: int, tmp_path: Path) -> None:
    """Rows of a file go to all ranks of a row-parallel target, and no byte is fetched again."""
    model = wide_model(24 << 20)
    mapped = sum(tensor.nbytes for tensor in model.tensors.values())
    beside(dcp.write_fsdp, model, tmp_path / "fsdp", shards=8)
    beside(dcp.write_2d, model, tmp_path / "2d", dp=3, tp=2)
    ways = [
        (source, *way)
        for source in ("fsdp", "2d")
        for way in (("tp2pp2", NEAREST), ("meta2", OWNER), ("tp2", DIRECT))
    ]
    jobs = [
        Job(tmp_path / start, tmp_path / f"{start}-{end}", end, (mode,))
        for start, end, mode in ways
    ]
    for item, report in zip(jobs, measured(world, jobs), strict=True):
        counted, direct = report["bytes"], DIRECT in item.overrides
        assert counted["read"] == counted["read_bound"] == mapped, item
        assert counted["exchanged"] == counted["exchanged_bound"], item
        lacking = 0 if direct else 2 * lacking_elements(planned(item, world))
        assert counted["exchanged"] == lacking, item
        assert lacking > 0 or OWNER not in item.overrides
        fetched = sum(kernel["rchar"] for kernel in report["kernel"])
        assert 0 <= fetched - mapped < SMALL_READS * world, f"{item}: {fetched} for {mapped}"
        assert_same(TOPOLOGIES[item.spec].read(item.target), model)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_direct_mode_shares_the_work_evenly(world: int, tmp_path: Path) -> None:
    odd, wide = model_a(), wide_model(24 << 20)
    meta.write(odd, tmp_path / "odd-meta3", 3)
    nanotron.write(odd, tmp_path / "odd-tp2pp2", 2, 2)
    meta.write(wide, tmp_path / "wide-meta8", 8)
    hf.write(wide, tmp_path / "wide-hf")
    ways = [
        ("odd-meta3", "tp2"),
        ("odd-meta3", "hf"),
        ("odd-tp2pp2", "meta2"),
        ("odd-tp2pp2", "pp5"),
    ]
    ways += [("wide-meta8", "tp4"), ("wide-hf", "meta8"), ("wide-meta8", "hf")]
    jobs = [
        Job(tmp_path / start, tmp_path / f"{start}-{end}", end, (DIRECT,)) for start, end in ways
    ]
    for item, report in zip(jobs, measured(world, jobs), strict=True):
        plan = planned(item, world)
        loads = loads_by_rank(plan)
        read, written = report["by_rank"]["read"], report["by_rank"]["written"]
        assert read == [load.read for load in loads], item
        balanced = {"read": read, "written": [load.written for load in loads]}
        if item.source.name.startswith("wide"):  # texts and headers no longer count for much
            balanced["written, texts included"] = written
        for what, counts in balanced.items():
            limit = 1.05 * sum(counts) / world + plan.block_bytes
            assert max(counts) <= limit, f"{item}: {what} {counts}, block {plan.block_bytes}"
        assert not report["bytes"]["exchanged"]
        for key, counts in (("read", read), ("write", written)):
            assert report["balance"][key] == pytest.approx(max(counts) * world / sum(counts))


# ------------------------------------------------------------------------------------------ memory


def large_model(hidden: int = 2400) -> Model:
    """About 700 MiB; values repeat with a period that is a prime number."""
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 8 * hidden}
    config = wide_model(2**16).config | sizes | {"head_dim": hidden // 8}
    pattern = hashed(1, 1_000_003, torch.bfloat16)
    tensors = {}
    for number, (name, shape) in enumerate(shapes(config).items()):
        count = int(np.prod(shape))
        turned = pattern.roll(number * 1009)
        tensors[name] = turned.repeat(count // len(pattern) + 1)[:count].reshape(shape)
    return Model(config, tensors)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    model, memory = large_model(), 64 << 20
    assert sum(tensor.nbytes for tensor in model.tensors.values()) > 10 * memory
    meta.write(model, tmp_path / "meta", 2)
    for ranks, mode in ((1, NEAREST), (2, DIRECT), (2, OWNER)):
        place = tmp_path / "out"
        found = within_memory(ranks, tmp_path / "meta", place, "hf", mode, memory)
        assert (found["bytes"]["exchanged"] > 0) == (mode == OWNER)
        assert_same(hf.read(place), model)
        shutil.rmtree(place)


def within_memory(
    ranks: int, source: Path, place: Path, target: str, mode: str, memory: int
) -> dict[str, Any]:
    """The report of a program of its own, no process of which took more than it was given."""
    command = [sys.executable, "-m", "reshard"]
    if ranks > 1:
        launched = [str(REPO / "launch/torchrun"), "--nproc", str(ranks)]
        command = [sys.executable, *launched, "-m", "reshard"]
    keys = [f"src.path={source}", f"dst.path={place}", "engine.fsync=false"]
    keys += [mode, f"engine.memory={memory}"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    report = place.with_name("report.json")
    said = subprocess.run(
        [*command, "--dst", target, *keys, "--report", str(report)],
        cwd=place.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert len(found["peak_rss"]) == found["world"] == ranks
    for rank, peak in found["peak_rss"].items():
        begun = found["import_rss"][rank]
        assert 50 << 20 < begun < peak, f"{mode}: rank {rank}: {begun} then {peak}"
        ratio = (peak - begun) / memory
        assert ratio <= 1.10, f"{mode}: rank {rank} took {ratio:.2f} of its memory"
    assert found["bytes"]["exchanged"] == found["bytes"]["exchanged_bound"]
    assert found["bytes"]["read"] == found["bytes"]["read_bound"]
    return found


@pytest.mark.slow
def test_memory_is_bounded_where_chunks_lie_across_the_targets(tmp_path: Path) -> None:
    model, memory = large_model(2048), 64 << 20
    assert sum(tensor.nbytes for tensor in model.tensors.values()) >= 500 << 20
    beside(dcp.write_fsdp, model, tmp_path / "fsdp", shards=3)
    found = within_memory(2, tmp_path / "fsdp", tmp_path / "out", "meta2", OWNER, memory)
    assert found["bytes"]["exchanged"] > 0
    assert found["bytes"]["read"] == sum(tensor.nbytes for tensor in model.tensors.values())
    assert_same(meta.read(tmp_path / "out"), model)


COMPARED = """
import sys
from reshard.cli import main
from reshard.report import memory_of
begun = memory_of("VmRSS")
code = main(sys.argv[1:])
print(memory_of("VmHWM") - begun)
sys.exit(code)
"""


def test_memory_of_a_comparison_is_bounded(tmp_path: Path) -> None:
    model, memory = large_model(768), 32 << 20
    wide = {name: tensor.float() for name, tensor in model.tensors.items()}
    name = "model.layers.1.mlp.down_proj.weight"
    wide[name] = -wide[name]
    meta.write(model, tmp_path / "meta", 2)
    hf.write(Model(model.config | {"torch_dtype": "float32"}, wide), tmp_path / "hf")
    assert size_of(tmp_path / "meta") + size_of(tmp_path / "hf") > 6 * memory
    words = ["verify", str(tmp_path / "meta"), str(tmp_path / "hf"), f"engine.memory={memory}"]
    for more in ([], ["--cast"]):
        said = subprocess.run(
            [sys.executable, "-c", COMPARED, *words, *more],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert said.returncode == 1, said.stderr
        assert f" parameters differ: `{name}[0, 0]`: " in said.stderr
        taken = int(said.stdout.splitlines()[-1])
        assert taken <= 1.10 * memory, f"{taken / memory:.2f} of its memory"


# ---------------------------------------------------------------------------------------- replicas

EIGHT = wide_model(2**20)
MODES = (DIRECT, NEAREST, OWNER)


def refused(outcomes: Sequence[Outcome], jobs: Sequence[Job], *words: str) -> None:
    """Every job ended with a CheckpointError that has these words, and left nothing."""
    for item, outcome in zip(jobs, outcomes, strict=True):
        assert outcome.error is not None, f"{item} was done"
        assert outcome.error.startswith("CheckpointError: "), outcome.error
        for word in words:
            assert word in outcome.error, outcome.error
        left = [p.name for p in item.target.parent.iterdir() if p.name.startswith(item.target.name)]
        assert not left, f"{item}: {left}"


@pytest.mark.parametrize("world", [1, 3])
def test_norms_that_differ_are_reported_once_and_the_first_is_taken(
    world: int, tmp_path: Path
) -> None:
    meta.write(EIGHT, tmp_path / "source", 8, norm_noise=5)
    jobs = [
        Job(tmp_path / "source", tmp_path / f"out-{target}-{mode}", target, (mode,), "least")
        for target in ("hf", "meta2")
        for mode in MODES
    ]
    norms = {name: tensor for name, tensor in EIGHT.tensors.items() if "norm" in name}
    largest = max(
        float((noisy(tensor).float() - tensor.float()).abs().max()) for tensor in norms.values()
    )
    for item, outcome in zip(jobs, must_convert(world, jobs), strict=True):
        assert_same(TOPOLOGIES[item.spec].read(item.target), EIGHT)
        (warning,) = outcome.warnings
        assert [line for line in outcome.said if line.startswith("warning")] == [
            f"warning: {warning}"
        ]
        assert warning.startswith(f"{len(norms)} copies of {len(norms)} "), warning
        assert f"largest difference {largest:g}," in warning
        assert "`layers.0.attention_norm.weight` in `consolidated.05.pth`" in warning
        assert "src.replicas=strict" in warning


def noisy(tensor: Tensor) -> Tensor:
    """A norm with its first element off by one bit, as the oracle writes it."""
    turned = tensor.clone()
    bits(turned)[0] ^= 1
    return turned


def test_the_first_coordinate_is_taken_even_where_all_others_agree(tmp_path: Path) -> None:
    meta.write(EIGHT, tmp_path / "source", 8, norm_noise=0)
    jobs = [Job(tmp_path / "source", tmp_path / mode, "hf", (mode,)) for mode in MODES]
    outcomes = must_convert(2, jobs)
    taken = {name: noisy(t) if "norm" in name else t for name, t in EIGHT.tensors.items()}
    for item, outcome in zip(jobs, outcomes, strict=True):
        assert_same(hf.read(item.target), replace(EIGHT, tensors=taken))
        (warning,) = outcome.warnings
        assert warning.startswith("63 copies of 9 "), warning


@pytest.mark.parametrize("world", [1, 2])
def test_strict_replicas_are_refused(world: int, tmp_path: Path) -> None:
    meta.write(EIGHT, tmp_path / "noisy", 8, norm_noise=5)
    meta.write(EIGHT, tmp_path / "clean", 8)
    strict = "src.replicas=strict"
    jobs = [
        Job(tmp_path / "noisy", tmp_path / f"out-{mode}", "tp2", (mode, strict)) for mode in MODES
    ]
    refused(convert(world, jobs), jobs, "consolidated.05.pth", "_norm.weight", "src.replicas=first")
    clean = Job(tmp_path / "clean", tmp_path / "fine", "tp2", (strict,))
    (outcome,) = must_convert(world, [clean])
    assert not outcome.warnings
    assert_same(nanotron.read(clean.target), EIGHT)


@pytest.mark.parametrize("world", [1, 3])
def test_kv_heads_whose_copies_differ_are_an_error(world: int, tmp_path: Path) -> None:
    meta.write(EIGHT, tmp_path / "source", 8)
    file = tmp_path / "source" / "consolidated.03.pth"
    stored = dict(meta.load(file))
    key = "layers.2.attention.wv.weight"
    bits(stored[key])[-1, -1] ^= 1
    torch.save(stored, file)
    jobs = [Job(tmp_path / "source", tmp_path / f"out-{mode}", "hf", (mode,)) for mode in MODES]
    refused(convert(world, jobs), jobs, file.name, key)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("source", ["meta", "hf"])
def test_tied_tensors_that_differ_are_an_error(source: str, world: int, tmp_path: Path) -> None:
    tied = model_a(tied=True)
    table = tied.tensors["model.embed_tokens.weight"].clone()
    bits(table)[101, 3] ^= 1
    untied = Model(
        tied.config | {"tie_word_embeddings": False}, {**tied.tensors, "lm_head.weight": table}
    )
    if source == "meta":
        meta.write(untied, tmp_path / "source", 2)
        name = "output.weight"
    else:
        hf.write(Model(tied.config, untied.tensors), tmp_path / "source")
        name = "lm_head.weight"
    jobs = [
        Job(tmp_path / "source", tmp_path / f"out-{mode}", "meta3", (mode, "src.tied=true"))
        for mode in MODES
    ]
    refused(convert(world, jobs), jobs, name, "src.tied=false")
    both = Job(tmp_path / "source", tmp_path / "both", "hf", ("src.tied=false",))
    must_convert(world, [both])
    assert_same(hf.read(both.target), untied)
    undecided = Job(tmp_path / "source", tmp_path / "undecided", "hf")
    (outcome,) = convert(world, [undecided])
    if outcome.error is None:
        assert_same(hf.read(undecided.target), untied)
    else:
        refused([outcome], [undecided], name, "src.tied=false")


def test_tied_tensors_that_agree_are_stored_once(tmp_path: Path) -> None:
    tied = model_a(tied=True)
    hf.write(tied, tmp_path / "source")
    table = tied.tensors["model.embed_tokens.weight"]
    save_file(
        {**tied.tensors, "lm_head.weight": table.clone()}, tmp_path / "source/model.safetensors"
    )
    jobs = [Job(tmp_path / "source", tmp_path / mode, "hf", (mode,)) for mode in MODES]
    must_convert(2, jobs)
    for item in jobs:
        assert_same(hf.read(item.target), tied)
