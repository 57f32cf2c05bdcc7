"""The oracles of DCP checkpoints agree with torch, with upstream files and with each other."""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from tests.oracles import dcp, hf, titan
from tests.oracles.dcp import assert_same_tensors
from tests.oracles.models import Model, model_a, model_b, model_c
from tests.ranks import run_ranks

SMALL = {"head_dim": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}  # leaves ranks empty
EXTRA = {"step": 7, "cfg": {"lr": 0.1, "names": ["a", "b"]}, "scale": torch.ones(3)}
FSDP = {
    "fsdp2_accelerate_3rank": ("pytorch_model_fsdp_0", 3),
    "fsdp_llama_recipes_2rank": ("model_checkpoints/fine-tuned-fixture-org/tiny-llama", 2),
    "fsdp_llama_recipes_3rank_fp32_optim": (
        "model_checkpoints/fine-tuned-fixture-org/tiny-llama",
        3,
    ),
}
TITAN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "titan_dcp_3rank": ("checkpoint/step-10", 3, {"keys": "0.3", "training": True}),
    "titan_dcp_2rank_tied_model_only": ("checkpoint/step-10", 2, {"keys": "0.3"}),
    "titan_dcp_v020_2rank": ("checkpoint/step-20", 2, {"keys": "0.2"}),
}
Q0, K0 = (f"model.model.layers.0.self_attn.{n}_proj.weight" for n in "qk")

plain = cache(model_b)
tied = cache(partial(model_b, tied=True))


@pytest.mark.parametrize("name", FSDP)
def test_fsdp_reads_and_writes_what_upstream_does(
    name: str, fixtures_root: Path, tmp_path: Path
) -> None:
    inner, shards = FSDP[name]
    upstream, reference = fixtures_root / name / inner, hf.read(fixtures_root / name / "reference")
    assert_same_tensors(dcp.read_fsdp(upstream), reference.tensors)
    dcp.write_fsdp(reference, tmp_path / "ours", shards)
    if "optim" not in name:
        dcp.check_same_layout(tmp_path / "ours", upstream)
    theirs = dcp.boxes(upstream)
    for key, found in dcp.boxes(tmp_path / "ours").items():
        assert found == theirs[key] == dcp.chunk_boxes(reference.tensors[key[6:]].shape, shards)


def test_the_optimizer_is_left_out_unless_asked_for(fixtures_root: Path) -> None:
    name = "fsdp_llama_recipes_3rank_fp32_optim"
    path = fixtures_root / name / FSDP[name][0]
    extra = dcp.read(path, everything=True).keys() - dcp.read(path).keys()
    assert "optim.state.model.norm.weight.exp_avg" in extra
    assert all(key.startswith("optim.") for key in extra)


@pytest.mark.parametrize("name", TITAN)
def test_titan_reads_and_writes_what_upstream_does(
    name: str, fixtures_root: Path, tmp_path: Path
) -> None:
    inner, shards, given = TITAN[name]
    upstream, reference = fixtures_root / name / inner, hf.read(fixtures_root / name / "reference")
    assert_same_tensors(titan.read_titan(upstream, reference.config), reference.tensors)
    assert_same_tensors(titan.titan_tensors(reference, keys=given["keys"]), dcp.read(upstream))
    ours = titan.write_titan(reference, tmp_path, shards, step=10, **given)
    assert ours == tmp_path / "step-10"
    dcp.check_same_layout(ours, upstream, where=False)


def test_one_process_writes_what_ranks_write(tmp_path: Path) -> None:
    model = model_b(tied=True, **SMALL)
    state = partial(dcp.hf_state, "model_b", tied=True, **SMALL)
    fused = partial(titan.titan_state, "model_b", keys="fused+w13", tied=True, **SMALL)
    jobs: dict[str, tuple[Callable[[], Any], tuple[int, int], dict[str, Any]]] = {
        "fsdp": (state, (6, 1), {"extra": EXTRA}),
        "bare": (state, (6, 1), {"wrapper": False}),
        "titan": (fused, (6, 1), {"wrapper": False}),
        "3x2": (state, (3, 2), {}),
        "2x3": (state, (2, 3), {}),
        "titan-3x2": (fused, (3, 2), {"wrapper": False}),
    }
    calls = [
        partial(dcp.save_on_mesh, tmp_path / "real" / name, make, *mesh, **given)
        for name, (make, mesh, given) in jobs.items()
    ]
    run_ranks(6, dcp.in_turn, calls)
    ours = tmp_path / "ours"
    dcp.write_fsdp(model, ours / "fsdp", 6, extra=EXTRA)
    dcp.write_fsdp(model, ours / "bare", 6, wrapper=False)
    titan.write_titan(model, ours / "titan", 6, keys="fused+w13")
    dcp.write_2d(model, ours / "3x2", 3, 2)
    dcp.write_2d(model, ours / "2x3", 2, 3)
    titan.write_2d(model, ours / "titan-3x2", 3, 2, keys="fused+w13")
    for name in jobs:
        real = tmp_path / "real" / name
        dcp.check_same_layout(ours / name, real)
        for file in real.glob("*.distcp"):
            assert (ours / name / file.name).read_bytes() == file.read_bytes(), (name, file.name)
    assert ((2, 0), (0, 36)) in dcp.boxes(ours / "fsdp")[K0]
    assert ((2, 0), (0, 36)) in dcp.boxes(ours / "3x2")[K0]


def test_torch_loads_onto_meshes_of_other_sizes(tmp_path: Path) -> None:
    dcp.write_2d(tied(), tmp_path / "2d", 2, 3)
    expected = {f"model.{name}": tensor for name, tensor in dcp.with_head(tied()).items()}
    dcp.check_loads_on_mesh(tmp_path / "2d", expected, [(2, 2), (4, 1)])
    wrong = expected | {Q0: expected[Q0].flip(0)}
    with pytest.raises(AssertionError, match="differ"):
        dcp.check_loads_on_mesh(tmp_path / "2d", wrong, [(1, 1)])


@pytest.mark.parametrize("make", [model_a, model_b, model_c])
@pytest.mark.parametrize("is_tied", [False, True])
def test_fsdp_reads_what_it_wrote(
    make: Callable[..., Model], is_tied: bool, tmp_path: Path
) -> None:
    model = make(tied=is_tied)
    expected = dcp.with_head(model)
    assert len(expected) == len(model.tensors) + is_tied
    for shards, given in ((8, {}), (3, {"wrapper": False}), (2, {"replicas": 2, "extra": EXTRA})):
        dcp.write_fsdp(model, tmp_path / f"{shards}", shards, **given)
        assert_same_tensors(dcp.read_fsdp(tmp_path / f"{shards}"), expected)
    dcp.write_fsdp(model, tmp_path / "1", 1, no_dist=True)
    assert_same_tensors(dcp.read_fsdp(tmp_path / "1"), expected)
    assert {file.name for file in (tmp_path / "1").iterdir()} == {".metadata", "__0_0.distcp"}


def test_writer_options_give_other_files(tmp_path: Path) -> None:
    dcp.write_fsdp(plain(), tmp_path / "many", 2, single_file_per_rank=False)
    dcp.write_fsdp(plain(), tmp_path / "threads", 2, thread_count=60)
    assert len(list((tmp_path / "many").glob("*.distcp"))) == 2 * len(plain().tensors)
    sizes = [file.stat().st_size for file in (tmp_path / "threads").glob("*.distcp")]
    assert sizes.count(0) == 2 * (60 - len(plain().tensors))
    for name in ("many", "threads"):
        assert_same_tensors(dcp.read_fsdp(tmp_path / name), plain().tensors)


@pytest.mark.parametrize("rope", ["interleaved", "half"])
@pytest.mark.parametrize("keys", ["0.2", "0.3", "fused", "w13", "fused+w13"])
def test_titan_reads_what_it_wrote(keys: str, rope: str, tmp_path: Path) -> None:
    model, given = tied() if rope == "half" else plain(), {"keys": keys, "rope": rope}
    more = {"prefix": "model.", "training": True, "freqs_cis": True}
    titan.write_titan(model, tmp_path / "cut", 5, **given, whole_qkv=False)
    titan.write_titan(model, tmp_path / "more", 3, **given, **more)
    titan.write_2d(model, tmp_path / "2d", 2, 3, **given)
    for name in ("cut", "more", "2d"):
        found = titan.read_titan(tmp_path / name, model.config, rope=rope)
        assert_same_tensors(found, model.tensors)


def test_titan_formulas_by_hand() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}
    q, k, v = (
        torch.tensor([[float(s + i)] for i in range(n)]) for s, n in ((0, 8), (20, 4), (30, 4))
    )
    rows = titan.fuse_qkv(q, k, v, config).flatten().tolist()
    assert rows == [0, 1, 2, 3, 20, 21, 30, 31, 4, 5, 6, 7, 22, 23, 32, 33]
    tensors = titan.titan_tensors(plain(), keys="fused+w13", prefix="x.", freqs_cis=True)
    hidden, ffn = plain().config["hidden_size"], plain().config["intermediate_size"]
    assert tensors["x.layers.0.attention.qkv_linear.wqkv.weight"].shape == (3 * 4 * 6, hidden)
    assert tensors["x.layers.0.feed_forward.w13.weight"].shape == (2, ffn, hidden)
    assert tensors["x.freqs_cis"].dtype == torch.complex64


def test_boxes_by_hand() -> None:
    assert [sizes[0] for _, sizes in dcp.chunk_boxes((5, 3), 4)] == [2, 2, 1, 0]
    assert dcp.chunk_boxes((1,), 3) == [((0,), (1,)), ((1,), (0,)), ((1,), (0,))]
    rows = [(offsets[0], sizes[0]) for offsets, sizes in dcp.grid_boxes((6, 1), 2, 2, 0)]
    assert rows == [(0, 2), (3, 2), (2, 1), (5, 1)]
    expected = [((0, 0), (2, 3)), ((0, 3), (2, 2)), ((2, 0), (1, 3)), ((2, 3), (1, 2))]
    assert dcp.grid_boxes((3, 5), 2, 2, 1) == expected
    assert dcp.grid_boxes((3,), 2, 2, None) == [((0,), (2,))] * 2 + [((2,), (1,))] * 2


COLUMNS = torch.ones((36, 12), dtype=torch.bfloat16).t()
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "hole": (lambda path: dcp.drop_chunk(path, Q0), "not covered once"),
    "overlap": (lambda path: dcp.move_chunk(path, Q0, (-1, 0)), "not covered once"),
    "outside": (lambda path: dcp.move_chunk(path, Q0, (1, 0)), "not inside"),
    "twice": (lambda path: dcp.repeat_chunk(path, Q0), "not covered once"),
    "no item": (lambda path: dcp.drop_item(path, Q0), "boxes without items"),
    "no file": (lambda path: dcp.set_item(path, Q0, relative_path="../x"), "x: None bytes"),
    "beyond": (lambda path: dcp.set_item(path, Q0, 2, length=10**9), "an item to"),
    "dtype": (lambda path: dcp.set_dtype(path, Q0, torch.float16), "float16"),
    "size": (lambda path: dcp.set_size(path, Q0, (35, 36)), "not inside"),
    "strides": (lambda path: dcp.replace_item(path, Q0, COLUMNS), "False.+ not .+True"),
    "no tensor": (lambda path: dcp.replace_item(path, Q0, {"a": 1}), "dict"),
}  # fmt: skip


def flip(path: Path) -> None:
    """Turn a bit of a tensor's data, which torch would load without a word."""
    info = next(iter(dcp.metadata(path).storage_data.values()))
    file = path / info.relative_path
    data = bytearray(file.read_bytes())
    data[info.offset + info.length // 2] ^= 1
    file.write_bytes(data)


DAMAGE["bit"] = (flip, "checksum of archive/data/0 is wrong")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen(kind: str, tmp_path: Path) -> None:
    dcp.write_fsdp(plain(), tmp_path / "it", 3)
    damage, words = DAMAGE[kind]
    damage(tmp_path / "it")
    with pytest.raises(Exception) as caught:  # noqa: PT011 (torch's own errors differ by release)
        dcp.read(tmp_path / "it")
    assert re.search(words, repr(caught.value)), repr(caught.value)


def test_torch_itself_overlooks_a_hole(tmp_path: Path) -> None:
    dcp.write_fsdp(plain(), tmp_path / "it", 3)
    dcp.drop_chunk(tmp_path / "it", Q0)
    state = {Q0: torch.full((36, 36), 3.0, dtype=torch.bfloat16)}
    dcp.load(state, tmp_path / "it")
    assert bool((state[Q0][24:] == 3).all())
    assert not bool((state[Q0][:24] == 3).any())


def test_a_missing_key_is_an_ordinary_error(tmp_path: Path) -> None:
    dcp.write_fsdp(plain(), tmp_path / "it", 3)
    assert not issubclass(CheckpointException, Exception)
    with pytest.raises(AssertionError, match="Missing key"):
        dcp.load({"absent": torch.ones(1)}, tmp_path / "it")


def test_traps_spring_when_unpickled_without_care(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    dcp.write_fsdp(plain(), tmp_path / "a", 2, extra={"lr": dcp.Trap(marker)})
    assert not marker.exists()
    dcp.load({"lr": None}, tmp_path / "a")
    marker.rmdir()
    dcp.write_fsdp(plain(), tmp_path / "b", 2)
    dcp.trap_item(tmp_path / "b", Q0, marker)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        dcp.read(tmp_path / "b")
    assert not marker.exists()
    dcp.trap_metadata(tmp_path / "b", marker)
    assert not marker.exists()
    dcp.metadata(tmp_path / "b")
    assert marker.is_dir()


@pytest.mark.parametrize("change", [dcp.without_nesting, dcp.as_older_torch])
@pytest.mark.parametrize("wrapper", [True, False])
def test_other_programs_metadata_reads_the_same(
    change: Callable[[Path], None], wrapper: bool, tmp_path: Path
) -> None:
    dcp.write_fsdp(tied(), tmp_path / "it", 3, wrapper=wrapper)
    change(tmp_path / "it")
    assert_same_tensors(dcp.read_fsdp(tmp_path / "it"), dcp.with_head(tied()))


def test_transforms_are_named_in_the_metadata(tmp_path: Path) -> None:
    dcp.write_fsdp(plain(), tmp_path / "it", 3)
    dcp.set_item(tmp_path / "it", Q0, transform_descriptors=["stream.zstd/1"])
    found = dcp.metadata(tmp_path / "it").storage_data.values()
    assert [info.transform_descriptors for info in found].count(["stream.zstd/1"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mllama_is_read_in_both_spellings(dtype: torch.dtype, tmp_path: Path) -> None:
    from tests.oracles import mllama

    model = mllama.tiny(dtype)
    model.save_pretrained(tmp_path / "saved")
    released = mllama.published(model.state_dict())
    assert_same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), released)
    mllama.check_loads(tmp_path / "saved", model)
    assert len(released["language_model.model.embed_tokens.weight"]) == 101
    assert len(released["language_model.lm_head.weight"]) == 93
    for spelling in mllama.SPELLINGS:
        path = tmp_path / spelling
        mllama.write_fsdp(path / "dcp", 3, spelling, dtype)
        found = dcp.read_fsdp(path / "dcp")
        assert_same_tensors(found, mllama.spelled(model, spelling))
        assert_same_tensors(mllama.published(found), released)
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})
        mllama.write_config(path, dtype)
        mllama.check_loads(path, model)
    gate = "language_model.model.layers.1.cross_attn_attn_gate"
    assert dcp.boxes(tmp_path / "old" / "dcp")[f"model.{gate}"] == [((0,), (1,)), ((1,), (0,))]
    save_file({**found, "lm_head.weight": found["lm_head.weight"].flip(0)},
              tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(AssertionError, match="lm_head"):
        mllama.check_loads(tmp_path / "new", model)
