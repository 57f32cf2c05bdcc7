"""What the libraries of other programs give of a file: its tensors, piece by piece."""

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from reshard.buffers import as_memory
from reshard.containers import FileIndex
from reshard.formats import common

PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor as a library gives it; `pieces` are its bytes in row-major order."""

    key: str
    kind: str
    shape: tuple[int, ...]
    pieces: Iterator[memoryview]


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return as_memory(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def _rows(shape: Sequence[int], itemsize: int) -> Iterator[slice]:
    """Ranges of a tensor's first dim that are about PIECE_BYTES each."""
    row = math.prod(shape[1:]) * itemsize
    step = max(1, PIECE_BYTES // max(row, 1))
    yield from (slice(start, start + step) for start in range(0, shape[0], step))


def _kind(dtype: torch.dtype) -> str:
    return common.stored_text(dtype, None)


def by_safetensors(path: Path, _: FileIndex) -> Iterator[Given]:
    """What safetensors gives."""
    with safetensors.safe_open(path, framework="pt") as held:
        for key in held.keys():  # noqa: SIM118  # it is no dict
            part = held.get_slice(key)
            shape = tuple(part.get_shape())
            first = held.get_tensor(key) if not shape else part[0:0]
            size = first.dtype.itemsize
            parts = (part[rows] for rows in _rows(shape, size)) if shape else iter([first])
            yield Given(key, _kind(first.dtype), shape, map(memory_of, parts))


def by_torch(path: Path, index: FileIndex) -> Iterator[Given]:
    """What torch gives: the dict of tensors, or the one inside it that is indexed."""
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    dicts = [held, *(value for value in held.values() if isinstance(value, dict))]
    tensors = [{k: v for k, v in one.items() if isinstance(v, torch.Tensor)} for one in dicts]
    chosen = max(tensors, key=lambda one: len(one.keys() & index.entries.keys()))
    for key, tensor in chosen.items():
        shape = tuple(tensor.shape)
        whole = tensor if shape else tensor.reshape(1)
        parts = (whole[rows] for rows in _rows(whole.shape, whole.dtype.itemsize))
        yield Given(key, _kind(tensor.dtype), shape, map(memory_of, parts))


def by_gguf(path: Path, _: FileIndex) -> Iterator[Given]:
    """What the package gguf gives."""
    reader: Any = importlib.import_module("gguf").GGUFReader(path)
    kinds = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
    for tensor in reader.tensors:
        kind = str(tensor.tensor_type.name)
        data = tensor.data.reshape(-1).view("uint8")
        pieces = (
            memoryview(data[start : start + PIECE_BYTES])
            for start in range(0, len(data), PIECE_BYTES)
        )
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield Given(str(tensor.name), kinds.get(kind, kind.lower()), shape, pieces)
