"""reshard.json: how it is written, read and checked; it says of every byte what it is.

Each file's record stands on a line of its own, without blanks: there are a million extents where a
large model is cut for many ranks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from reshard.errors import CheckpointError, ConfigError, VerifyError
from reshard.families.model import Json
from reshard.formats import common

VERSION = 1


@dataclass(frozen=True, slots=True)
class Span:
    """An extent of a file as the manifest has it; `reason` says why it could not be read."""

    file: str
    start: int
    length: int
    what: str
    crc: int
    reason: str = ""

    def difference(self, other: str) -> str:
        """What to say of a span that differs from `other`."""
        found = f"cannot be compared: {self.reason}" if self.reason else f"differ from {other}"
        return (
            f"`{self.file}`: bytes {self.start} to {self.start + self.length} ({self.what}) {found}"
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says of the files around it: `format` is that of the checkpoint."""

    sizes: Mapping[str, int]
    spans: Sequence[Span]
    format: str


def written(body: Mapping[str, object]) -> bytes:
    """The bytes of reshard.json, with a checksum over everything else in it."""
    record = {**body, "version": VERSION}
    return dump({**record, "crc32": isal_zlib.crc32(dump(record))})


def dump(record: Mapping[str, object]) -> bytes:
    """A manifest's JSON as `common.dump_json` has it, but for a line without blanks per file."""
    return b"{\n" + b",\n".join(_entry(key, record[key]) for key in sorted(record)) + b"\n}\n"


def _entry(key: str, value: object) -> bytes:
    """A key of the manifest with its value, indented."""
    if key != "files" or not isinstance(value, dict) or not value:
        return common.dump_json({key: value})[len("{\n") : -len("\n}\n")]
    lines = (
        f"    {json.dumps(file)}: "
        + json.dumps(value[file], separators=(",", ":"), sort_keys=True, allow_nan=False)
        for file in sorted(value)
    )
    return ('  "files": {\n' + ",\n".join(lines) + "\n  }").encode()


def read(root: Path) -> Manifest:
    """The manifest of a directory, whose every byte must be as it was written."""
    name = root / common.MANIFEST
    if not name.is_file():
        raise CheckpointError(
            f"`{root}`: has no {common.MANIFEST}; compare it with another checkpoint: verify A B"
        )
    try:
        record = common.read_json(name)
        _check_bytes(name, record)
    except CheckpointError as error:
        raise VerifyError(str(error)) from None
    try:
        return _parsed(record)
    except (TypeError, ValueError):
        raise CheckpointError(f"`{name}`: not a manifest of this program") from None


def _check_bytes(name: Path, record: Mapping[str, Json]) -> None:
    """Require a manifest's own checksum, and the very bytes in which it was written."""
    held = common.read_bytes(name, common.MAX_MANIFEST_BYTES)
    try:
        rest = {key: value for key, value in record.items() if key != "crc32"}
        agrees = record.get("crc32") == isal_zlib.crc32(dump(rest))
        as_written = held == dump(record)
    except (ConfigError, ValueError, RecursionError):  # values that no JSON of ours holds
        agrees = as_written = False
    if not agrees:
        raise VerifyError(f"`{name}`: differs from its own checksum")
    if not as_written:
        raise VerifyError(f"`{name}`: says what it said, but its bytes are not those written")


def _parsed(record: Mapping[str, Json]) -> Manifest:
    """The parts that are needed here; anything of the wrong kind is a TypeError or ValueError."""
    files, target = record.get("files"), record.get("target")
    if not isinstance(files, dict):
        raise TypeError
    sizes = dict.fromkeys((common.confined(file, common.MANIFEST) for file in files), 0)
    spans = spans_of(files)
    for span in spans:
        sizes[span.file] += span.length
    said = target.get("format") if isinstance(target, dict) else None
    return Manifest(sizes, spans, said if isinstance(said, str) else "unknown")


def spans_of(records: Mapping[str, object]) -> list[Span]:
    """The extents in a manifest's file records; a TypeError or a ValueError for anything else.

    Those of a file tile it in order, and have its size and its checksum together.
    """
    return [span for file, record in records.items() for span in _tiles(file, record)]


def _tiles(file: str, record: object) -> list[Span]:
    """The extents of one file."""
    extents = record.get("extents") if isinstance(record, dict) else None
    if not isinstance(extents, list) or not isinstance(record, dict):
        raise TypeError(f"`{file}` has no extents")
    spans = []
    position = together = 0
    for start, length, what, crc in extents:
        if not (type(start) is type(length) is type(crc) is int and isinstance(what, str)):
            raise TypeError(f"`{file}` has an extent that is no range of bytes")
        if start != position or not 0 <= length < 1 << 62 or not 0 <= crc < 1 << 32:
            raise ValueError(f"`{file}` has extents that do not tile it at byte {position}")
        position += length
        together = isal_zlib.crc32_combine(together, crc, length)
        spans.append(Span(file, start, length, what, crc))
    size, crc = record.get("size"), record.get("crc32")
    if not type(size) is type(crc) is int:
        raise TypeError(f"`{file}` has no size or no checksum")
    if (size, crc) != (position, together):
        raise ValueError(f"`{file}` has extents of {position} bytes that are not those of the file")
    return spans
