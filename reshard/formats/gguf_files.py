"""Which files of a directory are the model that is meant: a single one, or all parts of one."""

import re
from pathlib import Path

from reshard.errors import CheckpointError, ConfigError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
PROJECTOR = "mmproj"


def candidates(path: Path) -> list[str]:
    """The files of weights, without the projectors of vision models."""
    return sorted(
        found.name for found in path.glob("*.gguf") if not found.name.startswith(PROJECTOR)
    )


def chosen(path: Path, asked: str | None) -> list[str]:
    """The one file that is meant, or all parts of it in order."""
    found = candidates(path)
    if asked is not None:
        if asked not in found:
            raise ConfigError(
                f"src.file: `{path / asked}` is not there, found {', '.join(found) or 'none'}"
            )
        found = [name for name in found if _stem(name) == _stem(asked)]
    if not found:
        raise CheckpointError(f"`{path}`: no .gguf file in this directory")
    stems = {_stem(name) for name in found}
    if len(stems) != 1:
        raise ConfigError(
            f"`{path}`: holds {len(stems)} models: {', '.join(found)}; "
            "choose one with src.file=NAME"
        )
    [(stem, count)] = stems
    if not count:
        return found
    expected = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"`{path / missing[0]}` is missing: found {len(found)} of {count}")
    return expected


def _stem(name: str) -> tuple[str, int]:
    """What the parts of a model share: the begin of their names, and their number (0: whole)."""
    part = PART.fullmatch(name)
    return (part[1], int(part[3])) if part else (name, 0)
