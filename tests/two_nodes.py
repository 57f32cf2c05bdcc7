"""Sources of which each of two machines has a part: both have them in a directory `src`."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from reshard import config as configuration
from reshard import job as program
from reshard.distributed import Ranks
from reshard.errors import ReshardError
from tests import jobs
from tests.oracles import meta, nanotron
from tests.oracles.models import Model
from tests.ranks import run_ranks
from tests.sabotage import sabotage

WORLD = 4
WEIGHTS = (".pth", ".safetensors", ".distcp", ".gguf")
Share = Callable[[int, int], int]


def halves(number: int, count: int) -> int:
    """The first half of the files on the first node."""
    return 0 if number < count // 2 else 1


def last(number: int, count: int) -> int:
    """Everything on the second node."""
    return 1


def part(whole: Path, root: Path, share: Share = halves) -> list[Path]:
    """Give two nodes their share of the weights, and the second all else; the nodes' folders."""
    nodes = [root / "node0", root / "node1"]
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix in WEIGHTS]
    for node in nodes:
        (node / "src").mkdir(parents=True)
    for path in files:
        number = share(weights.index(path), len(weights)) if path in weights else 1
        there = nodes[number] / "src" / path.relative_to(whole)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, there)
    return nodes


def crossing_to_owners(root: Path, held: Model, readers: Sequence[int]) -> int:
    """Bytes of 16-bit elements that a Meta source in `whole` and tp4 leave on different ranks.

    The source is made one in which each element is the rank that reads it, and moved by oracles;
    `readers` are those of its files.
    """
    for number, reader in enumerate(readers):
        file = root / "whole" / f"consolidated.{number:02d}.pth"
        first = {key: readers[0] if "norm" in key else reader for key in torch.load(file)}
        torch.save(
            {key: torch.full_like(t, first[key]) for key, t in torch.load(file).items()}, file
        )
    tensors = meta.read(root / "whole", tied=False, kv_copies=1).tensors
    nanotron.write(Model(held.config, tensors), root / "map", 4, 1)
    crossing = 0
    for path in (root / "map" / "model").rglob("*.safetensors"):
        owner = int(path.name.partition("tp-rank-")[2].partition("-")[0] or 0)
        crossing += sum(2 * int((tensor != owner).sum()) for tensor in load_file(path).values())
    return crossing


@dataclass(frozen=True)
class Pair:
    """A job of two ranks on each of two nodes, whose folders lie in `root`."""

    root: Path
    source: str
    target: str
    more: tuple[str, ...] = ()

    def paths(self) -> list[str]:
        """Where the source and the target are, on any node."""
        return ["src.path=src", f"dst.path={self.root / 'dst'}", *self.more]

    def words(self) -> list[str]:
        """The words of the command."""
        report = ["--report", str(self.root / "report.json")]
        return ["--src", self.source, "--dst", self.target, *self.paths(), *report]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: what was said, the figures, and the error, if it was one."""

    said: str
    bytes: dict[str, int]
    warnings: list[str]
    error: str


def enter(rank: int, root: Path, scratch: Path) -> None:
    """Go where a rank is at home: two live on each node."""
    os.chdir(root / f"node{rank // 2}")
    tempfile.tempdir = str(scratch)


def run_all(pairs: Sequence[Pair], scratch: Path) -> list[Outcome]:
    """Run jobs one after the other in one group of ranks; how they ended, by the first rank."""
    return list(run_ranks(WORLD, run_here, pairs, scratch)[0])


def run_here(pairs: Sequence[Pair], scratch: Path) -> list[Outcome]:
    """What one rank does."""
    ranks = Ranks()
    ranks.endure(lambda: None)
    outcomes = []
    for pair in pairs:
        enter(ranks.rank, pair.root, scratch)
        said: list[str] = []
        try:
            config = configuration.load(pair.source, pair.target, pair.paths(), None)
            found = program.run(config, ranks, force=False, say=said.append)
            counted, warnings, error = json.loads(found.to_json())["bytes"], found.warnings, ""
        except ReshardError as caught:
            counted, warnings, error = {}, [], str(caught)
        outcomes.append(Outcome("\n".join(said), counted, warnings, error))
    ranks.barrier("all jobs done")
    ranks.close()
    return outcomes


def command(pair: Pair, *grief: Any) -> tuple[list[int], jobs.Job]:
    """Run a job as its command does, one rank of which may come to grief; exit codes, and all."""
    scratch = pair.root / "scratch"
    scratch.mkdir()
    job = jobs.finished(WORLD, pair.words(), pair.root / "said", begin, pair.root, scratch, grief)
    return job.wait(0), job


def begin(rank: int, root: Path, scratch: Path, grief: tuple[Any, ...]) -> None:
    """Go home, and come to grief there."""
    enter(rank, root, scratch)
    if grief:
        sabotage(rank, *grief)
