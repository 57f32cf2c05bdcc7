"""The checkpoint formats. Each is one module, found by name; adding one adds a format.

A module of this package is a format if it has a NAME; other packages register theirs as entry
points of the group `reshard.formats`. What a format must have:

NAME                                      its name in a topology
layout(parameters, model, options)        where every parameter lies: pure, for reading and writing
detect(path) -> bool                      whether a directory is of this format
scan(path, options) -> Scan               the model and the layout of a directory that exists

and what it may have, with the defaults of `_Defaults`:

FAMILIES                                  the model types that it holds; all known ones by default
ANY_FAMILY                                whether it holds models of families that are not known
SOURCE_ONLY                               whether it is read and never written
FALLBACK                                  whether its files count only where no other format is
EMBEDS_TOKENIZER                          whether its header holds the tokenizer
ASSETS, NEEDED                            small files kept at its root; those it needs to be of use
SOURCE_KEYS, TARGET_KEYS                  the keys of src and dst that only some formats know
FOLDER                                    the directory below dst.path that is published, if any
purpose(options) -> str                   what a target is for, where that needs saying
model_of(record, path)                    the model that a JSON file of the format describes
notes(model, options) -> tuple[str, ...]  what the plan says of a target
vocab_unit(options) -> int                what `dst.vocab_multiple` makes rows a multiple of
declared(options) -> dict[str, str]       what a target's files do not say, for the manifest
require_encoding(encoding, folder)        refuse a dst.dtype that is no plain one
check_place(folder)                       refuse a dst.path in which a target would be of no use
complete(path) -> bool                    whether its writer has done with a directory
side_files(model, layout, options)        the small files that make a target complete
closing_files(layout, options, skeleton)  files that list the others, in pieces, written last
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from reshard import families, vocabulary
from reshard.containers import Skeleton, shown
from reshard.errors import CheckpointError, ConfigError, LayoutError
from reshard.families import Model
from reshard.families.carried import CarriedConfig
from reshard.families.model import Json
from reshard.formats import common, foreign
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, Parameter


class Format(Protocol):
    """What a format's module has."""

    NAME: str
    FAMILIES: tuple[str, ...]
    ANY_FAMILY: bool
    SOURCE_ONLY: bool
    FALLBACK: bool
    EMBEDS_TOKENIZER: bool
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

    def vocab_unit(self, options: Options) -> int:
        """What a padded vocabulary is a multiple of."""

    def side_files(self, model: Model, layout: Layout, options: Options) -> dict[str, bytes]:
        """The small files that make a target complete."""

    def declared(self, options: Options) -> dict[str, str]:
        """What a target's files do not say, for the manifest."""

    def require_encoding(self, encoding: str, folder: Path | None) -> None:
        """Refuse a dst.dtype that is no plain one and not to be had in `folder`, the dst.path."""

    def check_place(self, folder: Path) -> None:
        """Refuse a dst.path in which a target would be of no use."""

    def complete(self, path: Path) -> bool:
        """Whether its writer has done with a directory of this format, as far as files tell."""

    def closing_files(
        self, layout: Layout, options: Options, skeleton: Callable[[str], Skeleton]
    ) -> Mapping[str, Iterator[bytes]]:
        """Files that list the others, in pieces; `skeleton` tells what is where in a file."""


class _Defaults:
    """A format's module, completed."""

    NAME: str
    FAMILIES = families.known()
    ANY_FAMILY = SOURCE_ONLY = FALLBACK = EMBEDS_TOKENIZER = False
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
    def vocab_unit(options: Options) -> int:
        return options.vocab_multiple or 1

    @staticmethod
    def declared(options: Options) -> dict[str, str]:
        return {}

    def require_encoding(self, encoding: str, folder: Path | None) -> None:
        raise ConfigError(
            f"dst.dtype={encoding}: {self.NAME} holds plain values only; use keep, bfloat16, "
            "float16 or float32, or --dst gguf"
        )

    @staticmethod
    def check_place(folder: Path) -> None:
        return None

    @staticmethod
    def complete(path: Path) -> bool:
        return True

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


def holds(known: Format, model: Model) -> bool:
    """Whether a format has a place for all that a model of this family has."""
    if isinstance(model, CarriedConfig):
        return known.ANY_FAMILY
    return model.model_type in known.FAMILIES


def require_held(known: Format, model: Model) -> None:
    """Refuse a model of a family that a format has no place for."""
    if holds(known, model):
        return
    others = [
        other.NAME for other in formats().values() if holds(other, model) and not other.SOURCE_ONLY
    ]
    if isinstance(model, CarriedConfig):
        named = model.config.get("architectures")
        unknown = (
            f"architecture {shown(', '.join(map(str, named)))}"
            if model.model_type in families.known() and isinstance(named, list)
            else f"model type {model.model_type}"
        )
        raise LayoutError(
            f"{known.NAME}: needs to know what each tensor of a model is, and the {unknown} is not "
            "known; use --dst hf or fsdpN, which move by name"
        )
    raise LayoutError(
        f"{known.NAME}: holds {' and '.join(known.FAMILIES)}, but this is {model.model_type}; "
        f"formats that hold it: {', '.join(sorted(others))}"
    )


def padded(
    known: Format, parameters: Sequence[Parameter], model: Model, options: Options
) -> tuple[Model, tuple[Parameter, ...]]:
    """A model as a target stores it, with the padding that `dst.vocab_multiple` asks for."""
    if options.vocab_multiple is None:
        return model, tuple(parameters)
    unit = known.vocab_unit(options)
    rows = vocabulary.rows_of(model, parameters, "dst.vocab_multiple")
    return vocabulary.resized(model, parameters, -(-rows // unit) * unit)


def laid_out(
    known: Format, parameters: Sequence[Parameter], model: Model, options: Options
) -> Layout:
    """Where every parameter lies in a target, whose padding belongs to none."""
    stored, tables = padded(known, parameters, model, options)
    return vocabulary.trimmed(known.layout(tables, stored, options), parameters)


def without_padding(scan: Scan, rows: int) -> Scan:
    """A source whose vocabulary is the first `rows` of what its files hold; the rest is dropped."""
    vocabulary.rows_of(scan.model, scan.parameters, "src.vocab")
    stored = vocabulary.stored_rows(scan.layout, scan.parameters)
    if rows > stored:
        raise CheckpointError(
            f"src.vocab: a vocabulary of {rows}, but the files hold {stored} rows; "
            "is it the tokenizer of this model?"
        )
    said = (f"{stored - rows} rows beyond the vocabulary of {rows} dropped (src.vocab)",)
    model, parameters = vocabulary.resized(scan.model, scan.parameters, rows)
    return replace(
        scan,
        model=model,
        parameters=parameters,
        layout=vocabulary.trimmed(scan.layout, parameters),
        assumed=(*scan.assumed, *(said if rows < stored else ())),
    )


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
