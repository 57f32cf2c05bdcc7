"""Ranks that see their own files only: each in a directory of its own, and watched as it reads."""

import json
import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard import config as configuration
from reshard import job as program
from reshard.distributed import Ranks
from tests.two_nodes import WEIGHTS, Pair

# Bytes that were read of a file: its name, where from, and how many.
Extent = tuple[str, int, int]


def deal_out(whole: Path, root: Path, world: int) -> None:
    """Give each rank some files in a directory `src`; every third one is on two of them."""
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    for rank in range(world):
        (root / f"rank{rank}" / "src").mkdir(parents=True)
    for number, path in enumerate(files):
        for rank in {number % world, (number + (number % 3 == 0)) % world}:
            there = root / f"rank{rank}" / "src" / path.relative_to(whole)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, there)


class Watch:
    """Refuses to open what is another rank's, or hollow; notes what is read to be moved.

    Targets may be read by all.
    """

    def __init__(self) -> None:
        self.home, self.target = Path(), Path()
        self.read: list[Extent] = []
        self.foreign: list[str] = []
        self._preadv = os.preadv
        sys.addaudithook(self.audit)
        os.preadv = self.preadv

    def move_in(self, home: Path, target: Path) -> None:
        """Begin anew at another home."""
        self.home, self.target = home.resolve(), target.resolve()
        self.read, self.foreign = [], []

    def audit(self, event: str, details: tuple[Any, ...]) -> None:
        """Look at every call that opens a file, whoever makes it."""
        if event != "open" or isinstance(details[0], int) or details[2] & os.O_ACCMODE:
            return
        place = os.path.realpath(os.fsdecode(details[0]))
        ours = place.startswith((f"{self.home}/", str(self.target)))
        if place.endswith(WEIGHTS) and not ours:
            self.foreign.append(place)
            raise PermissionError(13, "another rank's", place)

    def preadv(self, descriptor: int, buffers: Any, *rest: Any) -> int:
        """Read, and note what."""
        done = self._preadv(descriptor, buffers, *rest)
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        if place.startswith(f"{self.home}/src/") and place.endswith(WEIGHTS):
            self.read.append((os.path.relpath(place, self.home / "src"), rest[0], done))
        return done


def run_here(pairs: Sequence[Pair], scratch: Path) -> list[tuple[list[Extent], list[str]]]:
    """What one rank does: what it has read of each source, and what it should not have opened."""
    ranks, watch, found = Ranks(), Watch(), []
    tempfile.tempdir = str(scratch)
    for pair in pairs:
        home = pair.root / f"rank{ranks.rank}"
        os.chdir(home)
        watch.move_in(home, pair.root / "dst")
        config = configuration.load(pair.source, pair.target, pair.paths(), None)
        program.run(config, ranks, force=False, say=lambda line: None)
        found.append((watch.read, watch.foreign))
    ranks.barrier("all jobs done")
    ranks.close()
    return found


def times_read(whole: Path, extents: Sequence[Extent]) -> dict[str, NDArray[np.int8]]:
    """For every file of weights, how often each byte of its tensors was read."""
    found = {}
    for path in (path for path in whole.rglob("*") if path.suffix in WEIGHTS):
        name = str(path.relative_to(whole))
        times = np.zeros(path.stat().st_size, np.int8)
        for _, start, count in (extent for extent in extents if extent[0] == name):
            times[start : start + count] += 1
        places = in_zip(path) if path.suffix == ".pth" else in_safetensors(path)
        found[name] = np.concatenate([times[start:stop] for start, stop in places])
    return found


def in_zip(path: Path) -> Iterator[tuple[int, int]]:
    """Where the storages of a torch zip lie."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.filename.split("/")[-2] == "data":
                file.seek(entry.header_offset + 26)
                names, extra = struct.unpack("<HH", file.read(4))
                start = entry.header_offset + 30 + names + extra
                yield start, start + entry.file_size


def in_safetensors(path: Path) -> Iterator[tuple[int, int]]:
    """Where the tensors of a safetensors file lie."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        for key, entry in json.loads(file.read(size)).items():
            if key != "__metadata__":
                start, stop = entry["data_offsets"]
                yield 8 + size + start, 8 + size + stop
