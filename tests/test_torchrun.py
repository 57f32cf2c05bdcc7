"""Jobs that are stopped from outside, and what torchrun makes of ranks that fail."""

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.commands import move
from tests.interrupted import SMALL_ROUNDS, Undisturbed, only, run
from tests.launched import SHIM, STOCK, alive, children, ours, start, under_way
from tests.oracles.compare import assert_same_files
from tests.sabotage import EVERY_RANK, WRITE, slowly

pytestmark = pytest.mark.fault

RESTARTING = [*STOCK, "--max-restarts", "3"]
ONCE_MORE = [*STOCK, "--max-restarts", "1"]
ALONE = [sys.executable]
NOTICE_SECONDS = 10.0
GO_ON = "the same command goes on where this one stopped"


@pytest.fixture
def words(undisturbed: Undisturbed, tmp_path: Path) -> list[str]:
    return [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]


@pytest.fixture
def only_long(long: bool) -> None:
    if not long:
        pytest.skip("many starts of torchrun: with --long")


def sabotaged(launcher: list[str], which: int, how: str, folder: Path) -> list[str]:
    """A command whose rank `which` comes to grief in its fifth round."""
    grief = [WRITE, str(which), "5", how, str(folder / "reached")]
    return [*launcher, "-m", "tests.sabotage", *grief]


def moving(launcher: list[str], words: list[str], folder: Path) -> Any:
    """A command whose ranks dawdle, in the middle of its work."""
    return under_way_at([*sabotaged(launcher, EVERY_RANK, "dawdle", folder), *words], folder)


@contextlib.contextmanager
def under_way_at(command: list[str], folder: Path) -> Iterator[Any]:
    """A command that has come where it is sabotaged; it is gone in the end."""
    with under_way(command, folder) as process:
        try:
            limit = time.monotonic() + 60
            while not (folder / "reached").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < limit, "nothing is moved"
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def rest_of(process: "subprocess.Popen[str]", seconds: float) -> tuple[float, list[str]]:
    """How long a command and all that it started take to end, and the lines of ours."""
    began = time.monotonic()
    err = process.communicate(timeout=seconds)[1]
    return time.monotonic() - began, ours(err)


def goes_on(words: list[str], folder: Path, expected: Path) -> None:
    """The same command completes with what was done already."""
    assert run(2, words, folder)["bytes"]["resumed"] > 0
    assert_same_files(folder / "dst", expected)
    assert only(folder, "dst")


@pytest.mark.parametrize("launcher", [STOCK, SHIM], ids=["stock", "shim"])
def test_ranks_whose_launcher_is_killed_end_and_free_the_lock(
    launcher: list[str],
    words: list[str],
    undisturbed: Undisturbed,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if launcher is SHIM:
        request.getfixturevalue("only_long")
    with moving(launcher, words, tmp_path) as process:
        ranks = children(process.pid)
        assert len(alive(ranks)) == 2
        process.kill()
        seconds, lines = rest_of(process, 30)
        assert not alive(ranks)
    assert seconds < jobs.SOON
    assert len(lines) == 1, lines
    assert lines[0] == f"reshard: the launcher is gone, so the job ends, in phase `move`; {GO_ON}"
    with open(tmp_path / "dst.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    goes_on(words, tmp_path, undisturbed["tp2"])


def test_ranks_whose_launcher_is_killed_before_they_meet_end_too(
    words: list[str], tmp_path: Path
) -> None:
    grief = ["reshard.cli:Ranks", str(EVERY_RANK), "1", "wait", str(tmp_path / "reached")]
    command = [*STOCK, "-m", "tests.sabotage", *grief, *words]
    with under_way_at(command, tmp_path) as process:
        ranks = children(process.pid)
        process.kill()
        process.wait()
        (tmp_path / "reached").unlink()
        try:
            rest_of(process, 2 * jobs.SOON)
        finally:
            for pid in alive(ranks):
                os.kill(pid, signal.SIGKILL)
    assert only(tmp_path)


TERMINATED, INTERRUPTED = "stopped by SIGTERM, in phase `move`", "interrupted"
NOTICES = {
    "stock": (STOCK, signal.SIGTERM, 1, TERMINATED),
    "shim": (SHIM, signal.SIGTERM, 143, TERMINATED),
    "restarting": (RESTARTING, signal.SIGTERM, 1, TERMINATED),
    "stock, by hand": (STOCK, signal.SIGINT, 1, INTERRUPTED),
    "shim, by hand": (SHIM, signal.SIGINT, 130, INTERRUPTED),
}


@pytest.mark.parametrize("notice", NOTICES)
def test_a_notice_stops_all_ranks_in_time_with_one_line(
    notice: str,
    words: list[str],
    undisturbed: Undisturbed,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    launcher, number, code, what = NOTICES[notice]
    if notice != "stock":
        request.getfixturevalue("only_long")
    with moving(launcher, words, tmp_path) as process:
        ranks = children(process.pid)
        process.send_signal(number)
        seconds, lines = rest_of(process, 60)
        assert not alive(ranks)
    assert seconds < NOTICE_SECONDS
    assert lines == [f"reshard: {what}; {GO_ON}"]
    assert process.returncode == code
    goes_on(words, tmp_path, undisturbed["tp2"])


@pytest.mark.parametrize(
    ("number", "code", "what"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM, in phase `move`"),
        (signal.SIGINT, 130, "interrupted"),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_job_of_one_rank_says_how_it_was_stopped(
    number: signal.Signals,
    code: int,
    what: str,
    words: list[str],
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    with moving(ALONE, words, tmp_path) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert err == f"reshard: {what}; {GO_ON}\n", out + err
    assert process.returncode == code
    goes_on(words, tmp_path, undisturbed["tp2"])


def test_a_notice_at_a_random_moment_is_heeded_in_one_line(
    long: bool, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """As torchrun gives it: to every rank, one after the other."""
    chance = random.Random(0)
    for number in range(40 if long else 2):
        folder, world = tmp_path / str(number), (1, 3)[number % 2]
        folder.mkdir()
        words = [*move("meta4", undisturbed.source, "tp2", folder / "dst"), SMALL_ROUNDS]
        with jobs.start(world, words, folder / "said", slowly, str(folder / "ledger")) as job:
            job.until(lambda folder=folder: (folder / "dst.lock").exists())
            time.sleep(chance.uniform(0.0, 1.2))
            for rank in range(world):
                job.send(rank, signal.SIGTERM)
            codes = job.wait(NOTICE_SECONDS)
        if not any(codes):
            assert_same_files(folder / "dst", undisturbed["tp2"])
            continue
        assert codes == [143] * world
        assert job.err.count("\n") == 1, job.err
        assert job.err.startswith("reshard: stopped by SIGTERM, in phase `"), job.err
        run(world, words, folder)
        assert_same_files(folder / "dst", undisturbed["tp2"])
        assert only(folder, "dst")


@pytest.mark.parametrize("how", ["kill once", "kill late once"])
def test_torchrun_heals_a_job_whose_rank_dies(
    how: str,
    words: list[str],
    undisturbed: Undisturbed,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if how != "kill once":
        request.getfixturevalue("only_long")
    report = ["--report", str(tmp_path / "report.json")]
    found = start([*sabotaged(RESTARTING, 1, how, tmp_path), *words, *report], tmp_path)
    assert (tmp_path / "reached").exists()
    assert found.returncode == 0, found.stderr
    assert len(ours(found.stderr)) <= 1, found.stderr
    assert found.stdout.count("done: ") == 1
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])
    assert only(tmp_path, "dst")


REFUSALS = {
    "a missing file": ("consolidated.02.pth` is missing", []),
    "a word": ("`engine.memry`", ["engine.memry=1GiB"]),
    "memory": ("engine.memory: 12.5MiB is too little for this plan", ["engine.memory=12.5MiB"]),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_said_once_however_often_torchrun_tries(
    refusal: str,
    long: bool,
    undisturbed: Undisturbed,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if refusal != "a missing file":
        request.getfixturevalue("only_long")
    pattern, more = REFUSALS[refusal]
    source = tmp_path / "src"
    source.mkdir()
    for file in undisturbed.source.iterdir():
        if refusal != "a missing file" or file.name != "consolidated.02.pth":
            (source / file.name).symlink_to(file)
    began = time.monotonic()
    words = move("meta4", source, "tp2", tmp_path / "dst", *more)
    launcher = RESTARTING if long else ONCE_MORE
    found = start([*launcher, "-m", "reshard", *words], tmp_path)
    assert found.returncode not in (0, -signal.SIGKILL)
    assert len(ours(found.stderr)) == 1, found.stderr
    assert pattern in ours(found.stderr)[0], found.stderr
    assert time.monotonic() - began < 90
    assert only(tmp_path, "src")


def test_a_failure_is_tried_again_and_said_each_time(
    only_long: None, words: list[str], tmp_path: Path
) -> None:
    """Four attempts, a line each: unlike a refusal, a failure may not come again."""
    found = start([*sabotaged(RESTARTING, 1, "fail", tmp_path), *words], tmp_path)
    assert found.returncode != 0
    lines = ours(found.stderr)
    assert 1 <= len(lines) <= 4, found.stderr
    assert set(lines) == {f"reshard: the disk of a test has failed; {GO_ON}"}
