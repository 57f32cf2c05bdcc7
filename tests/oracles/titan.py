"""TorchTitan's Llama checkpoints: its names, row order and fused tensors, as published.

Generations of keys, joined by "+": "0.2" (attention.wq, output), "0.3" (attention.qkv_linear.wq,
lm_head), "fused" (attention.qkv_linear.wqkv) and "w13" (feed_forward.w13), the last two on 0.3.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles import dcp, models
from tests.oracles.compare import assert_same_tensor
from tests.oracles.models import Model, checked
from tests.oracles.rope import deinterleave, interleave

FEATURES = {"0.2", "0.3", "fused", "w13"}
SINGLE = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
QKV = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
GROUP = {
    "foreach": False,
    "fused": True,
    "betas": (0.9, 0.95),
    "lr": 0.0008,
    "initial_lr": 0.0008,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}


def titan_tensors(
    model: Model,
    *,
    keys: str = "0.3",
    rope: str = "interleaved",
    prefix: str = "",
    freqs_cis: bool = False,
) -> dict[str, Tensor]:
    """The state dict; rope "half" leaves q and k in Hugging Face order. A tied head is in it."""
    features, config = set(keys.split("+")), model.config
    assert features <= FEATURES, f"key generations {features - FEATURES}"
    tensors = dcp.with_head(model)
    biases = [name for name in tensors if name.endswith(".bias")]
    assert not biases, f"TorchTitan's Llama has no place for {biases}"
    found = {"tok_embeddings.weight": tensors[dcp.TABLE]}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        for name, titan in SINGLE.items():
            found[f"{new}{titan}.weight"] = tensors[f"{old}{name}.weight"]
        q, k, v = (tensors[f"{old}{name}.weight"] for name in QKV.values())
        if rope == "interleaved":
            q = interleave(q, config["num_attention_heads"])
            k = interleave(k, config["num_key_value_heads"])
        place = "attention." if "0.2" in features else "attention.qkv_linear."
        if "fused" in features:
            found[f"{new}{place}wqkv.weight"] = fuse_qkv(q, k, v, config)
        else:
            found |= {f"{new}{place}w{n}.weight": t for n, t in zip("qkv", (q, k, v), strict=True)}
        if "w13" in features:
            pair = [found.pop(f"{new}feed_forward.w{n}.weight") for n in (1, 3)]
            found[f"{new}feed_forward.w13.weight"] = torch.stack(pair)
    found["norm.weight"] = tensors["model.norm.weight"]
    found["output.weight" if "0.2" in features else dcp.HEAD] = tensors[dcp.HEAD]
    if freqs_cis:
        found["freqs_cis"] = frequencies(config)
    return {prefix + name: tensor for name, tensor in found.items()}


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, config: Mapping[str, Any]) -> Tensor:
    """For each kv head: the query heads that share it, its key head, its value head."""
    groups, size = config["num_key_value_heads"], config["head_dim"]
    parts = [tensor.reshape(groups, -1, size, tensor.shape[1]) for tensor in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, q.shape[1])


def frequencies(config: Mapping[str, Any]) -> Tensor:
    """The complex table that was a saved buffer until the middle of 2025."""
    size = config["head_dim"]
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(32.0), 1.0 / config["rope_theta"] ** exponents)
    return torch.polar(torch.ones_like(angles), angles)


def write_titan(
    model: Model,
    path: Path,
    shards: int,
    *,
    keys: str = "0.3",
    rope: str = "interleaved",
    prefix: str = "",
    step: int | None = None,
    training: bool = False,
    freqs_cis: bool = False,
    whole_qkv: bool | None = None,
    **options: Any,
) -> Path:
    """A checkpoint in `path` (or its step-N), which is returned; a prefix is a level of its own.

    `training` adds optimizer, scheduler, data loader and counters. Split q, k and v are stored
    whole, as 0.3 does, or cut (`whole_qkv`); fused tensors are cut on dim 0 like all others.
    """
    whole = whole_qkv if whole_qkv is not None else "0.2" not in keys
    tensors = titan_tensors(model, keys=keys, rope=rope, freqs_cis=freqs_cis)
    state: dcp.State = {prefix.rstrip("."): tensors} if prefix else dict(tensors)
    if training:
        state |= _training_state(model, keys, step or 1)

    def cut(key: str, tensor: Tensor) -> list[dcp.Box] | None:
        if not tensor.dim() or key.endswith("freqs_cis"):
            return None
        if whole and key.endswith(("linear.wq.weight", "linear.wk.weight", "linear.wv.weight")):
            return None
        return dcp.chunk_boxes(tensor.shape, shards)

    states = dcp.split(state, shards, cut)
    if training:
        for rank, held in enumerate(states):
            held["dataloader"] = {f"dp_rank_{rank}": b"\x80\x04}\x94.", "world_size": shards}
    place = Path(path) / f"step-{step}" if step is not None else Path(path)
    dcp.save(place, states, **options)
    return place


def write_2d(
    model: Model,
    path: Path,
    dp: int,
    tp: int,
    *,
    keys: str = "0.2",
    rope: str = "interleaved",
    **options: Any,
) -> None:
    """A model-only checkpoint under FSDP and tensor parallelism."""
    tensors = titan_tensors(model, keys=keys, rope=rope)
    dcp.save(path, dcp.split(tensors, dp * tp, dcp.over_grid(dp, tp)), **options)


def titan_state(make: str, *, keys: str, **given: Any) -> dict[str, Tensor]:
    """The state dict of a model that a function of tests.oracles.models makes."""
    model: Model = getattr(models, make)(**given)
    return titan_tensors(model, keys=keys)


def read_titan(
    path: Path, config: dict[str, Any], *, rope: str = "interleaved"
) -> dict[str, Tensor]:
    """The model in Hugging Face names and row order, from any generation of keys."""
    return to_hf(dcp.read(path), config, rope=rope)


def to_hf(
    tensors: Mapping[str, Tensor], config: dict[str, Any], *, rope: str = "interleaved"
) -> dict[str, Tensor]:
    """TorchTitan's state dict in Hugging Face form; names and shapes are those of the config."""
    given = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    given.pop("freqs_cis", None)
    head = given.pop("output.weight") if "output.weight" in given else given.pop(dcp.HEAD)
    found = {dcp.TABLE: given.pop("tok_embeddings.weight"), dcp.HEAD: head}
    found["model.norm.weight"] = given.pop("norm.weight")
    if config["tie_word_embeddings"]:
        assert_same_tensor("the tied head", found.pop(dcp.HEAD), found[dcp.TABLE])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        own = {n.removeprefix(prefix): given.pop(n) for n in list(given) if n.startswith(prefix)}
        for name, tensor in _layer_to_hf(own, config, rope).items():
            found[f"model.{prefix}{name}.weight"] = tensor
    assert not given, f"unexpected keys: {sorted(given)}"
    return checked(config, found).tensors


def _layer_to_hf(own: dict[str, Tensor], config: dict[str, Any], rope: str) -> dict[str, Tensor]:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    fused = own.pop("attention.qkv_linear.wqkv.weight", None)
    if fused is not None:
        rows = fused.reshape(groups, heads // groups + 2, config["head_dim"], fused.shape[1])
        parts = rows[:, :-2], rows[:, -2], rows[:, -1]
        own |= {
            f"attention.w{n}.weight": part.reshape(-1, fused.shape[1])
            for n, part in zip("qkv", parts, strict=True)
        }
    for name in ("feed_forward.w13.weight", "feed_forward.w13"):
        if name in own:
            own["feed_forward.w1.weight"], own["feed_forward.w3.weight"] = own.pop(name)
    own = {n.replace(".qkv_linear.", "."): t for n, t in own.items()}
    found = {name: own.pop(f"{titan}.weight") for name, titan in SINGLE.items()}
    for name, hf in QKV.items():
        tensor = own.pop(f"attention.w{name}.weight")
        if name != "v" and rope == "interleaved":
            tensor = deinterleave(tensor, heads if name == "q" else groups)
        found[hf] = tensor
    assert not own, f"unexpected keys of a layer: {sorted(own)}"
    return found


def _training_state(model: Model, keys: str, step: int) -> dcp.State:
    """What 0.3 saves beside the model; its optimizer knows q, k and v by their fused name."""
    kept = keys if "0.2" in keys or "fused" in keys else f"{keys}+fused"
    tensors = titan_tensors(model, keys=kept)
    if model.config["tie_word_embeddings"]:
        tensors = {n: t for n, t in tensors.items() if n not in (dcp.HEAD, "output.weight")}
    optimizer: dcp.State = {}
    for name, tensor in tensors.items():
        optimizer[f"state.{name}.step"] = torch.tensor(float(step))
        optimizer[f"state.{name}.exp_avg"] = torch.full_like(tensor, 0.25)
        optimizer[f"state.{name}.exp_avg_sq"] = torch.full_like(tensor, 0.5)
        optimizer |= {f"param_groups.{name}.{key}": value for key, value in GROUP.items()}
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"last_epoch": step},
        "train_state": {"step": step, "ntokens_seen": 16384 * step},
    }
