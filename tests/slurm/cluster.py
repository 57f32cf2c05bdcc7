"""A Slurm of two nodes on the loopback interface, for as long as a `with` lasts.

One munged, one slurmctld, and a slurmd per node, each a child of this process. The names of the
machine and of its nodes resolve nowhere. The nodes claim GPUs that are not there.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# On the loopback interface, but not its own 127.0.0.1, which Slurm does not take for a network.
NODES = {"n1": "10.17.0.1", "n2": "10.17.0.2"}
PORT = 17000
PATIENCE_SECONDS = 30.0
HEAD = "head-without-address"

CONFIG = """\
ClusterName=reshard
SlurmctldHost={head}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a credential lives is also how long a job waits that is queued again (120 s by default).
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
# Without cgroups: plain processes, found by descent. Memory is counted, but not enforced.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=2,sched_interval=3
GresTypes=gpu
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={head} NodeAddr={address} Port={port} {size} State=UNKNOWN"
GPUS = 10
SIZE = f"CPUs=64 RealMemory=262144 Gres=gpu:{GPUS}"


@dataclass(frozen=True)
class Daemon:
    """One process of the cluster, and what it said."""

    process: subprocess.Popen[bytes]
    log: Path

    def until(self, ready: Callable[[], bool]) -> None:
        """Wait until it works; where it ends before, its last lines are the error."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            if self.process.poll() is not None or time.monotonic() > limit:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
                raise RuntimeError(f"{self.log.stem} did not start:\n{tail}")
            time.sleep(0.1)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Have a cluster run below `folder`, which the environment names to Slurm's commands."""
    socket.sethostname(HEAD)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in NODES.values():
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    _configure(folder)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons: list[Daemon] = []

    def start(name: str, *words: str) -> Daemon:
        log = folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        daemons.append(Daemon(process, log))
        return daemons[-1]

    try:
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        munged = start(
            "munged", "munged", "--foreground", f"--socket={folder}/munge.socket", *files
        )
        munged.until((folder / "munge.socket").exists)
        controller = start("slurmctld", "slurmctld", "-D", "-i")
        controller.until(lambda: "UP" in _said("scontrol", "ping"))
        for name in NODES:
            start(name, "slurmd", "-D", "-N", name)
        daemons[-1].until(
            lambda: _said("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * 2
        )
        yield
    finally:
        for daemon in reversed(daemons):
            _end(daemon.process)


def _configure(folder: Path) -> None:
    """Write the key and the files of a fresh cluster."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    nodes = [
        NODE.format(name=name, head=HEAD, address=address, port=PORT + number, size=SIZE)
        for number, (name, address) in enumerate(NODES.items(), start=1)
    ]
    places = {"head": HEAD, "address": NODES["n1"], "port": PORT, "folder": folder}
    text = CONFIG.format(**places, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text)
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL where that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
