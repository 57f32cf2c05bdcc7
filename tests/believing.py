"""Runs the program where some ranks believe that their machine has GPUs, and NCCL.

`python -m tests.believing RANKS WORD ...` runs `reshard WORD ...`; RANKS is a list like `1,3`.
"""

import sys

import torch
import torch.distributed as dist

from reshard.cli import entry
from reshard.meeting import launched_rank


def believe(gpus: int) -> None:
    """Have torch speak of GPUs, with which nothing can be done."""
    torch.version.cuda = "12.8"
    torch.cuda.is_available = lambda: gpus > 0
    torch.cuda.device_count = lambda: gpus
    dist.is_nccl_available = lambda: True


if __name__ == "__main__":
    ranks = [int(rank) for rank in sys.argv.pop(1).split(",")]
    if launched_rank() in ranks:
        believe(8)
    entry()
