"""What is tried under Slurm: how jobs are submitted, end, fail, are cancelled and go on.

Jobs are caught in the middle of their work by what lies on the disk, never by the clock: their
ranks are halted (SIGSTOP) as soon as a journal holds a piece.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from reshard import journal
from tests.commands import move, write
from tests.launched import ROOT
from tests.oracles import models
from tests.slurm.batch import LONG, SOON, Job, signalled, submit, to_be_terminated, until

CPU = "slurm/cpu.sbatch"
BOTH = "--nodes=2"
BIG_BYTES = 200 << 20
SMALL_ROUNDS = "engine.memory=16MiB"  # so that there are many of them


@dataclass(frozen=True)
class Move:
    """From a source to a target in many rounds."""

    source: Path
    target: Path

    @property
    def report(self) -> Path:
        """The figures of the job that finished it."""
        return self.target.with_name(f"{self.target.name}.json")

    @property
    def words(self) -> list[str]:
        """The program's arguments."""
        paths = move("meta4", self.source, "tp2", self.target)
        return [*paths, SMALL_ROUNDS, "--report", str(self.report)]


@dataclass
class Scene:
    """Where jobs are submitted, those of one scenario, and their exit codes."""

    folder: Path
    jobs: list[Job] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def submit(self, *words: object, **environment: str) -> Job:
        """Submit a job."""
        self.jobs.append(submit(self.folder, *words, **environment))
        return self.jobs[-1]

    def ended(self, job: Job, code: int, state: str) -> str:
        """Wait for a job, which has to end like this; what it said."""
        self.codes.append(job.ended())
        found = (self.codes[-1], job.state)
        assert found == (code, state), f"job {job.number} ended with {found}"
        return job.said

    def source(self, kind: str = "meta4", size: int = 4 << 20) -> Path:
        """A checkpoint of so many bytes, made once."""
        path = self.folder / f"{kind}-{size >> 20}M"
        return path if path.exists() else write(kind, path, models.wide_model(size))

    def moving(self, name: str, *words: object, **environment: str) -> tuple[Job, "Move"]:
        """Submit a job that moves the big source to `name` in many rounds, on both nodes."""
        made = Move(self.source("meta4", BIG_BYTES), self.folder / name)
        return self.submit(BOTH, *words, CPU, *made.words, **environment), made

    def resumed(self, made: "Move") -> None:
        """The target is whole, and its last job went on with what was done."""
        report = json.loads(made.report.read_text())
        assert report["bytes"]["resumed"] > 0, report
        self.verified(made.source, made.target)

    def verified(self, source: Path, target: Path) -> None:
        """Both hold the same values, as `verify` without Slurm finds."""
        words = [sys.executable, "-m", "reshard", "verify", str(source), str(target)]
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr

    def caught(self, job: Job, target: Path) -> list[int]:
        """The ranks of a job, halted in the middle of moving something to `target`."""
        until(lambda: begun(target), f"a journal of {target.name}", LONG)
        ranks = job.ranks()
        signalled(ranks, signal.SIGSTOP)
        assert len(ranks) > 1, f"{len(ranks)} ranks"
        assert not target.exists(), "the job was faster; give it a bigger source"
        return ranks


def begun(target: Path) -> bool:
    """Whether a piece of a target is journalled."""
    folders = target.parent.glob(f"{target.name}.partial-*/journals")
    return any(next(iter(journal.read(folder)), None) for folder in folders)


def log_lines(said: str) -> list[str]:
    """The program's own lines of complaint."""
    return [line for line in said.splitlines() if line.startswith("reshard: ")]


def demo(scene: Scene) -> None:
    """Without arguments; and the same again, which is done already."""
    said = scene.ended(scene.submit(BOTH, CPU), 0, "COMPLETED")
    assert "done: " in said, said
    again = scene.ended(scene.submit(BOTH, CPU), 0, "COMPLETED")
    assert "already done" in again, again


def arguments(scene: Scene) -> None:
    """2 nodes of 2 ranks, with what a cluster's users set besides."""
    source, target = scene.source(), scene.folder / "arguments"
    report = scene.folder / "arguments.json"
    words = [*move("meta4", source, "tp2", target), "--report", report]
    more = {"MASTER_ADDR": "10.17.0.1", "MASTER_PORT": "29711", "GLOO_SOCKET_IFNAME": "lo"}
    scene.ended(scene.submit(BOTH, CPU, *words, **more), 0, "COMPLETED")
    assert re.search(r'"world": 4\b', report.read_text())
    scene.verified(source, target)


def refused(scene: Scene) -> None:
    """Exit code 2, also of `sbatch --wait`, and one line."""
    words = move("meta4", scene.folder / "nowhere", "tp2", scene.folder / "refused")
    job = scene.submit(BOTH, CPU, *words)
    said = scene.ended(job, 2, "FAILED")
    assert job.waiting.wait(SOON) == 2
    assert len(log_lines(said)) == 1, said


def failing(scene: Scene) -> None:
    """A rank is killed: exit code 1, one line; the same command goes on."""
    job, made = scene.moving("failing")
    ranks = scene.caught(job, made.target)
    signalled(ranks[:1], signal.SIGKILL)
    signalled(ranks, signal.SIGCONT)
    said = scene.ended(job, 1, "FAILED")
    assert len(log_lines(said)) == 1, said
    assert re.search(r"reshard: rank \d died", said), said
    scene.ended(scene.moving("failing")[0], 0, "COMPLETED")
    scene.resumed(made)


def cancelled(scene: Scene) -> None:
    """`scancel`: nothing runs on, nothing is queued again; the same command goes on."""
    job, made = scene.moving("cancelled")
    scene.caught(job, made.target)
    subprocess.run(["scancel", job.number], check=True)
    scene.ended(job, 128 + signal.SIGTERM, "CANCELLED")
    assert job.restarts() == 0
    assert not made.target.exists()
    scene.ended(scene.moving("cancelled")[0], 0, "COMPLETED")
    scene.resumed(made)


def told_to_stop(job: Job) -> None:
    """Have Slurm send the batch script what it sends before the time limit."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)


def let_stop(ranks: list[int]) -> None:
    """Let halted ranks go once they are to stop."""
    until(lambda: all(map(to_be_terminated, ranks)), "SIGTERM to the ranks", LONG)
    signalled(ranks, signal.SIGCONT)


def went_on(scene: Scene, job: Job, made: Move) -> None:
    """A job that was stopped is queued again, once, and completes what it had begun."""
    said = scene.ended(job, 0, "COMPLETED")
    assert job.restarts() == 1, said
    assert "queued again (1 of 20)" in said, said
    assert len([line for line in log_lines(said) if "SIGTERM" in line]) == 1, said
    scene.resumed(made)


def requeued(scene: Scene) -> None:
    """USR1 to the batch script, by hand."""
    job, made = scene.moving("requeued")
    ranks = scene.caught(job, made.target)
    told_to_stop(job)
    let_stop(ranks)
    went_on(scene, job, made)


def time_limit(scene: Scene) -> None:
    """USR1 to the batch script from Slurm, a minute before a limit of two."""
    job, made = scene.moving("time-limit", "--time=2")
    let_stop(scene.caught(job, made.target))
    went_on(scene, job, made)


def not_requeued(scene: Scene) -> None:
    """RESHARD_REQUEUE=0: the job ends, stopped."""
    job, made = scene.moving("not-requeued", RESHARD_REQUEUE="0")
    ranks = scene.caught(job, made.target)
    told_to_stop(job)
    let_stop(ranks)
    scene.ended(job, 143, "FAILED")
    assert job.restarts() == 0


def array(scene: Scene) -> None:
    """Four checkpoints, one of them bad; the last is stopped, and it alone is queued again."""
    small, big = scene.source(), scene.source("meta4", BIG_BYTES)
    out, listed = scene.folder / "array", scene.folder / "list"
    lines = ["# comment", f"{small}\t{out}/one", str(scene.folder / "nowhere"), "", f"{small}"]
    listed.write_text("\n".join([*lines, f"{big} {out}/big"]) + "\n")
    words = ["--array=1-4%2", "slurm/array.sbatch", listed, "--src", "meta4", "--dst", "hf"]
    job = scene.submit(*words, f"dst.path={out}", SMALL_ROUNDS)
    last = job.task(4)
    ranks = scene.caught(last, out / "big")
    told_to_stop(last)
    let_stop(ranks)
    scene.jobs[-1:] = tasks = [job.task(number) for number in (1, 2, 3, 4)]
    scene.codes += [task.ended() for task in tasks]
    assert scene.codes == [0, 2, 0, 0], scene.codes
    assert job.waiting.wait(LONG) == 2
    assert [task.restarts() for task in tasks] == [0, 0, 0, 1]
    scene.verified(small, out / "one")
    scene.verified(small, out / small.name)
    scene.verified(big, out / "big")


def gpu_files(scene: Scene) -> None:
    """What the files for GPUs would start, on nodes that claim to have some."""
    for words, nodes, ranks in [
        (["--nodes=2", "slurm/h100.sbatch"], 2, 8),
        (["slurm/l40.sbatch"], 1, 10),
        (["--nodes=2", "--gpus-per-node=5", "slurm/l40.sbatch"], 2, 5),
    ]:
        said = scene.ended(scene.submit(*words, RESHARD_DRY_RUN="1"), 0, "COMPLETED")
        started = [line for line in said.splitlines() if "-m reshard" in line]
        assert len(started) == nodes, said
        assert all(f"--nproc {ranks} -m reshard" in line for line in started), said
        assert all("engine.backend=nccl" in line for line in started), said


def local_disks(scene: Scene) -> None:
    """RESHARD_LOCAL=1: each node has a disk of its own, with its share of the source."""
    source, target = scene.source(), scene.folder / "from-local-disks"
    disk = scene.folder / "disk"
    for folder in (disk, scene.folder / "n1", scene.folder / "n2"):
        folder.mkdir()
    job = scene.submit(
        BOTH,
        CPU,
        *move("meta4", source, "tp2", target),
        RESHARD_LOCAL="1",
        RESHARD_SCRATCH=str(disk),
        PATH=f"{own_disks(scene.folder, disk)}:{os.environ['PATH']}",
    )
    scene.ended(job, 0, "COMPLETED")
    scene.verified(source, target)
    left = [path for name in ("n1", "n2") for path in (scene.folder / name).iterdir()]
    assert not left, left


def own_disks(folder: Path, disk: Path) -> Path:
    """A folder for PATH with a `srun` whose commands find a node's own directory at `disk`."""
    place = folder / "bin"
    place.mkdir()
    script = place / "srun"
    mounted = f'mount --bind "{folder}/$SLURMD_NODENAME" "{disk}" && exec "$@"'
    script.write_text(f"""#!/bin/bash
options=()
while [[ $1 == -* ]]; do options+=("$1"); shift; done
exec {real("srun")} "${{options[@]}}" unshare --mount bash -c '{mounted}' bash "$@"
""")
    script.chmod(0o755)
    return place


def real(command: str) -> str:
    """The path of a command."""
    found = subprocess.run(["which", command], capture_output=True, text=True, check=True)
    return found.stdout.strip()


SCENARIOS: dict[str, Callable[[Scene], None]] = {
    "demo, and again": demo,
    "2 nodes of 2 ranks, compared": arguments,
    "refused": refused,
    "a rank is killed, and again": failing,
    "scancel, and again": cancelled,
    "USR1: requeue, resume": requeued,
    "USR1 from the time limit: requeue, resume": time_limit,
    "USR1 with RESHARD_REQUEUE=0": not_requeued,
    "array of 4: one bad, one requeued": array,
    "h100 on 2x8, l40 on 1x10 and 2x5: dry runs": gpu_files,
    "sources on the nodes' own disks": local_disks,
}
