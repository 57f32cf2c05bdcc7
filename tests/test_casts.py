"""What casts lose: counted here by thresholds and one by one, and told once by whole jobs."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reshard import casts
from reshard.casts import lost, narrows
from reshard.encodings import ENCODINGS, encode
from tests.commands import done, move
from tests.oracles import hf, meta, nanotron
from tests.oracles.compare import same_bits
from tests.oracles.models import Model, model_a, model_c, with_normal_values
from tests.settings import Job, must_convert
from tests.test_faults import SMALL_ROUNDS, interrupt, run

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WHOLE = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# (bits of the significand, its leading one included; largest exponent; exponent of the last bit)
SHAPES = {
    torch.bfloat16: (8, 127, -133),
    torch.float16: (11, 15, -24),
    torch.float32: (24, 127, -149),
}
# Zero, the least and the largest of all, 1, infinities, NaNs, and what casts have for a limit.
SPECIAL = (
    *(0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.0, 65520.0, 65536.0, -7e4),
    *(2.0**-24, 2.0**-25, 2.0**-25 * 1.01, -(2.0**-26), 3.39e38, 3.4e38, 2.0**-133, 2.0**-134),
    *(2.0**-134 * 1.01, 2.0**-149, 2.0**-150, 2.0**-151, 5e-324, 1e308, 6.1e-5, 1e-40),
)
many = settings(max_examples=100, deadline=None)

# ------------------------------------------------------------------------------------ one by one


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """Values of any bit pattern, special ones among them."""
    size = 8 * dtype.itemsize
    patterns = draw(st.lists(st.integers(-(2 ** (size - 1)), 2 ** (size - 1) - 1), max_size=30))
    special = draw(st.lists(st.sampled_from(SPECIAL), max_size=10))
    random = torch.tensor(patterns, dtype=WHOLE[dtype]).view(dtype)
    return torch.cat([random, torch.tensor(special, dtype=torch.float64).to(dtype)])


@pytest.mark.parametrize(("source", "target"), list(permutations(FLOATS, 2)), ids=str)
def test_each_value_that_is_lost_is_counted(source: torch.dtype, target: torch.dtype) -> None:
    @many
    @given(tensors(source))
    def check(values: Tensor) -> None:
        pairs = list(zip(values.tolist(), values.to(target).tolist(), strict=True))
        overflowed = sum(math.isfinite(a) and math.isinf(b) for a, b in pairs)
        vanished = sum(a != 0 and b == 0 for a, b in pairs)
        assert lost(values, target) == (overflowed, vanished)
        assert narrows(source, target) or not overflowed + vanished

    check()


def limits(dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """The least value that becomes infinite, and the largest that becomes zero: ties go to even."""
    digits, largest, last = SHAPES[dtype]
    return Fraction(2) ** largest * (2 - Fraction(1, 2**digits)), Fraction(2) ** last / 2


@pytest.mark.parametrize(
    ("source", "target"),
    [(s, t) for s, t in permutations(FLOATS, 2) if t in SHAPES and s != torch.float64],
    ids=str,
)
def test_values_are_lost_beyond_the_limits_of_the_formats(
    source: torch.dtype, target: torch.dtype
) -> None:
    over, under = limits(target)

    @many
    @given(tensors(source))
    def check(values: Tensor) -> None:
        finite = [abs(Fraction(value)) for value in values.tolist() if math.isfinite(value)]
        expected = (sum(v >= over for v in finite), sum(0 < v <= under for v in finite))
        assert lost(values, target) == expected

    check()


@pytest.mark.parametrize(("source", "target"), list(permutations(FLOATS, 2)), ids=str)
def test_a_cast_narrows_where_its_extremes_are_lost(
    source: torch.dtype, target: torch.dtype
) -> None:
    least = torch.ones((), dtype=WHOLE[source]).view(source)
    extremes = torch.stack([torch.tensor(torch.finfo(source).max, dtype=source), least])
    assert narrows(source, target) == (lost(extremes, target) != (0, 0))
    assert not narrows(source, source)
    assert not narrows(torch.int64, target)


def test_all_steps_of_a_large_tensor_are_counted() -> None:
    values = torch.ones(3 * casts.STEP + 5, dtype=torch.bfloat16)
    large, small = [0, casts.STEP - 1, casts.STEP, 3 * casts.STEP + 4], [5, 2 * casts.STEP]
    values[large], values[small] = 1e6, 1e-12
    assert lost(values, torch.float16) == (4, 2)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
@many
@given(st.data())
def test_blocks_without_a_finite_scale_are_counted(encoding, data) -> None:
    """By the package's own decoder: it makes no finite value of such a block."""
    gguf = pytest.importorskip("gguf")
    exponents = data.draw(st.lists(st.integers(-60, 30), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 99))
    noise = np.random.default_rng(seed).uniform(-1, 1, (len(exponents), 32))
    values = (noise * 2.0 ** np.array(exponents)[:, None]).astype(np.float32)
    coded = encode(encoding, memoryview(bytearray(values.tobytes())))
    kind = gguf.GGMLQuantizationType[encoding.name.upper()]
    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(np.frombuffer(coded.memory, dtype=np.uint8), kind)
    blocks = found.reshape(-1, 32)
    assert coded.overflowed == 32 * sum(not np.isfinite(block).all() for block in blocks)
    gone = [was for was, block in zip(values, blocks, strict=True) if not block.any()]
    assert coded.vanished == np.count_nonzero(gone)


# ------------------------------------------------------------------------------------- whole jobs


def told(overflowed: dict[str, int], vanished: dict[str, int]) -> str:
    """The line on counts by tensor."""
    parts = []
    for counts, what in ((overflowed, "overflow to infinity"), (vanished, "become zero")):
        if counts:
            most = min(counts, key=lambda name: (-counts[name], name))
            total = f"{sum(counts.values()):,} values {what} in {len(counts)} tensors"
            parts.append(f"{total}, most in `{most}`")
    return f"the cast loses: {'; '.join(parts)}"


def damaged(model: Model, seed: int = 0) -> tuple[Model, dict[str, int], dict[str, int]]:
    """Ordinary values, with some in every tensor that float16 has no room for; and how many.

    What is infinite, no number or zero before is not lost.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, overflowed, vanished = {}, {}, {}
    for number, (name, tensor) in enumerate(model.tensors.items()):
        flat = tensor.flatten().clone()
        flat[flat.abs() < 1e-6] = 0.5  # which would vanish too
        order = torch.randperm(len(flat), generator=generator)
        large, small = 1 + number % 5, 2 + number % 3
        flat[order[:large]] = 1e6 if number % 2 else -65536.0
        flat[order[large : large + small]] = 1e-9 if number % 2 else -2e-8
        harmless = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 65280.0, 6e-8])
        flat[order[-len(harmless) :]] = harmless.to(flat.dtype)
        tensors[name] = flat.reshape(tensor.shape)
        overflowed[name], vanished[name] = large, small
    return replace(model, tensors=tensors), overflowed, vanished


def few_kv_heads() -> Model:
    """12 heads, 2 kv heads, each of which 4 files hold twice."""
    return with_normal_values(model_a(num_key_value_heads=2, intermediate_size=216, vocab_size=240))


MODES = ("engine.exchange=direct", "engine.writers=nearest", "engine.writers=owner")
NARROW = "dst.dtype=float16"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_loss_is_told_once_whoever_reads_and_writes_it(world: int, tmp_path: Path) -> None:
    model, overflowed, vanished = damaged(few_kv_heads())
    meta.write(model, tmp_path / "meta4", 4)
    hf.write(model, tmp_path / "hf", files=3)
    nanotron.write(model, tmp_path / "tp2", 2, 2)
    ways = [("meta4", "hf"), ("hf", "meta4"), ("hf", "tp2pp2"), ("tp2", "gguf"), ("meta4", "fsdp3")]
    jobs = [
        Job(
            tmp_path / source,
            tmp_path / f"{source}-{target}-{mode}",
            target,
            (NARROW, mode),
            memory,
        )
        for place, (source, target) in enumerate(ways)
        for turn, (mode, memory) in enumerate(
            zip(MODES, ("least", "default", "least"), strict=True)
        )
        if (place + turn + world) % 3 or (source, target) == ways[0]
    ]
    for job, outcome in zip(jobs, must_convert(world, jobs), strict=True):
        counts = [overflowed, vanished]
        if job.spec == "gguf":  # whose norms are float32
            counts = [{k: v for k, v in found.items() if "norm" not in k} for found in counts]
        expected = told(*counts)
        assert outcome.warnings == (expected,), job
        assert outcome.said.count(f"warning: {expected}") == 1
        assert any("values that overflow or become zero are counted" in s for s in outcome.said)
    found = hf.read(tmp_path / "meta4-hf-engine.writers=owner")
    assert all(
        same_bits(tensor.to(torch.float16).nan_to_num(), found.tensors[name].nan_to_num())
        for name, tensor in model.tensors.items()
    )


@pytest.mark.parametrize(
    ("values", "stored", "wanted"),
    [
        ("ordinary", torch.bfloat16, "float16"),
        ("ordinary", torch.float32, "bfloat16"),
        ("any", torch.bfloat16, "float32"),
        ("any", torch.float16, "float32"),
        ("any", torch.float16, "bfloat16"),
        ("any", torch.bfloat16, "keep"),
        ("ordinary", torch.bfloat16, "gguf"),
    ],
    ids=str,
)
def test_nothing_is_told_where_nothing_is_lost(
    values: str, stored: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    model = model_a(dtype=stored)
    hf.write(with_normal_values(model) if values == "ordinary" else model, tmp_path / "hf")
    target, dtype = ("gguf", "float16") if wanted == "gguf" else ("meta2", wanted)
    report = tmp_path / "report.json"
    words = move("hf", tmp_path / "hf", target, tmp_path / "out", f"dst.dtype={dtype}")
    said = done(*words, "--report", report).out
    assert "warning" not in said
    assert "lose" not in said
    assert json.loads(report.read_text())["warnings"] == []


def test_the_report_and_the_plan_tell_it(tmp_path: Path) -> None:
    model, overflowed, vanished = damaged(few_kv_heads())
    hf.write(model, tmp_path / "hf")
    words = move("hf", tmp_path / "hf", "hf", tmp_path / "out", NARROW)
    note = "target: cast from bfloat16 to float16; values that overflow or become zero are counted"
    assert note in done("plan", *words).out.splitlines()
    report = tmp_path / "report.json"
    said = done(*words, "--report", report).out.splitlines()
    assert note in said
    assert json.loads(report.read_text())["warnings"] == [told(overflowed, vanished)]
    words = move("hf", tmp_path / "hf", "hf", tmp_path / "wide", "dst.dtype=float32")
    assert "target: cast from bfloat16 to float32" in done("plan", *words).out.splitlines()


# A value in one block of each of some tensors, whose scale (or least value) float16 cannot hold.
SPOILING = {"q8_0": 1e7, "q4_0": -1e6, "q4_1": -7e4, "q5_0": 2e6, "q5_1": 3e6}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_blocks_that_are_spoilt_are_told(world: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    sizes = {"hidden_size": 96, "head_dim": 16, "intermediate_size": 160, "vocab_size": 128}
    model = with_normal_values(model_c(**sizes))
    jobs, expected = [], []
    for encoding, value in SPOILING.items():
        names = ("lm_head.weight", "model.layers.1.self_attn.o_proj.weight")
        tensors = {name: tensor.clone() for name, tensor in model.tensors.items()}
        for row, name in enumerate(names):
            tensors[name][7 + row :: 40, 33] = value  # rows of several ranks
        meta.write(replace(model, tensors=tensors), tmp_path / encoding, 2)
        expected.append({name: 32 * len(range(7 + row, len(tensors[name]), 40))
                         for row, name in enumerate(names)})  # fmt: skip
        mode = MODES[len(jobs) % 3]
        given = (f"dst.dtype={encoding}", mode)
        jobs.append(Job(tmp_path / encoding, tmp_path / f"{encoding}-out", "gguf", given, "least"))
    for job, counts, outcome in zip(jobs, expected, must_convert(world, jobs), strict=True):
        assert outcome.warnings == (told(counts, {}),), job


@pytest.mark.fault
def test_a_resumed_job_tells_what_was_lost_before_it_was_broken(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "head_dim": 64, "intermediate_size": 1024, "vocab_size": 1024}
    model, overflowed, vanished = damaged(with_normal_values(model_c(**sizes)))
    hf.write(model, tmp_path / "hf")
    words = [*move("hf", tmp_path / "hf", "tp2", tmp_path / "out", NARROW), SMALL_ROUNDS]
    interrupt(1, words, tmp_path, nth=4)
    found = run(1, words, tmp_path)
    assert found["bytes"]["resumed"] > 0
    assert found["warnings"] == [told(overflowed, vanished)]


@pytest.mark.fault
def test_a_resumed_job_tells_of_blocks_that_were_spoilt_before(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    sizes = {"hidden_size": 384, "head_dim": 64, "intermediate_size": 1024, "vocab_size": 1024}
    model = with_normal_values(model_c(**sizes))
    counts = {}
    for name, tensor in model.tensors.items():
        if tensor.dim() > 1:
            tensor[::100, 5] = 1e7
            counts[name] = 32 * len(range(0, len(tensor), 100))
    hf.write(model, tmp_path / "hf")
    words = move("hf", tmp_path / "hf", "gguf", tmp_path / "out", "dst.dtype=q8_0")
    interrupt(1, [*words, SMALL_ROUNDS], tmp_path, nth=4)
    found = run(1, [*words, SMALL_ROUNDS], tmp_path)
    assert found["bytes"]["resumed"] > 0
    assert found["warnings"] == [told(counts, {})]


def test_what_copies_hold_is_counted_once(tmp_path: Path) -> None:
    """Also where the copies differ: the first one is taken."""
    model, overflowed, vanished = damaged(few_kv_heads())
    meta.write(model, tmp_path / "meta", 4, norm_noise=2)
    done_with = partial(move, "meta4", tmp_path / "meta", "meta2")
    report = tmp_path / "report.json"
    done(*done_with(tmp_path / "out", NARROW), "--report", report)
    copies, losses = json.loads(report.read_text())["warnings"]
    assert "copies" in copies
    assert losses == told(overflowed, vanished)
