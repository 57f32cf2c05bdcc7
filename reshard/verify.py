"""Proof by reading: a checkpoint against its own manifest, or two checkpoints of any layouts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from isal import isal_zlib

from reshard import formats
from reshard.buffers import ALIGN, Buffer, Part, load
from reshard.commit import SourcePlaces
from reshard.distributed import Ranks
from reshard.errors import CheckpointError, LayoutError, VerifyError
from reshard.families.model import Json
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.geometry import Region
from reshard.layout import check_same_parameters
from reshard.moves import Move
from reshard.packing import copies
from reshard.plan import Plan
from reshard.report import size_text
from reshard.storage import Files

STEP_BYTES = 4 << 20
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Span:
    """An extent of a file as the manifest has it."""

    file: str
    start: int
    length: int
    what: str
    crc: int


def against_manifest(path: Path, ranks: Ranks) -> list[str]:
    """Compare every byte with reshard.json; a VerifyError names file, tensor and byte range."""
    spans, sizes = _spans(path)
    problems = _sizes_wrong(path, sizes) if ranks.rank == 0 else []
    intact = {
        file
        for file, size in sizes.items()
        if (path / file).is_file() and (path / file).stat().st_size == size
    }
    ranks.phase("verify")
    for span in spans[ranks.rank :: ranks.world]:
        ranks.step()
        if span.file in intact and _crc(path / span.file, span) != span.crc:
            end = span.start + span.length
            problems.append(
                f"`{span.file}`: bytes {span.start} to {end} ({span.what}) differ from the manifest"
            )
    _raise_on(path, [problem for part in ranks.gather(problems) for problem in part])
    total = sum(span.length for span in spans)
    return [
        f"verified: {len(sizes)} files, {size_text(total)} agree with {common.MANIFEST} in {path}"
    ]


def _raise_on(path: Path, problems: list[str]) -> None:
    if problems:
        more = (
            f" (and {len(problems) - DIFFERENCES_SHOWN} more)"
            if len(problems) > DIFFERENCES_SHOWN
            else ""
        )
        raise VerifyError(f"`{path}`: " + "; ".join(problems[:DIFFERENCES_SHOWN]) + more)


def _spans(path: Path) -> tuple[list[Span], dict[str, int]]:
    """All extents and file sizes of the manifest, which must agree with its own checksum."""
    name = path / common.MANIFEST
    if not name.is_file():
        raise CheckpointError(
            f"`{path}`: has no {common.MANIFEST}; compare it with another checkpoint: verify A B"
        )
    try:
        record = common.read_json(name)
    except CheckpointError as error:
        raise VerifyError(str(error)) from None
    crc = record.pop("crc32", None)
    if crc != isal_zlib.crc32(common.dump_json(record)):
        raise VerifyError(f"`{name}`: differs from its own checksum")
    files = record.get("files")
    try:
        return _read_spans(files)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"`{name}`: not a manifest of this program") from None


def _read_spans(files: Json) -> tuple[list[Span], dict[str, int]]:
    """Extents and sizes; anything that is not of the right kind is a TypeError or a ValueError."""
    if not isinstance(files, dict):
        raise TypeError
    spans: list[Span] = []
    sizes: dict[str, int] = {}
    for file, entry in files.items():
        common.confined(file, common.MANIFEST)
        if not isinstance(entry, dict) or not isinstance(entry["extents"], list):
            raise TypeError
        sizes[file] = _int(entry["size"])
        for item in entry["extents"]:
            if not isinstance(item, list):
                raise TypeError
            start, length, what, crc = item
            spans.append(Span(file, _int(start), _int(length), str(what), _int(crc)))
    return spans, sizes


def _int(value: Json) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value


def _sizes_wrong(path: Path, sizes: Mapping[str, int]) -> list[str]:
    """Files that are missing, too many, or of another size."""
    problems = []
    for file, size in sizes.items():
        if not (path / file).is_file():
            problems.append(f"`{file}` is missing")
        elif (found := (path / file).stat().st_size) != size:
            problems.append(f"`{file}`: {found} bytes, expected {size}")
    here = {
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
    }
    extra = sorted(here - set(sizes) - {common.MANIFEST})
    return problems + [f"`{file}` is not in the manifest" for file in extra]


def _crc(path: Path, span: Span) -> int:
    crc, position, end = 0, span.start, span.start + span.length
    with open(path, "rb", buffering=0) as file:
        while position < end:
            data = os.pread(file.fileno(), min(STEP_BYTES, end - position), position)
            if not data:
                return -1
            crc = isal_zlib.crc32(data, crc)
            position += len(data)
    return crc


def against_other(one: Path, other: Path, memory: int, ranks: Ranks) -> list[str]:
    """Compare two checkpoints' parameters bit for bit, in bounded memory, on all ranks."""
    ranks.phase("scan")
    first, second = ranks.together(lambda: (_scan(one), _scan(other)))
    ranks.together(lambda: _check_share((first, second), ranks))
    try:
        check_same_parameters(first.layout, second.layout)
    except LayoutError as error:
        raise VerifyError(str(error)) from None
    plan = Plan(first.layout, second.layout, ranks.world, "direct")
    ranks.agree("plan", plan.digest(plan.table_digest()))
    ranks.phase("verify")
    problems = list(_differences(first, second, plan, ranks))
    found = [problem for part in ranks.gather(problems) for problem in part]
    _raise_on(other, found)
    total = size_text(first.layout.total_bytes())
    return [
        f"equal: {len(plan.names)} parameters, {total}: {one} ({first.layout.name}) "
        f"and {other} ({second.layout.name})"
    ]


def _check_share(scans: Sequence[Scan], ranks: Ranks) -> None:
    """Check the headers of this rank's share of the files."""
    for scan in scans:
        common.check_headers(scan, scan.layout.files[ranks.rank :: ranks.world])


def _scan(path: Path) -> Scan:
    return formats.detect(path).scan(path, Options())


def _differences(first: Scan, second: Scan, plan: Plan, ranks: Ranks) -> Iterator[str]:
    """One line per parameter that differs, among the blocks of this rank."""
    capacity = plan.least_capacity(ALIGN)
    sides = [
        (Files(scan.root, os.O_RDONLY), SourcePlaces(scan.root), Buffer(capacity))
        for scan in (first, second)
    ]
    known: set[str] = set()
    for move in plan.moves(ranks.rank):
        ranks.step()
        loaded = []
        wanted = ([stored for _, stored in move.reads], [stored for _, stored in move.pieces])
        for (files, places, buffer), tensors in zip(sides, wanted, strict=True):
            buffer.clear()
            loaded.append(load(tensors, files, places, buffer))
        if move.block.parameter not in known:
            problem = _difference(move, loaded, (sides[0][2], sides[1][2]))
            if problem is not None:
                known.add(move.block.parameter)
                yield problem


def _difference(move: Move, loaded: list[list[Part]], buffers: tuple[Buffer, Buffer]) -> str | None:
    """Where a block differs between the two sides, its first element and both values."""
    for ours in loaded[0]:
        for theirs in loaded[1]:
            if ours.stored.dtype != theirs.stored.dtype:
                return (
                    f"`{move.block.parameter}`: {ours.stored.dtype} against {theirs.stored.dtype}"
                )
            region = ours.stored.region & theirs.stored.region
            if (
                region is not None
                and (found := _unequal(ours, theirs, region, buffers)) is not None
            ):
                return (
                    f"`{move.block.parameter}`{found} "
                    f"(`{ours.stored.file}` against `{theirs.stored.file}`)"
                )
    return None


def _unequal(
    ours: Part, theirs: Part, region: Region, buffers: tuple[Buffer, Buffer]
) -> str | None:
    """The first element of `region` in which two parts differ, compared as bits."""
    dtype = ours.stored.dtype
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for window in ours.packed.windows:
        box = window.region & region
        if box is None:
            continue
        for copy in copies(ours.packed, theirs.packed, box):
            one = (
                buffers[0]
                .view(bits)
                .as_strided(copy.shape, copy.source[1], ours.element() + copy.source[0])
            )
            other = (
                buffers[1]
                .view(bits)
                .as_strided(copy.shape, copy.target[1], theirs.element() + copy.target[0])
            )
            if not torch.equal(one, other):
                place = tuple((one != other).nonzero()[0].tolist())
                values = (side[place].clone().view(dtype).item() for side in (one, other))
                return f" near {list(box.start)}: {next(values)!r} against {next(values)!r}"
    return None
