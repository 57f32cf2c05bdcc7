"""What a job starts from: a checkpoint that is looked at, or one that is only imagined."""

from collections.abc import Set
from dataclasses import dataclass

from reshard import assets, families, formats
from reshard.config import Side
from reshard.errors import CheckpointError, ConfigError
from reshard.families import Model
from reshard.families.model import ModelConfig
from reshard.formats.options import Scan
from reshard.layout import Layout, Parameter


@dataclass(frozen=True, slots=True)
class Source:
    """What a job starts from; `scan` None: the checkpoint is only imagined."""

    model: Model
    parameters: tuple[Parameter, ...]
    layout: Layout
    notes: tuple[str, ...]
    scan: Scan | None


def source_of(side: Side) -> Source:
    """The source of a job."""
    return _scanned(side) if side.path is not None else _imagined(side)


def _scanned(side: Side) -> Source:
    """A checkpoint that exists."""
    scan = open_source(side)
    known = formats.named(scan.format)
    require_known_keys(side, "src", known, set(known.SOURCE_KEYS))
    notes = tuple(f"source: {line}" for line in scan.assumed)
    return Source(scan.model, scan.parameters, scan.layout, notes, scan)


def _imagined(side: Side) -> Source:
    """The layout that a topology gives a model, without a checkpoint."""
    if len(side.among) > 1:
        raise ConfigError(
            f"--src: only the files tell whether it is {' or '.join(side.among)}; give src.path=DIR"
        )
    model = side.options.model
    if model is None or side.format is None:
        raise ConfigError(
            "src.path: which checkpoint? give src.path=DIR, or src.model=NAME to plan without one"
        )
    if not isinstance(model, ModelConfig):
        raise ConfigError(
            f"src.model: the model type {model.model_type} is not known, so that its tensors "
            "are known only from a checkpoint; give src.path=DIR"
        )
    known = formats.named(side.format)
    require_known_keys(side, "src", known, set(known.SOURCE_KEYS))
    formats.require_held(known, model)
    if side.options.vocab is not None:
        raise ConfigError("src.vocab: drops rows of a checkpoint that exists; give src.path=DIR")
    parameters = tuple(families.parameters(model))
    layout = known.layout(parameters, model, side.options)
    return Source(model, parameters, layout, (), None)


def open_source(side: Side, name: str = "src") -> Scan:
    """Scan a checkpoint that exists; its format is detected where the config does not say it."""
    if side.path is None:
        raise ConfigError(f"{name}.path: which checkpoint? give {name}.path=DIR")
    if side.path.is_file():
        raise ConfigError(
            f"{name}.path: `{side.path}` is a file; give the directory that it is in"
            + (f", and {name}.file={side.path.name}" if side.path.suffix == ".gguf" else "")
        )
    if not side.path.is_dir():
        raise CheckpointError(f"`{side.path}`: no such directory ({name}.path)")
    if side.format is None:
        found = formats.detect(side.path, side.among)
    else:
        found = formats.named(side.format)
        formats.refuse_foreign(found, side.path)
    return without_padding(found.scan(side.path, side.options))


def without_padding(scan: Scan) -> Scan:
    """A source without the rows beyond its vocabulary, where `src.vocab` says how large that is."""
    rows = scan.options.vocab
    if rows is None:
        return scan
    if not isinstance(rows, int):
        asked = (scan.options.assets,) if scan.options.assets is not None else ()
        rows = assets.tokens_in((*asked, scan.root, *scan.folders))
    if rows is None:
        raise CheckpointError(
            f"src.vocab=tokenizer: no tokenizer.json in `{scan.root}` or src.assets says how many "
            "tokens there are; give src.vocab=N"
        )
    return formats.without_padding(scan, rows)


def require_known_keys(side: Side, name: str, known: formats.Format, keys: Set[str]) -> None:
    """Refuse keys that would be dropped without a word."""
    if unknown := sorted(side.given - keys):
        raise ConfigError(
            f"{name}.{unknown[0]} does not apply to {known.NAME} as a "
            f"{'source' if name == 'src' else 'target'}; what does: "
            f"{', '.join(sorted(keys)) or 'nothing of the kind'}"
        )
