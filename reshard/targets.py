"""What a job makes: the target's format, options and dtype, as named or as a sample has them."""

from dataclasses import replace

import torch

from reshard import formats
from reshard.config import JobConfig
from reshard.errors import CheckpointError, ConfigError
from reshard.formats.options import Options, Scan
from reshard.placement import Boxes


def target_of(config: JobConfig) -> tuple[formats.Format, Options, torch.dtype | None]:
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
        encoding=side.options.encoding or (None if side.dtype else _encoding_of(scan)),
    )
    coded = taken.encoding is not None
    return sample, taken, side.dtype or (None if coded else getattr(torch, scan.model.dtype))


def _encoding_of(scan: Scan) -> str | None:
    """The codec of a sample's matrices, which must be one."""
    found = {slot.encoding.name for slot in scan.layout.slots if slot.encoding is not None}
    if len(found) > 1:
        raise ConfigError(
            f"dst.like: `{scan.root}` has tensors of {' and '.join(sorted(found))}; choose one "
            "with dst.dtype"
        )
    return next(iter(found), None)
