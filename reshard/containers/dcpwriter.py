"""Writing the `.metadata` of a DCP directory, without an object of torch and in constant memory.

Only class names, dtypes and field names are memoised, so that the pickle may be as long as it needs
to be; `reshard.containers.dcppickle` says what it holds.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from reshard.containers.opcodes import START, STOP, integer, integers, named, text
from reshard.geometry import Region

_BLOCK_BYTES = 64 << 10
_PACKAGE = "torch.distributed.checkpoint"
_VERSION = "1.0.0"  # torch/distributed/checkpoint/state_dict_saver.py: CURRENT_DCP_VERSION


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor that is stored as `boxes`; `path` is where it was in the nested state dict."""

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: tuple[str | int, ...]
    boxes: Sequence[Region]


@dataclass(frozen=True, slots=True)
class Item:
    """Where the box of `fqn` at `start`, the `index`-th of its boxes, is stored, in bytes."""

    fqn: str
    start: tuple[int, ...]
    index: int
    file: str
    offset: int
    length: int


def write(tensors: Sequence[Described], items: Iterable[Item]) -> Iterator[bytes]:
    """The bytes of a `.metadata`, about 64 KiB at a time; they depend on the arguments alone."""
    block = bytearray()
    for piece in _Writer().metadata(tensors, items):
        if len(block) + len(piece) > _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
        block += piece
    yield bytes(block)


class _Writer:
    """Opcodes, with a memo for those that recur and are few."""

    def __init__(self) -> None:
        self._memo: dict[bytes, int] = {}

    def metadata(self, tensors: Sequence[Described], items: Iterable[Item]) -> Iterator[bytes]:
        yield START + self._new("metadata Metadata") + b"}"
        yield self._word("state_dict_metadata") + b"}"
        for tensor in tensors:
            yield text(tensor.fqn) + self._new("metadata TensorStorageMetadata") + b"}("
            yield self._word("properties") + self._properties(tensor.dtype)
            yield self._word("size") + self._size(tensor.shape)
            yield self._word("chunks") + b"]"
            for box in tensor.boxes:
                yield self._chunk(box) + b"a"
            yield b"ubs"
        yield b"s" + self._word("planner_data") + b"}"
        for tensor in tensors:
            path = (text(key) if isinstance(key, str) else integer(key) for key in tensor.path)
            yield text(tensor.fqn) + b"(" + b"".join(path) + b"ts"
        yield b"s" + self._word("storage_data") + b"}"
        for item in items:
            yield self._index(item) + self._stored(item) + b"s"
        yield b"s" + self._word("storage_meta") + b"Ns"
        yield self._word("version") + text(_VERSION) + b"sb" + STOP

    def _constant(self, opcodes: bytes) -> bytes:
        """Opcodes that push always the same value: in full once, then from the memo."""
        if opcodes in self._memo:
            return b"h%c" % self._memo[opcodes]
        self._memo[opcodes] = len(self._memo)
        return opcodes + b"q%c" % self._memo[opcodes]

    def _word(self, word: str) -> bytes:
        return self._constant(text(word))

    def _named(self, name: str) -> bytes:
        return self._constant(named(name))

    def _new(self, name: str) -> bytes:
        """An object of a class of torch.distributed.checkpoint, as yet without its state."""
        return self._named(f"{_PACKAGE}.{name}") + b")\x81"

    def _properties(self, dtype: torch.dtype) -> bytes:
        """TensorProperties: dtype, layout, requires_grad, memory format, pin_memory."""
        layout = self._named("torch.serialization _get_layout") + text("torch.strided") + b"\x85R"
        contiguous = self._named(f"{_PACKAGE}.metadata _MEM_FORMAT_ENCODING") + b"K\0\x85R"
        state = self._named(str(dtype).replace(".", " ")) + layout + b"\x89" + contiguous + b"\x89"
        return self._new("metadata TensorProperties") + b"(" + state + b"tb"

    def _size(self, sizes: Sequence[int]) -> bytes:
        return self._named("torch Size") + integers(sizes) + b"\x85R"

    def _chunk(self, box: Region) -> bytes:
        offsets = self._word("offsets") + self._size(box.start)
        sizes = self._word("sizes") + self._size(box.shape)
        return self._new("metadata ChunkStorageMetadata") + b"}(" + offsets + sizes + b"ub"

    def _index(self, item: Item) -> bytes:
        fqn = self._word("fqn") + text(item.fqn)
        offset = self._word("offset") + self._size(item.start)
        index = self._word("index") + integer(item.index)
        return self._new("metadata MetadataIndex") + b"}(" + fqn + offset + index + b"ub"

    def _stored(self, item: Item) -> bytes:
        file = self._word("relative_path") + text(item.file)
        offset = self._word("offset") + integer(item.offset)
        length = self._word("length") + integer(item.length)
        return self._new("filesystem _StorageInfo") + b"}(" + file + offset + length + b"ub"
