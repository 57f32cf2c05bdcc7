"""Disks that are full or lose a file, file sizes with a limit, and mount points as targets."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs
from tests.commands import call, done, move, one_line, write
from tests.interrupted import (
    SMALL_ROUNDS,
    Undisturbed,
    journalled,
    only,
    partial,
    run,
    wide,
)
from tests.oracles.compare import assert_same_files
from tests.sabotage import WRITE, sabotage

pytestmark = pytest.mark.fault

GO_ON = "the same command goes on where this one stopped"
STEPS = {
    "laying out": ("reshard.commit:create", 2),
    "moving": (WRITE, 3),
    "journalling": ("reshard.journal:Journal.append", 3),
    "small files": ("reshard.commit:write_pieces", 1),
    "the manifest": ("reshard.manifest:written", 1),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, on which two results do not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left of a disk; the file that does."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def test_a_result_that_does_not_fit_is_refused_before_it_is_begun(
    undisturbed: Undisturbed, disk: Path
) -> None:
    os.posix_fallocate(os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY), 0, 6 << 20)
    found = call(*move("meta4", undisturbed.source, "tp2", disk / "dst"))
    assert found.code == 2
    assert "dst.path: needs" in one_line(found.err)
    assert only(disk, "ballast")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_runs_full_costs_only_time(
    world: int, step: str, undisturbed: Undisturbed, disk: Path, tmp_path: Path
) -> None:
    where, nth = STEPS[step]
    words = [*move("meta4", undisturbed.source, "tp2", disk / "dst"), SMALL_ROUNDS]
    grief = (where, 0, nth, "wait", str(tmp_path / "reached"))
    with jobs.start(world, words, tmp_path / "said", sabotage, *grief) as job:
        job.until((tmp_path / "reached").exists)
        ballast = fill(disk)
        (tmp_path / "reached").unlink()
        assert job.wait(30) == [1] * world
    line = one_line(job.err)
    assert "dst.partial-" in line
    assert line.endswith(f": No space left on device; free some space; {GO_ON}"), line
    kept = journalled(partial(disk / "dst"))
    ballast.unlink()
    moved = run(world, words, tmp_path)["bytes"]
    assert moved["resumed"] == kept
    assert_same_files(disk / "dst", undisturbed["tp2"])
    assert only(disk, "dst")


def limited(rank: int, size: int) -> None:
    """No file of this rank may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(("target", "size"), [("hf", 1 << 20), ("tp2", 50_000), ("tp2", 2000)])
def test_a_limit_on_the_size_of_files_is_said(
    target: str, size: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """So small that all weights, some of them, or also the journal is too large."""
    words = [*move("meta4", undisturbed.source, target, tmp_path / "dst"), SMALL_ROUNDS]
    job = jobs.finished(2, words, tmp_path / "said", limited, size)
    assert job.wait(0) == [1, 1]
    assert "dst.partial-" in one_line(job.err)
    assert "File too large" in job.err
    assert job.err.endswith(f"{GO_ON}\n")
    run(2, words, tmp_path)
    assert_same_files(tmp_path / "dst", undisturbed[target])
    assert only(tmp_path, "dst")


def lost(words: list[str], world: int, folder: Path, file: Path, aside: Path) -> jobs.Job:
    """A job that loses a file of its source while it moves."""
    grief = (WRITE, 0, 2, "wait", str(folder / "reached"))
    with jobs.start(world, words, folder / "said", sabotage, *grief) as job:
        job.until((folder / "reached").exists)
        file.rename(aside)
        (folder / "reached").unlink()
        job.wait(30)
    return job


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["meta4", "hf6"])
def test_a_source_file_that_is_lost_is_named_and_can_be_put_back(
    world: int, kind: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """One of `hf6` is not open yet, one of `meta4` is."""
    source = write(kind, tmp_path / "src", wide())
    words = [*move(kind.rstrip("6"), source, "tp2", tmp_path / "dst"), SMALL_ROUNDS]
    last = max(file for file in source.iterdir() if file.suffix in (".pth", ".safetensors"))
    job = lost(words, world, tmp_path, last, tmp_path / "aside")
    assert all(job.wait(0)), job.err
    line = one_line(job.err)
    assert f"`{last}`: " in line, line
    kept = journalled(partial(tmp_path / "dst"))
    found = call(*words)
    assert (found.code, last.name in one_line(found.err)) == (2, True), found.err
    (tmp_path / "aside").rename(last)
    assert run(world, words, tmp_path)["bytes"]["resumed"] == kept > 0
    assert only(tmp_path, "src", "dst")
    done("verify", tmp_path / "dst")
    done("verify", tmp_path / "dst", undisturbed["tp2"])
    assert line.endswith(GO_ON), line


def test_a_mount_point_is_no_target_but_a_directory_below_it_is(
    undisturbed: Undisturbed, disk: Path
) -> None:
    for force in ([], ["--force"]):
        found = call(*move("meta4", undisturbed.source, "tp2", disk, *force))
        assert found.code == 2
        assert "is a symlink or a mount point" in one_line(found.err)
        assert "give dst.path a directory below it" in found.err
        assert not list(disk.iterdir())
        assert not list(disk.parent.glob("disk.*"))
    done(*move("meta4", undisturbed.source, "tp2", disk / "dst"))
    assert_same_files(disk / "dst", undisturbed["tp2"])
    assert only(disk, "dst")


@pytest.mark.parametrize("world", [1, 2])
def test_a_source_that_is_written_meanwhile_is_not_published(
    world: int, source: Path, tmp_path: Path
) -> None:
    """Of a file that is saved again while it is read, one part would be old and the other new."""
    copy = Path(shutil.copytree(source, tmp_path / "src"))
    words = [*move("meta4", copy, "hf", tmp_path / "dst"), SMALL_ROUNDS]
    grief = (WRITE, 0, 3, "nothing", str(copy / "consolidated.01.pth"))
    job = jobs.finished(world, words, tmp_path / "said", sabotage, *grief)
    assert job.wait(0) == [2] * world
    assert "consolidated.01.pth`: was changed while it was read" in one_line(job.err)
    assert not [path for path in tmp_path.glob("dst*") if path.is_dir()], "the mixture is kept"
    done(*words)
