"""One job, from config to published directory: the one place where formats meet the engine."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from reshard import commit, journal
from reshard.casts import Losses, summary
from reshard.checks import Check
from reshard.config import JobConfig
from reshard.dealing import files_of
from reshard.distributed import Ranks
from reshard.engine import Counters, Engine
from reshard.errors import CheckpointError, ConfigError, ReshardError
from reshard.finish import Finish, library_versions
from reshard.formats import common
from reshard.formats.options import Scan
from reshard.geometry import whole
from reshard.journal import Journal, Table
from reshard.logs import LOG
from reshard.machines import machines_apart
from reshard.plan import Plan
from reshard.prepare import Prepared, job_digest, prepare, source_states
from reshard.progress import Progress
from reshard.replicas import compare
from reshard.report import Figures, Report, memory_of
from reshard.resume import intact_runs
from reshard.room import round_bytes
from reshard.space import allocated_bytes, require_space
from reshard.storage import Files
from reshard.units import size_text
from reshard.view import through, within
from reshard.workspace import State, Workspace, require_apart, require_shared

MACHINES_APART = (
    "engine.shared_files: each file is written by the ranks of one machine, since the file system "
    "may not keep apart what several write (always|never says otherwise)"
)


def run(config: JobConfig, ranks: Ranks, *, force: bool, say: Callable[[str], None]) -> Report:
    """Do the whole job on all ranks; the report is complete on rank 0."""
    begun, import_rss = time.monotonic(), memory_of("VmRSS")
    ranks.phase("plan")
    prepared = prepare(config, ranks)
    with through(prepared.view):
        return _under_way(prepared, ranks, say, begun, import_rss).go(force=force)


def _under_way(
    prepared: Prepared, ranks: Ranks, say: Callable[[str], None], begun: float, import_rss: int
) -> "_Run":
    """A job that all ranks agree on, and that only has to be done."""
    config = prepared.config
    if config.target.path is None:
        raise ConfigError("dst.path: where to? give dst.path=DIR")
    scan = prepared.scan
    if scan is None:
        raise ConfigError("src.path: which checkpoint? give src.path=DIR")
    workspace = Workspace.of(config.target.path, prepared.target_format.FOLDER)
    require_apart(prepared.root(scan), workspace.target)
    files = files_of(ranks.rank, ranks.world, scan.layout.files, prepared.local)
    ranks.together(within(prepared.view, lambda: common.check_headers(scan, files)))
    machines = machines_apart(ranks, workspace.target, config.engine.shared_files)
    plan = ranks.together(lambda: prepared.plan(ranks.world, machines))
    capacity = ranks.together(lambda: round_bytes(config.engine.memory, plan))
    states = tuple(source_states(scan))
    digest = job_digest(prepared, plan)
    workspace = replace(workspace, digest=digest)
    agreed = (plan.digest(digest), capacity, config.strict_replicas, library_versions(plan))
    ranks.agree("plan", repr(agreed))
    apart = (MACHINES_APART,) if machines else ()
    for line in (*prepared.notes, *apart) if ranks.rank == 0 else ():
        say(line)
    return _Run(
        prepared,
        scan,
        plan,
        ranks,
        workspace,
        states,
        capacity,
        say,
        begun,
        import_rss,
    )


@dataclass
class _Run:
    """A job under way on one rank."""

    prepared: Prepared
    scan: Scan
    plan: Plan
    ranks: Ranks
    workspace: Workspace
    states: tuple[tuple[str, int, int], ...]
    capacity: int
    say: Callable[[str], None]
    begun: float
    import_rss: int

    def go(self, *, force: bool) -> Report:
        """Lock, move, commit, publish."""
        ranks, seconds = (
            self.ranks,
            {"plan": time.monotonic() - self.begun, "move": 0.0, "commit": 0.0},
        )
        counters = Counters()
        warnings: list[str] = []
        with contextlib.ExitStack() as stack:
            ranks.together(lambda: self._check_place(force))
            ranks.together(lambda: stack.enter_context(self._locked()))
            places = commit.TargetPlaces(self.plan.target)
            state = ranks.gather(ranks.together(lambda: self._begin(places, force)))[0]
            if state is not State.DONE:
                ranks.resumable(True)
                moved = time.monotonic()
                counters, warnings = self._move(places, state)
                seconds["move"], committing = time.monotonic() - moved, time.monotonic()
                rest = Finish(self.prepared, self.scan, self.plan, ranks, self.workspace, force)
                counters.written += rest.run(places)
                seconds["commit"] = time.monotonic() - committing
                ranks.resumable(False)
        return self._report(state, seconds, counters, warnings)

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """The lock of the target, which rank 0 holds for all."""
        return self.workspace.locked() if self.ranks.rank == 0 else contextlib.nullcontext()

    def _check_place(self, force: bool) -> None:
        """Refuse, before anything is made, a place in which the target would be of no use."""
        if self.ranks.rank == 0 and not self.workspace.finished(force=force):
            self.prepared.target_format.check_place(self.workspace.target.parent)

    def _begin(self, places: commit.TargetPlaces, force: bool) -> State:
        """Rank 0, whose answer counts, looks at the target and makes the partial directory."""
        if self.ranks.rank != 0:
            return State.FRESH
        path = self.workspace.target
        state = self.workspace.begin(force=force)
        if state is not State.DONE:
            require_space(path.parent, places.size(), allocated_bytes(self.workspace.data))
            self.workspace.make()
        return state

    def _own_files(self) -> tuple[str, ...]:
        """The target files that this rank lays out and finishes."""
        ranks, files = self.ranks, self.plan.target.files
        return tuple(files_of(ranks.rank, ranks.world, files, self.plan.file_writers))

    def _move(self, places: commit.TargetPlaces, state: State) -> tuple[Counters, list[str]]:
        """Lay out the files, run the rounds, and compare what the source holds more than once."""
        ranks, workspace = self.ranks, self.workspace
        ranks.together(lambda: require_shared(workspace.data, ranks.rank))
        written = ranks.together(
            lambda: commit.lay_out(workspace.data, self.plan.target, places, self._own_files())
        )
        attempt = ranks.together(lambda: journal.next_attempt(workspace.journals))
        done = (
            intact_runs(self.plan, ranks, workspace, self._own_files())
            if state is State.RESUMED
            else Table.empty()
        )
        ranks.barrier("files laid out")
        counters, checks, losses = ranks.together(lambda: self._run_rounds(places, attempt, done))
        counters.written += written
        ranks.barrier("moved")
        lost = summary(found for part in ranks.gather(losses) for found in part)
        warnings = [*self._judge(checks), *lost]
        for line in warnings if ranks.rank == 0 else ():
            self.say(f"warning: {line}")
        return counters, warnings

    def _run_rounds(
        self, places: commit.TargetPlaces, attempt: int, done: Table
    ) -> tuple[Counters, list[Check], tuple[Losses, ...]]:
        """Run this rank's rounds, and bring what it wrote to the disk of the machine it runs on."""
        ranks = self.ranks
        crossing = ranks.world > 1 and self.plan.exchange == "collective"
        with (
            contextlib.closing(Files(self.scan.root, os.O_RDONLY)) as reading,
            contextlib.closing(
                Files(self.workspace.data, os.O_WRONLY, through=self.prepared.config.engine.fsync)
            ) as writing,
            Journal(self.workspace.journals, attempt, ranks.rank) as records,
        ):
            engine = Engine(
                self.plan,
                ranks.rank,
                capacity=self.capacity,
                source=(reading, commit.SourcePlaces(self.scan.root, self.scan.layout.container)),
                target=(writing, places),
                exchange=ranks if crossing else None,
                journal=records,
                done=done,
                pinned=crossing and ranks.cuda,
                on_error=self._trouble,
            )
            ranks.phase("move")
            with Progress(self._share(), ranks.rank == 0, ranks.step) as progress:
                try:
                    engine.run(progress.add)
                except Exception as error:  # others may wait for messages, where none meets them
                    self._trouble(error)
                    raise
            if self.prepared.config.engine.fsync:
                # A sync elsewhere need not reach what this machine still holds back.
                writing.sync(ranks.step)
                records.sync()
        return engine.counters, engine.checks, engine.losses

    def _trouble(self, error: BaseException) -> None:
        """Tell of an error while this rank may wait for others; paths as the user has them."""
        view = self.prepared.view
        if view is not None and isinstance(error, ReshardError):
            view.rename(error)
        self.ranks.trouble(error)

    def _share(self) -> int:
        """Bytes of the blocks that this rank goes through: all of them in collective mode."""
        places = self.plan.target.places.values()
        total = sum(
            whole(slots[0].placement.shape).numel * slots[0].dtype.itemsize for slots in places
        )
        return total if self.plan.exchange == "collective" else total // self.ranks.world

    def _judge(self, checks: list[Check]) -> list[str]:
        """Have the first rank compare copies, and look whether the source is as it was.

        A result that is worthless is gone before any rank hears of it. Returns warnings.
        """
        place = {name: number for number, name in enumerate(self.plan.names)}
        found = [check for part in self.ranks.gather(checks) for check in part]
        found.sort(key=lambda check: (place[check.parameter], check.region.start, check.of))
        root, strict = self.scan.root, self.prepared.config.strict_replicas
        told = self.ranks.gather(self.ranks.together(self._changed))
        changed = [line for line in told if line is not None]

        def judge() -> list[str]:
            if self.ranks.rank != 0:
                return []
            try:
                warnings = compare(found, root, self.scan.layout.container, strict=strict)
                if changed:
                    raise CheckpointError(changed[0])
            except CheckpointError:
                self.workspace.discard()
                raise
            return warnings

        return self.ranks.together(judge)

    def _changed(self) -> str | None:
        """Why nothing is published: another program wrote a file meanwhile that was read here.

        Where all ranks see all files the first one looks for all.
        """
        if self.ranks.rank != 0 and self.prepared.view is None:
            return None
        changed = sorted(set(self.states) ^ set(source_states(self.scan)))
        if not changed:
            return None
        return (
            f"`{self.scan.root / changed[0][0]}`: was changed while it was read; nothing is "
            "published; run again when no other program writes it"
        )

    def _report(
        self, state: State, seconds: dict[str, float], counters: Counters, warnings: list[str]
    ) -> Report:
        """Gather what every rank has to say."""
        seconds["total"] = time.monotonic() - self.begun
        self.ranks.phase("report")
        mine = Figures(counters, memory_of("VmHWM"), self.import_rss)
        LOG.debug("%s; peak memory %s", counters.text(), size_text(mine.peak_rss))
        path = self.workspace.target
        return Report(
            plan=self.plan,
            target=path,
            state=state.value,
            seconds=seconds,
            ranks=self.ranks.gather(mine),
            file_bytes=_file_bytes(path) if self.ranks.rank == 0 else 0,
            purpose=self.prepared.target_format.purpose(self.prepared.target_options),
            notes=self.prepared.notes,
            warnings=warnings,
            readiness=self.prepared.readiness(),
        )


def _file_bytes(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
