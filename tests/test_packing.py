"""Runs and copies against a naive map from elements to places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.geometry import Cut, Placement, Region, row_major, uncut, whole
from reshard.packing import Packed, copies, packed, plain
from reshard.plan import Plan
from tests.layouts import Case, cases, elements, placements, shapes_of_parameters


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


@settings(max_examples=300)
@given(parts())
def test_a_packed_part_holds_every_element_where_the_file_has_it(part):
    placement, shard, region, _ = part
    expected = places_of(placement, shard, region)
    found = packed(placement, shard, region)
    assert places_in(found) == expected
    check_runs(found, len(expected))
    if not placement.interleaved or _whole_heads(placement, region):
        assert list(found.runs) == sorted(found.runs)
    starts = [window.region.start for window in found.windows]
    assert starts == sorted(starts)


@settings(max_examples=300)
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


@settings(max_examples=300)
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


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_block_is_one_run_in_every_stored_tensor(case: Case):
    """By brute force, over the blocks that a plan makes."""
    layout = case.layout()
    plan, seen = Plan(layout, layout, 1), set()
    for block in (block for name in plan.names for block in plan.blocks(name)):
        for stored in layout.tensors_on(block.parameter, block.region):
            geometry = (stored.slot.placement, stored.shard, stored.region)
            if geometry in seen:
                continue
            seen.add(geometry)
            runs = packed(*geometry).runs
            assert len(runs) == 1, (stored.file, stored.key, block)
            touched = torch.zeros(whole(stored.shape).numel, dtype=torch.bool)
            for window in stored.windows:
                window.view(touched).fill_(True)
            first, count = runs[0]
            assert touched[first : first + count].all()
            assert touched.sum() == count == stored.region.numel


@pytest.mark.parametrize("case", cases(), ids=str)
def test_any_whole_heads_and_whole_rows_are_one_run(case: Case):
    layout = case.layout()
    for slot in layout.slots:
        shape, grain = slot.placement.shape, max(1, slot.placement.interleaved)
        units = shape[0] // grain
        for low, high in ((0, 1), (units // 3, units), (units // 2, units // 2 + 1)):
            box = Region((low * grain, *(0 for _ in shape[1:])), (high * grain, *shape[1:]))
            for stored in layout.tensors_on(slot.parameter, box):
                part = packed(stored.slot.placement, stored.shard, stored.region)
                assert len(part.runs) == 1, (stored.file, stored.key, box)
                assert part.runs[0][1] == stored.region.numel


def test_columns_are_one_run_per_row_in_ascending_order():
    placement = Placement((3, 8), uncut(3))
    part = packed(placement, 0, Region((0, 2), (3, 5)))
    assert part.runs == ((2, 3), (10, 3), (18, 3))


def test_half_a_rotary_head_is_every_second_row():
    placement = Placement((8, 2), uncut(8), interleaved=4)
    part = packed(placement, 0, Region((0, 0), (2, 2)))
    assert part.runs == ((0, 2), (4, 2))


def _whole_heads(placement: Placement, region: Region) -> bool:
    """Whether a box holds whole rows of whole rotary heads, as blocks do."""
    rows = (region.start[0], region.stop[0])
    whole_rows = region.shape[1:] == placement.shape[1:] and placement.cut.dim == 0
    return whole_rows and all(row % placement.interleaved == 0 for row in rows)


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
