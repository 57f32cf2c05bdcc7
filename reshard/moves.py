"""What happens to one block of a parameter: who reads it, who writes it, and what crosses. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from reshard.geometry import Region, disjoint
from reshard.layout import StoredTensor


@dataclass(frozen=True, slots=True)
class Block:
    """Whole rows of one parameter, of whose blocks it is the `index`-th."""

    parameter: str
    region: Region
    index: int


@dataclass(frozen=True, slots=True)
class Message:
    """A box that `reader` holds in `stored`, and `writer` needs.

    It travels in `dtype`, the narrower one of both ends.
    """

    reader: int
    writer: int
    region: Region
    stored: StoredTensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.region.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Move:
    """All that happens to one block: which ranks read and write, and what crosses between them.

    `ties` is the number of ways to choose between ranks that could write a piece equally well.
    """

    block: Block
    reads: tuple[tuple[int, StoredTensor], ...]
    pieces: tuple[tuple[int, StoredTensor], ...]
    messages: tuple[Message, ...]
    ties: int = 1


@dataclass(slots=True)
class Load:
    """Bytes of one rank."""

    read: int = 0
    sent: int = 0
    received: int = 0
    written: int = 0

    def add(self, other: "Load", count: int = 1) -> None:
        """Count `other` in, `count` times."""
        self.read += other.read * count
        self.sent += other.sent * count
        self.received += other.received * count
        self.written += other.written * count


def messages(
    reads: Sequence[tuple[int, StoredTensor]], pieces: Sequence[tuple[int, StoredTensor]]
) -> Iterator[Message]:
    """What each writer needs of what other ranks read, each element once."""
    for writer in dict.fromkeys(rank for rank, _ in pieces):
        foreign = [(rank, stored) for rank, stored in reads if rank != writer and stored.copy == 0]
        target = next(piece.dtype for rank, piece in pieces if rank == writer)
        for box in written_by(writer, pieces) if foreign else ():
            for reader, stored in foreign:
                common = stored.region & box
                if common is not None:
                    narrower = min(stored.dtype, target, key=lambda dtype: dtype.itemsize)
                    yield Message(reader, writer, common, stored, narrower)


def written_by(writer: int, pieces: Sequence[tuple[int, StoredTensor]]) -> list[Region]:
    """Boxes that cover all that a rank writes of a block, each element once."""
    own = [piece for rank, piece in pieces if rank == writer]
    further = [piece.region for piece in own if piece.copy]
    return disjoint(further, [piece.region for piece in own if not piece.copy])


def loads_of(move: Move, align: int | None = None) -> dict[int, Load]:
    """The bytes that one move puts on each rank it concerns.

    Those that the files and the wire carry; with `align`, the room that they take in buffers, each
    part rounded up to it.
    """
    loads: dict[int, Load] = {}

    def size(stored: StoredTensor) -> int:
        return stored.nbytes if align is None else up(stored.room)

    def up(nbytes: int) -> int:
        return nbytes if align is None else -(-nbytes // align) * align

    for rank, stored in move.reads:
        loads.setdefault(rank, Load()).read += size(stored)
    for rank, piece in move.pieces:
        loads.setdefault(rank, Load()).written += size(piece)
    for message in move.messages:
        nbytes = up(message.nbytes)
        loads.setdefault(message.reader, Load()).sent += nbytes
        loads.setdefault(message.writer, Load()).received += nbytes
    return loads
