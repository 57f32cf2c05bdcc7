"""What a service is asked to do, checked as far as that can be before any job is there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reshard import config as configuration
from reshard.config import JobConfig
from reshard.errors import ConfigError
from reshard.families.model import Json

MIN_POLL, MAX_POLL = 0.01, 600.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a service is to do.

    `tree` holds the keys that the command line gives: those below `engine` are for all jobs, the
    others for what is found below `watch`. `poll` is in seconds; with `once` an empty queue is the
    end; `force` replaces or discards what is in a job's way.
    """

    jobs: Path
    tree: Mapping[str, Json]
    watch: Path | None = None
    poll: float = 2.0
    once: bool = False
    force: bool = False

    def checked(self) -> JobConfig:
        """The configuration of the service; what would make every job fail is refused."""
        source, target = (dict(branch(self.tree, side)) for side in ("src", "dst"))
        if self.jobs.exists() and not self.jobs.is_dir():
            raise ConfigError(f"--jobs: `{self.jobs}` is not a directory; name one")
        if self.watch is None and (source or target):
            raise ConfigError(
                "serve: src and dst come from the job files, or give --watch SRC_ROOT as well"
            )
        if self.watch is not None and not (target.get("path") and target.get("topology")):
            raise ConfigError(
                "serve --watch: where to? give --dst SPEC dst.path=DIR; every checkpoint goes to a "
                "folder of its own name in it"
            )
        if self.watch is not None and _lies_in(Path(str(target["path"])), self.watch):
            raise ConfigError(
                f"dst.path: `{target['path']}` lies in what is watched, `{self.watch}`; its "
                "results would be taken for checkpoints; name another directory"
            )
        if source.get("path"):
            raise ConfigError("serve --watch: leave src.path out: it is what appears in SRC_ROOT")
        if not MIN_POLL <= self.poll <= MAX_POLL:
            raise ConfigError(f"--poll: {self.poll:g}, expected {MIN_POLL:g} to {MAX_POLL:g} s")
        return configuration.of_tree(self.tree)

    def job_of(self, checkpoint: Path) -> dict[str, Json]:
        """The job that a checkpoint becomes."""
        folder = Path(str(branch(self.tree, "dst")["path"]))
        paths: dict[str, Json] = {
            "src": {"path": str(checkpoint.absolute())},
            "dst": {"path": str(folder / checkpoint.name)},
        }
        return configuration.merged([self.tree, paths])


def _lies_in(inner: Path, outer: Path) -> bool:
    there = outer.resolve()
    return there == inner.resolve() or there in inner.resolve().parents


def branch(tree: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    """A side of a job, or its engine; {} where nothing of it is said."""
    branch = tree.get(name)
    return branch if isinstance(branch, dict) else {}
