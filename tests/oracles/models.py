"""Small Llama models in Hugging Face form, whose every element tells where it belongs.

float32 elements are integers that are unique in the model. 16-bit elements (and float32 models of
2**24 elements or more) are bit patterns hashed from (number of the tensor, linear index): finite,
never zero, so that a misplaced or missing element is seen.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# storage of the same width, and the bits of the exponent, whose all ones mean infinity or NaN
PATTERNS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}


@dataclass(frozen=True)
class Model:
    """A whole model: config.json in its 4.x form, tensors with Hugging Face names and row order."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def model_a(tied: bool = False, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Model:
    """12 heads, 6 kv heads: divides by 1, 2, 3, 6 and, with repeated kv heads, 12."""
    sizes = {"hidden_size": 72, "intermediate_size": 222, "vocab_size": 222, "head_dim": 6}
    return build(sizes | _heads(12, 6, layers=5), tied, dtype, overrides)


def model_b(tied: bool = False, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Model:
    """6 heads, 3 kv heads: divides by 1 and 3 and, with repeated kv heads, nothing else."""
    sizes = {"hidden_size": 36, "intermediate_size": 111, "vocab_size": 111, "head_dim": 6}
    return build(sizes | _heads(6, 3, layers=5), tied, dtype, overrides)


def model_c(tied: bool = False, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Model:
    """All matrices are 72 x 72, so that a transposed or mixed-up tensor shows in no shape."""
    sizes = {"hidden_size": 72, "intermediate_size": 72, "vocab_size": 72, "head_dim": 12}
    return build(sizes | _heads(6, 6, layers=3), tied, dtype, overrides)


def wide_model(size: int, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Model:
    """A model of about `size` bytes; each embedding table is an eighth of it."""
    hidden = 16 * max(1, round(math.sqrt(size / dtype.itemsize / 64) / 16))
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "vocab_size": 8 * hidden,
        "head_dim": hidden // 8,
    }
    return build(sizes | _heads(8, 4, layers=4), False, dtype, overrides)


def build(
    sizes: dict[str, int], tied: bool, dtype: torch.dtype, overrides: dict[str, Any]
) -> Model:
    """A model of the given sizes; overrides replace keys of its config."""
    config = _common() | sizes | {"tie_word_embeddings": tied, "torch_dtype": _name(dtype)}
    config |= deepcopy(overrides)  # transformers writes into a config's rope_scaling
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    return Model(config, placed_values(shapes(config), dtype))


def with_normal_values(model: Model, seed: int = 0) -> Model:
    """The same model with ordinary random values: for logits and for casts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in model.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale, mean = (0.1, 1.0) if "norm" in name else (tensor.shape[-1] ** -0.5, 0.0)
        tensors[name] = (noise * scale + mean).to(tensor.dtype)
    return replace(model, tensors=tensors)


def checked(config: dict[str, Any], tensors: dict[str, Tensor]) -> Model:
    """A model in canonical order, whose names and shapes are exactly those of its config."""
    expected, found = shapes(config), {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = {n: (found.get(n), expected.get(n)) for n in found | expected}
    wrong = {name: pair for name, pair in wrong.items() if pair[0] != pair[1]}
    assert not wrong, f"tensors (found, expected by the config): {wrong}"
    return Model(config, {name: tensors[name] for name in expected})


def shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Names and shapes of all tensors of a Hugging Face Llama or Qwen2 model, in its order."""
    table = (config["vocab_size"], config["hidden_size"])
    found: dict[str, Shape] = {"model.embed_tokens.weight": table}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config).items():
            found[f"model.layers.{layer}.{name}"] = shape
    found["model.norm.weight"] = (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = table
    return found


def layer_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Names and shapes of the tensors of one decoder layer."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    found: dict[str, Shape] = {}
    for name, shape in matrices.items():
        found[f"{name}.weight"] = shape
        if has_bias(config, name):
            found[f"{name}.bias"] = shape[:1]
    return found | dict.fromkeys(
        ("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,)
    )


def has_bias(config: dict[str, Any], matrix: str) -> bool:
    """Whether a matrix of a layer has a bias; Qwen2 has it on q, k and v and nowhere else."""
    if config["model_type"] == "qwen2":
        return matrix.endswith(("q_proj", "k_proj", "v_proj"))
    return bool(config["attention_bias" if matrix.startswith("self_attn") else "mlp_bias"])


def expected_parameter_count(config: dict[str, Any]) -> int:
    """The number of elements, by a formula that does not go through the table of names."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, k = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    qwen = config["model_type"] == "qwen2"
    layer = 2 * h * q + 2 * h * k + 3 * h * f + 2 * h
    if qwen:
        layer += q + 2 * k
    if config["attention_bias"] and not qwen:
        layer += q + 2 * k + h
    if config["mlp_bias"] and not qwen:
        layer += 2 * f + h
    tables = 1 if config["tie_word_embeddings"] else 2
    return config["num_hidden_layers"] * layer + tables * config["vocab_size"] * h + h


def placed_values(found: dict[str, Shape], dtype: torch.dtype) -> dict[str, Tensor]:
    """One tensor per name, whose elements encode (number of the tensor, linear index)."""
    counts = [math.prod(shape) for shape in found.values()]
    starts = [sum(counts[:i]) + 1 for i in range(len(counts))]
    exact = dtype == torch.float32 and sum(counts) < 2**24
    tensors = {}
    for number, (name, shape) in enumerate(found.items()):
        start, count = starts[number], counts[number]
        flat = integers(start, count) if exact else hashed(number, count, dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


def integers(start: int, count: int) -> Tensor:
    """The integers start, start + 1, ... as float32, which holds them exactly below 2**24."""
    return torch.arange(start, start + count, dtype=torch.int32).to(torch.float32)


def hashed(number: int, count: int, dtype: torch.dtype) -> Tensor:
    """Finite, non-zero bit patterns hashed from (number, index)."""
    storage, exponent = PATTERNS[dtype]
    value = torch.arange(count, dtype=torch.int32)
    value.mul_(_signed(0x9E3779B1)).add_(_signed(number * 0x85EBCA77 + 0x165667B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        value ^= (value >> shift) & ((1 << (32 - shift)) - 1)
        value.mul_(_signed(factor))
    pattern = (value >> 16).to(storage) if storage == torch.int16 else value
    infinite = (pattern & exponent) == exponent
    pattern[infinite] &= ~(exponent & -exponent)  # its lowest bit off: the largest finite exponent
    pattern[pattern == 0] = 1
    return pattern.view(dtype)


def _signed(number: int) -> int:
    """The 32-bit two's complement value of the number's low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _heads(heads: int, kv_heads: int, *, layers: int) -> dict[str, int]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common() -> dict[str, Any]:
    """The keys of config.json that do not depend on sizes, in the spelling of transformers 4.x."""
    return {
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }
