"""Whatever befalls a rank, in any phase and mode: all ranks end soon, one line says why."""

import random
import re
import signal
import time
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from reshard import watcher
from tests import jobs
from tests.commands import move
from tests.interrupted import SMALL_ROUNDS, Undisturbed
from tests.oracles.compare import assert_same_files
from tests.sabotage import WRITE, sabotage, several

pytestmark = pytest.mark.fault

WORLD, TIMEOUT = 3, 2


@dataclass(frozen=True)
class Phase:
    """A call in which trouble begins; `first` where only the first rank gets there."""

    where: str
    nth: int = 1
    first: bool = False
    published: bool = False
    crossing: bool = False


PHASES = {
    "start": Phase("reshard.verbs:job.run"),
    "plan": Phase("reshard.job:prepare"),
    "headers": Phase("reshard.formats.common:check_headers"),
    "lock": Phase("reshard.workspace:Workspace.locked", first=True),
    "begin": Phase("reshard.workspace:Workspace.begin", first=True),
    "probe": Phase("reshard.job:require_shared"),
    "lay out": Phase("reshard.commit:lay_out"),
    "laid out": Phase("reshard.distributed:Ranks.barrier"),
    "read": Phase("reshard.engine:Engine._load", nth=3),
    "assemble": Phase("reshard.engine:Engine._assemble", nth=3),
    "exchange": Phase("reshard.distributed:Ranks.all_to_all", nth=3, crossing=True),
    "write": Phase(WRITE, nth=3),
    "sync": Phase("reshard.storage:Files.sync"),
    "moved": Phase("reshard.distributed:Ranks.barrier", nth=2),
    "compare": Phase("reshard.job:_Run._judge"),
    "compare copies": Phase("reshard.job:compare", first=True),
    "commit": Phase("reshard.finish:Finish._finish_files"),
    "finish a file": Phase("reshard.commit:finish_file"),
    "publish": Phase("reshard.finish:Finish._write_small_files", first=True),
    "verify": Phase("reshard.finish:differing"),
    "rename": Phase("reshard.workspace:rename", first=True),
    "published": Phase("reshard.job:_Run._report", published=True),
    "report": Phase("reshard.report:Report.to_json", first=True, published=True),
    "done": Phase("reshard.distributed:Ranks.barrier", nth=5, published=True),
}
HOWS = {
    "fail": (1, r"the disk of a test has failed"),
    "refuse": (2, r"the checkpoint of a test is refused"),
    "bug": (1, r"unexpected KeyError: 'a bug' \(--debug shows where\)"),
    "memory": (1, r"out of memory; a smaller engine.memory"),
    "kill": (1, r"rank {which} died in phase `[\w ]+`"),
    "stop": (1, r"rank {which} made no progress for 2 s \(engine.timeout\) in phase `[\w ]+`"),
    "hang": (1, r"rank {which} made no progress for 2 s \(engine.timeout\) in phase `[\w ]+`"),
}
MODES = {
    "nearest": ["engine.writers=nearest"],
    "owner": ["engine.writers=owner"],
    "direct": ["engine.exchange=direct"],
}
GO_ON = "the same command goes on where this one stopped"


@dataclass(frozen=True)
class Trouble:
    """What befalls which rank where."""

    phase: str
    how: str
    mode: str
    which: int

    def __str__(self) -> str:
        return f"{self.phase}, {self.how}, {self.mode}, rank {self.which}"

    def happens(self) -> bool:
        phase = PHASES[self.phase]
        return not (phase.first and self.which) and not (phase.crossing and self.mode == "direct")


EVERY = [
    trouble
    for trouble in (Trouble(*values) for values in product(PHASES, HOWS, MODES, range(WORLD)))
    if trouble.happens()
]


def selection(count: int) -> list[Trouble]:
    """As many in which as many pairs of values meet as can; hangs cost seconds, so few of them."""
    quick = [trouble for trouble in EVERY if trouble.how not in ("stop", "hang")]
    slow = [trouble for trouble in EVERY if trouble.how in ("stop", "hang")]
    return spread(quick, count - 4) + spread(slow, 4)


def spread(troubles: list[Trouble], count: int) -> list[Trouble]:
    """The first `count` of a greedy choice."""
    chance, met, chosen = random.Random(0), set[Any](), list[Trouble]()
    shuffled = chance.sample(troubles, len(troubles))
    for _ in range(count):
        best = max(shuffled, key=lambda trouble: len(meetings(trouble) - met))
        met |= meetings(best)
        chosen.append(best)
    return chosen


def meetings(trouble: Trouble) -> set[Any]:
    return set(combinations(vars(trouble).items(), 2)) | set(vars(trouble).items())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trouble" in metafunc.fixturenames:
        long = metafunc.config.getoption("--long")
        metafunc.parametrize("trouble", EVERY if long else selection(22), ids=str)


def test_trouble_of_any_rank_ends_all_with_one_line(
    trouble: Trouble, undisturbed: Undisturbed, tmp_path: Path, record_property: Any
) -> None:
    phase, (code, pattern) = PHASES[trouble.phase], HOWS[trouble.how]
    target, reached = tmp_path / "dst", tmp_path / "reached"
    report = ["--report", str(tmp_path / "report.json")]
    words = [*move("meta4", undisturbed.source, "tp2", target), SMALL_ROUNDS, *MODES[trouble.mode]]
    hangs = trouble.how in ("stop", "hang")
    words += [f"engine.timeout={TIMEOUT if hangs else 60}", "engine.verify=true", *report]
    grief = (phase.where, trouble.which, phase.nth, trouble.how, str(reached))
    record_property("troubles", 1)
    with jobs.start(WORLD, words, tmp_path / "said", sabotage, *grief) as job:
        job.until(reached.exists)
        codes = others_end(job, trouble, jobs.SOON)
        if trouble.how != "stop":
            expected = -signal.SIGKILL if trouble.how == "kill" else code
            assert job.wait(jobs.SOON)[trouble.which] == expected
    assert codes == [code] * (WORLD - 1), job.err
    assert job.err.count("\n") == 1, f"not one line:\n{job.err}"
    line = job.err.strip()
    assert re.match(rf"reshard: {pattern.format(which=trouble.which)}", line), line
    if target.exists():
        assert phase.published, "published too early"
        assert_same_files(target, undisturbed["tp2"])
    else:
        assert not phase.published
    partial = any(tmp_path.glob("dst.partial-*/journals"))
    assert (GO_ON in line) == (partial and code == 1), line


def others_end(job: jobs.Job, trouble: Trouble, seconds: float) -> list[int]:
    """The exit codes of the ranks that nothing befell, which end in time."""
    until = time.monotonic() + seconds
    others = [rank for number, rank in enumerate(job.ranks) if number != trouble.which]
    for rank in others:
        rank.join(max(0.0, until - time.monotonic()))
    assert not any(rank.is_alive() for rank in others), f"not over in {seconds:g} s: {job.err}"
    return [int(rank.exitcode or 0) for rank in others]


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_is_done_is_not_mourned(
    which: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """One that ends while another, which looks slowly, has just read that it was not done yet."""
    words = [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    grief = ("reshard.watcher:_lives", which, 1, "dawdle")
    job = jobs.finished(2, words, tmp_path / "said", sabotage, *grief)
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])


@pytest.mark.parametrize(
    ("where", "nth"), [(WRITE, 2), ("reshard.engine:Engine._load", 4)], ids=["write", "read"]
)
def test_trouble_beside_a_rank_that_waits_for_a_slow_one_is_heard_at_once(
    where: str, nth: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """It befalls a thread of rank 1 while rank 1 waits for what rank 0 takes half a minute for."""
    words = [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    words += MODES["owner"]
    slow = ("reshard.distributed:Ranks.all_to_all", 0, 3, "sleep 30", str(tmp_path / "slow"))
    grief = (where, 1, nth, "fail"), (where, 1, nth, "wait", str(tmp_path / "reached"))
    with jobs.start(2, words, tmp_path / "said", several, slow, *grief) as job:
        job.until(lambda: all((tmp_path / name).exists() for name in ("slow", "reached")))
        time.sleep(0.5)
        (tmp_path / "reached").unlink()
        assert job.wait(jobs.SOON) == [1, 1]
    assert job.err == f"reshard: the disk of a test has failed; {GO_ON}\n"


def far(rank: int, *grief: Any) -> None:
    """Let a rank be on a machine of its own, and one come to grief there."""
    watcher._home = lambda: f"machine {rank}"
    sabotage(rank, *grief)


def test_a_rank_of_another_machine_that_dies_is_named(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """No process of it can be looked at: its silence tells, and not that a message got lost."""
    words = [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    grief = (WRITE, 2, 3, "kill")
    with jobs.start(WORLD, [*words, *MODES["owner"]], tmp_path / "said", far, *grief) as job:
        assert job.wait(60) == [1, 1, -signal.SIGKILL]
    assert re.fullmatch(rf"reshard: rank 2 died in phase `[\w ]+`.*; {GO_ON}\n", job.err), job.err
