"""Meshes as a format or a program takes them: their names, and the one that fewer GPUs make."""

from collections.abc import Callable, Sequence

from reshard.fitting.gpus import Gpus
from reshard.formats.options import Mesh


def name_of(mesh: Mesh) -> str:
    """The topology's name of a mesh."""
    sizes = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}
    return "".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "tp1"


def gpus_of(mesh: Mesh) -> int:
    """GPUs that a mesh takes."""
    return mesh.tp * mesh.pp * mesh.dp


def with_fewer(
    every: Sequence[Mesh], gpus: Gpus, layers: int, legal: Callable[[int], bool]
) -> list[Mesh]:
    """Meshes of all GPUs, then that of the largest legal tp of a node, with the stages it leaves.

    Stages are as many as `layers` at most.
    """
    tp = next((tp for tp in range(gpus.per_node, 0, -1) if legal(tp)), 1)
    rest = Mesh(tp, min(gpus.nodes * (gpus.per_node // tp), layers))
    return [*every, *([rest] if rest not in every else ())]
