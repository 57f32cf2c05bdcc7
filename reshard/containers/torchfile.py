"""The bytes of a `.pth`: a torch zip with one pickle, which names the storages beside it.

    {key: (which record, offset, shape, strides), ...}

The zip is read and written by `reshard.containers.torchzip`, the pickle by
`reshard.containers.tensorpickle`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from reshard.containers import (
    Entry,
    FileIndex,
    Skeleton,
    TensorSpec,
    is_key,
    opened,
    shown,
    tensorpickle,
    torchzip,
)
from reshard.containers.tensorpickle import Tensor
from reshard.containers.torchzip import Archive, Range
from reshard.errors import CheckpointError


def index(root: Path, file: str) -> FileIndex:
    """Where each tensor of an existing file lies, views and shared storages included.

    The file holds a dict of tensors, or such a dict inside a dict (see `tensorpickle`); what else
    that holds is named in `others`. Nothing in the file is executed, whatever it asks for.
    """
    try:
        with opened(root / file) as content:
            archive = Archive(Range(content))
            held = tensorpickle.read(archive.read("data.pkl"))
            return FileIndex(_entries(held.tensors, archive), {}, held.others)
    except OSError as error:
        raise CheckpointError(f"`{root / file}`: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"`{root / file}`: {error}") from error


def skeleton(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Skeleton:
    """A file as torch.save would write it, with one storage per tensor in the given order.

    `metadata` has no place in a .pth and is not stored.
    """
    storages = {spec.key: math.prod(spec.shape) * spec.dtype.itemsize for spec in tensors}
    return torchzip.lay_out(tensorpickle.write(tensors), storages, "\n".join(storages))


def _entries(tensors: Mapping[object, Tensor], archive: Archive) -> dict[str, Entry]:
    records = {tensor.storage.record for tensor in tensors.values()}
    places = {record: archive.locate(record) for record in sorted(records)}
    entries: dict[str, Entry] = {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not is_key(key):
            raise ValueError(f"the key `{shown(str(key))}` of a tensor is not printable text")
        start, record_bytes = places[tensor.storage.record]
        try:
            check_extent(tensor, record_bytes)
        except ValueError as error:
            raise ValueError(f"tensor `{key}` {error}") from error
        start += tensor.offset * tensor.dtype.itemsize
        entries[key] = Entry(start, tensor.dtype, tensor.shape, tensor.strides)
    return entries


def check_extent(tensor: Tensor, record_bytes: int) -> None:
    """Require that a tensor lies inside its storage, and that one in its record (ValueError)."""
    storage = tensor.storage
    storage_bytes = storage.numel * storage.dtype.itemsize
    if storage_bytes > record_bytes:
        raise ValueError(
            f"has a storage of {storage_bytes} bytes, "
            f"but record `{shown(storage.record)}` holds {record_bytes}"
        )
    numel = math.prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = sum((length - 1) * stride for length, stride in steps) if numel else -1
    # Without the second test an expanded tensor could claim more memory than any file has.
    if max(tensor.offset + last + 1, numel) * tensor.dtype.itemsize > storage_bytes:
        raise ValueError(
            f"has {numel} elements up to {tensor.offset + last}, "
            f"but its storage {storage_bytes // tensor.dtype.itemsize}"
        )
