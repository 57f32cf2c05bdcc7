"""A queue in a directory: a job is a YAML file, its state the folder that it lies in.

    queued/NAME.yaml    waits; whoever renames it to running/ has it
    running/NAME.yaml   is done by the service that holds the lock running/NAME.lock
    done/NAME.yaml, failed/NAME.yaml    are over; NAME.json beside them says what came of it

Names are taken in their order. A job whose service died is found in running/ without a lock, and
taken up by the next service that looks.
"""

import contextlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reshard import storage
from reshard.errors import StorageError
from reshard.locks import locked

QUEUED, RUNNING, DONE, FAILED = STATES = ("queued", "running", "done", "failed")
STATUS = "status.json"
SUFFIX = ".yaml"
# Whoever writes a job file in place, and not under another name first, has begun it by now.
EMPTY_SECONDS = 60.0
MAX_NAME_BYTES = 200  # what is made of a name has to be a file's name too


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is ours: its name, its file, and how often it was begun, this time included.

    A name that cannot be printed, or is too long, is changed.
    """

    name: str
    path: Path
    starts: int


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The queue below `folder`."""

    folder: Path

    def make(self) -> None:
        """Make the folders of the states."""
        for state in STATES:
            storage.make_directory(self.folder / state)

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        return {state: len(self._names(state)) for state in STATES}

    @contextlib.contextmanager
    def claimed(self) -> Iterator[Claim | None]:
        """The next job, for as long as the context lasts: one that was left first; None if none."""
        for state in (RUNNING, QUEUED):
            for file in self._names(state):
                name = _plain(file)
                with locked(self.folder / RUNNING / f"{name}.lock") as ours:
                    path = self._take(file, name, state) if ours else None
                    if path is not None:
                        yield Claim(name, path, self._begun(name))
                        return
        yield None

    def add(self, name: str, text: str) -> None:
        """Queue a job."""
        write_whole(self.folder / QUEUED / f"{_plain(name)}{SUFFIX}", text)

    def end(self, claim: Claim, state: str, record: Mapping[str, object]) -> None:
        """Say what came of a job, and bring it to its last folder."""
        write_whole(self.folder / state / f"{claim.name}.json", as_json(record))
        storage.rename(claim.path, self.folder / state / claim.path.name)
        self._starts(claim.name).unlink(missing_ok=True)

    def put_back(self, claim: Claim) -> None:
        """Let a start that ended in good order not count."""
        write_whole(self._starts(claim.name), str(claim.starts - 1))

    def status(self, record: Mapping[str, object]) -> None:
        """Write the status file, which readers find whole."""
        write_whole(self.folder / STATUS, as_json(record))

    def strays(self) -> list[str]:
        """What lies among the queued jobs and is none; hidden files are somebody's own."""
        jobs = {f"{name}{SUFFIX}" for name in self._names(QUEUED)}
        with storage.explained("list", self.folder / QUEUED):
            found = os.listdir(self.folder / QUEUED)
        return sorted(name for name in found if name not in jobs and not name.startswith("."))

    def _names(self, state: str) -> list[str]:
        """The jobs in a state; files that are hidden, or of another kind, are no jobs."""
        with storage.explained("list", self.folder / state):
            found = [entry.name for entry in os.scandir(self.folder / state) if _is_file(entry)]
        jobs = (name for name in found if name.endswith(SUFFIX) and not name.startswith("."))
        return sorted(name.removesuffix(SUFFIX) for name in jobs)

    def _take(self, file: str, name: str, state: str) -> Path | None:
        """Bring a job to running/; None where it is gone, or still being written."""
        found = self.folder / state / f"{file}{SUFFIX}"
        running = self.folder / RUNNING / f"{name}{SUFFIX}"
        try:
            status = found.stat()
            if not status.st_size and time.time() - status.st_mtime < EMPTY_SECONDS:
                return None
            if found != running:
                storage.rename(found, running)
        except (FileNotFoundError, StorageError):
            return None
        return running

    def _begun(self, name: str) -> int:
        """Count this start."""
        path = self._starts(name)
        try:
            starts = int(path.read_text(encoding="ascii")) + 1
        except (FileNotFoundError, ValueError):
            starts = 1
        write_whole(path, str(starts))
        return starts

    def _starts(self, name: str) -> Path:
        return self.folder / RUNNING / f"{name}.starts"


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that nobody sees a part of it."""
    aside = path.with_name(f".{uuid.uuid4().hex}")
    with storage.explained("write", aside):
        aside.write_text(text, encoding="utf-8")
    storage.rename(aside, path)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a symlink that leads round in a circle
        return False


def _plain(name: str) -> str:
    """A name that can be printed, and be part of others."""
    printed = "".join(character if character.isprintable() else "_" for character in name)
    if printed == name and len(name.encode()) <= MAX_NAME_BYTES:
        return name
    start = printed.encode()[: MAX_NAME_BYTES // 2].decode(errors="ignore")
    return f"{start}-{zlib.crc32(os.fsencode(name)):08x}"


def as_json(record: Mapping[str, object]) -> str:
    """A record as a file has it."""
    return json.dumps(record, indent=2) + "\n"
