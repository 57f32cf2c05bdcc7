"""What a plan moves from rank to rank, and who reads and writes which stored tensor. Pure.

Parameters that are alike are counted once, and so are their blocks: of a thousand, most have the
same parts, the same readers and the same turn.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from reshard.geometry import Region, disjoint
from reshard.layout import Layout, Slot, StoredTensor
from reshard.moves import Block, Load, Move, loads_of, wire_itemsize
from reshard.plan import TIE_PERIOD, Plan

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

    def add(self, other: "Flow", count: int) -> None:
        """Count `other` in, `count` times."""
        for rank, load in other.loads.items():
            self.loads.setdefault(rank, Load()).add(load, count)
        for pair, nbytes in other.passed.items():
            self.passed[pair] = self.passed.get(pair, 0) + nbytes * count
        for mine, theirs in ((self.reads, other.reads), (self.writes, other.writes)):
            for stored, shares in theirs.items():
                held = mine.setdefault(stored, {})
                for rank, nbytes in shares.items():
                    held[rank] = held.get(rank, 0) + nbytes * count


@dataclass(frozen=True, slots=True)
class _Shape:
    """The parts of a block: a number that equal ones share, and what has to be read."""

    number: int
    reads: tuple[StoredTensor, ...]


def loads_by_rank(plan: Plan) -> tuple[Load, ...]:
    """Bytes of every rank over the whole job, without alignment."""
    loads = tuple(Load() for _ in range(plan.world))
    for flow, names in flows(plan):
        for rank, load in flow.loads.items():
            loads[rank].add(load, len(names))
    return loads


def flows(plan: Plan) -> Iterator[tuple[Flow, tuple[str, ...]]]:
    """Every parameter's flow, once for all parameters that are alike, and their names."""
    alike: dict[object, list[str]] = {}
    for name in plan.names:
        alike.setdefault(plan.signature(name) or name, []).append(name)
    shapes: dict[object, list[_Shape]] = {}
    numbers: dict[object, int] = {}
    known: dict[object, Flow] = {}
    for names in alike.values():
        kind = _kind(plan, names[0])
        if kind not in shapes:
            shapes[kind] = [_shape(plan, block, kind, numbers) for block in plan.blocks(names[0])]
        yield _flow(plan, names[0], shapes[kind], known), tuple(names)


def _flow(plan: Plan, parameter: str, shapes: list[_Shape], known: dict[object, Flow]) -> Flow:
    """The flow of one parameter; what its blocks come to is `known` of those that came before."""
    turns = math.lcm(TIE_PERIOD, *map(len, plan.owners)) if plan.writers == "owner" else TIE_PERIOD
    counts: Counter[object] = Counter()
    for block, shape in zip(plan.blocks(parameter), shapes, strict=True):
        readers = tuple(plan.reader(block, stored) for stored in shape.reads)
        key: object = (shape.number, readers, block.ordinal % turns)
        counts[key] += 1
        if key not in known:
            known[key] = _block_flow(plan, plan.move(block))
    flow = Flow()
    for key, count in counts.items():
        flow.add(known[key], count)
    return flow


def _kind(plan: Plan, parameter: str) -> object:
    """What the parts of a parameter's blocks depend on, and which ranks may read and own them."""

    def places(slots: tuple[Slot, ...], *, homes: bool) -> object:
        return tuple(
            (
                *(slot.placement, slot.dtype, slot.encoding),
                (tuple(home for _, home in slot.spread) or slot.coordinate) if homes else None,
            )
            for slot in slots
        )

    return (
        places(plan.source.places[parameter], homes=True),
        places(plan.target.places[parameter], homes=plan.writers == "owner"),
        # Who reads a file that not all ranks see goes by its name.
        parameter if plan.local else None,
    )


def _shape(plan: Plan, block: Block, kind: object, numbers: dict[object, int]) -> _Shape:
    """The shape of a block; its parts are compared by where they lie from its first row on."""
    parts = tuple(
        (place, stored.shard, stored.copy, _from(block, stored.region))
        for layout in (plan.source, plan.target)
        for place, stored in _parts(layout, block)
    )
    number = numbers.setdefault((kind, parts), len(numbers))
    return _Shape(number, tuple(stored for _, stored in _parts(plan.source, block)))


def _parts(layout: Layout, block: Block) -> list[tuple[int, StoredTensor]]:
    """The stored tensors of a block, each with its slot's place."""
    # Slots are told apart by identity: equal ones may hold a parameter twice.
    places = {id(slot): place for place, slot in enumerate(layout.places[block.parameter])}
    found = layout.tensors_on(block.parameter, block.region)
    return [(places[id(stored.slot)], stored) for stored in found]


def _from(block: Block, region: Region) -> Region:
    row = block.region.start[0]
    return Region(
        (region.start[0] - row, *region.start[1:]), (region.stop[0] - row, *region.stop[1:])
    )


def _block_flow(plan: Plan, move: Move) -> Flow:
    flow = Flow(loads_of(move), _passed(move))
    for layout, parts, held in (
        (plan.source, move.reads, flow.reads),
        (plan.target, move.pieces, flow.writes),
    ):
        places = {id(slot): place for place, slot in enumerate(layout.places[move.block.parameter])}
        for rank, stored in parts:
            shares = held.setdefault((places[id(stored.slot)], stored.shard), {})
            shares[rank] = shares.get(rank, 0) + stored.nbytes
    return flow


def _passed(move: Move) -> dict[tuple[int, int], int]:
    """What each writer of a block gets from each reader, itself included, each element once."""
    passed: dict[tuple[int, int], int] = {}
    needed: dict[int, int] = {}
    for writer in {writer for writer, _ in move.pieces}:
        regions = [piece.region for rank, piece in move.pieces if rank == writer]
        itemsize = min(move.reads[0][1].dtype.itemsize, move.pieces[0][1].dtype.itemsize)
        needed[writer] = sum(region.numel for region in disjoint(regions)) * itemsize
    for message in move.messages:
        nbytes = message.region.numel * wire_itemsize(message, move.pieces[0][1])
        pair = message.reader, message.writer
        passed[pair] = passed.get(pair, 0) + nbytes
        needed[message.writer] -= nbytes
    passed |= {(writer, writer): nbytes for writer, nbytes in needed.items() if nbytes}
    return passed
