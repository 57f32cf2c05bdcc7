"""Qwen2 with its biases, and Mistral: every way that a format offers them, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from reshard import families
from reshard.families.carried import CarriedConfig
from tests.commands import done, move, refused
from tests.oracles import dcp, hf, meta, nanotron, titan
from tests.oracles.compare import assert_same, assert_same_config, assert_same_tensor, files_in
from tests.oracles.models import Model, model_a, model_b, model_c, with_normal_values
from tests.settings import Job, must_convert, read_fsdp

QWEN2 = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_dropout": 0.0,
    "max_window_layers": 3,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 8}
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 111
Builder = Callable[..., Model]


def qwen2(build: Builder = model_a, tied: bool = False, **overrides: Any) -> Model:
    """A tiny model whose biases are all there."""
    model = build(tied=tied, **(QWEN2 | overrides))
    biases = [name for name in model.tensors if name.endswith(".bias")]
    assert len(biases) == 3 * model.config["num_hidden_layers"]
    return model


def read_config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def as_transformers_has_it(path: Path) -> dict[str, Any]:
    """Every field of the config that transformers makes of a directory."""
    import transformers

    found: dict[str, Any] = transformers.AutoConfig.from_pretrained(path).to_dict()
    return {key: value for key, value in found.items() if key != "_name_or_path"}


# There and back.

# The last column: whether Nanotron holds rotary rows interleaved.
WAYS = [
    (model_a, False, 1, 1, False),
    (model_a, False, 2, 2, True),
    (model_a, True, 3, 2, False),
    (model_b, False, 3, 5, True),
    (model_b, True, 1, 3, True),
    (model_c, True, 2, 1, True),
    (model_c, False, 3, 3, False),
]


@pytest.mark.parametrize(("build", "tied", "tp", "pp", "interleaved"), WAYS)
def test_nanotron_holds_a_qwen2_as_it_does_itself(
    build: Builder, tied: bool, tp: int, pp: int, interleaved: bool, tmp_path: Path
) -> None:
    model, name = qwen2(build, tied), f"tp{tp}pp{pp}"
    rope = {"rope_interleaved": interleaved}
    hf.write(model, tmp_path / "hf")
    nanotron.write(model, tmp_path / "theirs", tp, pp, **rope)
    asked = f"dst.rope_interleaved={str(interleaved).lower()}"
    done(*move("hf", tmp_path / "hf", name, tmp_path / "ours", asked))
    assert_same(nanotron.read(tmp_path / "ours"), model)
    weights = {file for file in files_in(tmp_path / "theirs") if file.startswith("model/")}
    assert weights == {file for file in files_in(tmp_path / "ours") if file.startswith("model/")}
    assert len([file for file in weights if "model_bias_" in file]) == (
        tp * model.config["num_hidden_layers"]
    )
    for file in weights:
        with (
            safe_open(tmp_path / "ours" / file, "pt") as one,
            safe_open(tmp_path / "theirs" / file, "pt") as other,
        ):
            assert (one.metadata() or {}) == (other.metadata() or {}), file
            assert_same_tensor(file, one.get_tensor("data"), other.get_tensor("data"))
    config = json.loads((tmp_path / "ours" / "model_config.json").read_text())
    assert config == nanotron.to_model_config(model.config, interleaved)
    for source in ("ours", "theirs"):
        done(*move(name, tmp_path / source, "hf", tmp_path / f"{source}-back"))
        found = hf.read(tmp_path / f"{source}-back")
        assert_same(found, model)
        assert_same_config(found, model)


def test_a_header_that_names_other_rows_of_a_bias_is_refused(tmp_path: Path) -> None:
    nanotron.write(qwen2(), tmp_path / "tp2", 2, 1, numpy2_shapes=True)
    done(*move("tp2", tmp_path / "tp2", "hf", tmp_path / "hf"))
    folder = tmp_path / "tp2" / "model/model/decoder/1/pp_block/attn/qkv_proj"
    first, second = sorted(folder.glob("model_bias_*"))
    second.write_bytes(first.read_bytes())
    pattern = r"model_bias_.*its header says local_global_slices_pairs"
    refused(tmp_path, pattern, *move("tp2", tmp_path / "tp2", "hf", tmp_path / "again"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tour_on_several_ranks_ends_where_it_began(tied: bool, tmp_path: Path) -> None:
    model = qwen2(tied=tied)
    hf.write(model, tmp_path / "hf", files=3)
    tour = [("hf", "tp3pp2", ("dst.rope_interleaved=true",)), ("tp3pp2", "fsdp2", ())]
    tour += [("fsdp2", "back", ("dst.max_shard_size=60KB",)), ("fsdp2", "tp2", ())]
    jobs = [
        Job(tmp_path / start, tmp_path / end, "hf" if end == "back" else end, given, "least")
        for start, end, given in tour
    ]
    must_convert(3, jobs)
    for found in (
        nanotron.read(tmp_path / "tp3pp2"),
        read_fsdp(tmp_path / "fsdp2"),
        nanotron.read(tmp_path / "tp2"),
        hf.read(tmp_path / "back"),
    ):
        assert_same(found, model)
    assert_same_config(hf.read(tmp_path / "back"), model)
    assert as_transformers_has_it(tmp_path / "back") == as_transformers_has_it(tmp_path / "hf")


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("overrides", [QWEN2, QWEN2 | {"head_dim": 8}, MISTRAL])
def test_config_json_says_what_it_said(
    overrides: dict[str, Any], spelling: int, tmp_path: Path
) -> None:
    model = model_a(pad_token_id=7, eos_token_id=[2, 5], **overrides)
    hf.write(model, tmp_path / "hf", spelling=spelling)
    done(*move("hf", tmp_path / "hf", "fsdp2", tmp_path / "fsdp"))
    done(*move("fsdp2", tmp_path / "fsdp", "hf", tmp_path / "back"))
    assert_same(hf.read(tmp_path / "back"), model)
    assert as_transformers_has_it(tmp_path / "back") == as_transformers_has_it(tmp_path / "hf")
    assert read_config(tmp_path / "back")["sliding_window"] == overrides["sliding_window"]


def logits(path: Path) -> Tensor:
    """By transformers, in float32."""
    import transformers

    with torch.no_grad():
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(said.values()), said
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("overrides", [QWEN2, MISTRAL], ids=["qwen2", "mistral"])
def test_transformers_computes_the_same(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = with_normal_values(model_a(dtype=torch.float32, **overrides))
    hf.write(model, tmp_path / "hf")
    between = "tp3pp2" if overrides is QWEN2 else "fsdp3"
    done(*move("hf", tmp_path / "hf", between, tmp_path / "between"))
    done(*move(between, tmp_path / "between", "hf", tmp_path / "back"))
    expected = logits(tmp_path / "hf")
    assert expected.std() > 0.1
    assert torch.equal(logits(tmp_path / "back"), expected)
    if overrides is QWEN2:  # the biases count
        tensors = {n: t * 0 if n.endswith(".bias") else t for n, t in model.tensors.items()}
        hf.write(replace(model, tensors=tensors), tmp_path / "without")
        assert not torch.allclose(logits(tmp_path / "without"), expected, atol=1e-3)


# Configs.


def test_a_nanotron_model_without_a_manifest_is_a_qwen2_where_it_has_biases(tmp_path: Path) -> None:
    model = qwen2(max_position_embeddings=8192)
    nanotron.write(model, tmp_path / "tp2", 2, 1)
    done(*move("tp2", tmp_path / "tp2", "hf", tmp_path / "hf"))
    assert read_config(tmp_path / "hf")["architectures"] == ["Qwen2ForCausalLM"]
    plain = model_a()
    nanotron.write(plain, tmp_path / "plain", 2, 1)
    file = tmp_path / "plain" / "model_config.json"
    config = json.loads(file.read_text())
    del config["is_llama_config"]
    file.write_text(json.dumps({**config, **nanotron.QWEN2_KEYS, "attention_bias": False}))
    done(*move("tp2", tmp_path / "plain", "hf", tmp_path / "llama"))
    found = hf.read(tmp_path / "llama")
    assert_same(found, plain)
    assert_same_config(found, plain)


def test_what_a_qwen2_config_leaves_out_is_not_a_llamas() -> None:
    record = {key: value for key, value in qwen2().config.items() if not key.endswith("_token_id")}
    del record["max_position_embeddings"]
    found = families.from_hf(record, "config.json")
    assert (found.bos, found.eos, found.max_positions) == (None, None, 32768)
    assert families.from_hf({**record, "model_type": "llama"}, "config.json").eos == 2


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3", "qwen2_vl", "mistral3"])
def test_relatives_are_carried(kind: str) -> None:
    found = families.read_config({**qwen2().config, "model_type": kind}, "config.json")
    assert isinstance(found, CarriedConfig)


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "llama"])
def test_a_classifier_is_carried_by_name(kind: str, tmp_path: Path) -> None:
    model = model_b(model_type=kind)
    tensors = {n: t for n, t in model.tensors.items() if n != "lm_head.weight"}
    tensors["score.weight"] = torch.ones(2, 36, dtype=torch.bfloat16)
    hf.write(replace(model, tensors=tensors), tmp_path / "hf")
    config = read_config(tmp_path / "hf") | {"architectures": ["RankerForSequenceClassification"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    done(*move("hf", tmp_path / "hf", "fsdp2", tmp_path / "fsdp"))
    found = dcp.read_fsdp(tmp_path / "fsdp")
    assert_same_tensor("score", found["score.weight"], tensors["score.weight"])
    pattern = r"nanotron: needs to know .* RankerForSequenceClassification is not known"
    refused(tmp_path, pattern, *move("hf", tmp_path / "hf", "tp1", tmp_path / "tp1"))


# What is refused.


@pytest.mark.parametrize(
    ("target", "overrides", "pattern"),
    [
        ("meta2", QWEN2, r"meta: holds llama, but this is qwen2; formats that hold it: .*hf, nano"),
        ("titan2", QWEN2, r"titan: holds llama, but this is qwen2"),
        ("meta2", MISTRAL, r"meta: holds llama, but this is mistral; .*: fsdp, .*hf"),
        ("tp2", MISTRAL, r"nanotron: holds llama and qwen2, but this is mistral"),
        ("tp2", QWEN2 | {"head_dim": 8}, r"12 heads of 8 are not the hidden size 72"),
        ("tp4", QWEN2, r"tp must divide 12 heads, 6 key-value heads"),
        ("tp2", {"attention_bias": True}, r"attention_bias=true, and .* holds no biases"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_at_plan_time(
    target: str, overrides: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    hf.write(model_a(**overrides), tmp_path / "hf")
    line = refused(tmp_path, pattern, *move("hf", tmp_path / "hf", target, tmp_path / "x"))
    assert "statedict" not in line
    config = tmp_path / "hf" / "config.json"
    refused(tmp_path, pattern, "plan", "--src", "hf", "--dst", target, f"src.model={config}")


def test_an_imagined_source_is_of_a_family_that_its_format_holds(tmp_path: Path) -> None:
    hf.write(qwen2(), tmp_path / "hf")
    named = f"src.model={tmp_path / 'hf' / 'config.json'}"
    refused(tmp_path, r"meta: holds llama", "plan", "--src", "meta2", "--dst", "hf", named)
    assert "qwen2" in done("plan", "--src", "tp2", "--dst", "fsdp3", named).out


@pytest.mark.parametrize("given", ["src.model={}/hf/config.json", "src.assets={}/hf"])
@pytest.mark.parametrize("kind", ["meta2", "titan", "tp2"])
def test_a_config_of_another_family_is_refused(kind: str, given: str, tmp_path: Path) -> None:
    """The files are a Llama's, of the same sizes."""
    write: dict[str, Callable[[Model, Path], object]] = {
        "meta2": partial(meta.write, mp=2),
        "titan": partial(titan.write_titan, shards=2, step=3),
        "tp2": partial(nanotron.write, tp=2, pp=1),
    }
    hf.write(qwen2(), tmp_path / "hf")
    write[kind](model_a(), tmp_path / "source")
    words = move("dcp" if kind == "titan" else kind, tmp_path / "source", "hf", tmp_path / "x")
    refused(tmp_path, r"qwen2", *words, given.format(tmp_path))


def test_a_llamas_config_does_not_describe_biases(tmp_path: Path) -> None:
    nanotron.write(qwen2(), tmp_path / "tp2", 2, 1)
    hf.write(model_a(), tmp_path / "hf")
    pattern = r"src.assets is of a llama model, but the files are of qwen2"
    words = move("tp2", tmp_path / "tp2", "hf", tmp_path / "x", f"src.assets={tmp_path / 'hf'}")
    refused(tmp_path, pattern, *words)


def test_experts_are_refused(tmp_path: Path) -> None:
    nanotron.write(qwen2(), tmp_path / "tp2", 2, 1)
    file = tmp_path / "tp2" / "model_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"moe_config": {"num_experts": 8}}))
    pattern = r"a Qwen2 model with experts, which is not supported"
    refused(tmp_path, pattern, *move("tp2", tmp_path / "tp2", "hf", tmp_path / "x"))


def test_a_window_that_nanotron_does_not_have_is_named(tmp_path: Path) -> None:
    hf.write(qwen2(use_sliding_window=True), tmp_path / "hf")
    said = done(*move("hf", tmp_path / "hf", "tp2", tmp_path / "tp2")).out
    assert "use_sliding_window is left out" in said
    done(*move("tp2", tmp_path / "tp2", "hf", tmp_path / "back"))
    assert read_config(tmp_path / "back")["use_sliding_window"] is True  # by our manifest
