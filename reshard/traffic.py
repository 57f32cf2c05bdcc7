"""What a plan moves from rank to rank, and who reads and writes which stored tensor. Pure.

Parameters that are alike are counted once, and so are their blocks: of a thousand, most have the
same parts, the same readers and the same turn.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reshard.blocks import Firsts
from reshard.dealing import Ranks
from reshard.layout import Layout, StoredTensor
from reshard.moves import Load, Move, written_by
from reshard.plan import Plan
from reshard.schedule import FIELDS, Pattern, Patterns

# A stored tensor of a parameter: its place among the parameter's slots, and its shard.
Stored = tuple[int, int]


@dataclass(slots=True)
class Flow:
    """The bytes that one block, or all of a parameter, put on ranks, on wires and on files.

    `passed[reader, writer]` are bytes in the narrower of the two dtypes: they cross the network
    where the two ranks differ, and stay where they are the same. `reads` and `writes` say how many
    bytes of each stored tensor a rank reads or writes.
    """

    loads: dict[int, Load] = field(default_factory=dict)
    passed: dict[tuple[int, int], int] = field(default_factory=dict)
    reads: dict[Stored, dict[int, int]] = field(default_factory=dict)
    writes: dict[Stored, dict[int, int]] = field(default_factory=dict)

    def crossing(self) -> int:
        """Bytes that go from one rank to another."""
        return sum(nbytes for (reader, writer), nbytes in self.passed.items() if reader != writer)


@dataclass(frozen=True, slots=True, eq=False)
class _Shares:
    """What the blocks of one pattern bring about, by seat; shards are counted from the first."""

    passed: tuple[tuple[int, int, int], ...]
    reads: tuple[tuple[Stored, int, int], ...]
    writes: tuple[tuple[Stored, int, int], ...]


def loads_by_rank(plan: Plan) -> tuple[Load, ...]:
    """Bytes of every rank over the whole job, without alignment."""
    totals = [[0] * plan.world for _ in FIELDS]
    patterns = Patterns(plan)
    for name in plan.names:
        for _, crew, pattern in patterns.of(name):
            for seat, place, nbytes in pattern.loads:
                totals[place][crew[seat]] += nbytes
    return tuple(itertools.starmap(Load, zip(*totals, strict=True)))


def flows(plan: Plan) -> Iterator[tuple[Flow, tuple[str, ...]]]:
    """Every parameter's flow, once for all parameters that are alike, and their names."""
    patterns, shares = Patterns(plan), dict[Pattern, _Shares]()
    alike: dict[object, tuple[Flow, list[str]]] = {}
    for name in plan.names:
        firsts = plan.crews.teams[name].form.firsts
        counts: Counter[tuple[Pattern, Ranks, Firsts]] = Counter(
            (pattern, crew, firsts[block]) for block, crew, pattern in patterns.of(name)
        )
        key = frozenset(counts.items())
        if key not in alike:
            alike[key] = Flow(), []
            for (pattern, crew, first), count in counts.items():
                if pattern not in shares:
                    shares[pattern] = _shares_of(plan, pattern)
                _add(alike[key][0], (pattern, shares[pattern]), crew, first, count)
        alike[key][1].append(name)
    yield from ((flow, tuple(names)) for flow, names in alike.values())


def _add(
    flow: Flow, block: tuple[Pattern, _Shares], crew: Ranks, first: Firsts, count: int
) -> None:
    """Count blocks of one pattern, crew and first shards in."""
    pattern, shares = block
    for seat, place, nbytes in pattern.loads:
        load, field = flow.loads.setdefault(crew[seat], Load()), FIELDS[place]
        setattr(load, field, getattr(load, field) + nbytes * count)
    for reader, writer, nbytes in shares.passed:
        pair = crew[reader], crew[writer]
        flow.passed[pair] = flow.passed.get(pair, 0) + nbytes * count
    for held, parts, shards in (
        (flow.reads, shares.reads, first[0]),
        (flow.writes, shares.writes, first[1]),
    ):
        for (place, shard), seat, nbytes in parts:
            ranks = held.setdefault((place, shards[place] + shard), {})
            ranks[crew[seat]] = ranks.get(crew[seat], 0) + nbytes * count


def _shares_of(plan: Plan, pattern: Pattern) -> _Shares:
    """What a block of a pattern brings about."""
    block, seat = pattern.example, pattern.crew.index
    move, first = plan.move(block), plan.crews.teams[block.parameter].form.firsts[block.index]
    return _Shares(
        tuple((seat(reader), seat(writer), n) for (reader, writer), n in _passed(move).items()),
        *(
            tuple(
                ((place, stored.shard - shards[place]), seat(rank), stored.nbytes)
                for place, (rank, stored) in zip(_places(layout, parts), parts, strict=True)
            )
            for layout, parts, shards in (
                (plan.source, move.reads, first[0]),
                (plan.target, move.pieces, first[1]),
            )
        ),
    )


def _places(layout: Layout, parts: Sequence[tuple[int, StoredTensor]]) -> list[int]:
    """The place of each part among those of its parameter."""
    # Slots are told apart by identity: equal ones may hold a parameter twice.
    slots = layout.places[parts[0][1].slot.parameter]
    places = {id(slot): place for place, slot in enumerate(slots)}
    return [places[id(stored.slot)] for _, stored in parts]


def _passed(move: Move) -> dict[tuple[int, int], int]:
    """What each writer of a block gets from each reader, itself included, each element once."""
    passed: dict[tuple[int, int], int] = {}
    needed: dict[int, int] = {}
    for writer in {writer for writer, _ in move.pieces}:
        itemsize = min(move.reads[0][1].dtype.itemsize, move.pieces[0][1].dtype.itemsize)
        needed[writer] = sum(box.numel for box in written_by(writer, move.pieces)) * itemsize
    for message in move.messages:
        pair = message.reader, message.writer
        passed[pair] = passed.get(pair, 0) + message.nbytes
        needed[message.writer] -= message.nbytes
    passed |= {(writer, writer): nbytes for writer, nbytes in needed.items() if nbytes}
    return passed
