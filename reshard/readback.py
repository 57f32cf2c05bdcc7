"""Reading back what was written: spans of files against their checksums, by all ranks at once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from isal import isal_zlib

from reshard.distributed import Ranks
from reshard.errors import CheckpointError, StorageError
from reshard.manifest import Span
from reshard.progress import Progress
from reshard.storage import crc32_of

# Long spans are cut, so that ranks and threads share a file of one tensor too.
PIECE_BYTES = 32 << 20
# A second thread per rank reads while the first computes; further ones gained nothing.
THREADS = 2
BATCH = 64


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the span of that number."""

    span: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Read:
    """What reading a piece gave: its CRC32, or the reason why there is none."""

    piece: _Piece
    crc: int
    reason: str = ""


def differing(root: Path, spans: Sequence[Span], ranks: Ranks) -> list[Span]:
    """The spans below `root` that do not have their checksum, in the order given; all ranks agree.

    Every byte is read, dealt out evenly over the ranks. A span that cannot be read differs too.
    """
    ranks.phase("verify")
    own, cut = _read_share(root, spans, ranks)
    wrong = {number: reason for part in ranks.gather(own) for number, reason in part.items()}
    wrong |= _joined(spans, [read for part in ranks.gather(cut) for read in part])
    return [replace(spans[number], reason=wrong[number]) for number in sorted(wrong)]


def _read_share(
    root: Path, spans: Sequence[Span], ranks: Ranks
) -> tuple[dict[int, str], list[_Read]]:
    """Of this rank's pieces: the whole spans that differ, and all that are part of a longer one."""
    wrong: dict[int, str] = {}
    cut: list[_Read] = []
    pieces = _share(spans, ranks.rank, ranks.world)

    size = sum(span.length for span in spans) // ranks.world

    def read(piece: _Piece) -> _Read:
        try:
            path = root / spans[piece.span].file
            return _Read(piece, crc32_of(path, piece.start, piece.length))
        except (CheckpointError, StorageError) as error:
            return _Read(piece, 0, str(error))

    shown = Progress(size, ranks.rank == 0, ranks.step, "reading back")
    with ThreadPoolExecutor(THREADS) as threads, shown as progress:
        while batch := list(islice(pieces, BATCH)):
            for found in threads.map(read, batch):
                progress.add(found.piece.length)
                span = spans[found.piece.span]
                if found.piece.length < span.length:
                    cut.append(found)
                elif found.reason or found.crc != span.crc:
                    wrong[found.piece.span] = found.reason
    return wrong, cut


def _share(spans: Sequence[Span], rank: int, world: int) -> Iterator[_Piece]:
    """The pieces of one rank: those whose middle lies in its part of all bytes."""
    total, position = sum(span.length for span in spans), 0
    for number, span in enumerate(spans):
        for start in range(0, span.length, PIECE_BYTES):
            length = min(PIECE_BYTES, span.length - start)
            if (2 * position + length) * world // (2 * total) == rank:
                yield _Piece(number, span.start + start, length)
            position += length


def _joined(spans: Sequence[Span], reads: Sequence[_Read]) -> dict[int, str]:
    """Of the spans that were read in pieces, those that differ, with the first reason if any."""
    crcs: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for read in sorted(reads, key=lambda read: (read.piece.span, read.piece.start)):
        number, piece = read.piece.span, read.piece
        crcs[number] = isal_zlib.crc32_combine(crcs.get(number, 0), read.crc, piece.length)
        if read.reason:
            reasons.setdefault(number, read.reason)
    return {
        number: reasons.get(number, "")
        for number, crc in crcs.items()
        if number in reasons or crc != spans[number].crc
    }
