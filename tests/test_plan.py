"""The plan against brute force: arrays of elements, and loops over ranks."""

import ast
import contextlib
import hashlib
import re
import tracemalloc
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise, product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import reshard
from reshard import blocks
from reshard.buffers import READING
from reshard.dealing import deal, files_of
from reshard.encodings import ENCODINGS
from reshard.errors import ConfigError
from reshard.geometry import Region, whole
from reshard.layout import Layout, Slot
from reshard.moves import Load, Move, loads_of
from reshard.placement import Boxes, Cut, Placement, uncut
from reshard.plan import Plan
from reshard.room import reserved_bytes
from reshard.schedule import ample_capacity, least_capacity, moves, rounds
from reshard.topologies import read_model
from reshard.traffic import loads_by_rank
from tests.layouts import cases, config_of, fused, layout_of, layout_pairs

MODES = [("collective", "nearest"), ("collective", "owner"), ("direct", "nearest")]
slow_inputs = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextlib.contextmanager
def small_blocks(nbytes: int) -> Iterator[None]:
    """Blocks of so few bytes that a tiny parameter has many."""
    with mock.patch.object(blocks, "MIN_BLOCK_BYTES", nbytes):
        yield


@st.composite
def sights(draw: st.DrawFn, files: tuple[str, ...], world: int) -> dict[str, tuple[int, ...]]:
    """Files that only some ranks see: those of a node, or any others."""
    groups = st.lists(st.integers(0, world - 1), min_size=1, max_size=world, unique=True)
    some = draw(st.lists(groups, min_size=1, max_size=3))
    seen = {file: tuple(sorted(draw(st.sampled_from(some)))) for file in files}
    return {file: ranks for file, ranks in seen.items() if len(ranks) < world}


@st.composite
def plans(draw: st.DrawFn, *, mode: str | None = None, machines: bool = False) -> Plan:
    """A plan of random layouts for a few ranks, with its block size decided."""
    source, target = draw(layout_pairs())
    modes = [pair for pair in MODES if mode in (None, pair[0])]
    world, (exchange, writers) = draw(st.integers(1, 7)), draw(st.sampled_from(modes))
    local = {}
    if exchange == "collective" and draw(st.booleans()):
        local = draw(sights(source.files, world))
    apart: tuple[int, ...] = ()
    if machines and exchange == "collective" and draw(st.booleans()):
        apart = tuple(draw(st.integers(0, 2)) for _ in range(world))
    plan = Plan(source, target, world, exchange, writers, local=local, machines=apart)
    with small_blocks(draw(st.sampled_from((1, 32, 128)))):
        assert plan.block_bytes >= 1  # cached from here on
    return plan


REAL = {
    "meta6 to tp3pp2": ("meta", {"tp": 6}, "nanotron", {"tp": 3, "pp": 2}),
    "tp2pp5 to meta3": ("nanotron", {"tp": 2, "pp": 5}, "meta", {"tp": 3}),
    "hf to tp6": ("hf", {}, "nanotron", {"tp": 6, "pp": 1, "rope_interleaved": True}),
    "meta2 to hf": ("meta", {"tp": 2, "embedding_dim": 1}, "hf", {}),
    "fsdp5 to titan on two axes": ("fsdp", {"dp": 5}, "titan", {"dp": 3, "tp": 2}),
    "titan7 to tp2": ("titan", {"dp": 7}, "nanotron", {"tp": 2}),
    "fused titan to hf": ("titan", {"fused": 5}, "hf", {}),
}


def real_plan(name: str, world: int, exchange: str, writers: str, **model) -> Plan:
    source, ours, target, theirs = REAL[name]
    kind = config_of("a", **model)
    if "fused" in ours:
        ours = {"chunks": fused(kind, ours["fused"])}
    return Plan(
        layout_of(kind, source, **ours), layout_of(kind, target, **theirs), world, exchange, writers
    )


def all_moves(plan: Plan) -> list[Move]:
    """Every move of the job once, by the plan's own order."""
    if plan.exchange == "collective":
        return list(moves(plan, 0))
    return [move for rank in range(plan.world) for move in moves(plan, rank)]


def box(region: Region, origin: Region) -> tuple[slice, ...]:
    """A region as an index of an array that lies on `origin`."""
    pairs = zip(region.start, region.stop, origin.start, strict=True)
    return tuple(slice(start - first, stop - first) for start, stop, first in pairs)


# Blocks.


@slow_inputs
@given(plans())
def test_blocks_tile_each_parameter_with_whole_rows_and_whole_heads(plan):
    indices = []
    for name in plan.names:
        slots = plan.source.places[name] + plan.target.places[name]
        shape = slots[0].placement.shape
        grain = max(1, *(slot.placement.interleaved for slot in slots))
        row = 0
        row_bytes = whole(shape[1:]).numel * max(slot.dtype.itemsize for slot in slots)
        for block in plan.blocks(name):
            assert block.parameter == name
            assert block.region.start == (row, *(0 for _ in shape[1:]))
            assert block.region.stop[1:] == shape[1:]
            row = block.region.stop[0]
            assert row % grain == 0
            height = block.region.shape[0]
            assert 0 < height <= max(plan.block_bytes // row_bytes, grain)
            indices.append(block.index)
        assert row == shape[0]
    assert indices == [i for name in plan.names for i in range(plan.blocks_in(name))]
    assert len(indices) == plan.block_count()


def shards_cut_rows_only(placement: Placement) -> bool:
    """Whether every shard holds whole rows, all of those that it reaches."""
    space = placement.whole or placement.shape
    boxes = [placement.box(shard) for shard in range(placement.cut.parts)]
    return placement.lead is None and all(box.shape[1:] == space[1:] for box in boxes if box.numel)


def shard_ends(placement: Placement) -> set[int]:
    """The rows at which a shard of whole rows begins or ends, counted as they are stored."""
    boxes = [placement.box(shard) for shard in range(placement.cut.parts)]
    ends = {end for box in boxes if box.numel for end in (box.start[0], box.stop[0])}
    groups = placement.groups
    if groups is None:
        return ends
    rows = [groups.stored(row) for row in range(placement.shape[0])]
    return {sum(row < end for row in rows) for end in ends}


def check_homes(plan: Plan) -> int:
    """A block has one home in each slot unless a shard's end cuts a head, or shards cut columns.

    How many blocks and slots there were for which this was so.
    """
    count = 0
    for name in plan.names:
        slots = plan.source.places[name] + plan.target.places[name]
        grain = max(1, *(slot.placement.interleaved for slot in slots))
        straight = [slot.placement for slot in slots if shards_cut_rows_only(slot.placement)]
        ends = {placement: shard_ends(placement) for placement in straight}
        for block in plan.blocks(name):
            inside = range(block.region.start[0] + 1, block.region.stop[0])
            for placement in straight:
                assert all(end % grain for end in ends[placement] if end in inside)
                if any(end in inside for end in ends[placement]):
                    continue
                held = [
                    (shard, region)
                    for shard in range(placement.cut.parts)
                    for own in placement.regions(shard)
                    if (region := own & block.region) is not None
                ]
                assert [region for _, region in held] == [block.region] * placement.cut.copies
                homes = {shard // placement.cut.copies for shard, _ in held}
                assert len(homes) == 1
                count += 1
    return count


@slow_inputs
@given(plans())
def test_a_block_has_one_home_unless_that_would_cut_a_head_or_columns_are_cut(plan):
    check_homes(plan)


CUT = [case for case in cases() if case.format in ("nanotron", "fsdp", "titan")]


@pytest.mark.parametrize("case", CUT, ids=str)
def test_blocks_of_real_layouts_have_one_home(case):
    """Beside files that hold whole heads, their rows interleaved: Meta's, or else Nanotron's."""
    llama = case.model.model_type == "llama"
    interleaved = {} if llama else {"rope_interleaved": True}
    other = layout_of(case.model, "meta" if llama else "nanotron", tp=1, **interleaved)
    assert check_homes(Plan(case.layout(), other, 1))
    assert check_homes(Plan(other, case.layout(), 1))


@slow_inputs
@given(layout_pairs(), st.integers(1, 9), st.sampled_from(MODES))
def test_the_block_table_depends_on_the_layouts_only(pair, world, mode):
    one, other = Plan(*pair, 1), Plan(*pair, world, *mode)
    assert [list(one.blocks(name)) for name in one.names] == [
        list(other.blocks(name)) for name in other.names
    ]
    assert one.table_digest() == other.table_digest()


@pytest.mark.parametrize(
    ("total", "expected"),
    [(0, 4 << 10), (1 << 20, 4 << 10), (5 << 20, 8 << 10), (3 << 30, 4 << 20), (1 << 40, 4 << 20)],
)
def test_blocks_are_4_mib_or_less_for_small_models(total, expected):
    assert blocks.block_bytes(total) == expected


# Who reads.


@pytest.mark.parametrize("world", range(1, 20))
@pytest.mark.parametrize("coordinates", [1, 2, 3, 4, 8, 13])
def test_coordinates_belong_to_ranks_by_the_rule(coordinates, world):
    dealt = deal(coordinates, world)
    for coordinate in range(coordinates):
        if coordinates >= world:
            expected = [coordinate % world]
        else:
            expected = [rank for rank in range(world) if rank % coordinates == coordinate]
        assert list(dealt[coordinate]) == expected


@slow_inputs
@given(plans(mode="collective"))
def test_each_rank_reads_and_as_owner_writes_only_what_it_owns(plan):
    def owns(rank: int, coordinate: int, coordinates: int) -> bool:
        if coordinates >= plan.world:
            return coordinate % plan.world == rank
        return rank % coordinates == coordinate

    for move in all_moves(plan):
        for rank, stored in move.reads:
            if stored.file not in plan.local:
                assert owns(rank, stored.coordinate, plan.source.coordinates)
        for rank, piece in move.pieces if plan.writers == "owner" else ():
            assert owns(rank, piece.coordinate, plan.target.coordinates)


def test_ranks_that_share_a_coordinate_read_alike():
    plan = real_plan("meta2 to hf", 6, "collective", "nearest")
    totals = dict(enumerate(loads_by_rank(plan)))
    for coordinate in (0, 1):
        read = [totals[rank].read for rank in range(coordinate, 6, 2)]
        assert max(read) <= 1.1 * min(read)


def test_readers_and_owners_may_be_named():
    source, target = (layout_of(config_of("b"), "meta", tp=tp) for tp in (3, 1))
    plan = Plan(source, target, 4, "collective", "owner", ((3,), (2,), (0,)), ((1,),))
    for move in moves(plan, 0):
        assert all(rank == (3, 2, 0)[stored.coordinate] for rank, stored in move.reads)
        assert {rank for rank, _ in move.pieces} == {1}


@slow_inputs
@given(plans(mode="collective"))
def test_a_rank_reads_only_files_that_it_sees(plan):
    for move in moves(plan, 0):
        for rank, stored in move.reads:
            assert rank in plan.local.get(stored.file, range(plan.world))


def on_two_nodes(name: str, world: int, writers: str = "nearest") -> Plan:
    """The first half of the files seen by the first half of the ranks, the rest by the rest."""
    plan, half = real_plan(name, world, "collective", writers), world // 2
    files = plan.source.files
    local = {file: tuple(range(half)) for file in files[: len(files) // 2]}
    local |= {file: tuple(range(half, world)) for file in files[len(files) // 2 :]}
    return replace(plan, local=local)


@pytest.mark.parametrize("writers", ["nearest", "owner"])
@pytest.mark.parametrize("world", [2, 4, 12])
@pytest.mark.parametrize("name", ["meta6 to tp3pp2", "hf to tp6", "tp2pp5 to meta3"])
def test_what_a_node_sees_is_dealt_evenly_over_its_ranks(name, world, writers):
    plan = on_two_nodes(name, world, writers)
    expected = {rank: Load() for rank in range(world)} | counted(all_moves(plan), 1)
    totals = dict(enumerate(loads_by_rank(plan)))
    assert totals == expected
    align = 64
    largest_block = max(largest(counted([move], align)) for move in all_moves(plan))
    assert least_capacity(plan, align) == largest_block
    for node in (range(world // 2), range(world // 2, world)):
        read = [totals[rank].read for rank in node]
        if name != "tp2pp5 to meta3":  # whose stages are of different sizes
            shares = 2 if name == "meta6 to tp3pp2" and world == 4 else 1  # three files, two ranks
            assert max(read) <= 1.1 * shares * min(read)


def test_a_file_that_a_coordinates_rank_does_not_see_is_read_by_one_that_does():
    plan = on_two_nodes("meta6 to tp3pp2", 4)
    readers = {(stored.file, rank) for move in moves(plan, 0) for rank, stored in move.reads}
    assert {file: sorted(r for f, r in readers if f == file) for file, _ in readers} == {
        f"consolidated.{number:02d}.pth": [rank] for number, rank in enumerate((0, 1, 0, 2, 3, 2))
    }


def test_the_parameters_of_all_nodes_are_taken_in_turn():
    """Whole tensors, as many on each node and one node's first: both nodes have work all along."""
    names = [f"p{number}" for number in range(40)]
    slots = [Slot(n, Placement((4, 4), uncut(4)), n, "k", torch.float32) for n in names]
    layout = Layout("x", "safetensors", 1, tuple(slots))
    local = {name: (number // 20,) for number, name in enumerate(names)}
    plan = Plan(layout, layout, 2, local=local)
    readers = [move.reads[0][0] for move in moves(plan, 0)]
    assert all(abs(2 * sum(readers[:stop]) - stop) <= 2 for stop in range(len(readers)))


def alike_but_for_who_sees_them() -> Plan:
    """Parameters of one shape in two halves of columns, each half in a file of its own.

    Some begin at the same turn of ranks, and of those some at another turn of five that share.
    """
    seen = [((0,), (0,)), ((0,), (1,)), ((1, 2), (1, 2)), ((1, 2, 3, 4, 5), (0,)), ((3, 4), (5,))]
    names = [f"p{number}" for number in range(8 * len(seen))]
    halves = Placement((24, 8), Cut(1, 8, 4, parts=2))
    source = [Slot(n, halves, n + "-{shard}", "k", torch.float32) for n in names]
    target = [Slot(n, Placement((24, 8), uncut(24)), n, "k", torch.float32) for n in names]
    local = {
        f"{name}-{shard}": ranks
        for number, name in enumerate(names)
        for shard, ranks in enumerate(seen[number // 8])
    }
    plan = Plan(
        Layout("x", "safetensors", 2, tuple(source)),
        Layout("y", "safetensors", 1, tuple(target)),
        6,
        local=local,
    )
    with small_blocks(1):
        assert plan.block_count() == 12 * len(names)
    return plan


def test_parameters_that_others_see_put_other_loads_on_ranks():
    plan = alike_but_for_who_sees_them()
    expected = {rank: Load() for rank in range(6)} | counted(all_moves(plan), 1)
    assert dict(enumerate(loads_by_rank(plan))) == expected
    least = max(largest(counted([move], 64)) for move in all_moves(plan))
    assert least_capacity(plan, 64) == least
    assert largest(counted([next(moves(plan, 0))], 64)) == least


def test_files_are_looked_at_by_ranks_that_see_them():
    files = [f"f{number}" for number in range(9)]
    assert [files_of(rank, 3, files, {}) for rank in range(3)] == [files[r::3] for r in range(3)]
    local = {"f0": (2,), "f1": (1, 2), "f2": (1, 2), "f8": (0,)}
    shares = [files_of(rank, 3, files, local) for rank in range(3)]
    assert sorted(file for share in shares for file in share) == files
    for rank, share in enumerate(shares):
        assert all(rank in local.get(file, range(3)) for file in share)
    assert shares[1] == ["f2", "f4", "f7"]


def test_local_files_rule_out_direct_exchange():
    plan = on_two_nodes("meta6 to tp3pp2", 4)
    message = "`consolidated.00.pth` is seen by ranks 0-1 alone; use engine.exchange=collective"
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(plan, exchange="direct")


def test_a_digest_knows_who_sees_what_and_is_as_before_where_all_see_all():
    plan = on_two_nodes("meta6 to tp3pp2", 4)
    everywhere = replace(plan, local={})
    parts = ("job", 4, "collective", "nearest", everywhere.readers, everywhere.owners)
    assert everywhere.digest("job") == hashlib.sha256(repr(parts).encode()).hexdigest()
    fewer = replace(plan, local=dict(list(plan.local.items())[1:]))
    assert len({p.digest("job") for p in (plan, everywhere, fewer)}) == 3
    assert plan.table_digest() == everywhere.table_digest()


@slow_inputs
@given(plans())
def test_each_element_is_read_once_and_written_once_wherever_it_stands(plan):
    for layout, side in ((plan.source, "reads"), (plan.target, "pieces")):
        hits = {
            (slot.file_of(shard), slot.key_of(shard), slot.parameter): np.zeros(
                slot.placement.shape, int
            )
            for slot in layout.slots
            for shard in range(slot.placement.cut.parts)
        }
        expected = {place: table.copy() for place, table in hits.items()}
        for slot in layout.slots:
            for shard in range(slot.placement.cut.parts):
                table = expected[slot.file_of(shard), slot.key_of(shard), slot.parameter]
                for held in slot.placement.regions(shard):
                    table[box(held, whole(table.shape))] += 1
        for move in all_moves(plan):
            for rank, stored in getattr(move, side):
                assert 0 <= rank < plan.world
                table = hits[stored.file, stored.key, move.block.parameter]
                table[box(stored.region, whole(table.shape))] += 1
        assert all(np.array_equal(hits[place], expected[place]) for place in hits)


# Who writes, and what crosses.


def readers_of(move: Move) -> np.ndarray:
    """The rank that reads the first place of each element of a block."""
    readers = np.full(move.block.region.shape, -1)
    for rank, stored in move.reads:
        if stored.copy == 0:
            place = box(stored.region, move.block.region)
            assert (readers[place] == -1).all()
            readers[place] = rank
    assert (readers >= 0).all()
    return readers


@slow_inputs
@given(plans(mode="collective"))
def test_nearest_writers_hold_most_of_a_piece(plan):
    assume(plan.writers == "nearest")
    for move in all_moves(plan):
        readers = readers_of(move)
        for rank, piece in move.pieces:
            held = np.bincount(readers[box(piece.region, move.block.region)].ravel())
            assert rank < len(held)
            assert held[rank] == held.max()


@slow_inputs
@given(plans())
def test_messages_carry_each_element_to_each_writer_that_lacks_it_once(plan):
    for move in all_moves(plan):
        readers = readers_of(move)
        for writer in range(plan.world):
            needed = np.zeros(readers.shape, bool)
            for rank, piece in move.pieces:
                if rank == writer:
                    needed[box(piece.region, move.block.region)] = True
            needed &= readers != writer
            carried = np.zeros(readers.shape, int)
            for message in move.messages:
                if message.writer == writer:
                    place = box(message.region, move.block.region)
                    assert (readers[place] == message.reader).all()
                    assert message.stored.copy == 0
                    assert message.region & message.stored.region == message.region
                    carried[place] += 1
            assert np.array_equal(carried, needed)


@slow_inputs
@given(plans(mode="direct"))
def test_nothing_crosses_in_direct_mode(plan):
    for rank in range(plan.world):
        for move in moves(plan, rank):
            assert not move.messages
            assert {member for member, _ in (*move.reads, *move.pieces)} == {rank}


# The order of work.


def counted(moves: list[Move], align: int) -> dict[int, Load]:
    """Loads by their definition: sums over parts, each rounded up."""
    loads: dict[int, Load] = {}

    def of(rank: int) -> Load:
        return loads.setdefault(rank, Load())

    for move in moves:
        target = move.pieces[0][1].dtype.itemsize
        for rank, stored in move.reads:
            numel = int(np.prod(stored.region.shape))
            of(rank).read += -(-numel * stored.dtype.itemsize // align) * align
        for rank, piece in move.pieces:
            of(rank).written += -(-int(np.prod(piece.region.shape)) * target // align) * align
        for message in move.messages:
            size = min(message.stored.dtype.itemsize, target)
            nbytes = -(-int(np.prod(message.region.shape)) * size // align) * align
            of(message.reader).sent += nbytes
            of(message.writer).received += nbytes
    return loads


def largest(loads: dict[int, Load]) -> int:
    return max(max(load.read, load.sent, load.received, load.written) for load in loads.values())


@slow_inputs
@given(plans(), st.sampled_from((1, 64)))
def test_loads_are_the_bytes_of_a_move(plan, align):
    for move in all_moves(plan):
        assert loads_of(move, align) == counted([move], align)


@slow_inputs
@given(plans(machines=True), st.sampled_from((1, 64)), st.integers(0, 500))
def test_rounds_hold_every_move_once_and_fit_every_rank(plan, align, spare):
    capacity = max(largest(counted([move], align)) for move in all_moves(plan)) + spare
    found = [list(rounds(plan, rank, capacity, align)) for rank in range(plan.world)]
    if plan.exchange == "direct":  # each rank has rounds of its own
        groups = [[item.moves for item in own] for own in found]
        for rank, own in enumerate(groups):
            assert [move for group in own for move in group] == list(moves(plan, rank))
    else:
        whole_order = {move.block: place for place, move in enumerate(moves(plan, 0))}
        together = []
        for same in zip(*found, strict=True):
            assert len({(item.nbytes, item.crossing) for item in same}) == 1
            for rank, item in enumerate(same):
                assert all(rank in concerned(move) for move in item.moves)
            each = {move.block: move for item in same for move in item.moves}
            together.append(sorted(each.values(), key=lambda move: whole_order[move.block]))
            for rank, item in enumerate(same):
                assert list(item.moves) == [m for m in together[-1] if rank in concerned(m)]
            assert same[0].crossing == any(move.messages for move in together[-1])
        assert [move for group in together for move in group] == list(moves(plan, 0))
        groups = [together]
    for own, nbytes in zip(groups, [[item.nbytes for item in own] for own in found], strict=False):
        assert all(own)
        assert all(largest(counted(group, align)) <= capacity for group in own)
        for group, follower in pairwise(own):
            assert largest(counted([*group, follower[0]], align)) > capacity, "could be longer"
        assert nbytes == [sum(block_bytes_of(move) for move in group) for group in own]
    seen = [move.block for own in groups for group in own for move in group]
    expected = [block for name in plan.names for block in plan.blocks(name)]
    place = {name: number for number, name in enumerate(plan.names)}
    assert sorted(seen, key=lambda block: (place[block.parameter], block.index)) == expected


def concerned(move: Move) -> set[int]:
    return {rank for rank, _ in (*move.reads, *move.pieces)}


def block_bytes_of(move: Move) -> int:
    return move.block.region.numel * move.pieces[0][1].dtype.itemsize


@slow_inputs
@given(plans(mode="direct"))
def test_direct_shares_of_each_ratio_are_even_up_to_a_block(plan):
    """For each ratio of what is written to what is read: of these, ranks have even shares."""
    loads = counted(all_moves(plan), 1)
    shares = [loads.get(rank, Load()) for rank in range(plan.world)]
    weights = [
        sum(load.read + load.written for load in counted([move], 1).values())
        for move in all_moves(plan)
    ]
    mean = sum(weights) / plan.world
    ratios = {
        Fraction(blocks.volume(plan.target.places[name]), blocks.volume(plan.source.places[name]))
        for name in plan.names
    }
    for load in shares:
        assert abs(load.read + load.written - mean) <= max(weights) * len(ratios)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("world", [1, 3, 5, 16])
def test_direct_balance_of_real_layouts(name, world):
    plan = real_plan(name, world, "direct", "nearest")
    for kind in ("read", "written"):
        found = [getattr(load, kind) for load in loads_by_rank(plan)]
        slack = 3 * plan.block_bytes  # a block's copies of kv heads and norms count as well
        assert max(found) <= 1.05 * sum(found) / world + slack


def test_collective_moves_keep_all_readers_busy():
    plan = real_plan("meta6 to tp3pp2", 6, "collective", "nearest")
    taken = list(moves(plan, 0))
    for start in range(0, len(taken) - 24, 24):
        reading = {rank for move in taken[start : start + 24] for rank, _ in move.reads}
        assert reading == set(range(6))


# What it comes to.


def parameters_alike_but_for_the_coordinates_of_their_shards() -> Plan:
    """The first and the last begin their turns alike, too."""
    halves, count = Placement((4, 4), Cut(0, 4, 2, 2)), 5
    source = [
        Slot(
            f"p{n}",
            halves,
            "",
            f"k{n}",
            torch.float32,
            spread=(("f0", 0), (f"f{1 + n // 4}", 1 + n // 4)),
            boxed=True,
        )
        for n in range(count)
    ]
    whole_again = Placement((4, 4), uncut(4))
    target = [Slot(f"p{n}", whole_again, f"t{n}", "k", torch.float32) for n in range(count)]
    return Plan(
        Layout("x", "dcpfile", 3, tuple(source)), Layout("y", "safetensors", 3, tuple(target)), 3
    )


def parameters_whose_readers_machines_differ() -> Plan:
    """Of one block each; whether a reader may write what it has depends on whose turn it is."""
    halves = Placement((2, 8), Cut(1, 8, 4, 2))
    source = [Slot(f"p{n}", halves, f"s{n}-{{shard}}", "k", torch.bfloat16) for n in range(8)]
    target = [
        Slot(f"p{n}", Placement((2, 8), uncut(2)), f"t{n}", "k", torch.float32) for n in range(8)
    ]
    layouts = (
        Layout("x", "torchzip", 2, tuple(source)),
        Layout("y", "safetensors", 1, tuple(target)),
    )
    return Plan(*layouts, 8, machines=(0, 1, 1, 0, 0, 0, 1, 1))


@settings(slow_inputs, max_examples=150)
@given(plans(machines=True))
@example(parameters_alike_but_for_the_coordinates_of_their_shards())
@example(parameters_whose_readers_machines_differ())
def test_totals_are_the_sum_over_all_moves(plan):
    expected = {rank: Load() for rank in range(plan.world)} | counted(all_moves(plan), 1)
    assert dict(enumerate(loads_by_rank(plan))) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("world", "model"), [(1, {}), (5, {"tied": True}), (8, {})])
def test_totals_of_real_layouts_are_the_sum_over_all_moves(name, mode, world, model):
    plan = real_plan(name, world, *mode, **model)
    expected = {rank: Load() for rank in range(world)} | counted(all_moves(plan), 1)
    assert dict(enumerate(loads_by_rank(plan))) == expected
    for layout, kind in ((plan.source, "read"), (plan.target, "written")):
        constants = sum(item.content.nbytes for item in layout.constants)
        moved = sum(getattr(load, kind) for load in expected.values())
        assert moved == layout.total_bytes() - constants
    assert sum(load.sent for load in expected.values()) == sum(
        load.received for load in expected.values()
    )


def alike_parameters_at_different_ordinals() -> Plan:
    """Two files hold the same; whether the reader of a block owns one of them changes by block."""
    names = [f"p{number}" for number in range(5)]
    source = [Slot(n, Placement((4, 4), uncut(4)), n, "k", torch.float32) for n in names]
    target = [
        Slot(n, Placement((4, 4), uncut(4, 2)), n + "-{shard}", "k", torch.float32) for n in names
    ]
    return Plan(
        Layout("x", "safetensors", 1, tuple(source)),
        Layout("y", "safetensors", 2, tuple(target)),
        3,
        "collective",
        "owner",
    )


def boxes_around_others() -> Plan:
    """A box that is wanted around all others, which cut it into many messages."""
    shape = (9, 8, 8)
    source = [Slot("p", Placement(shape, Cut(1, 8, 1, 8)), "s-{shard}", "k", torch.bfloat16)]
    places = product(range(0, 8, 2), repeat=2)
    tiles = Boxes(tuple(Region((0, y, x), (9, y + 2, x + 2)) for y, x in places))
    target = [
        Slot("p", Placement(shape, tiles), "t-{shard}", "k", torch.bfloat16),
        Slot("p", Placement(shape, Cut(2, 8, 3, 3)), "u-{shard}", "k", torch.bfloat16),
    ]
    return Plan(
        Layout("x", "torchzip", 8, tuple(source)),
        Layout("y", "safetensors", 16, tuple(target)),
        8,
        "collective",
        "owner",
    )


@settings(slow_inputs, max_examples=150)
@given(plans(machines=True), st.sampled_from((1, 64, 4096)))
@example(alike_parameters_at_different_ordinals(), 1)
@example(boxes_around_others(), 4096)
def test_the_least_capacity_is_the_largest_load_of_a_block(plan, align):
    expected = max(largest(counted([move], align)) for move in all_moves(plan))
    assert least_capacity(plan, align) == expected
    assert ample_capacity(plan, align) >= expected


def test_room_is_for_the_values_of_coded_tensors():
    source = [Slot("p", Placement((64, 32), uncut(64)), "s", "k", torch.bfloat16)]
    coded = replace(source[0], file="t", dtype=torch.float32, encoding=ENCODINGS["q8_0"])
    sides = Layout("x", "safetensors", 1, tuple(source)), Layout("y", "gguf", 1, (coded,))
    with small_blocks(1 << 20):
        plan = Plan(*sides, 1)
        assert ample_capacity(plan, 64) >= least_capacity(plan, 64) == 64 * 32 * 4


def test_digests_differ_where_a_run_differs_and_nowhere_else():
    def digest(world: int = 4, mode: tuple[str, str] = MODES[0], job: str = "job") -> str:
        return real_plan("meta6 to tp3pp2", world, *mode).digest(job)

    assert digest() == digest()
    others = [digest(world=5), digest(mode=MODES[1]), digest(mode=MODES[2]), digest(job="other")]
    assert len({digest(), *others}) == 5


def test_table_digests_differ_where_a_layout_differs():
    model = config_of("a")
    source = layout_of(model, "meta", tp=6)
    targets = [
        layout_of(model, "nanotron", tp=3),
        layout_of(model, "nanotron", tp=3, pp=2),
        layout_of(model, "nanotron", tp=3, rope_interleaved=True),
        layout_of(model, "nanotron", torch.float32, tp=3),
        layout_of(model, "hf"),
        layout_of(model, "hf", max_shard_bytes=20_000),
    ]
    digests = {Plan(source, target, 1).table_digest() for target in targets}
    assert len(digests) == len(targets)


@pytest.mark.parametrize(
    ("exchange", "writers", "message"),
    [
        ("both", "nearest", "unknown exchange `both`"),
        ("collective", "all", "writers `all`"),
        ("direct", "owner", "engine.writers=owner needs engine.exchange=collective"),
    ],
)
def test_unknown_modes_are_refused(exchange, writers, message):
    layout = layout_of(config_of("b"), "hf")
    with pytest.raises(ConfigError, match=message):
        Plan(layout, layout, 1, exchange, writers)


@pytest.mark.parametrize("exchange", ["collective", "direct"])
@pytest.mark.parametrize(
    ("target", "mesh"),
    [("nanotron", {"tp": 8, "pp": 16}), ("fsdp", {"dp": 128}), ("titan", {"dp": 16, "tp": 8})],
)
def test_planning_405b_takes_little_memory(target, mesh, exchange):
    model = read_model("llama3.1-405b")
    tracemalloc.start()
    try:
        plan = Plan(layout_of(model, "meta", tp=16), layout_of(model, target, **mesh), 8, exchange)
        assert plan.digest(plan.table_digest())
        first = list(islice(rounds(plan, 0, 8 << 20, 64), 3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(first) == 3
    assert plan.block_count() > 100_000
    assert peak < 100 << 20


@pytest.mark.parametrize(
    ("model", "source", "target", "world", "beyond"),
    [
        ("llama3.1-405b", ("meta", {"tp": 16}), ("nanotron", {"tp": 8, "pp": 16}), 4096, 0),
        ("llama3.3-70b", ("meta", {"tp": 8}), ("fsdp", {"dp": 4096}), 8, (64 << 20) // 10),
    ],
)
def test_a_plan_keeps_to_what_is_reserved_for_it(model, source, target, world, beyond):
    """Where thousands of shards cut a block, a tenth of engine.memory=64MiB may come on top."""
    described = read_model(model)
    tracemalloc.start()
    try:
        sides = (layout_of(described, kind, **mesh) for kind, mesh in (source, target))
        plan = Plan(*sides, world)
        held = deque(islice(rounds(plan, 0, 8 << 20, 64), 60), READING)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(held) == READING
    assert peak < reserved_bytes(plan) + beyond
    assert reserved_bytes(plan) < 32 << 20


# The plan and what runs it know no format and no model.

CORE = [
    *("plan", "moves", "blocks", "crews", "dealing", "schedule", "traffic", "bounds", "room"),
    *("engine", "earlier", "wire", "carrier", "packing", "buffers", "journal", "storage", "errors"),
]


@pytest.mark.parametrize("module", CORE)
def test_no_word_of_a_format_or_a_model_is_in_the_core(module):
    text = Path(reshard.__file__).with_name(f"{module}.py").read_text()
    words = r"nanotron|\bmeta\b|meta\d|llama|qwen|\brope|qkv"
    words += r"|consolidated|hugging|\bhf\b|lm_head|\bpth\b|fsdp|titan|dcp|\bdtensor"
    found = [line for line in text.splitlines() if re.search(words, line, re.IGNORECASE)]
    assert not found
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert not [text for text in strings if isinstance(text, str) and text.endswith(".weight")]


def test_a_cut_that_shards_cannot_share_evenly_is_planned():
    """Chunks of 3, 3, 1 and none."""
    chunked = Placement((7, 2), Cut(0, 7, 3, 4))
    plain = Placement((7, 2), uncut(7))
    source = Layout("x", "safetensors", 4, (Slot("p", chunked, "s{shard}", "k", torch.float32),))
    target = Layout("y", "safetensors", 1, (Slot("p", plain, "t", "k", torch.float32),))
    plan = Plan(source, target, 2)
    assert plan.row_bounds("p") == (0, 3, 6, 7)
    readers = [[(rank, stored.file) for rank, stored in move.reads] for move in moves(plan, 0)]
    assert sorted(readers) == [[(0, "s0")], [(0, "s2")], [(1, "s1")]]


def test_many_small_shards_are_taken_together():
    """512 shards of two rows: blocks of as many whole shards as they hold; 16 large ones stay."""

    def bounds(parts: int, rows: int) -> tuple[int, ...]:
        shape = (parts * rows, 256)
        cut, plain = Cut(0, shape[0], rows, parts), uncut(shape[0])
        slots = (
            Slot("p", Placement(shape, cut), "s{shard}", "k", torch.float32),
            Slot("p", Placement(shape, plain), "t", "k", torch.float32),
        )
        return blocks.bounds_of(slots, 100 << 10)  # hundred rows

    assert bounds(512, 2) == (*range(0, 1024, 100), 1024)
    assert bounds(512, 15) == tuple(range(0, 512 * 15 + 1, 15))
    assert bounds(16, 2) == tuple(range(0, 33, 2))


def test_chunks_that_cut_rotary_heads_do_not_cut_blocks():
    chunked, heads = Placement((8, 2), Cut(0, 8, 3, 4)), Placement((8, 2), uncut(8), interleaved=4)
    source = Layout("x", "safetensors", 4, (Slot("p", chunked, "s{shard}", "k", torch.float32),))
    target = Layout("y", "safetensors", 1, (Slot("p", heads, "t", "k", torch.float32),))
    assert Plan(source, target, 2).row_bounds("p") == (0, 8)
    with small_blocks(16):
        assert Plan(source, target, 2).row_bounds("p") == (0, 4, 8)


def test_a_block_of_two_boxes_beside_each_other_has_two_readers():
    boxes = Boxes(Region((a, b), (a + 2, b + 3)) for b in (0, 3) for a in (2, 0))
    split = Placement((4, 6), boxes)
    slot = Slot("p", split, "s{shard}", "k", torch.float32, boxed=True)
    plain = Slot("p", Placement((4, 6), uncut(4)), "t", "k", torch.float32)
    source = Layout("x", "dcpfile", 4, (slot,))
    plan = Plan(source, Layout("y", "safetensors", 1, (plain,)), 2)
    assert plan.row_bounds("p") == (0, 2, 4)
    readers = [[(rank, stored.key) for rank, stored in move.reads] for move in moves(plan, 0)]
    assert sorted(readers) == [
        [(0, "k[2, 0]"), (0, "k[2, 3]")],
        [(1, "k[0, 0]"), (1, "k[0, 3]")],
    ]
