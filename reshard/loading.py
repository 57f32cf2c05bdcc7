"""Proof by other means: a checkpoint as the libraries open it that its files are meant for.

What a library gives must be the tensors that are indexed here, in name, dtype and shape, and have
the bytes that lie where the index says. Files are mapped, or read a tensor at a time.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from isal import isal_zlib

from reshard import containers, formats, transformed
from reshard.containers import Entry, FileIndex, dcpmetadata
from reshard.distributed import Ranks
from reshard.encodings import stored_bytes
from reshard.errors import (
    CheckpointError,
    ConfigError,
    LayoutError,
    ReshardError,
    UndescribedError,
    VerifyError,
    first_line,
)
from reshard.families.carried import CarriedConfig
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.geometry import Region, item_name, row_major
from reshard.libraries import Given, by_gguf, by_safetensors, by_torch, memory_of
from reshard.storage import crc32_of, read_bytes
from reshard.verify import raise_on


@dataclass(slots=True)
class Share:
    """What one rank opens, and what it found: tensors that agree, and problems."""

    scan: Scan
    ranks: Ranks
    name: str
    tensors: int = 0
    problems: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def opening(self, what: str) -> Iterator[None]:
        """Turn whatever a library raises into a problem with `what`."""
        try:
            yield
        except ReshardError as error:
            self.problems.append(str(error))
        except Exception as error:
            self.problems.append(f"{self.name} cannot open `{what}`: {first_line(error)}")

    def compare(self, what: str, given: Given, entry: Entry | None, path: Path) -> None:
        """Count a tensor whose kind, shape and bytes are those of its entry."""
        expected = "no such tensor" if entry is None else _described(entry)
        found = f"{given.kind} {list(given.shape)}"
        if entry is None or found != expected:
            self.problems.append(
                f"`{what}`: {self.name} gives tensor `{given.key}` as {found}, expected {expected}"
            )
            return
        crc = 0
        for piece in given.pieces:
            self.ranks.step()
            crc = isal_zlib.crc32(piece, crc)
        if crc != _indexed_crc(path, entry):
            self.problems.append(
                f"`{what}`: {self.name} gives tensor `{given.key}` other bytes than those that "
                f"begin at byte {entry.offset}"
            )
            return
        self.tensors += 1


@dataclass(frozen=True, slots=True)
class Library:
    """What opens the files of a container: its name, its package, and how it is put to work."""

    function: str
    package: str
    check: Callable[[Share], None]


def load(path: Path, options: Options, ranks: Ranks) -> list[str]:
    """Open a checkpoint with its target's own library; a VerifyError says what was not taken."""
    ranks.phase("load")
    scan = ranks.together(lambda: _scan(path, options))
    library = LIBRARIES.get(scan.layout.container)
    if library is None:
        raise ConfigError(f"--load: no library is known that opens {scan.format} files")
    ranks.together(lambda: _require(library.package))
    name = f"{library.function} ({library.package} {version(library.package)})"
    share, said = Share(scan, ranks, name), list[str]()
    with _quiet():
        library.check(share)
        if ranks.rank == 0 and scan.layout.container == "safetensors" and scan.format == "hf":
            with share.opening(common.CONFIG):
                said = transformed.check(scan)
    parts = ranks.gather((share.tensors, share.problems))
    raise_on(f"`{path}`", [problem for _, problems in parts for problem in problems])
    files, tensors = len(scan.layout.files), sum(count for count, _ in parts)
    return [f"loaded: {files} files, {tensors} tensors by {name}", *said]


def _scan(path: Path, options: Options) -> Scan:
    """The checkpoint, of any model; files that are not what they should be are a VerifyError."""
    known = formats.detect(path)
    try:
        try:
            return known.scan(path, options)
        except UndescribedError:
            unknown = replace(options, model=CarriedConfig("unknown", {}))
            return known.scan(path, unknown)
    except (CheckpointError, LayoutError) as error:
        raise VerifyError(str(error)) from None


def _require(package: str) -> ModuleType:
    """A library, which may be an optional one."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"--load: needs the package {package}; pip install {package}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings and logs from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _described(entry: Entry) -> str:
    return f"{common.stored_text(entry.dtype, entry.encoding)} {list(entry.shape)}"


def _indexed_crc(path: Path, entry: Entry) -> int:
    """The CRC32 of the bytes that the index gives a tensor, in row-major order."""
    nbytes = stored_bytes(entry.shape, entry.dtype, entry.encoding)
    if entry.strides == row_major(entry.shape) or not nbytes:
        return crc32_of(path, entry.offset, nbytes)
    steps = zip(entry.shape, entry.strides, strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps)
    data = bytearray(read_bytes(path, entry.offset, count * entry.dtype.itemsize))
    flat = torch.frombuffer(data, dtype=entry.dtype)
    return isal_zlib.crc32(memory_of(flat.as_strided(entry.shape, entry.strides)))


# Libraries that open one file after another.


def _file_by_file(opened: Callable[[Path, FileIndex], Iterator[Given]]) -> Callable[[Share], None]:
    """Put a library to work on this rank's share of the files."""

    def check(share: Share) -> None:
        scan, ranks = share.scan, share.ranks
        for file in scan.layout.files[ranks.rank :: ranks.world]:
            path = scan.root / file
            with share.opening(file):
                index = containers.index(scan.layout.container, scan.root, file)
                missing = set(index.entries)
                for given in opened(path, index):
                    missing.discard(given.key)
                    share.compare(file, given, index.entries.get(given.key), path)
                if missing:
                    raise VerifyError(f"`{file}`: {share.name} finds no tensor `{min(missing)}`")

    return check


# torch.distributed.checkpoint, which opens directories.


def _checkpoint(share: Share) -> None:
    """Have torch load this rank's share of the weights, one after another."""
    scan, ranks = share.scan, share.ranks
    held = dcpmetadata.read(scan.root)
    with share.opening(dcpmetadata.NAME):
        dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        reader = dcp.FileSystemReader(scan.root)
        metadata = reader.read_metadata()
        reader.read_metadata = lambda *given, **named: metadata  # read once, not for each tensor
        stored = metadata.state_dict_metadata
        found = {
            name: (item.properties.dtype, tuple(item.size))
            for name, item in stored.items()
            if hasattr(item, "chunks")
        }
        expected = {name: (item.dtype, item.shape) for name, item in held.tensors.items()}
        if found != expected:
            name = min(n for n in {**found, **expected} if found.get(n) != expected.get(n))
            raise VerifyError(
                f"`{dcpmetadata.NAME}`: {share.name} says {found.get(name)} of tensor `{name}`, "
                f"expected {expected.get(name)}"
            )
        weights = sorted({slot.key for slot in scan.layout.slots})
        for name in weights[ranks.rank :: ranks.world]:
            ranks.step()
            with share.opening(name):
                tensor = torch.empty(held.tensors[name].shape, dtype=held.tensors[name].dtype)
                dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
                _compare_boxes(share, name, held.tensors[name], tensor)


def _compare_boxes(share: Share, name: str, held: dcpmetadata.Tensor, tensor: torch.Tensor) -> None:
    """Compare each box of a loaded tensor with the bytes that are indexed for it."""
    scan, good, before = share.scan, 0, share.tensors
    for box, file in zip(held.boxes, held.files, strict=True):
        key = item_name(name, box.start)
        entry = containers.index(scan.layout.container, scan.root, file).entries[key]
        part = tensor[_slices(box)]
        given = Given(
            key, common.stored_text(part.dtype, None), tuple(part.shape), iter([memory_of(part)])
        )
        share.compare(file, given, entry, scan.root / file)
        good += 1
    share.tensors = before + (share.tensors - before == good)


def _slices(box: Region) -> tuple[slice, ...]:
    return tuple(map(slice, box.start, box.stop))


LIBRARIES: Mapping[str, Library] = {
    "safetensors": Library("safetensors.safe_open", "safetensors", _file_by_file(by_safetensors)),
    "torchfile": Library("torch.load", "torch", _file_by_file(by_torch)),
    "dcpfile": Library("torch.distributed.checkpoint.load", "torch", _checkpoint),
    "gguffile": Library("gguf.GGUFReader", "gguf", _file_by_file(by_gguf)),
}
