"""The directories of a running job: lock, partial directory, and the rename that publishes it.

A target directory is absent or complete. Everything is written below `DST.partial-<digest>`, whose
name is that of the job: the same job finds it again and goes on. `DST.lock` keeps a second job
away.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from reshard.errors import ConfigError, StorageError
from reshard.families.model import Json
from reshard.formats import common
from reshard.storage import explained, sync

DIGEST_SHOWN = 16


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
        return self.partial / "data"

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
        with explained("create", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not _taken(descriptor, path):
            os.close(descriptor)
            raise ConfigError(
                f"`{self.target}`: another job is writing it (`{path}` is locked); wait for it"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def begin(self, *, force: bool) -> State:
        """Look at what is there; refuse what must not be touched, discard what --force gives up."""
        if self.finished():
            shutil.rmtree(self.partial, ignore_errors=True)
            return State.DONE
        self._refuse_existing(force=force)
        for other in self._others():
            if not force:
                raise ConfigError(
                    f"`{other}`: the partial result of a job with another source, "
                    "target or version; repeat that job's command to finish it, "
                    "remove the directory, or give --force to discard it"
                )
            shutil.rmtree(other)
        return State.RESUMED if self.journals.is_dir() else State.FRESH

    def make(self) -> None:
        """Make the partial directory where there is none."""
        with explained("create", self.partial):
            self.data.mkdir(parents=True, exist_ok=True)
            self.journals.mkdir(exist_ok=True)

    def finished(self) -> bool:
        """Whether the target is the finished result of this very job."""
        manifest = self.target / common.MANIFEST
        if not manifest.is_file():
            return False
        record = common.read_json(manifest)
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
        old = self.partial / "replaced"
        with explained("publish", self.target):
            if self.target.is_dir() and any(self.target.iterdir()):
                self.target.rename(old)
            self.data.rename(self.target)
        if fsync:
            sync(self.target.parent)
        shutil.rmtree(self.partial, ignore_errors=True)

    def discard(self) -> None:
        """Remove the partial result of a job that turned out to be refused."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _taken(descriptor: int, path: Path) -> bool:
    """Whether the lock is ours, on the file that has the name now and not on one just removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        return False


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
