"""Jobs that were interrupted: what lies on the disk meanwhile, and runs that go on with it."""

import json
import os
from pathlib import Path
from typing import Any

from reshard import journal
from tests import jobs
from tests.commands import done, move, read, write
from tests.oracles import models
from tests.oracles.compare import assert_same

# With so little a job takes tens of rounds; what goes beyond 12 MiB makes four buffers or more.
SMALL_ROUNDS = "engine.memory=13MiB"
ROUND_BYTES = (1 << 20) // 4
OWN = {"report.json", "said.out", "said.err", "reached", "ledger"}


def wide() -> models.Model:
    """4 MB of weights."""
    return models.wide_model(4 << 20)


class Undisturbed:
    """What a source becomes when nothing goes wrong, by target; made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.source = write("meta4", folder / "src", wide())
        self._folder = folder

    def __getitem__(self, target: str) -> Path:
        found = self._folder / f"undisturbed-{target}"
        if not found.exists():
            done(*move("meta4", self.source, target, found))
            assert_same(read(target, found), wide())
        return found


def run(world: int, words: list[str], where: Path, before: Any = None, *args: Any) -> Any:
    """A job that has to succeed; its report."""
    words = [*words, "--report", str(where / "report.json")]
    if world == 1 and before is None:
        done(*words)
    else:
        job = jobs.finished(world, words, where / "said", before, *args)
        assert (job.wait(0), job.err) == ([0] * world, ""), job.err
    found: dict[str, Any] = json.loads((where / "report.json").read_text())
    assert found["world"] == world
    return found


def partial(target: Path) -> Path:
    """The one partial directory of a target that is not there yet."""
    assert not target.exists(), f"{target} is there before it is complete"
    found = list(target.parent.glob(f"{target.name}.partial-*"))
    assert len(found) == 1, found
    return found[0]


def journalled(folder: Path) -> int:
    """Bytes of the pieces that a partial directory's journals tell of."""
    pieces = {(item.file, item.offset): item.length for item in journal.read(folder / "journals")}
    return sum(pieces.values())


def beside(folder: Path) -> set[str]:
    """What a directory holds that the tests did not put there."""
    return set(os.listdir(folder)) - OWN


def only(folder: Path, *names: str) -> bool:
    """Whether a directory holds these and what the tests put there, and nothing else."""
    return beside(folder) == set(names)
