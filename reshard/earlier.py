"""What an earlier attempt has written, and need not be done again. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from reshard.buffers import Places
from reshard.casts import narrows
from reshard.journal import Table
from reshard.layout import StoredTensor
from reshard.moves import Move
from reshard.packing import packed


@dataclass(frozen=True, slots=True)
class Earlier:
    """The `runs` that are intact; `places` and `numbers` say where and in which file they lie."""

    runs: Table
    places: Places
    numbers: Mapping[str, int]

    def has(self, move: Move) -> bool:
        """Whether all of a move is written, and nothing of it has to be looked at.

        Copies are compared, and losses of a cast counted, over all that is moved.
        """
        wanted = move.pieces[0][1]
        if not len(self.runs) or wanted.slot.encoding is not None:
            return False
        if any(stored.copy or narrows(stored.dtype, wanted.dtype) for _, stored in move.reads):
            return False
        return all(self._written(piece) for _, piece in move.pieces)

    def _written(self, piece: StoredTensor) -> bool:
        offset, _ = self.places.locate(piece)
        number = self.numbers[piece.file]
        runs = packed(piece.slot.placement, piece.shard, piece.region).runs
        return all(
            self.runs.get(number, offset + piece.bytes_of(first)) is not None for first, _ in runs
        )
