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
from datetime import datetime, timezone

from reshard import config as configuration
from reshard import job, yamltext
from reshard.arrivals import Arrivals
from reshard.distributed import Ranks
from reshard.errors import (
    ConfigError,
    PeerError,
    ReshardError,
    StorageError,
    printable,
    told,
)
from reshard.families.model import Json
from reshard.jobfiles import DONE, FAILED, Claim, JobFiles
from reshard.lastwords import within_a_second
from reshard.orders import Request, branch
from reshard.smallfiles import discard_scratch

MAX_STARTS = 5
WATCHED = "watched.json"
STATUS_SECONDS, PAUSE_SECONDS = 5.0, 0.5
OVER = ""


def serve(request: Request, ranks: Ranks, say: Callable[[str], None], *, verbose: bool) -> None:
    """Serve until stopped, or until the queue is empty where that was asked for."""
    service = _Service(request, ranks, say, verbose)
    ranks.together(service.open)
    ranks.endure(service.farewell)
    with service.reporting():
        while (name := service.next()) != OVER:
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
        self._told: set[str] = set()

    def open(self) -> None:
        """Make the queue, and look that it can be used."""
        if not self._first:
            return
        self._files.make()
        if self._request.watch is not None:
            self._arrivals = Arrivals(self._request.watch, self._request.jobs / WATCHED)
        self._enter("idle")
        world = self._ranks.world
        self._say(f"serving {self._request.jobs} on {world} rank{'s' * (world > 1)}")

    # Between jobs.

    def next(self) -> str | None:
        """The name of the next job, for all ranks; None where there is none yet, OVER if ever."""
        self._ranks.phase("idle")
        name = self._ranks.together(lambda: self._find() if self._first else None)
        return self._ranks.gather(name)[0]

    def _find(self) -> str | None:
        """Claim a job; without one, wait a while."""
        self._take_arrivals()
        for name in self._files.strays():
            self._once(f"queued/{name}: is left alone: a job is a file whose name ends with .yaml")
        self._claim = self._held.enter_context(self._files.claimed())
        if self._claim is not None:
            self._enter("running")
            return self._claim.name
        if self._request.once and not (self._arrivals is not None and self._arrivals.pending):
            return OVER
        self._held.close()
        until = time.monotonic() + self._request.poll
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, PAUSE_SECONDS))
            self._ranks.step()
        return None

    def _take_arrivals(self) -> None:
        """Make jobs of new checkpoints; a run's folder that is gone may come back."""
        try:
            for checkpoint in self._arrivals.look() if self._arrivals is not None else ():
                name = f"{checkpoint.parent.resolve().name}-{checkpoint.name}".lstrip(".-")
                self._files.add(name, yamltext.written(self._request.job_of(checkpoint)))
        except StorageError as error:
            self._once(f"warning: {error}; it is looked for again")

    def _once(self, line: str) -> None:
        """Say what would be the same at every look."""
        if line not in self._told:
            self._told.add(line)
            self._say(printable(line))

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
        tree = ranks.gather(ranks.together(self._tree))[0]
        config = configuration.of_tree(tree)
        if config.engine.backend not in ("auto", ranks.backend):
            raise ConfigError(
                f"engine.backend={config.engine.backend}: this service runs on {ranks.backend}; "
                "leave the key out of job files"
            )
        say = self._say if self._first and self._verbose else lambda line: None
        report = job.run(config, ranks, force=self._request.force, say=say)
        found = report.record(), report.last_line()
        ranks.barrier("job done")  # an error after this would be the next job's
        return found

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
        engine = {"engine": dict(branch(self._request.tree, "engine"))}
        if not claim.path.stat().st_size:
            raise ConfigError(f"`{claim.path.name}` is empty; write src and dst into it")
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
        state = "failed"
        try:
            yield
            state = "over"
        except KeyboardInterrupt:
            state = "stopped"
            raise
        finally:
            over.set()
            if self._first:
                within_a_second(lambda: self._enter(state))  # the disk may hang

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
