"""Whole models, from every layout to every other, under all settings: oracles judge each bit."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.oracles import hf, meta, nanotron
from tests.oracles.compare import (
    assert_same,
    assert_same_config,
    assert_same_files,
    assert_same_tensor,
    bits,
    files_in,
)
from tests.oracles.models import Model, model_a, model_c, with_normal_values
from tests.settings import (
    MODELS,
    SETTINGS,
    SMALL_FILES,
    TOPOLOGIES,
    WORLDS,
    Case,
    Job,
    Setting,
    meetings,
    must_convert,
    pairwise,
    run_cases,
    settings,
    written,
)

ODD_TOPOLOGIES = ("meta1", "meta3", "hf", "tp1", "tp3", "pp5")
BIG_CASES = list(pairwise(TOPOLOGIES, ["a", "a-tied", "c", "c-tied"]))
ODD_CASES = list(pairwise(ODD_TOPOLOGIES, ["b", "b-tied"]))
ALL_SETTINGS = {
    "whole and cut": [
        ("meta3", "hf-many", "a-tied"),
        ("hf-many", "meta2", "c"),
        ("pp5", "tp2", "c"),
    ],
    "cut and cut": [("meta2", "tp3", "a"), ("tp2pp2", "meta3", "a"), ("tp3", "tp2pp2", "c-tied")],
}
MODES = ("engine.exchange=direct", "engine.exchange=collective")

# ------------------------------------------------------------------------ every pair, all settings


@pytest.mark.parametrize("cases", [BIG_CASES, ODD_CASES], ids=["a and c", "b"])
def test_any_two_values_of_any_two_factors_meet(cases: list[Case]) -> None:
    names, models = {case.source for case in cases}, {case.model for case in cases}
    possible = product(permutations(sorted(names), 2), sorted(models), SETTINGS)
    every = {pair for ends, *rest in possible for pair in meetings(Case(*ends, *rest))}
    assert set().union(*map(meetings, cases)) == every
    assert len(cases) == len(names) * (len(names) - 1)


@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_topologies_moves_the_model_bit_for_bit(world: int, tmp_path: Path) -> None:
    run_cases(tmp_path, [case for case in BIG_CASES if case.setting.world == world])


@pytest.mark.parametrize("world", WORLDS)
def test_odd_sizes_move_bit_for_bit(world: int, tmp_path: Path) -> None:
    run_cases(tmp_path, [case for case in ODD_CASES if case.setting.world == world])


@pytest.mark.parametrize("name", ALL_SETTINGS)
def test_no_setting_changes_a_byte(name: str, tmp_path: Path, long: bool) -> None:
    ways, chosen = ALL_SETTINGS[name], settings(long)
    run_cases(tmp_path, [Case(*way, setting) for way in ways for setting in chosen])
    for way in ways:
        first, *others = (Case(*way, setting).job(tmp_path).target for setting in chosen)
        assert "reshard.json" in files_in(first)
        assert len(others) == (23 if long else 11)
        for other in others:
            assert_same_files(first, other)


# ------------------------------------------------------------------------------ there, back, and on


@pytest.mark.parametrize("world", [2, 3])
def test_detours_and_ways_back_lose_nothing(world: int, tmp_path: Path) -> None:
    """A -> B -> A has A's tensors; A -> B -> C has the weight files of A -> C."""
    names, triples = list(TOPOLOGIES), []
    for i in range(world % 2, 10, 2):
        triples.append((names[i], names[(i + world + 1) % 10], names[(i + 5 * world + 1) % 10]))
    jobs = [job for triple in triples for job in detour(tmp_path, world, *triple)]
    must_convert(world, jobs)
    for a, b, c in triples:
        model, root = MODELS[detour_model(a)](), tmp_path / f"{a}-{b}-{c}"
        assert_same(TOPOLOGIES[a].read(root / "back"), model)
        assert_same(TOPOLOGIES[c].read(root / "detour"), model)
        assert_same(TOPOLOGIES[c].read(root / "straight"), model)
        assert_same_config(TOPOLOGIES[a].read(root / "back"), model)
        weights = [f for f in files_in(root / "straight") if f.endswith((".pth", ".safetensors"))]
        for file in weights:
            one, other = root / "straight" / file, root / "detour" / file
            assert one.read_bytes() == other.read_bytes(), f"{a} -> {b} -> {c}: {file}"


def detour_model(source: str) -> str:
    return "a-tied" if list(TOPOLOGIES).index(source) % 2 else "a"


def detour(tmp_path: Path, world: int, a: str, b: str, c: str) -> list[Job]:
    """A -> B, and from there back to A and on to C; and A -> C."""
    assert len({a, b, c}) == 3, (a, b, c)
    root, source = tmp_path / f"{a}-{b}-{c}", written(tmp_path, detour_model(a), a)
    steps = [(source, "there", b), (root / "there", "back", a)]
    steps += [(root / "there", "detour", c), (source, "straight", c)]
    mode = MODES[world % 2]
    return [
        Job(start, root / end, TOPOLOGIES[name].spec, (mode, *TOPOLOGIES[name].overrides))
        for start, end, name in steps
    ]


# ------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_cast_is_torchs_own(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    model = with_normal_values(model_a(dtype=stored))
    if stored != torch.float32:  # every exponent, and fractions that fall exactly between two
        model = replace(model, tensors=model_a(dtype=stored).tensors)
    expected = {key: tensor.to(wanted) for key, tensor in model.tensors.items()}
    name = str(wanted).removeprefix("torch.")
    ways, jobs = [("meta2", "hf"), ("hf", "tp3"), ("tp2", "meta3")], []
    for (source, target), mode in product(ways, MODES):
        path = tmp_path / source
        if not path.exists():
            TOPOLOGIES[source].write(model, path)
        place = tmp_path / f"{source}-{target}-{mode}"
        jobs.append(Job(path, place, target, (mode, f"dst.dtype={name}"), "least", source))
    must_convert(2, jobs)
    for job in jobs:
        found = TOPOLOGIES[job.spec].read(job.target)
        assert_same(found, replace(model, tensors=expected))
        assert found.config["torch_dtype"] == name


def mixed_model() -> Model:
    """Norms in float32, all else in bfloat16."""
    model, wide = model_a(), with_normal_values(model_a(dtype=torch.float32))
    norms = {name: wide.tensors[name] for name in model.tensors if "norm" in name}
    return replace(model, tensors=model.tensors | norms)


@pytest.mark.parametrize("mode", MODES)
def test_every_tensor_keeps_its_own_dtype(mode: str, tmp_path: Path) -> None:
    model = mixed_model()
    hf.write(model, tmp_path / "source", files=3)
    ways = [("source", "meta2"), ("meta2", "hf"), ("source", "tp2pp2"), ("tp2pp2", "meta3")]
    jobs = [Job(tmp_path / start, tmp_path / end, end, (mode,), "least") for start, end in ways]
    must_convert(3, jobs)
    for name in ("meta2", "tp2pp2", "meta3"):
        assert_same(TOPOLOGIES[name].read(tmp_path / name), model)
    assert_same(Model({}, load_file(tmp_path / "hf" / "model.safetensors")), model)


def test_a_cast_of_mixed_dtypes_leaves_one(tmp_path: Path) -> None:
    model = mixed_model()
    hf.write(model, tmp_path / "source")
    wanted = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    jobs = [
        Job(tmp_path / "source", tmp_path / f"{name}-{target}", target, (f"dst.dtype={name}",))
        for name, target in product(wanted, ("meta2", "tp3", "hf"))
    ]
    must_convert(2, jobs)
    for job, (name, target) in zip(jobs, product(wanted, ("meta2", "tp3", "hf")), strict=True):
        expected = {key: tensor.to(wanted[name]) for key, tensor in model.tensors.items()}
        assert_same(TOPOLOGIES[target].read(job.target), replace(model, tensors=expected))


# ------------------------------------------------------------------------------------ odd layouts


def few_kv_heads() -> Model:
    """12 heads, 2 kv heads: each head 2, 3 or 6 times in 4, 6 or 12 files."""
    return model_a(num_key_value_heads=2, intermediate_size=216, vocab_size=240)


@pytest.mark.parametrize("mode", MODES)
def test_kv_heads_are_stored_as_often_as_files_need_them(mode: str, tmp_path: Path) -> None:
    model, six = few_kv_heads(), model_a(intermediate_size=216, vocab_size=240)
    hf.write(model, tmp_path / "hf")
    hf.write(six, tmp_path / "six")
    ways = [("hf", "meta4"), ("hf", "meta6"), ("meta4", "meta12"), ("meta12", "tp2")]
    ways += [("meta6", "meta4-again"), ("six", "six-meta12"), ("six-meta12", "six-tp6")]
    jobs = [
        Job(tmp_path / start, tmp_path / end, spec_in(end), (mode,), "least") for start, end in ways
    ]
    must_convert(3, jobs)
    for name, files in (("meta4", 4), ("meta6", 6), ("meta12", 12), ("meta4-again", 4)):
        params, stored = meta.whole(tmp_path / name)
        assert params["n_kv_heads"] == files
        assert len(list((tmp_path / name).glob("*.pth"))) == files
        for key, tensor in meta.to_meta(model, files // 2).items():
            assert_same_tensor(f"{name}: {key}", stored[key], tensor)
    assert_same(nanotron.read(tmp_path / "tp2"), model)
    assert_same(meta.read(tmp_path / "six-meta12"), six)
    assert_same(nanotron.read(tmp_path / "six-tp6"), six)
    assert nanotron.topology(tmp_path / "six-tp6") == (6, 1)


def spec_in(name: str) -> str:
    """The topology that a directory of this test is named after."""
    return next(part for part in name.split("-") if part[-1].isdigit())


@pytest.mark.parametrize("mode", MODES)
def test_stored_copies_of_kv_heads_are_found(mode: str, tmp_path: Path) -> None:
    model, six = few_kv_heads(), model_a(intermediate_size=216, vocab_size=240)
    meta.write(model, tmp_path / "meta4", 4)
    meta.write(six, tmp_path / "meta12", 12)
    jobs = [
        Job(tmp_path / source, tmp_path / f"{source}-{target}", target, (mode,), "least")
        for source, target in product(("meta4", "meta12"), ("hf", "meta2"))
    ]
    must_convert(5, jobs)
    for job in jobs:
        expected = model if job.source.name == "meta4" else six
        found = TOPOLOGIES[job.spec].read(job.target)
        assert_same(found, expected)
        assert_same_config(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_rotary_rows_are_interleaved_where_nanotron_says_so(mode: str, tmp_path: Path) -> None:
    model = MODELS["a"]()
    nanotron.write(model, tmp_path / "old", 2, 2, rope_interleaved=True)
    hf.write(model, tmp_path / "hf")
    old, new = "dst.rope_interleaved=true", "dst.rope_interleaved=false"
    ways = [
        ("old", "hf-one", "hf", ()),
        ("old", "meta3", "meta3", ()),
        ("old", "tp3", "tp3", (new,)),
        ("old", "tp2", "tp2", (old,)),
        ("hf", "pp5", "pp5", (old,)),
        ("pp5", "tp1", "tp1", (new,)),
        ("meta3", "tp3-old", "tp3", (old,)),
    ]
    jobs = [
        Job(tmp_path / start, tmp_path / end, spec, (mode, *given), "least")
        for start, end, spec, given in ways
    ]
    must_convert(3, jobs)
    for _, end, spec, _ in ways:
        assert_same(TOPOLOGIES[spec].read(tmp_path / end), model)
    folder = "model/model/decoder/0/pp_block/attn/qkv_proj"
    upstream, ours = (
        load_file(tmp_path / name / folder / f"model_weight_{ranks}_tp-rank-1-of-2.safetensors")
        for name, ranks in (("old", "pp-rank-0-of-2"), ("tp2", "pp-rank-0-of-1"))
    )
    assert_same(Model({}, ours), Model({}, upstream))


# (vocabulary, multiple, tp, rows): the last one leaves a shard that holds padding only
PADDED = [(221, 1, 2, 222), (221, 4, 3, 228), (221, 16, 5, 240), (221, 64, 6, 384)]


@pytest.mark.parametrize(("vocab", "multiple", "tp", "rows"), PADDED, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_vocabulary_is_padded_with_zeros_and_cut_again(
    vocab: int, multiple: int, tp: int, rows: int, tied: bool, tmp_path: Path
) -> None:
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5} if tp == 5 else {}
    sizes = {"hidden_size": 60, "intermediate_size": 210} if tp == 5 else {}
    model = model_a(tied=tied, vocab_size=vocab, **heads, **sizes)
    hf.write(model, tmp_path / "hf")
    pad = f"dst.vocab_multiple={multiple}"
    jobs = [
        Job(tmp_path / "hf", tmp_path / "padded", f"tp{tp}pp2", (pad,), "least"),
        Job(tmp_path / "padded", tmp_path / "back", "hf", (), "least"),
        Job(tmp_path / "padded", tmp_path / "meta1", "meta1", ("engine.exchange=direct",)),
        Job(tmp_path / "padded", tmp_path / "other", "tp1", ("dst.vocab_multiple=7",)),
    ]  # fmt: skip
    must_convert(3, jobs)
    stored = nanotron.read(tmp_path / "padded")
    assert stored.config["vocab_size"] == rows
    tables = [name for name in stored.tensors if "embed_tokens" in name or "lm_head" in name]
    assert len(tables) == 2 - tied
    for name in tables:
        assert not bits(stored.tensors[name][vocab:]).any(), f"{name}: padding is not zero"
    for found in (
        nanotron.read(tmp_path / "padded", vocab_size=vocab),
        nanotron.read(tmp_path / "other", vocab_size=vocab),
        hf.read(tmp_path / "back"),
        meta.read(tmp_path / "meta1"),
    ):
        assert_same(found, model)
        assert_same_config(found, model)


def test_foreign_padding_is_cut_where_the_model_is_named(tmp_path: Path) -> None:
    model = model_a(vocab_size=221)
    hf.write(model, tmp_path / "hf")
    nanotron.write(model, tmp_path / "padded", 3, 2, vocab_multiple=16)
    named = f"src.model={tmp_path / 'hf' / 'config.json'}"
    jobs = [
        Job(tmp_path / "padded", tmp_path / "one", "hf", (named,)),
        Job(tmp_path / "padded", tmp_path / "two", "tp2", (named, "dst.vocab_multiple=1")),
    ]
    must_convert(2, jobs)
    assert_same(hf.read(tmp_path / "one"), model)
    assert_same(nanotron.read(tmp_path / "two", vocab_size=221), model)
    assert not bits(nanotron.read(tmp_path / "two").tensors["lm_head.weight"][221:]).any()


@pytest.mark.parametrize("model", [model_a, model_c], ids=["a", "c"])
@pytest.mark.parametrize("mode", MODES)
def test_the_embedding_is_cut_on_the_dim_asked_for(
    model: Callable[[], Model], mode: str, tmp_path: Path
) -> None:
    made = model()
    vocab, hidden = made.config["vocab_size"], made.config["hidden_size"]
    hf.write(made, tmp_path / "hf")
    meta.write(made, tmp_path / "columns", 3, embedding_dim=1)
    jobs = [
        Job(tmp_path / "hf", tmp_path / f"meta2-{dim}", "meta2", (mode, f"dst.embedding_dim={dim}"))
        for dim in (0, 1)
    ]
    jobs += [
        Job(tmp_path / "columns", tmp_path / "tp2", "tp2", (mode,), "least"),
        Job(tmp_path / "columns", tmp_path / "meta2", "meta2", (mode, "dst.embedding_dim=0")),
        Job(tmp_path / "meta2-1", tmp_path / "meta3", "meta3", (mode, "dst.embedding_dim=1")),
    ]
    must_convert(2, jobs)
    shapes = {"meta2-0": (vocab // 2, hidden), "meta2-1": (vocab, hidden // 2)}
    shapes |= {"meta2": (vocab // 2, hidden), "meta3": (vocab, hidden // 3)}
    for name, shape in shapes.items():
        found = meta.load(tmp_path / name / "consolidated.01.pth")
        assert tuple(found[meta.EMBEDDING].shape) == shape, name
        assert_same(meta.read(tmp_path / name), made)
    assert_same(nanotron.read(tmp_path / "tp2"), made)


STORED: dict[str, dict[str, Any]] = {
    "flat": {"flat_storage": True},
    "strided": {"strided": True},
    "strided-flat": {"flat_storage": True, "strided": True},
    "wrapped": {"params_wrapped": True},
    "freqs": {"rope_freqs": True},
    "all": {
        "flat_storage": True,
        "strided": True,
        "params_wrapped": True,
        "rope_freqs": True,
        "embedding_dim": 1,
    },
}


def test_meta_files_are_read_however_they_are_stored(tmp_path: Path) -> None:
    model, jobs = MODELS["a"](), []
    for number, (name, given) in enumerate(STORED.items()):
        for mp in (1, 2):
            source = tmp_path / f"{name}-{mp}"
            meta.write(model, source, mp, **given)
            for target in ("hf", "tp3"):
                place = tmp_path / f"{name}-{mp}-{target}"
                jobs.append(Job(source, place, target, (MODES[number % 2],), "least"))
    must_convert(2, jobs)
    for job in jobs:
        assert_same(TOPOLOGIES[job.spec].read(job.target), model)


def test_llama_2_style_is_written_with_its_frequencies(tmp_path: Path) -> None:
    model = with_normal_values(model_a(rope_theta=10000.0))
    hf.write(model, tmp_path / "hf")
    must_convert(2, [Job(tmp_path / "hf", tmp_path / "meta2", "meta2")])
    steps = torch.arange(0, 6, 2)[:3].float() / 6
    for rank in (0, 1):
        stored = meta.load(tmp_path / "meta2" / f"consolidated.{rank:02d}.pth")
        expected = (1.0 / (10000.0**steps)).to(torch.bfloat16)
        assert_same_tensor("rope.freqs", stored["rope.freqs"], expected)
        assert tuple(stored[meta.EMBEDDING].shape) == (222, 36)
    assert_same(meta.read(tmp_path / "meta2"), model)


def test_files_are_filled_up_to_the_size_asked_for(tmp_path: Path) -> None:
    hf.write(MODELS["a"](), tmp_path / "hf")
    must_convert(2, [Job(tmp_path / "hf", tmp_path / "many", "hf", (SMALL_FILES,))])
    assert_same(hf.read(tmp_path / "many"), MODELS["a"]())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= 60_000
    assert all(one + other > 60_000 for one, other in itertools.pairwise(sizes))


def test_settings_are_many() -> None:
    assert len(set(SETTINGS)) == 24
    assert Setting(5, "collective", "owner", "least") in SETTINGS
