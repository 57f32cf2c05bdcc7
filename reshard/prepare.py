"""What is known of a job before a byte moves: the source scanned, the target laid out."""

import hashlib
import os
from collections.abc import Set
from dataclasses import dataclass, replace

import torch

from reshard import commit, families, formats
from reshard.config import JobConfig, Side
from reshard.errors import CheckpointError, ConfigError
from reshard.families.model import ModelConfig
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, check_covered, check_same_parameters
from reshard.plan import Plan
from reshard.storage import explained

CODE_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is known of a job before a byte moves; `scan` None: the source is only imagined."""

    config: JobConfig
    model: ModelConfig
    source: Layout
    target: Layout
    target_format: formats.Format
    target_options: Options
    target_model: ModelConfig
    scan: Scan | None
    notes: tuple[str, ...] = ()

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
    found = formats.named(side.format) if side.format else formats.detect(side.path)
    return found.scan(side.path, side.options)


def prepare(config: JobConfig) -> Prepared:
    """Scan or imagine the source, lay out the target, and refuse what cannot be."""
    source = config.source
    scan = open_source(source) if source.path is not None else None
    if scan is not None:
        known = formats.named(scan.format)
        _require_known_keys(source, "src", known, set(known.SOURCE_KEYS))
        model, parameters, layout = scan.model, scan.parameters, scan.layout
        notes = tuple(f"source: {line}" for line in scan.assumed)
    else:
        if source.options.model is None or source.format is None:
            raise ConfigError(
                "src.path: which checkpoint? give src.path=DIR, "
                "or src.model=NAME to plan without one"
            )
        model, notes = source.options.model, ()
        parameters = tuple(families.parameters(model))
        layout = formats.named(source.format).layout(parameters, model, source.options)
    target_format, options, dtype = _target(config)
    _require_known_keys(config.target, "dst", target_format, set(target_format.TARGET_KEYS))
    target_model = model
    if dtype is not None:
        parameters = tuple(replace(parameter, dtype=dtype) for parameter in parameters)
        target_model = replace(model, dtype=str(dtype).removeprefix("torch."))
    target = target_format.layout(parameters, target_model, options)
    check_covered(layout)
    check_same_parameters(layout, target)
    if dtype is not None and model.dtype != target_model.dtype:
        notes += (f"target: cast from {model.dtype} to {target_model.dtype}",)
    notes += tuple(f"target: {line}" for line in target_format.notes(target_model, options))
    if scan is not None and scan.left_behind:
        notes += (f"left behind: {', '.join(scan.left_behind)} (weights only are moved)",)
    return Prepared(
        config, model, layout, target, target_format, options, target_model, scan, notes
    )


def _target(config: JobConfig) -> tuple[formats.Format, Options, torch.dtype | None]:
    """The target's format, options and dtype; `dst.like` gives those of a sample checkpoint."""
    side = config.target
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
    scan = sample.scan(config.like, Options())
    if side.format not in (None, sample.NAME):
        raise ConfigError(
            f"dst.like: `{config.like}` is {scan.layout.name}, but --dst says {side.format}"
        )
    taken = replace(
        side.options,
        mesh=scan.options.mesh,
        embedding_dim=scan.options.embedding_dim
        if side.options.embedding_dim is None
        else side.options.embedding_dim,
        rope_interleaved=scan.options.rope_interleaved,
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


def small_files(prepared: Prepared, scan: Scan) -> dict[str, bytes]:
    """The texts of the target, and the small files carried from the source, by name."""
    known = sorted({name for known in formats.formats().values() for name in known.ASSETS})
    carried = commit.carried(scan.root, known, prepared.target_format.ASSETS)
    made = prepared.target_format.side_files(
        prepared.target_model, prepared.target, prepared.target_options
    )
    texts = dict(made)
    for name, path in carried.items():
        with explained("read", path):
            texts[name] = path.read_bytes()
    return texts


def job_digest(prepared: Prepared, plan: Plan) -> str:
    """What identifies a job: layouts, block table, sources with sizes and times, small files."""
    record = hashlib.sha256(plan.table_digest().encode())
    if prepared.scan is not None:
        for file in prepared.scan.layout.files:
            status = os.stat(prepared.scan.root / file)
            record.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
        record.update(repr(sorted(small_files(prepared, prepared.scan).items())).encode())
    strict = prepared.config.strict_replicas
    record.update(repr((CODE_VERSION, prepared.target.files, strict)).encode())
    return record.hexdigest()
