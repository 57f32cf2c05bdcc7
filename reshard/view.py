"""A rank's view of a source whose files lie on the disks of several machines: one directory of all.

    files that the rank sees        links
    small ones that it does not     copies, of those that some format reads
    all else that it does not       hollow files of their size and time, of which nothing is read

It stands in a scratch place, below the names of directories that the source has.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from reshard import containers, storage
from reshard.containers import FileIndex
from reshard.dealing import Ranks
from reshard.errors import CheckpointError, ReshardError, printable
from reshard.formats.options import Scan
from reshard.sights import Listing, Sight, beside
from reshard.smallfiles import Meeting, SmallFiles
from reshard.telling import (
    Answer,
    BytesOf,
    ChecksumOf,
    Header,
    HeaderOf,
    Want,
    piece_bytes,
    spread,
)

# Each rank copies them: a `.metadata` may have 512 MiB, a manifest 128, a tokenizer 64.
MAX_SMALL_BYTES = 768 << 20

T = TypeVar("T")


@dataclass
class View:
    """A rank's view of a source: `path` as the user named it, `root` where all its files stand.

    `small` are the names of the files that are whole on every rank.
    """

    path: Path
    root: Path
    rank: int
    world: int
    sights: Mapping[str, Sight]
    small: Set[str]
    shown: Sequence[tuple[str, str]]
    scratch: SmallFiles
    wants: set[Want] = field(default_factory=set)
    known: dict[Want, Answer] = field(default_factory=dict)

    def absent(self, path: Path) -> "_Absent | None":
        """The file that stands at `path` in this view without being here."""
        name = os.path.relpath(path, self.root)
        sight = self.sights.get(name)
        here = sight is None or self.rank in sight.ranks or name in self.small
        return None if here else _Absent(self, name)

    def told(self, told: Sequence[tuple[Want, Answer]]) -> None:
        """Learn what other ranks have told."""
        for want, answer in told:
            self.known[want] = answer
            sight = self.sights[want.file]
            if isinstance(answer, Header) and answer.small and self.rank not in sight.ranks:
                _fill(self.root / want.file, sight, answer.small)

    def rename(self, error: ReshardError) -> None:
        """Have an error name the user's paths, not those of any rank's view."""
        text = str(error)
        for ours, theirs in self.shown:
            text = text.replace(ours, theirs)
        error.args = (text,)

    def local(self, scan: Scan) -> dict[str, Ranks]:
        """The files of weights that not all ranks see, with those that do, in order."""
        folder, found = os.path.relpath(scan.root, self.root), {}
        for file in scan.layout.files:
            name = os.path.normpath(os.path.join(folder, file))
            sight = self.sights.get(name)
            if sight is None:
                continue
            if sight.others:
                raise self._conflict(name)
            if len(sight.ranks) < self.world:
                found[file] = sight.ranks
        return found

    def _conflict(self, name: str) -> CheckpointError:
        return CheckpointError(f"`{self.path / name}`: {self.sights[name].conflict()}")

    def cause(self, error: ReshardError) -> ReshardError:
        """What is behind an error of a scan: one name may stand for several files."""
        names = (name for name, sight in self.sights.items() if sight.others)
        named = next((name for name in names if f"/{name}`" in str(error)), None)
        return error if named is None else self._conflict(named)

    def place(self, root: Path) -> Path:
        """Where a directory of this view is for the user."""
        return self.path / os.path.relpath(root, self.root)


@dataclass(frozen=True, slots=True)
class _Absent:
    """A hollow file of a view; what is not known of it yet is noted, and something else given."""

    view: View
    name: str

    def index(self, container: str) -> FileIndex:
        found = self._known(HeaderOf(self.name, container))
        if not isinstance(found, Header):
            raise CheckpointError(f"`{self.view.path / self.name}`: is on another machine")
        return found.index

    def read(self, offset: int, count: int) -> bytes:
        found = self._known(BytesOf(self.name, offset, count))
        return found if isinstance(found, bytes) else bytes(count)

    def crc32_of(self, offset: int, length: int) -> int:
        found = self._known(ChecksumOf(self.name, offset, length))
        return found if isinstance(found, int) else 0

    def _known(self, want: Want) -> Answer | None:
        found = self.view.known.get(want)
        if found is None:
            self.view.wants.add(want)
        if isinstance(found, CheckpointError):
            raise found
        return found


@contextlib.contextmanager
def through(view: View | None) -> Iterator[None]:
    """Look at files through a view; errors name the user's paths."""
    if view is None:
        yield
        return
    try:
        with containers.with_absent(view.absent):
            yield
    except ReshardError as error:
        view.rename(error)
        raise


def within(view: View | None, work: Callable[[], T]) -> Callable[[], T]:
    """Some work that looks at files through a view."""

    def inside() -> T:
        with through(view):
            return work()

    return inside


def made(
    path: Path, mine: Listing, sights: Mapping[str, Sight], small: Set[str], meeting: Meeting
) -> View:
    """Make this rank's view, with copies of those of `small` that it lacks; all ranks do so."""
    scratch = SmallFiles()
    base = scratch.folder()
    # Names of directories tell releases, so all take those of the first rank that sees any file.
    own = os.path.abspath(path), os.path.realpath(path)
    seen = meeting.gather((printable(str(base)), own if mine else None))
    given, real = next((names for _, names in seen if names is not None), own)
    shown = []
    for other, _ in seen:
        shown += [(f"{other}{name}", str(path)) for name in (given, real)]
        shown.append((other, ""))
    sights = _agreed(sights, small, path, mine, meeting)
    root = Path(f"{base}{given}")
    view = View(path, root, meeting.rank, len(seen), sights, small, shown, scratch)
    storage.make_directory(Path(f"{base}{real}"))
    if given != real:
        _link(Path(f"{base}{real}"), root)
    for name, sight in sights.items():
        if view.rank in sight.ranks:
            _link(beside(path, name), beside(root, name))
        else:
            _fill(beside(root, name), sight, ())
    _copy_small_files(view, meeting)
    return view


def _agreed(
    sights: Mapping[str, Sight], small: Set[str], root: Path, mine: Listing, meeting: Meeting
) -> dict[str, Sight]:
    """The same without small files that are several: times may differ, bytes may not."""
    doubtful = [name for name in sorted(small) if sights[name].others]

    def own() -> dict[str, str]:
        return {name: _digest(beside(root, name)) for name in doubtful if name in mine}

    digests = meeting.gather(meeting.together(own))
    agreed = dict(sights)
    for name in doubtful:
        if len({table[name] for table in digests if name in table}) > 1:
            raise CheckpointError(f"`{root / name}`: {sights[name].conflict()}")
        ranks = tuple(rank for rank, table in enumerate(digests) if name in table)
        agreed[name] = replace(sights[name], ranks=ranks, others=())
    return agreed


def _digest(path: Path) -> str:
    record = hashlib.sha256()
    for piece in storage.read_steps(path, storage.STEP_BYTES):
        record.update(piece)
    return record.hexdigest()


def _copy_small_files(view: View, meeting: Meeting) -> None:
    """Give all ranks the small files that some of them see."""
    found = {name: view.sights[name] for name in sorted(view.small)}
    small = {name: sight for name, sight in found.items() if len(sight.ranks) < view.world}
    total = sum(sight.size for sight in small.values())
    if total > MAX_SMALL_BYTES:
        raise CheckpointError(
            f"`{view.path}`: {total:,} bytes of small files that not all ranks see, expected "
            f"{MAX_SMALL_BYTES:,} at most; name a directory that holds the checkpoint alone"
        )

    def own() -> Iterator[tuple[str, int, bytes]]:
        for name in (name for name, sight in small.items() if sight.ranks[0] == view.rank):
            position = 0
            for piece in storage.read_steps(beside(view.root, name), piece_bytes(view.world)):
                yield name, position, piece
                position += len(piece)

    def take(piece: tuple[str, int, bytes]) -> None:
        name, position, data = piece
        if view.rank not in small[name].ranks:
            _fill(beside(view.root, name), small[name], ((position, data),))

    spread(own(), meeting, take)


def _link(there: Path, here: Path) -> None:
    storage.make_directory(here.parent)
    with storage.explained("create", here):
        os.symlink(there, here)


def _fill(path: Path, sight: Sight, chunks: Sequence[tuple[int, bytes]]) -> None:
    """Put some bytes into a file of the right size and time, which has holes else."""
    storage.create(path, sight.size, chunks)
    with storage.explained("create", path):
        os.utime(path, ns=(sight.mtime_ns, sight.mtime_ns))
