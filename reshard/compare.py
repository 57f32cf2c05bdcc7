"""Two checkpoints of any layouts, parameter by parameter, in bounded memory on all ranks.

Blocks of both sides are brought into the parameter's own order and compared there: an index is one
into the parameter, whatever the layouts.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from reshard import formats
from reshard.buffers import ALIGN, Buffer, Part, load
from reshard.commit import SourcePlaces
from reshard.differences import (
    Difference,
    Findings,
    converted,
    kind_of,
    kinds_of,
    raise_on,
    warning,
)
from reshard.distributed import Ranks
from reshard.errors import ConfigError, LayoutError, VerifyError
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.geometry import Region, row_major
from reshard.layout import StoredTensor, check_same_parameters
from reshard.moves import Move
from reshard.packing import copies, plain
from reshard.plan import Plan
from reshard.progress import Progress
from reshard.room import RESERVED_BYTES
from reshard.schedule import least_capacity, moves
from reshard.sources import without_padding
from reshard.storage import Files
from reshard.units import size_text
from reshard.values import Kind, comparable, unequal


def against_other(
    one: Path, other: Path, options: Options, memory: int, ranks: Ranks, *, cast: bool = False
) -> list[str]:
    """Compare two checkpoints' parameters bit for bit, in bounded memory, on all ranks.

    A parameter's values are those of its first place; further ones are compared with it. `cast`
    compares what the first checkpoint's values become in the dtype of the second.
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
    sides = Side(first, capacity), Side(second, capacity)
    found = Findings()
    for part in ranks.gather(_compare(sides, plan, ranks, cast=cast)):
        found.add(part)
    raise_on(f"`{one}` and `{other}`", plan, found, cast=cast)
    total = size_text(first.layout.total_bytes())
    return [
        *warning(found.allowed),
        f"equal: {len(plan.names)} parameters, {total}: {one} ({first.layout.name}) "
        f"and {other} ({second.layout.name})",
        *converted(plan, cast=cast),
    ]


def _scan(path: Path, options: Options) -> Scan:
    return without_padding(formats.detect(path).scan(path, options))


def _check_share(scans: Sequence[Scan], ranks: Ranks) -> None:
    """Check the headers of this rank's share of the files."""
    for scan in scans:
        common.check_headers(scan, scan.layout.files[ranks.rank :: ranks.world])


def _capacity(plan: Plan, memory: int) -> int:
    """The size of each of the four buffers; too little memory is refused with the least."""
    capacity = least_capacity(plan, ALIGN)
    least = -(-(RESERVED_BYTES + 4 * capacity) >> 20)
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
        self._buffer, self.scratch = Buffer(capacity), Buffer(capacity)
        self._places = SourcePlaces(scan.root, scan.layout.container)
        self._parts: list[Part] = []

    def load(self, wanted: Sequence[tuple[int, StoredTensor]]) -> None:
        """Read all places of one block."""
        self._buffer.clear()
        stored = [tensor for _, tensor in wanted]
        self._parts = load(stored, self.files, self._places, self._buffer)

    def first(self) -> list[Part]:
        """What tiles the block."""
        return [part for part in self._parts if part.stored.copy == 0]

    def copies(self) -> list[Part]:
        """What holds parts of the block again."""
        return [part for part in self._parts if part.stored.copy]

    def values(self, region: Region, parts: Sequence[Part], scratch: Buffer) -> torch.Tensor:
        """The elements of `region`, each of which lies in one of `parts`, in row-major order.

        They are in `scratch`, or still where they were read to if they lie there in that order.
        """
        dtype = parts[0].stored.dtype
        held = self._buffer.view(dtype)
        if len(parts) == 1 and len(parts[0].packed.windows) == 1:
            window = parts[0].packed.windows[0].narrow(region)
            if window.strides == row_major(region.shape):
                start = parts[0].element() + window.offset
                return held[start : start + region.numel]
        flat = scratch.view(dtype)[: region.numel]
        for part in parts:
            common = part.stored.region & region
            for copy in copies(part.packed, plain(region), common) if common is not None else ():
                copy.run(held, part.element(), flat, 0)
        return flat

    def file_with(self, index: tuple[int, ...]) -> str:
        """The file of the first place of one element of the block."""
        point = Region(index, tuple(place + 1 for place in index))
        return next(part.stored.file for part in self.first() if part.stored.region & point)


def _compare(sides: tuple[Side, Side], plan: Plan, ranks: Ranks, *, cast: bool) -> Findings:
    """What the blocks of this rank show."""
    findings, total = Findings(), plan.source.total_bytes() // ranks.world
    with Progress(total, ranks.rank == 0, ranks.step, "comparing") as progress:
        for move in moves(plan, ranks.rank):
            sides[0].load(move.reads)
            sides[1].load(move.pieces)
            kinds = kinds_of(plan, move.block.parameter)
            if cast or comparable(*kinds):
                found = _difference(move, sides, kinds, cast=cast)
                if found is not None:
                    findings.take(found)
            for side, other in (sides, sides[::-1]):
                _check_copies(side, other.scratch, findings)
            progress.add(sum(stored.nbytes for _, stored in move.reads))
    for side in sides:
        side.files.close()
    return findings


def _difference(
    move: Move, sides: tuple[Side, Side], kinds: tuple[Kind, Kind], *, cast: bool
) -> Difference | None:
    """What differs in one block."""
    region = move.block.region
    ours, theirs = (side.values(region, side.first(), side.scratch) for side in sides)
    found = unequal(ours, theirs, kinds, cast=cast)
    if found is None:
        return None
    index = _index(region, found.place)
    files = sides[0].file_with(index), sides[1].file_with(index)
    return Difference(move.block.parameter, index, found, files)


def _index(region: Region, place: int) -> tuple[int, ...]:
    """The index of the element at a place of a region that is laid out row by row."""
    found = []
    for start, step in zip(region.start, row_major(region.shape), strict=True):
        steps, place = divmod(place, step)
        found.append(start + steps)
    return tuple(found)


def _check_copies(side: Side, scratch: Buffer, findings: Findings) -> None:
    """Compare the further places of a block with its first ones."""
    for copy in side.copies():
        region, stored = copy.stored.region, copy.stored
        parts = [part for part in side.first() if part.stored.region & region]
        kinds = kind_of(parts[0].stored.slot), kind_of(stored.slot)
        first = side.values(region, parts, side.scratch)
        if unequal(first, side.values(region, [copy], scratch), kinds, cast=False) is None:
            continue
        if stored.slot.strict:
            findings.forbidden.add(_copy_text(side.root, parts[0].stored, stored))
        else:
            findings.allowed.add((stored.key, str(side.root / stored.file)))


def _copy_text(root: Path, first: StoredTensor, copy: StoredTensor) -> str:
    return (
        f"`{root / copy.file}`: tensor `{copy.key}` differs from its copy `{first.key}` "
        f"in `{first.file}`"
    )
