"""Cuts, tilings and placements against maps of elements that torch makes by other means."""

import math
import pickle
from itertools import combinations
from operator import sub

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reshard.geometry import Region, Window, whole
from reshard.placement import Boxes, Cut, Groups, Placement, chunked, uncut
from tests.layouts import (
    as_chunks,
    bundles,
    config_of,
    elements,
    layout_of,
    oracle,
    placements,
    shapes_of_parameters,
    tilings,
    together,
)
from tests.oracles import dcp as dcp_oracle
from tests.oracles import rope, titan

many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def index_of(region: Region) -> tuple[slice, ...]:
    """A region as an index."""
    return tuple(map(slice, region.start, region.stop))


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A parameter whose elements are their numbers."""
    return torch.arange(math.prod(shape)).reshape(shape)


def stored_space(placement: Placement, parameter: Tensor) -> Tensor:
    """All that is stored, before it is cut: the parameter's elements, -1 for those of others."""
    rows = parameter
    if placement.interleaved:
        heads = rows.reshape(-1, 2, placement.interleaved // 2, *rows.shape[1:])
        rows = heads.transpose(1, 2).reshape(rows.shape)
    if placement.groups is not None:
        groups = placement.groups
        count = len(rows) // groups.rows
        space = torch.full((count, groups.stride, *rows.shape[1:]), -1)
        inside = slice(groups.first, groups.first + groups.rows)
        space[:, inside] = rows.reshape(count, groups.rows, *rows.shape[1:])
        rows = space.reshape(count * groups.stride, *rows.shape[1:])
    if placement.whole is not None and placement.lead is None:
        padding = placement.whole[0] - len(rows)
        rows = torch.cat([rows, torch.full((padding, *rows.shape[1:]), -1)])
    if placement.lead is not None:
        assert placement.whole is not None
        others = [torch.full_like(rows, -1)] * placement.whole[0]
        rows = torch.stack([*others[: placement.lead], rows, *others[placement.lead + 1 :]])
    return rows


def shards_of(cut: Cut | Boxes, space: Tensor) -> list[Tensor]:
    """What each shard holds of a space."""
    if isinstance(cut, Boxes):
        return [space[index_of(cut.box(n, tuple(space.shape)))] for n in range(cut.parts)]
    pieces = list(space.split(cut.step, cut.dim))
    none = space.narrow(cut.dim, 0, 0)
    pieces += [none] * (cut.parts // cut.copies - len(pieces))
    return [piece for piece in pieces for _ in range(cut.copies)]


def stored_tensor(placement: Placement, shard: Tensor) -> Tensor:
    """The whole stored tensor of a shard, as flat elements."""
    if placement.stored is None:
        return shard.flatten()
    buffer = torch.full((math.prod(placement.stored),), -1)
    buffer[placement.offset : placement.offset + shard.numel()] = shard.flatten()
    return buffer


@st.composite
def placed(draw: st.DrawFn) -> Placement:
    """A placement of a parameter alone, or beside others."""
    if draw(st.booleans()):
        shape, head = draw(shapes_of_parameters())
        return draw(placements(shape, whole_heads=head))
    return draw(st.sampled_from(draw(together(draw(bundles()), draw(st.integers(1, 2))))))


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A box of a tensor that is not empty."""
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    stops = [draw(st.integers(a + 1, size)) for a, size in zip(starts, shape, strict=True)]
    return Region(tuple(starts), tuple(stops))


# Placements.


@many
@given(st.data())
def test_windows_find_each_element_where_torch_puts_it(data):
    placement = data.draw(placed())
    parameter = numbered(placement.shape)
    shards = shards_of(placement.cut, stored_space(placement, parameter))
    assert placement.cut.parts == len(shards)
    asked = data.draw(regions(placement.shape))
    wanted = set(parameter[index_of(asked)].flatten().tolist())
    for shard, held in enumerate(shards):
        if placement.stored is None:
            assert placement.stored_shape(shard) == tuple(held.shape)
        assert placement.box(shard).shape == tuple(held.shape)
        expected = stored_tensor(placement, held)
        assert math.prod(placement.stored_shape(shard)) == len(expected)
        for region in (whole(placement.shape), asked):
            found = torch.full_like(expected, -1)
            for window in placement.windows(shard, region):
                assert window.region & region == window.region
                view = window.view(found)
                assert (view == -1).all(), "two windows hold one stored element"
                view.copy_(parameter[index_of(window.region)])
            kept = [n if region != asked or n in wanted else -1 for n in expected.tolist()]
            assert found.tolist() == kept


@many
@given(placed())
def test_regions_are_disjoint_boxes_of_all_that_a_shard_holds(placement):
    parameter = numbered(placement.shape)
    shards = shards_of(placement.cut, stored_space(placement, parameter))
    for shard, held in enumerate(shards):
        own = placement.regions(shard)
        assert all(region.numel for region in own)
        found = [n for region in own for n in parameter[index_of(region)].flatten().tolist()]
        assert sorted(found) == sorted(n for n in held.flatten().tolist() if n >= 0)
        assert len(own) <= (5 if placement.interleaved else 1)


def lie(placement: Placement, rows: Region, first: int) -> list[tuple[int, Region]]:
    """Where some rows lie: shards counted from the `first`, rows from their own first one."""
    down = (rows.start[0], *(0 for _ in rows.start[1:]))
    return [
        (shard - first, Region(*(tuple(map(sub, end, down)) for end in (part.start, part.stop))))
        for shard in range(placement.cut.parts)
        for held in placement.regions(shard)
        if (part := held & rows) is not None
    ]


@many
@given(placed())
def test_rows_of_one_phase_lie_alike(placement):
    size, *tail = placement.shape
    known: dict[object, list[tuple[int, Region]]] = {}
    for start, stop in combinations(range(size + 1), 2):
        rows = Region((start, *(0 for _ in tail)), (stop, *tail))
        phase, first = placement.phase(rows)
        found = lie(placement, rows, first)
        assert known.setdefault((stop - start, phase), found) == found


@many
@given(st.data())
def test_shards_leaves_none_out_that_holds_any_of_a_region(data):
    placement = data.draw(placed())
    parameter, asked = numbered(placement.shape), data.draw(regions(placement.shape))
    wanted = set(parameter[index_of(asked)].flatten().tolist())
    held = shards_of(placement.cut, stored_space(placement, parameter))
    expected = [n for n, shard in enumerate(held) if wanted & set(shard.flatten().tolist())]
    found = list(placement.shards(asked))
    assert len(set(found)) == len(found)
    assert set(expected) <= set(found) <= set(range(placement.cut.parts))
    if not (placement.interleaved or placement.groups):
        assert sorted(found) == expected, "a shard is named for nothing"


@many
@given(placed())
def test_edges_are_the_rows_at_which_shards_begin_between_heads(placement):
    if placement.lead is not None:
        assert list(placement.edges()) == [0]
        return
    space = stored_space(placement, numbered(placement.shape))
    shape, cut = tuple(space.shape), placement.cut
    boxes = [cut.box(shard, shape) for shard in range(cut.parts)]
    starts = {0} | {box.start[0] for box in boxes if box.numel}
    if isinstance(cut, Cut) and cut.dim:
        starts = {0}
    row = math.prod(shape[1:])
    before = {int((space[:start] >= 0).sum()) // row for start in starts}
    found = list(placement.edges())
    assert found == sorted(set(found))
    head = placement.interleaved or 1
    rows = placement.shape[0]
    assert set(found) - {rows} == {edge for edge in before if edge % head == 0} - {rows}


def test_a_shard_that_ends_inside_a_head_holds_two_boxes():
    """Rows 0 3 1 4 2 5 of a head of six, in two chunks."""
    placement = Placement((6, 2), chunked(6, 2), interleaved=6)
    assert placement.regions(0) == (Region((0, 0), (2, 2)), Region((3, 0), (4, 2)))
    assert placement.regions(1) == (Region((2, 0), (3, 2)), Region((4, 0), (6, 2)))
    assert placement.windows(0, whole((6, 2))) == (
        Window(Region((0, 0), (2, 2)), 0, (4, 1)),
        Window(Region((3, 0), (4, 2)), 2, (4, 1)),
    )
    assert list(placement.edges()) == [0]


@given(st.integers(1, 4), st.integers(1, 5).map((2).__mul__), st.integers(1, 60), st.booleans())
def test_interleaved_chunks_hold_the_rows_of_the_published_permutation(heads, head, parts, tall):
    parameter = numbered((heads * head, 3) if tall else (heads * head,))
    chunks = rope.interleave(parameter, heads).chunk(parts)
    placement = Placement(tuple(parameter.shape), chunked(len(parameter), parts), interleaved=head)
    for shard in range(parts):
        expected = chunks[shard] if shard < len(chunks) else parameter[:0]
        assert placement.stored_shape(shard) == tuple(expected.shape)
        found = torch.full((expected.numel(),), -1)
        for window in placement.windows(shard, whole(placement.shape)):
            window.view(found).copy_(parameter[index_of(window.region)])
        assert found.tolist() == expected.flatten().tolist()


# Cuts.


def rows_of(cut: Cut, shard: int, size: int) -> list[int]:
    """The rows of a shard."""
    (rows,) = index_of(cut.box(shard, (size,)))
    return list(range(size))[rows]


@given(st.integers(1, 80), st.integers(1, 90))
def test_chunked_rows_are_those_of_torch_chunk_and_then_none(size, parts):
    cut = chunked(size, parts)
    expected = [chunk.tolist() for chunk in torch.arange(size).chunk(parts)]
    expected += [[]] * (parts - len(expected))
    assert cut.parts == parts
    assert [rows_of(cut, shard, size) for shard in range(parts)] == expected
    boxes = [cut.box(shard, (size, 7)) for shard in range(parts)]
    assert [(box.start, box.shape) for box in boxes] == [
        (offsets if sizes[0] else (size, 0), sizes)
        for offsets, sizes in dcp_oracle.chunk_boxes((size, 7), parts)
    ]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_parameter_without_rows_is_empty_everywhere(parts):
    cut = chunked(0, parts)
    assert [cut.box(shard, (0, 4)).numel for shard in range(parts)] == [0] * parts


def test_five_rows_on_four_ranks_leave_one_empty():
    cut = chunked(5, 4)
    bounds = [cut.box(shard, (5,)) for shard in range(4)]
    assert [(*b.start, *b.stop) for b in bounds] == [(0, 2), (2, 4), (4, 5), (5, 5)]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_copies_are_consecutive_as_repeat_interleave_has_them(heads, copies, head):
    cut = Cut(0, heads * head, head, heads * copies, copies)
    rows = torch.arange(heads * head).reshape(heads, head)
    expected = rows.repeat_interleave(copies, dim=0)
    found = [rows_of(cut, shard, heads * head) for shard in range(heads * copies)]
    assert found == expected.tolist()


@given(st.data())
def test_the_shards_of_a_range_are_those_that_hold_any_of_it(data):
    size, step = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
    copies, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1))
    parts = (-(-size // step) + data.draw(st.integers(0, 2))) * copies
    cut, shape = Cut(dim, size, step, parts, copies), (size, 3) if dim == 0 else (3, size)
    asked = data.draw(regions(shape))
    expected = [n for n in range(parts) if cut.box(n, shape) & asked is not None]
    assert list(cut.shards(asked)) == expected
    assert list(cut.edges()) == (list(range(0, size, step)) if dim == 0 else [0])


@given(st.integers(0, 9), st.integers(1, 4))
def test_an_uncut_parameter_is_whole_in_every_copy(size, copies):
    cut = uncut(size, copies)
    assert [cut.box(shard, (size, 2)) for shard in range(copies)] == [whole((size, 2))] * copies
    assert cut.parts == cut.copies == copies


# Tilings.


@many
@given(st.data())
def test_boxes_finds_exactly_those_that_meet_a_region(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cut, asked = data.draw(tilings(shape, most=12)), data.draw(regions(shape))
    wanted = set(elements(asked))
    held = [set(elements(cut.box(shard, shape))) for shard in range(cut.parts)]
    assert sorted(cut.shards(asked)) == [n for n, own in enumerate(held) if own & wanted]
    assert sorted(cut.shards(whole(shape))) == [n for n, own in enumerate(held) if own]
    starts = {min(index[0] for index in own) for own in held if own}
    assert list(cut.edges()) == sorted(starts | {0})


@given(st.data())
def test_boxes_are_equal_where_their_boxes_are_in_order(data):
    shape = (4, 3)
    one, other = data.draw(tilings(shape)), data.draw(tilings(shape))
    record = [[cut.box(n, shape) for n in range(cut.parts)] for cut in (one, other)]
    same = record[0] == record[1]
    assert (one == other) == same == (repr(one) == repr(other))
    again = Boxes(record[0])
    assert (again, hash(again), repr(again)) == (one, hash(one), repr(one))
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != record[0]
    assert Boxes(reversed(record[0])) == one or len(record[0]) > 1


@pytest.mark.parametrize("dim", [0, 1, None])
@settings(deadline=None)
@given(st.data())
def test_a_mesh_of_two_axes_is_cut_as_dtensors_are(dim, data):
    """By the rule of FSDP over tensor parallelism, also where shards run empty."""
    model = config_of("a")
    dp, tp = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 12))
    layout = layout_of(model, "titan", dp=dp, tp=tp)
    place = {None: "input_layernorm", 0: "mlp.up_proj", 1: "mlp.down_proj"}[dim]
    (slot,) = layout.places[f"model.layers.1.{place}.weight"]
    shape = slot.placement.shape
    expected = dcp_oracle.grid_boxes(shape, dp, tp, dim)
    if dim is None:  # copies on the tp axis, of which the first is written
        expected = expected[::tp]
    found = [slot.placement.box(shard) for shard in range(slot.placement.cut.parts)]
    assert [box.shape for box in found] == [sizes for _, sizes in expected]
    assert [box.start for box in found if box.numel] == [
        offsets for offsets, sizes in expected if math.prod(sizes)
    ]
    ranks = [slot.coordinate_of(shard) for shard in range(slot.placement.cut.parts)]
    assert ranks == (list(range(dp * tp)) if dim is not None else list(range(0, dp * tp, tp)))
    assert [slot.file_of(shard) for shard in range(len(ranks))] == [
        f"__{rank}_0.distcp" for rank in ranks
    ]


# Whole models, in TorchTitan's tensors.


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("keys", ["0.2", "0.3", "0.3+fused", "0.3+w13", "0.3+fused+w13"])
def test_windows_find_each_value_in_chunks_of_the_native_tensors(name, shards, keys, half):
    model, config = oracle(name), config_of(name)
    order = "half" if half else "interleaved"
    tensors = titan.titan_tensors(model, keys=keys, rope=order)
    options = {"keys": "older" if keys == "0.2" else "current", "dp": shards}
    if "+" in keys:
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        options = {"chunks": as_chunks(shapes, shards)}
    layout = layout_of(config, "titan", rope=order, **options)
    for parameter, slots in layout.places.items():
        found = torch.full(slots[0].placement.shape, torch.nan, dtype=torch.bfloat16)
        for stored in layout.tensors_on(parameter, whole(tuple(found.shape))):
            native = tensors[stored.slot.key]
            pieces = native.chunk(shards)
            start = [stored.shard * len(pieces[0]), *[0] * (native.dim() - 1)]
            assert stored.key == f"{stored.slot.key}{start}"
            for window in stored.windows:
                found[index_of(window.region)] = window.view(pieces[stored.shard].flatten())
        assert torch.equal(found, model.tensors[parameter]), parameter


def test_groups_count_the_rows_before_and_find_the_place_of_each():
    groups = Groups(rows=3, stride=8, first=2)
    space = [-1, -1, 0, 1, 2, -1, -1, -1, -1, -1, 3, 4, 5, -1, -1, -1]
    assert [groups.stored(row) for row in range(6)] == [space.index(row) for row in range(6)]
    assert [groups.before(place) for place in range(17)] == [
        sum(row >= 0 for row in space[:place]) for place in range(17)
    ]
