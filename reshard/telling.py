"""What ranks want to know of files on other machines' disks, and how those tell who see them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reshard import containers, storage
from reshard.containers import FileIndex
from reshard.encodings import stored_bytes
from reshard.errors import CheckpointError
from reshard.smallfiles import Meeting

# A scan may read tensors as small as this directly, such as the factors of rotary frequencies.
SMALL_TENSOR_BYTES = 4 << 10
ENTRY_BYTES = 200  # of an index, on its way
PIECE_BYTES, ROUND_BYTES = 1 << 20, 16 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Header:
    """Where the tensors of a file lie, and the offset and the bytes of each small one."""

    index: FileIndex
    small: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class HeaderOf:
    """The header of a file, by its relative path, as a container reads it."""

    file: str
    container: str

    def answer(self, root: Path) -> Header:
        """What a rank answers that sees the file below `root`."""
        found = containers.index(self.container, root, self.file)
        small = []
        for entry in found.entries.values():
            nbytes = stored_bytes(entry.shape, entry.dtype, entry.encoding)
            if nbytes <= SMALL_TENSOR_BYTES and 0 not in entry.shape:
                small.append(
                    (entry.offset, storage.read_bytes(root / self.file, entry.offset, nbytes))
                )
        plain = FileIndex(dict(found.entries), dict(found.metadata), found.others)
        return Header(plain, tuple(small))


@dataclass(frozen=True, slots=True)
class BytesOf:
    """Some bytes of a file."""

    file: str
    offset: int
    count: int

    def answer(self, root: Path) -> bytes:
        """What a rank answers that sees the file below `root`."""
        return storage.read_bytes(root / self.file, self.offset, self.count)


@dataclass(frozen=True, slots=True)
class ChecksumOf:
    """The CRC32 of some bytes of a file."""

    file: str
    offset: int
    length: int

    def answer(self, root: Path) -> int:
        """What a rank answers that sees the file below `root`."""
        return storage.crc32_of(root / self.file, self.offset, self.length)


Want = HeaderOf | BytesOf | ChecksumOf
Answer = Header | bytes | int | CheckpointError


def answers(
    wants: Iterable[Want], root: Path, most_bytes: int
) -> Iterator[list[tuple[Want, Answer]]]:
    """The answers of a rank that sees the files, in batches of about `most_bytes`.

    What is wrong with a file is an answer too, for whoever meant to read it.
    """
    batch: list[tuple[Want, Answer]] = []
    filled = 0
    for want in wants:
        try:
            found: Answer = want.answer(root)
        except CheckpointError as error:
            found = error
        batch.append((want, found))
        filled += _size(found)
        if filled >= most_bytes:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def _size(answer: Answer) -> int:
    """About how many bytes an answer takes."""
    if isinstance(answer, Header):
        return ENTRY_BYTES * (1 + len(answer.index.entries)) + sum(len(d) for _, d in answer.small)
    return len(answer) if isinstance(answer, bytes) else ENTRY_BYTES


def piece_bytes(world: int) -> int:
    """How much a rank tells at a time: all ranks together no more than fits memory well."""
    return min(PIECE_BYTES, ROUND_BYTES // world)


def spread(mine: Iterator[T], meeting: Meeting, take: Callable[[T], None]) -> None:
    """Have every rank `take` what each rank has to tell, a piece of each at a time."""
    while True:
        told = meeting.gather(meeting.together(lambda: next(mine, None)))
        found = [piece for piece in told if piece is not None]
        if not found:
            return
        for piece in found:
            take(piece)
        meeting.step()
