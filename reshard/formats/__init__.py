"""The checkpoint formats. Each is one module, found by name; adding one adds a format.

A module of this package is a format if it has a NAME; other packages register theirs as entry
points of the group `reshard.formats`. What a format must have:

NAME                                      its name in a topology
layout(parameters, model, options)        where every parameter lies: pure, for reading and writing
detect(path) -> bool                      whether a directory is of this format
scan(path, options) -> Scan               the model and the layout of a directory that exists

and what it may have, with the defaults of `_Defaults`:

ANY_FAMILY                                whether it holds models of families that are not known
FALLBACK                                  whether its files count only where no other format is
ASSETS, NEEDED                            small files kept at its root; those it needs to be of use
SOURCE_KEYS, TARGET_KEYS                  the keys of src and dst that only some formats know
FOLDER                                    the directory below dst.path that is published, if any
purpose(options) -> str                   what a target is for, where that needs saying
model_of(record, path)                    the model that a JSON file of the format describes
notes(model, options) -> tuple[str, ...]  what the plan says of a target
declared(options) -> dict[str, str]       what a target's files do not say, for the manifest
check_place(folder)                       refuse a dst.path in which a target would be of no use
side_files(model, layout, options)        the small files that make a target complete
closing_files(layout, options, skeleton)  files that list the others, in pieces, written last
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from reshard.containers import Skeleton
from reshard.errors import CheckpointError, ConfigError
from reshard.families import Model
from reshard.families.model import Json
from reshard.formats import common, foreign
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, Parameter


class Format(Protocol):
    """What a format's module has."""

    NAME: str
    ANY_FAMILY: bool
    FALLBACK: bool
    ASSETS: tuple[str, ...]
    NEEDED: Mapping[str, Sequence[str]]
    FOLDER: str
    SOURCE_KEYS: tuple[str, ...]
    TARGET_KEYS: tuple[str, ...]

    def layout(self, parameters: Sequence[Parameter], model: Model, options: Options) -> Layout:
        """Where every parameter lies."""

    def detect(self, path: Path) -> bool:
        """Whether a directory is of this format."""

    def scan(self, path: Path, options: Options) -> Scan:
        """The model and the layout of a directory."""

    def purpose(self, options: Options) -> str:
        """What a target is for, where that needs saying."""

    def model_of(self, record: Mapping[str, Json], path: Path) -> Model | None:
        """The model that a JSON file of this format describes, or None for a file of another."""

    def notes(self, model: Model, options: Options) -> tuple[str, ...]:
        """What the plan says of a target."""

    def side_files(self, model: Model, layout: Layout, options: Options) -> dict[str, bytes]:
        """The small files that make a target complete."""

    def declared(self, options: Options) -> dict[str, str]:
        """What a target's files do not say, for the manifest."""

    def check_place(self, folder: Path) -> None:
        """Refuse a dst.path in which a target would be of no use."""

    def closing_files(
        self, layout: Layout, options: Options, skeleton: Callable[[str], Skeleton]
    ) -> Mapping[str, Iterator[bytes]]:
        """Files that list the others, in pieces; `skeleton` tells what is where in a file."""


class _Defaults:
    """A format's module, completed."""

    ANY_FAMILY = FALLBACK = False
    ASSETS = SOURCE_KEYS = TARGET_KEYS = ()
    NEEDED: Mapping[str, Sequence[str]] = {"tokenizer": common.TOKENIZERS}
    FOLDER = ""

    def __init__(self, module: ModuleType) -> None:
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        vars(self).update(own)

    @staticmethod
    def purpose(options: Options) -> str:
        return ""

    @staticmethod
    def model_of(record: Mapping[str, Json], path: Path) -> None:
        return None

    @staticmethod
    def notes(model: Model, options: Options) -> tuple[str, ...]:
        return ()

    @staticmethod
    def declared(options: Options) -> dict[str, str]:
        return {}

    @staticmethod
    def check_place(folder: Path) -> None:
        return None

    @staticmethod
    def side_files(model: Model, layout: Layout, options: Options) -> dict[str, bytes]:
        return {}

    @staticmethod
    def closing_files(
        layout: Layout, options: Options, skeleton: Callable[[str], Skeleton]
    ) -> dict[str, Iterator[bytes]]:
        return {}


@cache
def formats() -> Mapping[str, Format]:
    """Every known format by its name: those of this package, then those of others."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    ]
    modules += [point.load() for point in entry_points(group=__name__)]
    found = [_Defaults(module) for module in modules if hasattr(module, "NAME")]
    return {known.NAME: known for known in cast(list[Format], found)}


def named(name: str) -> Format:
    """The format called `name`."""
    if name not in formats():
        raise ConfigError(
            f"format `{name}` is not known; use one of {', '.join(sorted(formats()))}"
        )
    return formats()[name]


def read_model(path: Path) -> Model:
    """The model that a config.json, params.json or model_config.json describes on its own."""
    record = common.read_json(path)
    for known in formats().values():
        model = known.model_of(record, path)
        if model is not None:
            return model
    raise CheckpointError(f"`{path}`: describes no model that a known format would have")


def refuse_foreign(known: Format, path: Path) -> None:
    """Refuse a directory that is not of a format, but of a tool whose files are not read here."""
    if not known.detect(path) and (refusal := foreign.refusal(path)) is not None:
        raise CheckpointError(refusal)


def asset_names() -> tuple[str, ...]:
    """The small files that some format gives a meaning."""
    return tuple(sorted({name for known in formats().values() for name in known.ASSETS}))


def detect(path: Path, among: Sequence[str] = ()) -> Format:
    """The format of the checkpoint in `path`, which is one of `among` where any are named."""
    if not path.is_dir():
        raise CheckpointError(f"`{path}`: no such directory")
    candidates = list(among) or sorted(formats())
    found = [known for known in map(named, candidates) if known.detect(path)]
    found = [known for known in found if not known.FALLBACK] or found
    if len(found) == 1:
        return found[0]
    if not found and (refusal := foreign.refusal(path)) is not None:
        raise CheckpointError(refusal)
    names = " and ".join(known.NAME for known in found) or "none of " + ", ".join(candidates)
    if not found and (partial := next(path.glob("*.partial-*"), None)) is not None:
        raise CheckpointError(
            f"`{partial}`: an unfinished job's; the same command again finishes it"
        )
    if among and not found:
        raise CheckpointError(f"`{path}`: holds no checkpoint of {' or '.join(among)}")
    raise CheckpointError(
        f"`{path}`: looks like {names}; name its topology with --src NAME src.path={path}"
    )
