"""Proof by reading: a checkpoint against its own manifest, or two checkpoints of any layouts."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from isal import isal_zlib

from reshard import formats
from reshard.buffers import ALIGN, Buffer, Part, load
from reshard.commit import SourcePlaces
from reshard.distributed import Ranks
from reshard.engine import RESERVED_BYTES
from reshard.errors import CheckpointError, ConfigError, LayoutError, VerifyError
from reshard.families.model import Json
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.layout import Layout, StoredTensor, check_same_parameters
from reshard.packing import copies
from reshard.plan import Plan
from reshard.sources import without_padding
from reshard.storage import Files, crc32_of
from reshard.units import size_text

DIFFERENCES_SHOWN = 3
# Of which dtypes a wider one holds every value.
WIDENED = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
}


@dataclass(frozen=True, slots=True)
class Span:
    """An extent of a file as the manifest has it."""

    file: str
    start: int
    length: int
    what: str
    crc: int


def against_manifest(path: Path, ranks: Ranks) -> list[str]:
    """Compare every byte with reshard.json; a VerifyError names file, tensor and byte range.

    `path` may be the dst.path of a target that is published in a folder below it.
    """
    below = (path / known.FOLDER for known in formats.formats().values() if known.FOLDER)
    if not (path / common.MANIFEST).is_file():
        path = next((one for one in below if (one / common.MANIFEST).is_file()), path)
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
        if span.file not in intact:
            continue
        if crc32_of(path / span.file, span.start, span.length) != span.crc:
            end = span.start + span.length
            problems.append(
                f"`{span.file}`: bytes {span.start} to {end} ({span.what}) differ from the manifest"
            )
    _raise_on(f"`{path}`", [problem for part in ranks.gather(problems) for problem in part])
    total = sum(span.length for span in spans)
    return [
        f"verified: {len(sizes)} files, {size_text(total)} agree with {common.MANIFEST} in {path}"
    ]


def _raise_on(what: str, problems: list[str]) -> None:
    if problems:
        more = (
            f" (and {len(problems) - DIFFERENCES_SHOWN} more)"
            if len(problems) > DIFFERENCES_SHOWN
            else ""
        )
        raise VerifyError(f"{what}: " + "; ".join(problems[:DIFFERENCES_SHOWN]) + more)


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


def against_other(one: Path, other: Path, options: Options, memory: int, ranks: Ranks) -> list[str]:
    """Compare two checkpoints' parameters bit for bit, in bounded memory, on all ranks.

    A parameter's values are those of its first place; further ones are compared with it.
    """
    ranks.phase("scan")
    first, second = ranks.together(lambda: (_scan(one, options), _scan(other, options)))
    ranks.together(lambda: _check_share((first, second), ranks))
    try:
        check_same_parameters(first.layout, second.layout)
    except LayoutError as error:
        raise VerifyError(str(error)) from None
    plan = Plan(first.layout, second.layout, ranks.world, "direct")
    capacity = _capacity(plan, memory)
    ranks.agree("plan", plan.digest(plan.table_digest()))
    ranks.phase("verify")
    found = ranks.gather(_compare(Side(first, capacity), Side(second, capacity), plan, ranks))
    _raise_on(f"`{one}` and `{other}`", [problem for part, _ in found for problem in part])
    total = size_text(first.layout.total_bytes())
    return [
        *_warning({copy for _, part in found for copy in part}),
        f"equal: {len(plan.names)} parameters, {total}: {one} ({first.layout.name}) "
        f"and {other} ({second.layout.name})",
        *_widened(first.layout, second.layout),
    ]


def _widened(one: Layout, other: Layout) -> list[str]:
    """One line on parameters that have a wider dtype on one side, if there are any."""
    pairs = {
        name: (slots[0].dtype, other.places[name][0].dtype) for name, slots in one.places.items()
    }
    names = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    if not names:
        return []
    ours, theirs = (str(dtype).removeprefix("torch.") for dtype in pairs[names[0]])
    return [
        f"of these, {len(names)} have the same values in another dtype, first `{names[0]}`: {ours} "
        f"against {theirs}"
    ]


def _check_share(scans: Sequence[Scan], ranks: Ranks) -> None:
    """Check the headers of this rank's share of the files."""
    for scan in scans:
        common.check_headers(scan, scan.layout.files[ranks.rank :: ranks.world])


def _scan(path: Path, options: Options) -> Scan:
    return without_padding(formats.detect(path).scan(path, options))


def _capacity(plan: Plan, memory: int) -> int:
    """The size of each side's buffer; too little memory is refused with the least that works."""
    capacity = plan.least_capacity(ALIGN)
    least = -(-(RESERVED_BYTES + 2 * capacity) >> 20)
    if memory < least << 20:
        raise ConfigError(
            f"engine.memory: {memory / (1 << 20):g}MiB is too little to compare these; "
            f"the least that works is {least}MiB"
        )
    return capacity


class Side:
    """One of two checkpoints: where it lies, and what of it is in memory."""

    def __init__(self, scan: Scan, capacity: int) -> None:
        self.root = scan.root
        self.files = Files(scan.root, os.O_RDONLY)
        self.buffer = Buffer(capacity)
        self._places = SourcePlaces(scan.root, scan.layout.container)
        self._parts: list[Part] = []

    def load(self, wanted: Sequence[tuple[int, StoredTensor]]) -> None:
        """Read all places of one block."""
        self.buffer.clear()
        stored = [tensor for _, tensor in wanted]
        self._parts = load(stored, self.files, self._places, self.buffer)

    def first(self) -> list[Part]:
        """What tiles the block."""
        return [part for part in self._parts if part.stored.copy == 0]

    def differing_copies(self) -> Iterator[tuple[Part, Part]]:
        """Each further place that differs from the first one, after the latter."""
        for copy in self._parts:
            for part in self.first() if copy.stored.copy else ():
                if _unequal(part, copy, self.buffer, self.buffer) is not None:
                    yield part, copy


def _compare(
    one: Side, other: Side, plan: Plan, ranks: Ranks
) -> tuple[list[str], set[tuple[str, str]]]:
    """Among the blocks of this rank, a line per parameter that differs, and copies that may."""
    problems: dict[str, str] = {}
    allowed: set[tuple[str, str]] = set()
    for move in plan.moves(ranks.rank):
        ranks.step()
        one.load(move.reads)
        other.load(move.pieces)
        found = _difference(move.block.parameter, one, other)
        for side in (one, other):
            for part, copy in side.differing_copies():
                if copy.stored.slot.strict:
                    found = found or _copy_text(side.root, part.stored, copy.stored)
                else:
                    allowed.add((copy.stored.key, str(side.root / copy.stored.file)))
        if found:
            problems.setdefault(move.block.parameter, found)
    one.files.close()
    other.files.close()
    return list(problems.values()), allowed


def _copy_text(root: Path, first: StoredTensor, copy: StoredTensor) -> str:
    return (
        f"`{root / copy.file}`: tensor `{copy.key}` differs from its copy `{first.key}` "
        f"in `{first.file}`"
    )


def _warning(copies: Collection[tuple[str, str]]) -> list[str]:
    """One line on copies that differ where they may, if there are any."""
    if not copies:
        return []
    key, file = min(copies)
    return [
        f"warning: {len(copies)} copies of replicated tensors differ from the first coordinate's, "
        f"which is compared; first `{key}` in `{file}`"
    ]


def _difference(parameter: str, one: Side, other: Side) -> str | None:
    """Where a block differs between the two sides, its first element and both values."""
    for ours in one.first():
        for theirs in other.first():
            found = _unequal(ours, theirs, one.buffer, other.buffer)
            if found is not None:
                return f"`{parameter}`{found} (`{ours.stored.file}` against `{theirs.stored.file}`)"
    return None


def _unequal(ours: Part, theirs: Part, here: Buffer, there: Buffer) -> str | None:
    """The first element in which two parts differ where they meet, compared as bits.

    Where one dtype holds every value of the other, in the wider one.
    """
    region, dtypes = (
        ours.stored.region & theirs.stored.region,
        (ours.stored.dtype, theirs.stored.dtype),
    )
    if region is None:
        return None
    wide = max(dtypes, key=lambda dtype: dtype.itemsize)
    if not all(dtype == wide or dtype in WIDENED.get(wide, ()) for dtype in dtypes):
        return f": {dtypes[0]} against {dtypes[1]}"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wide.itemsize]
    for window in ours.packed.windows:
        box = window.region & region
        if box is None:
            continue
        for copy in copies(ours.packed, theirs.packed, box):
            first, strides = copy.source
            one = here.view(dtypes[0]).as_strided(copy.shape, strides, ours.element() + first)
            first, strides = copy.target
            other = there.view(dtypes[1]).as_strided(copy.shape, strides, theirs.element() + first)
            pair = [side.to(wide).view(bits) for side in (one, other)]
            if not torch.equal(*pair):
                place = tuple((pair[0] != pair[1]).nonzero()[0].tolist())
                values = (side[place].item() for side in (one, other))
                return f" near {list(box.start)}: {next(values)!r} against {next(values)!r}"
    return None
