"""Starts a Slurm, runs the scenarios in it, and prints a table.

`python -m tests.slurm FOLDER [NAME ...]`, to be run by run.sh in namespaces of its own.
"""

import sys
import time
import traceback
from pathlib import Path

from tests.launched import ROOT
from tests.slurm import cluster
from tests.slurm.scenarios import SCENARIOS, Scene

ROW = "{:<44} {:<22} {:>9} {:>8}  {}"


def main(folder: Path, names: list[str]) -> int:
    """Run the scenarios of these names, or all, in an empty directory."""
    work = folder / "work"
    work.mkdir()
    for name in ("launch", "slurm", ".venv"):
        if (ROOT / name).exists():
            (work / name).symlink_to(ROOT / name)
    (folder / "cluster").mkdir()
    with cluster.running(folder / "cluster"):
        print(ROW.format("scenario", "state", "exit code", "seconds", ""), flush=True)
        failed = [name for name in names or SCENARIOS if not passes(name, Scene(work))]
    print(f"slurm-test: {', '.join(failed)} failed" if failed else "slurm-test: passed")
    return 1 if failed else 0


def passes(name: str, scene: Scene) -> bool:
    """Run one scenario and print its row."""
    began, error = time.monotonic(), ""
    try:
        SCENARIOS[name](scene)
    except Exception:
        error = traceback.format_exc()
    seconds = f"{time.monotonic() - began:.1f}"
    last = scene.jobs[-1] if scene.jobs else None
    states = " ".join(dict.fromkeys(job.state for job in scene.jobs))
    codes = " ".join(map(str, scene.codes))
    print(ROW.format(name, states, codes, seconds, "FAILED" if error else "ok"), flush=True)
    if error:
        print(f"{error}\n{last.said if last else ''}", file=sys.stderr, flush=True)
    return not error


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
