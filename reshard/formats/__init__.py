"""The checkpoint formats. Each is one module, found by name; adding one adds a format.

NAME, ASSETS                              its name in a topology; the small files kept at its root
SOURCE_KEYS, TARGET_KEYS                  the keys of src and dst that only some formats know
layout(parameters, model, options)        where every parameter lies: pure, for reading and writing
detect(path) -> bool                      whether a directory is of this format
scan(path, options) -> Scan               the model and the layout of a directory that exists
purpose(options) -> str                   what a target is for, where that needs saying
model_of(record, path)                    the model that a JSON file of the format describes
notes(model, options) -> tuple[str, ...]  what the plan says of a target
side_files(model, layout, options)        the small files that make a target complete
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, cast

from reshard.errors import CheckpointError, ConfigError
from reshard.families.model import Json, ModelConfig
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, Parameter


class Format(Protocol):
    """What a format's module has."""

    NAME: str
    ASSETS: tuple[str, ...]
    SOURCE_KEYS: tuple[str, ...]
    TARGET_KEYS: tuple[str, ...]

    def layout(
        self, parameters: Sequence[Parameter], model: ModelConfig, options: Options
    ) -> Layout:
        """Where every parameter lies."""

    def detect(self, path: Path) -> bool:
        """Whether a directory is of this format."""

    def scan(self, path: Path, options: Options) -> Scan:
        """The model and the layout of a directory."""

    def purpose(self, options: Options) -> str:
        """What a target is for, where that needs saying."""

    def model_of(self, record: Mapping[str, Json], path: Path) -> ModelConfig | None:
        """The model that a JSON file of this format describes, or None for a file of another."""

    def notes(self, model: ModelConfig, options: Options) -> tuple[str, ...]:
        """What the plan says of a target."""

    def side_files(self, model: ModelConfig, layout: Layout, options: Options) -> dict[str, bytes]:
        """The small files that make a target complete."""


@cache
def formats() -> Mapping[str, Format]:
    """Every known format by its name."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    ]
    return {module.NAME: cast(Format, module) for module in modules if hasattr(module, "NAME")}


def named(name: str) -> Format:
    """The format called `name`."""
    if name not in formats():
        raise ConfigError(
            f"format `{name}` is not known; use one of {', '.join(sorted(formats()))}"
        )
    return formats()[name]


def read_model(path: Path) -> ModelConfig:
    """The model that a config.json, params.json or model_config.json describes on its own."""
    record = common.read_json(path)
    for known in formats().values():
        model = known.model_of(record, path)
        if model is not None:
            return model
    raise CheckpointError(f"`{path}`: describes no model that a known format would have")


def detect(path: Path) -> Format:
    """The format of the checkpoint in `path`."""
    if not path.is_dir():
        raise CheckpointError(f"`{path}`: no such directory")
    found = [known for known in formats().values() if known.detect(path)]
    if len(found) == 1:
        return found[0]
    names = " and ".join(known.NAME for known in found) or "none of " + ", ".join(sorted(formats()))
    raise CheckpointError(
        f"`{path}`: looks like {names}; name its topology with --src NAME src.path={path}"
    )
