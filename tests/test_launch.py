"""The program as people start it: launch/, stock torchrun and the batch files."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import model, move, read, write
from tests.launched import ROOT, SHIM, STOCK, environment, ours, start
from tests.oracles import models
from tests.oracles.compare import assert_same
from tests.sabotage import WRITE


def test_the_shim_runs_a_job_and_passes_its_success_on(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    found = start(
        [*SHIM, "-m", "reshard", *move("meta8", source, "tp4", tmp_path / "dst")], tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert found.stdout.splitlines()[-1].startswith("done: ")
    assert found.stdout.count("done: ") == 1, "more than one rank speaks"
    assert_same(read("tp4", tmp_path / "dst"), model())


@pytest.mark.parametrize("where", ["words", "source"])
def test_the_shim_passes_a_refusal_on_in_one_line(where: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "tp4", tmp_path / "dst")
    if where == "words":
        words.append("engine.memry=1GiB")
    else:
        (source / "consolidated.03.pth").unlink()
    began = time.monotonic()
    found = start([*SHIM, "-m", "reshard", *words], tmp_path)
    assert found.returncode == 2, found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr
    expected = {
        "words": r"`engine.memry`",
        "source": r"consolidated.03.pth` is missing: found 7 of 8",
    }
    assert re.match(rf"reshard: .*{expected[where]}", found.stderr)
    assert time.monotonic() - began < 30
    assert not list(tmp_path.glob("dst*"))


@pytest.mark.parametrize("where", ["words", "source"])
def test_stock_torchrun_shows_one_line_of_ours(where: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "tp4", tmp_path / "dst")
    if where == "words":
        words.append("engine.memry=1GiB")
    else:
        (source / "consolidated.03.pth").unlink()
    found = start([*STOCK, "-m", "reshard", *words], tmp_path)
    assert found.returncode != 0
    expected = {"words": r"`engine.memry`", "source": r"consolidated.03.pth` is missing"}
    assert len(ours(found.stderr)) == 1, found.stderr
    assert re.search(expected[where], ours(found.stderr)[0])


def test_what_only_another_rank_is_refused_is_said(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nfrom reshard.cli import entry\n"
        "sys.argv += ['engine.memry=1GiB'] if os.environ['RANK'] == '1' else []\nentry()\n"
    )
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "tp4", tmp_path / "dst")
    found = start([*STOCK, str(script), *words], tmp_path)
    assert found.returncode != 0
    assert len(ours(found.stderr)) == 1, found.stderr
    assert "`engine.memry`" in ours(found.stderr)[0]


@pytest.mark.fault
@pytest.mark.parametrize(("launcher", "which"), [(SHIM, 0), (STOCK, 1)], ids=["shim", "stock"])
def test_a_killed_rank_is_told_in_one_line(launcher: list[str], which: int, tmp_path: Path) -> None:
    source = write("meta4", tmp_path / "src", models.wide_model(4 << 20))
    words = [*move("meta4", source, "tp2", tmp_path / "dst"), "engine.memory=13MiB"]
    command = [*launcher, "-m", "tests.sabotage", WRITE, str(which), "5", "kill late", "", *words]
    found = start(command, tmp_path)
    assert found.returncode not in (0, 2)
    assert len(ours(found.stderr)) == 1, found.stderr
    assert f"rank {which}" in ours(found.stderr)[0], found.stderr
    assert not (tmp_path / "dst").exists()


def test_the_shim_says_how_it_is_used(tmp_path: Path) -> None:
    shown = subprocess.run([*SHIM[:2], "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "-m reshard" in shown.stdout


def dry_run(*words: str, **more: str) -> str:
    """The command that launch/local.sh would start."""
    script = [str(ROOT / "launch" / "local.sh"), "--dry-run", *words]
    done = subprocess.run(
        script, env=environment(**more), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_local_script_starts_a_rank_per_gpu_or_core() -> None:
    start = rf"{ROOT}/launch/(\.\./launch/)?torchrun --nproc"
    assert re.fullmatch(
        rf"{start} 3 -m reshard --src meta8 --dst hf", dry_run("3", "--src", "meta8", "--dst", "hf")
    )
    shown = dry_run(CUDA_VISIBLE_DEVICES="0,1,2,5")
    assert re.fullmatch(rf"{start} 4 -m reshard --src meta8 --dst tp4", shown), shown
    assert re.search(r"--nproc [1-8] -m reshard verify a\\ b", dry_run("verify", "a b"))


@pytest.mark.parametrize(
    "script",
    [*sorted((ROOT / "slurm").glob("*.sbatch")), *sorted((ROOT / "launch").glob("*.sh"))],
    ids=lambda path: path.name,
)
def test_scripts_are_good_bash(script: Path) -> None:
    checked = subprocess.run(
        ["bash", "-n", str(script)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    text = script.read_text()
    assert text.startswith("#!")
    if script.suffix == ".sbatch":
        assert re.search(r"^#SBATCH --nodes", text, re.MULTILINE)
        assert "reshard" in text
    else:
        assert os.access(script, os.X_OK)
