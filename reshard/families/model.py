"""The canonical model config: the sizes and facts of a model, whatever format it was read from."""

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields

from reshard.errors import ConfigError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
MAX_LAYERS, MAX_SIZE, MAX_NUMBER = 10_000, 1 << 31, 1e30
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "tied": bool,
    "attention_bias": bool,
    "mlp_bias": bool,
    "norm_eps": (int, float),
    "rope_theta": (int, float),
    "max_positions": int,
}
MAX_NAME = 80


def is_name(value: object) -> bool:
    """Whether a value may stand for a model type: short text that can be printed."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_NAME


def _is_token(value: object) -> bool:
    return value is None or type(value) is int


FITS: Mapping[str, Callable[[object], bool]] = {
    "model_type": is_name,
    # Of what JSON has, an object or null.
    "rope_scaling": lambda value: not isinstance(value, list | str | int | float),
    "bos": _is_token,
    "pad": _is_token,
    "eos": lambda value: (
        bool(value) and all(map(_is_token, value)) if isinstance(value, list) else _is_token(value)
    ),
    "extras": lambda value: isinstance(value, Mapping),
    "generation": lambda value: isinstance(value, Mapping),
}
DTYPES = ("bfloat16", "float16", "float32", "float64")
# Spellings of config.json for the fields whose name here differs; the rest is carried as `extras`.
# transformers 4.x writes torch_dtype, rope_theta and rope_scaling; 5.x dtype and rope_parameters.
HF_NAMES = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate",
    "vocab_size": "vocab",
    "tie_word_embeddings": "tied",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "max_position_embeddings": "max_positions",
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
    "torch_dtype": "dtype",
}
EMPTY: Mapping[str, Json] = {}
NULLABLE = {"bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling"}
RENAMED = {"dtype", "rope_parameters", "architectures", "model_type", "transformers_version"}
NOT_CARRIED = RENAMED | {"quantization_config"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements; `rope_scaling` is as in config.json.

    `extras` are keys of config.json that are carried as they are, and `generation` those that
    generation_config.json has besides the token ids.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Json] | None = None
    max_positions: int = 2048
    bos: int | None = 1
    eos: int | list[int] | None = 2
    pad: int | None = None
    dtype: str = "bfloat16"
    extras: Mapping[str, Json] = field(default_factory=dict)
    generation: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = dict.fromkeys(SIZES, MAX_SIZE) | {"layers": MAX_LAYERS}
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ConfigError(
                    f"model config: `{name}` is {reprlib.repr(value)}, expected a positive int up "
                    f"to {limit}"
                )
        for name, kind in KINDS.items():
            value = getattr(self, name)
            known = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            # Comparing is exact for ints of any size, and false for nan.
            if not known or not abs(value) <= MAX_NUMBER:
                raise ConfigError(
                    f"model config: `{name}` is {reprlib.repr(value)}, which is no {name}"
                )
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"model config: dtype is {reprlib.repr(self.dtype)}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model config: {self.kv_heads} key-value heads do not divide {self.heads} "
                "attention heads"
            )

    def to_json(self) -> dict[str, Json]:
        """All fields as JSON, for the manifest."""
        return asdict(self)

    def describe(self) -> str:
        """One line on the model."""
        return (
            f"{self.model_type}: {self.layers} layers, width {self.hidden}, {self.heads} heads, "
            f"{self.kv_heads} key-value heads, feed-forward {self.intermediate}, "
            f"vocabulary {self.vocab}"
        )


def scaling_type(model: ModelConfig) -> str | None:
    """The kind of a model's rotary scaling, in either spelling of config.json."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    kind = scaling.get("rope_type") or scaling.get("type")
    return kind if is_name(kind) else reprlib.repr(kind)  # type: ignore[return-value]


def from_json(record: Mapping[str, Json]) -> ModelConfig:
    """The config that `to_json` wrote; unknown or missing fields are a ConfigError."""
    known = {item.name for item in fields(ModelConfig)}
    if unknown := sorted(set(record) - known):
        raise ConfigError(f"model config: unknown field `{repr(unknown[0][:MAX_NAME])[1:-1]}`")
    for name, fits in FITS.items():
        if name in record and not fits(record[name]):
            value = reprlib.repr(record[name])
            raise ConfigError(f"model config: `{name}` is {value}, which is no {name}")
    try:
        return ModelConfig(**record)  # type: ignore[arg-type]  # checked by __post_init__
    except TypeError as error:
        raise ConfigError(f"model config: {error}") from None


def from_hf(
    config: Mapping[str, Json], name: str, defaults: Mapping[str, Json] = EMPTY
) -> ModelConfig:
    """Read a Hugging Face config.json (`name` is for messages) in the 4.x or the 5.x spelling.

    `defaults` are the family's, where they are not a Llama's. A null is carried where it is no
    field of ours: it may turn a default off, as it does for the window of Mistral.
    """
    given = {**defaults, **config}
    flat = {
        key: value
        for key, value in given.items()
        if value is not None or key in NULLABLE or key not in HF_NAMES
    }
    if flat.get("quantization_config") is not None:
        raise ConfigError(f"`{name}`: a quantised model, which is not supported; convert it back")
    rope = flat.get("rope_parameters")
    if isinstance(rope, dict):
        flat["rope_theta"] = rope.get("rope_theta", 10000.0)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        flat["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    flat["torch_dtype"] = flat.get("torch_dtype") or flat.get("dtype") or "bfloat16"
    required = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    if missing := [key for key in required if flat.get(key) is None]:
        raise ConfigError(f"`{name}`: `{missing[0]}` is missing")
    hidden, heads = flat["hidden_size"], flat["num_attention_heads"]
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        raise ConfigError(
            f"`{name}`: hidden_size {reprlib.repr(hidden)} and num_attention_heads "
            f"{reprlib.repr(heads)} are no sizes"
        )
    flat["num_key_value_heads"] = flat.get("num_key_value_heads") or heads
    flat["head_dim"] = flat.get("head_dim") or hidden // heads
    if "tie_word_embeddings" not in flat:
        flat["tie_word_embeddings"] = False
    values = {ours: flat[theirs] for theirs, ours in HF_NAMES.items() if theirs in flat}
    extras = {
        key: value for key, value in flat.items() if key not in HF_NAMES and key not in NOT_CARRIED
    }
    return from_json({**values, "model_type": flat["model_type"], "extras": extras})


def to_hf(model: ModelConfig, implied: Collection[str] = ()) -> dict[str, Json]:
    """The config.json of `model` in the 4.x spelling, which every known reader accepts.

    `implied` are keys that the family's config.json does not have: they are left out unless they
    say something else than what is implied.
    """
    record = model.to_json()
    named = {theirs: record[ours] for theirs, ours in HF_NAMES.items()}
    usual = {
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": model.hidden // model.heads,
        "pad_token_id": None,
    }
    for key in ("pad_token_id", *implied):
        if named[key] == usual[key]:
            del named[key]
    return {"hidden_act": "silu", **model.extras, **named, "model_type": model.model_type}
