"""kill -9 at every step of a job and at random moments: nothing is lost, and nothing is wrong."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from tests import jobs
from tests.commands import move
from tests.interrupted import (
    ROUND_BYTES,
    SMALL_ROUNDS,
    Undisturbed,
    beside,
    journalled,
    only,
    run,
)
from tests.oracles.compare import assert_same_files
from tests.sabotage import ledger_total, sabotage, slowly

pytestmark = pytest.mark.fault

COLLECTIVE, OWNER = "engine.exchange=collective", "engine.writers=owner"
DIRECT, MORE_MEMORY = "engine.exchange=direct", "engine.memory=32MiB"
MODES = {"collective": COLLECTIVE, "direct": DIRECT}
Note = Callable[[str, object], None]


@dataclass(frozen=True)
class Step:
    """A call at which a rank is killed: before it, `after` it, or with half of it done (`torn`).

    `first` where only the first rank gets there; `published` where the target is complete by then;
    `replacing` where an older target is in the way, which --force gives up.
    """

    where: str
    how: str = "kill"
    nth: int = 1
    first: bool = False
    published: bool = False
    target: str = "tp2"
    replacing: bool = False


STEPS = {
    "before locking": Step("reshard.workspace:Workspace.locked", first=True),
    "before making the directory": Step("reshard.workspace:Workspace.make", first=True),
    "between the two directories": Step("reshard.workspace:make_directory", nth=3, first=True),
    "laying out": Step("reshard.commit:lay_out"),
    "in the middle of a header": Step("reshard.storage:os.pwrite", "torn", nth=2),
    "laid out": Step("reshard.commit:lay_out", "kill after"),
    "opening a journal": Step("reshard.job:Journal"),
    "before data": Step("reshard.storage:Files.write", nth=3),
    "in the middle of data": Step("reshard.storage:Files.write", "torn", nth=3),
    "between data and record": Step("reshard.journal:Journal.append", nth=3),
    "in the middle of a record": Step("reshard.storage:Log.append", "torn", nth=3),
    "after a record": Step("reshard.storage:Log.append", "kill after", nth=3),
    "before syncing data": Step("reshard.storage:Files.sync"),
    "between the two syncs": Step("reshard.storage:Log.sync"),
    "after syncing": Step("reshard.storage:Log.sync", "kill after"),
    "moved": Step("reshard.job:_Run._judge"),
    "finishing a file": Step("reshard.commit:finish_file"),
    "between two files": Step("reshard.commit:finish_file", "kill after"),
    "patching a checksum": Step("reshard.commit:_patch", "kill after", target="meta4"),
    "before a small file": Step("reshard.commit:write_pieces", nth=2, first=True),
    "in the middle of a small file": Step(
        "reshard.commit:create", "kill after", nth=2, first=True, target="hf"
    ),
    "before the manifest": Step("reshard.manifest:written", first=True),
    "after the manifest": Step("reshard.commit:sync_directories", first=True),
    "reading back": Step("reshard.finish:differing"),
    "before the rename": Step("reshard.workspace:rename", first=True),
    "after the rename": Step("reshard.workspace:sync", first=True, published=True),
    "before the clean-up": Step("reshard.storage:shutil.rmtree", first=True, published=True),
    "in the clean-up": Step("shutil:os.unlink", "kill after", first=True, published=True),
    "before unlocking": Step("reshard.locks:_unlink", first=True, published=True),
    "before the report": Step("reshard.report:Report.to_json", first=True, published=True),
    "replacing, before": Step("reshard.workspace:rename", first=True, replacing=True),
    "replacing, between": Step("reshard.workspace:rename", nth=2, first=True, replacing=True),
    "replacing, after": Step(
        "reshard.workspace:rename", "kill after", 2, first=True, published=True, replacing=True
    ),
    "replacing, in the clean-up": Step(
        "shutil:os.unlink", "kill after", 2, first=True, published=True, replacing=True
    ),
}


@dataclass(frozen=True)
class Kill:
    """One test: what is killed (`everyone` at once, or one rank), and how the job goes on."""

    step: str
    world: int
    mode: str
    everyone: bool
    which: int
    then: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        whom = "all" if self.everyone else f"rank {self.which}"
        return f"{self.step}, {whom} of {self.world}, {self.mode}, then {self.then}"


def kills(step: str, seed: int) -> Iterator[Kill]:
    """A step in both modes on 1 and on 4 ranks, and a way to go on that has all that may change."""
    chance = random.Random(f"{step} {seed}")
    for world in (1, 4):
        for mode in MODES:
            which = 0 if STEPS[step].first else chance.randrange(min(world, 4))
            words = chance.choice([(), (), (OWNER,), (DIRECT,), (MORE_MEMORY,), (COLLECTIVE,)])
            then = chance.choice((world, world, 1, 2, 3))
            everyone = world == 1 or chance.random() < 0.5
            yield Kill(step, world, mode, everyone, which, then, words)


def selection(long: bool) -> list[Kill]:
    """All kills, or each step on one rank and every fifth on four."""
    every = [kill for step in STEPS for kill in kills(step, 0)]
    if long:
        return every
    chosen = []
    for number, step in enumerate(STEPS):
        one, two, *four = kills(step, 0)
        alone = replace((one, two)[number % 2], then=1)
        chosen.append(alone if number % 5 else four[number % 2])
    return chosen


SHORT_MOMENTS, LONG_MOMENTS = 1, 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    long = metafunc.config.getoption("--long")
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", selection(long), ids=str)
    if "moment" in metafunc.fixturenames:
        metafunc.parametrize("moment", range(LONG_MOMENTS if long else SHORT_MOMENTS))
    if "gauntlet" in metafunc.fixturenames:
        metafunc.parametrize("gauntlet", range(12 if long else 1))


def verdict(target: Path, expected: Path) -> str:
    """Whether a target is `right`, `lost` or `wrong`."""
    if not target.exists():
        return "lost"
    try:
        assert_same_files(target, expected)
    except AssertionError:
        return "wrong"
    return "right"


def noted(note: Note, target: Path, expected: Path) -> None:
    """Require a target to be right, and count it where it is not."""
    found = verdict(target, expected)
    if found != "right":
        note(found, 1)
    assert found == "right", f"{target} is {found}: it holds {sorted(os.listdir(target.parent))}"


def silent(folder: Path) -> None:
    """Beside a target that was interrupted there is nothing but what belongs to it."""
    for name in beside(folder):
        assert name in ("dst", "dst.lock") or name.startswith("dst.partial-"), name


def before_going_on(folder: Path) -> int:
    """Bytes that are journalled in a directory's one partial result, if there is one."""
    found = list(folder.glob("dst.partial-*"))
    assert len(found) <= 1
    return sum(map(journalled, found))


def goes_on(world: int, words: list[str], folder: Path, expected: Path, note: Note) -> None:
    """The same command completes, and does not do again what was journalled."""
    before, there = before_going_on(folder), (folder / "dst").exists()
    found = run(world, words, folder)
    noted(note, folder / "dst", expected)
    assert only(folder, "dst"), beside(folder)
    moved = found["bytes"]
    if found["state"] == "done":
        assert there
        assert moved["written"] == 0
        return
    assert moved["resumed"] == before, "what was journalled is not what was taken over"
    assert moved["written"] <= moved["written_bound"] - before


def ended(job: jobs.Job, everyone: bool, which: int) -> None:
    """Kill all ranks, or see the others end with one line after one of them was killed."""
    if everyone:
        job.kill()
        return
    codes = job.wait(jobs.SOON)
    assert codes.pop(which) == -9
    assert all(code == 1 for code in codes), codes
    assert job.err.count("\n") == 1, job.err
    assert f"reshard: rank {which} died in phase" in job.err


def test_a_kill_at_any_step_costs_nothing(
    kill: Kill, undisturbed: Undisturbed, tmp_path: Path, record_property: Note
) -> None:
    step = STEPS[kill.step]
    expected, older = undisturbed[step.target], undisturbed["hf"]
    target, reached = tmp_path / "dst", tmp_path / "reached"
    words = [*move("meta4", undisturbed.source, step.target, target), SMALL_ROUNDS]
    if step.replacing:
        shutil.copytree(older, target)
        words.append("--force")
    report = ["--report", str(tmp_path / "report.json")]
    grief = (step.where, kill.which, step.nth, step.how, str(reached))
    command = [*words, MODES[kill.mode], "engine.verify=true", *report]
    record_property("kills", 1)
    with jobs.start(kill.world, command, tmp_path / "said", sabotage, *grief) as job:
        job.until(reached.exists)
        ended(job, kill.everyone, kill.which)
    record_property("inside", int(not target.exists() or step.replacing))
    silent(tmp_path)
    if step.replacing and not step.published:
        between = step.nth == 2
        assert target.exists() != between
        if not between:
            noted(record_property, target, older)
    elif target.exists():
        assert step.published, "published too early"
        noted(record_property, target, expected)
    else:
        assert not step.published, "gone"
    goes_on(kill.then, [*words, *kill.words], tmp_path, expected, record_property)


def slow_job(undisturbed: Undisturbed, folder: Path) -> list[str]:
    return [*move("meta4", undisturbed.source, "tp2", folder / "dst"), SMALL_ROUNDS]


@cache
def usual_seconds(undisturbed: Undisturbed, folder: Path, world: int, mode: str) -> float:
    """How long a slow job takes that nothing happens to."""
    began = time.monotonic()
    run(world, [*slow_job(undisturbed, folder), MODES[mode]], folder, slowly, str(folder / "notes"))
    return time.monotonic() - began


def killed_at_random(
    chance: random.Random, seconds: float, world: int, words: list[str], folder: Path
) -> bool:
    """Kill a slow job at some moment; whether that was in the middle of its work."""
    kept = str(folder / "ledger")
    with jobs.start(world, words, folder / "said", slowly, kept) as job:
        time.sleep(chance.uniform(0.0, seconds))
        which = chance.randrange(world)
        if chance.random() < 0.5 or not any(folder.glob("dst.partial-*")):
            job.kill()
        else:
            job.kill(which)
            # The others may have to wait for the word of one that had said that it is done.
            codes = job.wait(2 * jobs.SOON)
            if not (folder / "dst").exists():
                assert codes.pop(which) == -9
                assert all(code == 1 for code in codes)
                assert job.err.count("\n") == (world > 1), job.err
    silent(folder)
    return not (folder / "dst").exists() and any(folder.glob("dst.partial-*"))


def little_is_lost(folder: Path, worlds: list[int]) -> None:
    """Of what attempts of so many ranks wrote, two rounds of each are not journalled at most."""
    if not (folder / "dst").exists():
        lost = ledger_total(folder / "ledger") - before_going_on(folder)
        assert lost <= sum(worlds) * 2 * ROUND_BYTES


@pytest.fixture(scope="module")
def timing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timing")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [1, 4])
def test_a_kill_at_a_random_moment_costs_nothing(
    moment: int,
    world: int,
    mode: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
    timing: Path,
    record_property: Note,
) -> None:
    chance = random.Random(f"{moment} {world} {mode}")
    place = timing / f"{world} {mode}"
    place.mkdir(exist_ok=True)
    seconds = usual_seconds(undisturbed, place, world, mode)
    words, expected = slow_job(undisturbed, tmp_path), undisturbed["tp2"]
    record_property("kills", 1)
    command = [*words, MODES[mode]]
    inside = killed_at_random(chance, seconds, world, command, tmp_path)
    record_property("inside", int(inside))
    little_is_lost(tmp_path, [world])
    if (tmp_path / "dst").exists():
        noted(record_property, tmp_path / "dst", expected)
    then = chance.choice((world, world, 1, 2, 3))
    other = chance.choice([[MODES[mode]], [OWNER], [DIRECT], [MORE_MEMORY]])
    goes_on(then, [*words, *other], tmp_path, expected, record_property)


def test_a_job_that_is_killed_again_and_again_gets_there(
    gauntlet: int, undisturbed: Undisturbed, tmp_path: Path, record_property: Note
) -> None:
    chance = random.Random(gauntlet)
    words, expected = slow_job(undisturbed, tmp_path), undisturbed["tp2"]
    worlds, inside = list[int](), 0
    while not (tmp_path / "dst").exists() and len(worlds) < 6:
        worlds.append(chance.choice((1, 2, 4)))
        command = [*words, chance.choice(list(MODES.values()))]
        inside += killed_at_random(chance, 2.0, worlds[-1], command, tmp_path)
        little_is_lost(tmp_path, worlds)
    goes_on(2, words, tmp_path, expected, record_property)
    record_property("kills", len(worlds))
    record_property("inside", inside)
