"""What a run was made on."""

import os
import platform
from pathlib import Path

import torch


def facts(folder: Path) -> dict[str, object]:
    """CPU, memory, kernel, the file system below a directory, versions, and the load average."""
    return {
        "cpu": _after_colon(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory("MemTotal"),
        "kernel": platform.release(),
        "disk": disk(folder),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": list(os.getloadavg()),
    }


def memory(name: str) -> int:
    """A figure of /proc/meminfo (MemTotal, MemAvailable), in bytes."""
    return 1024 * int(_after_colon(Path("/proc/meminfo"), name).split()[0])


def disk(folder: Path) -> str:
    """The device and the file system that a directory is on, with its mount options."""
    number = folder.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == f"{os.major(number)}:{os.minor(number)}":
            kind, device = right.split()[:2]
            return f"{kind} on {device} ({left.split()[5]})"
    return "unknown"


def _after_colon(file: Path, name: str) -> str:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0"


def line(record: dict[str, object]) -> str:
    """The facts in a line."""
    load = record["load"]
    assert isinstance(load, list)
    gigabytes = int(str(record["memory_bytes"])) / (1 << 30)
    return (
        f"{record['cpu']}, {record['cores']} cores, {gigabytes:.0f} GiB, Linux {record['kernel']}, "
        f"{record['disk']}, Python {record['python']}, torch {record['torch']}, "
        f"load average before {load[0]:.2f}"
    )
