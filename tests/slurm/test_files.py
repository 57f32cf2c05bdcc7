"""The batch files and launch/slurm.sh, with commands that stand in for Slurm's."""

import os
import re
from pathlib import Path

import pytest

from tests.launched import ROOT
from tests.slurm.fakes import ENDING_SRUN, HANGING_SRUN, INTERRUPTION, LFS, SRUN, Fake

FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
SLURM = ROOT / "launch" / "slurm.sh"
CPU = {"SLURM_CPUS_PER_TASK": "2"}


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def started(fake: Fake) -> list[str]:
    """The arguments of the program in the last step."""
    return fake.calls[-1].partition(" -- ")[2].split()


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_file_says_all_that_slurm_needs_to_know(file: Path) -> None:
    text = file.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert {"job-name", "nodes", "time", "requeue"} <= set(asked)
    assert asked["ntasks-per-node"] == "1"
    assert asked["open-mode"] == "append", "a job that is queued again would lose its output"
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])
    assert asked.get("mem") == "1G" or asked.get("mem-per-gpu") == "4G"
    assert f"slurm/{file.name}" in text


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_file_submitted_elsewhere_is_refused(file: Path, fake: Fake) -> None:
    found = fake.run(file, SLURM_SUBMIT_DIR=str(fake.folder))
    assert found.returncode == 2
    assert "submit from the repository's folder" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "nodes", "gpus"),
    [("h100", 1, 8), ("h100", 2, 8), ("l40", 1, 10), ("l40", 2, 5), ("l40", 5, 2)],
)
def test_a_gpu_file_starts_a_rank_per_gpu_of_each_node(
    name: str, nodes: int, gpus: int, fake: Fake
) -> None:
    fake.place(SRUN)
    job = {"SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus), "RESHARD_DRY_RUN": "1"}
    found = fake.run(ROOT / "slurm" / f"{name}.sbatch", "--src", "x", "a=b c", **job)
    assert (found.returncode, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert len(lines) == nodes
    rest = rf"--nproc {gpus} -m reshard --src x a=b\ c engine.backend=nccl"
    assert all(line.strip().endswith(rest) for line in lines), lines
    if nodes > 1:
        hosts = [re.findall(r"is_host=(\d)", line) for line in lines]
        assert hosts == [["1"], *[["0"]] * (nodes - 1)]
        assert all("--rdzv-endpoint 127.0.0.1:24242" in line for line in lines)
        assert all("--rdzv-id 4242-0" in line for line in lines)


def test_the_defaults_of_a_file_give_way(fake: Fake) -> None:
    fake.place(ENDING_SRUN)
    file, job = ROOT / "slurm" / "cpu.sbatch", {**CPU, "FAKE_CODE": "0"}
    assert fake.run(file, **job).returncode == 0
    demo = "--src meta8 --dst tp4 engine.backend=gloo engine.memory=128MiB"
    assert " ".join(started(fake)) == demo
    fake.run(file, "engine.memory=1GiB", **job)
    assert started(fake) == ["engine.memory=1GiB", "engine.backend=gloo"]
    fake.run(file, "--config", "my.yaml", **job)
    assert started(fake) == ["--config", "my.yaml"]


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_exit_codes_are_passed_on_and_nothing_is_queued_again(code: int, fake: Fake) -> None:
    fake.place(ENDING_SRUN)
    found = fake.run(ROOT / "slurm" / "cpu.sbatch", **CPU, FAKE_CODE=str(code))
    assert found.returncode == code
    assert [call.split()[0] for call in fake.calls] == ["srun"]


@pytest.mark.parametrize(
    ("job", "name", "again"),
    [
        ({}, "4242", True),
        ({"SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": "7"}, "4242_7", True),
        ({"SLURM_RESTART_COUNT": "20"}, "4242", False),
        ({"RESHARD_REQUEUE": "0"}, "4242", False),
    ],
    ids=["job", "array", "often", "off"],
)
def test_usr1_stops_the_step_and_has_the_job_queued_again(
    job: dict[str, str], name: str, again: bool, fake: Fake
) -> None:
    """It is SIGTERM for the step, as often as it takes; srun itself gets no signal."""
    fake.place(HANGING_SRUN)
    found = fake.stopped(ROOT / "slurm" / "cpu.sbatch", **CPU, **job)
    assert found.returncode == 143, found.stderr
    stops = [f"scancel --signal=TERM {name}.0"] * 2
    assert fake.calls[1:] == stops + ([f"scontrol requeue {name}"] if again else [])
    assert ("queued again (1 of 20)" in found.stdout) == again
    assert ("not queued again" in found.stdout) != again


def test_a_job_that_is_done_when_it_is_stopped_is_not_queued_again(fake: Fake) -> None:
    fake.place(HANGING_SRUN.replace("exit 143", "exit 0"))
    assert fake.stopped(ROOT / "slurm" / "cpu.sbatch", **CPU).returncode == 0
    assert not any("requeue" in call for call in fake.calls)


@pytest.mark.parametrize("moment", range(1, 9))
def test_usr1_is_heeded_whenever_it_comes(moment: int, fake: Fake) -> None:
    """Before each command of `run_step`, up to `wait`, and not only while it waits."""
    fake.place(HANGING_SRUN)
    before = fake.folder / "interruption"
    before.write_text(INTERRUPTION)
    job = {**CPU, "BASH_ENV": str(before), "FAKE_MOMENT": str(moment)}
    found = fake.run(ROOT / "slurm" / "cpu.sbatch", **job)
    assert found.returncode == 143, found.stderr
    assert fake.calls[-1] == "scontrol requeue 4242"


LIST = "# those of May\n/a/one /b/uno\r\n\n/a/two\n  # none\n/a/with blank\t/b/with blank\n"


@pytest.mark.parametrize(
    ("task", "words", "expected"),
    [
        (1, ["--dst", "hf"], "--src /a/one --dst hf dst.path=/b/uno"),
        (1, ["--src", "meta8"], "--src meta8 dst.path=/b/uno src.path=/a/one"),
        (2, ["dst.path=/c"], "--src /a/two dst.path=/c/two"),
        (3, ["dst.path=/c"], "--src /a/with blank dst.path=/b/with blank"),
    ],
)
def test_a_task_takes_its_line(task: int, words: list[str], expected: str, fake: Fake) -> None:
    fake.place(ENDING_SRUN)
    (fake.folder / "list").write_text(LIST)
    job = {**CPU, "SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": str(task), "FAKE_CODE": "0"}
    found = fake.run(ROOT / "slurm" / "array.sbatch", "list", *words, **job)
    assert found.returncode == 0, found.stderr
    assert " ".join(started(fake)) == f"{expected} engine.memory=128MiB"


@pytest.mark.parametrize(
    ("words", "task", "pattern"),
    [
        (["list", "dst.path=/c"], "4", r"array task 4, but `list` names 3 .*--array=1-3"),
        (["list", "dst.path=/c"], "0", r"array task 0, but `list` names 3 .*--array=1-3"),
        (["list", "dst.path=/c"], "", r"array task \(none\), but"),
        (["list"], "2", r"`list`: checkpoint 2 has no target"),
        (["other"], "1", r"`other` is no list"),
        ([], "1", r"`` is no list"),
        (["empty"], "1", r"`empty` names no checkpoint"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    words: list[str], task: str, pattern: str, fake: Fake
) -> None:
    (fake.folder / "list").write_text(LIST)
    (fake.folder / "empty").write_text("\n# none\n")
    job = {"SLURM_ARRAY_JOB_ID": "4242", "SLURM_ARRAY_TASK_ID": task} if task else {}
    found = fake.run(ROOT / "slurm" / "array.sbatch", *words, **CPU, **job)
    assert found.returncode == 2
    assert re.fullmatch(rf"reshard: {pattern}.*\n", found.stderr), found.stderr


def test_every_node_copies_its_share(fake: Fake) -> None:
    """Weights by turns, everything else everywhere; gone in the end."""
    fake.place(SRUN)
    source = fake.folder / "src"
    for name in ("a.safetensors", "b.safetensors", "deep/c.safetensors", "config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
        os.utime(source / name, ns=(1, 1_000_000_007))
    job = {"SLURM_NNODES": "2", "RESHARD_LOCAL": "1", "TMPDIR": str(fake.folder)}
    words = [SLURM, "--", f"src.path={source}", "--help"]
    found = fake.run(*words, **job, RESHARD_DRY_RUN="1")
    expected = ["a.safetensors", "config.json", "deep/c.safetensors", "b.safetensors"]
    assert found.stdout.split()[:5] == [*expected, "config.json"], found.stderr
    copies = fake.folder / "reshard-4242"
    assert f"--help src.path={copies}" in found.stdout
    stage = ["launch/stage.sh", str(source), str(copies)]
    copied = fake.run(ROOT / stage[0], *stage[1:], SLURM_NODEID="1", SLURM_STEP_NUM_NODES="2")
    assert copied.returncode == 0, copied.stderr
    names = {str(path.relative_to(copies)) for path in copies.rglob("*") if path.is_file()}
    assert names == {"b.safetensors", "config.json"}
    assert (copies / "config.json").stat().st_mtime_ns == 1_000_000_007
    without_ranks = SRUN.replace("highest=0\n", "[[ $1 != */multinode.sh ]] || exit 0\nhighest=0\n")
    (fake.folder / "bin" / "srun").write_text(without_ranks)
    assert fake.run(*words, **job).returncode == 0
    assert [call.split("launch/")[-1].split()[0] for call in fake.calls[-3:-1]] == [
        "stage.sh",
        "multinode.sh",
    ]
    assert not copies.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--src", "{}"],
        ["--src={}"],
        ["--src", "meta8", "src.path={}"],
        ["--src", "elsewhere", "src.path={}"],
        ["--list", "list"],
        ["--list", "list", "--src", "meta8"],
    ],
    ids=" ".join,
)
def test_the_copied_source_is_the_one_that_the_program_would_read(
    words: list[str], fake: Fake
) -> None:
    """However it is named; src.path, which counts most, becomes the copy."""
    fake.place(ENDING_SRUN)
    source = fake.folder / "src"
    for path in (source, fake.folder / "elsewhere"):
        path.mkdir()
    (fake.folder / "list").write_text(f"{source} /b/one\n")
    options = [word for word in words if word == "--list"]
    words = [word.format(source) for word in words[len(options) :]]
    job = {"RESHARD_LOCAL": "1", "TMPDIR": "/disk", "FAKE_CODE": "0", "SLURM_ARRAY_TASK_ID": "1"}
    found = fake.run(SLURM, *options, "--", *words, **job)
    assert found.returncode == 0, found.stderr
    staged, run = fake.calls[:2]
    assert staged.endswith(f"launch/stage.sh {source} /disk/reshard-4242")
    paths = [word for word in run.split() if word.startswith("src.path=")]
    assert paths == ["src.path=/disk/reshard-4242"]


@pytest.mark.parametrize(
    ("words", "named"),
    [(["src.path=nowhere"], "nowhere"), (["--src", "meta8"], "meta8"), ([], "meta8")],
)
def test_a_source_that_cannot_be_copied_is_refused(
    words: list[str], named: str, fake: Fake
) -> None:
    fake.place(SRUN)
    found = fake.run(SLURM, "--", *words, RESHARD_LOCAL="1")
    assert found.returncode == 2
    assert re.fullmatch(rf"reshard: RESHARD_LOCAL: `{named}` is no .*\n", found.stderr)


def test_the_directory_of_the_target_is_striped(fake: Fake) -> None:
    fake.place(ENDING_SRUN, lfs=LFS)
    out = fake.folder / "new"
    job = {"RESHARD_STRIPE": "8", "FAKE_CODE": "0"}
    assert fake.run(SLURM, "--", f"dst.path={out}/hf", **job).returncode == 0
    assert f"lfs setstripe -c 8 {out}" in fake.calls
    (out / "hf.partial-0").mkdir()
    assert fake.run(SLURM, "--", f"dst.path={out}/hf", **job).returncode == 0
    (out / "mine").touch()
    found = fake.run(SLURM, "--", f"dst.path={out}/hf", **job)
    assert found.returncode == 2
    assert re.search(r"RESHARD_STRIPE: `.*/new` holds other files \(`mine`\)", found.stderr)
    assert fake.run(SLURM, "--", f"dst.path={out}/hf", **job, FAKE_STRIPES="8").returncode == 0
    assert len([call for call in fake.calls if "setstripe" in call]) == 2


def test_a_batch_needs_a_job(fake: Fake) -> None:
    found = fake.run(SLURM, "--", SLURM_JOB_ID="")
    assert found.returncode == 2
    assert re.fullmatch(r"reshard: not in a Slurm job: .*\n", found.stderr)
