"""Reading a few rows of a source to learn what its config does not say.

What is learnt is proven while moving.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from isal import isal_zlib

from reshard import containers
from reshard.containers import Entry
from reshard.geometry import row_major

SAMPLED_ROWS = 16


def _row(path: Path, entry: Entry, row: int) -> bytes:
    """The bytes of one row of a stored tensor whose rows are contiguous."""
    nbytes = entry.shape[-1] * entry.dtype.itemsize
    offset = entry.offset + row * entry.strides[0] * entry.dtype.itemsize
    return containers.read(path, offset, nbytes)


def rows_agree(path: Path, one: Entry, other: Entry) -> bool:
    """Whether rows spread over two stored tensors of one shape and one file hold the same bytes."""
    if one.dtype != other.dtype or one.strides[-1] != 1 or other.strides[-1] != 1:
        return False
    rows = sorted({one.shape[0] * part // SAMPLED_ROWS for part in range(SAMPLED_ROWS)})
    return all(_row(path, one, row) == _row(path, other, row) for row in rows)


def _entries(path: Path) -> Mapping[str, Entry]:
    return containers.index("torchfile", path.parent, path.name).entries


def _checksum(path: Path, key: str) -> int:
    """CRC32 of one whole stored tensor, read in small steps."""
    entry = _entries(path)[key]
    if entry.strides != row_major(entry.shape):
        return isal_zlib.crc32(b"".join(_row(path, entry, row) for row in range(entry.shape[0])))
    nbytes = entry.dtype.itemsize * entry.shape[0] * entry.shape[1]
    return containers.crc32_of(path, entry.offset, nbytes)


def equal_head_groups(files: Sequence[Path], keys: Sequence[str]) -> int:
    """The largest number of consecutive files, a divisor of all, with equal bytes under `keys`."""
    if not _alike(files, keys) or _first_rows(files[0], keys) != _first_rows(files[1], keys):
        return 1
    heads = [tuple(_checksum(path, key) for key in keys) for path in files]
    for group in range(len(heads), 0, -1):
        starts = range(0, len(heads), group)
        if len(heads) % group == 0 and all(
            len(set(heads[start : start + group])) == 1 for start in starts
        ):
            return group
    return 1


def _alike(files: Sequence[Path], keys: Sequence[str]) -> bool:
    """Whether all files hold `keys` as matrices of the same shapes; a header check says more."""
    shapes = {
        tuple(entries[key].shape if key in entries else () for key in keys)
        for entries in map(_entries, files)
    }
    return len(shapes) == 1 and all(len(shape) == 2 for shape in next(iter(shapes)))


def _first_rows(path: Path, keys: Sequence[str]) -> list[bytes]:
    entries = _entries(path)
    return [_row(path, entries[key], 0) for key in keys]
