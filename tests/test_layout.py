"""Boxes, windows and cuts against brute force, torch.chunk and the published permutation."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.errors import LayoutError
from reshard.geometry import Region, Window, disjoint, row_major, whole
from reshard.layout import Layout, Slot, check_covered, check_same_parameters
from reshard.placement import Boxes, Cut, Placement, chunked, uncut
from tests import conformance
from tests.layouts import (
    Case,
    bundles,
    cases,
    config_of,
    elements,
    layout_of,
    layout_pairs,
    layouts,
)
from tests.oracles import rope

slow_inputs = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def boxes(draw, dims: int) -> Region:
    """A small box; half of them are easily disjoint from others."""
    pairs = [sorted(draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))) for _ in range(dims)]
    return Region(tuple(low for low, _ in pairs), tuple(high + 1 for _, high in pairs))


many_boxes = st.integers(1, 3).flatmap(lambda dims: st.lists(boxes(dims), min_size=2, max_size=5))


@given(many_boxes)
def test_the_common_box_holds_the_common_elements(regions):
    one, other = regions[:2]
    common = set(elements(one)) & set(elements(other))
    found = one & other
    assert (set(elements(found)) if found else set()) == common
    assert (found is None) == (not common)
    assert found == other & one


@given(many_boxes)
def test_what_is_left_of_a_box_is_each_other_element_once(regions):
    one, other = regions[:2]
    rest = [index for box in one - other for index in elements(box)]
    assert sorted(rest) == sorted(set(elements(one)) - set(elements(other)))


@given(many_boxes)
def test_disjoint_boxes_cover_the_union_once(regions):
    found = [index for box in disjoint(regions) for index in elements(box)]
    assert sorted(found) == sorted(set().union(*(elements(box) for box in regions)))


def test_boxes_that_touch_have_nothing_in_common():
    assert Region((0, 0), (2, 2)) & Region((2, 0), (3, 2)) is None
    assert Region((0, 0), (2, 2)) - Region((0, 2), (2, 3)) == [Region((0, 0), (2, 2))]


@given(st.integers(1, 3).flatmap(boxes))
def test_a_box_counts_its_elements(region):
    assert region.numel == len(list(elements(region)))
    assert whole(region.shape).numel == region.numel


@given(st.lists(st.integers(1, 5), max_size=4))
def test_row_major_strides_are_those_of_a_contiguous_tensor(shape):
    assert row_major(shape) == torch.empty(shape).stride()


@settings(max_examples=200)
@given(st.data())
def test_a_narrowed_window_is_a_slice_of_the_view(data):
    dims = data.draw(st.integers(1, 3))
    region = data.draw(boxes(dims))
    strides = tuple(data.draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims)))
    window = Window(region, data.draw(st.integers(0, 7)), strides)
    part = region & data.draw(boxes(dims))
    if part is None:
        part = region
    buffer = torch.arange(400)[data.draw(st.integers(0, 3)) :]  # a storage offset of its own
    view = window.view(buffer)
    for index in elements(part):
        place = [a - b for a, b in zip(index, region.start, strict=True)]
        step = sum(a * b for a, b in zip(place, strides, strict=True))
        assert view[tuple(place)] == buffer[window.offset + step]
    local = tuple(
        slice(a - o, b - o) for a, b, o in zip(part.start, part.stop, region.start, strict=True)
    )
    assert torch.equal(window.narrow(part).view(buffer), view[local])


@given(st.data())
def test_interleaved_windows_are_the_published_permutation(data):
    head, heads = data.draw(st.sampled_from((2, 4, 6, 10))), data.draw(st.integers(1, 4))
    tail = data.draw(st.sampled_from(((), (3,), (head * heads,))))
    per_shard = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    shape = (heads * head, *tail)
    cut = Cut(0, shape[0], per_shard * head, heads // per_shard)
    parameter = torch.arange(whole(shape).numel).reshape(shape)
    stored = rope.interleave(parameter, heads)
    placement = Placement(shape, cut, interleaved=head)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    asked = Region((start, *(0 for _ in tail)), (stop, *tail))
    found = torch.full(shape, -1)
    for shard, part in enumerate(stored.chunk(cut.parts)):
        assert tuple(part.shape) == placement.stored_shape(shard)
        for window in placement.windows(shard, asked):
            box = tuple(map(slice, window.region.start, window.region.stop))
            assert (found[box] == -1).all(), "an element has two windows"
            found[box] = window.view(part.flatten())
    assert torch.equal(found[start:stop], parameter[start:stop])
    assert (found[:start] == -1).all()
    assert (found[stop:] == -1).all()


def test_the_drawing_in_the_docstring_is_true():
    placement = Placement((6,), uncut(6), interleaved=6)
    assert placement.windows(0, whole((6,))) == (
        Window(Region((0,), (3,)), 0, (2,)),
        Window(Region((3,), (6,)), 1, (2,)),
    )


def test_square_matrices_are_cut_on_the_right_dim():
    rows, columns = Placement((4, 4), Cut(0, 4, 2, 2)), Placement((4, 4), Cut(1, 4, 2, 2))
    assert rows.windows(1, whole((4, 4))) == (Window(Region((2, 0), (4, 4)), 0, (4, 1)),)
    assert columns.windows(1, whole((4, 4))) == (Window(Region((0, 2), (4, 4)), 0, (2, 1)),)
    assert columns.stored_shape(1) == (4, 2)


@slow_inputs
@given(layout_pairs(), st.data())
def test_copy_0_tiles_any_region_and_no_copy_holds_an_element_twice(pair, data):
    layout = pair[0]
    name = data.draw(st.sampled_from(sorted(layout.places)))
    shape = layout.places[name][0].placement.shape
    asked = data.draw(boxes(len(shape))) & whole(shape)
    if asked is None:
        asked = whole(shape)
    everywhere = sorted(
        (index, slot.file_of(shard), slot.key_of(shard))
        for slot in layout.places[name]
        for shard in range(slot.placement.cut.parts)
        for held in slot.placement.regions(shard)
        for index in elements(held)
        if index in set(elements(asked))
    )
    found = [
        (index, stored)
        for stored in layout.tensors_on(name, asked)
        for window in stored.windows
        for index in elements(window.region)
    ]
    assert sorted((index, stored.file, stored.key) for index, stored in found) == everywhere
    first = sorted(index for index, stored in found if stored.copy == 0)
    assert first == sorted(elements(asked))
    places = [(index, stored.copy) for index, stored in found]
    assert len(set(places)) == len(places)
    for stored in layout.tensors_on(name, asked):
        assert stored.nbytes == sum(w.region.numel for w in stored.windows) * stored.dtype.itemsize
        assert stored.shape == stored.slot.placement.stored_shape(stored.shard)
        assert stored.coordinate == stored.slot.coordinate_of(stored.shard)


@slow_inputs
@given(st.data())
def test_a_random_layout_keeps_what_every_layout_must(data):
    held = data.draw(st.lists(bundles(), min_size=1, max_size=4))
    layout = data.draw(layouts(held, "random", gaps=False))
    conformance.check_layout(layout)
    check_covered(layout)


@slow_inputs
@given(layout_pairs())
def test_copies_of_a_random_layout_are_numbered_without_a_gap_or_a_clash(pair):
    for layout in pair:
        conformance.check_parameters(layout)
        check_covered(layout)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_copies_are_numbered_without_a_gap_or_a_clash(case: Case):
    conformance.check_parameters(case.layout())


def test_files_are_made_from_templates_with_braces_and_with_shards():
    placement = Placement((4,), Cut(0, 4, 2, 2))
    slots = (
        Slot("p", placement, "a-{shard:02d}", "key", torch.float32),
        Slot("q", Placement((3,), uncut(3)), "b {{odd}}", "key", torch.float32),
        Slot("r", Placement((3,), uncut(3, 2)), "a-{shard:02d}", "other", torch.float32),
    )
    layout = Layout("x", "safetensors", 2, slots)
    assert layout.files == ("a-00", "a-01", "b {odd}")
    assert [item.key for item in layout.contents("a-01")] == ["key", "other"]
    assert [item.shape for item in layout.contents("a-01")] == [(2,), (3,)]
    assert [stored.file for stored in layout.tensors_on("p", Region((1,), (3,)))] == [
        "a-00",
        "a-01",
    ]


def test_boxes_may_share_a_file_and_empty_ones_are_in_none():
    boxes = Boxes(Region((low, 0), (high, 2)) for low, high in ((2, 4), (4, 4), (0, 2), (4, 4)))
    spread = tuple((f"f{number}", number) for number in (0, 0, 0, 1))
    slots = (
        Slot("p", Placement((4, 2), boxes), "", "a", torch.float32, boxed=True, spread=spread),
        Slot("q", Placement((3,), chunked(3, 2)), "f{shard}", "b", torch.float32, boxed=True),
        Slot("r", Placement((1,), uncut(1), stored=()), "f2", "c", torch.float32, boxed=True),
    )
    layout = Layout("x", "dcpfile", 3, slots)
    assert sorted(layout.files) == ["f0", "f1", "f2"]
    contents = {file: [(c.key, c.shape) for c in layout.contents(file)] for file in layout.files}
    assert contents == {
        "f0": [("a[2, 0]", (2, 2)), ("a[0, 0]", (2, 2)), ("b[0]", (2,))],
        "f1": [("b[2]", (1,))],
        "f2": [("c[]", ())],
    }
    assert layout.total_bytes() == (8 + 3 + 1) * 4
    assert [(slot.key, shard) for slot, shard in layout.members("f1")] == [("a", 3), ("b", 1)]
    found = [(part.key, part.coordinate) for part in layout.tensors_on("p", whole((4, 2)))]
    assert sorted(found) == [("a[0, 0]", 0), ("a[2, 0]", 0)]


@pytest.mark.parametrize(
    ("boxes", "held"),
    [([((0, 0), (2, 3))], 6), ([((0, 0), (4, 3)), ((1, 1), (2, 2))], 13), ([((0, 0), (0, 3))], 0)],
)
def test_a_source_that_lacks_or_repeats_elements_is_refused(boxes, held):
    cut = Boxes(Region(start, stop) for start, stop in boxes)
    slot = Slot("p", Placement((4, 3), cut), "f{shard}", "k", torch.float32)
    with pytest.raises(LayoutError, match=rf"x: `p` has 12 elements, but its files hold {held}$"):
        check_covered(Layout("x", "dcpfile", 1, (slot,)))


def test_layouts_of_different_models_are_refused_with_both_shapes():
    one, other = (layout_of(config_of(name), "hf") for name in ("a", "b"))
    check_same_parameters(one, one)
    message = r"48 parameters differ between hf and hf, first .*\(222, 72\) against \(111, 36\)"
    with pytest.raises(LayoutError, match=message):
        check_same_parameters(one, other)
    tied = layout_of(config_of("a", tied=True), "meta", tp=2)
    message = r"1 parameters differ between hf and meta2, first `lm_head.weight`: .* against absent"
    with pytest.raises(LayoutError, match=message):
        check_same_parameters(one, tied)
