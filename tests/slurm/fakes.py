"""Stands in for Slurm's commands, so that the batch files can be tried without it."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.launched import ROOT, environment

# Runs a step's command on each of the nodes, one after the other; its code is the highest.
SRUN = """\
#!/bin/bash
echo "srun $*" >>"$FAKE/calls"
while [[ $1 == --* ]]; do shift; done
highest=0
for ((node = 0; node < SLURM_NNODES; node++)); do
    code=0
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_STEP_NUM_NODES=$SLURM_NNODES \\
        SLURM_STEP_NUM_TASKS=$SLURM_NNODES SLURM_STEP_NODELIST='n[0-9]' "$@" || code=$?
    ((code <= highest)) || highest=$code
done
exit "$highest"
"""
# Runs until it is told to stop, or for a minute.
HANGING_SRUN = """\
#!/bin/bash
echo "srun $*" >>"$FAKE/calls"
echo $$ >"$FAKE/pid"
trap 'exit 143' TERM
for ((waited = 0; waited < 1200; waited++)); do sleep 0.05; done
"""
ENDING_SRUN = """\
#!/bin/bash
echo "srun $*" >>"$FAKE/calls"
exit "$FAKE_CODE"
"""
# The first signal is lost, without an error; when the second has been sent, the step is over.
SCANCEL = """\
#!/bin/bash
echo "scancel $*" >>"$FAKE/calls"
(($(grep -c ^scancel "$FAKE/calls") > 1)) && kill "$(<"$FAKE/pid")" || exit 0
while kill -0 "$(<"$FAKE/pid")"; do /bin/sleep 0.01; done
"""
# Nobody has time.
SLEEP = """\
#!/bin/bash
exec /bin/sleep 0.05
"""
# Sourced by a script before its first line: USR1 comes before the given command of `run_step`.
INTERRUPTION = """\
set -o functrace
commands=0
interrupt() {
    [[ ${FUNCNAME[1]-} == run_step && $BASHPID == $$ ]] || return 0
    commands=$((commands + 1))
    ((commands != FAKE_MOMENT)) || kill -USR1 $$
}
[[ $0 != */slurm.sh ]] || trap interrupt DEBUG
"""
SCONTROL = """\
#!/bin/bash
case "$*" in
    "show hostnames "*) printf 'n0\\nn1\\n' ;;
    "--oneliner show node n0") echo "NodeName=n0 Arch=x NodeAddr=127.0.0.1 NodeHostName=no-name" ;;
    *) echo "scontrol $*" >>"$FAKE/calls" ;;
esac
"""
LFS = """\
#!/bin/bash
echo "lfs $*" >>"$FAKE/calls"
[[ $1 != getstripe ]] || echo "${FAKE_STRIPES:-1}"
"""


@dataclass(frozen=True)
class Fake:
    """A folder of commands that stand in for Slurm's, and the environment of a job."""

    folder: Path
    job: dict[str, str] = field(
        default_factory=lambda: {"SLURM_JOB_ID": "4242", "SLURM_NNODES": "1"}
    )

    def place(self, srun: str, **more: str) -> None:
        """Put the commands where they are found first."""
        (self.folder / "bin").mkdir()
        slurm = {"srun": srun, "scancel": SCANCEL, "scontrol": SCONTROL}
        commands = {**slurm, "sleep": SLEEP, **more}
        for name, text in commands.items():
            (self.folder / "bin" / name).write_text(text)
            (self.folder / "bin" / name).chmod(0o755)

    def start(self, *words: object, **job: str) -> "subprocess.Popen[str]":
        """Run a script as a job does, in the folder."""
        kept = {k: v for k, v in environment().items() if not k.startswith(("SLURM_", "GLOO_"))}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        submitted = {"SLURM_SUBMIT_DIR": str(ROOT), "FAKE": str(self.folder), "PATH": path}
        return subprocess.Popen(
            ["bash", *map(str, words)],
            cwd=self.folder,
            env=kept | self.job | submitted | job,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object, **job: str) -> "subprocess.CompletedProcess[str]":
        """Run a script to its end."""
        with self.start(*words, **job) as process:
            out, err = _rest_of(process)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def stopped(self, *words: object, **job: str) -> "subprocess.CompletedProcess[str]":
        """Run a script, and send it USR1 once its step is under way."""
        with self.start(*words, **job) as process:
            limit = time.monotonic() + 20
            while not (self.folder / "pid").exists() and time.monotonic() < limit:
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
            out, err = _rest_of(process)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    @property
    def calls(self) -> list[str]:
        """The commands that were called, in order, with the repository's own path left out."""
        file = self.folder / "calls"
        text = file.read_text() if file.exists() else ""
        return text.replace(f"{ROOT}/", "").splitlines()


def _rest_of(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=30)
    finally:
        process.kill()
