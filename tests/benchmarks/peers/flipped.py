"""A DCP directory whose matrices are cut along dim 1, written by torch's own dcp.save.

torchrun --nproc-per-node 8 -m tests.benchmarks.peers.flipped HF TARGET
"""

import shutil
import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tests.benchmarks.peers import sharded


def main(source: Path, target: Path) -> None:
    """Read each rank's columns of a Hugging Face directory, and save them."""
    mesh = sharded.join()
    dcp.save({sharded.WRAPPER: columns(source / "model.safetensors", mesh)}, checkpoint_id=target)
    if sharded.is_first():
        shutil.copy(source / "config.json", target)
    dist.destroy_process_group()


def columns(file: Path, mesh: DeviceMesh) -> dict[str, DTensor]:
    """All tensors of a safetensors file, cut along their last dim."""
    state = {}
    with safe_open(file, "pt") as held:
        for key in held.keys():  # noqa: SIM118 (it is not a dict)
            rows = held.get_slice(key)
            shape = tuple(rows.get_shape())
            part = sharded.part(shape, len(shape) - 1, mesh)
            local = rows[:, part] if len(shape) > 1 else rows[part]
            state[key] = sharded.as_dtensor(local.contiguous(), shape, len(shape) - 1, mesh)
    return state


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
