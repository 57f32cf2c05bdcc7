"""Checkpoints that other packages wrote: what we read of them, what we write in their layout."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from safetensors import safe_open

from tests.oracles import dcp, hf, meta, nanotron
from tests.oracles.compare import assert_same, assert_same_config, assert_same_tensor, files_in
from tests.settings import STEP, Job, must_convert

META = {
    "meta_mp2": ("meta2", ()),
    "meta_mp4_llama2": ("meta4", ()),
    "meta_mp4_llama31_fp32": ("meta4", ()),
    "meta_mp1_tied": ("meta1", ("src.rope_factor=32",)),
}
HF = ("hf_sharded", "hf_sharded_tied")
NANOTRON = {"nanotron_tp2_pp2": ("tp2pp2", 2, 2), "nanotron_tp1_pp1": ("tp1", 1, 1)}
LLAMA_RECIPES = "model_checkpoints/fine-tuned-fixture-org/tiny-llama"
# As saved, and the folders above that lead there.
DCP = {
    "fsdp2_accelerate_3rank": ("pytorch_model_fsdp_0", ""),
    "fsdp_llama_recipes_2rank": (LLAMA_RECIPES, "model_checkpoints"),
    "fsdp_llama_recipes_3rank_fp32_optim": (LLAMA_RECIPES, "model_checkpoints", ""),
    "titan_dcp_3rank": ("checkpoint/step-10", "checkpoint"),
    "titan_dcp_2rank_tied_model_only": ("checkpoint/step-10", "checkpoint"),
    "titan_dcp_v020_2rank": ("checkpoint/step-20", "checkpoint"),
}
SOURCES = [
    *((name, "checkpoint", given) for name, (_, given) in META.items()),
    *((name, "checkpoint", ()) for name in HF),
    *((name, "checkpoint/10", ()) for name in NANOTRON),
    *((name, "checkpoint", ()) for name in NANOTRON),
]


@pytest.mark.parametrize("world", [1, 3])
def test_upstream_checkpoints_become_their_reference(
    world: int, fixtures_root: Path, tmp_path: Path
) -> None:
    mode = f"engine.exchange={'direct' if world == 1 else 'collective'}"
    jobs = [
        Job(
            fixtures_root / name / inner,
            tmp_path / inner.replace("/", "-") / name,
            "hf",
            (mode, *given),
            "least",
        )
        for name, inner, given in SOURCES
    ]
    must_convert(world, jobs)
    for job, (name, _, _) in zip(jobs, SOURCES, strict=True):
        reference, found = hf.read(fixtures_root / name / "reference"), hf.read(job.target)
        assert_same(found, reference)
        assert_same_config(found, reference)
        assert understood(job.target) == understood(fixtures_root / name / "reference"), name


@pytest.mark.parametrize("world", [1, 3])
def test_upstream_dcp_becomes_its_reference(
    world: int, fixtures_root: Path, tmp_path: Path
) -> None:
    """Named as `dcp` and by the bare directory, which holds weights only or a whole training."""
    places = [(name, inner) for name, inners in DCP.items() for inner in inners]
    ways = [(*place, spec) for place in places for spec in ("dcp", None)]
    ways += [("fsdp_llama_recipes_2rank", "single_device", None)]
    jobs = []
    for number, (name, inner, spec) in enumerate(ways):
        reference = fixtures_root / name / "reference"
        mode = f"engine.exchange={('direct', 'collective')[number // 2 % 2]}"
        given = (f"src.assets={reference}", f"src.model={reference / 'config.json'}")[number % 2]
        keys = (mode, given, "dst.max_shard_size=60KB")
        source, place = fixtures_root / name / inner, tmp_path / f"{number}"
        jobs.append(Job(source, place, "hf", keys, "least", spec))
    must_convert(world, jobs)
    for job, (name, _, _) in zip(jobs, ways, strict=True):
        reference, found = hf.read(fixtures_root / name / "reference"), hf.read(job.target)
        assert_same(found, reference)
        assert_same_config(found, reference)


@pytest.mark.parametrize("world", [2, 3])
def test_references_become_upstream_dcp(world: int, fixtures_root: Path, tmp_path: Path) -> None:
    """What we write has the keys, the nesting and the boxes of what upstream wrote."""
    ways = {
        "fsdp2_accelerate_3rank": ("fsdp3", ()),
        "fsdp_llama_recipes_2rank": ("fsdp2", ()),
        "titan_dcp_2rank_tied_model_only": ("titan2", ()),
        "titan_dcp_v020_2rank": ("titan2", ("dst.keys=older",)),
    }
    jobs = [
        Job(fixtures_root / name / "reference", tmp_path / name, spec, given, "least")
        for name, (spec, given) in ways.items()
    ]
    must_convert(world, jobs)
    for name, (spec, _) in ways.items():
        upstream = fixtures_root / name / DCP[name][0]
        ours = tmp_path / name / (STEP if spec == "titan2" else "")
        dcp.assert_same_tensors(dcp.read(ours), dcp.read(upstream))
        one, other = dcp.metadata(ours), dcp.metadata(upstream)
        assert one.planner_data == {key: other.planner_data[key] for key in dcp.boxes(ours)}
        theirs = dcp.boxes(upstream)
        for key, found in dcp.boxes(ours).items():
            if len(theirs[key]) > 1:  # q, k and v are whole where TorchTitan splits its fused ones
                assert sorted(found) == [box for box in sorted(theirs[key]) if 0 not in box[1]]


@pytest.mark.parametrize("world", [2, 3])
def test_references_become_upstream_meta_files(
    world: int, fixtures_root: Path, tmp_path: Path
) -> None:
    jobs = [
        Job(fixtures_root / name / "reference", tmp_path / name, spec, (), "least")
        for name, (spec, _) in META.items()
    ]
    must_convert(world, jobs)
    for name in META:
        upstream, ours = fixtures_root / name / "checkpoint", tmp_path / name
        files = {file.name for file in upstream.glob("*.pth")}
        assert files == {file.name for file in ours.glob("*.pth")}
        for file in sorted(files):
            theirs, found = meta.load(upstream / file), meta.load(ours / file)
            assert set(found) == set(theirs), f"{name}: {file}"
            for key, tensor in theirs.items():
                assert_same_tensor(f"{name}: {file}: {key}", found[key], tensor)
        check_params(params_in(ours), params_in(upstream))
    old = meta.load(tmp_path / "meta_mp4_llama2" / "consolidated.03.pth")
    assert tuple(old[meta.EMBEDDING].shape) == (252, 24)
    assert tuple(old["rope.freqs"].shape) == (6,)


def understood(path: Path) -> dict[str, Any]:
    """What transformers makes of a directory's config.json."""
    found: dict[str, Any] = transformers.AutoConfig.from_pretrained(path).to_dict()
    return {key: value for key, value in found.items() if key != "_name_or_path"}


def params_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "params.json").read_text())
    return found


def check_params(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Sizes that are written out are equal, and those that follow by a rule come to the same."""
    computed = ("multiple_of", "ffn_dim_multiplier", "vocab_size")
    said = {key: value for key, value in theirs.items() if key not in computed}
    assert {key: ours.get(key) for key in said} == said
    assert meta.ffn_size(ours) == meta.ffn_size(theirs)
    assert theirs["vocab_size"] in (-1, ours["vocab_size"])
    assert ours.get("n_kv_heads", ours["n_heads"]) == theirs.get("n_kv_heads", theirs["n_heads"])
    assert bool(ours.get("use_scaled_rope")) == bool(theirs.get("use_scaled_rope"))


@pytest.mark.parametrize("world", [1, 2])
def test_references_become_upstream_safetensors(
    world: int, fixtures_root: Path, tmp_path: Path
) -> None:
    size = "dst.max_shard_size=60KB"
    jobs = [Job(fixtures_root / name / "reference", tmp_path / name, "hf", (size,)) for name in HF]
    must_convert(world, jobs)
    for name in HF:
        upstream, found = hf.read(fixtures_root / name / "checkpoint"), hf.read(tmp_path / name)
        assert_same(found, upstream)
        assert_same_config(found, upstream)
        ours, theirs = (
            json.loads((path / name / inner / "model.safetensors.index.json").read_text())
            for path, inner in ((tmp_path, ""), (fixtures_root, "checkpoint"))
        )
        assert set(ours["weight_map"]) == set(theirs["weight_map"])
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        for file in (tmp_path / name).glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("world", [2, 5])
def test_references_become_upstream_nanotron_files(
    world: int, fixtures_root: Path, tmp_path: Path
) -> None:
    jobs = [
        Job(fixtures_root / name / "reference", tmp_path / name, spec, (), "least")
        for name, (spec, _, _) in NANOTRON.items()
    ]
    must_convert(world, jobs)
    for name, (_, tp, pp) in NANOTRON.items():
        upstream, ours = fixtures_root / name / "checkpoint/10", tmp_path / name
        assert files_in(ours / "model") == files_in(upstream / "model")
        assert len(files_in(ours / "model")) == 9 + 18 * tp
        for file in sorted(files_in(ours / "model")):
            tensor, metadata = opened(ours / "model" / file)
            expected, said = opened(upstream / "model" / file)
            assert_same_tensor(f"{name}: {file}", tensor, expected)
            assert metadata == said, f"{name}: {file}"
        assert nanotron.topology(ours) == (tp, pp)
        check_nanotron_texts(ours, upstream)


def opened(file: Path) -> tuple[Any, dict[str, str]]:
    """A file's tensor, and its metadata as numpy 1 would have printed it."""
    with safe_open(file, framework="pt") as stored:
        assert list(stored.keys()) == ["data"]
        said = stored.metadata() or {}
        plain = {key: re.sub(r"np\.int64\((\d+)\)", r"\1", text) for key, text in said.items()}
        return stored.get_tensor("data"), plain


def check_nanotron_texts(ours: Path, upstream: Path) -> None:
    """model_config.json is equal; the others have the same keys, and say the same of the model."""
    config, theirs = (json.loads((p / "model_config.json").read_text()) for p in (ours, upstream))
    assert config == theirs
    facts, said = (
        json.loads((p / "checkpoint_metadata.json").read_text()) for p in (ours, upstream)
    )
    assert facts.keys() == said.keys()
    assert facts["metas"].keys() == said["metas"].keys()
    for key in ("version", "tp", "dp", "cp"):
        assert facts[key] == said[key], key
    run, other = (yaml.safe_load((p / "config.yaml").read_text()) for p in (ours, upstream))
    assert run.keys() == other.keys()
    assert run["model"]["model_config"] == theirs
    assert run["model"]["dtype"] == other["model"]["dtype"]
    for axis in ("tp", "pp", "dp"):
        assert run["parallelism"][axis] == other["parallelism"][axis], axis
