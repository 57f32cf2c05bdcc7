"""`dcp_to_torch_save`: a DCP directory into one torch file, in one process.

python -m tests.benchmarks.peers.dcp_merge SOURCE TARGET REPORT
"""

import shutil
import sys
from pathlib import Path

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.benchmarks.peers.clock import Clock


def main(source: Path, target: Path, report: Path) -> None:
    """Merge into `model.pt`, and copy the config that `verify` asks for."""
    target.mkdir()
    clock = Clock()
    dcp_to_torch_save(source, target / "model.pt")
    clock.lap("merge")
    clock.write(report)
    shutil.copy(source / "config.json", target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
