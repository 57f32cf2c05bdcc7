"""The program as people start it: launch/, stock torchrun and the batch files."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.commands import model, move, read, write
from tests.launched import ROOT, SHIM, STOCK, alive, children, environment, ours, start, under_way
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


def test_the_shim_passes_a_refusal_of_all_ranks_on_in_one_line(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    (source / "consolidated.03.pth").unlink()
    words = move("meta8", source, "tp4", tmp_path / "dst")
    began = time.monotonic()
    found = start([*SHIM, "-m", "reshard", *words], tmp_path)
    assert found.returncode == 2, found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert re.match(r"reshard: .*consolidated.03.pth` is missing: found 7 of 8", found.stderr)
    assert time.monotonic() - began < 30
    assert not list(tmp_path.glob("dst*"))


def test_stock_torchrun_shows_one_line_of_ours_for_what_each_rank_refuses(tmp_path: Path) -> None:
    """Here before the ranks meet; a refusal by all of them: tests/test_torchrun.py."""
    words = move("meta8", tmp_path / "src", "tp4", tmp_path / "dst", "engine.memry=1GiB")
    found = start([*STOCK, "-m", "reshard", *words], tmp_path)
    assert found.returncode != 0
    assert len(ours(found.stderr)) == 1, found.stderr
    assert "`engine.memry`" in ours(found.stderr)[0]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((2, -15), 2), ((-15, 1), 1), ((1, 2), 1), ((143, 143), 143), ((-9, -15), 137)],
    ids=str,
)
def test_the_shim_has_the_code_of_the_rank_that_failed_by_itself(
    codes: tuple[int, int], expected: int, tmp_path: Path
) -> None:
    """The first one, seconds apart; a rank that torchrun ended meanwhile does not count."""
    failures = {}
    for rank, code in enumerate(codes):
        failures[rank] = ProcessFailure(rank, 4242 + rank, code, str(tmp_path / "none"))
        failures[rank].timestamp = rank
    assert shim().exit_code(ChildFailedError("rank.py", failures)) == expected


def test_what_only_another_rank_is_refused_is_said(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nfrom reshard import cli\ncli.ELSEWHERE_SECONDS = 0.5\n"
        "sys.argv += ['engine.memry=1GiB'] if os.environ['RANK'] == '1' else []\ncli.entry()\n"
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


RANK = """\
import os, signal, sys, time
came = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: came.append(1))
rank = int(os.environ["RANK"])
open(f"up-{rank}", "w").close()
while not came:
    time.sleep(0.02)
time.sleep(0.5)
os._exit(int(sys.argv[1 + rank]))
"""


@pytest.mark.parametrize(
    ("codes", "number", "times", "expected"),
    [
        (("0", "0"), signal.SIGTERM, 3, 0),
        (("1", "2"), signal.SIGTERM, 1, 2),
        (("130", "1"), signal.SIGINT, 1, 1),
    ],
    ids=["well", "own", "interrupted"],
)
def test_the_shim_ends_as_its_ranks_do_on_a_signal(
    codes: tuple[str, str], number: signal.Signals, times: int, expected: int, tmp_path: Path
) -> None:
    """However often the signal comes: Slurm sends more than one."""
    (tmp_path / "rank.py").write_text(RANK)
    with under_way([*SHIM, "rank.py", *codes], tmp_path) as process:
        limit = time.monotonic() + 60
        while not ((tmp_path / "up-0").exists() and (tmp_path / "up-1").exists()):
            assert time.monotonic() < limit
            time.sleep(0.02)
        ranks = children(process.pid)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.1)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (expected, "", "")
    assert not alive(ranks)


def shim() -> ModuleType:
    """launch/torchrun as a module."""
    loader = SourceFileLoader("launch_torchrun", str(ROOT / "launch" / "torchrun"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


NEAR = "--standalone --local-addr 127.0.0.1"
FAR = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:777"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dry-run --nproc=3 -m m --nproc 'a b'", "NEAR --nproc-per-node=3 -m m --nproc 'a b'"),
        ("--nproc 2 --dry-run rank.py --dry-run", "NEAR --nproc-per-node 2 rank.py --dry-run"),
        ("FAR --nproc 2 --dry-run -m reshard", "FAR --nproc-per-node 2 -m reshard"),
    ],
)
def test_the_shim_prints_the_command_that_it_stands_for(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LOGLEVEL", "INFO")  # else it silences the logs of this process
        assert shim().launch(shlex.split(words.replace("FAR", FAR))) == 0
    stock = expected.replace("NEAR", NEAR).replace("FAR", FAR)
    shown = capsys.readouterr().out
    assert shown == f"{sys.executable} -m torch.distributed.run {stock}\n"


def multinode(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """What launch/multinode.sh would do, without what Slurm or the machine say."""
    kept = environment(GLOO_SOCKET_IFNAME="lo", **more)
    return subprocess.run(
        [str(ROOT / "launch" / "multinode.sh"), *words],
        env={key: kept[key] for key in kept if not key.startswith("SLURM_") or key in more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_multinode_script_starts_one_node_of_several(tmp_path: Path) -> None:
    """From arguments; with another torchrun on PATH, with that one's Python."""
    for name in ("torchrun", "python"):
        (tmp_path / name).touch(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = ["--nnodes", "3", "--node-rank=2", "--master", "127.0.0.1:777", "--id", "one"]
    found = multinode("--dry-run", *given, "--nproc", "4", "--src", "a b", PATH=path)
    assert found.returncode == 0, found.stderr
    own = ROOT / ".venv" / "bin"
    python = own / "python" if (own / "torchrun").exists() else tmp_path / "python"
    local = r"(--local-addr 127\.0\.0\.1 )?"
    assert re.fullmatch(
        rf"{python} {ROOT}/launch/torchrun --nnodes 3 --rdzv-backend c10d "
        r"--rdzv-endpoint 127.0.0.1:777 --rdzv-id one --rdzv-conf is_host=0\\,read_timeout=\d+ "
        rf"{local}--nproc 4 -m reshard --src a\\ b",
        found.stdout.strip(),
    ), found.stdout
    first = multinode("--dry-run", *given, "--node-rank", "0", "--master", "[::1]", PATH=path)
    assert r"--rdzv-endpoint \[::1\]:777" in first.stdout
    assert "is_host=1" in first.stdout


def test_one_node_needs_no_place_to_meet() -> None:
    found = multinode("--dry-run", "--nproc", "2")
    assert re.fullmatch(
        r"\S* ?\S*torchrun --nproc 2 -m reshard --src \S+ --dst \S+ \n", found.stdout
    )


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--nnodes", "2"], "--node-rank: which of the 2 nodes"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank: 2, but nodes are 0 to 1"),
        (["--nnodes", "2", "--node-rank", "1"], "--master: give the address of node 0"),
        (["--nnodes", "two"], "--nnodes: `two` is not a number from 1 on"),
        (["--nproc", "0"], "--nproc: `0` is not a number from 1 on"),
        (["--master", "a:b:c"], "--master: `a:b:c` is not ADDR or ADDR:PORT"),
        (["--nproc"], "--nproc: give a value"),
    ],
)
def test_the_multinode_script_refuses_what_cannot_work(words: list[str], pattern: str) -> None:
    found = multinode("--dry-run", *words)
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(rf"reshard: {pattern}.*\n", found.stderr), found.stderr


def test_more_than_one_task_per_node_is_refused() -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    found = multinode("--dry-run", **step)
    assert found.returncode == 2
    assert "4 tasks on 2 nodes" in found.stderr


@pytest.mark.parametrize("name", ["local.sh", "multinode.sh", "slurm.sh", "stage.sh", "torchrun"])
def test_what_is_launched_says_how_it_is_used(name: str) -> None:
    command = [sys.executable] if name == "torchrun" else ["bash"]
    words = [*command, str(ROOT / "launch" / name), "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"launch/{name} [" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def dry_run(*words: str, **more: str) -> str:
    """The command that launch/local.sh would start."""
    script = [str(ROOT / "launch" / "local.sh"), "--dry-run", *words]
    done = subprocess.run(
        script, env=environment(**more), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_local_script_starts_a_rank_per_gpu_or_core() -> None:
    start = rf"(\S+/python )?{ROOT}/launch/torchrun --nproc"
    assert re.fullmatch(
        rf"{start} 3 -m reshard --src meta8 --dst hf", dry_run("3", "--src", "meta8", "--dst", "hf")
    )
    shown = dry_run(CUDA_VISIBLE_DEVICES="0,1,2,5")
    assert re.fullmatch(rf"{start} 4 -m reshard --src meta8 --dst tp4", shown), shown
    assert re.search(r"--nproc [1-8] -m reshard verify a\\ b", dry_run("verify", "a b"))


SCRIPTS = [
    *sorted((ROOT / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "launch").glob("*.*sh")),
    *sorted((ROOT / "tests").rglob("*.sh")),
    ROOT / ".ci" / "run",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_good_bash(script: Path) -> None:
    checked = subprocess.run(
        ["bash", "-n", str(script)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    if script.suffix in (".sh", ""):
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        assert os.access(script, os.X_OK)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    words = ["shellcheck", "--shell=bash", "--external-sources", "--source-path", str(ROOT)]
    found = subprocess.run(
        [*words, *map(str, SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")
