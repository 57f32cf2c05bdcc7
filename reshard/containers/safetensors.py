"""The bytes of a `.safetensors` file: a length, a JSON header, then the tensors back to back.

8 bytes       N, little-endian
N bytes       {"__metadata__": {...}, "key": {"dtype", "shape", "data_offsets"}, ...}, spaces
to the end    the tensors without a hole; `data_offsets` count from here
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from reshard.containers import (
    Entry,
    FileIndex,
    Skeleton,
    TensorSpec,
    is_key,
    jsontext,
    opened,
    shown,
)
from reshard.errors import CheckpointError, LayoutError
from reshard.geometry import row_major

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = jsontext.MAX_BYTES  # of 300,000 tensors; the library's own cap is 100 MB
_MAX_DIMS = 8
_MAX_NUMBER = (1 << 63) - 1
_ALIGNMENT = 64


def index(root: Path, file: str) -> FileIndex:
    """Where each tensor of an existing file lies; header and file size are checked in full."""
    try:
        with opened(root / file) as content:
            file_bytes = os.fstat(content.fileno()).st_size
            text = _read_header(content, file_bytes)
        try:
            header = jsontext.parse(text)
        except ValueError as error:
            raise ValueError(f"its header is no JSON of tensors: {error}") from error
        data_start = 8 + len(text)
        metadata, entries = _parse(header, data_start=data_start)
        _check_tiling(entries, data_start=data_start, file_bytes=file_bytes)
    except OSError as error:
        raise CheckpointError(f"`{root / file}`: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"`{root / file}`: {error}") from error
    return FileIndex(entries, metadata)


def skeleton(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Skeleton:
    """The header for `tensors` in the given order; the first tensor byte is 64-byte aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    spans: dict[str, int] = {}
    position = 0
    for spec in tensors:
        if spec.dtype not in _DTYPE_NAMES:
            raise LayoutError(f"tensor `{spec.key}`: a safetensors file cannot hold {spec.dtype}")
        spans[spec.key] = position
        stop = position + math.prod(spec.shape) * spec.dtype.itemsize
        header[spec.key] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    chunk = len(text).to_bytes(8, "little") + text
    offsets = {key: start + span for key, span in spans.items()}
    return Skeleton(start + position, ((0, chunk),), offsets, {})


def _read_header(file: BinaryIO, file_bytes: int) -> bytes:
    """The header's UTF-8 text, at most what the file and the format's cap allow."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"truncated: {file_bytes} bytes, expected at least the 8 of its length")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(
            f"is not a safetensors file: its header would take {header_bytes} bytes, "
            f"expected at most {_MAX_HEADER_BYTES}"
        )
    if 8 + header_bytes > file_bytes:
        raise ValueError(
            f"truncated: {file_bytes} bytes, its header alone ends at {8 + header_bytes}"
        )
    text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ValueError(f"truncated while it was read: {8 + len(text)} of {file_bytes} bytes")
    return text


def _parse(header: object, *, data_start: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors that a header names, each consistent in itself."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its `__metadata__` does not map text to text")
    entries = {}
    for key, described in header.items():
        try:
            entries[key] = _entry(key, described, data_start)
        except ValueError as error:
            raise ValueError(f"tensor `{shown(key)}` {error}") from error
    return metadata, entries


def _entry(key: str, described: object, data_start: int) -> Entry:
    if not is_key(key):
        raise ValueError(f"has a name of {len(key)} characters, or some that cannot be printed")
    if not isinstance(described, dict):
        raise ValueError("is not a JSON object")
    name = described.get("dtype")
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        found = shown(name) if isinstance(name, str) else "none"
        raise ValueError(f"has dtype `{found}`, expected one of {', '.join(_DTYPES)}")
    shape = _integers(described, "shape")
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"has {len(shape)} dims, expected at most {_MAX_DIMS}")
    span = _integers(described, "data_offsets")
    if len(span) != 2 or span[0] > span[1]:
        raise ValueError("has `data_offsets` that are not a start and a stop")
    # An empty dim would else hide the others, however large.
    if math.prod(max(size, 1) for size in shape) > _MAX_NUMBER:
        raise ValueError(f"has the shape {shown(str(list(shape)))}, more elements than any file")
    expected = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != expected:
        raise ValueError(
            f"spans {span[1] - span[0]} bytes, but its shape and {name} take {expected}"
        )
    # Like torch, an empty dim counts as one.
    strides = row_major([max(size, 1) for size in shape])
    return Entry(data_start + span[0], dtype, shape, strides)


def _integers(described: Mapping[str, object], field: str) -> tuple[int, ...]:
    values = described.get(field)
    # `type(...) is int`: JSON's true is a Python int too.
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"has a `{field}` that is not a list of non-negative integers")
    return tuple(values)


def _check_tiling(entries: Mapping[str, Entry], *, data_start: int, file_bytes: int) -> None:
    """Tensors must follow each other without hole or overlap, up to the file's last byte."""
    position = data_start
    spans = sorted(
        (entry.offset, entry.offset + math.prod(entry.shape) * entry.dtype.itemsize, key)
        for key, entry in entries.items()
    )
    for start, stop, key in spans:
        if start != position:
            fault = "overlaps the one before" if start < position else "leaves a hole before it"
            raise ValueError(
                f"tensor `{shown(key)}` {fault}: it starts at {start - data_start}, "
                f"expected {position - data_start}"
            )
        position = stop
    if file_bytes < position:
        raise ValueError(f"truncated: {file_bytes} bytes, its header says {position}")
    if file_bytes > position:
        raise ValueError(f"is too long: {file_bytes} bytes, its header says {position}")
