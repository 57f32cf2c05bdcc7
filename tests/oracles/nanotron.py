"""Nanotron step directories: one file per parameter and tensor-parallel rank.

`read` does what Nanotron's resharding loader does for tp = 1, and what it leaves out: it counts
that every element is covered once, and that each file is what Nanotron's fast path expects.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.compare import assert_same_tensor
from tests.oracles.models import Model, checked, has_bias, hashed
from tests.oracles.rope import deinterleave, interleave

VERSION = "1.5"
SHARED_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
# What a Qwen2Config has beyond a LlamaConfig, with its defaults.
QWEN2_KEYS = {
    "is_qwen2_config": True,
    "moe_config": None,
    "no_rope_layer": None,
    "flex_attention_mask": None,
    "log_attn_probs": True,
    "ring_attn_heads_k_stride": None,
    "rope_seq_len_interpolation_factor": None,
    "sliding_window_size": None,
    "_fused_rms_norm": True,
    "_fused_rotary_emb": True,
    "_use_doc_masking": False,
    "_use_qkv_packed": True,
}
LLAMA_KEYS = {
    *SHARED_KEYS,
    "attention_bias",
    "is_llama_config",
    "pad_token_id",
    "pretraining_tp",
    "rope_interleaved",
    "z_loss_coefficient",
    "z_loss_enabled",
    "_attn_implementation",
}
FILE = re.compile(r"model_(weight|bias)_pp-rank-(\d+)-of-(\d+)_tp-rank-(\d+)-of-(\d+)\.safetensors")
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Parameter:
    """A Nanotron parameter: the Hugging Face tensors fused on dim 0, and the dim that is split."""

    name: str
    block: str
    sources: tuple[str, ...]
    dim: int | None

    @property
    def folder(self) -> str:
        """Its directory below the step directory."""
        return "model/" + "/".join(self.name.split(".")[:-1])

    @property
    def leaf(self) -> str:
        """`weight` or `bias`."""
        return self.name.split(".")[-1]

    def file(self, stage: int, pp: int, rank: int, tp: int) -> str:
        """The path of one rank's file below the step directory."""
        ranks = f"_pp-rank-{stage}-of-{pp}_tp-rank-{rank}-of-{tp}"
        return f"{self.folder}/model_{self.leaf}{'' if self.dim is None else ranks}.safetensors"


def parameters(config: dict[str, Any]) -> list[Parameter]:
    """All parameters of a model; where the embeddings are tied there is no `lm_head`."""
    embedding = "token_position_embeddings"
    found = [
        Parameter(
            f"model.{embedding}.pp_block.token_embedding.weight",
            embedding,
            ("model.embed_tokens.weight",),
            0,
        )
    ]
    for layer in range(config["num_hidden_layers"]):
        found += layer_parameters(config, layer)
    norm = "final_layer_norm"
    found.append(Parameter(f"model.{norm}.pp_block.weight", norm, ("model.norm.weight",), None))
    if not config["tie_word_embeddings"]:
        found.append(Parameter("model.lm_head.pp_block.weight", "lm_head", ("lm_head.weight",), 0))
    return found


def layer_parameters(config: dict[str, Any], layer: int) -> list[Parameter]:
    """The parameters of one decoder layer."""
    qkv = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
    rows: list[tuple[str, tuple[str, ...], int | None]] = [
        ("input_layernorm.weight", ("input_layernorm.weight",), None),
        ("attn.qkv_proj.weight", tuple(name + "weight" for name in qkv), 0),
        ("attn.o_proj.weight", ("self_attn.o_proj.weight",), 1),
        ("post_attention_layernorm.weight", ("post_attention_layernorm.weight",), None),
        ("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0),
        ("mlp.down_proj.weight", ("mlp.down_proj.weight",), 1),
    ]
    if has_bias(config, "self_attn.q_proj"):
        rows.insert(2, ("attn.qkv_proj.bias", tuple(name + "bias" for name in qkv), 0))
    block = f"decoder.{layer}"
    return [
        Parameter(
            f"model.{block}.pp_block.{name}",
            block,
            tuple(f"model.layers.{layer}.{source}" for source in sources),
            dim,
        )
        for name, sources, dim in rows
    ]


def stages(config: dict[str, Any], pp: int) -> list[list[str]]:
    """The blocks of each pipeline stage: Nanotron's walk over the blocks' costs."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    layers = config["num_hidden_layers"]
    decoders = [f"decoder.{layer}" for layer in range(layers)]
    blocks = ["token_position_embeddings", *decoders]
    blocks += ["final_layer_norm", "lm_head", "cast_to_fp32", "loss"]
    costs = dict.fromkeys(blocks, 0)
    costs |= dict.fromkeys(decoders, 4 * hidden * hidden + 3 * ffn * hidden)
    costs["lm_head"] = config["vocab_size"] * hidden
    cumulative = list(itertools.accumulate(costs.values()))
    thresholds = [cumulative[-1] * (stage + 1) / pp for stage in range(pp)]
    found: list[list[str]] = [[] for _ in range(pp)]
    stage = 0
    for block, cost in zip(blocks, cumulative, strict=True):
        found[stage].append(block)
        if cost > thresholds[stage]:
            stage += 1
    return found


def expected_files(config: dict[str, Any], tp: int, pp: int) -> set[str]:
    """The paths of all weight files that Nanotron writes; `vocab_size` is the padded one."""
    where = stage_of_blocks(config, pp)
    return {
        parameter.file(where[parameter.block], pp, rank, tp)
        for parameter in parameters(config)
        for rank in range(tp)
    }


def stage_of_blocks(config: dict[str, Any], pp: int) -> dict[str, int]:
    """Block -> stage."""
    return {b: stage for stage, blocks in enumerate(stages(config, pp)) for b in blocks}


def write(
    model: Model,
    path: Path,
    tp: int,
    pp: int,
    *,
    rope_interleaved: bool = False,
    vocab_multiple: int | None = None,
    numpy2_shapes: bool = False,
) -> None:
    """Write the step directory `path`, and latest.txt beside it.

    vocab_multiple: `make_vocab_size_divisible_by`; without it the vocabulary is not padded.
    numpy2_shapes: fused shapes in the metadata as numpy 2 prints them.
    """
    path = Path(path)
    _check_representable(model.config, tp)
    if vocab_multiple is not None:
        model = padded(model, vocab_multiple * tp)
    tensors = _rows_in_order(model.tensors, model.config, interleave if rope_interleaved else None)
    where = stage_of_blocks(model.config, pp)
    for parameter in parameters(model.config):
        parts = [tensors[name] for name in parameter.sources]
        for rank in range(tp if parameter.dim is not None else 1):
            file = path / parameter.file(where[parameter.block], pp, rank, tp)
            file.parent.mkdir(parents=True, exist_ok=True)
            metadata = _metadata(parts, parameter.dim, tp, rank, numpy2_shapes)
            save_file({"data": shard(parts, parameter.dim, tp, rank)}, file, metadata=metadata)
    _write_configs(model, path, tp, pp, rope_interleaved, vocab_multiple or 1)


def padded(model: Model, multiple: int) -> Model:
    """The model with embedding tables of a multiple of rows; the new rows are not zero."""
    rows = math.ceil(model.config["vocab_size"] / multiple) * multiple
    tensors = dict(model.tensors)
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        if name in tensors:
            table = tensors[name]
            shape = (rows - table.shape[0], table.shape[1])
            new = hashed(1000 + number, math.prod(shape), table.dtype).reshape(shape)
            tensors[name] = torch.cat([table, new])
    return replace(model, config=model.config | {"vocab_size": rows}, tensors=tensors)


def shard(parts: list[Tensor], dim: int | None, tp: int, rank: int) -> Tensor:
    """One rank's part: its chunk of every fused tensor, one below the other."""
    if dim is None:
        return parts[0].clone()
    assert all(part.shape[dim] % tp == 0 for part in parts), f"{parts[0].shape} over {tp} ranks"
    return torch.cat([part.chunk(tp, dim)[rank] for part in parts]).contiguous()


def read(path: Path, *, vocab_size: int | None = None) -> Model:
    """The model of a step directory; `vocab_size` cuts off the rows that padding added."""
    path = Path(path)
    stored = json.loads((path / "model_config.json").read_text())
    config = from_model_config(stored)
    tensors: dict[str, Tensor] = {}
    used: set[Path] = set()
    topologies: set[tuple[int, int]] = set()
    for parameter in parameters(config):
        files = sorted((path / parameter.folder).glob(f"model_{parameter.leaf}*.safetensors"))
        used |= set(files)
        parts = _fused_parts(config, parameter)
        whole = _replicated(files) if parameter.dim is None else _merged(files)
        pieces = whole.split(parts) if len(parts) > 1 else [whole]
        topologies |= _check_fast_path(parameter, files, list(pieces))
        tensors |= dict(zip(parameter.sources, pieces, strict=True))
    stray = {str(f) for f in (path / "model").rglob("*") if f.is_file() and f not in used}
    assert not stray, f"files that no parameter owns: {sorted(stray)}"
    _check_facts(path, topologies)
    tensors = _rows_in_order(tensors, config, deinterleave if stored["rope_interleaved"] else None)
    config["torch_dtype"] = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    return _cut(checked(config, tensors), vocab_size)


def topology(path: Path) -> tuple[int, int]:
    """(tp, pp) as the file names say."""
    matches = [FILE.fullmatch(file.name) for file in Path(path, "model").rglob("*.safetensors")]
    found = {(int(match[5]), int(match[3])) for match in matches if match}
    assert len(found) == 1, f"topologies (tp, pp) in {path}: {sorted(found)}"
    return found.pop()


def parse_slices(text: str) -> list[tuple[Slices, Slices]]:
    """(local, global) pairs of the metadata's `local_global_slices_pairs`."""
    one = r"(?:None|\d+),(?:None|\d+),(?:None|\d+)"
    dims = rf"{one}(?:\|{one})*"
    assert re.fullmatch(rf"{dims}#{dims}(?:;{dims}#{dims})*", text), f"slices {text!r}"
    pairs = [pair.split("#") for pair in text.split(";")]
    return [(_parse_dims(local), _parse_dims(whole)) for local, whole in pairs]


def parse_shape(text: str) -> tuple[int, ...]:
    """`unsharded_shape`, by Nanotron's own rules: it refuses what Nanotron refuses."""
    items = [item for item in text.strip("()").split(",") if item]
    return tuple(
        int(re.search(r"\((\d+)\)", item)[1]) if "np.int" in item else int(item)  # type: ignore[index]
        for item in items
    )


def from_model_config(stored: dict[str, Any]) -> dict[str, Any]:
    """The Hugging Face config of a model_config.json."""
    qwen = bool(stored.get("is_qwen2_config"))
    assert qwen or stored.get("is_llama_config") is True, "neither Llama nor Qwen2"
    biased = bool(stored["attention_bias"])
    assert qwen or not biased, "Nanotron's Llama has no bias"
    known = LLAMA_KEYS - {"is_llama_config"} | QWEN2_KEYS.keys() if qwen else LLAMA_KEYS
    assert set(stored) <= known, f"keys that its class refuses: {sorted(set(stored) - known)}"
    assert not stored.get("moe_config"), "experts"
    config = {key: stored[key] for key in SHARED_KEYS}
    heads = config["num_attention_heads"]
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    architecture = "Qwen2ForCausalLM" if qwen and biased else "LlamaForCausalLM"
    return config | {
        "model_type": "qwen2" if qwen and biased else "llama",
        "architectures": [architecture],
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config["hidden_size"] // heads,
    }


def to_model_config(config: dict[str, Any], rope_interleaved: bool) -> dict[str, Any]:
    """The model_config.json of a Hugging Face config."""
    qwen = config["model_type"] == "qwen2"
    return {
        **{key: config[key] for key in SHARED_KEYS},
        **(QWEN2_KEYS if qwen else {"is_llama_config": True}),
        "attention_bias": qwen,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rope_interleaved": rope_interleaved,
        "_attn_implementation": "flash_attention_2",
        "z_loss_enabled": False,
        "z_loss_coefficient": 0.0001,
    }


def _check_representable(config: dict[str, Any], tp: int) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads % tp == kv_heads % tp == 0, f"{heads} heads, {kv_heads} kv heads over {tp}"
    assert config["head_dim"] * heads == config["hidden_size"], "head_dim is not hidden / heads"
    biased = config["attention_bias"] or config["mlp_bias"]
    assert config["model_type"] == "qwen2" or not biased, "Nanotron's Llama has no bias"


def _rows_in_order(
    tensors: dict[str, Tensor], config: dict[str, Any], swap: Any
) -> dict[str, Tensor]:
    """All tensors, the rows of q and k passed through `swap` where it is given."""
    if swap is None:
        return tensors
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    module = {name: name.split(".")[-2] for name in tensors}
    return {n: swap(t, heads[module[n]]) if module[n] in heads else t for n, t in tensors.items()}


def _metadata(
    parts: list[Tensor], dim: int | None, tp: int, rank: int, numpy2: bool
) -> dict[str, str]:
    """The three entries of a sharded file; none for a replicated one."""
    if dim is None:
        return {}
    shape = list(parts[0].shape)
    shape[0] = sum(part.shape[0] for part in parts)
    text = str(tuple(shape))
    if numpy2 and len(parts) > 1:
        text = text.replace(str(shape[0]), f"np.int64({shape[0]})", 1)
    pairs = _fused_pairs(parts, tp, rank) if len(parts) > 1 else [_pair(parts[0], dim, tp, rank)]
    return {
        "version": VERSION,
        "local_global_slices_pairs": ";".join(pairs),
        "unsharded_shape": text,
    }


def _pair(part: Tensor, dim: int, tp: int, rank: int) -> str:
    size = part.shape[dim] // tp
    local = ["None,None,None"] * part.dim()
    whole = list(local)
    whole[dim] = f"{rank * size},{(rank + 1) * size},None"
    return "|".join(local) + "#" + "|".join(whole)


def _fused_pairs(parts: list[Tensor], tp: int, rank: int) -> list[str]:
    rest = "|None,None,None" * (parts[0].dim() - 1)
    pairs, start = [], 0
    for part in parts:
        size = part.shape[0] // tp
        local, whole = start // tp, start + rank * size
        pairs.append(f"{local},{local + size},None{rest}#{whole},{whole + size},None{rest}")
        start += part.shape[0]
    return pairs


def _write_configs(
    model: Model, path: Path, tp: int, pp: int, rope_interleaved: bool, vocab_multiple: int
) -> None:
    stored = to_model_config(model.config, rope_interleaved)
    (path / "model_config.json").write_text(json.dumps(stored))
    parallelism = {"dp": 1, "tp": tp, "pp": pp, "context_parallel_size": 1}
    dtype = str(model.config["torch_dtype"])
    settings = {"dtype": dtype, "make_vocab_size_divisible_by": vocab_multiple}
    training = {"model": {**settings, "model_config": stored}, "parallelism": parallelism}
    (path / "config.yaml").write_text(yaml.safe_dump(training))
    metas = {"consumed_train_samples": 0, "last_train_step": 0, "last_stage_idx": 0}
    facts = {"version": VERSION, "tp": tp, "dp": 1, "cp": 1, "custom_metas": None}
    facts["metas"] = {**metas, "consumed_tokens_total": 0, "data_stages": []}
    text = json.dumps(facts, indent=2, sort_keys=True)
    (path / "checkpoint_metadata.json").write_text(text)
    if path.name.isdecimal():
        (path.parent / "latest.txt").write_text(path.name)


def _fused_parts(config: dict[str, Any], parameter: Parameter) -> list[int]:
    """Rows of each fused tensor."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if ".qkv_proj." in parameter.name:
        return [count * config["head_dim"] for count in (heads, kv_heads, kv_heads)]
    if ".gate_up_proj." in parameter.name:
        return [config["intermediate_size"]] * 2
    return [0]


def _replicated(files: list[Path]) -> Tensor:
    assert len(files) == 1, f"a replicated parameter has files {files}"
    tensor, metadata = _open(files[0])
    assert not metadata, f"{files[0]}: metadata {metadata}"
    return tensor


def _merged(files: list[Path]) -> Tensor:
    """What Nanotron's resharding loader makes of one parameter's shards."""
    assert files, "a sharded parameter has no files"
    opened = [_open(file) for file in files]
    shapes = {metadata["unsharded_shape"] for _, metadata in opened if _check_keys(metadata)}
    assert len(shapes) == 1, f"{files[0].parent}: unsharded shapes {shapes}"
    whole = torch.empty(parse_shape(shapes.pop()), dtype=opened[0][0].dtype)
    covered = torch.zeros(whole.shape, dtype=torch.int32)
    for tensor, metadata in opened:
        assert tensor.dtype == whole.dtype, f"{files[0].parent}: dtypes differ"
        read_once = torch.zeros(tensor.shape, dtype=torch.int32)
        for local, place in parse_slices(metadata["local_global_slices_pairs"]):
            assert whole[place].shape == tensor[local].shape, f"{files[0].parent}: {local} {place}"
            whole[place] = tensor[local]
            covered[place] += 1
            read_once[local] += 1
        assert bool((read_once == 1).all()), f"{files[0].parent}: a file's rows are not read once"
    assert bool((covered == 1).all()), f"{files[0].parent}: elements are not covered once"
    return whole


def _check_keys(metadata: dict[str, str]) -> bool:
    keys = {"version", "local_global_slices_pairs", "unsharded_shape"}
    assert set(metadata) == keys, f"metadata keys {sorted(metadata)}"
    assert metadata["version"] == VERSION, f"version {metadata['version']}"
    return True


def _check_fast_path(
    parameter: Parameter, files: list[Path], parts: list[Tensor]
) -> set[tuple[int, int]]:
    """Each file holds what a rank of the same topology copies blindly; returns {(tp, pp)}."""
    if parameter.dim is None:
        assert files[0].name == f"model_{parameter.leaf}.safetensors", f"{files[0]}"
        return set()
    matches = [FILE.fullmatch(file.name) for file in files]
    assert all(matches), f"names {[file.name for file in files]}"
    labels = [tuple(map(int, match.groups()[1:])) for match in matches if match]
    tp = len(files)
    assert sorted(label[2:] for label in labels) == [(rank, tp) for rank in range(tp)], files
    assert len({label[:2] for label in labels}) == 1, f"several pipeline ranks: {files}"
    assert labels[0][0] < labels[0][1], f"pipeline rank out of range: {files}"
    for file, label in zip(files, labels, strict=True):
        expected = shard(parts, parameter.dim, tp, label[2])
        assert_same_tensor(f"{parameter.name} of tp rank {label[2]}", _open(file)[0], expected)
    return {(tp, labels[0][1])}


def _check_facts(path: Path, topologies: set[tuple[int, int]]) -> None:
    assert len(topologies) == 1, f"topologies (tp, pp): {sorted(topologies)}"
    facts = json.loads((path / "checkpoint_metadata.json").read_text())
    assert facts["version"] == VERSION, f"version {facts['version']}"
    assert facts["tp"] == next(iter(topologies))[0], f"tp {facts['tp']} but {topologies}"
    assert facts["dp"] >= 1, f"dp {facts['dp']}"
    metas = facts["metas"]
    samples = sum(stage["consumed_train_samples"] for stage in metas["data_stages"])
    assert metas["consumed_train_samples"] == samples, f"counters {metas}"
    assert metas["last_train_step"] >= 0, f"counters {metas}"


def _cut(model: Model, vocab_size: int | None) -> Model:
    if vocab_size is None:
        return model
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors = {n: t[:vocab_size] if n in rows else t for n, t in model.tensors.items()}
    return checked(model.config | {"vocab_size": vocab_size}, tensors)


def _parse_dims(text: str) -> Slices:
    numbers = [
        [None if n == "None" else int(n) for n in item.split(",")] for item in text.split("|")
    ]
    return tuple(slice(*item) for item in numbers)


def _open(file: Path) -> tuple[Tensor, dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        assert list(opened.keys()) == ["data"], f"{file}: keys {list(opened.keys())}"
        return opened.get_tensor("data"), opened.metadata() or {}
