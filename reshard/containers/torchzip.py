"""The zip around a torch pickle: uncompressed records, the storages 64-byte aligned.

    archive/data.pkl      what the records hold, as a pickle
    archive/byteorder, .storage_alignment, version, .data/serialization_id
    archive/data/0, ...   the storages: raw elements, aligned by padding their headers

A `.pth` is one such zip, a DCP file many of them, one behind the other.
"""

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from reshard.containers import Skeleton, shown

_MAX_PICKLE_BYTES = 32 << 20  # 90,000 tensors, for which the opcodes suffice, take 20 MB
_MAX_DIRECTORY_BYTES = 16 << 20  # zipfile takes 12 times this; 200,000 tensors fit
_ALIGNMENT = 64
_UINT32 = 0xFFFFFFFF  # in a 32-bit field: look in the zip64 extra field
_UINT16 = 0xFFFF


class Range:
    """`length` bytes of an open file from `start` on, as a file of their own.

    Refuses reads of a size which only a hostile file would ask for (ValueError).
    """

    limit = _MAX_DIRECTORY_BYTES

    def __init__(self, file: BinaryIO, start: int = 0, length: int | None = None) -> None:
        self._descriptor = file.fileno()
        self._start = start
        self.length = os.fstat(self._descriptor).st_size - start if length is None else length
        self._position = 0

    def tell(self) -> int:
        """The position in the range."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position and return it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, all that are left where it is negative."""
        rest = max(0, self.length - self._position)
        wanted = rest if size < 0 else min(size, rest)
        if wanted > self.limit:
            raise ValueError(f"one part takes {wanted} bytes, expected at most {self.limit}")
        content = os.pread(self._descriptor, wanted, self._start + self._position)
        self._position += len(content)
        return content


class Archive:
    """The records of a zip that is read; they are named without their common prefix.

    Every method raises ValueError where the zip is not what torch.save writes.
    """

    def __init__(self, file: Range) -> None:
        self._file = file
        file.limit = _MAX_DIRECTORY_BYTES
        self._records = {info.filename: info for info in _directory(file)}
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        pickles = [name for name in pickles if name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(f"holds {len(pickles)} `*/data.pkl`, expected 1, as torch.save writes")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self.holds("byteorder") and self.read("byteorder") != b"little":
            raise ValueError("is not little-endian; re-save it on a little-endian machine")
        file.limit = _MAX_PICKLE_BYTES

    def holds(self, name: str) -> bool:
        """Whether there is such a record."""
        return self._prefix + name in self._records

    def read(self, name: str) -> bytes:
        """The bytes of a record, whose CRC32 is checked."""
        start, size = self.locate(name)
        self._file.seek(start)
        payload = self._file.read(size)
        expected = self._records[self._prefix + name].CRC
        # torch.serialization.set_crc32_options(False) writes 0 for every record.
        if expected and expected != zlib.crc32(payload):
            raise ValueError(
                f"record `{name}` is damaged: CRC32 {zlib.crc32(payload):08x}, "
                f"expected {expected:08x}"
            )
        return payload

    def locate(self, name: str) -> tuple[int, int]:
        """The (offset, size) in bytes of a record's payload, which lies inside the file."""
        if not self.holds(name):
            raise ValueError(f"has no record `{shown(name)}`, which its pickle names")
        info = self._records[self._prefix + name]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"record `{shown(name)}` is compressed; re-save it with torch.save")
        if not 0 <= info.header_offset < self._file.length:
            raise ValueError(
                f"truncated: {self._file.length} bytes, "
                f"record `{shown(name)}` starts at {info.header_offset}"
            )
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ValueError(f"record `{shown(name)}` has no header at {info.header_offset}")
        # The extra field's length differs from the one in the directory: torch pads here alone.
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + info.file_size > self._file.length:
            raise ValueError(
                f"truncated: {self._file.length} bytes, "
                f"record `{shown(name)}` ends at {start + info.file_size}"
            )
        return start, info.file_size


def _directory(file: Range) -> list[zipfile.ZipInfo]:
    magic = file.read(4)
    if magic.startswith(b"\x80\x02"):
        raise ValueError("is a legacy torch file, not a zip; load it and re-save with torch.save")
    if magic != b"PK\x03\x04":
        raise ValueError("is not a torch zip file; re-save it with torch.save")
    try:
        records = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(
            f"truncated or not a torch zip file: {file.length} bytes, but {error}"
        ) from error
    if len({info.filename for info in records}) < len(records):
        raise ValueError("has two records of one name in its directory")
    _require_apart(records, file.length)
    return records


def _require_apart(records: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Refuse records that share bytes: a file could name any amount of data many times over."""
    position, before = 0, ""
    for info in sorted(records, key=lambda info: info.header_offset):
        if info.header_offset < position:
            names = shown(before), shown(info.filename)
            raise ValueError(f"its records `{names[0]}` and `{names[1]}` overlap")
        position, before = info.header_offset + 30 + info.compress_size, info.filename
        if position > file_bytes:
            raise ValueError(
                f"truncated: {file_bytes} bytes, but `{shown(before)}` ends at {position}"
            )


def lay_out(pickled: bytes, storages: Mapping[str, int], names: str) -> Skeleton:
    """A zip as torch.save would write it: `pickled`, then for each key a storage of some bytes.

    Sizes and CRC32s stand in the records' headers, without data descriptors, and the record
    `.format_version` is left out: torch may compute the offsets of files that have it from its own
    writer's layout. `names` is what, beside the pickle, makes the zip's id.
    """
    writer = _ZipWriter()
    writer.add("data.pkl", pickled)
    writer.add("byteorder", b"little")
    writer.add(".storage_alignment", b"%d" % _ALIGNMENT)
    for number, size in enumerate(storages.values()):
        writer.add_hole(f"data/{number}", size)
    writer.add("version", b"3\n")
    identity = zlib.crc32(names.encode()), zlib.crc32(pickled)
    writer.add(".data/serialization_id", b"%020d%020d" % identity)
    fields = writer.finish()
    holes = {key: f"data/{number}" for number, key in enumerate(storages)}
    return Skeleton(
        writer.position,
        tuple(writer.chunks),
        {key: writer.records[name].payload for key, name in holes.items()},
        {key: (writer.records[name].header + 14, fields[name] + 16) for key, name in holes.items()},
    )


@dataclass(frozen=True, slots=True)
class _Record:
    header: int
    payload: int
    size: int
    crc: int


@dataclass(slots=True)
class _ZipWriter:
    """The bytes of an uncompressed zip around holes, which are skipped and not written."""

    position: int = 0
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    records: dict[str, _Record] = field(default_factory=dict)

    def add(self, name: str, payload: bytes) -> None:
        self._add_header(name, len(payload), zlib.crc32(payload))
        self._write(payload)

    def add_hole(self, name: str, size: int) -> None:
        self._add_header(name, size, crc=0)
        self.position += size

    def finish(self) -> dict[str, int]:
        """Write the directory; the offset of each record's entry in it."""
        start, fields = self.position, {}
        for name, record in self.records.items():
            fields[name] = self.position
            self._write(_directory_entry(name, record))
        self._write(_end_of_directory(len(self.records), start, self.position))
        return fields

    def _add_header(self, name: str, size: int, crc: int) -> None:
        path = f"archive/{name}".encode()
        extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _UINT32 else b""
        padding = -(self.position + 30 + len(path) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        common = _common_fields(size, crc, zip64=size >= _UINT32)
        header = b"PK\x03\x04" + common + struct.pack("<HH", len(path), len(extra)) + path + extra
        self.records[name] = _Record(self.position, self.position + len(header), size, crc)
        self._write(header)

    def _write(self, content: bytes) -> None:
        self.chunks.append((self.position, content))
        self.position += len(content)


def _common_fields(size: int, crc: int, *, zip64: bool) -> bytes:
    """What a record's header and its directory entry share: version needed up to both sizes."""
    version, utf8, stored, time, date = 45 if zip64 else 20, 0x0800, 0, 0, 0x0021  # 1980-01-01
    sizes = min(size, _UINT32)
    return struct.pack("<5H3I", version, utf8, stored, time, date, crc, sizes, sizes)


def _directory_entry(name: str, record: _Record) -> bytes:
    path = f"archive/{name}".encode()
    large = [record.size, record.size] if record.size >= _UINT32 else []
    large += [record.header] if record.header >= _UINT32 else []
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    common = _common_fields(record.size, record.crc, zip64=bool(large))
    lengths = struct.pack("<HHHHHI", len(path), len(extra), 0, 0, 0, 0)
    header = struct.pack("<I", min(record.header, _UINT32))
    return b"PK\x01\x02" + struct.pack("<H", 45) + common + lengths + header + path + extra


def _end_of_directory(count: int, start: int, stop: int) -> bytes:
    """The zip's last record, after its 64-bit twin and that one's locator where it overflows."""
    size = stop - start
    short = (min(count, _UINT16), min(count, _UINT16), min(size, _UINT32), min(start, _UINT32))
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *short, 0)
    if count < _UINT16 and size < _UINT32 and start < _UINT32:
        return end
    wide = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    return b"PK\x06\x06" + wide + b"PK\x06\x07" + struct.pack("<IQI", 0, stop, 1) + end
