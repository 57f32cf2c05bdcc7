"""What the picture of a plan shows, as plain numbers. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reshard.layout import Layout
from reshard.moves import Load
from reshard.pictures.bands import Band, band_numbers, bands_of
from reshard.pictures.columns import Columns, columns_of
from reshard.pictures.details import Details
from reshard.pictures.shares import Share, Shares
from reshard.plan import Plan
from reshard.traffic import Flow, flows

MAX_BINS = 64
# With more cells than this, a cell gets fewer stripes, so that the page stays small.
MANY_CELLS, FEW_STRIPES = 1500, 6


@dataclass(frozen=True, slots=True)
class Cell:
    """What the files of a column hold of the parameters of a band.

    `share` numbers its ranks, `files` are the first and the last that hold any of it.
    """

    band: int
    column: int
    nbytes: int
    share: int
    files: tuple[str, ...]
    region: str


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two layouts, and its size in bytes, padding included."""

    layout: Layout
    nbytes: int
    columns: Columns
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is drawn.

    `crossing` has for each band the bytes that cross the network and those that are needed in all.
    `bins` are the ranks that a row or column of the matrix stands for, and `matrix` what passes
    from bin to bin: bytes that cross, and bytes that stay where they are.
    """

    plan: Plan
    source: Side
    target: Side
    bands: tuple[Band, ...]
    crossing: tuple[tuple[int, int], ...]
    shares: tuple[Share, ...]
    order: tuple[int, ...]
    loads: tuple[Load, ...]
    bins: tuple[range, ...]
    matrix: Mapping[tuple[int, int], tuple[int, int]]

    def total(self) -> Load:
        """The bytes of all ranks."""
        total = Load()
        for load in self.loads:
            total.add(load)
        return total

    def needed(self) -> int:
        """Bytes that writers need of what is read, whether they cross the network or not."""
        return sum(needed for _, needed in self.crossing)


Held = dict[tuple[int, int], dict[int, int]]


@dataclass(slots=True)
class _Sums:
    """What the flows of all parameters come to."""

    source: Held
    target: Held
    crossing: list[tuple[int, int]]
    loads: tuple[Load, ...]
    matrix: dict[tuple[int, int], tuple[int, int]]


def figures_of(plan: Plan) -> Figures:
    """Everything that is to be drawn of a plan."""
    source, target = columns_of(plan.source), columns_of(plan.target)
    bands = bands_of(plan, source, target)
    step = -(-plan.world // MAX_BINS)
    sums = _summed(plan, source, target, bands, step)
    order = _order(plan.world, sums.source)
    many = len(sums.source) + len(sums.target) > MANY_CELLS
    shares = Shares(order, FEW_STRIPES) if many else Shares(order)
    sides = [
        Side(
            layout,
            layout.total_bytes(),
            columns,
            _cells(held, shares, Details(layout, columns, bands)),
        )
        for layout, columns, held in (
            (plan.source, source, sums.source),
            (plan.target, target, sums.target),
        )
    ]
    return Figures(
        plan=plan,
        source=sides[0],
        target=sides[1],
        bands=bands,
        crossing=tuple(sums.crossing),
        shares=shares.all(),
        order=order,
        loads=sums.loads,
        bins=tuple(
            range(first, min(plan.world, first + step)) for first in range(0, plan.world, step)
        ),
        matrix=sums.matrix,
    )


def _summed(
    plan: Plan, source: Columns, target: Columns, bands: Sequence[Band], step: int
) -> _Sums:
    """Add all flows up: by band and column on both sides, by rank, and by bins of `step` ranks."""
    rows = band_numbers(bands)
    loads = tuple(Load() for _ in range(plan.world))
    sums = _Sums({}, {}, [(0, 0)] * len(bands), loads, {})
    for flow, names in flows(plan):
        alike = Counter(
            (
                rows[name],
                tuple(source.of(slot) for slot in plan.source.places[name]),
                tuple(target.of(slot) for slot in plan.target.places[name]),
            )
            for name in names
        )
        crossing, needed = flow.crossing(), sum(flow.passed.values())
        for (band, read, written), count in alike.items():
            _add(sums.source, flow.reads, band, read, count)
            _add(sums.target, flow.writes, band, written, count)
            before = sums.crossing[band]
            sums.crossing[band] = before[0] + crossing * count, before[1] + needed * count
        _add_loads(sums, flow, len(names), step)
    return sums


def _add(
    held: Held,
    shares: Mapping[tuple[int, int], Mapping[int, int]],
    band: int,
    columns: Sequence[Sequence[int]],
    count: int,
) -> None:
    for (place, shard), ranks in shares.items():
        cell = held.setdefault((band, columns[place][shard]), {})
        for rank, nbytes in ranks.items():
            cell[rank] = cell.get(rank, 0) + nbytes * count


def _add_loads(sums: _Sums, flow: Flow, count: int, step: int) -> None:
    for rank, load in flow.loads.items():
        sums.loads[rank].add(load, count)
    for (reader, writer), nbytes in flow.passed.items():
        pair = reader // step, writer // step
        crossing, staying = sums.matrix.get(pair, (0, 0))
        if reader == writer:
            sums.matrix[pair] = crossing, staying + nbytes * count
        else:
            sums.matrix[pair] = crossing + nbytes * count, staying


def _order(world: int, source: Held) -> tuple[int, ...]:
    """The place of each rank's colour: ranks that read the same files first lie together."""
    first = [len(source)] * world
    for (_, column), ranks in source.items():
        for rank in ranks:
            first[rank] = min(first[rank], column)
    ordered = sorted(range(world), key=lambda rank: (first[rank], rank))
    places = [0] * world
    for place, rank in enumerate(ordered):
        places[rank] = place
    return tuple(places)


def _cells(held: Held, shares: Shares, details: Details) -> tuple[Cell, ...]:
    return tuple(
        Cell(
            band,
            column,
            sum(ranks.values()),
            shares.number(ranks),
            details.files(band, column),
            details.region(band, column),
        )
        for (band, column), ranks in sorted(held.items())
    )
