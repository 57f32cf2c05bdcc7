"""Traffic and balance at the bound: on random ways between the real formats, and on real models.

A block stands for the most bytes that one block has of what is shared out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.bounds import loads_by_node
from reshard.layout import Layout
from reshard.moves import Load, loads_of
from reshard.plan import Plan
from reshard.topologies import read_model
from reshard.traffic import loads_by_rank
from tests import local_files
from tests.commands import done, move, write
from tests.layouts import layout_of
from tests.oracles.compare import assert_same_files
from tests.ranks import run_ranks
from tests.traffic import Count, concerned, counted, moves_by, moves_of, sharing
from tests.two_nodes import Pair
from tests.ways import Way, deep_ways, ways

Check = Callable[..., None]
Tries = Callable[[int], Callable[[Check], Check]]

EVEN = 1.05
# Random models are small: their ranks have few blocks each, of many sizes.
FEW = 3


@pytest.fixture
def tries(long: bool) -> Tries:
    """How many ways are tried: as many as are said, or many more."""

    def settled(count: int) -> Any:
        many = count * (50 if long else 1)
        slow = [HealthCheck.too_slow, HealthCheck.nested_given]
        return settings(max_examples=many, deadline=None, suppress_health_check=slow)

    return settled


def mapped(layout: Layout) -> int:
    """Bytes of a layout's tensors without their padding."""
    contents = [content for file in layout.files for content in layout.contents(file)]
    constants = sum(constant.content.nbytes for constant in layout.constants)
    return sum(content.nbytes - content.padding_bytes for content in contents) - constants


def check_bytes(plan: Plan, found: Count) -> None:
    """Nothing is read, sent or written twice, and the plan's own figures say so."""
    assert list(loads_by_rank(plan)) == found.loads
    assert sum(load.read for load in found.loads) == mapped(plan.source)
    assert sum(load.written for load in found.loads) == mapped(plan.target)


def over(values: Sequence[float], block: float) -> float:
    """By how many bytes the largest is over the mean and some blocks."""
    return max(values) - EVEN * sum(values) / len(values) - block


# ------------------------------------------------------------------------------ element by element


def test_bytes_are_touched_once_and_shared_out_evenly(tries: Tries) -> None:
    """In collective mode: what crosses is what a writer lacks, and ties are split."""

    @tries(40)
    @given(ways(mode="collective"))
    def check(way: Way) -> None:
        plan = way.plan()
        found = counted(plan)
        check_bytes(plan, found)
        shares = [*found.read.values()]
        shares += found.written.values() if way.writers == "owner" else ()
        for share in shares:
            assert over(share.own(), FEW * share.block) <= 0, share
        if way.writers == "nearest" and not plan.local:
            for load, fair in zip(found.loads, found.fair, strict=True):
                assert load.written <= EVEN * fair + 2 * FEW * found.blocks[1]

    check()


def test_in_direct_mode_nothing_crosses_and_shares_are_even(tries: Tries) -> None:
    @tries(25)
    @given(ways(mode="direct"))
    def check(way: Way) -> None:
        plan = way.plan()
        found = counted(plan)
        check_bytes(plan, found)
        assert not any(load.sent or load.received for load in found.loads)
        for kind, block in zip(("read", "written"), found.blocks, strict=True):
            assert over([getattr(load, kind) for load in found.loads], FEW * block) <= 0

    check()


def test_a_rank_goes_through_just_the_moves_that_concern_it(tries: Tries) -> None:
    @tries(15)
    @given(ways(), st.integers(0, 63))
    def check(way: Way, number: int) -> None:
        plan, rank = way.plan(), number % way.world
        expected = [move for move in moves_of(plan) if rank in concerned(move)]
        assert moves_by(plan, rank) == expected

    check()


def test_a_file_is_written_by_one_machine_and_no_more_crosses_than_must(tries: Tries) -> None:
    @tries(25)
    @given(ways(mode="collective"), st.integers(1, 4), st.booleans())
    def check(way: Way, count: int, by_turns: bool) -> None:
        ranks = range(way.world)
        machines = tuple(r % count if by_turns else r * count // way.world for r in ranks)
        plan = way.plan(machines=tuple(sorted(set(machines)).index(one) for one in machines))
        found = counted(plan)
        check_bytes(plan, found)
        for file, nbytes in found.files.items():
            assert len({machines[rank] for rank in np.flatnonzero(nbytes)}) == 1, file

    check()


# ------------------------------------------------------------------------------------- many layers


def test_no_rank_falls_behind_layer_by_layer(tries: Tries) -> None:
    """One block too many in each layer comes to a lot."""

    @tries(40)
    @given(deep_ways())
    def check(way: Way) -> None:
        plan = way.plan()
        check_even(plan, loads_by_rank(plan), 2 * FEW)

    check()


def check_even(plan: Plan, loads: Sequence[Load], blocks: int) -> None:
    """Ranks that share a coordinate do as much; and all that write what they or any have read."""
    block, everyone = largest(plan), [tuple(range(plan.world))]
    direct, owner = plan.exchange == "direct", plan.writers == "owner"
    first, copied = ((), 0) if direct or owner else taken_alone(plan)
    for share in everyone if direct else shares_of(plan.source, plan.world):
        read = [loads[rank].read for rank in share]
        assert over(read, blocks * block["read"]) <= 0, read
    for share in shares_of(plan.target, plan.world) if owner else everyone:
        written = {rank: loads[rank].written for rank in share}
        limit = EVEN * (sum(written.values()) - copied) / len(share) + blocks * block["written"]
        for rank, nbytes in written.items():
            assert nbytes - copied * (rank in first) <= limit, written


def shares_of(layout: Layout, world: int) -> list[tuple[int, ...]]:
    """The ranks of each coordinate."""
    places = layout.coordinates
    return [sharing(place, places, range(world)) for place in range(places)]


def taken_alone(plan: Plan) -> tuple[tuple[int, ...], int]:
    """Of what is not cut, the first source file's is taken: its readers, and what they write."""
    copied = 0
    for name, slots in plan.source.places.items():
        cut = slots[0].placement.cut
        if cut.copies == cut.parts and plan.source.coordinates > 1:
            target = plan.target.places[name][0]
            size = slots[0].placement.shape[0] * target.dtype.itemsize
            copied += size * target.placement.cut.copies
    return shares_of(plan.source, plan.world)[0], copied


def largest(plan: Plan) -> Counter[str]:
    """The most bytes that one block has a rank read and write; those of a parameter are alike."""
    found: Counter[str] = Counter()
    for name in plan.names:
        blocks = list(plan.blocks(name))
        for block in {blocks[0], blocks[len(blocks) // 2]}:
            for load in loads_of(plan.move(block)).values():
                found |= Counter(read=load.read, written=load.written)
    return found


# -------------------------------------------------------------------------------------- real models

SIDES: dict[str, tuple[str, dict[str, int]]] = {
    "meta8": ("meta", {"tp": 8}),
    "meta16": ("meta", {"tp": 16}),
    "tp4": ("nanotron", {"tp": 4}),
    "tp8": ("nanotron", {"tp": 8}),
    "tp8pp2": ("nanotron", {"tp": 8, "pp": 2}),
    "hf": ("hf", {"max_shard_bytes": 1 << 30}),
    "fsdp8": ("fsdp", {"dp": 8}),
    "fsdp64": ("fsdp", {"dp": 64}),
}
ONE, EIGHT, SEVENTY = "llama3.2-1b", "llama3-8b", "llama3.3-70b"  # of these, the first is tied
COLLECTIVE = [
    (ONE, "meta8", "tp4", 16),
    (ONE, "fsdp8", "hf", 24),
    (EIGHT, "meta16", "hf", 16),
    (SEVENTY, "meta8", "tp4", 1024),
    (SEVENTY, "meta8", "fsdp64", 64),
    (SEVENTY, "fsdp64", "tp8", 1024),
]
IN_DIRECT_MODE = [
    (ONE, "meta8", "tp4", 8),
    (ONE, "hf", "meta8", 2),
    (EIGHT, "meta8", "hf", 24),
    (SEVENTY, "meta8", "fsdp64", 1024),
]
ON_MACHINES = [
    (EIGHT, "tp8", "nearest"),
    (EIGHT, "tp8", "owner"),
    (SEVENTY, "hf", "nearest"),
    (EIGHT, "fsdp64", "owner"),
]


def named(way: tuple[object, ...]) -> str:
    return "-".join(map(str, way))


def real(model: str, source: str, target: str, world: int, *mode: str, **more: Any) -> Plan:
    known = read_model(model)
    sides = [layout_of(known, SIDES[name][0], **SIDES[name][1]) for name in (source, target)]
    return Plan(*sides, world, *mode, **more)


@pytest.mark.parametrize("way", COLLECTIVE, ids=named)
def test_ranks_of_a_real_model_read_and_write_alike(way: tuple[str, str, str, int]) -> None:
    plan = real(*way)
    check_even(plan, loads_by_rank(plan), FEW)


@pytest.mark.parametrize("way", IN_DIRECT_MODE, ids=named)
def test_direct_shares_of_a_real_model_are_even_up_to_a_block(
    way: tuple[str, str, str, int],
) -> None:
    plan = real(*way, "direct")
    check_even(plan, loads_by_rank(plan), 1)


@pytest.mark.parametrize(("source", "target", "most"), [("meta8", "tp4", 0), ("tp8pp2", "hf", 0.1)])
def test_little_crosses_between_machines_that_keep_apart(
    source: str, target: str, most: float
) -> None:
    """Nothing between layouts that are cut alike; of a stage, what goes into a file with others."""
    number = tuple(rank // 8 for rank in range(16))
    plan = real(SEVENTY, source, target, 16, "collective", "nearest", machines=number)
    machines = loads_by_node(plan, loads_by_rank(plan), 8)
    written = [machine.written for machine in machines]
    assert sum(machine.sent for machine in machines) <= most * sum(written)
    assert max(written) <= 1.1 * sum(written) / len(written)


@pytest.mark.parametrize("machines", [2, 8])
@pytest.mark.parametrize(("model", "target", "writers"), ON_MACHINES)
def test_machines_write_alike_where_there_are_many_files(
    model: str, target: str, writers: str, machines: int
) -> None:
    number = tuple(rank // 8 for rank in range(8 * machines))
    plan = real(model, "meta8", target, len(number), "collective", writers, machines=number)
    written = np.zeros(machines)
    np.add.at(written, list(number), [load.written for load in loads_by_rank(plan)])
    assert written.max() <= 1.3 * written.mean(), written


# ------------------------------------------------------------------------------- files of one's own

ALONE = [("meta8", "tp4", "owner"), ("hf5", "meta2", "nearest"), ("tp2pp2", "hf", "nearest")]


def test_ranks_that_see_their_own_files_only_read_each_byte_once(tmp_path: Path) -> None:
    for source, target, _ in ALONE:
        whole = write(source, tmp_path / source)
        done(*move(source.rstrip("5"), whole, target, tmp_path / f"{source}-{target}"))
    for world in (3, 5):
        check_alone(tmp_path, tmp_path / str(world), world)


def check_alone(ready: Path, root: Path, world: int) -> None:
    """So many ranks make of the sources what one made, whose targets stand beside them."""
    pairs = []
    for source, target, writers in ALONE:
        local_files.deal_out(ready / source, root / source, world)
        more = (f"engine.writers={writers}",)
        pairs.append(Pair(root / source, source.rstrip("5"), target, more))
    (root / "scratch").mkdir()
    by_rank = run_ranks(world, local_files.run_here, pairs, root / "scratch")
    for number, (source, target, _) in enumerate(ALONE):
        found = [rank[number] for rank in by_rank]
        assert [foreign for _, foreign in found] == [[]] * world
        extents = [extent for read, _ in found for extent in read]
        for file, times in local_files.times_read(ready / source, extents).items():
            assert (times == 1).all(), f"{file}: {np.unique(times, return_counts=True)}"
        assert_same_files(root / source / "dst", ready / f"{source}-{target}")
