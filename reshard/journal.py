"""Which pieces are written: append-only records, one journal per rank and attempt.

A record (file, offset, length, CRC32) says that these bytes were handed to the file system with
this checksum. It is believed only after the bytes were read back: a resumed run does so before it
skips a piece.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from isal import isal_zlib

from reshard.storage import explained

RECORD = struct.Struct("<IQQI")
CHECK = struct.Struct("<I")
SIZE = RECORD.size + CHECK.size
READ_RECORDS = 4096


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
        self._path = directory / f"journal-{attempt:04d}-{rank:06d}"
        with explained("create", self._path):
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  # closed by close()

    def append(self, records: Iterable[Record]) -> None:
        """Add records in one write."""
        data = bytearray()
        for record in records:
            body = RECORD.pack(record.file, record.offset, record.length, record.crc)
            data += body + CHECK.pack(isal_zlib.crc32(body))
        rest = memoryview(data)
        with explained("write", self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        with explained("read", path), open(path, "rb") as file:
            while data := file.read(SIZE * READ_RECORDS):
                whole = [
                    data[start : start + SIZE] for start in range(0, len(data) - SIZE + 1, SIZE)
                ]
                good = [
                    item
                    for item in whole
                    if CHECK.unpack(item[RECORD.size :])[0] == isal_zlib.crc32(item[: RECORD.size])
                ]
                yield from (Record(*RECORD.unpack(item[: RECORD.size])) for item in good)
                if len(good) * SIZE < len(data):
                    break
