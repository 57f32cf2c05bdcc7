"""Which pieces are written: append-only records, one journal per rank and attempt.

A record (file, offset, length, CRC32) says that these bytes were handed to the file system with
this checksum. It is believed only after the bytes were read back: a resumed run does so before it
skips a piece.
"""

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from reshard.storage import Log, read_steps

RECORD = struct.Struct("<IQQI")
CHECK = struct.Struct("<I")
SIZE = RECORD.size + CHECK.size
READ_RECORDS = 4096
FIELDS = (("file", "I"), ("offset", "q"), ("length", "q"), ("crc", "I"))
PACKED = np.dtype([*FIELDS, ("check", "I")]).newbyteorder("<")


@dataclass(frozen=True, slots=True)
class Record:
    """A run of bytes of one piece in the `file`-th target file."""

    file: int
    offset: int
    length: int
    crc: int


class Journal:
    """The journal that one rank appends to."""

    def __init__(self, directory: Path, attempt: int, rank: int) -> None:
        self._log = Log(directory / f"journal-{attempt:04d}-{rank:06d}")

    def append(self, records: Iterable[Record]) -> None:
        """Add records in one write."""
        data = bytearray()
        for record in records:
            body = RECORD.pack(record.file, record.offset, record.length, record.crc)
            data += body + CHECK.pack(isal_zlib.crc32(body))
        self._log.append(data)

    def sync(self) -> None:
        """Bring the records to the disk."""
        self._log.sync()

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def journals(directory: Path) -> list[Path]:
    """All journals, older attempts first."""
    return sorted(directory.glob("journal-*"))


def next_attempt(directory: Path) -> int:
    """A number above those of all journals that are there."""
    return max((int(path.name.split("-")[1]) for path in journals(directory)), default=0) + 1


def read(directory: Path) -> Iterator[Record]:
    """Every record, older attempts first; a torn or damaged tail of a journal is ignored."""
    for path in journals(directory):
        for data in _believed(path):
            for start in range(0, len(data), SIZE):
                yield Record(*RECORD.unpack_from(data, start))


def _believed(path: Path) -> Iterator[bytes]:
    """The records of one journal that have their own checksum, many at a time, up to damage."""
    for data in read_steps(path, SIZE * READ_RECORDS):
        whole = (data[start : start + SIZE] for start in range(0, len(data) - SIZE + 1, SIZE))
        good = b"".join(item for item in whole if _proves_itself(item))
        yield good
        if len(good) < len(data):
            break


def _proves_itself(item: bytes) -> bool:
    """Whether a record has its own checksum."""
    found: int = CHECK.unpack_from(item, RECORD.size)[0]
    return found == isal_zlib.crc32(item[: RECORD.size])


class Table:
    """Records by file and offset, the latest of each, in 24 bytes per record."""

    def __init__(self, columns: Sequence[npt.NDArray[Any]]) -> None:
        self._columns = list(columns)
        self._files, self._offsets, self._lengths, self._crcs = (c.data for c in columns)

    @classmethod
    def empty(cls) -> "Table":
        """No records."""
        return cls([np.empty(0, code) for _, code in FIELDS])

    @classmethod
    def read(
        cls, directory: Path, on_step: Callable[[], None], files: Sequence[int] | None = None
    ) -> "Table":
        """The records of all journals, or those of the files of some numbers."""
        arrays = [array(code) for _, code in FIELDS]
        for path in journals(directory):
            for data in _believed(path):
                on_step()
                records = np.frombuffer(data, PACKED) if data else np.empty(0, PACKED)
                if files is not None:
                    records = records[np.isin(records["file"], files)]
                for (name, code), column in zip(FIELDS, arrays, strict=True):
                    column.frombytes(records[name].astype(code).tobytes())
        return cls(_latest([np.asarray(column) for column in arrays]))

    def __len__(self) -> int:
        return len(self._files)

    def get(self, file: int, offset: int) -> int | None:
        """The CRC32 of the run that begins at `offset` of `file`."""
        first, last = self._span(file)
        place = bisect_left(self._offsets, offset, first, last)
        return self._crcs[place] if place < last and self._offsets[place] == offset else None

    def of_file(self, file: int) -> Iterator[Record]:
        """The records of one file, in the order of their offsets."""
        return map(self._record, range(*self._span(file)))

    def digest(self) -> str:
        """What tells this table from others."""
        crc = 0
        for column in self._columns:
            crc = isal_zlib.crc32(column.tobytes(), crc)
        return f"{len(self)} {crc}"

    def check(self, intact: Callable[[Record], bool], rank: int, world: int) -> bytes:
        """Which of every `world`-th record from `rank` on are `intact`, one bit each."""
        share = range(rank, len(self), world)
        flags = np.fromiter((intact(self._record(place)) for place in share), bool, len(share))
        return np.packbits(flags).tobytes()

    def kept(self, checked: Sequence[bytes]) -> "Table":
        """The records that `check` found intact, given what it returned by rank."""
        mask, world = np.zeros(len(self), bool), len(checked)
        for rank, bits in enumerate(checked):
            share = mask[rank::world]
            share[:] = np.unpackbits(np.frombuffer(bytearray(bits), np.uint8), count=len(share))
        return Table([column[mask] for column in self._columns])

    def _span(self, file: int) -> tuple[int, int]:
        return bisect_left(self._files, file), bisect_right(self._files, file)

    def _record(self, place: int) -> Record:
        return Record(
            self._files[place], self._offsets[place], self._lengths[place], self._crcs[place]
        )


def _latest(columns: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Columns sorted by file and offset, the last of equals kept; they are replaced one by one."""
    order = np.lexsort((columns[1], columns[0]))
    files, offsets = (column[order] for column in columns[:2])
    last = np.ones(len(order), bool)
    last[:-1] = (files[1:] != files[:-1]) | (offsets[1:] != offsets[:-1])
    del files, offsets
    order = order[last]
    for place, column in enumerate(columns):
        columns[place] = column[order]
    return columns
