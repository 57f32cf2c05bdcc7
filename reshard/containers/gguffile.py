"""The bytes of a `.gguf` file, versions 2 and 3, little-endian.

    "GGUF", uint32 version, uint64 tensors, uint64 key-values
    the key-values, see `reshard.containers.ggufvalues`
    of each tensor: name, uint32 dims, uint64 sizes (the fastest first), uint32 type, uint64 offset
    to the end    the tensors in that order, each padded to the alignment; offsets count from here

The alignment is 32 unless a key says otherwise. llama.cpp refuses a file whose tensors leave holes.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reshard.containers import Blob, Entry, FileIndex, Skeleton, TensorSpec, opened, shown
from reshard.containers.ggufvalues import Cursor, Scalar, pack, pack_string, read_fields
from reshard.encodings import ENCODINGS, Encoding, stored_bytes
from reshard.errors import CheckpointError, LayoutError
from reshard.geometry import row_major

# The numbers of tensor types, as ggml counts them.
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_ENCODED = {
    number: ENCODINGS[name]
    for number, name in ((2, "q4_0"), (3, "q4_1"), (6, "q5_0"), (7, "q5_1"), (8, "q8_0"))
}
_INTEGERS = {24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_OTHERS = {
    **dict(enumerate(("Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 9)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S"), 16)),
    **{22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    **{39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
_NUMBERS: Mapping[torch.dtype | Encoding, int] = {
    kind: number for number, kind in (_PLAIN | _ENCODED).items()
}
_MAGIC, _VERSION = b"GGUF", 3
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_TENSORS = 1 << 16
_MAX_NAME_BYTES = 64
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a key: `kind` is its GGUF type, as in uint32, string or [string]."""

    kind: str
    value: Scalar | Sequence[Scalar]


@dataclass(frozen=True, slots=True)
class Fields:
    """`count` key-values whose bytes were made before."""

    count: int
    blob: bytes | Blob


def index(root: Path, file: str) -> FileIndex:
    """Where each tensor of an existing file lies; header and file size are checked in full.

    Values of keys are as Python has them, short arrays tuples, and long ones a `LongArray`.
    """
    try:
        with opened(root / file) as content:
            return _read(Cursor(content))
    except OSError as error:
        raise CheckpointError(f"`{root / file}`: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"`{root / file}`: {error}") from error


def _read(cursor: Cursor) -> FileIndex:
    tensors, keys = _read_start(cursor)
    fields = read_fields(cursor, keys)
    alignment = _read_alignment(fields)
    entries: dict[str, Entry] = {}
    stop = position = 0
    for number in range(tensors):
        name = _read_name(cursor, number)
        if name in entries:
            raise ValueError(f"tensor `{name}` appears twice in the header")
        try:
            entries[name] = entry = _read_entry(cursor, position)
        except ValueError as error:
            raise ValueError(f"tensor `{name}` {error}") from error
        stop = position + stored_bytes(entry.shape, entry.dtype, entry.encoding)
        position = _padded(stop, alignment)
    start = _padded(cursor.position, alignment)
    _check_size(cursor.file_bytes, start + stop if tensors else cursor.position, start + position)
    placed = {
        name: Entry(start + entry.offset, entry.dtype, entry.shape, entry.strides, entry.encoding)
        for name, entry in entries.items()
    }
    return FileIndex(placed, {key: value for key, (_, value) in fields.items()})


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _read_start(cursor: Cursor) -> tuple[int, int]:
    """The numbers of tensors and of key-values."""
    magic = cursor.take(4)
    if magic != _MAGIC:
        found = shown(magic.decode("latin1"))
        raise ValueError(f"is not a GGUF file: it starts with `{found}`, expected `GGUF`")
    version = cursor.number("I")
    if version in (2 << 24, 3 << 24):
        raise ValueError("is big-endian; convert it with gguf-convert-endian, of the package gguf")
    if version not in (2, 3):
        raise ValueError(
            f"has GGUF version {version}, expected 2 or 3; convert the original weights again"
        )
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if tensors > _MAX_TENSORS:
        raise ValueError(f"is said to have {tensors} tensors, expected {_MAX_TENSORS} at most")
    return tensors, keys


def _read_alignment(fields: Mapping[str, tuple[str, object]]) -> int:
    kind, value = fields.get(_ALIGNMENT, ("uint32", _DEFAULT_ALIGNMENT))
    if kind != "uint32" or not isinstance(value, int) or value.bit_count() != 1:
        raise ValueError(
            f"{_ALIGNMENT} is {kind} {shown(str(value))}, expected uint32, a power of 2"
        )
    return value


def _read_name(cursor: Cursor, number: int) -> str:
    size = cursor.number("Q")
    if size > _MAX_NAME_BYTES:
        raise ValueError(
            f"tensor {number} has a name of {size} bytes, expected {_MAX_NAME_BYTES} at most"
        )
    name = cursor.take(size).decode(errors="replace")
    if not name.isprintable() or "\ufffd" in name:
        raise ValueError(f"tensor `{shown(name)}` has a name with characters that are no text")
    return name


def _read_entry(cursor: Cursor, expected: int) -> Entry:
    """The entry at the cursor; its offset, still from the first tensor on, is to be `expected`."""
    dims = cursor.number("I")
    if dims > _MAX_DIMS:
        raise ValueError(f"has {dims} dims, expected {_MAX_DIMS} at most")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dims)]))
    if math.prod(max(size, 1) for size in shape) >= 1 << 63:
        raise ValueError(f"has the shape {list(shape)}, more elements than any file")
    dtype, encoding = _kind(cursor.number("I"))
    if encoding is not None and (not shape or shape[-1] % encoding.block):
        raise ValueError(
            f"has rows of {shape[-1] if shape else 1} elements, "
            f"expected whole {encoding.name} blocks of {encoding.block}"
        )
    offset = cursor.number("Q")
    if offset != expected:
        fault = "overlaps the one before" if offset < expected else "leaves a hole before it"
        raise ValueError(f"{fault}: it starts at {offset}, expected {expected}")
    # Like torch, an empty dim counts as one.
    return Entry(offset, dtype, shape, row_major([max(size, 1) for size in shape]), encoding)


def _kind(number: int) -> tuple[torch.dtype, Encoding | None]:
    """The dtype of a tensor's values, and how they are coded, by the number of its type."""
    if number in _PLAIN:
        return _PLAIN[number], None
    if number in _ENCODED:
        return torch.float32, _ENCODED[number]
    names = [str(dtype).removeprefix("torch.") for dtype in _PLAIN.values()]
    names += [encoding.name for encoding in _ENCODED.values()]
    known = f"expected one of {', '.join(names)}"
    if number in _INTEGERS:
        raise ValueError(f"holds integers, {_INTEGERS[number]}, {known}")
    if number in _OTHERS:
        raise ValueError(
            f"is stored as {_OTHERS[number]}, {known}; take the original weights, "
            "or run: llama-quantize --allow-requantize IN OUT F16"
        )
    raise ValueError(f"has type {number}, which is not known, {known}")


def _check_size(found: int, stop: int, padded: int) -> None:
    """Tensors must fill the file; what pads the last one may be missing."""
    if found < stop:
        raise ValueError(f"truncated: {found} bytes, its header says {stop}")
    if found > padded:
        raise ValueError(f"is too long: {found} bytes, its header says {padded}")


def skeleton(tensors: Sequence[TensorSpec], metadata: Mapping[str, object]) -> Skeleton:
    """The header for `tensors` in the given order, and the padding behind each.

    `metadata` has the `Value` of each key, or `Fields`, whose own key is of no matter.
    """
    alignment = _alignment(metadata)
    counts = [item.count if isinstance(item, Fields) else 1 for item in metadata.values()]
    writer = _Writer()
    writer.add(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), sum(counts)))
    for key, item in metadata.items():
        writer.add(item.blob if isinstance(item, Fields) else _field(key, item))
    spans, relative = [], 0
    for spec in tensors:
        writer.add(_info(spec, relative))
        spans.append((spec, relative))
        relative = _padded(relative + _size(spec), alignment)
    writer.pad(alignment)
    start, offsets = writer.position, {}
    for spec, offset in spans:
        offsets[spec.key] = start + offset
        writer.skip(_size(spec))
        writer.pad(alignment)
    writer.flush()
    return Skeleton(writer.position, tuple(writer.chunks), offsets, {})


@dataclass(slots=True)
class _Writer:
    """Collects the bytes of a file around tensors, which are skipped; a `Blob` is not read."""

    position: int = 0
    chunks: list[tuple[int, bytes | Blob]] = field(default_factory=list)
    _pending: bytearray = field(default_factory=bytearray)

    def add(self, content: bytes | Blob) -> None:
        if isinstance(content, Blob):
            self.flush()
            self.chunks.append((self.position, content))
        else:
            self._pending += content
        self.position += len(content)

    def pad(self, alignment: int) -> None:
        self.add(bytes(-self.position % alignment))

    def skip(self, size: int) -> None:
        if size:
            self.flush()
            self.position += size

    def flush(self) -> None:
        if self._pending:
            self.chunks.append((self.position - len(self._pending), bytes(self._pending)))
            self._pending.clear()


def _alignment(metadata: Mapping[str, object]) -> int:
    found = metadata.get(_ALIGNMENT, Value("uint32", _DEFAULT_ALIGNMENT))
    value = found.value if isinstance(found, Value) and found.kind == "uint32" else 0
    if not isinstance(value, int) or value.bit_count() != 1:
        raise LayoutError(f"{_ALIGNMENT} is {found!r}, expected uint32, a power of 2")
    return value


def _size(spec: TensorSpec) -> int:
    return stored_bytes(spec.shape, spec.dtype, spec.encoding)


def _info(spec: TensorSpec, offset: int) -> bytes:
    """What the header says of one tensor."""
    name, number = spec.key, _NUMBERS.get(spec.encoding or spec.dtype)
    if number is None or (spec.encoding is not None and spec.dtype != torch.float32):
        coded = f" as {spec.encoding.name}" if spec.encoding is not None else ""
        raise LayoutError(f"tensor `{spec.key}`: a GGUF file cannot hold {spec.dtype}{coded}")
    if spec.encoding is not None and (not spec.shape or spec.shape[-1] % spec.encoding.block):
        raise LayoutError(
            f"tensor `{spec.key}`: the rows of {list(spec.shape)} are no whole "
            f"{spec.encoding.name} blocks of {spec.encoding.block}"
        )
    # llama.cpp counts the zero that ends a name.
    length = len(name.encode())
    if length >= _MAX_NAME_BYTES or len(spec.shape) > _MAX_DIMS:
        raise LayoutError(
            f"tensor `{spec.key}`: its name has {length} bytes and its shape {len(spec.shape)} "
            f"dims, expected {_MAX_NAME_BYTES - 1} and {_MAX_DIMS} at most"
        )
    sizes = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
    return pack_string(name) + sizes + struct.pack("<IQ", number, offset)


def _field(key: str, item: object) -> bytes:
    if not isinstance(item, Value):
        raise LayoutError(f"key `{key}`: found {type(item).__name__}, expected a GGUF value")
    try:
        return pack(key, item.kind, item.value)
    except ValueError as error:
        raise LayoutError(str(error)) from error
