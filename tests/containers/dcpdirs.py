"""DCP directories for tests: written and read by torch, and by the containers under test."""

import os
import pickle
import warnings
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard import containers
from reshard.containers import TensorSpec, dcpfile, dcpmetadata
from reshard.containers.dcpmetadata import Described, Item
from reshard.geometry import Region, item_name, whole

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    limit = 2 if dtype is torch.bool else 120
    content = torch.randint(limit, (prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return content.view(dtype).view(shape)


# --- torch


def save(path: Path, state: dict[str, Any], **options: Any) -> Path:
    """Save in this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(path, **options), no_dist=True)
    return path


def metadata_of(path: Path) -> Metadata:
    return FileSystemReader(path).read_metadata()


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by fqn, in full."""
    described = metadata_of(path).state_dict_metadata.items()
    state = {
        fqn: torch.full(tensor.size, 0, dtype=tensor.properties.dtype)
        for fqn, tensor in described
        if isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state


# --- the containers under test


def ours(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory as our index finds it; boxes without elements stay 0."""
    directory = dcpmetadata.read(path)
    contents = {file: (path / file).read_bytes() for file in directory.files}
    state = {}
    for fqn, tensor in directory.tensors.items():
        dcpmetadata.require_tiled(fqn, tensor)
        state[fqn] = torch.full(tensor.shape, 0, dtype=tensor.dtype)
        for box, file in zip(tensor.boxes, tensor.files, strict=True):
            entry = containers.index("dcpfile", path, file).entries[item_name(fqn, box.start)]
            assert (entry.dtype, entry.shape) == (tensor.dtype, box.shape)
            size = box.numel * entry.dtype.itemsize
            content = bytearray(contents[file][entry.offset : entry.offset + size])
            part = torch.frombuffer(content, dtype=torch.uint8).view(entry.dtype)
            place = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
            state[fqn][place] = part.as_strided(entry.shape, entry.strides)
    return state


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert set(found) == set(expected)
    for fqn, tensor in expected.items():
        assert (found[fqn].dtype, found[fqn].shape) == (tensor.dtype, tensor.shape), fqn
        assert raw(found[fqn]) == raw(tensor), fqn


def assert_read_as_torch_reads(path: Path) -> None:
    """Our view of a directory is FileSystemReader's: tensors, boxes, places, bytes, paths."""
    metadata, found = metadata_of(path), dcpmetadata.read(path)
    tensors = {
        fqn: tensor
        for fqn, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    assert set(found.others) == set(metadata.state_dict_metadata) - set(tensors)
    assert dict(found.paths) == (metadata.planner_data or {})
    places = {}
    for fqn, tensor in tensors.items():
        kept = sorted((c for c in tensor.chunks if c.sizes.numel()), key=lambda c: c.offsets)
        assert found.tensors[fqn].shape == tuple(tensor.size)
        assert found.tensors[fqn].dtype == tensor.properties.dtype
        boxes = [(box.start, box.shape) for box in found.tensors[fqn].boxes]
        assert boxes == [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kept]
        for chunk, file in zip(kept, found.tensors[fqn].files, strict=True):
            stored = metadata.storage_data[MetadataIndex(fqn, chunk.offsets)]
            assert file == stored.relative_path
            key = item_name(fqn, chunk.offsets)
            places[file, key] = (fqn, stored.offset, stored.length)
    assert set(found.files) == {file for file, _ in places}
    assert list(found.files) == sorted(found.files)
    items = {(file, item.key): item for file in found.files for item in found.items(file)}
    assert {key: (i.fqn, i.offset, i.length) for key, i in items.items()} == places
    assert_same(ours(path), load(path))


def write(
    root: Path,
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, Sequence[tuple[str, Region]]] | None = None,
    paths: Mapping[str, tuple[str | int, ...]] | None = None,
) -> Path:
    """A directory by our writer; `files` says which boxes each holds, by default all whole."""
    root.mkdir(exist_ok=True)
    if files is None:
        files = {"a.distcp": [(fqn, whole(tensor.shape)) for fqn, tensor in tensors.items()]}
    boxes: dict[str, list[Region]] = {fqn: [] for fqn in tensors}
    items = []
    for file, members in files.items():
        named = {item_name(fqn, box.start): (fqn, box) for fqn, box in members}
        specs = [TensorSpec(k, tensors[f].dtype, box.shape) for k, (f, box) in named.items()]
        laid_out = dcpfile.skeleton(specs, {})
        parts = {key: part_of(tensors[fqn], box) for key, (fqn, box) in named.items()}
        (root / file).write_bytes(filled(laid_out, parts))
        for key, (fqn, box) in named.items():
            items.append(Item(fqn, box.start, len(boxes[fqn]), file, *laid_out.items[key]))
            boxes[fqn].append(box)
    described = [
        Described(
            fqn, tensor.dtype, tuple(tensor.shape), (paths or {}).get(fqn, (fqn,)), boxes[fqn]
        )
        for fqn, tensor in tensors.items()
    ]
    (root / ".metadata").write_bytes(b"".join(dcpmetadata.write(described, items)))
    return root


def part_of(tensor: torch.Tensor, box: Region) -> torch.Tensor:
    return tensor[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]


def filled(laid_out: containers.Skeleton, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A file made of its skeleton and tensors, with their checksums in place."""
    content = bytearray(laid_out.size)
    for offset, chunk in laid_out.chunks:
        content[offset : offset + len(chunk)] = chunk
    for key, tensor in tensors.items():
        data, start = raw(tensor), laid_out.offsets[key]
        content[start : start + len(data)] = data
        for place in laid_out.checksums[key]:
            content[place : place + 4] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(content)


# --- handmade metadata, with things to get wrong


def metadata(
    tensors: Mapping[str, tuple[Sequence[int], Sequence[Box]]],
    dtype: torch.dtype = torch.float32,
    others: Sequence[str] = (),
) -> Metadata:
    """What torch would write of float32 tensors of (shape, boxes), 100 bytes apart in one file."""
    described: dict[str, Any] = {fqn: BytesStorageMetadata() for fqn in others}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for fqn, (shape, boxes) in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in boxes]
        described[fqn] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
        for number, (start, _) in enumerate(boxes):
            index = MetadataIndex(fqn, torch.Size(start), number)
            stored[index] = _StorageInfo("a.distcp", 100 * len(stored), 100)
    return Metadata(described, {fqn: (fqn,) for fqn in described}, stored, None, "1.0.0")


def dump(root: Path, value: object, *, protocol: int = 4, size: int = 100_000) -> Path:
    """A directory whose one file is all zeros."""
    root.mkdir(exist_ok=True)
    (root / ".metadata").write_bytes(
        value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    )
    (root / "a.distcp").write_bytes(bytes(size))
    return root


def pickle_metadata(root: Path, value: Metadata) -> None:
    """Replace `.metadata`; its size or time differ, so that it is read again."""
    before = (root / ".metadata").stat().st_mtime_ns
    (root / ".metadata").write_bytes(pickle.dumps(value, 4))
    os.utime(root / ".metadata", ns=(before + 1, before + 1))
