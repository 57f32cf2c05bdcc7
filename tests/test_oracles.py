"""The oracles agree with each other, with upstream's checkpoints and with transformers."""

import ast
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from tests.oracles import forward, hf, meta, nanotron
from tests.oracles.compare import (
    assert_same,
    assert_same_config,
    assert_same_files,
    bits,
    files_in,
)
from tests.oracles.models import (
    LLAMA3_SCALING,
    Model,
    expected_parameter_count,
    model_a,
    model_b,
    model_c,
    shapes,
    wide_model,
    with_normal_values,
)
from tests.oracles.rope import deinterleave, interleave
from tests.ranks import RankError, run_ranks

MODELS = [model_a, model_b, model_c]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QWEN2 = {"model_type": "qwen2"}
BIASED = {"attention_bias": True, "mlp_bias": True}

# ------------------------------------------------------------------------------------ the models


def test_oracles_do_not_import_what_they_judge() -> None:
    for file in Path(__file__).parent.joinpath("oracles").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m.split(".")[0] == "reshard"], file.name


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("overrides", [{}, QWEN2, BIASED], ids=["plain", "qwen2", "biased"])
def test_models_have_the_parameters_of_their_config(
    make: Callable[..., Model], tied: bool, overrides: dict[str, Any]
) -> None:
    model = make(tied, **overrides)
    assert {name: tuple(t.shape) for name, t in model.tensors.items()} == shapes(model.config)
    count = sum(tensor.numel() for tensor in model.tensors.values())
    assert count == expected_parameter_count(model.config)
    assert ("lm_head.weight" in model.tensors) != tied


@pytest.mark.parametrize("overrides", [{}, QWEN2, BIASED, {"tie_word_embeddings": True}], ids=str)
def test_names_and_shapes_are_those_of_transformers(overrides: dict[str, Any]) -> None:
    model = model_b(**overrides)
    with torch.device("meta"):
        peer = transformers_model(model)
    found = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    if model.config["tie_word_embeddings"]:
        found.pop("lm_head.weight")
    assert found == shapes(model.config)
    assert list(found) == list(shapes(model.config))


def test_exact_float32_values_are_unique_in_the_whole_model() -> None:
    values = torch.cat([t.flatten() for t in model_a(dtype=torch.float32).tensors.values()])
    assert values.unique().numel() == values.numel()
    assert values.min() == 1
    assert values.max() == values.numel() < 2**24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_finite_nonzero_and_show_where_they_belong(dtype: torch.dtype) -> None:
    model = model_c(dtype=dtype)
    flat = torch.cat([t.flatten() for t in model.tensors.values()])
    assert flat.isfinite().all()
    assert (bits(flat) != 0).all()
    rows = torch.cat([t.reshape(-1, 72) for t in model.tensors.values()])
    for lines in (rows, *(t.T for t in model.tensors.values() if t.dim() == 2)):
        assert bits(lines).unique(dim=0).shape == lines.shape
    assert bits(flat).unique().numel() > 0.75 * min(flat.numel(), 2**16)


def test_large_float32_models_hash_their_values() -> None:
    model = wide_model(2**26 + 2**25, dtype=torch.float32)
    table = model.tensors["lm_head.weight"]
    assert table.isfinite().all()
    assert bits(table).unique().numel() > 0.999 * table.numel()


@pytest.mark.parametrize("size", [2**22, 2**24, 2**26])
def test_a_wide_model_has_about_the_bytes_asked_for(size: int) -> None:
    model = wide_model(size)
    found = sum(t.numel() * t.element_size() for t in model.tensors.values())
    assert abs(found - size) < 0.1 * size


def test_rotary_rows_are_swapped_as_published() -> None:
    rows = torch.arange(16)
    assert interleave(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert deinterleave(rows, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    matrix = torch.randn(24, 5)
    assert torch.equal(deinterleave(interleave(matrix, 4), 4), matrix)


# ------------------------------------------------------------------------------------ comparison


def changed(model: Model, name: str, index: tuple[int, ...], code: int) -> Model:
    """The model with one element's bits replaced."""
    tensor = model.tensors[name].clone()
    bits(tensor)[index] = code
    return Model(model.config, model.tensors | {name: tensor})


def test_a_difference_is_named_with_its_index() -> None:
    model = model_b()
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(AssertionError, match=r"layers\.3\.mlp\.up_proj\.weight\[7, 5\].* 1 of"):
        assert_same(model, changed(model, name, (7, 5), 0))


def test_bits_count_not_values() -> None:
    zero = changed(model_b(), "model.norm.weight", (0,), 0)
    negative = changed(zero, "model.norm.weight", (0,), -(2**15))
    nan = changed(zero, "model.norm.weight", (0,), 0x7FC0)
    other = changed(zero, "model.norm.weight", (0,), 0x7FC1)
    assert_same(nan, nan)
    for a, b in ((zero, negative), (nan, other)):
        with pytest.raises(AssertionError, match=r"model\.norm\.weight\[0\]"):
            assert_same(a, b)


def test_names_dtypes_and_shapes_count() -> None:
    model = model_b()
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        assert_same(model, model_b(tied=True))
    with pytest.raises(AssertionError, match=r"torch\.bfloat16 against torch\.float16"):
        assert_same(model, model_b(dtype=torch.float16))
    with pytest.raises(AssertionError, match="shape"):
        assert_same(model, model_b(vocab_size=112))
    with pytest.raises(AssertionError, match="rope_theta"):
        assert_same_config(model, model_b(rope_theta=1.0))


def test_file_trees_are_compared_byte_for_byte(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    hf.write(model_b(), one)
    hf.write(model_b(), other)
    assert_same_files(one, other)
    (other / "config.json").write_text((one / "config.json").read_text().replace("36", "37", 1))
    with pytest.raises(AssertionError, match=r"config\.json: byte \d+"):
        assert_same_files(one, other)
    (other / "more").touch()
    with pytest.raises(AssertionError, match=r"different files.*more"):
        assert_same_files(one, other)


# ------------------------------------------------------------------------------------ Hugging Face


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_reads_what_it_wrote(
    make: Callable[..., Model], files: int, spelling: int, tied: bool, tmp_path: Path
) -> None:
    model = make(tied, rope_scaling=LLAMA3_SCALING if tied else None)
    hf.write(model, tmp_path, files, spelling=spelling)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    found = hf.read(tmp_path)
    assert_same(model, found)
    assert found.config == model.config


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overrides", [QWEN2, BIASED], ids=["qwen2", "biased"])
def test_hf_keeps_dtypes_and_biases(
    dtype: torch.dtype, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = model_b(dtype=dtype, **overrides)
    hf.write(model, tmp_path, 2)
    assert_same(model, hf.read(tmp_path))


def test_hf_refuses_an_index_that_lies(tmp_path: Path) -> None:
    hf.write(model_b(), tmp_path, 2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00001.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(AssertionError, match="weight_map"):
        hf.read(tmp_path)


@pytest.mark.parametrize("name", ["hf_sharded", "hf_sharded_tied"])
def test_hf_reads_upstream(name: str, fixtures_root: Path) -> None:
    reference = hf.read(fixtures_root / name / "reference")
    found = hf.read(fixtures_root / name / "checkpoint")
    assert_same(reference, found)
    assert_same_config(reference, found)


# ------------------------------------------------------------------------------------ Meta

META_OPTIONS: list[dict[str, Any]] = [
    {},
    {"embedding_dim": 1},
    {"flat_storage": True},
    {"strided": True},
    {"flat_storage": True, "strided": True, "embedding_dim": 1},
    {"rope_freqs": True},
    {"params_wrapped": True},
]


@pytest.mark.parametrize(
    ("make", "mp"), [(model_a, m) for m in (1, 2, 3, 6, 12)] + [(model_b, 3), (model_c, 2)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_meta_reads_what_it_wrote(
    make: Callable[..., Model], mp: int, tied: bool, tmp_path: Path
) -> None:
    model = make(tied, rope_scaling=LLAMA3_SCALING if tied else None)
    if model.config["vocab_size"] % mp or model.config["intermediate_size"] % mp:
        model = make(tied, vocab_size=216, intermediate_size=228)
    meta.write(model, tmp_path, mp)
    assert len(list(tmp_path.glob("*.pth"))) == mp
    found = meta.read(tmp_path)
    assert_same(model, found)
    assert_same_config(model, found)


@pytest.mark.parametrize("options", META_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_options_do_not_change_the_model(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = model_a(dtype=dtype)
    meta.write(model, tmp_path, 3, **options)
    assert_same(model, meta.read(tmp_path))


@pytest.mark.parametrize(
    ("generation", "kv_heads"), [("llama1", 12), ("llama2", 12), ("llama2", 6)]
)
def test_older_generations_say_less(generation: str, kv_heads: int, tmp_path: Path) -> None:
    model = model_a(rope_theta=10000.0, num_key_value_heads=kv_heads)
    meta.write(model, tmp_path, 2, generation=generation, embedding_dim=1, rope_freqs=True)
    params = json.loads((tmp_path / "params.json").read_text())
    assert params["vocab_size"] == -1
    assert ("n_kv_heads" in params) == (kv_heads == 6)
    assert "rope_theta" not in params
    found = meta.read(tmp_path)
    assert_same(model, found)
    assert_same_config(model, found)


def test_storages_are_laid_out_as_asked(tmp_path: Path) -> None:
    model = model_a()
    meta.write(model, tmp_path / "plain", 2)
    meta.write(model, tmp_path / "flat", 2, flat_storage=True, strided=True)
    plain = meta.load(tmp_path / "plain" / "consolidated.01.pth")
    flat = meta.load(tmp_path / "flat" / "consolidated.01.pth")
    assert all(t.is_contiguous() and t.storage_offset() == 0 for t in plain.values())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in plain.values())
    layer = [t for n, t in flat.items() if n.startswith("layers.1.")]
    assert len({t.untyped_storage().data_ptr() for t in layer}) == 1
    assert layer[0].untyped_storage().nbytes() == sum(t.nbytes for t in layer)
    turned = [name for name, t in flat.items() if not t.is_contiguous()]
    assert len(turned) == (2 + 7 * 5) // 2
    assert {name.split(".")[-2] for name in turned} == {
        *("wq", "wk", "wv", "wo"),
        *("w1", "w2"),
        "w3",
        "output",
    }


def test_repeated_kv_heads_stand_in_a_row(tmp_path: Path) -> None:
    model = model_a(vocab_size=216, intermediate_size=228)
    meta.write(model, tmp_path, 12)
    assert json.loads((tmp_path / "params.json").read_text())["n_kv_heads"] == 12
    value = model.tensors["model.layers.2.self_attn.v_proj.weight"].chunk(6)
    for rank in range(12):
        stored = meta.load(tmp_path / f"consolidated.{rank:02d}.pth")
        assert torch.equal(bits(stored["layers.2.attention.wv.weight"]), bits(value[rank // 2]))


def test_kv_copies_that_differ_are_refused(tmp_path: Path) -> None:
    meta.write(model_a(), tmp_path, 2, kv_copies=2)
    assert_same(model_a(), meta.read(tmp_path, kv_copies=2))
    shard = meta.load(tmp_path / "consolidated.01.pth")
    bits(shard["layers.4.attention.wk.weight"])[11, 3] ^= 1
    torch.save(shard, tmp_path / "consolidated.01.pth")
    with pytest.raises(AssertionError, match=r"layers\.4\.attention\.wk.*copies"):
        meta.read(tmp_path, kv_copies=2)
    assert meta.read(tmp_path).config["num_key_value_heads"] == 12


def test_norms_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    meta.write(model_a(), tmp_path, 3, norm_noise=2)
    with pytest.raises(AssertionError, match=r"norm.*rank 2 against rank 0"):
        meta.read(tmp_path)


def test_meta_has_no_place_for_biases(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="biases"):
        meta.write(model_a(attention_bias=True), tmp_path, 1)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("meta_mp2", 8.0),
        ("meta_mp4_llama31_fp32", 8.0),
        ("meta_mp4_llama2", 8.0),
        ("meta_mp1_tied", 32.0),
    ],
)
def test_meta_reads_upstream(name: str, factor: float, fixtures_root: Path) -> None:
    reference = hf.read(fixtures_root / name / "reference")
    found = meta.read(fixtures_root / name / "checkpoint", rope_factor=factor)
    assert_same(reference, found)
    assert_same_config(reference, found)


def test_meta_files_hold_the_keys_of_upstream(fixtures_root: Path, tmp_path: Path) -> None:
    fixture = fixtures_root / "meta_mp4_llama2"
    model = hf.read(fixture / "reference")
    options = {"embedding_dim": 1, "flat_storage": True, "rope_freqs": True}
    meta.write(model, tmp_path, 4, generation="llama2", **options)
    for file in sorted(tmp_path.glob("*.pth")):
        mine, theirs = meta.load(file), meta.load(fixture / "checkpoint" / file.name)
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            assert torch.equal(bits(tensor), bits(theirs[name])), name
            assert tensor.storage_offset() == theirs[name].storage_offset(), name
    params = [
        json.loads((p / "params.json").read_text()) for p in (tmp_path, fixture / "checkpoint")
    ]
    assert params[0].keys() == params[1].keys()


# ------------------------------------------------------------------------------------ Nanotron

SECTION_4 = [
    # layers, pp, hidden, ffn, vocab -> decoder layers per stage
    ((4, 2, 64, 176, 128), [3, 1]),
    ((4, 2, 512, 1024, 4096), [3, 1]),
    ((4, 2, 2048, 8192, 128256), [4, 0]),
    ((4, 4, 64, 176, 128), [2, 1, 1, 0]),
    ((16, 2, 2048, 8192, 128256), [10, 6]),
    ((16, 2, 2048, 8192, 32000), [9, 7]),
    ((16, 2, 2048, 8192, 49152), [9, 7]),
    ((32, 4, 4096, 11008, 32000), [9, 8, 8, 7]),
    ((32, 4, 4096, 14336, 32000), [9, 8, 8, 7]),
    ((32, 4, 4096, 14336, 128256), [9, 9, 8, 6]),
    ((32, 2, 4096, 11008, 32000), [17, 15]),
    ((32, 2, 4096, 14336, 128256), [18, 14]),
    ((80, 4, 8192, 28672, 128256), [21, 20, 20, 19]),
    ((2, 4, 16, 64, 256), [1, 1, 0, 0]),
]


def sizes(layers: int, hidden: int, ffn: int, vocab: int) -> dict[str, int]:
    """The part of a config that decides pipeline stages."""
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    return dict(zip(keys, (layers, hidden, ffn, vocab), strict=True))


@pytest.mark.parametrize(("case", "expected"), SECTION_4, ids=str)
def test_stages_are_those_of_the_table(case: tuple[int, ...], expected: list[int]) -> None:
    layers, pp, hidden, ffn, vocab = case
    found = nanotron.stages(sizes(layers, hidden, ffn, vocab), pp)
    assert [sum(b.startswith("decoder.") for b in blocks) for blocks in found] == expected
    blocks = [block for stage in found for block in stage]
    assert blocks[0] == "token_position_embeddings"
    assert blocks[-4:] == ["final_layer_norm", "lm_head", "cast_to_fp32", "loss"]
    assert len(blocks) == layers + 5


def test_stages_of_the_degenerate_cases() -> None:
    tail = ["final_layer_norm", "lm_head"], ["cast_to_fp32", "loss"]
    assert nanotron.stages(sizes(2, 16, 64, 256), 4)[2:] == list(tail)
    # 4 layers on 2 stages: r = vocab / (4 hidden + 3 ffn), here vocab / 400
    for vocab, first in ((796, 3), (800, 4), (1596, 4), (1600, 6), (4000, 6)):
        found = nanotron.stages(sizes(4, 64, 48, vocab), 2)
        assert len(found[0]) == 1 + first, vocab
    assert found[1] == ["cast_to_fp32", "loss"]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope_interleaved", [False, True])
def test_nanotron_reads_what_it_wrote(
    make: Callable[..., Model], tp: int, pp: int, tied: bool, rope_interleaved: bool, tmp_path: Path
) -> None:
    model, step = make(tied), tmp_path / "10"
    nanotron.write(model, step, tp, pp, rope_interleaved=rope_interleaved)
    assert (tmp_path / "latest.txt").read_text() == "10"
    assert nanotron.topology(step) == (tp, pp)
    files = {file for file in files_in(step) if file.startswith("model/")}
    assert files == nanotron.expected_files(model.config, tp, pp)
    layers = model.config["num_hidden_layers"]
    assert len(files) == tp * (4 * layers + (1 if tied else 2)) + 2 * layers + 1
    found = nanotron.read(step)
    assert_same(model, found)
    assert_same_config(model, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overrides", [{}, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("rope_interleaved", [False, True])
def test_nanotron_keeps_dtypes_and_biases(
    dtype: torch.dtype, overrides: dict[str, Any], rope_interleaved: bool, tmp_path: Path
) -> None:
    model = model_a(dtype=dtype, **overrides)
    nanotron.write(model, tmp_path, 2, 2, rope_interleaved=rope_interleaved, numpy2_shapes=True)
    found = nanotron.read(tmp_path)
    assert_same(model, found)
    assert_same_config(model, found)


@pytest.mark.parametrize("tied", [False, True])
def test_nanotron_pads_the_vocabulary(tied: bool, tmp_path: Path) -> None:
    model = model_a(tied)
    nanotron.write(model, tmp_path, 3, 2, vocab_multiple=32)
    found = nanotron.read(tmp_path)
    assert found.config["vocab_size"] == 288
    assert (bits(found.tensors["model.embed_tokens.weight"][222:]) != 0).all()
    assert_same(model, nanotron.read(tmp_path, vocab_size=222))


def metadata(file: Path) -> dict[str, str] | None:
    """A safetensors file's metadata."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_nanotron_refuses_what_its_loader_would_not_see(tmp_path: Path) -> None:
    model = model_b()
    nanotron.write(model, tmp_path, 3, 1)
    folder = tmp_path / "model/model/decoder/0/pp_block/attn/qkv_proj"
    last = folder / "model_weight_pp-rank-0-of-1_tp-rank-2-of-3.safetensors"
    facts, content = metadata(last), last.read_bytes()
    tensor = nanotron.shard([torch.zeros(24, 36, dtype=torch.bfloat16)], 0, 1, 0)
    last.unlink()
    with pytest.raises(AssertionError, match="covered once"):
        nanotron.read(tmp_path)
    save_file({"data": tensor}, last, metadata={**facts, "format": "pt"})
    with pytest.raises(AssertionError, match="metadata keys"):
        nanotron.read(tmp_path)
    last.write_bytes(content)
    stale = folder / "model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors"
    stale.write_bytes(content)
    with pytest.raises(AssertionError, match="covered once"):
        nanotron.read(tmp_path)
    stale.unlink()
    (folder / "notes.txt").touch()
    with pytest.raises(AssertionError, match="no parameter owns"):
        nanotron.read(tmp_path)


def test_nanotron_shapes_are_parsed_by_upstreams_rules() -> None:
    for text in ("(128, 64)", "(np.int64(128), 64)"):
        assert nanotron.parse_shape(text) == (128, 64)
    assert nanotron.parse_shape("(128,)") == nanotron.parse_shape("(np.int64(128),)") == (128,)
    for text in ("[128, 64]", "torch.Size([128, 64])"):
        with pytest.raises(ValueError, match="invalid literal"):
            nanotron.parse_shape(text)
    with pytest.raises(TypeError):
        nanotron.parse_shape("(64, np.int64(128))")


@pytest.mark.parametrize("name", ["nanotron_tp2_pp2", "nanotron_tp1_pp1"])
def test_nanotron_reads_upstream(name: str, fixtures_root: Path) -> None:
    reference = hf.read(fixtures_root / name / "reference")
    found = nanotron.read(fixtures_root / name / "checkpoint" / "10")
    assert_same(reference, found)
    assert_same_config(reference, found)


@pytest.mark.parametrize(("name", "tp", "pp"), [("tp2_pp2", 2, 2), ("tp1_pp1", 1, 1)])
def test_nanotron_writes_what_upstream_writes(
    name: str, tp: int, pp: int, fixtures_root: Path, tmp_path: Path
) -> None:
    fixture = fixtures_root / f"nanotron_{name}"
    upstream, mine = fixture / "checkpoint" / "10", tmp_path / "10"
    nanotron.write(hf.read(fixture / "reference"), mine, tp, pp, numpy2_shapes=True)
    files = files_in(upstream / "model")
    assert files == files_in(mine / "model")
    for file in files:
        one, other = mine / "model" / file, upstream / "model" / file
        assert metadata(one) == metadata(other), file
        assert payload(one) == payload(other), file
    configs = [json.loads((p / "model_config.json").read_text()) for p in (mine, upstream)]
    assert configs[0] == configs[1]
    assert (tmp_path / "latest.txt").read_bytes() == (
        fixture / "checkpoint/latest.txt"
    ).read_bytes()


def payload(file: Path) -> tuple[Any, bytes]:
    """A safetensors file's header without metadata (None or {} counts), and its data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return (header["data"], "__metadata__" in header), content[8 + length :]


# ------------------------------------------------------------------------------------ logits


def transformers_model(model: Model) -> Any:
    """The model's architecture in transformers."""
    import transformers

    config = {k: v for k, v in model.config.items() if k not in ("torch_dtype", "architectures")}
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING], ids=["plain", "llama3"])
@pytest.mark.parametrize("mp", [1, 3, 12])
def test_logits_of_meta_shards_are_those_of_transformers(
    scaling: dict[str, Any] | None, mp: int, tmp_path: Path
) -> None:
    overrides = {"head_dim": 12, "hidden_size": 144, "vocab_size": 216, "intermediate_size": 228}
    model = model_a(dtype=torch.float32, rope_scaling=scaling, **overrides)
    model = with_normal_values(model)
    meta.write(model, tmp_path, mp, strided=True)
    tokens = torch.arange(2 * 50).reshape(2, 50) * 7 % 216
    peer = transformers_model(model).eval()
    peer.load_state_dict(model.tensors, strict=True)
    with torch.no_grad():
        expected = peer(tokens).logits
    found = forward.logits(tmp_path, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_logits_notice_rows_in_the_wrong_order(tmp_path: Path) -> None:
    model = with_normal_values(model_a(dtype=torch.float32))
    name = "model.layers.0.self_attn.k_proj.weight"
    wrong = Model(model.config, model.tensors | {name: interleave(model.tensors[name], 6)})
    tokens = torch.arange(20).reshape(1, 20)
    meta.write(model, tmp_path / "right", 2)
    meta.write(wrong, tmp_path / "wrong", 2)
    right = forward.logits(tmp_path / "right", tokens)
    assert (forward.logits(tmp_path / "wrong", tokens) - right).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("meta_mp2", 8.0),
        ("meta_mp4_llama31_fp32", 8.0),
        ("meta_mp4_llama2", 8.0),
        ("meta_mp1_tied", 32.0),
    ],
)
def test_logits_of_upstream_checkpoints(name: str, factor: float, fixtures_root: Path) -> None:
    import transformers

    folder = fixtures_root / name
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "reference", dtype=torch.float32
    )
    tokens = torch.arange(40).reshape(1, 40) * 5 % 240
    with torch.no_grad():
        expected = peer(tokens).logits
    found = forward.logits(folder / "checkpoint", tokens, rope_factor=factor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ ranks


def exchange(offset: int) -> tuple[int, str, str]:
    """The sum over all ranks of rank + offset."""
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return int(total), os.environ["LOCAL_RANK"], os.environ["RESHARD_ORACLE"]


def fail(rank: int, how: str) -> None:
    """One rank raises, dies, exits or hangs while the others wait for it."""
    if dist.get_rank() == rank:
        if how == "raise":
            raise ValueError("the third brick is loose")
        if how == "hang":
            time.sleep(600)
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_ranks_form_a_group_and_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESHARD_ORACLE", "seen")
    for world, offset in itertools.product((1, 3), (0, 5)):
        total = sum(range(world)) + world * offset
        assert run_ranks(world, exchange, offset) == [(total, str(r), "seen") for r in range(world)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"(?s)^rank 1: Traceback.*ValueError: the third brick is loose"),
        ("kill", r"(?m)^rank 1: said nothing and was killed by SIGKILL"),
        ("exit", r"(?m)^rank 1: said nothing and exited with 3"),
    ],
)
def test_a_rank_that_fails_fails_the_test(how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(3, fail, 1, how)


def test_a_rank_that_hangs_is_killed_at_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0: still running at the timeout"):
        run_ranks(2, fail, 0, "hang", timeout=2)
    assert time.monotonic() - start < 6


def test_starting_ranks_is_cheap_after_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESHARD_ORACLE", "seen")
    run_ranks(1, exchange, 0)
    start = time.monotonic()
    run_ranks(4, exchange, 0)
    assert time.monotonic() - start < 3  # 0.3 s where nothing else runs
