"""The bytes of a `.pth`: a zip of uncompressed records, one of them a pickle that names the others.

    archive/data.pkl      {key: (which record, offset, shape, strides), ...} as a pickle
    archive/byteorder, .storage_alignment, version, .data/serialization_id
    archive/data/0, ...   the storages: raw elements, 64-byte aligned by padding their headers

A pickle can run code and exhaust memory, and Python's own unpickler allocates by numbers that it
reads and hashes whatever it is given. So `_Machine` interprets the few opcodes that a state dict
needs, and only ever builds plain values: there is nothing in it that could look up or call a name.
"""

import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reshard.containers import Entry, FileIndex, Skeleton, TensorSpec
from reshard.errors import CheckpointError, LayoutError

SUFFIXES: tuple[str, ...] = (".pth", ".pt")

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch.storage UntypedStorage": torch.uint8,
}
# Types without a storage class of their own are views of untyped bytes, made by rebuild_tensor_v3.
_VIEWED = {
    f"torch {name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_VIEWED_TENSOR = "torch._utils _rebuild_tensor_v3"
_PARAMETER = "torch._utils _rebuild_parameter"
_GLOBALS = {*_STORAGES, *_VIEWED, _ORDERED_DICT, _TENSOR, _VIEWED_TENSOR, _PARAMETER}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items() if "Untyped" not in name}
_VIEWED_NAMES = {dtype: name for name, dtype in _VIEWED.items()}

_MAX_PICKLE_BYTES = 64 << 20
_MAX_DIRECTORY_BYTES = 16 << 20  # zipfile takes 12 times this; 200,000 tensors fit
_MAX_OPCODES = 4_000_000
_MAX_MARKS = 100
_MAX_DIMS = 8
_ALIGNMENT = 64
_UINT32 = 0xFFFFFFFF  # in a 32-bit field: look in the zip64 extra field
_UINT16 = 0xFFFF

_PUSHES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSHES_ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle asks for; it stands for nothing but itself."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    record: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as pickled: `offset` and `strides` in elements of `dtype`."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def index(path: Path) -> FileIndex:
    """Where each tensor of an existing file lies, views and shared storages included.

    The file holds a dict of tensors, or one dict inside a dict; values that are no tensors are
    skipped. Nothing in the file is executed, whatever it asks for.
    """
    try:
        with _BoundedFile(path) as file:
            archive = _Archive(file)
            file.limit = _MAX_PICKLE_BYTES
            value = _Machine().run(archive.read("data.pkl"))
            return FileIndex(_entries(value, archive), {})
    except OSError as error:
        raise CheckpointError(f"`{path.name}`: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"`{path.name}`: {error}") from error


def skeleton(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Skeleton:
    """A zip as torch.save would write it, with one storage per tensor in the given order.

    Sizes and CRC32s stand in the records' headers, without data descriptors, and the record
    `.format_version` is left out: torch may compute the offsets of files that have it from its own
    writer's layout. `metadata` has no place in a .pth and is not stored.
    """
    pickled = _pickle(tensors)
    names = zlib.crc32("\n".join(spec.key for spec in tensors).encode())
    writer = _ZipWriter()
    writer.add("data.pkl", pickled)
    writer.add("byteorder", b"little")
    writer.add(".storage_alignment", b"%d" % _ALIGNMENT)
    for number, spec in enumerate(tensors):
        writer.add_hole(f"data/{number}", math.prod(spec.shape) * spec.dtype.itemsize)
    writer.add("version", b"3\n")
    writer.add(".data/serialization_id", b"%020d%020d" % (names, zlib.crc32(pickled)))
    fields = writer.finish()
    holes = {spec.key: f"data/{number}" for number, spec in enumerate(tensors)}
    return Skeleton(
        writer.position,
        tuple(writer.chunks),
        {key: writer.records[name].payload for key, name in holes.items()},
        {key: (writer.records[name].header + 14, fields[name] + 16) for key, name in holes.items()},
    )


class _BoundedFile(io.BufferedReader):
    """A file that refuses reads of a size which only a hostile file would ask for."""

    limit = _MAX_DIRECTORY_BYTES

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        rest = self.file_bytes() - self.tell()
        wanted = rest if size is None or size < 0 else min(size, rest)
        if wanted > self.limit:
            raise ValueError(f"one part takes {wanted} bytes, expected at most {self.limit}")
        return super().read(wanted)

    def file_bytes(self) -> int:
        return os.fstat(self.fileno()).st_size


class _Archive:
    """The zip around the records of a checkpoint, which are named without their common prefix."""

    def __init__(self, file: _BoundedFile) -> None:
        self._file = file
        self._records = {info.filename: info for info in _directory(file)}
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        pickles = [name for name in pickles if name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"holds {len(pickles)} `*/data.pkl`, expected 1, as torch.save writes")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self.holds("byteorder") and self.read("byteorder") != b"little":
            raise ValueError("is not little-endian; re-save it on a little-endian machine")

    def holds(self, name: str) -> bool:
        return self._prefix + name in self._records

    def read(self, name: str) -> bytes:
        start, size = self.locate(name)
        self._file.seek(start)
        payload = self._file.read(size)
        expected = self._records[self._prefix + name].CRC
        # torch.serialization.set_crc32_options(False) writes 0 for every record.
        if expected and expected != zlib.crc32(payload):
            raise ValueError(
                f"record `{name}` is damaged: CRC32 {zlib.crc32(payload):08x}, "
                f"expected {expected:08x}"
            )
        return payload

    def locate(self, name: str) -> tuple[int, int]:
        """The (offset, size) in bytes of a record's payload, which lies inside the file."""
        if not self.holds(name):
            raise ValueError(f"has no record `{_shown(name)}`, which its pickle names")
        info = self._records[self._prefix + name]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"record `{_shown(name)}` is compressed; re-save it with torch.save")
        if not 0 <= info.header_offset < self._file.file_bytes():
            raise ValueError(
                f"truncated: {self._file.file_bytes()} bytes, "
                f"record `{_shown(name)}` starts at {info.header_offset}"
            )
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ValueError(f"record `{_shown(name)}` has no header at {info.header_offset}")
        # The extra field's length differs from the one in the directory: torch pads here alone.
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + info.file_size > self._file.file_bytes():
            raise ValueError(
                f"truncated: {self._file.file_bytes()} bytes, "
                f"record `{_shown(name)}` ends at {start + info.file_size}"
            )
        return start, info.file_size


def _directory(file: _BoundedFile) -> list[zipfile.ZipInfo]:
    magic = file.read(4)
    if magic.startswith(b"\x80\x02"):
        raise ValueError("is a legacy torch file, not a zip; load it and re-save with torch.save")
    if magic != b"PK\x03\x04":
        raise ValueError("is not a torch zip file; re-save it with torch.save")
    try:
        records = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(
            f"truncated or not a torch zip file: {file.file_bytes()} bytes, but {error}"
        ) from error
    if len({info.filename for info in records}) < len(records):
        raise ValueError("has two records of one name in its directory")
    return records


class _Machine:
    """An unpickler for dicts of tensors, which builds plain values and does nothing else."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def run(self, pickled: bytes) -> object:
        try:
            for count, (opcode, argument) in enumerate(_opcodes(pickled)):
                if count > _MAX_OPCODES:
                    raise ValueError(f"its pickle has more than {_MAX_OPCODES} opcodes")
                self._step(opcode, argument)
            return self._stack.pop()
        except (IndexError, KeyError) as error:
            raise ValueError("its pickle is damaged") from error

    def _step(self, opcode: str, argument: object) -> None:
        if opcode in _PUSHES:
            self._stack.append(_PUSHES[opcode])
        elif opcode in _PUSHES_ARGUMENT:
            self._stack.append(argument)
        elif opcode in _TUPLES:
            self._stack[-_TUPLES[opcode] :] = [tuple(self._stack[-_TUPLES[opcode] :])]
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif opcode not in ("PROTO", "STOP"):
            self._build(opcode, argument)

    def _build(self, opcode: str, argument: object) -> None:
        stack = self._stack
        match opcode:
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                self._mark()
            case "TUPLE":
                items = tuple(self._since_mark())
                self._stack.append(items)
            case "APPEND":
                item = stack.pop()
                self._extend([item])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._since_mark())
            case "GLOBAL":
                stack.append(_permitted(str(argument)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduced(function, arguments))
            case "BUILD":
                # The `_metadata` attribute of a module's state dict: of no use here.
                stack.pop()
            case _:
                raise ValueError(
                    f"its pickle uses the opcode {opcode}, which a dict of tensors does not need; "
                    "re-save it with torch.save"
                )

    def _mark(self) -> None:
        if len(self._marks) == _MAX_MARKS:
            raise ValueError(f"its pickle is nested more than {_MAX_MARKS} deep")
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise ValueError("its pickle is damaged: it appends to what is no list")
        target.extend(items)

    def _update(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its pickle is damaged: it sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # To hash a nested tuple can take for ever; ints of any length can be made to collide.
            if not isinstance(key, str) and not (isinstance(key, int) and key.bit_length() < 32):
                raise ValueError(f"a key of its dicts is a `{type(key).__name__}`, expected text")
            target[key] = value


def _opcodes(pickled: bytes) -> Iterator[tuple[str, object]]:
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            yield opcode.name, argument
    except ValueError as error:
        raise ValueError(f"its pickle is damaged: {error}") from error


def _permitted(name: str) -> _Global:
    if name not in _GLOBALS:
        shown = _shown(name.replace(" ", "."))
        raise ValueError(
            f"its pickle asks for `{shown}`, which is not allowed; nothing was executed"
        )
    return _Global(name)


def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Global(name), str(record), str(), int(numel)) if name in _STORAGES:
            if len(record) <= 64 and 0 <= numel < 1 << 63:
                return _Storage(f"data/{record}", _STORAGES[name], numel)
    raise ValueError("its pickle names a storage in a way that torch.save does not")


def _reduced(function: object, arguments: object) -> object:
    """The stand-in for what `function(*arguments)` would be."""
    match function, arguments:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case _Global(name), (_Tensor() as tensor, _, _) if name == _PARAMETER:
            return tensor
        case _Global(name), (_Storage() as storage, offset, shape, strides, _, _) if (
            name == _TENSOR
        ):
            return _tensor(storage, storage.dtype, offset, shape, strides)
        case (
            _Global(name),
            (_Storage() as storage, offset, shape, strides, _, _, _Global(dtype)),
        ) if name == _VIEWED_TENSOR and dtype in _VIEWED:
            return _tensor(storage, _VIEWED[dtype], offset, shape, strides)
    raise ValueError("its pickle builds a tensor in a way that this program does not know")


def _tensor(
    storage: _Storage, dtype: torch.dtype, offset: object, shape: object, strides: object
) -> _Tensor:
    lengths, steps, (start,) = _integers(shape), _integers(strides), _integers((offset,))
    if len(lengths) != len(steps):
        raise ValueError(f"a tensor has {len(lengths)} dims and {len(steps)} strides")
    return _Tensor(storage, dtype, start, lengths, steps)


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MAX_DIMS:
        raise ValueError(f"a tensor's shape is not a tuple of {_MAX_DIMS} dims at most")
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("a tensor's shape, strides and offset must be non-negative integers")
    return values


def _entries(value: object, archive: _Archive) -> dict[str, Entry]:
    if isinstance(value, dict) and len(value) == 1:
        (inner,) = value.values()
        value = inner if isinstance(inner, dict) else value
    if not isinstance(value, dict):
        raise ValueError(f"holds a `{type(value).__name__.strip('_')}`, expected a dict of tensors")
    tensors = {key: tensor for key, tensor in value.items() if isinstance(tensor, _Tensor)}
    records = {tensor.storage.record for tensor in tensors.values()}
    places = {record: archive.locate(record) for record in sorted(records)}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not key.isprintable():
            raise ValueError(f"the key `{_shown(str(key))}` of a tensor is not printable text")
        _check_extent(key, tensor, places[tensor.storage.record][1])
    return {
        key: Entry(
            places[tensor.storage.record][0] + tensor.offset * tensor.dtype.itemsize,
            tensor.dtype,
            tensor.shape,
            tensor.strides,
        )
        for key, tensor in tensors.items()
    }


def _check_extent(key: str, tensor: _Tensor, record_bytes: int) -> None:
    """A tensor lies inside its storage and has no more elements than it; a storage, its record."""
    storage = tensor.storage
    storage_bytes = storage.numel * storage.dtype.itemsize
    if storage_bytes > record_bytes:
        raise ValueError(
            f"tensor `{key}` has a storage of {storage_bytes} bytes, "
            f"but record `{_shown(storage.record)}` holds {record_bytes}"
        )
    numel = math.prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = sum((length - 1) * stride for length, stride in steps) if numel else -1
    # Without the second test an expanded tensor could claim more memory than any file has.
    if max(tensor.offset + last + 1, numel) * tensor.dtype.itemsize > storage_bytes:
        raise ValueError(
            f"tensor `{key}` has {_number(numel)} elements up to {_number(tensor.offset + last)}, "
            f"but its storage {storage_bytes // tensor.dtype.itemsize}"
        )


@dataclass(frozen=True, slots=True)
class _Record:
    header: int
    payload: int
    size: int
    crc: int


@dataclass(slots=True)
class _ZipWriter:
    """The bytes of an uncompressed zip around holes, which are skipped and not written."""

    position: int = 0
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    records: dict[str, _Record] = field(default_factory=dict)

    def add(self, name: str, payload: bytes) -> None:
        self._add_header(name, len(payload), zlib.crc32(payload))
        self._write(payload)

    def add_hole(self, name: str, size: int) -> None:
        self._add_header(name, size, crc=0)
        self.position += size

    def finish(self) -> dict[str, int]:
        """Write the directory; the offset of each record's entry in it."""
        start, fields = self.position, {}
        for name, record in self.records.items():
            fields[name] = self.position
            self._write(_directory_entry(name, record))
        self._write(_end_of_directory(len(self.records), start, self.position))
        return fields

    def _add_header(self, name: str, size: int, crc: int) -> None:
        path = f"archive/{name}".encode()
        extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _UINT32 else b""
        padding = -(self.position + 30 + len(path) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        common = _common_fields(size, crc, zip64=size >= _UINT32)
        header = b"PK\x03\x04" + common + struct.pack("<HH", len(path), len(extra)) + path + extra
        self.records[name] = _Record(self.position, self.position + len(header), size, crc)
        self._write(header)

    def _write(self, content: bytes) -> None:
        self.chunks.append((self.position, content))
        self.position += len(content)


def _common_fields(size: int, crc: int, *, zip64: bool) -> bytes:
    """What a record's header and its directory entry share: version needed up to both sizes."""
    version, utf8, stored, time, date = 45 if zip64 else 20, 0x0800, 0, 0, 0x0021  # 1980-01-01
    sizes = min(size, _UINT32)
    return struct.pack("<5H3I", version, utf8, stored, time, date, crc, sizes, sizes)


def _directory_entry(name: str, record: _Record) -> bytes:
    path = f"archive/{name}".encode()
    large = [record.size, record.size] if record.size >= _UINT32 else []
    large += [record.header] if record.header >= _UINT32 else []
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    common = _common_fields(record.size, record.crc, zip64=bool(large))
    lengths = struct.pack("<HHHHHI", len(path), len(extra), 0, 0, 0, 0)
    header = struct.pack("<I", min(record.header, _UINT32))
    return b"PK\x01\x02" + struct.pack("<H", 45) + common + lengths + header + path + extra


def _end_of_directory(count: int, start: int, stop: int) -> bytes:
    """The zip's last record, after its 64-bit twin and that one's locator where it overflows."""
    size = stop - start
    short = (min(count, _UINT16), min(count, _UINT16), min(size, _UINT32), min(start, _UINT32))
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *short, 0)
    if count < _UINT16 and size < _UINT32 and start < _UINT32:
        return end
    wide = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    return b"PK\x06\x06" + wide + b"PK\x06\x07" + struct.pack("<IQI", 0, stop, 1) + end


def _pickle(tensors: Sequence[TensorSpec]) -> bytes:
    """A protocol-2 pickle of the dict, the same bytes whatever the Python and the torch."""
    items = b"".join(
        _text(spec.key) + _rebuilt(number, spec) for number, spec in enumerate(tensors)
    )
    return b"\x80\x02}(" + items + b"u."


def _rebuilt(number: int, spec: TensorSpec) -> bytes:
    """The opcodes that call torch's function to rebuild one tensor from its storage."""
    numel = math.prod(spec.shape)
    function, storage, last = _TENSOR, _STORAGE_NAMES.get(spec.dtype), b""
    if spec.dtype in _VIEWED_NAMES:
        function, storage = _VIEWED_TENSOR, "torch.storage UntypedStorage"
        numel, last = numel * spec.dtype.itemsize, _name(_VIEWED_NAMES[spec.dtype])
    if storage is None:
        raise LayoutError(f"tensor `{spec.key}`: a torch file cannot hold {spec.dtype}")
    identity = _text("storage") + _name(storage) + _text(str(number)) + _text("cpu") + _int(numel)
    numbers = _int(0) + _ints(spec.shape) + _ints(_row_major(spec.shape))
    hooks = b"\x89" + _name(_ORDERED_DICT) + b")R"
    return _name(function) + b"((" + identity + b"tQ" + numbers + hooks + last + b"tR"


def _name(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def _number(value: int) -> str:
    """An integer from the file in a message: Python refuses to print thousands of digits."""
    return str(value) if value.bit_length() <= 256 else "more than 2^256"


def _shown(text: str) -> str:
    """Text from the file as it may appear in a one-line message."""
    return repr(text[:80])[1:-1]
