"""What is known of a job before a byte moves: the source scanned, the target laid out."""

import hashlib
import os
from dataclasses import dataclass, replace

import torch

from reshard import families, formats
from reshard.config import JobConfig, Side
from reshard.errors import CheckpointError, ConfigError
from reshard.families.model import ModelConfig
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, check_same_parameters
from reshard.plan import Plan

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
    target_model = model
    if dtype is not None:
        parameters = tuple(replace(parameter, dtype=dtype) for parameter in parameters)
        target_model = replace(model, dtype=str(dtype).removeprefix("torch."))
    target = target_format.layout(parameters, target_model, options)
    check_same_parameters(layout, target)
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
    return sample, taken, scan.parameters[0].dtype


def job_digest(prepared: Prepared, plan: Plan) -> str:
    """What identifies a job: layouts, block table, source files' sizes and times, code version."""
    record = hashlib.sha256(plan.table_digest().encode())
    scan = prepared.scan
    for file in scan.layout.files if scan else ():
        status = os.stat(scan.root / file) if scan else None
        record.update(
            repr((file, status and status.st_size, status and status.st_mtime_ns)).encode()
        )
    options = prepared.target_options
    chosen = (
        options.rope_interleaved,
        options.vocab_multiple,
        prepared.target.files,
        prepared.target_model,
    )
    record.update(repr((CODE_VERSION, chosen)).encode())
    return record.hexdigest()
