"""What each verb of the command line does, once its words are sorted."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard import config as configuration
from reshard import fit as fitting
from reshard import inspect as inspection
from reshard import job, loading, report
from reshard import serve as service
from reshard import verify as verification
from reshard.bounds import Nodes, bound_line
from reshard.buffers import ALIGN
from reshard.compare import against_other
from reshard.config import JobConfig
from reshard.demo import Demo
from reshard.distributed import Ranks
from reshard.errors import ConfigError
from reshard.formats.common import MANIFEST
from reshard.meeting import launched_rank
from reshard.orders import Request
from reshard.pictures import Memory, figures_of, page
from reshard.plan import Plan
from reshard.prepare import prepare
from reshard.room import least_memory, planned_memory
from reshard.schedule import least_capacity
from reshard.storage import explained
from reshard.traffic import loads_by_rank

RANKS_PER_NODE = 8
MOST_RANKS = 1 << 16


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its flags, paths and KEY=VALUE items.

    `typed` is all of it; `start` has the ranks meet; `say` prints lines, on the first rank; `tell`
    a line that a quiet command leaves out.
    """

    flags: argparse.Namespace
    paths: Sequence[str]
    overrides: Sequence[str]
    typed: str
    start: Callable[[str, float], Ranks]
    say: Callable[[Sequence[str]], None]
    tell: Callable[[str], None]

    def config(self) -> JobConfig:
        """The job that the command describes."""
        flags = self.flags
        return configuration.load(flags.src, flags.dst, self.overrides, flags.config)

    def meet(self, config: JobConfig) -> Ranks:
        """Meet the other ranks."""
        return self.start(config.engine.backend, config.engine.timeout)


def run(command: Command) -> int:
    """Reshard; without any path, the demo."""
    config, flags = command.config(), command.flags
    met = command.meet(config)
    files = {flag: Path(name) for flag in ("report", "html") if (name := getattr(flags, flag))}
    met.together(lambda: _check_writable(files) if met.rank == 0 else None)
    if config.source.path is None and config.target.path is None:
        demo = Demo(config, Path("reshard-demo"))
        command.tell(demo.first_line())
        config = demo.make_source(met)
    figures = job.run(config, met, force=flags.force, say=command.tell)
    if met.rank == 0:
        texts = {"report": figures.to_json, "html": lambda: _picture(command, config, figures)}
        _write(files, texts, f"report on `{figures.target}`, which is complete")
    if figures.state != "done":
        command.tell(figures.readiness.line())
    command.tell(figures.last_line())
    met.barrier("done")
    met.close()
    return 0


def _check_writable(files: Mapping[str, Path]) -> None:
    """Refuse a report that could not be written, before a job of hours; nothing is made."""
    for flag, file in files.items():
        if file.is_dir():
            raise ConfigError(f"--{flag}: `{file}` is a directory; name a file")
        if not file.parent.is_dir():
            raise ConfigError(f"--{flag}: `{file}`: its directory does not exist; make it first")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ConfigError(f"--{flag}: `{file}` cannot be written: permission denied")


def _write(
    files: Mapping[str, Path], texts: Mapping[str, Callable[[], str]], what: str = "write"
) -> None:
    """Write what the flags asked for; `what` is said where that fails."""
    for flag, file in files.items():
        with explained(what, file):
            file.write_text(texts[flag](), encoding="utf-8")


def _picture(command: Command, config: JobConfig, figures: report.Report) -> str:
    """The page of a job that was done."""
    limit, plan = config.engine.memory, figures.plan
    memory = Memory(limit, planned=planned_memory(limit, plan))
    shown = figures_of(plan)
    return page(shown, memory, notes=figures.notes, command=command.typed, report=figures)


def plan(command: Command) -> int:
    """Print what would happen."""
    config = command.config()
    if launched_rank() != 0:
        return 0
    world = command.flags.world if command.flags.world is not None else 1
    if not 1 <= world <= MOST_RANKS:
        raise ConfigError(f"--world: {world} is not a number of ranks from 1 to {MOST_RANKS:,}")
    files = {"html": Path(name)} if (name := command.flags.html) else {}
    _check_writable(files)
    nodes = _nodes(command.flags)
    prepared, limit = prepare(config), config.engine.memory
    planned = prepared.plan(world, _apart(command.flags, config, world))
    least = least_memory(planned, least_capacity(planned, ALIGN))
    shown = figures_of(planned) if files else None
    loads = loads_by_rank(planned) if shown is None else shown.loads
    further = [bound_line(planned, loads, nodes)] if nodes is not None else []
    further += _advice(command.flags, config, planned, least)
    command.say(report.plan_lines(prepared, planned, loads, (limit, least), further))
    if shown is not None:
        memory = Memory(limit, least, planned_memory(limit, planned) if limit >= least else 0)
        model, notes = prepared.model.describe(), prepared.notes
        drawn = page(shown, memory, model=model, notes=notes, command=command.typed)
        _write(files, {"html": lambda: drawn})
    return 0


def _nodes(flags: argparse.Namespace) -> Nodes | None:
    """What the flags say of disks and networks, if anything."""
    if flags.per_node is not None and flags.per_node < 1:
        raise ConfigError(f"--per-node: {flags.per_node} is not a number of ranks")
    if flags.disk is None and flags.net is None:
        return None
    return Nodes(flags.per_node or RANKS_PER_NODE, flags.disk, flags.net)


def _apart(flags: argparse.Namespace, config: JobConfig, world: int) -> tuple[int, ...]:
    """The machine of each rank where no two of them may write one file."""
    ranks = flags.per_node or RANKS_PER_NODE
    apart = config.engine.shared_files == "never" and world > ranks
    return tuple(rank // ranks for rank in range(world)) if apart else ()


def _advice(flags: argparse.Namespace, config: JobConfig, planned: Plan, least: int) -> list[str]:
    """What the user of a plan has to know, or can do better."""
    engine, ranks = config.engine, flags.per_node or RANKS_PER_NODE
    lines = []
    if engine.memory < least:
        lines.append(f"too little memory: `run` refuses it; use engine.memory={least >> 20}MiB")
    if planned.world > ranks and engine.shared_files == "auto":
        lines.append(
            f"nodes of {ranks} ranks may write one file here, which not every file system allows "
            "(NFS); engine.shared_files=never shows the plan where it does not"
        )
    return lines


def inspect(command: Command) -> int:
    """Print what a directory holds."""
    options = configuration.load(None, None, command.overrides, None).source.options
    if len(command.paths) != 1:
        raise ConfigError("inspect: give one directory")
    if launched_rank() != 0:
        return 0
    path = Path(command.paths[0])
    found = inspection.inspect(path, options, checksums=command.flags.checksums)
    command.say([json.dumps(found.to_json(), indent=2)] if command.flags.json else found.lines())
    return 1 if found.problems else 0


def fit(command: Command) -> int:
    """Print which layouts fit the GPUs, and what to type."""
    flags = command.flags
    if flags.gpus is None:
        raise ConfigError("fit: which GPUs? give --gpus 4xH100, 10x48GiB or 2x8xH100")
    if launched_rank() != 0:
        return 0
    words: tuple[str, ...] = () if flags.src is None else ("--src", flags.src)
    batch = flags.batch if flags.batch is not None else 1
    words += tuple(item for item in command.overrides if item.startswith("src."))
    request = fitting.Request(flags.gpus, flags.context, batch, words)
    answer = fitting.fit(command.config().source, request)
    command.say([json.dumps(answer.to_json(), indent=2)] if flags.json else answer.lines())
    return 0


def verify(command: Command) -> int:
    """Compare two checkpoints, or one with its manifest, or open one with its target's library."""
    config, flags = configuration.load(None, None, command.overrides, None), command.flags
    if len(command.paths) not in (1, 2):
        raise ConfigError("verify: give a directory, or two")
    if flags.cast and len(command.paths) == 1:
        raise ConfigError("verify --cast: compares two directories; give the other one too")
    if flags.load and len(command.paths) == 2:
        raise ConfigError("verify --load: opens one directory; give each to a command of its own")
    met, options = command.meet(config), config.source.options
    one, lines = Path(command.paths[0]), []
    if len(command.paths) == 2:
        other, memory = Path(command.paths[1]), config.engine.memory
        lines = against_other(one, other, options, memory, met, cast=flags.cast)
    elif flags.load and not verification.has_manifest(one):
        lines = [f"no {MANIFEST} in {one}: its bytes are not compared with anything"]
    else:
        lines = verification.against_manifest(one, met)
    if flags.load:
        lines += loading.load(one, options, met)
    command.say(lines)
    met.barrier("done")
    met.close()
    return 0


def serve(command: Command) -> int:
    """Do job after job."""
    flags = command.flags
    if flags.jobs is None:
        raise ConfigError("serve: which queue? give --jobs DIR")
    tree = configuration.tree_of(flags.src, flags.dst, command.overrides, None)
    request = Request(
        jobs=Path(flags.jobs),
        tree=tree,
        watch=Path(flags.watch) if flags.watch is not None else None,
        poll=flags.poll if flags.poll is not None else 2.0,
        once=flags.once,
        force=flags.force,
    )
    met = command.meet(request.checked())
    service.serve(request, met, lambda line: command.say([line]), verbose=flags.verbose)
    met.barrier("done")
    met.close()
    return 0


VERBS: dict[str, Callable[[Command], int]] = {
    "run": run,
    "plan": plan,
    "inspect": inspect,
    "verify": verify,
    "fit": fit,
    "serve": serve,
}
