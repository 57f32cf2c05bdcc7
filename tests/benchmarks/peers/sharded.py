"""State dicts of DTensors, cut along one dim over all ranks, for torch.distributed.checkpoint."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, empty

WRAPPER = "model"


def join() -> DeviceMesh:
    """Start Gloo; all ranks as a mesh of one axis."""
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),))


def empty_state(source: Path, mesh: DeviceMesh) -> dict[str, DTensor]:
    """Room for all tensors of a DCP directory, by key below `WRAPPER`, cut along dim 0."""
    held = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
    return {
        key.removeprefix(f"{WRAPPER}."): empty(
            *tensor.size,
            dtype=tensor.properties.dtype,
            device_mesh=mesh,
            placements=[Shard(0)],
        )
        for key, tensor in held.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def is_first() -> bool:
    """Whether this rank reports; all have come here."""
    dist.barrier()
    return dist.get_rank() == 0


def part(shape: tuple[int, ...], dim: int, mesh: DeviceMesh) -> slice:
    """What this rank holds of a tensor along `dim`, by torch.chunk's rule."""
    step = -(-shape[dim] // mesh.size())
    start = min(shape[dim], mesh.get_local_rank() * step)
    return slice(start, min(shape[dim], start + step))


def as_dtensor(local: torch.Tensor, shape: tuple[int, ...], dim: int, mesh: DeviceMesh) -> DTensor:
    """This rank's part as a DTensor of the whole shape."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )
