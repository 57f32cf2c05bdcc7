"""Whether a target fits on its disk."""

import os
import shutil
from pathlib import Path

from reshard.errors import ConfigError
from reshard.storage import explained


def require_space(directory: Path, needed: int, present: int) -> None:
    """Refuse a target that does not fit; `present` bytes of it are there already."""
    with explained("look at", directory):
        free = shutil.disk_usage(directory).free
    if needed - present > free:
        raise ConfigError(
            f"dst.path: needs {needed - present:,} bytes, but {free:,} are free in `{directory}`; "
            "free some space or choose another dst.path"
            + ("; the same command then goes on" if present else "")
        )


def allocated_bytes(directory: Path) -> int:
    """Bytes that the files below `directory` take on the disk."""
    with explained("look at", directory):
        found = (
            os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names
        )
        return sum(os.stat(file).st_blocks * 512 for file in found)
