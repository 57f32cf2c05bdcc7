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
from reshard.locks import locked
from reshard.storage import make_directory, remove_tree, rename, sync

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
        _make_lasting(path.parent)
        with locked(path) as ours:
            if not ours:
                raise ConfigError(
                    f"`{self.target}`: another job is writing it (`{path}` is locked); wait for it"
                )
            yield

    def begin(self, *, force: bool) -> State:
        """Look at what is there; refuse what must not be touched, discard what --force gives up."""
        self._restore()
        if self.finished(force=force):
            self.discard()
            return State.DONE
        self._refuse_existing(force=force)
        for other in self._others():
            if not force and (other / DATA).is_dir():
                raise ConfigError(
                    f"`{other}`: the partial result of a job with another source (a file of "
                    "another size or time is another one), target or version; repeat that job's "
                    "command to finish it, remove the directory, or give --force to discard it"
                )
            remove_tree(other)
        return State.RESUMED if self.journals.is_dir() else State.FRESH

    def _restore(self) -> None:
        """Put back a target that a job had moved out of the way when it was stopped."""
        for partial in (self.partial, *self._others()):
            old = partial / REPLACED
            if not old.is_dir() or not (partial / DATA).is_dir():
                continue  # nothing is aside, or the new one is in its place
            if _occupied(self.target):
                raise ConfigError(
                    f"`{old}`: an earlier `{self.target}`, which a stopped job had moved aside; "
                    "move it away, or remove it if what is there now is better"
                )
            rename(old, self.target)

    def make(self) -> None:
        """Make the partial directory where there is none."""
        make_directory(self.data)
        make_directory(self.journals)

    def finished(self, *, force: bool = False) -> bool:
        """Whether the target is the finished result of this very job; a damaged one is refused.

        With `force` it is not finished, and will be replaced.
        """
        manifest = self.target / common.MANIFEST
        if not manifest.is_file():
            return False
        try:
            record = common.read_json(manifest)
        except CheckpointError:  # what cannot be read says of no job that it is done
            return False
        if record.get("job") != self.digest:
            return False
        damaged = self._damaged(record.get("files"))
        if damaged is not None and not force:
            raise ConfigError(
                f"`{damaged}`: missing or cut: `{self.target}` is the result of this job, but "
                "damaged (`verify` says more); give --force to replace it"
            )
        return damaged is None

    def _damaged(self, files: Json) -> Path | None:
        """A file of the manifest that is not there in full length, if there is one."""
        for name, entry in files.items() if isinstance(files, dict) else ():
            path = self.target / common.confined(name, common.MANIFEST)
            size = entry.get("size") if isinstance(entry, dict) else None
            if not path.is_file() or path.stat().st_size != size:
                return path
        return None

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
        if not _occupied(self.target):
            return
        ours = (self.target / common.MANIFEST).is_file()
        if not force:
            hint = "give --force to replace it" if ours else "choose another dst.path"
            raise ConfigError(
                f"`{self.target}`: exists and is not the result of this job (a source file of "
                f"another size or time makes it another one); {hint}"
            )
        if not ours:
            raise ConfigError(
                f"`{self.target}`: exists without our {common.MANIFEST}, so --force does not "
                "replace it; remove it yourself"
            )

    def publish(self, *, force: bool, fsync: bool) -> None:
        """Give the data its final name; between an old target's rename and this, none is there.

        What has come to the target since the job began is treated as if it had been there then.
        """
        self._refuse_existing(force=force)
        replacing = _occupied(self.target)
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

    def discard(self) -> None:
        """Remove the partial directory; what stays of it is removed by the next job."""
        with contextlib.suppress(StorageError):
            remove_tree(self.partial)


def _make_lasting(folder: Path) -> None:
    """Make a directory that is there after a power loss too."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    make_directory(folder)
    for path in new:
        sync(path.parent)


def _occupied(target: Path) -> bool:
    """Whether something is there; an empty directory counts as nothing."""
    return os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))


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
