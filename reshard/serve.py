"""A service: one group of ranks, and one job after another from a queue in a directory.

Rank 0 looks after the queue; in turns of a few seconds the ranks meet, and go through the job that
it has found together. What is wrong with a job, whatever it is and whichever rank meets it, ends
that job alone.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from reshard import config as configuration
from reshard import job, yamltext
from reshard.arrivals import Arrivals
from reshard.config import JobConfig
from reshard.distributed import Ranks
from reshard.errors import ConfigError, PeerError, ReshardError, StorageError, told
from reshard.families.model import Json
from reshard.jobfiles import DONE, FAILED, Claim, JobFiles
from reshard.smallfiles import discard_scratch

MAX_STARTS = 3
WATCHED = "watched.json"
STATUS_SECONDS = 5.0
OVER = ""
MIN_POLL, MAX_POLL = 0.01, 600.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a service is to do.

    `tree` holds the keys that the command line gives: those below `engine` are for all jobs, the
    others for what is found below `watch`. `poll` is in seconds; with `once` an empty queue is the
    end.
    """

    jobs: Path
    tree: Mapping[str, Json]
    watch: Path | None = None
    poll: float = 2.0
    once: bool = False

    def checked(self) -> JobConfig:
        """The configuration of the service; what would make every job fail is refused."""
        source, target = (dict(_branch(self.tree, side)) for side in ("src", "dst"))
        if self.watch is None and (source or target):
            raise ConfigError(
                "serve: src and dst come from the job files, or give --watch SRC_ROOT as well"
            )
        if self.watch is not None and not (target.get("path") and target.get("topology")):
            raise ConfigError(
                "serve --watch: where to? give --dst SPEC dst.path=DIR; every checkpoint goes to a "
                "folder of its own name in it"
            )
        if source.get("path"):
            raise ConfigError("serve --watch: leave src.path out: it is what appears in SRC_ROOT")
        if not MIN_POLL <= self.poll <= MAX_POLL:
            raise ConfigError(f"--poll: {self.poll:g}, expected {MIN_POLL:g} to {MAX_POLL:g} s")
        return configuration.of_tree(self.tree)

    def job_of(self, checkpoint: Path) -> dict[str, Json]:
        """The job that a checkpoint becomes."""
        folder = Path(str(_branch(self.tree, "dst")["path"]))
        paths: dict[str, Json] = {
            "src": {"path": str(checkpoint.absolute())},
            "dst": {"path": str(folder / checkpoint.name)},
        }
        return configuration.merged([self.tree, paths])


def _branch(tree: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    branch = tree.get(name)
    return branch if isinstance(branch, dict) else {}


def serve(request: Request, ranks: Ranks, say: Callable[[str], None], *, verbose: bool) -> None:
    """Serve until stopped, or until the queue is empty where that was asked for."""
    service = _Service(request, ranks, say, verbose)
    ranks.together(service.open)
    ranks.endure(service.farewell)
    with service.reporting():
        while (name := service.next()) is not OVER:
            if name is not None:
                service.do(name)


class _Service:
    """One rank of a service; what concerns the queue is rank 0's."""

    def __init__(
        self, request: Request, ranks: Ranks, say: Callable[[str], None], verbose: bool
    ) -> None:
        self._request, self._ranks, self._say, self._verbose = request, ranks, say, verbose
        self._first = ranks.rank == 0
        self._files = JobFiles(request.jobs)
        self._arrivals: Arrivals | None = None
        self._claim: Claim | None = None
        self._held = contextlib.ExitStack()
        self._state, self._since = "idle", _now()
        self._writing = threading.Lock()

    def open(self) -> None:
        """Make the queue, and look that it can be used."""
        if not self._first:
            return
        self._files.make()
        if self._request.watch is not None:
            self._arrivals = Arrivals(self._request.watch, self._request.jobs / WATCHED)
        self._enter("idle")
        self._say(f"serving {self._request.jobs} on {self._ranks.world} ranks")

    # Between jobs.

    def next(self) -> str | None:
        """The name of the next job, for all ranks; None where there is none yet, OVER if ever."""
        self._ranks.phase("idle")
        name = self._ranks.together(lambda: self._find() if self._first else None)
        return self._ranks.gather(name)[0]

    def _find(self) -> str | None:
        """Claim a job; without one, wait a while."""
        for checkpoint in self._arrivals.look() if self._arrivals is not None else ():
            name = f"{checkpoint.parent.name}-{checkpoint.name}"
            self._files.add(name, yamltext.written(self._request.job_of(checkpoint)))
        self._claim = self._held.enter_context(self._files.claimed())
        if self._claim is not None:
            self._enter("running")
            return self._claim.name
        if self._request.once and not (self._arrivals is not None and self._arrivals.pending):
            return OVER
        time.sleep(self._request.poll)
        return None

    # A job.

    def do(self, name: str) -> None:
        """Go through a job with all ranks, and say in one line what came of it."""
        begun = time.monotonic()
        try:
            record, line = self._run()
            state = DONE
        except PeerError:
            raise
        except Exception as error:  # whatever is wrong with one job, the next is another
            message, code = told(self._settled(error))
            state, line = FAILED, f"failed: {message}"
            record = {"state": FAILED, "error": message, "exit_code": code}
            record["seconds"] = {"total": time.monotonic() - begun}
        self._ranks.resumable(False)
        discard_scratch()
        self._ranks.together(lambda: self._end(state, record, f"{name}: {line}"))

    def _run(self) -> tuple[dict[str, object], str]:
        """Read the job file and do as it says; the report, and its line."""
        ranks = self._ranks
        tree = ranks.gather(ranks.together(lambda: self._tree()))[0]
        config = configuration.of_tree(tree)
        if config.engine.backend not in ("auto", ranks.backend):
            raise ConfigError(
                f"engine.backend={config.engine.backend}: this service runs on {ranks.backend}; "
                "leave the key out of job files"
            )
        say = self._say if self._first and self._verbose else lambda line: None
        report = job.run(config, ranks, force=False, say=say)
        ranks.barrier("job done")  # an error after this would be the next job's
        return report.record(), report.last_line()

    def _tree(self) -> dict[str, Json]:
        """The job file with the engine's keys of the command line."""
        claim = self._claim
        if claim is None:
            return {}
        if claim.starts > MAX_STARTS:
            raise StorageError(
                f"the service ended {MAX_STARTS} times in the middle of this job; see its log, "
                "then put the file back into queued/"
            )
        engine = {"engine": dict(_branch(self._request.tree, "engine"))}
        return configuration.merged([yamltext.read(claim.path), engine])

    def _settled(self, error: Exception) -> ReshardError:
        """An error as all ranks have it, in place of one that this rank has met alone."""
        if isinstance(error, ReshardError) and error.settled:
            return error
        own = error if isinstance(error, ReshardError) else StorageError(told(error)[0])
        try:
            self._ranks.settle(own)
        except PeerError:
            raise
        except ReshardError as met:
            return met
        return own

    def _end(self, state: str, record: Mapping[str, object], line: str) -> None:
        """Bring the job's file to where it belongs, say so, and give it up."""
        if self._claim is not None:
            self._files.end(self._claim, state, record)
            self._claim = None
            self._say(line)
            self._held.close()
            self._enter("idle")

    # What it says of itself.

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Write the status file every few seconds."""
        over = threading.Event()

        def write() -> None:
            while not over.wait(STATUS_SECONDS):
                self._status()

        thread = threading.Thread(target=write, name="status", daemon=True)
        if self._first:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if self._first:
                thread.join()
                self._enter("over")

    def farewell(self) -> None:
        """Leave in good order when the service is stopped; called in the watcher's thread."""
        if not self._first:
            return
        claim, doing = self._claim, ""
        if claim is not None:
            self._files.put_back(claim)
            doing = f"; {claim.name} stays in running/, and the next start goes on with it"
        self._enter("stopped")
        self._say(f"stopped{doing}")

    def _enter(self, state: str) -> None:
        self._state, self._since = state, _now()
        self._status()

    def _status(self) -> None:
        """Write the status file; that it cannot be written is no reason to end."""
        with self._writing, contextlib.suppress(ReshardError):
            record = {
                "state": self._state,
                "job": self._claim.name if self._claim is not None else None,
                "phase": self._ranks.activity.phase,
                "since": self._since,
                "updated": _now(),
                "world": self._ranks.world,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                **self._files.counts(),
            }
            self._files.status(record)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
