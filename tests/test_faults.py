"""Jobs that are interrupted: what stays on the disk, what the next run makes of it, who says so."""

import fcntl
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard import journal
from tests import jobs
from tests.commands import call, done, model, move, one_line, read, refused, write
from tests.interrupted import SMALL_ROUNDS, Undisturbed, journalled, only, partial, run, wide
from tests.oracles.compare import assert_same, assert_same_files
from tests.sabotage import WRITE, sabotage, suffer

pytestmark = pytest.mark.fault


def interrupt(world: int, words: list[str], where: Path, nth: int = 8) -> None:
    """A job whose last rank comes to grief in the middle of moving: a single one is killed."""
    how = "kill" if world == 1 else "fail"
    job = jobs.finished(world, words, where / "said", sabotage, WRITE, world - 1, nth, how)
    assert any(job.wait(0)), "the job has not failed"


# Going on.

DIRECT, OWNER = "engine.exchange=direct", "engine.writers=owner"
WAYS = {
    "1 rank, as before": ("hf", 1, [], 1, []),
    "1 rank, as before, many files": ("tp2", 1, [], 1, []),
    "2 ranks, as before": ("tp2", 2, [], 2, []),
    "2 ranks, then 1 with more memory": ("hf", 2, [], 1, [DIRECT, "engine.memory=64MiB"]),
    "1 rank, then 3": ("tp2", 1, [], 3, []),
    "2 direct, then 2 collective by owner": ("tp2", 2, [DIRECT], 2, [OWNER]),
    "3 ranks, then 2 direct": ("hf", 3, [], 2, [DIRECT]),
}


@pytest.mark.parametrize(("target", "world", "words", "then", "other"), WAYS.values(), ids=WAYS)
def test_an_interrupted_job_goes_on_where_it_stopped(
    target: str,
    world: int,
    words: list[str],
    then: int,
    other: list[str],
    source: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    command = move("meta4", source, target, tmp_path / "dst")
    interrupt(world, [*command, SMALL_ROUNDS, *words], tmp_path)
    kept = {
        (item.file, item.offset) for item in journal.read(partial(tmp_path / "dst") / "journals")
    }
    before = journalled(partial(tmp_path / "dst"))
    assert kept
    moved = run(then, [*command, SMALL_ROUNDS, *other], tmp_path)["bytes"]
    whole = sum(file.stat().st_size for file in (tmp_path / "dst").rglob("*.safetensors"))
    assert moved["resumed"] == before, "what was journalled is not what was taken over"
    assert moved["written"] <= moved["written_bound"] - before, (
        "journalled pieces were written again"
    )
    assert whole - before <= moved["written"]
    assert_same_files(tmp_path / "dst", undisturbed[target])
    assert only(tmp_path, "dst")


def test_an_interrupted_job_may_be_interrupted_again(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    for world in (1, 2, 1):
        interrupt(world, words, tmp_path, nth=5)
        assert len(journal.journals(partial(tmp_path / "dst") / "journals")) >= 1
    run(2, words, tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])


def test_a_job_that_fails_says_so_and_goes_on_the_same_way(
    source: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*move("meta4", source, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    with monkeypatch.context() as patched:
        fail_at(patched, 5)
        found = call(*words)
    assert found.code == 1
    assert "the disk of a test has failed" in one_line(found.err)
    assert only(tmp_path, partial(tmp_path / "dst").name), "the lock or something else stays"
    run(1, words, tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed["hf"])


def fail_at(patched: pytest.MonkeyPatch, nth: int) -> None:
    """Let the `nth` round of this process fail when it is to be written."""
    from reshard.engine import Engine

    original, calls = Engine._write, 0

    def write_or_fail(self: Engine, *args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls >= nth:
            suffer("fail")
        return original(self, *args)

    patched.setattr(Engine, "_write", write_or_fail)


# What the disk may have done to the partial result meanwhile.


def flip(file: Path, offset: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte[0] ^ 0x40]))


def damage_written_byte(folder: Path) -> None:
    """One byte of a piece that is journalled as written."""
    record = list(journal.read(folder / "journals"))[3]
    flip(folder / "data" / "model.safetensors", record.offset + record.length // 2)


def damage_header(folder: Path) -> None:
    flip(folder / "data" / "model.safetensors", 20)


def lose_the_file(folder: Path) -> None:
    (folder / "data" / "model.safetensors").unlink()


def cut_the_file(folder: Path) -> None:
    os.truncate(folder / "data" / "model.safetensors", 5000)


def tear_the_journal(folder: Path) -> None:
    file = journal.journals(folder / "journals")[0]
    os.truncate(file, file.stat().st_size - 5)


def add_noise_to_the_journal(folder: Path) -> None:
    file = journal.journals(folder / "journals")[0]
    file.write_bytes(file.read_bytes() + os.urandom(1000))


def damage_a_journal_record(folder: Path) -> None:
    flip(journal.journals(folder / "journals")[0], 2 * journal.SIZE + 5)


def empty_the_journal(folder: Path) -> None:
    os.truncate(journal.journals(folder / "journals")[0], 0)


def lose_the_journals(folder: Path) -> None:
    for file in journal.journals(folder / "journals"):
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_written_byte,
        damage_header,
        lose_the_file,
        cut_the_file,
        tear_the_journal,
        add_noise_to_the_journal,
        damage_a_journal_record,
        empty_the_journal,
        lose_the_journals,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_partial_result_is_mended(
    damage: Callable[[Path], None], source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = [*move("meta4", source, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    interrupt(1, words, tmp_path)
    damage(partial(tmp_path / "dst"))
    run(1, words, tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed["hf"])
    done("verify", tmp_path / "dst")


@pytest.mark.parametrize("loss", [Path.unlink, lambda file: os.truncate(file, 100)])
def test_a_run_that_cannot_be_read_back_is_not_intact(
    loss: Callable[[Path], None],
    source: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files are lost after they were laid out, as when another rank is slow to do so."""
    words = [*move("meta4", source, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    interrupt(1, words, tmp_path)
    from reshard import commit, job
    from reshard.workspace import Workspace

    resume, lay_out, again = job.intact_runs, commit.lay_out, []

    def lose_and_resume(plan: Any, ranks: Any, workspace: Workspace, files: Any) -> journal.Table:
        loss(workspace.data / "model.safetensors")
        found = resume(plan, ranks, workspace, files)
        again.append(len(found))
        places = commit.TargetPlaces(plan.target)
        lay_out(workspace.data, plan.target, places, plan.target.files)
        return found

    monkeypatch.setattr(job, "intact_runs", lose_and_resume)
    run(1, words, tmp_path)
    assert again == [0]
    assert_same_files(tmp_path / "dst", undisturbed["hf"])


def test_the_progress_of_a_resumed_job_ends_at_100_percent(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*move("meta4", source, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    interrupt(1, words, tmp_path)
    from reshard.progress import Progress

    add, seen = Progress.add, []

    def noted(self: Progress, nbytes: int) -> None:
        add(self, nbytes)
        seen.append((self._done, self._total))

    monkeypatch.setattr(Progress, "add", noted)
    assert re.search(r"^done: .*/s, .* of it done before\), ", done(*words).out, re.MULTILINE)
    assert seen[-1][0] == seen[-1][1]


def test_each_rank_syncs_what_it_wrote_before_it_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    from reshard.distributed import Ranks
    from reshard.storage import Files

    for holder, name in ((Files, "sync"), (journal.Journal, "sync"), (Ranks, "barrier")):
        monkeypatch.setattr(holder, name, noting(getattr(holder, name), order))
    done(*move("meta4", source, "hf", tmp_path / "dst"), "engine.fsync=true")
    moved = order.index("Ranks.barrier moved")
    assert order[moved - 2 : moved] == ["Files.sync", "Journal.sync"]
    order.clear()
    done(*move("meta4", source, "hf", tmp_path / "other"), "engine.fsync=false")
    assert not any("sync" in item for item in order)


def noting(original: Callable[..., Any], order: list[str]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        order.append(" ".join([original.__qualname__, *(a for a in args if isinstance(a, str))]))
        return original(*args)

    return noted


def test_only_the_damaged_piece_is_written_again(source: Path, tmp_path: Path) -> None:
    words = [*move("meta4", source, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    interrupt(1, words, tmp_path)
    folder = partial(tmp_path / "dst")
    records = list(journal.read(folder / "journals"))
    damage_written_byte(folder)
    moved = run(1, words, tmp_path)["bytes"]
    before = sum(record.length for record in records)
    assert moved["written"] <= moved["written_bound"] - before + records[3].length


# A kill while something is in the way.


@pytest.mark.parametrize(
    ("point", "nth"),
    [(WRITE, 1), ("reshard.workspace:Workspace.publish", 1), ("reshard.workspace:sync", 1)],
    ids=["moving", "before the renames", "after the renames"],
)
def test_a_kill_while_an_older_target_is_replaced_costs_neither(
    point: str, nth: int, source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    done(*move("meta4", source, "hf", tmp_path / "dst"))
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), "--force"]
    job = jobs.finished(1, words, tmp_path / "said", sabotage, point, 0, nth, "kill")
    assert job.wait(0) == [-signal.SIGKILL]
    expected = undisturbed["tp2" if point.endswith("sync") else "hf"]
    assert_same_files(tmp_path / "dst", expected)
    run(1, words, tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])
    assert only(tmp_path, "dst"), os.listdir(tmp_path)


def replacing(source: Path, undisturbed: Undisturbed, folder: Path, *grief: Any) -> list[str]:
    """A job that was killed while it replaced an older target; its command."""
    shutil.copytree(undisturbed["hf"], folder / "dst")
    words = [*move("meta4", source, "tp2", folder / "dst"), "--force"]
    assert jobs.finished(1, words, folder / "said", sabotage, *grief).wait(0) == [-signal.SIGKILL]
    return words


BETWEEN = ("reshard.workspace:rename", 0, 2, "kill")


@pytest.mark.parametrize("other", ["tp2", "hf", "meta2"])
def test_a_target_out_of_the_way_comes_back_with_any_command(
    other: str, source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The same one without --force, that of the older target, and quite another."""
    replacing(source, undisturbed, tmp_path, *BETWEEN)
    assert not (tmp_path / "dst").exists()
    found = call(*move("meta4", source, other, tmp_path / "dst"))
    assert found.code == (0 if other == "hf" else 2), found.err
    assert ("already done" in found.out) == (other == "hf")
    assert_same_files(tmp_path / "dst", undisturbed["hf"])


@pytest.mark.parametrize("forced", [True, False])
def test_what_is_left_of_a_replaced_target_never_comes_back(
    forced: bool, source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Somebody moves the new one away before the next run finds what is left of the old one."""
    grief = ("shutil:os.unlink", 0, 2, "kill after")
    words = replacing(source, undisturbed, tmp_path, *grief)
    (tmp_path / "dst").rename(tmp_path / "kept")
    run(1, words if forced else words[:-1], tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])
    assert_same_files(tmp_path / "kept", undisturbed["tp2"])
    assert only(tmp_path, "dst", "kept")


# Several jobs on one target.


def test_the_partial_result_of_another_job_is_refused_unless_forced(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    interrupt(1, [*move("meta4", source, "hf", tmp_path / "dst"), SMALL_ROUNDS], tmp_path)
    folder = partial(tmp_path / "dst")
    words = move("meta4", source, "tp2", tmp_path / "dst")
    pattern = rf"`{folder}`: the partial result of a job with another source.*--force"
    refused(tmp_path, pattern, *words)
    run(1, [*words, "--force"], tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])
    assert only(tmp_path, "dst")


def test_a_source_that_has_changed_is_another_job(source: Path, tmp_path: Path) -> None:
    copy = write("meta4", tmp_path / "src", wide())
    words = [*move("meta4", copy, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    interrupt(1, words, tmp_path)
    os.utime(copy / "consolidated.02.pth", (1, 1))
    refused(tmp_path, r"dst.partial-\w+`: the partial result of a job with another source", *words)
    done(*words, "--force")
    os.utime(copy / "consolidated.02.pth", (2, 2))
    refused(tmp_path, r"dst`: exists and is not the result of this job.*--force", *words)


def test_a_lock_that_is_held_is_refused_and_a_stale_one_is_not(tmp_path: Path) -> None:
    small = write("meta8", tmp_path / "src")
    words = move("meta8", small, "tp4", tmp_path / "dst")
    with open(tmp_path / "dst.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(tmp_path, r"dst`: another job is writing it \(`.*dst.lock` is locked\)", *words)
        refused(tmp_path, r"another job is writing it", *words, "--force")
    done(*words)
    assert_same(read("tp4", tmp_path / "dst"), model())
    assert only(tmp_path, "src", "dst")


def test_a_second_job_on_a_target_is_refused_while_the_first_one_runs(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = move("meta4", source, "tp2", tmp_path / "dst")
    slow = [*words, SMALL_ROUNDS]
    with jobs.start(2, slow, tmp_path / "said", sabotage, WRITE, 0, 3, "dawdle") as first:
        first.until(lambda: list(tmp_path.glob("dst.partial-*/journals/*")))
        found = call(*words)
        assert found.code == 2
        assert re.search(r"dst`: another job is writing it", one_line(found.err))
        assert first.wait(60) == [0, 0]
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])


# Ranks that get on, or do not.


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_hangs_while_resuming_is_named(
    which: int, source: Path, tmp_path: Path
) -> None:
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), SMALL_ROUNDS, "engine.timeout=2"]
    interrupt(1, words, tmp_path)
    grief = ("reshard.resume:_intact", which, 2, "hang")
    job = jobs.finished(2, words, tmp_path / "said", sabotage, *grief)
    assert job.wait(0)[1 - which] == 1
    assert re.search(rf"rank {which} made no progress for 2 s .* in phase `resume`", job.err)


@pytest.mark.parametrize("exchange", ["collective", "direct"])
def test_a_slow_rank_is_not_taken_for_one_that_hangs(
    exchange: str, source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    slow = [*words, "engine.timeout=3", f"engine.exchange={exchange}"]
    job = jobs.finished(2, slow, tmp_path / "said", sabotage, WRITE, 1, 1, "dawdle")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert_same_files(tmp_path / "dst", undisturbed["tp2"])


def test_what_comes_to_the_target_while_a_job_runs_is_not_replaced(
    source: Path, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reshard.workspace import Workspace

    publish, precious = Workspace.publish, tmp_path / "dst" / "precious"

    def late(self: Workspace, **options: bool) -> None:
        precious.parent.mkdir()
        precious.write_text("mine")
        publish(self, **options)

    words = move("meta4", source, "hf", tmp_path / "dst")
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "publish", late)
        found = call(*words)
    assert found.code == 2
    assert "exists and is not the result of this job" in one_line(found.err)
    assert precious.read_text() == "mine"
    precious.unlink()
    assert run(1, words, tmp_path)["bytes"]["resumed"] > 0, "all was done again"
    assert_same_files(tmp_path / "dst", undisturbed["hf"])


def test_an_empty_directory_does_not_hide_what_was_moved_aside(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Stopped between the two renames; then `mkdir -p DST`, and another job with --force."""
    done(*move("meta4", source, "hf", tmp_path / "dst"))
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), "--force"]
    job = jobs.finished(
        1, words, tmp_path / "said", sabotage, "reshard.workspace:rename", 0, 2, "kill"
    )
    assert job.wait(0) == [-signal.SIGKILL]
    (tmp_path / "dst").mkdir()
    refused_late = call(*move("meta4", source, "gguf", tmp_path / "dst"))
    assert refused_late.code == 2, refused_late
    assert_same_files(tmp_path / "dst", undisturbed["hf"])


def test_a_damaged_result_of_the_same_job_is_replaced_by_force(
    source: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = move("meta4", source, "hf", tmp_path / "dst")
    done(*words)
    cut = tmp_path / "dst" / "model.safetensors"
    os.truncate(cut, 100)
    refused(tmp_path, r"model.safetensors`: missing or cut: .* --force", *words)
    done(*words, "--force")
    assert_same_files(tmp_path / "dst", undisturbed["hf"])


def test_ranks_whose_store_is_gone_end_with_one_line(source: Path, tmp_path: Path) -> None:
    """The first rank keeps it where no torchrun does: without it nobody can agree who speaks."""
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    with jobs.start(2, words, tmp_path / "said", sabotage, WRITE, 1, 3, "dawdle") as job:
        job.until(lambda: list(tmp_path.glob("dst.partial-*/journals/*")))
        del job.store
        codes = job.wait(30)
    assert codes == [1, 1]
    # torch's own lines are not silenced here: it was imported before the program.
    lines = [line for line in job.err.splitlines() if line.startswith("reshard:")]
    assert len(lines) == 1, lines
    expected = r"reshard: rank 0 is gone, so the job ends, .* where this one stopped"
    assert re.fullmatch(expected, lines[0])
