"""Models of families that are not known here: moved tensor by tensor, under their own names.

Their config.json is carried as it is; nothing of it is interpreted but what every family has.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from reshard.errors import ConfigError
from reshard.families.model import DTYPES, Json, is_name

# (as the modules of current transformers are named, as the released checkpoints spell it).
# transformers renames while loading; its conversion table has the same pairs.
SPELLINGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mllama": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
}
HEAD, TIED = "lm_head.weight", "tie_word_embeddings"
STACKS = ("layers", "layer", "h", "blocks", "block")  # lists of layers; others may have gaps
DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class CarriedConfig:
    """A model by its config.json alone; `dtype` is that of most of its tensors."""

    model_type: str
    config: Mapping[str, Json]
    tied: bool = False
    dtype: str = "bfloat16"

    def to_json(self) -> dict[str, Json]:
        """All fields as JSON, for the manifest."""
        return {
            "model_type": self.model_type,
            "config": dict(self.config),
            "tied": self.tied,
            "dtype": self.dtype,
        }

    def _text(self) -> Mapping[str, Json]:
        """The part of the config on the text model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def _size(self, *keys: str) -> int | None:
        """A size that the config says under one of `keys`."""
        found = (self._text().get(key) for key in keys)
        return next((value for value in found if type(value) is int), None)

    @property
    def layers(self) -> int | None:
        """The depth of the text model, where the config says it."""
        return self._size("num_hidden_layers", "n_layer", "num_layers")

    @property
    def extra_layers(self) -> int:
        """Layers beyond that depth, which predict further tokens."""
        return self._size("num_nextn_predict_layers") or 0

    @property
    def vocab(self) -> int | None:
        """The size of the vocabulary, where the config says it."""
        return self._size("vocab_size")

    def with_vocab(self, rows: int) -> "CarriedConfig":
        """The same with another vocabulary."""
        inner = self.config.get("text_config")
        if isinstance(inner, dict):
            config = {**self.config, "text_config": {**inner, "vocab_size": rows}}
        else:
            config = {**self.config, "vocab_size": rows}
        return replace(self, config=config)

    def describe(self) -> str:
        """One line on the model."""
        return f"{self.model_type}: not known here, moved by the names of its tensors"


def from_hf(config: Mapping[str, Json], name: str) -> CarriedConfig:
    """The model of a config.json (`name` is for messages), whatever its family."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not is_name(model_type):
        raise ConfigError(f"`{name}`: model_type is {reprlib.repr(model_type)}, expected a name")
    dtype = next((config[key] for key in DTYPE_KEYS if config.get(key)), "bfloat16")
    return CarriedConfig(
        model_type,
        dict(config),
        tied=_says_tied(config),
        dtype=dtype if isinstance(dtype, str) and dtype in DTYPES else "bfloat16",
    )


def from_json(record: Mapping[str, Json]) -> CarriedConfig:
    """The config that `to_json` wrote."""
    config = record.get("config")
    if not isinstance(config, dict):
        raise ConfigError("model config: `config` is not an object")
    found = from_hf(config, "model config")
    tied, dtype = record.get("tied"), record.get("dtype")
    known = dtype if isinstance(dtype, str) and dtype in DTYPES else found.dtype
    return CarriedConfig(found.model_type, config, tied is True, known)


def to_hf(model: CarriedConfig) -> dict[str, Json]:
    """config.json as it came, with the dtype that the tensors have now, and tied or not."""
    config = _with_dtype(dict(model.config), model.dtype)
    if _says_tied(model.config) != model.tied:
        config[TIED] = model.tied
        inner = config.get("text_config")
        if isinstance(inner, dict) and TIED in inner:
            config["text_config"] = {**inner, TIED: model.tied}
    return config


def _with_dtype(config: dict[str, Json], dtype: str) -> dict[str, Json]:
    """A config and those inside it, with another dtype wherever one is named."""
    for key, value in config.items():
        if isinstance(value, dict):
            config[key] = _with_dtype(dict(value), dtype)
        elif key in DTYPE_KEYS and isinstance(value, str):
            config[key] = dtype
    return config


def _says_tied(config: Mapping[str, Json]) -> bool:
    """Whether a config, or that of its text model, says that the output is tied."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(said := part.get(TIED), bool):
            return said
    return False


def head_of(model_type: str) -> str:
    """The name of the output's weight."""
    return published(model_type, HEAD)


def published(model_type: str, key: str) -> str:
    """The released spelling of a tensor's name."""
    return _respelt(key, SPELLINGS.get(model_type, ()))


def current(model_type: str, name: str) -> str:
    """The name that a tensor has in the modules of current transformers."""
    return _respelt(name, tuple((old, new) for new, old in SPELLINGS.get(model_type, ())))


def _respelt(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for one, other in table:
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name
