"""The pickle of a DCP directory's `.metadata`: what its objects say.

    Metadata
      state_dict_metadata  {fqn: TensorStorageMetadata(properties, size, chunks) or
                                 BytesStorageMetadata()}
      planner_data         {fqn: (key, key or list index, ...)}, the path in the nested state dict
      storage_data         {MetadataIndex(fqn, offset, index): _StorageInfo(file, offset, length)}

Facts as in `torch/distributed/checkpoint/metadata.py` and `filesystem.py`. Nothing of torch is
called to read it; what it means, and whether it can be true, is up to `dcpmetadata`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from reshard.containers import shown
from reshard.containers.pickles import Built, Global, Machine
from reshard.containers.tensorpickle import DTYPES
from reshard.geometry import item_name

_PACKAGE = "torch.distributed.checkpoint"
_OLD_PACKAGE = "torch.distributed._shard.sharded_tensor.metadata"  # of torch 2.2 and before
_METADATA = f"{_PACKAGE}.metadata Metadata"
_TENSOR = f"{_PACKAGE}.metadata TensorStorageMetadata"
_BYTES = f"{_PACKAGE}.metadata BytesStorageMetadata"
_CHUNK = f"{_PACKAGE}.metadata ChunkStorageMetadata"
_INDEX = f"{_PACKAGE}.metadata MetadataIndex"
_STORED = f"{_PACKAGE}.filesystem _StorageInfo"
_PROPERTIES = {f"{_PACKAGE}.metadata TensorProperties", f"{_OLD_PACKAGE} TensorProperties"}
_CLASSES = {_METADATA, _TENSOR, _BYTES, _CHUNK, _INDEX, _STORED, *_PROPERTIES}
_CLASSES |= {f"{_PACKAGE}.metadata StorageMeta"}  # who saved it: of no use here
_ENUMS = {f"{_PACKAGE}.metadata _MEM_FORMAT_ENCODING", f"{_OLD_PACKAGE} MEM_FORMAT_ENCODING"}
_GETATTR = {"builtins getattr", "__builtin__ getattr"}  # how Python 3.11.0 to 3.11.3 pickle enums
_PATHS = {
    f"{module} {kind}"
    for module in ("pathlib", "pathlib._local")
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_DTYPE_NAMES = {
    f"torch {name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_NAMES = frozenset(
    {*_CLASSES, *_ENUMS, *_GETATTR, *_PATHS, *_DTYPE_NAMES}
    | {"torch Size", "torch.serialization _get_layout", "collections OrderedDict"}
)
_MAX_DIMS = 8
_MAX_LEVELS = 100
_MAX_NAME = 1024  # in characters: one text of a pickle may be named by each of its items


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item is stored, as the pickle has it: nothing is checked but the types."""

    file: str
    offset: int
    length: int
    transformed: bool


@dataclass(frozen=True, slots=True)
class Pickled:
    """One tensor, as the pickle has it: the (offsets, sizes) of its chunks, none negative."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(slots=True)
class Content:
    """All that is taken from a `.metadata`; `places` by `item_name` of fqn and offsets."""

    tensors: dict[str, Pickled] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


def read(pickled: bytes) -> Content:
    """What a `.metadata` says; ValueError for what torch does not write."""
    metadata = _fields(_Machine(pickled).run(), _METADATA)
    content, chunks = Content(), 0
    for key, described in _dict(metadata.get("state_dict_metadata"), "state_dict_metadata").items():
        fqn = _fqn(key)
        if isinstance(described, Built) and described.name == _BYTES:
            content.others.append(fqn)
            continue
        try:
            content.tensors[fqn] = _tensor(described)
        except ValueError as error:
            raise ValueError(f"tensor `{fqn}`: {error}") from error
        chunks += len(content.tensors[fqn].chunks)
        # One list of a pickle may be named by each of its tensors.
        if chunks > len(pickled):
            raise ValueError(f"has more than {len(pickled)} chunks in as many bytes")
    # Planners of others may put anything there; only a dict by fqn says something here.
    planned = metadata.get("planner_data")
    for fqn, path in planned.items() if isinstance(planned, dict) else ():
        if isinstance(fqn, str) and isinstance(path, tuple):
            content.paths[fqn] = _path(fqn, path)
    for index, stored in _dict(metadata.get("storage_data"), "storage_data").items():
        _add_place(content.places, index, stored)
    return content


class _Machine(Machine):
    subject = "DCP metadata"
    advice = "re-save the checkpoint with torch.distributed.checkpoint"
    names = _NAMES

    def reduced(self, function: object, arguments: object) -> object:
        if isinstance(function, Global) and isinstance(arguments, tuple):
            match function.name, arguments:
                case "torch Size", (tuple() | list() as sizes,):
                    return sizes
                case "torch.serialization _get_layout", (str() as layout,):
                    return layout
                case "collections OrderedDict", ():
                    return self.empty_dict()
                case name, _ if name in _PATHS or name in _ENUMS:
                    return None
                case name, (Global() as kind, str()) if name in _GETATTR and kind.name in _ENUMS:
                    return None
        raise self._foreign()

    def created(self, kind: object, arguments: object) -> object:
        if isinstance(kind, Global) and kind.name in _CLASSES:
            return super().created(kind, arguments)
        raise self._foreign()


def _fields(value: object, kind: str) -> dict[object, object]:
    """The attributes of a stand-in for an object of the class `kind`."""
    if isinstance(value, Built) and value.name == kind and isinstance(value.state, dict):
        return value.state
    raise ValueError(f"its pickle is damaged: what should be a `{kind.split()[1]}` is none")


def _dict(value: object, field_name: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise ValueError(f"its `{field_name}` is no dict")
    return value


def _fqn(key: object) -> str:
    if not isinstance(key, str) or not key.isprintable():
        name = shown(key) if isinstance(key, str) else type(key).__name__
        raise ValueError(f"the key `{name}` of a tensor is not printable text")
    if len(key) > _MAX_NAME:
        raise ValueError(f"the key `{shown(key)}...` of a tensor has {len(key)} characters")
    return key


def _tensor(described: object) -> Pickled:
    fields = _fields(described, _TENSOR)
    shape, chunks = _sizes(fields.get("size")), fields.get("chunks")
    if not isinstance(chunks, list):
        raise ValueError("its chunks are no list")
    return Pickled(_dtype(fields.get("properties")), shape, tuple(map(_chunk, chunks)))


def _dtype(properties: object) -> torch.dtype:
    if not isinstance(properties, Built) or properties.name not in _PROPERTIES:
        raise ValueError("its properties are no `TensorProperties`")
    match properties.state:
        case (Global(name), str(layout), _, _, _) if name in _DTYPE_NAMES:
            if layout != "torch.strided":
                raise ValueError(f"its layout is `{shown(layout)}`, expected `torch.strided`")
            if _DTYPE_NAMES[name] not in DTYPES:
                raise ValueError(f"has the dtype `{name.replace(' ', '.')}`, which is not known")
            return _DTYPE_NAMES[name]
    raise ValueError("its properties do not say dtype and layout")


def _chunk(chunk: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    fields = _fields(chunk, _CHUNK)
    return _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMS:
        raise ValueError(f"a size or an offset is not a tuple of {_MAX_DIMS} dims at most")
    for value in values:
        if type(value) is not int or value < 0 or value.bit_length() > 63:
            raise ValueError("sizes and offsets must be integers from 0 to 2^63 - 1")
    return tuple(values)


def _path(fqn: str, path: tuple[object, ...]) -> tuple[str | int, ...]:
    if len(path) > _MAX_LEVELS or not all(map(_is_key, path)):
        raise ValueError(f"the path of `{shown(fqn)}` in its `planner_data` is not of names")
    return path  # type: ignore[return-value]


def _is_key(key: object) -> bool:
    """Whether a value may stand in a path: an integer, or text that can be printed."""
    return isinstance(key, int) or (
        isinstance(key, str) and len(key) <= _MAX_NAME and key.isprintable()
    )


def _add_place(places: dict[str, Place], index: object, stored: object) -> None:
    """Note where an item is stored, if it is of a tensor: the others have no offset."""
    identity = _fields(index, _INDEX)
    fqn, offset = identity.get("fqn"), identity.get("offset")
    if offset is None or not isinstance(fqn, str):
        return
    if len(fqn) > _MAX_NAME:
        raise ValueError(f"the item `{shown(fqn)}...` has a name of {len(fqn)} characters")
    name = item_name(fqn, _sizes(offset))
    if name in places:
        raise ValueError(f"the item `{shown(name)}` appears twice in its `storage_data`")
    places[name] = _place(name, _fields(stored, _STORED))


def _place(name: str, fields: Mapping[object, object]) -> Place:
    file, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    transforms = fields.get("transform_descriptors") or ()
    if not isinstance(file, str) or type(offset) is not int or type(length) is not int:
        raise ValueError(f"the item `{shown(name)}` does not say file, offset and length")
    if not isinstance(transforms, (tuple, list)):
        raise ValueError(f"the item `{shown(name)}` has `transform_descriptors` that are no list")
    return Place(file, offset, length, bool(transforms))
