"""Runs and copies against a naive map from elements to places."""

from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.geometry import Region, row_major, whole
from reshard.layout import Layout, StoredTensor
from reshard.packing import Copy, Packed, copies, packed, plain, shift
from reshard.placement import Cut, Placement, chunked, uncut
from reshard.plan import Plan
from tests.layouts import (
    Case,
    cases,
    config_of,
    elements,
    fused,
    layout_of,
    layout_pairs,
    placements,
    shapes_of_parameters,
)


def places_of(
    placement: Placement, shard: int, region: Region, strides: tuple[int, ...] | None = None
) -> dict[tuple[int, ...], int]:
    """Where each element of a region that a shard holds lies in its file, one by one."""
    shape = placement.stored_shape(shard)
    numbers = torch.arange(whole(shape).numel)
    if strides is not None:
        size = 1 + sum(step * (n - 1) for step, n in zip(strides, shape, strict=True))
        numbers = torch.arange(size).as_strided(shape, strides).flatten()
    found = {}
    for window in placement.windows(shard, region):
        for index in elements(window.region):
            local = [a - b for a, b in zip(index, window.region.start, strict=True)]
            steps = sum(a * b for a, b in zip(local, window.strides, strict=True))
            found[index] = int(numbers[window.offset + steps])
    return found


def places_in(part: Packed) -> dict[tuple[int, ...], int]:
    """Where each element lies in the file, through the packed buffer."""
    buffer = [first + step for first, count in part.runs for step in range(count)]
    found: dict[tuple[int, ...], int] = {}
    for window in part.windows:
        for index in elements(window.region):
            local = [a - b for a, b in zip(index, window.region.start, strict=True)]
            steps = sum(a * b for a, b in zip(local, window.strides, strict=True))
            assert index not in found, "an element has two windows"
            found[index] = buffer[window.offset + steps]
    return found


def check_runs(part: Packed, count: int) -> None:
    """Runs are not empty, share no element, and hold as many as were asked for."""
    touched = [first + step for first, length in part.runs for step in range(length)]
    assert all(length > 0 for _, length in part.runs)
    assert len(touched) == len(set(touched)) == count


@st.composite
def parts(draw) -> tuple[Placement, int, Region, int]:
    """A placement, a shard, and any box of the parameter."""
    shape, head = draw(shapes_of_parameters())
    placement = draw(placements(shape, whole_heads=head))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    stops = [draw(st.integers(a + 1, size)) for a, size in zip(starts, shape, strict=True)]
    shard = draw(st.integers(0, placement.cut.parts - 1))
    return placement, shard, Region(tuple(starts), tuple(stops)), head


@settings(max_examples=300, deadline=None)
@given(parts())
def test_a_packed_part_holds_every_element_where_the_file_has_it(part):
    placement, shard, region, _ = part
    expected = places_of(placement, shard, region)
    found = packed(placement, shard, region)
    assert places_in(found) == expected
    check_runs(found, len(expected))
    if not placement.interleaved or _whole_heads(placement, shard, region):
        assert list(found.runs) == sorted(found.runs)
    starts = [window.region.start for window in found.windows]
    assert starts == sorted(starts)


@settings(max_examples=300, deadline=None)
@given(parts(), st.randoms(use_true_random=False), st.integers(0, 2))
def test_a_part_of_a_tensor_with_odd_strides_is_found_too(part, random, gap):
    placement, shard, region, _ = part
    shape = placement.stored_shape(shard)
    if whole(shape).numel == 0:
        return
    order = random.sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step = step * shape[dim] + gap
    expected = places_of(placement, shard, region, tuple(strides))
    found = packed(placement, shard, region, tuple(strides))
    assert places_in(found) == expected
    check_runs(found, len(expected))


def test_row_major_strides_change_nothing():
    placement = Placement((6, 4), Cut(1, 4, 2, 2))
    box = Region((1, 1), (5, 3))
    for shard in (0, 1):
        plain_part = packed(placement, shard, box)
        odd = packed(placement, shard, box, row_major(placement.stored_shape(shard)))
        assert (odd.runs, odd.windows) == (plain_part.runs, plain_part.windows)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_copies_carry_each_element_of_a_region_once(data):
    shape, head = data.draw(shapes_of_parameters())
    source, target = (data.draw(placements(shape, whole_heads=head)) for _ in range(2))
    box = whole(shape)
    ours = packed(source, data.draw(st.integers(0, source.cut.parts - 1)), box)
    theirs = packed(target, data.draw(st.integers(0, target.cut.parts - 1)), box)
    starts = [data.draw(st.integers(0, size - 1)) for size in shape]
    region = Region(tuple(starts), tuple(shape))
    here, there = _numbers(ours, shape), torch.full((2 + _size(theirs),), -1)
    for copy in copies(ours, theirs, region):
        copy.run(here, 1, there, 2)
    expected = torch.full((2 + _size(theirs),), -1)
    known = {index for window in ours.windows for index in elements(window.region)}
    inside = known & set(elements(region))
    for window in theirs.windows:
        for index in elements(window.region):
            local = [a - b for a, b in zip(index, window.region.start, strict=True)]
            place = sum(a * b for a, b in zip(local, window.strides, strict=True))
            if index in inside:
                expected[2 + window.offset + place] = _number(index, shape)
    assert torch.equal(there, expected)
    moved = sum(whole(copy.shape).numel for copy in copies(ours, theirs, region))
    assert moved == (expected >= 0).sum()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_needs_no_copy_lies_in_the_source_as_the_target_has_it(data):
    shape, head = data.draw(shapes_of_parameters())
    source = data.draw(placements(shape, whole_heads=head))
    target = source if data.draw(st.booleans()) else data.draw(placements(shape, whole_heads=head))
    ours = packed(source, data.draw(st.integers(0, source.cut.parts - 1)), whole(shape))
    shard = data.draw(st.integers(0, target.cut.parts - 1))
    for region in target.regions(shard):
        theirs = packed(target, shard, region)
        first = shift(ours, theirs, region)
        numbers = _numbers(ours, shape)
        expected = torch.full((_size(theirs),), -1)
        held = {index for window in ours.windows for index in elements(window.region)}
        for window in theirs.windows:
            for index in elements(window.region):
                local = [a - b for a, b in zip(index, window.region.start, strict=True)]
                place = sum(a * b for a, b in zip(local, window.strides, strict=True))
                if index in held:
                    expected[window.offset + place] = _number(index, shape)
        if first is not None:
            assert torch.equal(numbers[1 + first :][: len(expected)], expected)
        elif expected.numel() and (expected >= 0).all():
            assert not any(
                torch.equal(numbers[at : at + len(expected)], expected)
                for at in range(len(numbers) - len(expected) + 1)
            )


def test_copies_that_go_backwards_are_not_joined():
    """Torch has no negative strides."""
    first, second = (Copy((2,), (at, (1,)), (10 - at, (1,))) for at in (0, 4))
    assert first.apart(second) is None
    assert second.apart(first) is None
    assert first.apart(Copy((2,), (4, (1,)), (13, (1,)))) == (4, 3)
    assert first.apart(Copy((3,), (4, (1,)), (13, (1,)))) is None


@pytest.mark.parametrize("heads", [1, 2, 7])
def test_rotary_heads_are_swapped_in_one_copy(heads):
    shape = (6 * heads, 5)
    halves, pairs = (
        packed(Placement(shape, uncut(shape[0]), interleaved=n), 0, whole(shape)) for n in (0, 6)
    )
    for source, target in ((halves, pairs), (pairs, halves)):
        (copy,) = copies(source, target, whole(shape))
        numbers, found = torch.arange(30 * heads), torch.full((30 * heads,), -1)
        copy.run(numbers, 0, found, 0)
        rows = numbers.view(heads, 2, 3, 5) if source is halves else numbers.view(heads, 3, 2, 5)
        assert torch.equal(found, rows.transpose(1, 2).flatten())


def test_a_copy_casts_between_dtypes():
    one, other = plain(whole((2, 3))), packed(Placement((2, 3), uncut(2)), 0, whole((2, 3)))
    source = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 1.00390625], dtype=torch.float32)
    target = torch.zeros(6, dtype=torch.bfloat16)
    for copy in copies(one, other, whole((2, 3))):
        copy.run(source, 0, target, 0)
    assert torch.equal(target, source.to(torch.bfloat16))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_plain_region_is_row_major(shape):
    region = Region(tuple(2 for _ in shape), tuple(2 + size for size in shape))
    part = plain(region)
    assert part.runs == ((0, region.numel),)
    numbers = torch.arange(region.numel)
    assert torch.equal(part.windows[0].view(numbers).flatten(), numbers)


# Runs of blocks: whole rows, and whole heads where any layout interleaves them.


def merged(parts: list[Packed]) -> list[tuple[int, int]]:
    """The runs of several parts of one stored tensor, as one where they touch; none may overlap."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(run for part in parts for run in part.runs):
        assert not found or sum(found[-1]) <= first, "two parts hold one element"
        if found and sum(found[-1]) == first:
            found[-1] = found[-1][0], found[-1][1] + count
        else:
            found.append((first, count))
    return found


def groups_in(placement: Placement, regions: list[Region]) -> int:
    """How often rows of others stand between the rows of regions, and one for the first."""
    if placement.groups is None or placement.groups.rows == placement.groups.stride:
        return 1
    rows = {row for region in regions for row in range(region.start[0], region.stop[0])}
    return len({row // placement.groups.rows for row in rows})


def check_block(members: list[StoredTensor]) -> None:
    """All parts of one stored tensor on one block.

    A shard is row-major, so that whole rows of it lie one behind the other, of whatever box: its
    own columns are all that it holds, and heads are permuted within the block. Only a fused tensor
    has rows of other parameters between the groups of this one's.
    """
    slot, shard = members[0].slot, members[0].shard
    placement, regions = slot.placement, [stored.region for stored in members]
    parts = [packed(placement, shard, region) for region in regions]
    runs = merged(parts)
    assert len(runs) == groups_in(placement, regions), (members[0].file, members[0].key)
    touched = torch.zeros(whole(members[0].shape).numel, dtype=torch.bool)
    for stored in members:
        for window in stored.windows:
            window.view(touched).fill_(True)
    assert touched.sum() == sum(count for _, count in runs)
    assert touched.sum() == sum(region.numel for region in regions)
    assert all(touched[first : first + count].all() for first, count in runs)
    if between_heads(placement, shard):
        assert len(members) == 1
        assert list(parts[0].runs) == runs, "it is read in more steps than it has to be"


def check_blocks(layout: Layout, blocks: Iterable[tuple[str, Region]]) -> int:
    """Every stored tensor on every block; how many there were, apart from those alike."""
    seen = set()
    for parameter, region in blocks:
        tensors: dict[tuple[object, ...], list[StoredTensor]] = {}
        for stored in layout.tensors_on(parameter, region):
            tensors.setdefault((stored.file, stored.key, stored.slot), []).append(stored)
        for members in tensors.values():
            geometry = (members[0].slot.placement, members[0].shard, region)
            if geometry not in seen:
                seen.add(geometry)
                check_block(members)
    return len(seen)


def between_heads(placement: Placement, shard: int) -> bool:
    """Whether a shard holds whole heads, where it matters."""
    box, head = placement.box(shard), placement.interleaved
    if not head:
        return True
    row = box.start[0], box.stop[0]
    if placement.lead is not None:
        row = box.start[1], box.stop[1]
    elif placement.groups is not None:
        row = placement.groups.before(row[0]), placement.groups.before(row[1])
    return all(place % head == 0 for place in row)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_block_is_one_run_in_every_stored_tensor(case: Case):
    """Over the blocks that a plan makes."""
    layout = case.layout()
    plan = Plan(layout, layout, 1)
    blocks = [(block.parameter, block.region) for name in plan.names for block in plan.blocks(name)]
    assert check_blocks(layout, blocks)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_any_whole_heads_and_whole_rows_are_one_run(case: Case):
    layout = case.layout()
    assert check_blocks(layout, whole_units(layout))


def whole_units(layout: Layout) -> Iterator[tuple[str, Region]]:
    """Some whole rows, or heads, of every parameter."""
    for name, slots in layout.places.items():
        shape = slots[0].placement.shape
        grain = max(1, *(slot.placement.interleaved for slot in slots))
        units = shape[0] // grain
        for low, high in ((0, 1), (units // 3, units), (units // 2, units // 2 + 1)):
            yield name, Region((low * grain, *(0 for _ in shape[1:])), (high * grain, *shape[1:]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout_pairs())
def test_blocks_of_random_layouts_are_one_run_too(pair):
    for layout in pair:
        blocks = [(name, whole(slots[0].placement.shape)) for name, slots in layout.places.items()]
        assert check_blocks(layout, [*blocks, *whole_units(layout)])


def test_a_fused_tensor_is_one_run_for_each_group_of_heads():
    layout = layout_of(config_of("a"), "titan", chunks=fused(config_of("a"), 1))
    query, key = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qk")
    head, hidden = 6, 72
    for name, first, heads in ((query, 0, 2), (key, 2, 1)):
        box = whole(layout.places[name][0].placement.shape)
        (stored,) = layout.tensors_on(name, box)
        assert packed(stored.slot.placement, stored.shard, box).runs == tuple(
            ((group * 4 + first) * head * hidden, heads * head * hidden) for group in range(6)
        )


def test_gate_and_up_are_one_run_each_in_the_tensor_that_stacks_them():
    model = config_of("a")
    layout = layout_of(model, "titan", chunks=fused(model, 1))
    for lead, kind in enumerate(("gate", "up")):
        name = f"model.layers.0.mlp.{kind}_proj.weight"
        box = whole(layout.places[name][0].placement.shape)
        (stored,) = layout.tensors_on(name, box)
        assert packed(stored.slot.placement, stored.shard, box).runs == (
            (lead * box.numel, box.numel),
        )


def test_a_chunk_that_ends_inside_a_head_is_one_run_of_alternate_rows():
    placement = Placement((6, 2), chunked(6, 2), interleaved=6)
    parts = [packed(placement, 0, region) for region in placement.regions(0)]
    assert [part.runs for part in parts] == [((0, 2), (4, 2)), ((2, 2),)]
    assert merged(parts) == [(0, 6)]


def test_columns_are_one_run_per_row_in_ascending_order():
    placement = Placement((3, 8), uncut(3))
    part = packed(placement, 0, Region((0, 2), (3, 5)))
    assert part.runs == ((2, 3), (10, 3), (18, 3))


def test_half_a_rotary_head_is_every_second_row():
    placement = Placement((8, 2), uncut(8), interleaved=4)
    part = packed(placement, 0, Region((0, 0), (2, 2)))
    assert part.runs == ((0, 2), (4, 2))


def _whole_heads(placement: Placement, shard: int, region: Region) -> bool:
    """Whether a part holds whole rows of whole rotary heads, as blocks do."""
    rows = (region.start[0], region.stop[0])
    held = placement.regions(shard)
    common = [(own, own & region) for own in held]
    whole_rows = all(part is None or part.shape[1:] == own.shape[1:] for own, part in common)
    return (
        whole_rows
        and between_heads(placement, shard)
        and all(row % placement.interleaved == 0 for row in rows)
    )


def _size(part: Packed) -> int:
    return sum(count for _, count in part.runs)


def _number(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return sum(a * b for a, b in zip(index, row_major(shape), strict=True))


def _numbers(part: Packed, shape: tuple[int, ...]) -> torch.Tensor:
    """A packed buffer behind one other element; each element is its index in the parameter."""
    buffer = torch.full((1 + _size(part),), -2)
    for window in part.windows:
        view = buffer.as_strided(window.region.shape, window.strides, 1 + window.offset)
        for index in elements(window.region):
            view[tuple(a - b for a, b in zip(index, window.region.start, strict=True))] = _number(
                index, shape
            )
    return buffer
