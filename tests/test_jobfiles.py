"""A queue in a directory: who has a job, and what becomes of its file."""

import json
import os
from pathlib import Path

import pytest

from reshard.jobfiles import DONE, EMPTY_SECONDS, JobFiles


@pytest.fixture
def queue(tmp_path: Path) -> JobFiles:
    made = JobFiles(tmp_path)
    made.make()
    return made


def put(queue: JobFiles, *names: str) -> None:
    for name in names:
        (queue.folder / "queued" / name).write_text("src: {}")


def test_jobs_are_taken_in_the_order_of_their_names(queue: JobFiles) -> None:
    put(queue, "b.yaml", "a b.yaml", "10.yaml")
    taken = []
    for _ in range(3):
        with queue.claimed() as claim:
            assert claim is not None
            taken.append(claim.name)
            queue.end(claim, DONE, {"state": "fresh"})
    assert taken == ["10", "a b", "b"]
    assert queue.counts() == {"queued": 0, "running": 0, "done": 3, "failed": 0}
    assert json.loads((queue.folder / "done" / "a b.json").read_text()) == {"state": "fresh"}
    assert os.listdir(queue.folder / "running") == []


def test_what_is_no_job_is_left_alone(queue: JobFiles) -> None:
    put(queue, ".hidden.yaml", "notes.txt", "job.yaml.tmp")
    (queue.folder / "queued" / "folder.yaml").mkdir()
    with queue.claimed() as claim:
        assert claim is None


def test_a_job_is_claimed_once_and_found_again_when_its_service_is_gone(queue: JobFiles) -> None:
    put(queue, "a.yaml", "b.yaml")
    with queue.claimed() as first, queue.claimed() as second, queue.claimed() as third:
        assert (first and first.name, second and second.name, third) == ("a", "b", None)
        assert first is not None
        assert first.path.read_text() == "src: {}"
        queue.put_back(first)
    with queue.claimed() as again, queue.claimed() as other:
        assert again is not None
        assert other is not None
        assert (again.name, again.starts) == ("a", 1), "the first start was put back"
        assert (other.name, other.starts) == ("b", 2)


@pytest.mark.parametrize("name", ["n" * 250, "é" * 125, "two\nlines", "\udcff"], ids=ascii)
def test_a_job_may_have_any_name_that_a_file_may_have(name: str, queue: JobFiles) -> None:
    put(queue, f"{name}.yaml")
    with queue.claimed() as claim:
        assert claim is not None
        assert claim.name.isprintable()
        assert claim.path.read_text() == "src: {}"
    with queue.claimed() as again:
        assert again is not None
        assert (again.name, again.starts) == (claim.name, 2)
        queue.end(again, DONE, {"state": "fresh"})
    assert sorted(os.listdir(queue.folder / "done")) == [f"{again.name}.json", f"{again.name}.yaml"]
    assert os.listdir(queue.folder / "running") == []


def test_a_file_that_is_still_empty_is_waited_for(queue: JobFiles) -> None:
    path = queue.folder / "queued" / "a.yaml"
    path.touch()
    with queue.claimed() as claim:
        assert claim is None
    past = path.stat().st_mtime - EMPTY_SECONDS - 1
    os.utime(path, (past, past))
    with queue.claimed() as claim:
        assert claim is not None, "nobody writes for that long: it fails as what it is"


def test_a_status_is_never_seen_in_part(queue: JobFiles) -> None:
    queue.status({"state": "idle"})
    assert json.loads((queue.folder / "status.json").read_text()) == {"state": "idle"}
    assert sorted(os.listdir(queue.folder)) == [
        "done",
        "failed",
        "queued",
        "running",
        "status.json",
    ]
