"""A DCP directory into Hugging Face's layout: sharded save and consolidation, as TorchTitan does.

torchrun --nproc-per-node N -m tests.benchmarks.peers.consolidation SOURCE TARGET REPORT

As many files as ranks, so that each rank consolidates one.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank,
)

from tests.benchmarks.peers import sharded
from tests.benchmarks.peers.clock import Clock

THREADS = 5  # TorchTitan's


def main(source: Path, target: Path, report: Path) -> None:
    """Load, save sharded and consolidate; the sharded files beside go away, out of the count."""
    mesh = sharded.join()
    clock = Clock()
    state, pieces = sharded.empty_state(source, mesh), target / "sharded"
    dcp.load({sharded.WRAPPER: state}, checkpoint_id=source)
    clock.lap("load")
    files = files_of(state, mesh.size())
    writer = HuggingFaceStorageWriter(
        str(pieces), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=False
    )
    dcp.save(state, storage_writer=writer)
    clock.lap("save")
    consolidate_safetensors_files_on_every_rank(str(pieces), str(target), files, THREADS)
    first = sharded.is_first()
    clock.lap("consolidate")
    if first:
        clock.write(report)
        shutil.rmtree(pieces)
        shutil.copy(source / "config.json", target)
    dist.destroy_process_group()


def files_of(state: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """The number of the file of each tensor, from 1 on: equal bytes in each, nearly."""
    total, before, files = sum(tensor.nbytes for tensor in state.values()), 0, {}
    for key, tensor in state.items():
        files[key] = 1 + min(count - 1, (before + tensor.nbytes // 2) * count // total)
        before += tensor.nbytes
    return files


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
