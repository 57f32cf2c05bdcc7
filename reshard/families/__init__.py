"""Model families: which logical parameters a model has, from the sizes in its config.

A family is a module with `MODEL_TYPES`, the `model_type` values that it answers to, `ARCHITECTURE`,
the class that config.json names, and `parameters(model) -> list[Parameter]`. It may have `IMPLIED`,
the keys that a Llama's config.json has and its own has not, and `DEFAULTS`, the values of keys that
are missing where they are not a Llama's. Modules of this package are found by name; adding one adds
a family.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Protocol, cast

from reshard.errors import ConfigError
from reshard.families import carried
from reshard.families import model as known_model
from reshard.families.carried import CarriedConfig
from reshard.families.model import Json, ModelConfig
from reshard.layout import Parameter

Model = ModelConfig | CarriedConfig


class Family(Protocol):
    """What a family's module has."""

    ARCHITECTURE: str

    def parameters(self, model: ModelConfig) -> list[Parameter]:
        """The logical parameters of a model."""


@cache
def _families() -> Mapping[str, Family]:
    names = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {
        kind: cast(Family, module)
        for module in modules
        for kind in getattr(module, "MODEL_TYPES", ())
    }


def _family(model: ModelConfig) -> Family:
    known = _families()
    if model.model_type not in known:
        raise ConfigError(
            f"model type `{model.model_type}` is not known; use one of {', '.join(sorted(known))}"
        )
    return known[model.model_type]


def parameters(model: ModelConfig) -> list[Parameter]:
    """The logical parameters of `model`, in Hugging Face's order; an unknown family is refused."""
    return _family(model).parameters(model)


def read_config(record: Mapping[str, Json], name: str) -> Model:
    """The model of a config.json; one of an unknown family is carried as it is."""
    parts = (record, *(part for part in record.values() if isinstance(part, dict)))
    if any(part.get("quantization_config") is not None for part in parts):
        raise ConfigError(f"`{name}`: a quantised model, which is not supported; convert it back")
    return from_hf(record, name) if _is_known(record) else carried.from_hf(record, name)


def _is_known(record: Mapping[str, Json]) -> bool:
    """Whether a config.json is of a known family, and not of a classifier or a bare decoder."""
    named = record.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    generates = not classes or any(name.endswith("CausalLM") for name in classes)
    return str(record.get("model_type")) in _families() and generates


def from_hf(record: Mapping[str, Json], name: str) -> ModelConfig:
    """The model of a config.json of a known family (`name` is for messages)."""
    family = _families().get(str(record.get("model_type")))
    return known_model.from_hf(record, name, getattr(family, "DEFAULTS", {}))


def to_hf(model: ModelConfig) -> dict[str, Json]:
    """The config.json of a model of a known family, in the 4.x spelling."""
    family = _family(model)
    config = known_model.to_hf(model, getattr(family, "IMPLIED", ()))
    return {**config, "architectures": [family.ARCHITECTURE]}


def from_json(record: Mapping[str, Json]) -> Model:
    """The model that `to_json` of either kind wrote."""
    return carried.from_json(record) if "config" in record else known_model.from_json(record)


def known() -> tuple[str, ...]:
    """The model types of all known families."""
    return tuple(sorted(_families()))
