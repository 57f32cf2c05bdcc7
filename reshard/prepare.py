"""What is known of a job before a byte moves: the source scanned, the target laid out."""

import hashlib
import os
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reshard import assets, families, formats
from reshard.assets import Readiness
from reshard.config import JobConfig, Side
from reshard.errors import CheckpointError, ConfigError, IncompleteError, LayoutError
from reshard.families import Model
from reshard.families.model import ModelConfig
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, Parameter, check_covered, check_same_parameters
from reshard.placement import Boxes
from reshard.plan import Plan
from reshard.units import size_text

CODE_VERSION = "2"


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is known of a job before a byte moves; `scan` None: the source is only imagined."""

    config: JobConfig
    model: Model
    source: Layout
    target: Layout
    target_format: formats.Format
    target_options: Options
    target_model: Model
    scan: Scan | None
    notes: tuple[str, ...] = ()

    def readiness(self) -> Readiness:
        """The small files that the target will have, and what will be missing."""
        target = self.target_format
        carried = () if self.scan is None else tuple(_carried(self.scan, target))
        made = target.side_files(self.target_model, self.target, self.target_options)
        record = self.target_model.to_json().get("config")
        config = record if isinstance(record, dict) else {}
        return assets.readiness((*made, *carried), target.NEEDED, config)

    def plan(self, world: int) -> Plan:
        """The plan for `world` ranks."""
        engine = self.config.engine
        return Plan(self.source, self.target, world, engine.exchange, engine.writers)


def open_source(side: Side, name: str = "src") -> Scan:
    """Scan a checkpoint that exists; its format is detected where the config does not say it."""
    if side.path is None:
        raise ConfigError(f"{name}.path: which checkpoint? give {name}.path=DIR")
    if not side.path.is_dir():
        raise CheckpointError(f"`{side.path}`: no such directory ({name}.path)")
    if side.format is None:
        found = formats.detect(side.path, side.among)
    else:
        found = formats.named(side.format)
        formats.refuse_foreign(found, side.path)
    return found.scan(side.path, side.options)


@dataclass(frozen=True, slots=True)
class _Source:
    """What a job starts from; `scan` None: the checkpoint is only imagined."""

    model: Model
    parameters: tuple[Parameter, ...]
    layout: Layout
    notes: tuple[str, ...]
    scan: Scan | None


def prepare(config: JobConfig) -> Prepared:
    """Scan or imagine the source, lay out the target, and refuse what cannot be."""
    source = _scanned(config.source) if config.source.path is not None else _imagined(config.source)
    target_format, options, dtype = _target(config)
    _require_known_keys(config.target, "dst", target_format, set(target_format.TARGET_KEYS))
    if not (isinstance(source.model, ModelConfig) or target_format.ANY_FAMILY):
        raise LayoutError(
            f"{target_format.NAME}: needs to know what each tensor of a model is, and the model "
            f"type {source.model.model_type} is not known; use --dst hf or fsdpN, which move by "
            "name"
        )
    model, parameters = _cast(source, dtype)
    target = target_format.layout(parameters, model, options)
    check_covered(source.layout)
    check_same_parameters(source.layout, target)
    notes = (
        *source.notes,
        *_dtype_notes(source.model.dtype, dtype, target),
        *(f"target: {line}" for line in target_format.notes(model, options)),
    )
    scan = source.scan
    if scan is not None:
        notes += _tokenizer_note(scan, model)
        if scan.left_behind:
            notes += (f"left behind: {', '.join(scan.left_behind)} (weights only are moved)",)
    found = Prepared(
        config, source.model, source.layout, target, target_format, options, model, scan, notes
    )
    if config.engine.require_complete and (missing := found.readiness().missing):
        raise IncompleteError(
            f"dst: {', '.join(missing)} would be missing; give src.assets=DIR, a directory that "
            "has them (engine.require_complete=true asks for this)"
        )
    return found


def _scanned(side: Side) -> _Source:
    """A checkpoint that exists."""
    scan = open_source(side)
    known = formats.named(scan.format)
    _require_known_keys(side, "src", known, set(known.SOURCE_KEYS))
    notes = tuple(f"source: {line}" for line in scan.assumed)
    return _Source(scan.model, scan.parameters, scan.layout, notes, scan)


def _imagined(side: Side) -> _Source:
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
    _require_known_keys(side, "src", known, set(known.SOURCE_KEYS))
    parameters = tuple(families.parameters(model))
    layout = known.layout(parameters, model, side.options)
    return _Source(model, parameters, layout, (), None)


def _cast(source: _Source, dtype: torch.dtype | None) -> tuple[Model, tuple[Parameter, ...]]:
    """The model and its parameters in the target's dtype; what is no weight keeps its own."""
    if dtype is None:
        return source.model, source.parameters
    narrow = next((part for part in source.parameters if _is_quantised(part.dtype)), None)
    if narrow is not None:
        raise LayoutError(
            f"dst.dtype: `{narrow.name}` is {str(narrow.dtype).removeprefix('torch.')}, which "
            "means nothing without its scales; dst.dtype=keep moves it as it is"
        )
    parameters = (
        replace(parameter, dtype=dtype) if parameter.dtype.is_floating_point else parameter
        for parameter in source.parameters
    )
    model = replace(source.model, dtype=str(dtype).removeprefix("torch."))
    return model, tuple(parameters)


def _is_quantised(dtype: torch.dtype) -> bool:
    """Whether values of a floating dtype are codes that a scale makes numbers."""
    return dtype.is_floating_point and dtype.itemsize == 1


def _dtype_notes(stored: str, dtype: torch.dtype | None, target: Layout) -> tuple[str, ...]:
    """What happens to the dtype, or might."""
    if dtype is None and stored == "float32":
        size = size_text(target.total_bytes())
        return (f"weights are float32, {size}; dst.dtype=bfloat16 halves them",)
    wanted = stored if dtype is None else str(dtype).removeprefix("torch.")
    return (f"target: cast from {stored} to {wanted}",) if wanted != stored else ()


def _tokenizer_note(scan: Scan, model: Model) -> tuple[str, ...]:
    """A warning where the embedding has other rows than the tokenizer of src.assets has tokens."""
    folder = scan.options.assets
    tokens = assets.tokens_of(folder) if folder is not None else None
    if tokens is None or not isinstance(model, ModelConfig) or tokens == model.vocab:
        return ()
    return (
        f"warning: the embedding has {model.vocab} rows, but the tokenizer in src.assets knows "
        f"{tokens} tokens",
    )


def _target(config: JobConfig) -> tuple[formats.Format, Options, torch.dtype | None]:
    """The target's format, options and dtype; `dst.like` gives those of a sample checkpoint."""
    side = config.target
    if len(side.among) > 1:
        raise ConfigError(
            f"--dst: {' or '.join(side.among)}? name a topology of one of them, like "
            f"{side.among[0]}8"
        )
    if config.like is None:
        if side.format is None:
            raise ConfigError(
                "--dst: which layout? name a topology such as tp4, meta8 or hf, "
                "or give dst.like=DIR"
            )
        return formats.named(side.format), side.options, side.dtype
    if not config.like.is_dir():
        raise CheckpointError(f"`{config.like}`: no such directory (dst.like)")
    sample = formats.detect(config.like)
    asked = config.source.options
    scan = sample.scan(config.like, Options(model=asked.model, assets=asked.assets))
    if side.format not in (None, sample.NAME):
        raise ConfigError(
            f"dst.like: `{config.like}` is {scan.layout.name}, but --dst says {side.format}"
        )
    if any(isinstance(slot.placement.cut, Boxes) for slot in scan.layout.slots):
        raise ConfigError(
            f"dst.like: `{config.like}` is not cut along dim 0 alone, and its files do not name "
            "the mesh; name a topology, like titan8 with dst.mesh.tp=2"
        )
    taken = replace(
        side.options,
        mesh=scan.options.mesh,
        embedding_dim=scan.options.embedding_dim
        if side.options.embedding_dim is None
        else side.options.embedding_dim,
        rope_interleaved=scan.options.rope_interleaved,
        wrapper=side.options.wrapper or scan.options.wrapper,
        keys=side.options.keys or scan.options.keys,
        rope=side.options.rope or scan.options.rope,
    )
    return sample, taken, side.dtype or getattr(torch, scan.model.dtype)


def _require_known_keys(side: Side, name: str, known: formats.Format, keys: Set[str]) -> None:
    """Refuse keys that would be dropped without a word."""
    if unknown := sorted(side.given - keys):
        raise ConfigError(
            f"{name}.{unknown[0]} does not apply to {known.NAME} as a "
            f"{'source' if name == 'src' else 'target'}; what does: "
            f"{', '.join(sorted(keys)) or 'nothing of the kind'}"
        )


def _carried(scan: Scan, target: formats.Format) -> dict[str, Path]:
    """The small files that lie around the source, by their names in the target."""
    asked = (scan.options.assets,) if scan.options.assets is not None else ()
    folders = tuple(dict.fromkeys((*asked, scan.root, *scan.folders)))
    return assets.carried(folders, formats.asset_names(), target.ASSETS)


def small_files(prepared: Prepared, scan: Scan) -> dict[str, Iterable[bytes]]:
    """The texts of the target, and the small files carried from the source, by name, in pieces."""
    made = prepared.target_format.side_files(
        prepared.target_model, prepared.target, prepared.target_options
    )
    carried = _carried(scan, prepared.target_format)
    return {
        **{name: (data,) for name, data in made.items()},
        **{name: assets.pieces_of(path) for name, path in carried.items()},
    }


def job_digest(prepared: Prepared, plan: Plan) -> str:
    """What identifies a job: layouts, block table, sources with sizes and times, small files."""
    record = hashlib.sha256(plan.table_digest().encode())
    if prepared.scan is not None:
        for file in prepared.scan.layout.files:
            status = os.stat(prepared.scan.root / file)
            record.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
        for name, pieces in sorted(small_files(prepared, prepared.scan).items()):
            record.update(repr(name).encode())
            for piece in pieces:
                record.update(piece)
    strict = prepared.config.strict_replicas
    record.update(repr((CODE_VERSION, prepared.target.files, strict)).encode())
    return record.hexdigest()
