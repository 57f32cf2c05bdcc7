"""The key-values of a GGUF header: the sizes of a model as llama.cpp names them, both ways.

The numbers of file types are those of llama.cpp's `llama_ftype`. The tokenizer's keys are not here.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reshard.containers import shown
from reshard.containers.gguffile import Value
from reshard.errors import CheckpointError, ConfigError, LayoutError
from reshard.families.model import MAX_NUMBER, Json, ModelConfig, scaling_type
from reshard.families.releases import LLAMA_3_SCALING, ROPE_SCALING
from reshard.layout import Parameter

# The architecture that llama.cpp runs each family as.
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
# Of these, rotary rows are interleaved.
INTERLEAVED = ("llama", "mistral")
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
}
QUANTIZATION_VERSION = 2
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
# Of yarn's parameters, those that a header says, and the values of the others that it implies.
SAID = {"rope_type", "type", "factor", "original_max_position_embeddings", "rope_theta"}
IMPLIED: Mapping[str, Json] = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None}


def families(model: ModelConfig) -> tuple[str, ...]:
    """The families that llama.cpp runs as the architecture of a file."""
    return tuple(name for name, arch in ARCHITECTURES.items() if arch == model.model_type)


def slides(model: ModelConfig) -> bool:
    """Whether a model attends to a sliding window only."""
    used = model.extras.get("use_sliding_window", model.model_type == "mistral")
    return bool(used and model.extras.get("sliding_window"))


def require_said(model: ModelConfig, name: str) -> None:
    """Refuse what a header cannot say, so that llama.cpp would compute otherwise."""
    kind = scaling_type(model)
    if kind not in (None, "llama3", "linear", "yarn"):
        raise LayoutError(
            f"{name}: rope_scaling of type {kind} has no keys in a GGUF header; use --dst hf"
        )
    scaling = model.rope_scaling or {}
    odd = {key for key in scaling if key not in SAID and scaling[key] != IMPLIED.get(key)}
    if kind in ("linear", "yarn") and odd:
        raise LayoutError(
            f"{name}: rope_scaling has {shown(min(odd))} {reprlib.repr(scaling[min(odd)])}, which "
            "has no key in a GGUF header here; use --dst hf"
        )
    if kind == "llama3" and model.model_type not in INTERLEAVED:
        raise LayoutError(
            f"{name}: rope_scaling of type llama3 is not known of {model.model_type}; use --dst hf"
        )
    if (activation := model.extras.get("hidden_act", "silu")) != "silu":
        raise LayoutError(
            f"{name}: hidden_act is {shown(str(activation))}, llama.cpp has silu here"
        )
    if model.mlp_bias:
        raise LayoutError(f"{name}: the model has mlp_bias=true, which llama.cpp does not read")


def header(model: ModelConfig, kind: str, parameters: Sequence[Parameter]) -> dict[str, Value]:
    """All keys but the tokenizer's; `kind` is what most matrices are."""
    arch = ARCHITECTURES[model.model_type]
    label = _size_label(parameters)
    general = {
        "architecture": Value("string", arch),
        "type": Value("string", "model"),
        "name": Value("string", f"{model.model_type} {label}"),
        "size_label": Value("string", label),
        "file_type": Value("uint32", FILE_TYPES[kind]),
        "quantization_version": Value("uint32", QUANTIZATION_VERSION),
    }
    sizes = {
        "vocab_size": model.vocab,
        "context_length": model.max_positions,
        "embedding_length": model.hidden,
        "block_count": model.layers,
        "feed_forward_length": model.intermediate,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "rope.dimension_count": model.head_dim,
    }
    numbers = {
        "attention.layer_norm_rms_epsilon": Value("float32", model.norm_eps),
        "rope.freq_base": Value("float32", model.rope_theta),
        **_scaling(model),
    }
    return {
        **{f"general.{key}": value for key, value in general.items()},
        **{f"{arch}.{key}": Value("uint32", size) for key, size in sizes.items()},
        **{f"{arch}.{key}": value for key, value in numbers.items()},
    }


def _scaling(model: ModelConfig) -> dict[str, Value]:
    """The keys of linear and yarn scaling; llama3 scaling is a tensor."""
    kind, scaling = scaling_type(model), model.rope_scaling or {}
    if kind not in ("linear", "yarn"):
        return {}
    found = {
        "rope.scaling.type": Value("string", kind),
        "rope.scaling.factor": Value("float32", _float(scaling.get("factor"), 1.0)),
    }
    original = scaling.get("original_max_position_embeddings")
    if isinstance(original, int):
        found["rope.scaling.original_context_length"] = Value("uint32", original)
    return found


def _float(value: Json, default: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return default
    if not 0 < value <= MAX_NUMBER:
        raise LayoutError(
            f"gguf: rope_scaling has {reprlib.repr(value)}, expected a positive number"
        )
    return float(value)


def _size_label(parameters: Sequence[Parameter]) -> str:
    """The number of parameters as people say it: 8.0B."""
    count = sum(math.prod(parameter.shape) for parameter in parameters)
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count / 1000:.1f}K"


def rope_factors(model: ModelConfig) -> torch.Tensor | None:
    """What each rotary frequency is divided by under llama3 scaling; None without it.

    Published with Llama 3.1: long waves are stretched by `factor`, short ones are left, and those
    between are interpolated by their share of the original context.
    """
    if scaling_type(model) != "llama3":
        return None
    given = model.rope_scaling or {}
    said = {key: _float(given.get(key), usual) for key, usual in LLAMA_3_SCALING.items()}
    factor, low, high = said["factor"], said["low_freq_factor"], said["high_freq_factor"]
    original = said["original_max_position_embeddings"]
    if low >= high:
        raise LayoutError(f"gguf: rope_scaling has low_freq_factor {low:g} and high {high:g}")
    steps = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    factors = []
    for frequency in (1.0 / model.rope_theta**steps).tolist():
        wave = 2 * math.pi / frequency
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(factor)
        else:
            share = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - share) / factor + share))
    return torch.tensor(factors, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata of a file that exists; `path` is for messages."""

    path: Path
    metadata: Mapping[str, object]

    def model(self, rows: int, *, tied: bool, biased: bool) -> ModelConfig:
        """The model that the header describes, with a vocabulary of `rows`."""
        arch = self.metadata.get("general.architecture")
        if arch not in ARCHITECTURES.values():
            known = ", ".join(sorted(set(ARCHITECTURES.values())))
            raise CheckpointError(
                f"`{self.path}`: architecture {reprlib.repr(arch)} is not known, "
                f"expected one of {known}"
            )
        heads = self._size(f"{arch}.attention.head_count")
        hidden = self._size(f"{arch}.embedding_length")
        head_dim = self._size(f"{arch}.attention.key_length", max(1, hidden // heads))
        if self._size(f"{arch}.rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError(
                f"`{self.path}`: {arch}.rope.dimension_count is not the size of a head, "
                f"{head_dim}, which is not supported"
            )
        if self._size(f"{arch}.vocab_size", rows) != rows:
            raise CheckpointError(
                f"`{self.path}`: {arch}.vocab_size is {self.metadata[f'{arch}.vocab_size']}, but "
                f"the embedding has {rows} rows"
            )
        sizes: dict[str, Any] = {
            "hidden": hidden,
            "layers": self._size(f"{arch}.block_count"),
            "heads": heads,
            "kv_heads": self._size(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate": self._size(f"{arch}.feed_forward_length"),
            "norm_eps": self._number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
            "rope_theta": self._number(f"{arch}.rope.freq_base", 10000.0),
            "max_positions": self._size(f"{arch}.context_length"),
            "rope_scaling": self._scaling(str(arch)),
            **{name: self._token(key) for name, key in TOKENS.items()},
        }
        try:
            return ModelConfig(str(arch), **sizes, vocab=rows, tied=tied, attention_bias=biased)
        except ConfigError as error:
            raise CheckpointError(f"`{self.path}`: {error}") from None

    def _scaling(self, arch: str) -> dict[str, Json] | None:
        """Linear and yarn scaling, which have keys of their own."""
        kind = self.metadata.get(f"{arch}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise CheckpointError(
                f"`{self.path}`: rope.scaling.type is {reprlib.repr(kind)}, which is not supported"
            )
        found: dict[str, Json] = {
            "rope_type": str(kind),
            "factor": self._number(f"{arch}.rope.scaling.factor", 1.0),
        }
        key = f"{arch}.rope.scaling.original_context_length"
        if key in self.metadata:
            found["original_max_position_embeddings"] = self._size(key)
        return found

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 1:
            raise self._wrong(key, value)
        return value

    def _number(self, key: str, default: float) -> float:
        value = self.metadata.get(key, default)
        # nan is within no limits.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value)
        if not 0 < value <= MAX_NUMBER:
            raise self._wrong(key, value)
        # A float32 with the digits that tell it from its neighbours: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value)))

    def _wrong(self, key: str, value: object) -> CheckpointError:
        found = reprlib.repr(value)
        return CheckpointError(f"`{self.path}`: {key} is {found}, expected a positive number")

    def _token(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None


def with_rope_factors(model: ModelConfig, stored: torch.Tensor, path: Path) -> ModelConfig:
    """The model with the llama3 scaling that gives the factors in a file."""
    scaled = replace(model, rope_scaling={**ROPE_SCALING, "factor": float(stored.max())})
    made = rope_factors(scaled)
    if made is None or made.shape != stored.shape or not torch.allclose(made, stored, rtol=1e-5):
        raise CheckpointError(
            f"`{path}`: rope_freqs.weight is of no llama3 scaling that is known; "
            "give src.model=config.json"
        )
    return scaled


def agreed(
    known: ModelConfig, described: ModelConfig, factors: torch.Tensor | None, path: Path
) -> ModelConfig:
    """A config from elsewhere, which must be that of the file; what both say is the file's."""
    for name in ("kv_heads", "head_dim", "intermediate"):
        if getattr(known, name) != getattr(described, name):
            raise CheckpointError(
                f"`{path}`: {name} is {getattr(described, name)}, but the config of the model "
                f"has {getattr(known, name)}"
            )
    made, kind = rope_factors(known), scaling_type(known)
    alike = (made is None) == (factors is None) and (
        made is None or factors is None or torch.allclose(made, factors, rtol=1e-5)
    )
    if not alike or (kind != "llama3" and kind != scaling_type(described)):
        raise CheckpointError(
            f"`{path}`: its rotary scaling is not the rope_scaling of the model's config, "
            f"{reprlib.repr(known.rope_scaling)}; is it the config of this model?"
        )
    said = {
        name: getattr(described, name)
        for name in ("norm_eps", "rope_theta", "max_positions")
        if np.float32(getattr(known, name)) != np.float32(getattr(described, name))
    }
    return replace(known, vocab=described.vocab, tied=described.tied, **said)
