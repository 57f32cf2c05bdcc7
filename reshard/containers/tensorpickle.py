"""The `data.pkl` of a `.pth`: a pickled dict of tensors, each a view of a named storage.

Or, in an item of a DCP file, one pickled tensor without a dict. Pickles are run by
`reshard.containers.pickles`, which executes nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from reshard.containers import TensorSpec, shown
from reshard.containers.opcodes import START, STOP, integer, integers, named, text
from reshard.containers.pickles import Global, Machine
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
    "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
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
# Complex tensors (tables of rotary embeddings) are met in files to be read, and only there.
_STORAGE_NAMES = {
    dtype: name
    for name, dtype in _STORAGES.items()
    if "Untyped" not in name and not dtype.is_complex
}
_VIEWED_NAMES = {dtype: name for name, dtype in _VIEWED.items()}

DTYPES = frozenset({*_STORAGES.values(), *_VIEWED.values()})  # what can be read

_WEIGHTS = ("model", "state_dict", "model_state_dict")
_MAX_OTHERS = 100
# A tensor takes 35 opcodes. One that is not of what `bytes_per_byte` bounds takes 40 bytes.
_MAX_OPCODES = 3_000_000
_MAX_DIMS = 8
_MAX_NUMBER = (1 << 63) - 1


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


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of a pickled dict by key, and the keys of what else it holds, sorted."""

    tensors: Mapping[object, Tensor]
    others: tuple[str, ...]


def read(pickled: bytes) -> Held:
    """The tensors of a pickled dict, or of one dict inside it; ValueError where both have some.

    Of several such dicts, the one that is called as weights are is taken.
    """
    value = _Machine(pickled).run(_MAX_OPCODES)
    if not isinstance(value, dict):
        raise ValueError(f"holds a `{type(value).__name__.strip('_')}`, expected a dict of tensors")
    tensors, inner = _tensors_of(value), _dicts_of_tensors(value)
    if not tensors and inner:
        name = _weights(inner)
        return Held(_tensors_of(inner[name]), _names(key for key in value if key != name))
    if inner:
        raise ValueError(
            f"holds tensors both at the top and inside `{_names(inner)[0]}`; save the weights alone"
        )
    return Held(tensors, _names(key for key in value if key not in tensors))


def _tensors_of(held: Mapping[object, object]) -> dict[object, Tensor]:
    return {key: value for key, value in held.items() if isinstance(value, _Tensor)}


def _dicts_of_tensors(held: Mapping[object, object]) -> dict[object, dict[object, object]]:
    """The values that are dicts with tensors in them; each is looked at once, even if it recurs."""
    seen: dict[int, bool] = {}
    found = {}
    for key, value in held.items():
        if isinstance(value, dict):
            if id(value) not in seen:
                seen[id(value)] = any(isinstance(item, _Tensor) for item in value.values())
            if seen[id(value)]:
                found[key] = value
    return found


def _weights(inner: Mapping[object, object]) -> object:
    """The key of the dict that holds the weights."""
    named_so = list(inner) if len(inner) == 1 else [name for name in _WEIGHTS if name in inner]
    if len(named_so) != 1:
        names = ", ".join(f"`{name}`" for name in _names(inner)[:8])
        raise ValueError(
            f"holds {len(inner)} dicts of tensors, which are the weights? found {names}; "
            "save the weights alone"
        )
    return named_so[0]


def _names(keys: Iterable[object]) -> tuple[str, ...]:
    """Keys as they may appear in a message, sorted."""
    return tuple(sorted(shown(str(key)) for key in keys)[:_MAX_OTHERS])


def read_one(pickled: bytes) -> Tensor:
    """The tensor that a pickle is, a parameter's included."""
    value = _Machine(pickled).run(_MAX_OPCODES)
    if not isinstance(value, _Tensor):
        raise ValueError(f"holds a `{type(value).__name__.strip('_')}`, expected one tensor")
    return value


def write(tensors: Sequence[TensorSpec]) -> bytes:
    """A protocol-2 pickle of the dict, the same bytes whatever the Python and the torch."""
    items = b"".join(text(spec.key) + _rebuilt(number, spec) for number, spec in enumerate(tensors))
    return START + b"}(" + items + b"u" + STOP


def write_one(tensor: TensorSpec) -> bytes:
    """A protocol-2 pickle of the tensor alone, whose storage is the record `data/0`."""
    return START + _rebuilt(0, tensor) + STOP


def _rebuilt(number: int, spec: TensorSpec) -> bytes:
    """The opcodes that call torch's function to rebuild one tensor from its storage."""
    numel = math.prod(spec.shape)
    function, storage, last = _TENSOR, _STORAGE_NAMES.get(spec.dtype), b""
    if spec.dtype in _VIEWED_NAMES:
        function, storage = _VIEWED_TENSOR, "torch.storage UntypedStorage"
        numel, last = numel * spec.dtype.itemsize, named(_VIEWED_NAMES[spec.dtype])
    if storage is None:
        raise LayoutError(f"tensor `{spec.key}`: a torch file cannot hold {spec.dtype}")
    identity = text("storage") + named(storage) + text(str(number)) + text("cpu") + integer(numel)
    # Like torch, an empty dim counts as one.
    strides = row_major([max(size, 1) for size in spec.shape])
    numbers = integer(0) + integers(spec.shape) + integers(strides)
    hooks = b"\x89" + named(_ORDERED_DICT) + b")R"
    return named(function) + b"((" + identity + b"tQ" + numbers + hooks + last + b"tR"


class _Machine(Machine):
    """An unpickler of tensors, and of dicts of them."""

    subject = "a dict of tensors"
    advice = "re-save it with torch.save"
    names = _GLOBALS
    bytes_per_byte = 4  # torch.save needs 3

    def reduced(self, function: object, arguments: object) -> object:
        if function == Global(_ORDERED_DICT) and arguments == ():
            return self.empty_dict()
        return _reduced(function, arguments)

    def created(self, kind: object, arguments: object) -> object:
        raise ValueError(f"its pickle makes an object, which {self.subject} does not need")

    def built(self, made: object, state: object) -> None:
        """Drop the state: the `_metadata` attribute of a module's state dict, of no use here."""

    def persistent(self, identity: object) -> object:
        return _storage(identity)


def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", Global(name), str(record), str(), int(numel)) if name in _STORAGES:
            if len(record) <= 64 and 0 <= numel < 1 << 63:
                return _Storage(f"data/{record}", _STORAGES[name], numel)
    raise ValueError("its pickle names a storage in a way that torch.save does not")


def _reduced(function: object, arguments: object) -> object:
    """The stand-in for what `function(*arguments)` would be."""
    match function, arguments:
        case Global(name), (_Tensor() as tensor, _, _) if name == _PARAMETER:
            return tensor
        case Global(name), (_Storage() as storage, offset, shape, strides, _, _) if name == _TENSOR:
            return _tensor(storage, storage.dtype, offset, shape, strides)
        case (
            Global(name),
            (_Storage() as storage, offset, shape, strides, _, _, Global(dtype)),
        ) if name == _VIEWED_TENSOR and dtype in _VIEWED:
            return _tensor(storage, _VIEWED[dtype], offset, shape, strides)
    raise ValueError("its pickle builds a tensor in a way that this program does not know")


def _tensor(
    storage: _Storage, dtype: torch.dtype, offset: object, shape: object, strides: object
) -> _Tensor:
    lengths, steps, (start,) = _integers(shape), _integers(strides), _integers((offset,))
    if len(lengths) != len(steps):
        raise ValueError(f"a tensor has {len(lengths)} dims and {len(steps)} strides")
    # An empty dim would else hide the others, however large.
    if math.prod(max(length, 1) for length in lengths) > _MAX_NUMBER:
        raise ValueError("a tensor has more elements than any file")
    return _Tensor(storage, dtype, start, lengths, steps)


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MAX_DIMS:
        raise ValueError(f"a tensor's shape is not a tuple of {_MAX_DIMS} dims at most")
    if not all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in values):
        raise ValueError("a tensor's shape, strides and offset must be integers from 0 to 2^63")
    return values
