"""The `data.pkl` of a `.pth`: a pickled dict of tensors, each a view of a named storage.

A pickle can run code and exhaust memory, and Python's own unpickler allocates by numbers that it
reads and hashes whatever it is given. So `_Machine` interprets the few opcodes that a state dict
needs, and only ever builds plain values: there is nothing in it that could look up or call a name.
"""

import math
import pickletools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from reshard.containers import TensorSpec
from reshard.errors import LayoutError
from reshard.geometry import row_major

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

_MAX_OPCODES = 4_000_000
_MAX_MARKS = 100
_MAX_DIMS = 8

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


Tensor = _Tensor  # public by another name: error messages show the class's own


def read(pickled: bytes) -> dict[object, Tensor]:
    """The tensors of a pickled dict, or of the one dict inside it; other values are skipped."""
    value = _Machine().run(pickled)
    if isinstance(value, dict) and len(value) == 1:
        (inner,) = value.values()
        value = inner if isinstance(inner, dict) else value
    if not isinstance(value, dict):
        raise ValueError(f"holds a `{type(value).__name__.strip('_')}`, expected a dict of tensors")
    return {key: tensor for key, tensor in value.items() if isinstance(tensor, _Tensor)}


def write(tensors: Sequence[TensorSpec]) -> bytes:
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
    # Like torch, an empty dim counts as one.
    strides = row_major([max(size, 1) for size in spec.shape])
    numbers = _int(0) + _ints(spec.shape) + _ints(strides)
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


def shown(text: str) -> str:
    """Text from the file as it may appear in a one-line message."""
    return repr(text[:80])[1:-1]


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
        asked = shown(name.replace(" ", "."))
        raise ValueError(
            f"its pickle asks for `{asked}`, which is not allowed; nothing was executed"
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
