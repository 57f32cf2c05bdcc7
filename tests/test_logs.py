"""What is said, what is kept in files, and what is left out."""

import re
from pathlib import Path

import pytest

from tests import jobs
from tests.commands import call, done, move, one_line, refused, write
from tests.interrupted import Undisturbed
from tests.sabotage import WRITE, sabotage


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return move("meta2", write("meta2", tmp_path / "src"), "tp2", tmp_path / "dst")


def test_every_rank_keeps_a_log(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "new"
    words = [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), "--log-dir", str(folder)]
    job = jobs.finished(2, words, tmp_path / "said")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.log", "rank-1.log"]
    for path in folder.iterdir():
        lines = path.read_text().splitlines()
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}Z \S", line) for line in lines)
        assert [line.split("phase ")[1] for line in lines if "phase move" in line] == [
            "move",
            "moved",
        ]
        assert re.search(
            r"read \S+ MB, exchanged .*, written .*; peak memory \d+ MB", path.read_text()
        )
    assert "done: " in (folder / "rank-0.log").read_text()


def test_a_log_has_the_failure_with_its_place_and_the_terminal_one_line(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = [*move("meta4", undisturbed.source, "tp2", tmp_path / "dst"), "--log-dir"]
    job = jobs.finished(
        2, [*words, str(tmp_path / "logs")], tmp_path / "said", sabotage, WRITE, 1, 1, "bug"
    )
    assert job.wait(0) == [1, 1]
    one_line(job.err)
    assert "Traceback" in (tmp_path / "logs" / "rank-1.log").read_text()
    again = jobs.finished(2, [*words, str(tmp_path / "logs")], tmp_path / "again")
    assert again.wait(0) == [0, 0]
    text = (tmp_path / "logs" / "rank-1.log").read_text()
    assert text.index("a bug") < text.index("phase published"), "the log goes on where it was"


def test_verbose_says_what_is_done_once(words: list[str]) -> None:
    found = call(*words, "-v")
    assert found.code == 0
    assert re.search(r"^\d\d:\d\d:\d\d phase move$", found.err, re.MULTILINE)
    assert found.out.count("done: ") == 1
    assert "done: " not in found.err
    assert done(*words, "--force").err == "", "the next command is as before"


def test_quiet_leaves_out_all_but_warnings_and_errors(tmp_path: Path, words: list[str]) -> None:
    assert done(*words, "--quiet").out == ""
    assert done(*words, "-q").out == "", "already done"
    (tmp_path / "src" / "consolidated.01.pth").unlink()
    assert "is missing" in one_line(call(*words, "-q").err)


def test_both_at_once_are_refused(tmp_path: Path, words: list[str]) -> None:
    refused(tmp_path, r"--quiet and --verbose", *words, "-v", "-q")


def test_a_log_directory_that_cannot_be_is_refused(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(
        tmp_path, r"--log-dir: .*file.*name a directory", *words, "--log-dir", tmp_path / "file"
    )
