"""PyTorch distributed checkpoints, through torch.distributed.checkpoint itself.

One process writes what several ranks would: torch's own planner and writer run once per rank, and
only the tensors are not DTensors. `save_on_mesh` is the real thing, to compare with.
"""

import io
import itertools
import logging
import math
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import metadata as old_names
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.oracles import models
from tests.oracles.compare import assert_same_tensor, same_bits
from tests.oracles.models import Model
from tests.ranks import run_ranks

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
Cut = Callable[[str, Tensor], Sequence[Box] | None]  # boxes by rank, or None: whole on all ranks
State = dict[str, Any]

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight", "wo.weight", "w2.weight", "w13.weight")
WHOLE = ("norm.weight", "o_proj.bias", "down_proj.bias")


# --- boxes


def chunk_boxes(shape: Sequence[int], shards: int) -> list[Box]:
    """Dimension 0 as torch.chunk cuts it; shards beyond the end are empty."""
    return [_box(shape, {0: _chunk(shape[0], shards, i)}) for i in range(shards)]


def grid_boxes(shape: Sequence[int], dp: int, tp: int, dim: int | None) -> list[Box]:
    """Boxes by rank d * tp + t: cut over tp on `dim` (None: copies), then over dp on dim 0."""
    boxes = []
    for d, t in itertools.product(range(dp), range(tp)):
        outer = {} if dim is None else {dim: _chunk(shape[dim], tp, t)}
        start, count = outer.get(0, (0, shape[0]))
        inner = _chunk(count, dp, d)
        rows = (start + inner[0], inner[1]) if inner[1] else (shape[0], 0)
        boxes.append(_box(shape, outer | {0: rows}))
    return boxes


def parallel_dim(name: str) -> int | None:
    """The dimension that tensor parallelism cuts, for HF and TorchTitan names."""
    if name.endswith(WHOLE) or "norm" in name:
        return None
    return 1 if name.endswith(ROW_PARALLEL) else 0


def boxes(path: Path) -> dict[str, list[Box]]:
    """The boxes of every tensor as the metadata lists them, empty ones too."""
    found = tensors_in(metadata(path))
    return {
        fqn: [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        for fqn, entry in found.items()
    }


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))


def _chunk(count: int, shards: int, number: int) -> tuple[int, int]:
    step = -(-count // shards)
    start = min(number * step, count)
    return start, min(step, count - start)


def _box(shape: Sequence[int], cut: Mapping[int, tuple[int, int]]) -> Box:
    spans = [cut.get(dim, (0, size)) for dim, size in enumerate(shape)]
    return tuple(start for start, _ in spans), tuple(size for _, size in spans)


# --- writing in one process


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor; it plans its item as a DTensor does."""

    whole: Tensor
    box: Box

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        offsets, sizes = map(torch.Size, self.box)
        properties = TensorProperties.create_from_tensor(self.whole)
        data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, self.whole.size())
        return [WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data)]


class Planner(dcp.DefaultSavePlanner):
    """torch's planner, which also finds the tensor of a Part."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if not isinstance(found, Part):
            return super().lookup_object(index)
        return found.whole[slices(found.box)].clone(memory_format=torch.contiguous_format)


def save(path: Path, states: Sequence[State], **options: Any) -> None:
    """Write what `dcp.save` writes when rank r saves states[r]; options go to the file writer."""
    writer = dcp.FileSystemWriter(path, **{"sync_files": False} | options)
    planners = [Planner() for _ in states]
    plans = []
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(state, writer.storage_meta(), is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, whole = planners[0].create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).value()
        for planner, plan in zip(planners, plans, strict=True)
    ]
    writer.finish(whole, results)


def split(state: State, ranks: int, cut: Cut, key: str = "") -> list[State]:
    """The states of all ranks: tensors cut as asked (by dotted key), all else on every rank."""
    states: list[State] = [{} for _ in range(ranks)]
    for name, value in state.items():
        parts: Sequence[Any] = [value] * ranks
        if isinstance(value, dict):
            parts = split(value, ranks, cut, f"{key}{name}.")
        elif isinstance(value, Tensor):
            places = cut(f"{key}{name}", value)
            parts = [Part(value, place) for place in places] if places else parts
        for held, part in zip(states, parts, strict=True):
            held[name] = part
    return states


def over_ranks(shards: int, replicas: int = 1) -> Cut:
    """FSDP's cut: everything on dim 0; replicas are those of hybrid sharding."""
    return lambda _, tensor: chunk_boxes(tensor.shape, shards) * replicas if tensor.dim() else None


def over_grid(dp: int, tp: int) -> Cut:
    """The cut of FSDP over tensor parallelism."""
    return lambda key, tensor: grid_boxes(tensor.shape, dp, tp, parallel_dim(key))


def with_head(model: Model) -> dict[str, Tensor]:
    """The state dict of a running model, where a tied head is the embedding under its own name."""
    tensors = dict(model.tensors)
    if model.config["tie_word_embeddings"]:
        tensors[HEAD] = tensors[TABLE]
    return tensors


def write_fsdp(
    model: Model,
    path: Path,
    shards: int,
    *,
    wrapper: bool = True,
    extra: State | None = None,
    no_dist: bool = False,
    replicas: int = 1,
    **options: Any,
) -> None:
    """A checkpoint as FSDP2 saves it, {"model": state dict} or bare.

    `extra` is saved beside it, tensors whole. `no_dist` saves whole tensors by `dcp.save` itself.
    """
    tensors = with_head(model)
    if no_dist:
        with quiet():
            state = ({"model": tensors} if wrapper else tensors) | (extra or {})
            dcp.save(state, storage_writer=dcp.FileSystemWriter(path, **options), no_dist=True)
        return
    states = split(tensors, shards * replicas, over_ranks(shards, replicas))
    wrapped = [{"model": state} if wrapper else state for state in states]
    save(path, [state | (extra or {}) for state in wrapped], **options)


def write_2d(model: Model, path: Path, dp: int, tp: int, **options: Any) -> None:
    """A checkpoint of an HF model under FSDP and tensor parallelism, {"model": state dict}."""
    states = split(with_head(model), dp * tp, over_grid(dp, tp))
    save(path, [{"model": state} for state in states], **options)


# --- the real thing, on ranks


def hf_state(make: str, **given: Any) -> dict[str, Tensor]:
    """The state dict of a model that a function of tests.oracles.models makes."""
    model: Model = getattr(models, make)(**given)
    return with_head(model)


def on_mesh(tensors: Mapping[str, Tensor], dp: int, tp: int = 1) -> dict[str, DTensor]:
    """DTensors as tensor parallelism and FSDP2 make them of a module's parameters.

    A tensor that stands under two names is one parameter.
    """
    module, keys = torch.nn.Module(), {}
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    for name, tensor in tensors.items():
        keys[name] = f"p{id(tensor)}"
        if keys[name] in dict(module.named_parameters()):
            continue
        whole = tensor.clone()
        if tp > 1:
            dim = parallel_dim(name)
            placement = Replicate() if dim is None else Shard(dim)
            whole = distribute_tensor(whole, mesh["tp"], [placement])
        module.register_parameter(keys[name], torch.nn.Parameter(whole, requires_grad=False))
    fully_shard(module, mesh=mesh["dp"])
    state = module.state_dict()
    return {name: state[key] for name, key in keys.items()}


def in_turn(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """For `run_ranks`: several calls in one group."""
    return [call() for call in calls]


def save_on_mesh(
    path: Path,
    make: Callable[[], dict[str, Tensor]],
    dp: int,
    tp: int = 1,
    *,
    wrapper: bool = True,
    extra: State | None = None,
) -> None:
    """For `run_ranks`: `dcp.save` of the state dict that `make` (of a module) makes."""
    state = on_mesh(make(), dp, tp)
    dcp.save({**({"model": state} if wrapper else state), **(extra or {})}, checkpoint_id=path)


def load_on_mesh(path: Path, expected: Path, dp: int, tp: int = 1) -> list[str]:
    """For `run_ranks`: `dcp.load` onto a mesh of another size; says which tensors differ."""
    whole: dict[str, Tensor] = torch.load(expected)
    state = on_mesh({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, dp, tp)
    dcp.load(dict(state), checkpoint_id=path)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return [n for n, tensor in state.items() if not same_bits(tensor.full_tensor(), whole[n])]


def check_loads_on_mesh(
    path: Path, expected: Mapping[str, Tensor], meshes: Sequence[tuple[int, int]]
) -> None:
    """torch loads the tensors (named as stored) onto every mesh (dp, tp), over real ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "expected.pt"
        torch.save(dict(expected), file)
        for world in {dp * tp for dp, tp in meshes}:
            chosen = [mesh for mesh in meshes if math.prod(mesh) == world]
            calls = [partial(load_on_mesh, path, file, *mesh) for mesh in chosen]
            for mesh, differ in zip(chosen, run_ranks(world, in_turn, calls)[0], strict=True):
                assert not differ, f"{path} on {mesh} ranks: {differ} differ"


# --- reading


def metadata(path: Path) -> Metadata:
    return dcp.FileSystemReader(path).read_metadata()


def tensors_in(found: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors among what was saved."""
    entries = found.state_dict_metadata.items()
    return {fqn: entry for fqn, entry in entries if isinstance(entry, TensorStorageMetadata)}


def read(path: Path, *, everything: bool = False) -> dict[str, Tensor]:
    """Every tensor whole, loaded by torch, under its stored key; without the optimizer's.

    What torch does not look at is looked at: boxes cover each tensor once, and items are what the
    metadata says.
    """
    entries = tensors_in(metadata(path))
    check_items(path)
    if not everything:
        entries = {
            n: e for n, e in entries.items() if n.split(".")[0] not in ("optim", "optimizer")
        }
    for fqn, entry in entries.items():
        check_cover(fqn, entry)
    whole = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
    load(whole, path)
    return whole


def load(state: State, path: Path) -> None:
    """`dcp.load` in this process; its exception, which is no Exception, becomes one."""
    try:
        with quiet():
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise AssertionError(f"torch does not load {path}: {error}") from error


def read_fsdp(path: Path) -> dict[str, Tensor]:
    """The tensors of the model under the names of its state dict, wrapped in "model" or not."""
    tensors, places = read(path), metadata(path).planner_data
    if places is None:
        wrapped = any(name.startswith("model.model.") for name in tensors)
        places = {n: ("model", n[6:]) if wrapped else (n,) for n in tensors}
    if any(len(place) == 2 and place[0] == "model" for place in places.values()):
        return {places[n][1]: t for n, t in tensors.items() if places[n][0] == "model"}
    return tensors


def check_cover(fqn: str, entry: TensorStorageMetadata) -> None:
    """Every element of a tensor is in one box."""
    count = torch.zeros(entry.size, dtype=torch.int32)
    for chunk in entry.chunks:
        place = slices((tuple(chunk.offsets), tuple(chunk.sizes)))
        assert count[place].shape == chunk.sizes, f"{fqn}: {chunk} is not inside {entry.size}"
        count[place] += 1
    assert bool((count == 1).all()), f"{fqn}: elements are not covered once"


def check_items(path: Path) -> None:
    """Each box has one item: bytes of its own, a zip with right sums that holds just its tensor."""
    found, sizes = metadata(path), _file_sizes(path)
    expected = {
        (fqn, chunk.offsets): (entry.properties.dtype, chunk.sizes, True)
        for fqn, entry in tensors_in(found).items()
        for chunk in entry.chunks
    }
    stored = {index: info for index, info in found.storage_data.items() if index.offset is not None}
    keys = {(index.fqn, index.offset) for index in stored}
    assert keys == set(expected), f"boxes without items, or the reverse: {keys ^ set(expected)}"
    end = ("", 0)
    spans = sorted((i.relative_path, i.offset, i.length) for i in found.storage_data.values())
    for name, offset, length in spans:
        assert end <= (name, offset), f"{name}: an item at {offset} begins inside another"
        end = name, offset + length
        assert end[1] <= sizes.get(name, 0), f"{name}: {sizes.get(name)} bytes, an item to {end[1]}"
    for index, info in stored.items():
        tensor, said = _item(path, index, info), expected[index.fqn, index.offset]
        is_so = (tensor.dtype, tensor.shape, tensor.is_contiguous())
        assert is_so == said, f"{index}: dtype, shape, row-major are {is_so}, not {said}"
        held, needed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.itemsize
        assert held == needed, f"{index}: a storage of {held} bytes for {needed}"


def check_same_layout(a: Path, b: Path, *, where: bool = True) -> None:
    """Both list the same entries, boxes in their order, nesting and (`where`) places in files."""
    one, other = metadata(a), metadata(b)
    assert one.state_dict_metadata == other.state_dict_metadata
    assert one.planner_data == other.planner_data
    assert one.version == other.version
    if where:
        assert one.storage_data == other.storage_data
        assert _file_sizes(a) == _file_sizes(b)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        yield


def _file_sizes(path: Path) -> dict[str, int]:
    files = [file for file in Path(path).iterdir() if file.suffix == ".distcp"]
    return {file.name: file.stat().st_size for file in files}


def _item(path: Path, index: MetadataIndex, info: Any) -> Tensor:
    with (Path(path) / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        data = file.read(info.length)
    bad = zipfile.ZipFile(io.BytesIO(data)).testzip()
    assert bad is None, f"{index}: the checksum of {bad} is wrong"
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert type(found) is Tensor, f"{index}: {type(found)}"
    return found


# --- damage


@dataclass(frozen=True)
class Trap:
    """Unpickling it with no care makes a directory."""

    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def rewrite(path: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the metadata in place and pickle it anew; a result takes its place."""
    found = metadata(path)
    result = change(found)
    found = found if result is None else result
    (Path(path) / ".metadata").write_bytes(pickle.dumps(found, protocol=4))


def drop_chunk(path: Path, fqn: str, number: int = -1) -> None:
    """A hole: the box and its item are gone."""

    def change(found: Metadata) -> None:
        chunk = found.state_dict_metadata[fqn].chunks.pop(number)
        del found.storage_data[MetadataIndex(fqn, chunk.offsets)]

    rewrite(path, change)


def move_chunk(path: Path, fqn: str, by: Sequence[int], number: int = -1) -> None:
    """A box and its item say another place: an overlap, a hole, or outside of the tensor."""

    def change(found: Metadata) -> None:
        chunks = found.state_dict_metadata[fqn].chunks
        info = found.storage_data.pop(MetadataIndex(fqn, chunks[number].offsets))
        moved = torch.Size(a + b for a, b in zip(chunks[number].offsets, by, strict=True))
        chunks[number] = ChunkStorageMetadata(moved, chunks[number].sizes)
        found.storage_data[MetadataIndex(fqn, moved, number % len(chunks))] = info

    rewrite(path, change)


def repeat_chunk(path: Path, fqn: str, number: int = 0) -> None:
    """The same box stands twice in the list."""

    def change(found: Metadata) -> None:
        chunks = found.state_dict_metadata[fqn].chunks
        chunks.append(chunks[number])

    rewrite(path, change)


def drop_item(path: Path, fqn: str, number: int = 0) -> None:
    """A box has no item."""

    def change(found: Metadata) -> None:
        offsets = found.state_dict_metadata[fqn].chunks[number].offsets
        del found.storage_data[MetadataIndex(fqn, offsets)]

    rewrite(path, change)


def set_item(path: Path, fqn: str, number: int = 0, **changes: Any) -> None:
    """Other values of relative_path, offset, length or transform_descriptors of one item."""

    def change(found: Metadata) -> None:
        index = MetadataIndex(fqn, found.state_dict_metadata[fqn].chunks[number].offsets)
        found.storage_data[index] = replace(found.storage_data[index], **changes)

    rewrite(path, change)


def set_dtype(path: Path, fqn: str, dtype: torch.dtype) -> None:
    """The metadata says another dtype than the items have."""

    def change(found: Metadata) -> None:
        entry = found.state_dict_metadata[fqn]
        entry.properties = replace(entry.properties, dtype=dtype)

    rewrite(path, change)


def set_size(path: Path, fqn: str, size: Sequence[int]) -> None:
    """The metadata says another shape; the boxes stay."""
    rewrite(path, lambda found: setattr(found.state_dict_metadata[fqn], "size", torch.Size(size)))


def replace_item(path: Path, fqn: str, value: Any, number: int = 0, **options: Any) -> None:
    """One item is another object, which torch.save writes into a file of its own."""
    file = Path(path) / "__replaced_0.distcp"
    torch.save(value, file, **options)
    length = file.stat().st_size
    set_item(path, fqn, number, relative_path=file.name, offset=0, length=length)


def trap_metadata(path: Path, marker: Path) -> None:
    """Unpickling the metadata with no care makes the directory `marker`."""
    rewrite(path, lambda found: setattr(found, "planner_data", Trap(marker)))


def trap_item(path: Path, fqn: str, marker: Path) -> None:
    """Unpickling one item with no care makes the directory `marker`."""
    replace_item(path, fqn, Trap(marker))


def without_nesting(path: Path) -> None:
    """As other programs write it: keys only, no `planner_data`, no version, no save id."""
    rewrite(path, lambda found: Metadata(found.state_dict_metadata, None, found.storage_data))


def as_older_torch(path: Path) -> None:
    """With the class of properties that torch had until 2.2, and no version and save id."""

    def change(found: Metadata) -> Metadata:
        for entry in tensors_in(found).values():
            old = {"dtype": entry.properties.dtype, "layout": entry.properties.layout}
            entry.properties = old_names.TensorProperties(**old)
        older = Metadata(found.state_dict_metadata, found.planner_data, found.storage_data)
        del older.__dict__["storage_meta"], older.__dict__["version"]
        return older

    rewrite(path, change)


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, and bit for bit the same tensors."""
    differ = found.keys() ^ expected.keys()
    assert not differ, f"only one side has {sorted(differ)}"
    for name, tensor in expected.items():
        assert_same_tensor(name, found[name], tensor)
