"""What every layout must keep, whatever its format: checked element by element."""

import math
import re

import torch

from reshard.containers.gguffile import Fields, Value
from reshard.geometry import whole
from reshard.layout import Layout, StoredTensor


def check_layout(layout: Layout) -> None:
    """All of it."""
    check_names(layout)
    check_covered_once(layout)
    check_parameters(layout)


def check_names(layout: Layout) -> None:
    """Keys are unique in a file, files are relative and below the directory, coordinates exist."""
    assert re.fullmatch(r"[a-z]+\d*([a-z]+\d+)*( B?[FQ]\d+(_\d)?)?", layout.name), layout.name
    assert len(set(layout.files)) == len(layout.files)
    for file in layout.files:
        assert not file.startswith("/")
        assert ".." not in file.split("/")
        keys = [content.key for content in layout.contents(file)]
        assert keys or layout.container == "dcpfile", f"{file} is empty"
        assert len(set(keys)) == len(keys), f"{file}: {keys}"
        header = layout.header(file)
        kinds = (Value, Fields) if layout.container == "gguffile" else (str,)
        assert all(isinstance(key, str) for key in header)
        assert all(isinstance(value, kinds) for value in header.values())
    constants = [(item.file, item.content.key) for item in layout.constants]
    assert len(set(constants)) == len(constants)
    assert all(len(item.data) == item.content.nbytes for item in layout.constants)
    assert layout.total_bytes() == sum(
        content.nbytes for file in layout.files for content in layout.contents(file)
    )


def check_covered_once(layout: Layout) -> None:
    """Each element of each stored tensor belongs to one parameter, or to the padding at its end."""
    contents = {
        (file, content.key): content for file in layout.files for content in layout.contents(file)
    }
    hits = {
        place: torch.zeros(math.prod(content.shape), dtype=torch.int8)
        for place, content in contents.items()
    }
    for stored in stored_tensors(layout):
        content = contents[stored.file, stored.key]
        assert (stored.shape, stored.dtype) == (content.shape, content.dtype)
        assert 0 <= stored.coordinate < layout.coordinates
        for window in stored.windows:
            last = window.offset + sum(
                stride * (size - 1)
                for stride, size in zip(window.strides, window.region.shape, strict=True)
            )
            count = hits[stored.file, stored.key]
            assert 0 <= window.offset <= last < len(count)
            window.view(count).add_(1)
    constants = {(item.file, item.content.key) for item in layout.constants}
    for place, content in contents.items():
        filled = 0 if place in constants else len(hits[place]) - content.padding
        assert (hits[place][:filled] == 1).all(), f"{place}: not each element once"
        assert (hits[place][filled:] == 0).all(), f"{place}: padding or a constant is covered"


def check_parameters(layout: Layout) -> None:
    """Each element of each parameter is stored, and has one place with copy 0."""
    for name, slots in layout.places.items():
        shape = slots[0].placement.shape
        assert all(slot.placement.shape == shape for slot in slots)
        first = torch.zeros(shape, dtype=torch.int16)
        any_copy: dict[int, torch.Tensor] = {}
        for stored in layout.tensors_on(name, whole(shape)):
            for window in stored.windows:
                box = tuple(map(slice, window.region.start, window.region.stop))
                any_copy.setdefault(stored.copy, torch.zeros(shape, dtype=torch.int16))[box] += 1
                if stored.copy == 0:
                    first[box] += 1
        assert (first == 1).all(), f"{name}: copy 0 does not tile it"
        assert all((hits <= 1).all() for hits in any_copy.values()), f"{name}: a copy has it twice"
        assert sorted(any_copy) == list(range(len(any_copy))), f"{name}: copies {sorted(any_copy)}"


def stored_tensors(layout: Layout) -> list[StoredTensor]:
    """Every stored tensor, a part for each parameter in it."""
    return [
        stored
        for name, slots in layout.places.items()
        for stored in layout.tensors_on(name, whole(slots[0].placement.shape))
    ]


def check_same(one: Layout, other: Layout) -> None:
    """Two layouts agree in all that a run uses of them, and print alike."""
    assert one == other
    assert repr(one.slots) == repr(other.slots)
    assert hash(one.slots) == hash(other.slots)
    assert one.files == other.files
    assert all(one.header(file) == other.header(file) for file in one.files)
    assert all(one.contents(file) == other.contents(file) for file in one.files)
