"""Topologies, settings and conversions: what tests that reshard whole models draw from."""

import json
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
from reshard.errors import ReshardError
from reshard.room import least_memory
from reshard.schedule import least_capacity
from tests.oracles import dcp, hf, meta, nanotron, titan
from tests.oracles.compare import assert_same, assert_same_config, assert_same_tensor
from tests.oracles.models import Model, checked, model_a, model_b, model_c
from tests.ranks import run_ranks

WORLDS = (1, 2, 3, 5)
MODES = (("direct", "nearest"), ("collective", "nearest"), ("collective", "owner"))
MEMORIES = ("least", "default")
SMALL_FILES = "dst.max_shard_size=60KB"
MESHES = {"tp1": (1, 1), "tp2": (2, 1), "tp2pp2": (2, 2), "tp3": (3, 1), "pp5": (1, 5)}


@dataclass(frozen=True)
class Topology:
    """A layout: what our command line calls it, and the oracles that write and read it.

    `overrides` are for a target; `given` (with {path} and {tied}) and `source_spec` for a source.
    """

    spec: str
    write: Callable[[Model, Path], object]
    read: Callable[[Path], Model]
    overrides: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    source_spec: str | None = None

    def as_source(self, path: Path, model: Model) -> tuple[str, ...]:
        """What the command line needs besides the path of what `write` has made."""
        tied = str(model.config["tie_word_embeddings"]).lower()
        return tuple(text.format(path=path, tied=tied) for text in self.given)


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

# ---------------------------------------------------------------- torch's distributed checkpoints

STEP = "step-0"
IN_MANIFEST = {
    "model_type": "model_type",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
    "tie_word_embeddings": "tied",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "torch_dtype": "dtype",
}


def beside(write: Callable[..., object], model: Model, path: Path, **given: Any) -> None:
    """Write, with config.json in the same folder, which is the run's if there are steps."""
    write(model, path, **given)
    (path / "config.json").write_text(json.dumps(model.config))


def apart(write: Callable[..., object], model: Model, path: Path, **given: Any) -> None:
    """Write, with config.json in a folder of its own."""
    write(model, path, **given)
    assets = path.with_name(f"{path.name}.assets")
    assets.mkdir()
    (assets / "config.json").write_text(json.dumps(hf.spelled_as_5(model.config)))


def with_params(write: Callable[..., object], model: Model, path: Path, **given: Any) -> None:
    """Write, with Meta's params.json, which does not say whether the output is tied."""
    write(model, path, **given)
    (path / "params.json").write_text(json.dumps(meta.to_params(model.config, "llama3", 1)))


def read_fsdp(path: Path, *, wrapper: bool = True) -> Model:
    """A target, with the config that lies in it."""
    config = hf.spelled_as_4(json.loads((path / "config.json").read_text()))
    prefix = "model.model." if wrapper else "model."
    assert f"{prefix}norm.weight" in dcp.boxes(path)
    tensors = dcp.read_fsdp(path)
    if config["tie_word_embeddings"]:
        assert_same_tensor("the tied head", tensors.pop(dcp.HEAD), tensors[dcp.TABLE])
    return checked(config, tensors)


def read_titan(path: Path, *, rope: str = "interleaved", older: bool = False) -> Model:
    """A target, with the config that its manifest has."""
    record = json.loads((path / STEP / "reshard.json").read_text())["model"]
    config = {theirs: record[ours] for theirs, ours in IN_MANIFEST.items()}
    found = dcp.read(path / STEP)
    assert ("output.weight" in found) == ("layers.0.attention.wq.weight" in found) == older
    return Model(config, titan.to_hf(found, config, rope=rope))


def fsdp(shards: int) -> Topology:
    """HF's names, below a dict `model`, on as many ranks."""
    write = partial(beside, partial(dcp.write_fsdp, shards=shards))
    return Topology(f"fsdp{shards}", write, read_fsdp, source_spec="dcp")


def source(write: Callable[..., object], *given: str, place: Any = beside) -> Topology:
    """What is read only."""
    return Topology("", partial(place, write), no_target, given=given)


def no_target(path: Path) -> Model:
    """There is nothing to read where nothing is written."""
    raise NotImplementedError


HALF = "src.rope=half"
ASSETS = "src.assets={path}.assets"
NAMED = "src.model={path}.assets/config.json"
TIED = "src.tied={tied}"
# Both ways: sources of several generations; each is written by TorchTitan in one of them.
DCP = {
    "fsdp3": fsdp(3),
    "fsdp8": fsdp(8),
    "fsdp2-bare": replace(
        fsdp(2),
        write=partial(apart, partial(dcp.write_fsdp, shards=2, wrapper=False)),
        read=partial(read_fsdp, wrapper=False),
        overrides=("dst.wrapper=none",),
        given=(ASSETS,),
    ),
    "titan2": Topology(
        "titan2", partial(beside, partial(titan.write_titan, shards=2, step=7)), read_titan
    ),
    "titan2tp3": Topology(
        "titan2",
        partial(apart, partial(titan.write_2d, dp=2, tp=3)),
        partial(read_titan, older=True),
        ("dst.mesh.tp=3", "dst.keys=older"),
        (NAMED,),
        "dcp",
    ),
    "titan3-half": Topology(
        "titan3",
        partial(beside, partial(titan.write_titan, shards=3, rope="half", whole_qkv=False)),
        partial(read_titan, rope="half"),
        ("dst.rope=half",),
        (HALF,),
    ),
}
DCP_SOURCES = {
    "2x3": source(partial(dcp.write_2d, dp=2, tp=3)),
    "3x2": source(partial(dcp.write_2d, dp=3, tp=2), ASSETS, place=apart),
    "hybrid": source(partial(dcp.write_fsdp, shards=3, replicas=2, extra={"step": 7})),
    "no-dist": source(partial(dcp.write_fsdp, shards=1, no_dist=True)),
    "items": source(partial(dcp.write_fsdp, shards=2, single_file_per_rank=False)),
    "titan-3x2": source(partial(titan.write_2d, dp=3, tp=2, keys="fused+w13")),
    "titan-2x3": source(partial(titan.write_2d, dp=2, tp=3, keys="0.3"), NAMED, place=apart),
    "titan-0.2": source(partial(titan.write_titan, shards=3, keys="0.2", freqs_cis=True)),
    "titan-cut": source(partial(titan.write_titan, shards=5, whole_qkv=False, prefix="model.")),
    "titan-fused": source(
        partial(titan.write_titan, shards=5, keys="fused"), TIED, place=with_params
    ),
    "titan-w13": source(partial(titan.write_titan, shards=3, keys="w13", training=True, step=3)),
    "titan-fused-w13": source(
        partial(titan.write_titan, shards=4, keys="fused+w13", step=12, training=True)
    ),
    "titan-old-half": source(
        partial(titan.write_titan, shards=1, keys="0.2", rope="half", prefix="model."), HALF
    ),
}
EVERY = TOPOLOGIES | DCP | DCP_SOURCES


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


# Half of them, in which any two values of world, mode and memory still meet.
HALF_OF_SETTINGS = [
    item
    for number, item in enumerate(SETTINGS)
    if sum((number // 6, number // 2 % 3, number % 2)) % 2 == 0
]


def settings(long: bool) -> list[Setting]:
    """The settings for tests that go through all of them, if there is time."""
    return SETTINGS if long else HALF_OF_SETTINGS


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
        least = least_memory(plan, least_capacity(plan, ALIGN))
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
        topology, name = EVERY[self.target], f"{self.model}-{self.source}-{self.target}"
        setting, beginning = self.setting, EVERY[self.source]
        source = written(root, self.model, self.source)
        place = f"{name}-{setting.world}-{setting.exchange}-{setting.writers}-{setting.memory}"
        return Job(
            source,
            root / "out" / place,
            topology.spec,
            (
                *setting.overrides(),
                *beginning.as_source(source, MODELS[self.model]()),
                *topology.overrides,
            ),
            setting.memory,
            beginning.source_spec,
        )

    def check(self, job: Job) -> None:
        """The target, read by the oracle, is the model."""
        model, found = MODELS[self.model](), EVERY[self.target].read(job.target)
        assert_same(found, model)
        assert_same_config(found, model)


def written(root: Path, model: str, topology: str) -> Path:
    """A source that an oracle wrote, once per root."""
    path = root / "in" / f"{model}-{topology}"
    if not path.exists():
        EVERY[topology].write(MODELS[model](), path)
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
    yield from spread(permutations(topologies, 2), models)


def spread(pairs: Iterable[tuple[str, str]], models: Sequence[str]) -> Iterator[Case]:
    """Every pair once, with models and settings such that as many pairs of values meet as can."""
    met: set[Any] = set()
    choices = list(product(models, SETTINGS))
    for number, (source, target) in enumerate(pairs):
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
