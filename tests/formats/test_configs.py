"""config.json, params.json and the texts of Nanotron against published rules and examples."""

import importlib.util
import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard import families
from reshard.errors import ConfigError, ReshardError
from reshard.families.model import ModelConfig, from_hf, from_json, to_hf
from reshard.formats import meta_params
from reshard.formats.nanotron import assign_stages
from tests.layouts import config_of, layout_of, oracle
from tests.oracles import nanotron as nanotron_oracle
from tests.oracles.hf import spelled_as_5
from tests.oracles.models import LLAMA3_SCALING


def sized(hidden: int, intermediate: int, layers: int = 1, vocab: int = 32000) -> ModelConfig:
    heads = next(n for n in (32, 8, 2, 1) if hidden % n == 0)
    return ModelConfig("llama", hidden, layers, heads, heads, hidden // heads, intermediate, vocab)


# Meta.


def published_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The lines of llama/model.py."""
    hidden_dim = 4 * dim
    hidden_dim = int(2 * hidden_dim / 3)
    if multiplier is not None:
        hidden_dim = int(multiplier * hidden_dim)
    return multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)


RELEASED = [
    (4096, 11008),
    (5120, 13824),
    (6656, 17920),
    (8192, 22016),
    (8192, 28672),
    (4096, 14336),
    (16384, 53248),
    (2048, 8192),
    (3072, 8192),
]


def check_width(dim: int, width: int) -> None:
    params = json.loads(json.dumps(meta_params.write(sized(dim, width), 1)))
    multiple_of = params["multiple_of"]
    assert isinstance(multiple_of, int)
    assert multiple_of >= 1
    assert published_width(dim, multiple_of, params.get("ffn_dim_multiplier")) == width


@pytest.mark.parametrize(("dim", "width"), RELEASED)
def test_meta_code_computes_the_width_of_every_release(dim, width):
    check_width(dim, width)


@pytest.mark.parametrize(("dim", "width"), RELEASED[:4])
def test_widths_without_a_multiplier_need_none(dim, width):
    params = meta_params.write(sized(dim, width), 1)
    assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == (256, None)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 60_000))
def test_meta_code_computes_any_width(dim, width):
    check_width(dim, width)


@pytest.mark.parametrize(("dim", "width"), [(72, 222), (36, 111), (72, 72), (1, 1), (2, 99_991)])
def test_meta_code_computes_odd_widths(dim, width):
    check_width(dim, width)


@pytest.mark.parametrize(("mp", "expected"), [(1, 6), (6, 6), (12, 12)])
def test_params_count_copied_heads(mp, expected):
    params = meta_params.write(config_of("a"), mp)
    assert (params["n_heads"], params["n_kv_heads"]) == (12, expected)
    assert "use_scaled_rope" not in params
    scaled = config_of("a", rope_scaling=tuple(LLAMA3_SCALING.items()))
    model = from_json({**scaled.to_json(), "rope_scaling": LLAMA3_SCALING})
    assert meta_params.write(model, mp)["use_scaled_rope"] is True


# Nanotron's stages: the table of the format's notes.


def layers_per_stage(model: ModelConfig, pp: int) -> list[int]:
    stages = assign_stages(model, pp)
    return [
        sum(stages[str(layer)] == stage for layer in range(model.layers)) for stage in range(pp)
    ]


@pytest.mark.parametrize(
    ("layers", "pp", "hidden", "ffn", "vocab", "expected"),
    [
        (4, 2, 64, 176, 128, [3, 1]),
        (4, 2, 512, 1024, 4096, [3, 1]),
        (4, 2, 2048, 8192, 128256, [4, 0]),
        (4, 4, 64, 176, 128, [2, 1, 1, 0]),
        (16, 2, 2048, 8192, 128256, [10, 6]),
        (16, 2, 2048, 8192, 32000, [9, 7]),
        (16, 2, 2048, 8192, 49152, [9, 7]),
        (32, 4, 4096, 11008, 32000, [9, 8, 8, 7]),
        (32, 4, 4096, 14336, 32000, [9, 8, 8, 7]),
        (32, 4, 4096, 14336, 128256, [9, 9, 8, 6]),
        (32, 2, 4096, 11008, 32000, [17, 15]),
        (32, 2, 4096, 14336, 128256, [18, 14]),
        (80, 4, 8192, 28672, 128256, [21, 20, 20, 19]),
    ],
)
def test_stages_are_those_of_the_table(layers, pp, hidden, ffn, vocab, expected):
    model = sized(hidden, ffn, layers, vocab)
    assert layers_per_stage(model, pp) == expected
    stages = assign_stages(model, pp)
    assert stages["embedding"] == 0
    assert stages["norm"] == stages["output"] == pp - 1


def test_more_stages_than_work_leave_the_last_without_a_parameter():
    stages = assign_stages(sized(16, 64, 2, 256), 4)
    assert stages == {"embedding": 0, "0": 0, "1": 1, "norm": 2, "output": 2}


@pytest.mark.parametrize(
    ("vocab", "expected"), [(4 * 448 - 1, [4, 0, 1]), (4 * 448, [4, 0, 0]), (2 * 448, [4, 0, 1])]
)
def test_a_heavy_output_pulls_the_layers_to_the_first_stage(vocab, expected):
    """With r = V / (4h + 3F) from 2 on, all four layers; from 4 on, norm and output as well."""
    model = sized(64, 64, 4, vocab)
    assert [*layers_per_stage(model, 2), assign_stages(model, 2)["output"]] == expected


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 99), st.integers(1, 99), st.data())
def test_stages_are_those_of_nanotron_s_walk(layers, pp, hidden, ffn, data):
    vocab = data.draw(st.integers(1, 60_000))
    config = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    walked = nanotron_oracle.stage_of_blocks(config | {"vocab_size": vocab}, pp)
    names = {"token_position_embeddings": "embedding", "final_layer_norm": "norm"}
    names |= {"lm_head": "output"} | {f"decoder.{layer}": str(layer) for layer in range(layers)}
    expected = {ours: walked[theirs] for theirs, ours in names.items()}
    assert assign_stages(sized(hidden, ffn, layers, vocab), pp) == expected


# Nanotron's metadata: the examples of the format's notes.

EXAMPLE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
EXAMPLE |= {"intermediate_size": 176, "vocab_size": 128, "num_hidden_layers": 4}
N = "None,None,None"


@pytest.mark.parametrize(
    ("module", "slices", "shape"),
    [
        ("decoder/0/pp_block/attn/o_proj", f"{N}|{N}#{N}|32,64,None", "(64, 64)"),
        ("decoder/0/pp_block/mlp/down_proj", f"{N}|{N}#{N}|88,176,None", "(64, 176)"),
        ("lm_head/pp_block", f"{N}|{N}#64,128,None|{N}", "(128, 64)"),
        (
            "token_position_embeddings/pp_block/token_embedding",
            f"{N}|{N}#64,128,None|{N}",
            "(128, 64)",
        ),
        (
            "decoder/3/pp_block/attn/qkv_proj",
            f"0,32,None|{N}#32,64,None|{N};32,48,None|{N}#80,96,None|{N};"
            f"48,64,None|{N}#112,128,None|{N}",
            "(128, 64)",
        ),
        (
            "decoder/0/pp_block/mlp/gate_up_proj",
            f"0,88,None|{N}#88,176,None|{N};88,176,None|{N}#264,352,None|{N}",
            "(352, 64)",
        ),
    ],
)
def test_headers_are_those_of_the_examples(module, slices, shape):
    layout = layout_of(config_of("a", **EXAMPLE), "nanotron", tp=2, pp=2)
    (file,) = [f for f in layout.files if f"/{module}/" in f and "tp-rank-1-of-2" in f]
    assert dict(layout.header(file)) == {
        "version": "1.5",
        "local_global_slices_pairs": slices,
        "unsharded_shape": shape,
    }


def test_a_single_rank_has_the_same_structure_and_norms_have_no_header():
    layout = layout_of(config_of("a", **EXAMPLE), "nanotron", tp=1, pp=1)
    header = {file.split("pp_block/")[1].split("/model_w")[0]: file for file in layout.files}
    qkv = layout.header(header["attn/qkv_proj"])["local_global_slices_pairs"]
    assert qkv == ";".join(
        f"{a},{b},None|{N}#{a},{b},None|{N}" for a, b in ((0, 64), (64, 96), (96, 128))
    )
    o_proj = layout.header(header["attn/o_proj"])["local_global_slices_pairs"]
    assert o_proj.endswith("#None,None,None|0,64,None")
    assert layout.header(header["input_layernorm"]) == {}


def test_file_names_and_their_number_are_those_of_the_examples():
    layout = layout_of(config_of("a", **EXAMPLE), "nanotron", tp=2, pp=2)
    assert len(layout.files) == 45
    start, end = "model/model/", ".safetensors"
    examples = [
        "token_position_embeddings/pp_block/token_embedding/model_weight_pp-rank-0-of-2_tp-rank-1-of-2",
        "decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-2_tp-rank-0-of-2",
        "decoder/3/pp_block/mlp/down_proj/model_weight_pp-rank-1-of-2_tp-rank-1-of-2",
        "decoder/3/pp_block/input_layernorm/model_weight",
        "final_layer_norm/pp_block/model_weight",
        "lm_head/pp_block/model_weight_pp-rank-1-of-2_tp-rank-0-of-2",
    ]
    assert {start + name + end for name in examples} <= set(layout.files)
    tied = layout_of(config_of("a", tied=True, **EXAMPLE), "nanotron", tp=2, pp=2)
    assert len(tied.files) == 2 * 17 + 9
    assert not [file for file in tied.files if "lm_head" in file]


# Hugging Face.


@pytest.mark.parametrize("limit", [1, 5_000, 20_000, 50_000, 10**9])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_files_are_filled_in_order_up_to_the_limit(name, limit):
    model = config_of(name)
    layout = layout_of(model, "hf", max_shard_bytes=limit)
    names = [parameter.name for parameter in families.parameters(model)]
    filled = [[content.key for content in layout.contents(file)] for file in layout.files]
    assert [key for group in filled for key in group] == names
    sizes = [[content.nbytes for content in layout.contents(file)] for file in layout.files]
    assert all(sum(group) <= limit or len(group) == 1 for group in sizes)
    for group, follower in itertools.pairwise(sizes):
        assert sum(group) + follower[0] > limit, "one more would have fitted"
    count = len(layout.files)
    expected = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert list(layout.files) == (["model.safetensors"] if count == 1 else expected)


CONFIGS = [
    ("plain", {}),
    ("theta", {"rope_theta": 10000.0, "rms_norm_eps": 1e-6}),
    ("scaled", {"rope_scaling": LLAMA3_SCALING}),
    ("linear", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("head", {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    ("tokens", {"eos_token_id": [2, 7], "bos_token_id": None, "pad_token_id": 3}),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("label", "changes"), CONFIGS, ids=[label for label, _ in CONFIGS])
def test_both_spellings_of_config_json_mean_the_same_and_come_back(label, changes, tied):
    config = oracle("a", tied=tied).config | changes
    model = from_hf(config, "config.json")
    assert from_hf(spelled_as_5(config), "config.json") == model
    expected = {key: value for key, value in config.items() if key != "architectures"}
    assert to_hf(model) == expected
    assert from_hf(to_hf(model), "again") == model
    assert from_json(json.loads(json.dumps(model.to_json()))) == model


def test_what_a_config_leaves_out_is_what_transformers_takes():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": 100}
    theirs = LlamaConfig(**sizes).to_dict()
    model = from_hf({"model_type": "llama", **sizes}, "config.json")
    ours = to_hf(model)
    keys = ["rms_norm_eps", "num_key_value_heads", "head_dim", "max_position_embeddings"]
    keys += ["bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_bias", "mlp_bias"]
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "`config.json`: `hidden_size` is missing"),
        ({"model_type": None}, "`model_type` is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 are no sizes"),
        ({"hidden_size": "64"}, "hidden_size '64'"),
        ({"num_hidden_layers": True}, "`layers` is True, expected a positive int"),
        ({"vocab_size": 1.5}, "`vocab` is 1.5"),
        ({"num_key_value_heads": 5}, "5 key-value heads do not divide 12 attention heads"),
        ({"num_key_value_heads": -3}, "`kv_heads` is -3"),
        ({"torch_dtype": "int5"}, "int5"),
        ({"torch_dtype": 7}, "7"),
        ({"torch_dtype": "nn"}, "nn"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    config = oracle("a").config | changes
    with pytest.raises(ReshardError, match=re.escape(message)):
        families.parameters(from_hf(config, "config.json"))


def test_unknown_fields_and_families_are_refused():
    with pytest.raises(ConfigError, match="unknown field `depth`"):
        from_json({**config_of("a").to_json(), "depth": 1})
    record = config_of("a").to_json()
    del record["hidden"]
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'hidden'"):
        from_json(record)
    with pytest.raises(ConfigError, match="model type `gpt9` is not known; use one of llama"):
        families.parameters(from_hf(oracle("a").config | {"model_type": "gpt9"}, "x"))


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_family_has_the_tensors_that_transformers_has(name, tied):
    expected = {key: tuple(t.shape) for key, t in oracle(name, tied=tied).tensors.items()}
    found = families.parameters(config_of(name, tied=tied))
    assert {parameter.name: parameter.shape for parameter in found} == expected
    assert [parameter.name for parameter in found] == list(expected)
    assert {parameter.dtype for parameter in found} == {torch.bfloat16}
