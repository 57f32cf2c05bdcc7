"""Checkpoints that appear in the folder of a training run, each once, when it is complete."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reshard import formats, storage
from reshard.errors import ConfigError, ReshardError
from reshard.formats import common
from reshard.jobfiles import as_json, write_whole

Signature = tuple[tuple[str, int, int], ...]


@dataclass
class Arrivals:
    """Looks below `root`, whose folders are checkpoints; `listed` is the file of those taken.

    A checkpoint is taken when its format says that its writer has done with it, and none of its
    files has changed from one look to the next.
    """

    root: Path
    listed: Path
    _taken: dict[str, object] = field(default_factory=dict)
    _seen: dict[str, Signature] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise ConfigError(f"--watch: `{self.root}`: no such directory")
        if self.listed.exists():
            self._taken = dict(common.read_json(self.listed))

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was complete at the last look, and is taken if it stays as it is."""
        return bool(self._seen)

    def look(self) -> Iterator[Path]:
        """The checkpoints that are complete since the last look, each taken once it was handled."""
        before, self._seen = self._seen, {}
        for path in _folders(self.root):
            made = _made(path)
            if made is None or self._taken.get(path.name) == made or not _is_complete(path):
                continue
            now = _signature(path)
            if before.get(path.name) != now:
                self._seen[path.name] = now
                continue
            yield path
            self._take(path.name, made)

    def _take(self, name: str, made: int) -> None:
        """Remember a checkpoint, also for later services; others may have taken some meanwhile."""
        if self.listed.exists():
            self._taken |= common.read_json(self.listed)
        self._taken[name] = made
        write_whole(self.listed, as_json(self._taken))


def _folders(root: Path) -> list[Path]:
    """The folders below the root that are not hidden, nor ours, in the order of their steps."""
    with storage.explained("list", root):
        found = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(
        (path for path in found if ".partial-" not in path.name),
        key=lambda path: (int("".join(filter(str.isdecimal, path.name)) or "0"), path.name),
    )


def _made(folder: Path) -> int | None:
    """When something was last added to a folder; None where it is gone."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def _is_complete(path: Path) -> bool:
    """Whether a folder is a checkpoint whose writer has done with it."""
    try:
        return formats.detect(path).complete(path)
    except (ReshardError, OSError):  # not yet a checkpoint, or no more
        return False


def _signature(path: Path) -> Signature:
    """The files of a checkpoint with their sizes and times; a file that vanishes is a change."""
    found = []
    for file in sorted(path.rglob("*")):
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((str(file.relative_to(path)), status.st_size, status.st_mtime_ns))
    return tuple(found)
