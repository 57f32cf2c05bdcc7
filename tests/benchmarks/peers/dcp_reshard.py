"""`dcp.load` with every tensor cut along dim 0, and `dcp.save` of that.

torchrun --nproc-per-node N -m tests.benchmarks.peers.dcp_reshard SOURCE TARGET REPORT
"""

import shutil
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.benchmarks.peers import sharded
from tests.benchmarks.peers.clock import Clock


def main(source: Path, target: Path, report: Path) -> None:
    """Load and save on all ranks; rank 0 reports, and copies the config that `verify` asks for."""
    mesh = sharded.join()
    clock = Clock()
    state = {sharded.WRAPPER: sharded.empty_state(source, mesh)}
    dcp.load(state, checkpoint_id=source)
    clock.lap("load")
    dcp.save(state, checkpoint_id=target)
    first = sharded.is_first()
    clock.lap("save")
    if first:
        clock.write(report)
        shutil.copy(source / "config.json", target)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
