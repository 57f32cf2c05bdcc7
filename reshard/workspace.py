"""The directories of a running job: lock, partial directory, and the rename that publishes it.

A target directory is absent or complete. Everything is written below `DST.partial-<digest>`, whose
name is that of the job: the same job finds it again and goes on. `DST.lock` keeps a second job
away.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from reshard.errors import CheckpointError, ConfigError, StorageError
from reshard.families.model import Json
from reshard.formats import common
from reshard.storage import locked, make_directory, remove_tree, rename, sync

DIGEST_SHOWN = 16
DATA, REPLACED, DISCARDED = "data", "replaced", "discarded"


class State(Enum):
    """What the start of a job found."""

    FRESH = "fresh"
    RESUMED = "resumed"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Workspace:
    """The paths of one job; `stem` begins the names of what lies beside the target meanwhile."""

    target: Path
    stem: str
    digest: str = ""

    @classmethod
    def of(cls, path: Path, folder: str) -> "Workspace":
        """That of a target published at `path`, or as `folder` below it.

        There, what is under way must not look like one of the folder's own directories.
        """
        return cls(path / folder, "reshard") if folder else cls(path, path.name)

    @property
    def partial(self) -> Path:
        """Where everything is written until it is complete."""
        return self._beside(f"partial-{self.digest[:DIGEST_SHOWN]}")

    @property
    def data(self) -> Path:
        """What will be the target."""
        return self.partial / DATA

    @property
    def journals(self) -> Path:
        """Where ranks journal their pieces."""
        return self.partial / "journals"

    def _beside(self, suffix: str) -> Path:
        return self.target.parent / f"{self.stem}.{suffix}"

    def _others(self) -> list[Path]:
        """Partial directories of other jobs for the same target."""
        prefix = f"{self.stem}.partial-"
        found = [path for path in self.target.parent.iterdir() if path.name.startswith(prefix)]
        return sorted(path for path in found if path != self.partial)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, or refuse; its file goes with it."""
        path = self._beside("lock")
        blocked = next((p for p in path.parents if os.path.lexists(p) and not p.is_dir()), None)
        if blocked is not None:
            raise ConfigError(f"`{blocked}`: is not a directory; choose another dst.path")
        make_directory(path.parent)
        with locked(path) as ours:
            if not ours:
                raise ConfigError(
                    f"`{self.target}`: another job is writing it (`{path}` is locked); wait for it"
                )
            yield

    def begin(self, *, force: bool) -> State:
        """Look at what is there; refuse what must not be touched, discard what --force gives up."""
        self._restore()
        if self.finished():
            self.discard()
            return State.DONE
        self._refuse_existing(force=force)
        for other in self._others():
            if not force and (other / DATA).is_dir():
                raise ConfigError(
                    f"`{other}`: the partial result of a job with another source, "
                    "target or version; repeat that job's command to finish it, "
                    "remove the directory, or give --force to discard it"
                )
            remove_tree(other)
        return State.RESUMED if self.journals.is_dir() else State.FRESH

    def _restore(self) -> None:
        """Put back a target that a job had moved out of the way when it was stopped."""
        for partial in (self.partial, *self._others()):
            old = partial / REPLACED
            if old.is_dir() and not os.path.lexists(self.target):
                rename(old, self.target)

    def make(self) -> None:
        """Make the partial directory where there is none."""
        make_directory(self.data)
        make_directory(self.journals)

    def finished(self) -> bool:
        """Whether the target is the finished result of this very job."""
        manifest = self.target / common.MANIFEST
        if not manifest.is_file():
            return False
        try:
            record = common.read_json(manifest)
        except CheckpointError:  # what cannot be read says of no job that it is done
            return False
        return record.get("job") == self.digest and self._whole(record.get("files"))

    def _whole(self, files: Json) -> bool:
        """Whether all files of the manifest are there in full length; else refuse the target."""
        for name, entry in files.items() if isinstance(files, dict) else ():
            path = self.target / common.confined(name, common.MANIFEST)
            size = entry.get("size") if isinstance(entry, dict) else None
            if not path.is_file() or path.stat().st_size != size:
                raise ConfigError(
                    f"`{path}`: missing or not of {size} bytes: `{self.target}` is the result of "
                    "this job, but damaged; remove it and run again (`verify` says more)"
                )
        return True

    def _refuse_existing(self, *, force: bool) -> None:
        """Refuse a target that holds something, unless it is ours and --force was given."""
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or os.path.ismount(self.target):
            raise ConfigError(
                f"`{self.target}`: is a symlink or a mount point, which cannot be replaced by a "
                "rename; give dst.path a directory below it"
            )
        if not self.target.is_dir():
            raise ConfigError(
                f"`{self.target}`: exists and is not a directory; choose another dst.path"
            )
        if not any(self.target.iterdir()):
            return
        ours = (self.target / common.MANIFEST).is_file()
        if not force:
            hint = "give --force to replace it" if ours else "choose another dst.path"
            raise ConfigError(f"`{self.target}`: exists and is not the result of this job; {hint}")
        if not ours:
            raise ConfigError(
                f"`{self.target}`: exists without our {common.MANIFEST}, so --force does not "
                "replace it; remove it yourself"
            )

    def publish(self, *, fsync: bool) -> None:
        """Give the data its final name; between an old target's rename and this, none is there."""
        replacing = self.target.is_dir() and any(self.target.iterdir())
        if replacing:
            rename(self.target, self.partial / REPLACED)
        try:
            rename(self.data, self.target)
        except StorageError:
            if replacing:
                rename(self.partial / REPLACED, self.target)
            raise
        if fsync:
            sync(self.target.parent)
        if replacing:  # what is half removed must not be taken for what is to be put back
            rename(self.partial / REPLACED, self.partial / DISCARDED)
        self.discard()

    def discard(self) -> None:
        """Remove the partial directory; what stays of it is removed by the next job."""
        with contextlib.suppress(StorageError):
            remove_tree(self.partial)


def require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is the source, lies in it, or holds it."""
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConfigError(
            f"dst.path: `{target}` and the source `{source}` are one, or one lies in the other"
        )


def require_shared(data: Path, rank: int) -> None:
    """Refuse a target directory that this rank does not see."""
    if not data.is_dir():
        raise StorageError(
            f"rank {rank} does not see `{data}`: "
            "dst.path must be on a file system that all ranks share"
        )
