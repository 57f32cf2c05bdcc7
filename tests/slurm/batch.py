"""Submits batch files to Slurm as a person does, and tells what became of the jobs."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.launched import alive

SOON = 60.0
LONG = 240.0
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def until(
    ready: Callable[[], object], what: str, seconds: float = SOON, pause: float = 0.01
) -> None:
    """Wait for something to come about."""
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit, f"{what}: not within {seconds:g} s"
        time.sleep(pause)


@dataclass(frozen=True)
class Job:
    """A submitted job, or a task of an array job (`12_3`)."""

    number: str
    folder: Path
    waiting: "subprocess.Popen[str]"

    def task(self, number: int) -> "Job":
        """One task of an array job."""
        return Job(f"{self.number}_{number}", self.folder, self.waiting)

    @property
    def said(self) -> str:
        """The job's output, of all its starts."""
        file = self.folder / f"slurm-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def shown(self, key: str) -> str:
        """One of the values that Slurm has of the job."""
        words = ["scontrol", "--oneliner", "show", "job", self.number]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found = re.search(rf"\b{key}=(\S+)", text)
        assert found, f"{key} of job {self.number}: {text}"
        return found[1]

    @property
    def state(self) -> str:
        """COMPLETED, FAILED, ..."""
        return self.shown("JobState")

    @property
    def code(self) -> int:
        """The exit code that Slurm keeps; 128 + a signal."""
        code, number = map(int, self.shown("ExitCode").split(":"))
        return code or (128 + number if number else 0)

    def ended(self) -> int:
        """Wait for the end of the job and its processes; its exit code.

        `sbatch --wait` has the same, but looks for it at longer and longer intervals.
        """
        until(lambda: self.state in OVER, f"the end of job {self.number}", LONG, 0.2)
        until(lambda: not self.processes(), f"processes of job {self.number} gone", SOON, 0.2)
        return self.code

    def restarts(self) -> int:
        """How often it was queued again."""
        return int(self.shown("Restarts"))

    def processes(self) -> list[int]:
        """Those of the job on all nodes: who has its number in the environment."""
        word = f"SLURM_JOB_ID={self.shown('JobId')}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    environment = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue  # it is over
                if word in environment:
                    found.append(int(folder.name))
        return alive(found)

    def ranks(self) -> list[int]:
        """The processes of the job that are ranks."""
        return [pid for pid in self.processes() if _environment(pid, b"LOCAL_RANK=")]


def _environment(pid: int, start: bytes) -> bool:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.startswith(start) for word in words)


def submit(folder: Path, *words: object, **environment: str) -> Job:
    """`sbatch --wait WORDS` in `folder`."""
    waiting = subprocess.Popen(
        ["sbatch", "--wait", "--parsable", *map(str, words)],
        cwd=folder,
        env={**_plain(os.environ), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout is not None
    number = waiting.stdout.readline().strip()
    if not number:
        raise AssertionError(f"sbatch {' '.join(map(str, words))}: {waiting.communicate()[1]}")
    return Job(number, folder, waiting)


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what this process has of its own that would go on to the jobs."""
    ours = ("RESHARD_", "GLOO_", "MASTER_", "RANK", "WORLD_SIZE")
    return {key: value for key, value in environment.items() if not key.startswith(ours)}


def signalled(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to those of some processes that are still there."""
    for pid in alive(pids):
        os.kill(pid, number)


def to_be_terminated(pid: int) -> bool:
    """Whether a stopped process has a SIGTERM waiting for it."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = re.findall(r"^(?:Shd|Sig)Pnd:\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in pending)
