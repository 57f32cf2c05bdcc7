"""In which rounds blocks are moved: all ranks find the same ones, and each expands only its own.

What a block puts on its crew is the same for all blocks of one shape whose crews have the same
ranks in common: such a pattern is found once, by expanding one of them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from reshard.dealing import Ranks
from reshard.moves import Block, Move, loads_of
from reshard.plan import Plan

FIELDS = ("read", "sent", "received", "written")


@dataclass(frozen=True, slots=True)
class Round:
    """Moves that fit the buffers of all ranks together: those that concern one rank.

    `nbytes` counts the blocks of all ranks, and `crossing` says whether any rank sends anything.
    """

    moves: Sequence[Move]
    nbytes: int
    crossing: bool


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """What blocks put on their crews.

    `loads` are (seat, place in FIELDS, bytes), each seat the first one of its rank, and `largest`
    is the most bytes among them; `crossing` are the bytes that pass from one seat to another, and
    `nbytes` those of a block. `ties` are as a move has them. `example` is one of the blocks, and
    `crew` its ranks. A plan may have thousands of patterns: they hold no moves.
    """

    loads: tuple[tuple[int, int, int], ...]
    crossing: tuple[tuple[int, int, int], ...]
    nbytes: int
    largest: int
    ties: int
    example: Block
    crew: Ranks


class Patterns:
    """The patterns of a plan; `align` rounds each part of a load up to so many bytes."""

    def __init__(self, plan: Plan, align: int | None = None) -> None:
        self._plan, self._align = plan, align
        self._known: dict[tuple[object, int], Pattern] = {}
        self._ties: dict[object, int] = {}

    def along(self, name: str, blocks: Iterable[int]) -> Iterator[tuple[int, Ranks, Pattern]]:
        """For some blocks of a parameter: the block, its crew, and its pattern."""
        plan, shapes = self._plan, self._plan.crews.teams[name].form.shapes
        crews, crew_of = plan.crews, plan.crew_of(name)
        for block in blocks:
            crew = crew_of(block)
            kind = shapes[block], self._common(crew)
            tie = crews.tie(name, block) % ties if (ties := self._ties.get(kind, 1)) > 1 else 0
            pattern = self._known.get((kind, tie))
            if pattern is None:
                pattern = self._found(kind, plan.move(plan.block(name, block)), crew)
            yield block, crew, pattern

    def _common(self, crew: Ranks) -> object:
        """What ranks, and what machines, seats have in common."""
        ranks = tuple(map(crew.index, crew)) if len(set(crew)) < len(crew) else None
        if not self._plan.machines:
            return ranks
        machines = [self._plan.machines[rank] for rank in crew]
        return ranks, tuple(map(machines.index, machines))

    def _found(self, kind: object, move: Move, crew: Ranks) -> Pattern:
        """The pattern of a kind of blocks, of which there is one for each tie that matters."""
        self._ties[kind] = move.ties
        tie = self._plan.crews.tie(move.block.parameter, move.block.index) % move.ties
        loads = tuple(
            (crew.index(rank), place, getattr(load, field))
            for rank, load in loads_of(move, self._align).items()
            for place, field in enumerate(FIELDS)
            if getattr(load, field)
        )
        crossing = Counter[tuple[int, int]]()
        for message in move.messages:
            crossing[crew.index(message.reader), crew.index(message.writer)] += message.nbytes
        pattern = Pattern(
            loads,
            tuple((*seats, nbytes) for seats, nbytes in crossing.items()),
            move.block.region.numel * move.pieces[0][1].dtype.itemsize,
            max(nbytes for *_, nbytes in loads),
            move.ties,
            move.block,
            crew,
        )
        self._known[kind, tie] = pattern
        return pattern

    def of(self, name: str) -> Iterator[tuple[int, Ranks, Pattern]]:
        """For all blocks of a parameter, in row order: the block, its crew, and its pattern."""
        return self.along(name, range(self._plan.blocks_in(name)))


def moved(plan: Plan, rank: int) -> Iterator[tuple[str, Sequence[int]]]:
    """The blocks that `rank` has to go through, by parameter, in the order of their moving.

    In collective mode these are all blocks, in direct mode its own.
    """
    if plan.exchange == "direct":
        for name, own in groupby(plan.own_blocks(rank), key=lambda block: block.parameter):
            yield name, [block.index for block in own]
        return
    for name in plan.order:
        yield name, plan.crews.teams[name].form.order


def moves(plan: Plan, rank: int) -> Iterator[Move]:
    """The moves that `rank` has to go through, in the order of their moving."""
    for name, blocks in moved(plan, rank):
        for block in blocks:
            yield plan.move(plan.block(name, block))


def rounds(plan: Plan, rank: int, capacity: int, align: int) -> Iterator[Round]:
    """Moves in groups for which no rank reads, sends, receives or writes over `capacity` bytes.

    Each part is counted rounded up to `align` bytes. All ranks get as many rounds in collective
    mode, in each of which some may have nothing to do.
    """
    patterns = Patterns(plan, align)
    own: list[Move] = []
    loads, nbytes, crossing = [0] * (len(FIELDS) * plan.world), 0, False
    for name, blocks in moved(plan, rank):
        for block, crew, pattern in patterns.along(name, blocks):
            places = [
                (len(FIELDS) * crew[seat] + place, size) for seat, place, size in pattern.loads
            ]
            if nbytes and any(loads[place] + size > capacity for place, size in places):
                yield Round(own, nbytes, crossing)
                own, loads = [], [0] * len(loads)
                nbytes, crossing = 0, False
            for place, size in places:
                loads[place] += size
            nbytes += pattern.nbytes
            crossing = crossing or bool(pattern.crossing)
            # Who might have kept a piece has a seat, and may have nothing to do.
            if rank in crew and any(crew[seat] == rank for seat, *_ in pattern.loads):
                own.append(plan.move(plan.block(name, block)))
    if nbytes:
        yield Round(own, nbytes, crossing)


def ample_capacity(plan: Plan, align: int) -> int:
    """At least `least_capacity`, and told at once: what all ranks together have of any block."""
    forms = {team.form for team in plan.crews.teams.values()}
    return max((form.bulk + form.parts * align for form in forms), default=0)


def least_capacity(plan: Plan, align: int) -> int:
    """The largest load that any single block puts on a rank: no round can be smaller."""
    patterns, least = Patterns(plan, align), 0
    settled: set[object] = set()
    for name in plan.names:
        team = plan.crews.teams[name]
        if team in settled:
            continue
        found = {pattern for *_, pattern in patterns.of(name)}
        least = max([least, *(pattern.largest for pattern in found)])
        if team.fixed and not plan.machines and all(pattern.ties == 1 for pattern in found):
            settled.add(team)
    return least
