"""Starts the program as people do: through launch/torchrun, through torchrun, or by itself."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIM = [sys.executable, str(ROOT / "launch" / "torchrun"), "--nproc", "2"]
STOCK = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def environment(**more: str) -> Mapping[str, str]:
    """The test's own, where the source tree can be imported from any directory."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return kept | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | more


def start(words: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory of its own."""
    with under_way(words, where) as command:
        out, err = command.communicate(timeout=100)
    return subprocess.CompletedProcess(words, command.returncode, out, err)


def under_way(words: list[str], where: Path) -> subprocess.Popen[str]:
    """Start a command in a directory of its own."""
    return subprocess.Popen(
        words,
        cwd=where,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ours(err: str) -> list[str]:
    """The lines on standard error that are the program's."""
    return [line for line in err.splitlines() if line.startswith("reshard:")]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


def alive(pids: list[int]) -> list[int]:
    """Those of some processes that still run."""
    return [pid for pid in pids if _state(pid) not in ("Z", "X", "")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
