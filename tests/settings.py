"""Topologies, settings and conversions: what tests that reshard whole models draw from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

from reshard import config as configuration
from reshard import job
from reshard.buffers import ALIGN
from reshard.distributed import Ranks
from reshard.engine import least_memory
from reshard.errors import ReshardError
from tests.oracles import hf, meta, nanotron
from tests.oracles.compare import assert_same, assert_same_config
from tests.oracles.models import Model, model_a, model_b, model_c
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 5)
MODES = (("direct", "nearest"), ("collective", "nearest"), ("collective", "owner"))
MEMORIES = ("least", "default")
SMALL_FILES = "dst.max_shard_size=60KB"
MESHES = {"tp1": (1, 1), "tp2": (2, 1), "tp2pp2": (2, 2), "tp3": (3, 1), "pp5": (1, 5)}


@dataclass(frozen=True)
class Topology:
    """A layout: what our command line calls it, and the oracles that write and read it."""

    spec: str
    write: Callable[[Model, Path], None]
    read: Callable[[Path], Model]
    overrides: tuple[str, ...] = ()


TOPOLOGIES = {
    **{f"meta{n}": Topology(f"meta{n}", partial(meta.write, mp=n), meta.read) for n in (1, 2, 3)},
    "hf": Topology("hf", hf.write, hf.read),
    "hf-many": Topology("hf", partial(hf.write, files=4), hf.read, (SMALL_FILES,)),
    **{
        name: Topology(name, partial(nanotron.write, tp=tp, pp=pp), nanotron.read)
        for name, (tp, pp) in MESHES.items()
    },
}
MODELS: dict[str, Callable[[], Model]] = {
    "a": cache(model_a),
    "a-tied": cache(partial(model_a, tied=True)),
    "b": cache(model_b),
    "b-tied": cache(partial(model_b, tied=True)),
    "c": cache(model_c),
    "c-tied": cache(partial(model_c, tied=True)),
}


@dataclass(frozen=True)
class Setting:
    """How a job runs; nothing of it may show in the result."""

    world: int
    exchange: str
    writers: str
    memory: str

    def overrides(self) -> tuple[str, ...]:
        """As KEY=VALUE items; the memory is filled in by the ranks, who know the plan."""
        return (f"engine.exchange={self.exchange}", f"engine.writers={self.writers}")


SETTINGS = [
    Setting(world, *mode, memory) for world, mode, memory in product(WORLDS, MODES, MEMORIES)
]


@dataclass(frozen=True)
class Ready:
    """A job whose config is made, which takes longer than many a conversion: once, not by rank."""

    made: configuration.JobConfig
    memory: str

    def config(self, world: int) -> configuration.JobConfig:
        """The config with the least memory that `world` ranks can do with, where that is asked."""
        if self.memory == "default":
            return self.made
        plan = job.prepare(self.made).plan(world)
        least = least_memory(plan, plan.least_capacity(ALIGN))
        return replace(self.made, engine=replace(self.made.engine, memory=least))


@dataclass(frozen=True)
class Job:
    """One run of the program; its source may be the target of an earlier one."""

    source: Path
    target: Path
    spec: str
    overrides: tuple[str, ...] = ()
    memory: str = "default"
    source_spec: str | None = None

    def ready(self) -> Ready:
        """With its config; fsync is off, for tests only."""
        given = (f"src.path={self.source}", f"dst.path={self.target}", "engine.fsync=false")
        overrides = [*given, *self.overrides]
        return Ready(configuration.load(self.source_spec, self.spec, overrides, None), self.memory)


@dataclass(frozen=True)
class Outcome:
    """How a job ended on rank 0: the class and text of an error, or what was said."""

    error: str | None
    said: tuple[str, ...]
    warnings: tuple[str, ...]


def convert(world: int, jobs: Sequence[Job], timeout: float = 120) -> list[Outcome]:
    """Run jobs one after the other in one group of `world` ranks."""
    ready = [item.ready() for item in jobs]
    outcomes: list[Outcome] = run_ranks(world, convert_here, ready, timeout=timeout)[0]
    return outcomes


def must_convert(world: int, jobs: Sequence[Job], timeout: float = 120) -> list[Outcome]:
    """Run jobs, none of which may end with an error."""
    outcomes = convert(world, jobs, timeout)
    pairs = zip(jobs, outcomes, strict=True)
    failed = [f"{item}: {outcome.error}" for item, outcome in pairs if outcome.error]
    assert not failed, "\n".join(failed)
    return outcomes


def convert_here(jobs: Sequence[Ready]) -> list[Outcome]:
    """What one rank does."""
    ranks = Ranks()
    outcomes = []
    for item in jobs:
        said: list[str] = []
        try:
            report = job.run(item.config(ranks.world), ranks, force=False, say=said.append)
            outcomes.append(Outcome(None, tuple(said), tuple(report.warnings)))
        except ReshardError as error:
            outcomes.append(Outcome(f"{type(error).__name__}: {error}", tuple(said), ()))
    ranks.barrier("all jobs done")
    ranks.close()
    return outcomes


@dataclass(frozen=True)
class Case:
    """A model to be brought from one topology to another."""

    source: str
    target: str
    model: str
    setting: Setting

    def job(self, root: Path) -> Job:
        """The job below `root`, whose source is written if it is not yet there."""
        topology, name = TOPOLOGIES[self.target], f"{self.model}-{self.source}-{self.target}"
        setting = self.setting
        place = f"{name}-{setting.world}-{setting.exchange}-{setting.writers}-{setting.memory}"
        return Job(
            written(root, self.model, self.source),
            root / "out" / place,
            topology.spec,
            (*setting.overrides(), *topology.overrides),
            setting.memory,
        )

    def check(self, job: Job) -> None:
        """The target, read by the oracle, is the model."""
        model, found = MODELS[self.model](), TOPOLOGIES[self.target].read(job.target)
        assert_same(found, model)
        assert_same_config(found, model)


def written(root: Path, model: str, topology: str) -> Path:
    """A source that an oracle wrote, once per root."""
    path = root / "in" / f"{model}-{topology}"
    if not path.exists():
        TOPOLOGIES[topology].write(MODELS[model](), path)
    return path


def run_cases(root: Path, cases: Sequence[Case], timeout: float = 120) -> None:
    """Convert and check; one process group per world."""
    by_world: dict[int, list[Case]] = {}
    for case in cases:
        by_world.setdefault(case.setting.world, []).append(case)
    problems = []
    for world, members in by_world.items():
        jobs = [case.job(root) for case in members]
        for case, item, outcome in zip(members, jobs, convert(world, jobs, timeout), strict=True):
            if outcome.error:
                problems.append(f"{case}: {outcome.error}")
                continue
            try:
                case.check(item)
            except Exception as error:
                problems.append(f"{case}: {error!r}")
    assert not problems, f"{len(problems)} of {len(cases)}:\n" + "\n".join(problems)


def pairwise(topologies: Iterable[str], models: Sequence[str]) -> Iterator[Case]:
    """Every ordered pair of topologies once, such that any two values of any two factors meet."""
    met: set[Any] = set()
    choices = list(product(models, SETTINGS))
    for number, (source, target) in enumerate(permutations(topologies, 2)):
        first = 2 * number % len(choices)  # ties go to another setting each time
        turned = choices[first:] + choices[:first]
        cases = [Case(source, target, *choice) for choice in turned]
        best = max(cases, key=lambda case: len(meetings(case) - met))
        met |= meetings(best)
        yield best


def values(case: Case) -> tuple[tuple[str, object], ...]:
    """The value of every factor of a case."""
    setting = case.setting
    mode = f"{setting.exchange} {setting.writers}"
    named = {"source": case.source, "target": case.target, "model": case.model}
    return tuple({**named, "world": setting.world, "mode": mode, "memory": setting.memory}.items())


def meetings(case: Case) -> set[Any]:
    """All pairs of values of two factors."""
    return set(combinations(values(case), 2))
