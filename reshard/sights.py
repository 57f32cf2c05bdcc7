"""Which files of a directory each rank can open: looked at, never assumed."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from reshard.dealing import Ranks, rank_text
from reshard.smallfiles import Meeting

MAX_FILES = 1 << 17  # beyond that it is no checkpoint

Listing = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Sight:
    """A file that only `ranks` can open, or all can: its bytes, and its time in nanoseconds.

    `others` are ranks that see another file under its name, and that file's bytes and time.
    """

    size: int
    mtime_ns: int
    ranks: Ranks
    others: tuple[tuple[Ranks, int, int], ...] = ()

    def conflict(self) -> str:
        """What is wrong with a name that stands for several files."""
        here = _file_text(self.size, self.mtime_ns)
        there = (f"{rank_text(ranks)} {_file_text(*state)}" for ranks, *state in self.others)
        return (
            f"{rank_text(self.ranks)} see{'s' * (len(self.ranks) == 1)} {here}, {', '.join(there)};"
            " remove what is wrong, or copy with `cp -p` or `rsync -a`, which keep the time"
        )


def _file_text(size: int, mtime_ns: int) -> str:
    when = datetime.fromtimestamp(mtime_ns / 1e9, timezone.utc)
    return f"{size} bytes of {when:%Y-%m-%d %H:%M:%S.%f}"


def look(root: Path, around: Iterable[str]) -> Listing | None:
    """Bytes and time of every file below `root` that can be opened, by its relative path.

    And of those outside that `around` names; None where there are far too many.
    """
    found: dict[str, tuple[int, int]] = {}
    for name in (*around, *_below(root)):
        if len(found) > MAX_FILES:
            return None
        path = beside(root, name)
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            found[name] = status.st_size, status.st_mtime_ns
    return found


def beside(root: Path, name: str) -> Path:
    """A file below a directory or around it, where the directory may be a symlink."""
    return Path(os.path.normpath(os.path.join(os.path.abspath(root), name)))


def _below(root: Path) -> Iterator[str]:
    """The relative paths of all files; symlinks are followed, but not back to where they are.

    Hidden directories are left out: what downloads leave in them differs on any two machines.
    """
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while pending:
        prefix, above = pending.pop()
        for entry in _entries(root / prefix):
            if not _is_folder(entry):
                yield prefix + entry.name
                continue
            folder = os.path.realpath(entry.path)
            if folder not in above and not entry.name.startswith("."):
                pending.append((f"{prefix}{entry.name}/", (*above, folder)))


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:  # not there, or not to be opened: then this rank sees nothing of it
        return []


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink that leads round in a circle
        return False


def compared(mine: Listing | None, meeting: Meeting) -> dict[str, Sight] | None:
    """What all ranks see together, by relative path; None where each of them sees the same."""
    digest = "" if mine is None else hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    digests = meeting.gather(digest)
    if "" in digests or len(set(digests)) == 1:
        return None
    speaks = digests.index(digest) == meeting.rank
    listings = [found for found in meeting.gather(mine if speaks else None) if found is not None]
    groups: dict[str, list[int]] = {}
    for rank, found in enumerate(digests):
        groups.setdefault(found, []).append(rank)
    return dict(_merged(list(zip(groups.values(), listings, strict=True))))


def _merged(seen: list[tuple[list[int], Listing]]) -> Iterator[tuple[str, Sight]]:
    """Each file as the first ranks see it that do."""
    states: dict[str, dict[tuple[int, int], list[int]]] = {}
    for ranks, listing in seen:
        for name, state in listing.items():
            states.setdefault(name, {}).setdefault(state, []).extend(ranks)
    for name in sorted(states):
        (first, ranks), *others = states[name].items()
        yield (
            name,
            Sight(
                *first,
                tuple(sorted(ranks)),
                tuple((tuple(sorted(members)), *state) for state, members in others),
            ),
        )
