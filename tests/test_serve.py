"""The service: twenty jobs in one group, kills, stops, what fails in any phase, a watched run."""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard.arrivals import Arrivals
from reshard.errors import CheckpointError, StorageError
from reshard.jobfiles import JobFiles
from reshard.serve import MAX_STARTS
from tests import jobs
from tests.commands import call, done, model, one_line, read, refused, write
from tests.interrupted import SMALL_ROUNDS, Undisturbed
from tests.oracles import dcp, hf, models, nanotron
from tests.oracles.compare import assert_same, assert_same_files
from tests.sabotage import EVERY_RANK, WRITE, replace, sabotage
from tests.test_errors_travel import PHASES

pytestmark = pytest.mark.fault

POLL = ["--poll", "0.02"]


def add(queue: Path, name: str, source: Path, kind: str, target: str, where: Path) -> None:
    """Put a job into the queue as a person would."""
    (queue / "queued").mkdir(parents=True, exist_ok=True)
    (queue / "queued" / f"{name}.yaml").write_text(
        f"src:\n  topology: {kind}\n  path: {source}\ndst:\n  topology: {target}\n  path: {where}\n"
    )


def found_in(queue: Path) -> dict[str, list[str]]:
    """The jobs by their state."""
    states = ("queued", "running", "done", "failed")
    return {name: sorted(p.stem for p in (queue / name).glob("*.yaml")) for name in states}


def words(queue: Path, *more: object) -> list[str]:
    return ["serve", "--jobs", str(queue), *POLL, *map(str, more)]


def test_twenty_jobs_two_bad_one_kill(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A rank is killed in the middle of a job; the next start goes on with what it left."""
    queue, good = tmp_path / "queue", [f"{number:02}" for number in range(20)]
    small_source = write("meta4", tmp_path / "small")
    for name in good:
        target, source = "tp2" if int(name) % 2 else "hf", small_source
        if name == "07":
            source = undisturbed.source
        add(queue, name, source, "meta4", target, tmp_path / "out" / name)
    (queue / "queued" / "03.yaml").write_text("src: {topolgy: meta4}\n")
    add(queue, "11", tmp_path / "absent", "meta4", "hf", tmp_path / "out" / "11")
    note = tmp_path / "reached"
    small = words(queue, "--once", SMALL_ROUNDS)
    with jobs.start(2, small, tmp_path / "said", on_write_of, "07", note) as job:
        job.until(note.exists)
        job.kill(1)
        assert job.wait(jobs.SOON)[0] == 1
    assert re.match(r"reshard: rank 1 died in phase `[\w ]+`", one_line(job.err))
    left = found_in(queue)
    assert left["running"] == ["07"]
    assert left["done"] == [name for name in good[:7] if name != "03"]
    again = jobs.finished(2, words(queue, "--once"), tmp_path / "said-again")
    assert (again.wait(0), again.err) == ([0, 0], "")
    assert found_in(queue) == {
        "queued": [],
        "running": [],
        "done": [name for name in good if name not in ("03", "11")],
        "failed": ["03", "11"],
    }
    assert len(again.out.splitlines()) == 1 + 20 - 7, "one line for each job, and one at the start"
    assert "07: done: " in again.out
    for name in found_in(queue)["done"]:
        kind = "tp2" if int(name) % 2 else "hf"
        if name == "07":
            assert_same_files(tmp_path / "out" / name, undisturbed[kind])
        else:
            assert_same(read(kind, tmp_path / "out" / name), model())
        report = json.loads((queue / "done" / f"{name}.json").read_text())
        assert report["state"] == ("resumed" if name == "07" else "fresh")
    bad = [json.loads((queue / "failed" / f"{name}.json").read_text()) for name in ("03", "11")]
    assert "did you mean `topology`?" in bad[0]["error"]
    assert re.search(r"absent`: no such directory", bad[1]["error"])
    assert [record["exit_code"] for record in bad] == [2, 2]
    assert not list(queue.glob("*/*.lock")) + list(queue.glob("*/*.starts"))


def on_write_of(rank: int, name: str, note: str | Path) -> None:
    """Dawdle, and leave a note, when the pieces of one job are written."""
    current = [""]

    def named(original: Callable[..., Any], service: Any, job: str) -> Any:
        current[0] = job
        return original(service, job)

    def slow(original: Callable[..., Any], *args: Any) -> Any:
        written = original(*args)
        if current[0] == name:
            Path(note).touch()
            time.sleep(0.2)
        return written

    replace("reshard.serve:_Service.do", named)
    replace(WRITE, slow)


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_in_a_job_is_a_good_end_and_the_next_start_goes_on(
    world: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    queue, note = tmp_path / "queue", tmp_path / "reached"
    add(queue, "one", undisturbed.source, "meta4", "tp2", tmp_path / "one")
    grief = (WRITE, EVERY_RANK, 3, "sleep 0.2", str(note))
    small = words(queue, SMALL_ROUNDS)
    with jobs.start(world, small, tmp_path / "said", sabotage, *grief) as job:
        job.until(note.exists)
        for rank in range(world):
            job.send(rank, signal.SIGTERM)
        assert job.wait(jobs.SOON) == [0] * world
    assert job.err == ""
    assert job.out.splitlines()[-1] == (
        "stopped; one stays in running/, and the next start goes on with it"
    )
    assert found_in(queue)["running"] == ["one"]
    assert not (tmp_path / "one").exists()
    assert json.loads((queue / "status.json").read_text())["state"] == "stopped"
    job = jobs.finished(2, words(queue, "--once"), tmp_path / "said-again")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert json.loads((queue / "done" / "one.json").read_text())["state"] == "resumed"
    assert_same_files(tmp_path / "one", undisturbed["tp2"])


def test_an_idle_service_waits_shows_that_it_lives_and_stops_well(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    queue, status = tmp_path / "queue", tmp_path / "queue" / "status.json"
    with jobs.start(2, words(queue), tmp_path / "said") as job:
        job.until(status.exists)
        assert json.loads(status.read_text())["state"] == "idle"
        add(queue, "late", undisturbed.source, "meta4", "tp2", tmp_path / "late")
        job.until((queue / "done" / "late.json").exists)
        job.until(lambda: json.loads(status.read_text())["done"] == 1)
        job.send(0, signal.SIGTERM)
        assert job.wait(jobs.SOON) == [0, 0]
    assert (job.err, job.out.splitlines()[-1]) == ("", "stopped")
    assert_same_files(tmp_path / "late", undisturbed["tp2"])


# Of the phases of a job, those that a service reaches; where all ranks have met for the last time
# there is nothing left of the job that could fail.
REACHED = [name for name in PHASES if name not in ("report", "done", "exchange", "lay out")]
REACHED += ["lay out"]
ERRORS = (StorageError("a disk"), CheckpointError("a file"), KeyError("a bug"), MemoryError())


def test_what_fails_in_any_phase_on_any_rank_ends_that_job_alone(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """One after another, in one group; then a job that is done."""
    queue, cases = tmp_path / "queue", list(enumerate(REACHED))
    for number, _ in cases:
        add(queue, f"{number:02}", undisturbed.source, "meta4", "tp2", tmp_path / f"{number:02}")
    add(queue, "good", undisturbed.source, "meta4", "tp2", tmp_path / "good")
    more = ["--once", SMALL_ROUNDS, "engine.writers=owner", "engine.verify=true"]
    job = jobs.finished(3, words(queue, *more), tmp_path / "said", troubles)
    assert (job.wait(0), job.err) == ([0, 0, 0], ""), job.out
    assert found_in(queue)["failed"] == [f"{number:02}" for number, _ in cases], job.out
    assert found_in(queue)["done"] == ["good"]
    for number, name in cases:
        record = json.loads((queue / "failed" / f"{number:02}.json").read_text())
        assert re.search("a disk|a file|a bug|out of memory", record["error"]), (name, record)
        assert (tmp_path / f"{number:02}").exists() == PHASES[name].published, name
    assert_same_files(tmp_path / "good", undisturbed["tp2"])


def troubles(rank: int) -> None:
    """Job number n meets an error in phase n, in its turn on one rank and of one kind."""
    current, calls = [-1], dict.fromkeys(REACHED, 0)

    def counted(original: Callable[..., Any], service: Any, name: str) -> Any:
        current[0] = int(name) if name.isdecimal() else -1
        calls.update(dict.fromkeys(REACHED, 0))
        return original(service, name)

    def trouble_in(number: int, phase: str) -> None:
        which = 0 if PHASES[phase].first else number % 3
        error = ERRORS[number % len(ERRORS)]

        def suffering(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
            calls[phase] += 1
            if (rank, current[0], calls[phase]) == (which, number, PHASES[phase].nth):
                raise type(error)(*error.args)
            return original(*args, **options)

        replace(PHASES[phase].where, suffering)

    replace("reshard.serve:_Service.do", counted)
    for number, phase in enumerate(REACHED):
        trouble_in(number, phase)


def test_a_job_that_ends_the_service_every_time_is_given_up(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    queue = tmp_path / "queue"
    add(queue, "poison", undisturbed.source, "meta4", "tp2", tmp_path / "poison")
    add(queue, "queued", undisturbed.source, "meta4", "tp2", tmp_path / "good")
    JobFiles(queue).make()
    for _ in range(MAX_STARTS):
        with JobFiles(queue).claimed() as claim:
            assert claim is not None
            assert claim.name == "poison"
    found = done(*words(queue, "--once"))
    assert (
        f"poison: failed: the service ended {MAX_STARTS} times in the middle of this job"
        in found.out
    )
    assert found_in(queue)["done"] == ["queued"]


def test_two_services_share_a_queue(undisturbed: Undisturbed, tmp_path: Path) -> None:
    queue, names = tmp_path / "queue", [f"{number}" for number in range(6)]
    for name in names:
        add(queue, name, undisturbed.source, "meta4", "tp2", tmp_path / "out" / name)
    slow = (WRITE, EVERY_RANK, 1, "sleep 0.01")
    both = [
        jobs.start(1, words(queue, "--once"), tmp_path / f"said-{who}", sabotage, *slow)
        for who in "ab"
    ]
    for job in both:
        with job:
            assert (job.wait(60), job.err) == ([0], "")
    assert found_in(queue) == {"queued": [], "running": [], "done": names, "failed": []}
    lines = [line for job in both for line in job.out.splitlines() if ": done: " in line]
    assert sorted(line[0] for line in lines) == names, "each job is done once, by one of them"


def test_a_backend_of_a_job_of_its_own_is_refused(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    (queue / "queued").mkdir(parents=True)
    (queue / "queued" / "one.yaml").write_text("engine: {backend: nccl}")
    found = done(*words(queue, "--once"))
    assert "one: failed: engine.backend=nccl: this service runs on gloo" in found.out


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        (["--dst", "hf"], r"or give --watch"),
        (["--watch", "."], r"where to\? give --dst SPEC dst.path=DIR"),
        (["--watch", ".", "--dst", "hf", "dst.path=/x", "src.path=y"], r"leave src.path out"),
        (["--watch", "absent", "--dst", "hf", "dst.path=x"], r"`absent`: no such directory"),
        (["--poll", "0"], r"--poll: 0, expected"),
        (
            ["--watch", ".", "--dst", "hf", "dst.path=./x"],
            r"`./x` lies in what is watched",
        ),
        (["engine.memry=1GiB"], r"did you mean `memory`"),
    ],
    ids=str,
)
def test_what_would_fail_for_every_job_is_refused(
    more: list[str], pattern: str, tmp_path: Path
) -> None:
    assert re.search(pattern, one_line(call(*words(tmp_path / "queue", *more)).err))


def test_a_queue_is_needed(tmp_path: Path) -> None:
    refused(tmp_path, r"give --jobs DIR", "serve")


def test_a_training_run_is_watched(tmp_path: Path) -> None:
    """Three steps of a loop, saved while the service looks; each becomes a model that loads."""
    run, queue, out = tmp_path / "run", tmp_path / "queue", tmp_path / "out"
    run.mkdir()
    write("hf", tmp_path / "assets")
    watch = ["--watch", run, "--dst", "hf", f"src.assets={tmp_path / 'assets'}", f"dst.path={out}"]
    steps = [models.with_normal_values(model(), seed) for seed in range(3)]
    with jobs.start(2, words(queue, *watch), tmp_path / "said") as job:
        job.until((queue / "status.json").exists)
        for number, step in enumerate(steps):
            dcp.write_fsdp(step, run / f"step-{number}", 1, no_dist=True)
            if number == 1:
                (run / "step-9").mkdir()  # a step whose saving never ends
                (run / "step-9" / "__0_0.distcp").write_bytes(b"half")
        job.until(lambda: len(found_in(queue)["done"]) == 3, 60)
        job.send(0, signal.SIGTERM)
        assert job.wait(jobs.SOON) == [0, 0]
    assert found_in(queue)["done"] == ["run-step-0", "run-step-1", "run-step-2"]
    assert found_in(queue)["failed"] == []
    for number, step in enumerate(steps):
        assert_same(hf.read(out / f"step-{number}"), step)
    again = done(*words(queue, *watch, "--once"))
    assert len(again.out.splitlines()) == 1, "each checkpoint is taken once, also by a later start"
    assert sorted(json.loads((queue / "watched.json").read_text())) == [
        "step-0",
        "step-1",
        "step-2",
    ]


def test_a_run_may_be_called_anything_and_its_checkpoints_may_go(tmp_path: Path) -> None:
    """Its name becomes part of a job's; what is deleted between two looks is forgotten."""
    run, queue, out = tmp_path / ".run", tmp_path / "queue", tmp_path / "out"
    write("hf", run / "step-1")
    looked = Arrivals(run, tmp_path / "watched.json")
    assert list(looked.look()) == []
    assert looked.pending
    (run / "step-1").rename(tmp_path / "elsewhere")
    assert list(looked.look()) == []
    assert not looked.pending
    (tmp_path / "elsewhere").rename(run / "step-1")
    watch = ["--watch", run, "--dst", "meta2", f"dst.path={out}", "--once"]
    done(*words(queue, *watch))
    assert found_in(queue)["done"] == ["run-step-1"]
    assert_same(read("meta2", out / "step-1"), model())


def test_a_run_that_is_gone_may_come_back(tmp_path: Path) -> None:
    """Meanwhile the service lives on, and says once that it looks in vain."""
    run, queue, out = tmp_path / "run", tmp_path / "queue", tmp_path / "out"
    run.mkdir()
    watch = ["--watch", run, "--dst", "meta2", f"dst.path={out}"]
    with jobs.start(2, words(queue, *watch), tmp_path / "said") as job:
        job.until((queue / "status.json").exists)
        run.rmdir()
        job.until(lambda: "cannot list" in job.out)
        write("hf", run / "step-1")
        job.until((queue / "done" / "run-step-1.json").exists)
        job.send(0, signal.SIGTERM)
        assert job.wait(jobs.SOON) == [0, 0]
    assert job.out.count("looked for again") == 1
    assert_same(read("meta2", out / "step-1"), model())


def test_what_lies_in_the_queue_and_is_no_job_is_named_once(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    (queue / "queued" / "folder.yaml").mkdir(parents=True)
    (queue / "queued" / "job.yml").write_text("")
    (queue / "queued" / "round.yaml").symlink_to("round.yaml")
    found = done(*words(queue, "--once"))
    assert [line.split(":")[0] for line in found.out.splitlines()[1:]] == [
        "queued/folder.yaml",
        "queued/job.yml",
        "queued/round.yaml",
    ]


def test_force_replaces_what_is_in_the_way(undisturbed: Undisturbed, tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    for name, target in (("1", "tp2"), ("2", "hf")):
        add(queue, name, undisturbed.source, "meta4", target, tmp_path / "out")
    assert "2: failed" in done(*words(queue, "--once")).out
    (queue / "failed" / "2.yaml").rename(queue / "queued" / "2.yaml")
    assert "2: done" in done(*words(queue, "--once", "--force")).out
    assert_same_files(tmp_path / "out", undisturbed["hf"])


def test_looks_may_be_rarer_than_the_time_without_progress_is_long(tmp_path: Path) -> None:
    slow = ["serve", "--jobs", str(tmp_path), "--poll", "3", "engine.timeout=1"]
    with jobs.start(2, slow, tmp_path / "said") as job:
        time.sleep(3.5)
        job.send(1, signal.SIGTERM)
        assert job.wait(jobs.SOON) == [0, 0]
    assert job.err == ""


def test_a_disk_that_hangs_below_the_status_file_does_not_keep_a_service(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    grief = ("reshard.jobfiles:JobFiles.status", 0, 3, "hang", str(tmp_path / "hangs"))
    add(queue, "bad", tmp_path / "absent", "meta4", "tp2", tmp_path / "out")
    with jobs.start(2, words(queue), tmp_path / "said", sabotage, *grief) as job:
        job.until((tmp_path / "hangs").exists)
        job.send(1, signal.SIGTERM)
        assert job.wait(jobs.SOON) == [0, 0]


def test_steps_of_nanotron_and_of_transformers_are_taken_when_they_are_complete(
    tmp_path: Path,
) -> None:
    run, queue, out = tmp_path / "run", tmp_path / "queue", tmp_path / "out"
    nanotron.write(model(), run / "10", 2, 1)
    nanotron.write(model(), run / "20", 2, 1)
    (run / "latest.txt").write_text("10")
    write("hf2", run / "checkpoint-5")
    write("hf2", run / "checkpoint-6")
    shard = next((run / "checkpoint-6").glob("*-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    watch = ["--watch", run, "--dst", "meta2", f"dst.path={out}", "--once"]
    done(*words(queue, *watch))
    assert sorted(path.name for path in out.iterdir()) == ["10", "checkpoint-5"]
    (run / "latest.txt").write_text("20")
    done(*words(queue, *watch))
    assert sorted(path.name for path in out.iterdir()) == ["10", "20", "checkpoint-5"]
    assert_same(read("meta2", out / "20"), model())
