"""Meta's model-parallel directories: consolidated.NN.pth and params.json."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.compare import assert_same_tensor, bits, same_bits
from tests.oracles.models import LLAMA3_SCALING, Model, checked
from tests.oracles.rope import deinterleave, interleave

LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
COLUMN_PARALLEL = ("output", "wq", "wk", "wv", "w1", "w3")
ROW_PARALLEL = ("wo", "w2")
EMBEDDING = "tok_embeddings.weight"


def names(layers: int) -> dict[str, str]:
    """Meta name -> Hugging Face name of every tensor, in the order of Meta's files."""
    found = {
        EMBEDDING: "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for layer in range(layers):
        for meta, hf in LAYER.items():
            found[f"layers.{layer}.{meta}"] = f"model.layers.{layer}.{hf}"
    return found


def split_dim(name: str) -> int | None:
    """The dim that ranks share (the embedding's is a matter of the generation), or None."""
    module = name.split(".")[-2]
    if module in COLUMN_PARALLEL:
        return 0
    return 1 if module in ROW_PARALLEL else None


def write(
    model: Model,
    path: Path,
    mp: int,
    *,
    generation: str = "llama3",
    embedding_dim: int = 0,
    kv_copies: int | None = None,
    flat_storage: bool = False,
    strided: bool = False,
    rope_freqs: bool = False,
    params_wrapped: bool = False,
    norm_noise: int | None = None,
) -> None:
    """Write `mp` files and params.json.

    kv_copies: how often each kv head stands in a row; by default as often as `mp` ranks need it.
    flat_storage: the tensors of a layer are views of one storage. strided: every second matrix is
    stored transposed. norm_noise: the rank whose norms differ from the others' in one bit.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    copies = kv_copies or max(1, mp // model.config["num_key_value_heads"])
    params = to_params(model.config, generation, copies)
    params = {"model": params} if params_wrapped else params
    (path / "params.json").write_text(json.dumps(params))
    whole = to_meta(model, copies)
    for rank in range(mp):
        shard = {k: _shard(k, v, mp, embedding_dim)[rank] for k, v in whole.items()}
        if rank == norm_noise:
            shard = {k: _noisy(v) if "norm" in k else v for k, v in shard.items()}
        if rope_freqs:
            shard["rope.freqs"] = _frequencies(model)
        shard = _stored(shard, flat=flat_storage, strided=strided)
        torch.save(shard, path / f"consolidated.{rank:02d}.pth")


def to_params(config: dict[str, Any], generation: str, copies: int) -> dict[str, Any]:
    """params.json with the keys that a generation of Llama has."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta, scaled = config["rope_theta"], bool(config["rope_scaling"])
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "vocab_size": config["vocab_size"] if generation == "llama3" else -1,
        "norm_eps": config["rms_norm_eps"],
        **_ffn_params(config["hidden_size"], config["intermediate_size"]),
    }
    if generation == "llama3" or kv_heads * copies != heads:
        params["n_kv_heads"] = kv_heads * copies
    if generation == "llama3" or theta != 10000.0:
        params["rope_theta"] = theta
    if scaled:
        params["use_scaled_rope"] = True
    new = {"n_kv_heads", "rope_theta", "use_scaled_rope", "ffn_dim_multiplier"}
    unsayable = {"llama1": new, "llama2": {"use_scaled_rope"}, "llama3": set()}[generation]
    assert not unsayable & params.keys(), f"{generation} cannot say {unsayable & params.keys()}"
    return params


def ffn_size(params: dict[str, Any]) -> int:
    """The feed-forward width as Meta's model computes it from params.json."""
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    return int(multiple * ((hidden + multiple - 1) // multiple))


def to_meta(model: Model, copies: int) -> dict[str, Tensor]:
    """Whole tensors with Meta's names, row order and repeated kv heads."""
    config = model.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads % (kv_heads * copies) == 0, f"{kv_heads} x {copies} kv heads for {heads} heads"
    tensors = dict(model.tensors)
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    table = names(config["num_hidden_layers"])
    assert set(table.values()) == set(tensors), "Meta has no place for some tensors (biases?)"
    whole = {}
    for name, hf in table.items():
        tensor = tensors[hf]
        if ".wq." in name:
            tensor = interleave(tensor, heads)
        if ".wk." in name:
            tensor = interleave(tensor, kv_heads)
        if ".wk." in name or ".wv." in name:
            tensor = tensor.reshape(kv_heads, -1, tensor.shape[1])
            tensor = tensor.repeat_interleave(copies, 0).flatten(0, 1)
        whole[name] = tensor
    return whole


def whole(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """params.json and the tensors of all files, concatenated by parallel type, in Meta's form."""
    path = Path(path)
    params = json.loads((path / "params.json").read_text())
    params = params.get("model", params)
    shards = [load(file) for file in _files(path)]
    keys = set(shards[0])
    assert all(set(shard) == keys for shard in shards), "files hold different keys"
    assert keys - {"rope.freqs"} == set(names(params["n_layers"])), "unexpected or missing keys"
    return params, {name: _join(name, shards, params["dim"]) for name in shards[0]}


def load(file: Path) -> dict[str, Tensor]:
    """One file's tensors; loading with and without mmap must agree."""
    plain = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    mapped = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    assert list(plain) == list(mapped), f"{file.name}: keys differ under mmap"
    for name, tensor in plain.items():
        assert_same_tensor(f"{file.name}: {name} (mmap)", tensor, mapped[name])
    return dict(plain)


def read(
    path: Path,
    *,
    tied: bool | None = None,
    kv_copies: int | None = None,
    rope_factor: float = 8.0,
) -> Model:
    """The model in Hugging Face form, without repeated kv heads.

    What the files cannot say is an argument. By default a model is tied where `output` equals
    `tok_embeddings`, and kv heads are copies where they are equal in every layer.
    """
    params, tensors = whole(path)
    heads = params["n_heads"]
    stored = params.get("n_kv_heads", heads)
    copies = kv_copies or _found_copies(tensors, stored)
    same = same_bits(tensors["output.weight"], tensors[EMBEDDING])
    tied = same if tied is None else tied
    assert same or not tied, "output.weight differs from tok_embeddings.weight"
    config = from_params(params, tensors, stored // copies, tied, rope_factor)
    found = {}
    for name, hf in names(params["n_layers"]).items():
        tensor = tensors[name]
        if ".wk." in name or ".wv." in name:
            tensor = _without_copies(name, tensor, stored, copies)
        if ".wq." in name:
            tensor = deinterleave(tensor, heads)
        if ".wk." in name:
            tensor = deinterleave(tensor, stored // copies)
        if not (tied and hf == "lm_head.weight"):
            found[hf] = tensor
    return checked(config, found)


def from_params(
    params: dict[str, Any], tensors: dict[str, Tensor], kv_heads: int, tied: bool, factor: float
) -> dict[str, Any]:
    """config.json's facts; params.json must agree with the tensors."""
    vocab, hidden = tensors[EMBEDDING].shape
    ffn = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    assert params["dim"] == hidden, f"params.json: dim {params['dim']}, tensors: {hidden}"
    assert params["vocab_size"] in (-1, vocab), f"params.json: vocab_size, tensors: {vocab}"
    assert ffn_size(params) == ffn, f"params.json: ffn {ffn_size(params)}, tensors: {ffn}"
    scaling = LLAMA3_SCALING | {"factor": factor} if params.get("use_scaled_rope") else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": kv_heads,
        "head_dim": tensors["layers.0.attention.wq.weight"].shape[0] // params["n_heads"],
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "torch_dtype": str(tensors[EMBEDDING].dtype).removeprefix("torch."),
    }


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.pth"))
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(files))]
    assert files, f"no .pth file in {path}"
    assert [file.name for file in files] == expected, f"files are {[f.name for f in files]}"
    return files


def _shard(name: str, tensor: Tensor, mp: int, embedding_dim: int) -> list[Tensor]:
    dim = embedding_dim if name == EMBEDDING else split_dim(name)
    if dim is None:
        return [tensor] * mp
    assert tensor.shape[dim] % mp == 0, f"{name}: {tuple(tensor.shape)} over {mp} ranks"
    return list(tensor.chunk(mp, dim))


def _join(name: str, shards: list[dict[str, Tensor]], hidden: int) -> Tensor:
    pieces = [shard[name] for shard in shards]
    dim = split_dim(name)
    if name == EMBEDDING:
        dim = 0 if pieces[0].shape[1] == hidden else 1
    if dim is not None:
        return torch.cat(pieces, dim)
    for rank, piece in enumerate(pieces):
        assert_same_tensor(f"{name} of rank {rank} against rank 0", piece, pieces[0])
    return pieces[0]


def _stored(shard: dict[str, Tensor], *, flat: bool, strided: bool) -> dict[str, Tensor]:
    """The same values, in storages laid out as asked; by default one contiguous storage each."""
    matrices = [name for name, tensor in shard.items() if tensor.dim() == 2]
    turned = set(matrices[1::2]) if strided else set()
    found = {n: (t.t() if n in turned else t).clone(memory_format=torch.contiguous_format)
             for n, t in shard.items()}  # fmt: skip
    if flat:
        for prefix in sorted({n[: n.index(".", 7)] + "." for n in found if n[:7] == "layers."}):
            found |= _views_of_one_storage({n: t for n, t in found.items() if n.startswith(prefix)})
    return {n: t.t() if n in turned else t for n, t in found.items()}


def _views_of_one_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    pairs = zip(tensors.items(), parts, strict=True)
    return {name: part.view(tensor.shape) for (name, tensor), part in pairs}


def _noisy(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    bits(tensor)[0] ^= 1
    return tensor


def _frequencies(model: Model) -> Tensor:
    dim = model.config["head_dim"]
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return (1.0 / model.config["rope_theta"] ** exponents).to(model.tensors["model.norm.weight"])


def _ffn_params(dim: int, ffn: int) -> dict[str, Any]:
    """Values of `multiple_of` and, if need be, `ffn_dim_multiplier` that make `ffn_size` = ffn."""
    for multiple in range(1, ffn + 1):
        params: dict[str, Any] = {"multiple_of": multiple}
        if ffn_size({"dim": dim, **params}) == ffn:
            return params
    params = {"multiple_of": 1, "ffn_dim_multiplier": (ffn + 0.5) / int(2 * (4 * dim) / 3)}
    assert ffn_size({"dim": dim, **params}) == ffn, f"ffn {ffn} for dim {dim}"
    return params


def _found_copies(tensors: dict[str, Tensor], stored: int) -> int:
    """The largest number of equal neighbours that all k and v tensors are made of."""
    keys = [tensor for name, tensor in tensors.items() if ".wk." in name or ".wv." in name]
    divisors = [r for r in range(stored, 0, -1) if stored % r == 0]
    return next(r for r in divisors if all(_equal_neighbours(t, stored, r) for t in keys))


def _equal_neighbours(tensor: Tensor, stored: int, copies: int) -> bool:
    heads = tensor.reshape(stored // copies, copies, -1)
    return same_bits(heads, heads[:, :1].expand_as(heads))


def _without_copies(name: str, tensor: Tensor, stored: int, copies: int) -> Tensor:
    assert _equal_neighbours(tensor, stored, copies), f"{name}: copies of a kv head differ"
    return tensor.reshape(stored // copies, copies, -1)[:, 0].reshape(-1, tensor.shape[1])
