"""DCP metadata against FileSystemReader, and against hostile and damaged `.metadata`."""

import hashlib
import itertools
import os
import pathlib
import pickle
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor import metadata as sharded
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard.containers import dcpmetadata
from reshard.containers.dcpmetadata import Described, Directory, Item, Tensor
from reshard.errors import CheckpointError
from reshard.geometry import Region, whole
from tests.containers import dcpdirs
from tests.containers.dcpdirs import dump, metadata
from tests.containers.test_pickles import Reduced

ROWS = {"w": ((4, 3), [((2, 0), (2, 3)), ((0, 0), (2, 3))])}  # in the order of ranks


def read(root: Path) -> Directory:
    return dcpmetadata.read(root)


def refusal(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(root)
    assert ".metadata`" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def region(*ranges: tuple[int, int]) -> Region:
    return Region(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))


# --- reading


def test_boxes_are_sorted_and_empty_ones_skipped(tmp_path):
    tensors: Any = {
        "w": ((4, 3), [((2, 0), (2, 3)), ((4, 0), (0, 3)), ((0, 0), (2, 3))]),
        "none": ((0, 3), [((0, 0), (0, 3))]),
        "scalar": ((), [((), ())]),
    }
    found = read(dump(tmp_path / "c", metadata(tensors, torch.bfloat16, ("step",))))
    halves = (region((0, 2), (0, 3)), region((2, 4), (0, 3)))
    assert dict(found.tensors) == {
        "w": Tensor(torch.bfloat16, (4, 3), halves, ("a.distcp", "a.distcp")),
        "none": Tensor(torch.bfloat16, (0, 3), (), ()),
        "scalar": Tensor(torch.bfloat16, (), (Region((), ()),), ("a.distcp",)),
    }
    assert (found.others, found.files) == (("step",), ("a.distcp",))
    assert [tuple(item) for item in found.items("a.distcp")] == [
        ("w[2, 0]", "w", halves[1], 0, 100),
        ("w[0, 0]", "w", halves[0], 200, 100),
        ("scalar[]", "scalar", Region((), ()), 400, 100),
    ]
    assert list(found.items("b.distcp")) == []


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path, protocol):
    value = metadata(ROWS)
    value.storage_meta = StorageMeta(pathlib.PurePosixPath("/a/b"), "id", modules=["m"])
    found = read(dump(tmp_path / "c", value, protocol=protocol))
    assert found.tensors == read(dump(tmp_path / "d", metadata(ROWS))).tensors


def old_properties(dtype: torch.dtype) -> sharded.TensorProperties:
    return sharded.TensorProperties(dtype=dtype)


class EnumByName(pickle._Pickler):
    """Pickles enums as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value):
        if isinstance(value, dcp_metadata._MEM_FORMAT_ENCODING):
            return getattr, (type(value), value.name)
        return NotImplemented


def test_older_spellings_are_read(tmp_path):
    expected = read(dump(tmp_path / "now", metadata(ROWS))).tensors
    value = metadata(ROWS)
    value.state_dict_metadata["w"].properties = old_properties(torch.float32)
    value.storage_meta = value.version = value.planner_data = None
    assert read(dump(tmp_path / "old", value)).tensors == expected
    value = metadata(ROWS)
    del value.storage_meta, value.version
    value.storage_meta = StorageMeta(pathlib.Path("/x"))
    pickled = pickle.dumps(value, 4)
    moved = pickled.replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local")
    moved = moved.replace(b"\x95" + moved[3:11], b"\x95" + bytes(8), 1)
    assert read(dump(tmp_path / "pathlib", moved)).tensors == expected
    with (tmp_path / "pickled").open("wb") as file:
        EnumByName(file, 4).dump(metadata(ROWS))
    by_name = (tmp_path / "pickled").read_bytes()
    assert b"getattr" in by_name
    assert read(dump(tmp_path / "enum", by_name)).tensors == expected


@pytest.mark.parametrize(
    "paths",
    [
        {"model.w": ("model", "w"), "model.v": ("model.v",), "step": ("step", 3)},
        {},
        None,
        [("model", "w")],
    ],
)
def test_the_planner_says_where_names_were(tmp_path, paths):
    value = metadata({"model.w": ((2,), [((0,), (2,))]), "model.v": ((0,), [])}, others=("step",))
    value.planner_data = paths
    found = read(dump(tmp_path / "c", value))
    assert found.paths == (paths if isinstance(paths, dict) else {})


def test_a_new_metadata_is_read_anew_and_an_old_one_once(tmp_path):
    root = dump(tmp_path / "c", metadata(ROWS))
    first = read(root)
    assert read(root) is first
    dcpdirs.pickle_metadata(root, metadata({"v": ((2,), [((0,), (2,))])}))
    assert set(read(root).tensors) == {"v"}


def test_what_is_equal_is_kept_once_and_a_chunk_costs_little(tmp_path):
    boxes = [((row, 0), (1, 8)) for row in range(64)]
    tensors: Any = {f"layers.{n}.weight": ((64, 8), boxes) for n in range(50)}
    root = dump(tmp_path / "c", metadata(tensors), size=50 * 64 * 100)
    tracemalloc.start()
    try:
        found = read(root)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    one, other = (found.tensors[f"layers.{n}.weight"] for n in (3, 40))
    assert one.boxes is other.boxes
    assert one.files is other.files
    assert kept / (50 * 64) < 300


# --- what is refused


def changed(change: Any) -> Any:
    value = metadata(ROWS, others=("step",))
    result = change(value)
    return value if result is None else result


def chunk(value: Any) -> Any:
    return value.state_dict_metadata["w"].chunks[0]


def stored(value: Any) -> Any:
    return value.storage_data[MetadataIndex("w", torch.Size((2, 0)))]


def put(where: Any, name: str, item: object) -> Any:
    return lambda value: setattr(where(value), name, item)


def without_entry(value: Any) -> None:
    del value.storage_data[MetadataIndex("w", torch.Size((2, 0)))]


def renamed(value: Any) -> None:
    value.state_dict_metadata["a\nb"] = value.state_dict_metadata.pop("w")


def tensor_of(value: Any) -> Any:
    return value.state_dict_metadata["w"]


def itself(value: Any) -> Any:
    return value


WITHOUT_STRIDES = TensorProperties(torch.float32, layout=torch.sparse_coo)
FAULTS = {
    "a box outside": (
        put(chunk, "offsets", torch.Size((3, 0))),
        "has a box at [3, 0] of [2, 3]",
    ),
    "a negative offset": (put(chunk, "offsets", torch.Size((-2, 0))), "must be integers from 0"),
    "a negative size": (put(chunk, "sizes", torch.Size((-2, 3))), "must be integers from 0 to 2^6"),
    "a size of a bool": (put(chunk, "sizes", (True, 3)), "must be integers from 0 to 2^63 - 1"),
    "other dims": (put(chunk, "sizes", torch.Size((2,))), "has 2 dims, but a box of 2 and 1"),
    "nine dims": (put(tensor_of, "size", torch.Size([1] * 9)), "not a tuple of 8 dims at most"),
    "a huge shape": (put(tensor_of, "size", torch.Size([2**62] * 2)), "more than 2^63 elements"),
    "a shape of text": (put(tensor_of, "size", "abc"), "not a tuple of 8 dims at most"),
    "no entry": (without_entry, "the box at [2, 0] has no entry in `storage_data`"),
    "an absolute path": (put(stored, "relative_path", "/a.distcp"), "`/a.distcp`, which lies outs"),
    "a path upwards": (
        put(stored, "relative_path", "x/../../a"),
        "`x/../../a`, which lies outs",
    ),
    "no path": (put(stored, "relative_path", ""), "in the file ``, which lies outside"),
    "the directory": (put(stored, "relative_path", "."), "in the file `.`, which lies outside"),
    "a path with NUL": (put(stored, "relative_path", "a\0b"), r"`a\x00b`, whose name cannot be"),
    "half a surrogate": (put(stored, "relative_path", "\ud800"), r"`\ud800`, whose name cannot be"),
    "a missing file": (
        put(stored, "relative_path", "b"),
        "is in `b`, which is not there; copy",
    ),
    "a negative place": (put(stored, "offset", -1), "lies at -1 in `a.distcp`, 100 bytes long"),
    "a negative length": (put(stored, "length", -1), "lies at 0 in `a.distcp`, -1 bytes long"),
    "beyond the file": (
        put(stored, "length", 10**6),
        "truncated: 100000 bytes, expected 1000",
    ),
    "far beyond": (put(stored, "offset", 10**30), "truncated: 100000 bytes, expected 1000"),
    "overlapping items": (
        put(stored, "length", 101),
        "items of `w` and `w` overlap: one ends",
    ),
    "an offset of text": (put(stored, "offset", "0"), "does not say file, offset and length"),
    "another encoding": (
        put(stored, "transform_descriptors", ["stream.zstd/1"]),
        "`transform_descriptors`); load the checkpoint with dcp.load and save it without extension",
    ),
    "no strides": (put(tensor_of, "properties", WITHOUT_STRIDES), "its layout is `torch.sparse_co"),
    "an odd dtype": (
        put(tensor_of, "properties", TensorProperties(torch.qint8)),
        "has the dtype `torch.qint8`, which is not known",
    ),
    "no properties": (put(tensor_of, "properties", None), "its properties are no `TensorProper"),
    "no chunks": (put(tensor_of, "chunks", None), "its chunks are no list"),
    "a chunk of a list": (
        put(tensor_of, "chunks", [[]]),
        "should be a `ChunkStorageMetadata`",
    ),
}
GENERAL = {
    "a list": (lambda _: [], "what should be a `Metadata` is none"),
    "a dict": (lambda value: vars(value), "what should be a `Metadata` is none"),
    "no tensors": (
        put(itself, "state_dict_metadata", None),
        "`state_dict_metadata` is no dict",
    ),
    "no items": (put(itself, "storage_data", []), "its `storage_data` is no dict"),
    "a key of lines": (renamed, r"the key `a\nb` of a tensor is not printable text"),
    "a path of a float": (
        put(itself, "planner_data", {"w": (0.5,)}),
        "the path of `w` in its `planner_data` is not of names",
    ),
    "a path that cannot be printed": (
        put(itself, "planner_data", {"w": ("a", "\x1b[31mred")}),
        "the path of `w` in its `planner_data` is not of names",
    ),
    "a path of a long name": (
        put(itself, "planner_data", {"w": ("a" * 1025,)}),
        "the path of `w` in its `planner_data` is not of names",
    ),
    "a path of many levels": (
        put(itself, "planner_data", {"w": (0,) * 101}),
        "the path of `w` in its `planner_data` is not of names",
    ),
    "a long name": (
        lambda value: value.state_dict_metadata.update({"a" * 1025: None}),
        f"the key `{'a' * 80}...` of a tensor has 1025 characters",
    ),
    "an item of a long name": (
        lambda value: value.storage_data.update({MetadataIndex("a" * 1025, torch.Size(())): None}),
        f"the item `{'a' * 80}...` has a name of 1025 characters",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_is_refused_with_the_tensor(tmp_path, fault):
    change, message = FAULTS[fault]
    found = refusal(dump(tmp_path / "c", changed(change)))
    assert message in found
    assert "`w" in found


@pytest.mark.parametrize("fault", GENERAL)
def test_what_torch_does_not_write_is_refused(tmp_path, fault):
    change, message = GENERAL[fault]
    assert message in refusal(dump(tmp_path / "c", changed(change)))


def test_the_metadata_is_right_before_it_is_made_wrong(tmp_path):
    assert set(read(dump(tmp_path / "c", changed(lambda _: None))).tensors) == {"w"}


def test_an_item_that_appears_twice_is_refused(tmp_path):
    value = metadata(ROWS)
    value.storage_data[MetadataIndex("x", torch.Size((2, 0)))] = _StorageInfo("a.distcp", 900, 100)
    pickled = pickle.dumps(value, 4).replace(b"\x8c\x01x", b"\x8c\x01w")
    assert "the item `w[2, 0]` appears twice" in refusal(dump(tmp_path / "c", pickled))


@pytest.mark.parametrize("where", ["state_dict_metadata", "planner_data", "storage_meta"])
@pytest.mark.parametrize("function", [os.system, eval, getattr], ids=str)
def test_a_call_is_refused_by_name_and_nothing_runs(tmp_path, where, function):
    command = f"touch {tmp_path}/ran" if function is os.system else f"open('{tmp_path}/ran','w')"
    value = metadata(ROWS)
    setattr(value, where, Reduced(function, command))
    message = refusal(dump(tmp_path / "c", value))
    assert "nothing was executed" in message
    if function is not getattr:
        assert f".{function.__name__}`, which is not allowed" in message
    assert not (tmp_path / "ran").exists()


def test_getattr_gives_nothing_but_a_memory_format(tmp_path):
    for arguments in ((torch.Size, "__class__"), (MetadataIndex, "fqn"), ("text", "upper")):
        value = metadata(ROWS)
        value.storage_meta = Reduced(getattr, *arguments)
        assert "in a way that this program does not know; nothing was executed" in refusal(
            dump(tmp_path / "c", value)
        )


def test_a_huge_metadata_is_refused_unread(tmp_path):
    root = dump(tmp_path / "c", metadata(ROWS))
    os.truncate(root / ".metadata", 2**29 + 1)
    assert "takes 536870913 bytes, expected at most 536870912" in refusal(root)


def test_one_list_of_chunks_for_many_tensors_is_refused(tmp_path):
    value = metadata({"w": ((4000,), [((n,), (1,)) for n in range(4000)])})
    described = value.state_dict_metadata
    described |= {f"w{n}": described["w"] for n in range(1000)}
    pickled = pickle.dumps(value, 4)
    message = refusal(dump(tmp_path / "c", pickled))
    assert f"has more than {len(pickled)} chunks in as many bytes" in message


def test_a_metadata_written_again_with_its_size_and_time_is_read_anew(tmp_path):
    root = dump(tmp_path / "c", metadata(ROWS))
    before = (root / ".metadata").stat()
    assert set(read(root).tensors) == {"w"}
    dump(tmp_path / "d", metadata({"v": ROWS["w"]}))
    os.utime(tmp_path / "d" / ".metadata", ns=(before.st_mtime_ns, before.st_mtime_ns))
    (tmp_path / "d" / ".metadata").replace(root / ".metadata")
    after = (root / ".metadata").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert set(read(root).tensors) == {"v"}


def test_a_missing_metadata_says_what_to_do(tmp_path):
    (tmp_path / "c").mkdir()
    assert refusal(tmp_path / "c") == f"`{tmp_path}/c/.metadata`: no such file"
    (tmp_path / "c" / "__0_0.distcp").touch()
    message = refusal(tmp_path / "c")
    assert "the hidden file was lost when the checkpoint was copied" in message
    assert "`cp -r` and `rsync -a`" in message
    (tmp_path / "c" / "__0.metadata").touch()
    message = refusal(tmp_path / "c")
    assert "saved with use_collectives=False; load it with dcp.load and save it" in message


def test_a_directory_in_place_of_the_metadata_is_refused(tmp_path):
    (tmp_path / "c" / ".metadata").mkdir(parents=True)
    assert ".metadata`: is not a file" in refusal(tmp_path / "c")


SEED = pickle.dumps(metadata(ROWS | {"s": ((), [((), ())])}, others=("step",)), 4)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, len(SEED) - 1), piece=st.binary(max_size=5), cut=st.integers(0, 5))
def test_a_changed_metadata_is_refused_or_inside_its_files(tmp_path, place, piece, cut):
    root = dump(tmp_path / "c", SEED[:place] + piece + SEED[place + cut :])
    dcpmetadata._read.cache_clear()
    message = ""
    try:
        found = read(root)
    except CheckpointError as error:
        found, message = None, str(error)
    assert "\n" not in message
    if found is None:
        return
    for fqn, tensor in found.tensors.items():
        assert all(
            0 <= a < b <= size
            for box in tensor.boxes
            for a, b, size in zip(box.start, box.stop, tensor.shape, strict=True)
        ), fqn
    for file in found.files:
        for item in found.items(file):
            assert 0 <= item.offset <= item.offset + item.length <= 100_000


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_metadata_cut_anywhere_is_refused(tmp_path, sixteenth):
    root = dump(tmp_path / "c", SEED[: len(SEED) * sixteenth // 16])
    assert "its pickle is damaged" in refusal(root)


# --- tiling


def tiled(shape: tuple[int, ...], boxes: list[Region]) -> str:
    """What is wrong with boxes in any order."""
    random.Random(0).shuffle(boxes)
    tensor = Tensor(torch.int8, shape, tuple(boxes), ("a",) * len(boxes))
    message = ""
    try:
        dcpmetadata.require_tiled("w", tensor)
    except CheckpointError as error:
        message = str(error)
    assert not message or message.startswith(f"`.metadata`: tensor `w` of {list(shape)}: ")
    return message


def grid(rows: int, columns: int) -> list[Region]:
    """Boxes of 3 by 5."""
    places = itertools.product(range(rows), range(columns))
    return [region((3 * i, 3 * i + 3), (5 * j, 5 * j + 5)) for i, j in places]


PINWHEEL = [
    region((0, 1), (0, 2)),
    region((0, 2), (2, 3)),
    region((2, 3), (1, 3)),
    region((1, 3), (0, 1)),
    region((1, 2), (1, 2)),
]
BRICKS = [
    *(region((0, 1), (4 * n, 4 * n + 4)) for n in range(3)),
    *(region((1, 2), pair) for pair in ((0, 2), (2, 6), (6, 10), (10, 12))),
]


def around(size: int) -> list[Region]:
    """A grid of 1 by 1 in a pinwheel, so that no straight cut divides it."""
    end = size + 1
    arms = [((0, 1), (0, end)), ((0, end), (end, end + 1)), ((end, end + 1), (1, end + 1))]
    inside = itertools.product(range(1, end), range(1, end))
    return [
        *(region(*arm) for arm in [*arms, ((1, end + 1), (0, 1))]),
        *(region((row, row + 1), (column, column + 1)) for row, column in inside),
    ]


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((), [Region((), ())]),
        ((0, 3), []),
        ((4096,), [region((n, n + 1)) for n in range(4096)]),
        ((192, 40), grid(64, 8)),
        ((3, 3), PINWHEEL),
        ((2, 12), BRICKS),
        ((12, 12), around(10)),
        ((2, 2, 2), [whole((2, 2, 2))]),
    ],
)
def test_boxes_that_tile_are_accepted_and_each_is_needed(shape, boxes):
    assert tiled(shape, list(boxes)) == ""
    for number in range(0, len(boxes), max(1, len(boxes) // 8)):
        assert "no stored box holds" in tiled(shape, boxes[:number] + boxes[number + 1 :])
        assert "overlap" in tiled(shape, [*boxes, boxes[number]])


def test_a_fault_names_the_box():
    holed = [box for box in grid(64, 8) if box != region((6, 9), (5, 10))]
    assert "no stored box holds [6:9, 5:10]" in tiled((192, 40), holed)
    assert "boxes [0:2] and [1:3] overlap" in tiled((3,), [region((0, 2)), region((1, 3))])
    assert "holds [3:4]" in tiled((4,), [region((0, 3))])
    assert "holds [0:1]" in tiled((4,), [region((1, 4))])
    assert "holds [0:2, 0:2]" in tiled((2, 2), [])
    assert "holds 1 elements of [0:3, 0:3]" in tiled((3, 3), PINWHEEL[:4])


def test_tiling_takes_no_quadratic_time():
    assert tiled((24, 24), around(22)) == ""
    assert tiled((102, 102), around(100)).endswith(
        "the 10004 stored boxes in [0:102, 0:102] overlap or form no grid"
    )
    assert tiled((25, 25), around(23)).endswith(
        "the 533 stored boxes in [0:25, 0:25] overlap or form no grid"
    )
    stairs = [region((n, n + 2), (n, n + 1)) for n in range(20_000)]
    assert "no stored box holds" in tiled((20_001, 20_000), stairs)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_tiling_agrees_with_counting_elements(data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2)))
    boxes = []
    for _ in range(data.draw(st.integers(0, 6))):
        starts = [data.draw(st.integers(0, size - 1)) for size in shape]
        stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
        boxes.append(Region(tuple(starts), tuple(stops)))
    counts = torch.zeros(shape)
    for box in boxes:
        counts[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))] += 1
    assert (tiled(shape, boxes) == "") == bool((counts == 1).all())


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.integers(0, 12))
def test_a_box_cut_any_number_of_times_tiles(seed, cuts):
    chance, boxes = random.Random(seed), [whole((8, 9, 4))]
    for _ in range(cuts):
        box = boxes.pop(chance.randrange(len(boxes)))
        dim = chance.randrange(3)
        cut = chance.randint(box.start[dim], box.stop[dim])
        left = Region(box.start, (*box.stop[:dim], cut, *box.stop[dim + 1 :]))
        right = Region((*box.start[:dim], cut, *box.start[dim + 1 :]), box.stop)
        boxes += [part for part in (left, right) if part.numel]
    assert tiled((8, 9, 4), list(boxes)) == ""
    assert len(boxes) == 1 or tiled((8, 9, 4), boxes[1:])


# --- writing


def described() -> tuple[list[Described], list[Item]]:
    halves = [region((0, 2), (0, 3)), region((2, 4), (0, 3))]
    big = whole((2**40,))
    tensors = [
        Described("model.w", torch.bfloat16, (4, 3), ("model", "w"), halves),
        Described("naïve.list.0", torch.float8_e4m3fn, (), ("naïve", "list", 0), [whole(())]),
        Described("empty", torch.float32, (0, 3), ("empty",), []),
        Described("big", torch.uint8, (2**40,), ("big",), [big]),
    ]
    items = [
        Item("model.w", (2, 0), 1, "b.distcp", 64, 1000),
        Item("model.w", (0, 0), 0, "a.distcp", 0, 1000),
        Item("naïve.list.0", (), 0, "a.distcp", 1024, 900),
        Item("big", (0,), 0, "a.distcp", 2048, 2**40 + 1000),
    ]
    return tensors, items


def test_torch_reads_what_is_written(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"".join(dcpmetadata.write(*described())))
    found = dcpdirs.metadata_of(tmp_path)
    assert type(found) is dcp_metadata.Metadata
    assert found.version == "1.0.0"
    assert found.planner_data == {
        "model.w": ("model", "w"),
        "naïve.list.0": ("naïve", "list", 0),
        "empty": ("empty",),
        "big": ("big",),
    }
    tensors, items = described()
    assert found.state_dict_metadata == {
        tensor.fqn: TensorStorageMetadata(
            TensorProperties(tensor.dtype),
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(b.start), torch.Size(b.shape)) for b in tensor.boxes],
        )
        for tensor in tensors
    }
    for item in items:
        assert found.storage_data[MetadataIndex(item.fqn, item.start)] == _StorageInfo(
            item.file, item.offset, item.length
        )
    hints = {(index.fqn, tuple(index.offset)): index.index for index in found.storage_data}
    assert hints == {(item.fqn, item.start): item.index for item in items}
    sizes = [size for tensor in found.state_dict_metadata.values() for size in [tensor.size]]
    assert {type(size) for size in sizes} == {torch.Size}
    assert {type(index.offset) for index in found.storage_data} == {torch.Size}


def test_what_is_written_is_read(tmp_path):
    tensors, items = described()
    for file in ("a.distcp", "b.distcp"):
        with (tmp_path / file).open("wb") as opened:
            opened.truncate(2**40 + 4096 if file == "a.distcp" else 4096)
    (tmp_path / ".metadata").write_bytes(b"".join(dcpmetadata.write(tensors, items)))
    found = read(tmp_path)
    assert found.tensors["model.w"].files == ("a.distcp", "b.distcp")
    assert {fqn: (t.dtype, t.shape, list(t.boxes)) for fqn, t in found.tensors.items()} == {
        t.fqn: (t.dtype, t.shape, list(t.boxes)) for t in tensors
    }
    assert found.paths == {tensor.fqn: tensor.path for tensor in tensors}
    assert {(i.key, i.offset, i.length) for f in found.files for i in found.items(f)} == {
        (f"{item.fqn}[{', '.join(map(str, item.start))}]", item.offset, item.length)
        for item in items
    }


def test_the_written_bytes_are_the_same_whatever_the_python_and_the_torch():
    written = b"".join(dcpmetadata.write(*described()))
    digest = "e3583c6384e6cdf8d20398737e7d943aa2a653745b059e98075a18997b0995f6"
    assert hashlib.sha256(written).hexdigest() == digest


class Rows:
    """Many boxes, none of which is there until it is asked for."""

    def __len__(self):
        return 20_000

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError
        return region((number, number + 1))


def test_writing_takes_no_memory_per_chunk():
    tensor = Described("w", torch.int8, (20_000,), ("w",), Rows())
    items = (Item("w", (n,), n, "a.distcp", 640 * n, 640) for n in range(20_000))
    tracemalloc.start()
    try:
        blocks = [len(block) for block in dcpmetadata.write([tensor], items)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(blocks) <= 64 << 10
    assert min(blocks[:-1]) > 60 << 10
    assert sum(blocks) > 1 << 21
    assert peak < 1 << 19
