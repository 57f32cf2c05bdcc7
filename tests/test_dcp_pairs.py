"""Torch's distributed checkpoints, of FSDP and TorchTitan: to and from every layout, bit for bit.

Sources are written and targets read by torch itself, through the oracles.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from tests.oracles import dcp, hf, meta, titan
from tests.oracles.compare import assert_same, assert_same_config, assert_same_files, files_in
from tests.oracles.models import Model, model_a, with_normal_values
from tests.settings import (
    DCP,
    DCP_SOURCES,
    EVERY,
    MODELS,
    SETTINGS,
    STEP,
    WORLDS,
    Case,
    Job,
    meetings,
    must_convert,
    run_cases,
    settings,
    spread,
    written,
)

TARGETS = ("hf", "titan2", "meta2", "fsdp3", "tp2pp2")
ODD_ENDS = ("hf", "meta3", "tp3", "fsdp8", "titan2tp3", "titan3-half")  # of 3 key-value heads
ODD_TARGETS = ("hf", "titan2tp3", "fsdp8")
MODES = ("engine.exchange=direct", "engine.exchange=collective")
Ways = list[tuple[str, str]]


def ways(ends: Sequence[str], targets: Sequence[str], each: int) -> Ways:
    """All pairs of ends with a new one among them, and `each` targets for what is read only."""
    both = [pair for pair in permutations(ends, 2) if {*pair} & {*DCP}]
    turned = [targets[i:] + targets[:i] for i in range(len(targets))]
    read_only = [
        (name, target)
        for number, name in enumerate(DCP_SOURCES)
        for target in turned[number % len(targets)][:each]
    ]
    return [*both, *read_only]


WAYS = ways(["meta2", "hf", "tp2pp2", *DCP], TARGETS, 2)
ODD_WAYS = ways(ODD_ENDS, ODD_TARGETS, 1)
CASES = list(spread(WAYS, ["a", "a-tied", "c", "c-tied"]))
ODD_CASES = list(spread(ODD_WAYS, ["b", "b-tied"]))
ALL_SETTINGS = [
    ("fsdp8", "titan2", "c"),
    ("titan-fused", "tp2pp2", "c-tied"),
    ("meta2", "fsdp3", "c"),
]

# ------------------------------------------------------------------------ every pair, all settings


@pytest.mark.parametrize(
    ("cases", "pairs"), [(CASES, WAYS), (ODD_CASES, ODD_WAYS)], ids=["a and c", "b"]
)
def test_settings_and_models_are_drawn_from_all_there_are(cases: list[Case], pairs: Ways) -> None:
    """Any two of model, world, mode and memory meet; so do targets and models, and worlds."""
    assert [(case.source, case.target) for case in cases] == pairs
    met = set().union(*map(meetings, cases))
    models = {case.model for case in cases}
    every = {
        pair
        for model, setting in product(models, SETTINGS)
        for pair in meetings(Case("", "", model, setting))
        if not {"source", "target"} & {name for name, _ in pair}
    }
    for target in {case.target for case in cases} & {*DCP}:
        every |= {(("target", target), ("world", world)) for world in WORLDS}
        every |= {(("target", target), ("model", model)) for model in models}
    assert every <= met, every - met


@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_moves_the_model_bit_for_bit(world: int, tmp_path: Path, long: bool) -> None:
    cases = [*CASES, *ODD_CASES] if long else [*CASES, *ODD_CASES][::2]
    run_cases(tmp_path, [case for case in cases if case.setting.world == world])


def test_no_setting_changes_a_byte(tmp_path: Path, long: bool) -> None:
    chosen = settings(long)
    run_cases(tmp_path, [Case(*way, setting) for way in ALL_SETTINGS for setting in chosen])
    for way in ALL_SETTINGS:
        first, *others = (Case(*way, setting).job(tmp_path).target for setting in chosen)
        assert "reshard.json" in {Path(name).name for name in files_in(first)}
        assert len(others) == (23 if long else 11)
        for other in others:
            assert_same_files(first, other)


# ------------------------------------------------------------------------------ there, back, and on

DETOURS = [
    ("hf", "titan2", "hf"),
    ("meta2", "titan2", "hf"),
    ("meta3", "titan2tp3", "hf-many"),
    ("hf-many", "fsdp3", "hf"),
    ("titan-fused-w13", "titan3-half", "meta2"),
    ("titan2tp3", "fsdp8", "titan2"),
    ("2x3", "tp2pp2", "fsdp2-bare"),
]


@pytest.mark.parametrize("world", [2, 3])
def test_detours_lose_nothing(world: int, tmp_path: Path) -> None:
    """A -> B -> C has the weight files of A -> C, and the config."""
    jobs, roots = [], {}
    for number, (a, b, c) in enumerate(DETOURS):
        root = roots[a, b, c] = tmp_path / f"{a}-{b}-{c}"
        model = ("a", "a-tied")[(number + world) % 2]
        first = written(tmp_path, model, a)
        given = EVERY[a].as_source(first, MODELS[model]())
        half = ("src.rope=half",) if b == "titan3-half" else ()
        mode = MODES[(number + world) % 2]
        steps = [(first, "there", b, given), (first, "straight", c, given)]
        steps += [(root / "there", "detour", c, half)]
        for start, end, name, more in steps:
            end_of = EVERY[name]
            jobs.append(Job(start, root / end, end_of.spec, (mode, *more, *end_of.overrides)))
    must_convert(world, jobs)
    for (_, _, c), root in roots.items():
        straight, detour = (EVERY[c].read(root / name) for name in ("straight", "detour"))
        assert_same_config(straight, detour)
        weights = {
            name
            for name in files_in(root / "straight")
            if name.endswith((".pth", ".safetensors", ".distcp", ".metadata"))
        }
        assert weights
        for name in weights:
            one, other = (root / end / name for end in ("straight", "detour"))
            assert one.read_bytes() == other.read_bytes(), f"{root.name}: {name}"


# ------------------------------------------------------------------------------- dtypes, row order


def test_casts_are_torchs_own_and_none_is_made_unasked(tmp_path: Path) -> None:
    wide, narrow = with_normal_values(model_a(dtype=torch.float32)), model_a()
    norms = {name: wide.tensors[name] for name in wide.tensors if "norm" in name}
    mixed = replace(narrow, tensors=narrow.tensors | norms)
    jobs, expected = [], []

    def cast(model: Model, name: str, target: str, dtype: torch.dtype | None) -> None:
        if not (tmp_path / name).exists():
            EVERY[name.partition(":")[0]].write(model, tmp_path / name)
        said = "keep" if dtype is None else str(dtype).removeprefix("torch.")
        for mode in MODES:
            place = tmp_path / f"{name}-{target}-{said}-{mode}"
            given = (mode, f"dst.dtype={said}", *EVERY[target].overrides)
            jobs.append(Job(tmp_path / name, place, EVERY[target].spec, given, "least"))
            tensors = {n: t.to(dtype) if dtype else t for n, t in model.tensors.items()}
            expected.append((target, tensors))

    cast(wide, "hf:wide", "fsdp3", torch.bfloat16)
    cast(wide, "hf:wide", "titan2tp3", torch.float16)
    cast(wide, "fsdp8:wide", "hf", torch.bfloat16)
    cast(narrow, "titan2:narrow", "fsdp3", torch.float32)
    cast(mixed, "fsdp3:mixed", "titan2", None)
    cast(mixed, "titan2:mixed", "fsdp8", None)
    must_convert(2, jobs)
    for job, (target, tensors) in zip(jobs, expected, strict=True):
        assert_same(EVERY[target].read(job.target), replace(narrow, tensors=tensors))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_scripts_that_leave_rows_as_hugging_face_has_them(tied: bool, tmp_path: Path) -> None:
    """TorchTitan's keys in a dict `model`, saved by one process, with q and k not permuted."""
    model = model_a(tied=tied)
    state = {"model": titan.titan_tensors(model, keys="0.2", rope="half")}
    writer = checkpoint.FileSystemWriter(tmp_path / "made")
    with dcp.quiet():
        checkpoint.save(state, storage_writer=writer, no_dist=True)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    named = f"src.model={tmp_path / 'config.json'}"
    half = (named, "src.rope=half")
    jobs = [
        Job(tmp_path / "made", tmp_path / "hf", "hf", half),
        Job(tmp_path / "made", tmp_path / "meta2", "meta2", half, source_spec="dcp"),
        Job(tmp_path / "made", tmp_path / "same", "titan2", (*half, "dst.rope=half")),
        Job(tmp_path / "made", tmp_path / "wrong", "hf", (named,)),
    ]
    must_convert(1, jobs)
    assert_same(hf.read(tmp_path / "hf"), model)
    assert_same(meta.read(tmp_path / "meta2"), model)
    assert_same(DCP["titan3-half"].read(tmp_path / "same"), model)
    dcp.assert_same_tensors(
        dcp.read(tmp_path / "same" / STEP), titan.titan_tensors(model, rope="half")
    )
    differ = {
        name
        for name, tensor in hf.read(tmp_path / "wrong").tensors.items()
        if not torch.equal(tensor, model.tensors[name])
    }
    assert differ == {n for n in model.tensors if "q_proj" in n or "k_proj" in n}
