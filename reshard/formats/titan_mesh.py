"""How DTensor lays a parameter on TorchTitan's mesh (dp, tp): by tp first, and by dp within."""

from functools import lru_cache

from reshard.formats import dcp
from reshard.formats.options import Mesh
from reshard.geometry import Region, whole
from reshard.layout import Parameter
from reshard.placement import Boxes, Placement, chunked


def tiled(parameter: Parameter, mesh: Mesh) -> tuple[Placement, tuple[tuple[str, int], ...]]:
    """A parameter on a (dp, tp) mesh: as DTensor places it; without tp on the first tp rank."""
    if mesh.tp == 1:
        return Placement(parameter.shape, chunked(parameter.shape[0], mesh.dp)), ()
    if parameter.dim is None:
        ranks = [rank * mesh.tp for rank in range(mesh.dp)]
        spread = tuple((dcp.FILE.format(shard=rank), rank) for rank in ranks)
        return Placement(parameter.shape, chunked(parameter.shape[0], mesh.dp)), spread
    return Placement(parameter.shape, _grid(parameter.shape, parameter.dim, mesh)), ()


@lru_cache(maxsize=64)
def _grid(shape: tuple[int, ...], dim: int, mesh: Mesh) -> Boxes:
    """The boxes of a (dp, tp) mesh by rank: cut along `dim` by tp, and then along dim 0 by dp."""
    boxes = []
    for rank in range(mesh.dp * mesh.tp):
        by_tp = _part(whole(shape), dim, rank % mesh.tp, mesh.tp)
        boxes.append(_part(by_tp, 0, rank // mesh.tp, mesh.dp))
    return Boxes(boxes)


def _part(box: Region, dim: int, place: int, parts: int) -> Region:
    """One of `parts` chunks of a box along `dim`, by the rule of torch.chunk."""
    low, size = box.start[dim], box.shape[dim]
    step = -(-size // parts)
    start, stop = list(box.start), list(box.stop)
    start[dim], stop[dim] = low + min(size, place * step), low + min(size, (place + 1) * step)
    return Region(tuple(start), tuple(stop))
