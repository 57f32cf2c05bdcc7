"""DCP data files against torch.distributed.checkpoint, torch.load, zipfile and unzip."""

import io
import os
import re
import shutil
import subprocess
import zipfile
from itertools import pairwise, product
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from reshard import containers
from reshard.containers import FileIndex, TensorSpec, dcpfile, dcpmetadata
from reshard.errors import CheckpointError, LayoutError
from reshard.geometry import Region, item_name, row_major, whole
from tests.containers import dcpdirs
from tests.containers.test_torchfile import DTYPES
from tests.ranks import run_ranks

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
TENSORS = {
    "model.z.weight": dcpdirs.random_tensor(torch.bfloat16, (3, 5)),
    "model.empty": torch.zeros(0, 4),
    "model.scalar": torch.tensor(7.5),
    "naïve": dcpdirs.random_tensor(torch.float8_e4m3fn, (7,)),
    "long": torch.arange(70_000),
}


def states() -> dict[str, dict]:
    """What is saved by several ranks, by the name of the directory; seeded, so that all agree."""
    torch.manual_seed(0)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    line = grid._flatten("line")
    tensors = {"even": (8, 6), "uneven": (7, 5), "few": (2, 3), "row": (10,)}
    full = {name: torch.randn(shape).bfloat16() for name, shape in tensors.items()}

    def cut(mesh, *placements):
        return {n: distribute_tensor(t, mesh, placements) for n, t in full.items() if t.ndim > 1}

    return {
        "fsdp": {"model": cut(line, Shard(0)), "step": 3, "plain": full["row"]},
        "hsdp": {"model": cut(grid, Replicate(), Shard(0)), "lr": [0.5, {"x": full["row"]}]},
        "tensor-parallel": cut(grid, Shard(0), Shard(1)) | {"scalar": torch.tensor(1.5)},
        "twice": cut(grid, Shard(0), Shard(0)),
        "columns": {"a.b": {"c": cut(line, Shard(1))}, "int": torch.arange(5)},
    }


def save_everywhere(root: Path) -> None:
    for name, state in states().items():
        dcp.save(state, storage_writer=FileSystemWriter(root / name))
    state = states()["fsdp"]
    options = {"many": {"single_file_per_rank": False}, "threads": {"thread_count": 3}}
    for name, extra in options.items():
        dcp.save(state, storage_writer=FileSystemWriter(root / name, **extra))
    dist.barrier()


SAVED = ("fsdp", "hsdp", "tensor-parallel", "twice", "columns", "many", "threads")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(4, save_everywhere, root)
    return root


def index(root: Path, file: str = "a.distcp") -> FileIndex:
    """The index of a file, with all its items opened; an item opens when it is asked for."""
    found = dcpfile.index(root, file)
    return FileIndex(dict(found.entries), found.metadata)


def refusal(root: Path, file: str = "a.distcp") -> str:
    with pytest.raises(CheckpointError) as caught:
        index(root, file)
    assert str(caught.value).startswith(f"`{root / file}`: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the index


@pytest.mark.parametrize("name", SAVED)
def test_what_ranks_saved_is_read_as_torch_reads_it(saved, name):
    dcpdirs.assert_read_as_torch_reads(saved / name)


def test_the_saved_directories_hold_what_they_are_for(saved):
    chunks = {name: dcpdirs.metadata_of(saved / name).state_dict_metadata for name in SAVED}
    assert [tuple(c.sizes) for c in chunks["fsdp"]["model.few"].chunks].count((0, 3)) >= 1
    assert len(chunks["hsdp"]["model.even"].chunks) == 2
    assert {tuple(c.offsets) for c in chunks["tensor-parallel"]["uneven"].chunks} == {
        (0, 0), (0, 3), (4, 0), (4, 3),
    }  # fmt: skip
    assert len(dcpmetadata.read(saved / "many").files) > 4
    assert not dcpmetadata.read(saved / "fsdp").tensors["model.few"].boxes[2:]


def test_a_file_of_0_bytes_has_no_entries(tmp_path):
    dcpdirs.save(tmp_path / "c", {"a": torch.ones(2), "b": torch.ones(3)}, thread_count=4)
    empty = [path.name for path in (tmp_path / "c").glob("*.distcp") if not path.stat().st_size]
    assert empty
    assert not containers.index("dcpfile", tmp_path / "c", empty[0]).entries
    dcpdirs.assert_read_as_torch_reads(tmp_path / "c")


def test_what_fixtures_hold_is_read_as_torch_reads_it():
    paths = sorted(path.parent for path in FIXTURES.glob("*/**/.metadata"))
    if not paths:
        pytest.skip(f"no fixtures at {FIXTURES}")
    for path in paths:
        dcpdirs.assert_read_as_torch_reads(path)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_every_dtype_is_read(tmp_path, dtype):
    state = {"x": dcpdirs.random_tensor(dtype, (3, 2)), "y": torch.zeros((2, 0), dtype=dtype)}
    dcpdirs.assert_same(dcpdirs.ours(dcpdirs.save(tmp_path / "c", state)), state)


def test_parameters_are_read(tmp_path):
    module = torch.nn.Linear(3, 5)
    path = dcpdirs.save(tmp_path / "c", dict(module.named_parameters()))
    dcpdirs.assert_same(dcpdirs.ours(path), dict(module.named_parameters()))
    rewrite_item(path, module.weight)
    dcpdirs.assert_same({"weight": dcpdirs.ours(path)["weight"]}, {"weight": module.weight})


def rewrite_item(path: Path, value: object, fqn: str = "weight", **options) -> None:
    """Append a torch.save of `value` to the file, as the item of `fqn` after a gap."""
    metadata = dcpdirs.metadata_of(path)
    stored = next(v for k, v in metadata.storage_data.items() if k.fqn == fqn)
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    rewrite_bytes(path, fqn, buffer.getvalue())
    assert stored.length


def rewrite_bytes(path: Path, fqn: str, item: bytes) -> None:
    metadata = dcpdirs.metadata_of(path)
    stored = next(v for k, v in metadata.storage_data.items() if k.fqn == fqn)
    file = path / stored.relative_path
    stored.offset, stored.length = file.stat().st_size + 13, len(item)
    with file.open("ab") as opened:
        opened.write(b"PK\x03\x04gap......" + item)
    dcpdirs.pickle_metadata(path, metadata)


def test_files_of_any_name_with_gaps_between_items(tmp_path):
    tensors = {"b": torch.randn(4, 3), "weight": torch.randn(2, 5)}
    path = dcpdirs.save(tmp_path / "c", tensors)
    rewrite_item(path, tensors["weight"])
    metadata = dcpdirs.metadata_of(path)
    (path / "sub").mkdir()
    (path / "__0_0.distcp").rename(path / "sub" / "weights a.bin")
    for stored in metadata.storage_data.values():
        stored.relative_path = "sub/weights a.bin"
    dcpdirs.pickle_metadata(path, metadata)
    dcpdirs.assert_read_as_torch_reads(path)
    dcpdirs.assert_same(dcpdirs.ours(path), tensors)


def test_a_view_inside_its_storage_is_found_by_its_offset(tmp_path):
    base = torch.randn(6, 4)
    path = dcpdirs.save(tmp_path / "c", {"weight": base[2:4].clone()})
    rewrite_item(path, base[2:4])
    dcpdirs.assert_same(dcpdirs.ours(path), {"weight": base[2:4]})


def test_strides_of_dims_of_1_do_not_matter(tmp_path):
    column = torch.randn(5, 1).as_strided((5, 1), (1, 7))
    path = dcpdirs.save(tmp_path / "c", {"weight": column.contiguous()})
    rewrite_item(path, column)
    entry = index(path, "__0_0.distcp").entries["weight[0, 0]"]
    assert entry.strides == row_major((5, 1))
    dcpdirs.assert_same(dcpdirs.ours(path), {"weight": column})


def test_a_file_outside_the_metadata_has_no_entries(tmp_path):
    path = dcpdirs.save(tmp_path / "c", {"a": torch.ones(2)})
    (path / "stale.distcp").write_bytes(b"anything")
    assert not containers.index("dcpfile", path, "stale.distcp").entries
    with pytest.raises(CheckpointError, match=r"gone.distcp`: no such file"):
        containers.index("dcpfile", path, "gone.distcp")


BASE = torch.randn(4, 3)
BAD_ITEMS = {
    "transposed": (torch.randn(3, 4).t(), r"has the strides [1, 4], expected [3, 1]; save the ten"),
    "expanded": (torch.randn(1, 3).expand(4, 3), "has 12 elements up to 2, but its storage 3"),
    "wider rows": (torch.randn(4, 6)[:, :3], "has the strides [6, 1], expected [3, 1]"),
    "another shape": (torch.randn(3, 4), "holds float32 [3, 4], expected float32 [4, 3]"),
    "another dtype": (BASE.double(), "holds float64 [4, 3], expected float32 [4, 3]"),
    "a dict": ({"weight": BASE}, "holds a `dict`, expected one tensor"),
    "a list": ([BASE], "holds a `list`, expected one tensor"),
    "a sparse tensor": (BASE.to_sparse(), "asks for `torch._utils._rebuild_sparse_tensor`"),
}


@pytest.mark.parametrize("fault", BAD_ITEMS)
def test_an_item_that_is_not_what_the_metadata_says_is_refused(tmp_path, fault):
    value, message = BAD_ITEMS[fault]
    path = dcpdirs.save(tmp_path / "c", {"weight": BASE})
    rewrite_item(path, value)
    found = refusal(path, "__0_0.distcp")
    assert message in found
    assert "item `weight[0, 0]`: " in found


def test_a_legacy_item_is_refused(tmp_path):
    path = dcpdirs.save(tmp_path / "c", {"weight": BASE})
    rewrite_item(path, BASE, _use_new_zipfile_serialization=False)
    assert "is a legacy torch file, not a zip" in refusal(path, "__0_0.distcp")


@pytest.mark.parametrize(
    ("record", "payload", "method", "message"),
    [
        ("archive/byteorder", b"big", zipfile.ZIP_STORED, "is not little-endian"),
        ("archive/data/0", bytes(48), zipfile.ZIP_DEFLATED, "`data/0` is compressed"),
        ("archive/data/0", bytes(47), zipfile.ZIP_STORED, "storage of 48 bytes, but record"),
    ],
)
def test_a_zip_that_torch_does_not_write_is_refused(tmp_path, record, payload, method, message):
    path = dcpdirs.save(tmp_path / "c", {"weight": BASE})
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(path / "__0_0.distcp") as source,
        zipfile.ZipFile(buffer, "w") as target,
    ):
        for name in source.namelist():
            changed = name == record
            target.writestr(
                name, payload if changed else source.read(name), method if changed else None
            )
    rewrite_bytes(path, "weight", buffer.getvalue())
    assert message in refusal(path, "__0_0.distcp")


def test_an_item_is_not_read_beyond_its_length(tmp_path):
    path = dcpdirs.save(tmp_path / "c", {"weight": BASE})
    metadata = dcpdirs.metadata_of(path)
    (stored,) = metadata.storage_data.values()
    stored.length -= 30
    dcpdirs.pickle_metadata(path, metadata)
    assert f"truncated or not a torch zip file: {stored.length} bytes" in refusal(
        path, "__0_0.distcp"
    )


def test_a_file_that_shrinks_after_the_metadata_was_read_is_refused(tmp_path):
    path = dcpdirs.save(tmp_path / "c", {"weight": BASE, "b": BASE})
    dcpmetadata.read(path)
    os.truncate(path / "__0_0.distcp", 1700)
    message = refusal(path, "__0_0.distcp")
    assert re.search(r"item `.*`: the file is truncated: 1700 bytes, expected \d+; copy", message)


def test_a_file_that_shrinks_between_two_items_is_refused(tmp_path):
    path = dcpdirs.save(tmp_path / "c", {"weight": BASE, "b": BASE})
    entries = containers.index("dcpfile", path, "__0_0.distcp").entries
    keys = [item.key for item in dcpmetadata.read(path).items("__0_0.distcp")]
    assert entries[keys[0]]
    os.truncate(path / "__0_0.distcp", 1700)
    for found in (entries, containers.index("dcpfile", path, "__0_0.distcp").entries):
        with pytest.raises(CheckpointError, match="the file is truncated: 1700 bytes"):
            assert found[keys[1]]


# --- the skeleton


def written(root: Path) -> Path:
    return dcpdirs.write(root, TENSORS)


def specs() -> list[TensorSpec]:
    return [
        TensorSpec(item_name(k, (0,) * t.ndim), t.dtype, tuple(t.shape)) for k, t in TENSORS.items()
    ]


def items_of(root: Path) -> dict[str, bytes]:
    content = (root / "a.distcp").read_bytes()
    places = dcpfile.skeleton(specs(), {}).items
    return {key: content[offset : offset + size] for key, (offset, size) in places.items()}


def test_torch_loads_a_written_directory(tmp_path):
    path = written(tmp_path / "c")
    dcpdirs.assert_same(dcpdirs.load(path), TENSORS)
    dcpdirs.assert_same(dcpdirs.ours(path), TENSORS)
    dcp_to_torch_save(path, tmp_path / "m.pt")
    dcpdirs.assert_same(torch.load(tmp_path / "m.pt", weights_only=True), TENSORS)


def test_torch_loads_boxes_of_many_files(tmp_path):
    tensors = {"w": torch.randn(6, 8), "v": torch.randn(5), "s": torch.tensor(2)}
    files = {
        f"__{row}_{column}.distcp": [
            ("w", Region((3 * row, 4 * column), (3 * row + 3, 4 * column + 4)))
        ]
        for row, column in product(range(2), range(2))
    }
    files["__0_1.distcp"] += [("v", Region((2,), (5,))), ("s", whole(()))]
    files["__1_0.distcp"] += [("v", Region((0,), (2,)))]
    files["__9_9.distcp"] = []
    path = dcpdirs.write(tmp_path / "c", tensors, files, {"w": ("model", 3, "w")})
    assert (path / "__9_9.distcp").stat().st_size == 0
    dcpdirs.assert_read_as_torch_reads(path)
    dcpdirs.assert_same(dcpdirs.load(path), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_every_dtype(tmp_path, dtype):
    tensors = {"x": dcpdirs.random_tensor(dtype, (3, 2))}
    path = dcpdirs.write(tmp_path / "c", tensors)
    dcpdirs.assert_same(dcpdirs.load(path), tensors)
    dcpdirs.assert_same(dcpdirs.ours(path), tensors)


def test_each_item_is_a_torch_file_of_one_tensor(tmp_path):
    for (key, item), tensor in zip(
        items_of(written(tmp_path / "c")).items(), TENSORS.values(), strict=True
    ):
        alone = tmp_path / "alone.pt"
        alone.write_bytes(item)
        for options in ({}, {"mmap": True}):
            found = torch.load(alone, weights_only=True, **options)
            dcpdirs.assert_same({key: found}, {key: tensor})
            assert found.stride() == tensor.stride()
        dcpdirs.assert_same({key: torch.load(io.BytesIO(item), weights_only=True)}, {key: tensor})


def test_zipfile_and_unzip_find_every_checksum_right_once_patched(tmp_path):
    for item in items_of(written(tmp_path / "c")).values():
        alone = tmp_path / "alone.pt"
        alone.write_bytes(item)
        with zipfile.ZipFile(alone) as archive:
            assert archive.testzip() is None
        if shutil.which("unzip"):
            done = subprocess.run(["unzip", "-tq", alone], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def test_chunks_and_tensors_tile_the_file():
    laid_out = dcpfile.skeleton(specs(), {})
    sizes = {spec.key: prod(spec.shape) * spec.dtype.itemsize for spec in specs()}
    spans = [(offset, offset + len(chunk)) for offset, chunk in laid_out.chunks]
    assert spans == sorted(spans)
    spans += [(start, start + sizes[key]) for key, start in laid_out.offsets.items()]
    position = 0
    for start, stop in sorted(spans):
        assert start == position
        position = stop
    assert position == laid_out.size


def test_items_and_elements_are_64_byte_aligned_in_the_given_order():
    laid_out = dcpfile.skeleton(specs(), {})
    keys = [spec.key for spec in specs()]
    assert list(laid_out.items) == list(laid_out.offsets) == list(laid_out.checksums) == keys
    assert all(offset % 64 == 0 for offset, _ in laid_out.items.values())
    assert all(offset % 64 == 0 for offset in laid_out.offsets.values())
    spans = list(laid_out.items.values())
    for (start, size), (following, _) in pairwise(spans):
        assert 0 <= following - (start + size) < 64


def test_the_same_tensors_give_the_same_bytes_and_others_another_id():
    assert dcpfile.skeleton(specs(), {}) == dcpfile.skeleton(specs(), {"a": "b"})
    one, other = (dcpfile.skeleton([TensorSpec(k, torch.int8, ())], {}) for k in "ab")
    assert one.size == other.size
    assert one.chunks != other.chunks


def test_no_tensor_is_no_byte():
    assert dcpfile.skeleton([], {}) == containers.Skeleton(0, (), {}, {}, {})


def test_a_file_of_many_items_keeps_one_chunk_for_each():
    many = [TensorSpec(f"layers.{n}.weight[0, 0]", torch.bfloat16, (64, 64)) for n in range(700)]
    laid_out = dcpfile.skeleton(many, {})
    assert len(laid_out.chunks) == 701
    assert sum(len(chunk) for _, chunk in laid_out.chunks) < 700 * 1600


def test_a_dtype_that_torch_stores_otherwise_is_a_layout_error():
    with pytest.raises(LayoutError, match=r"tensor `x`.*torch.complex64"):
        dcpfile.skeleton([TensorSpec("x", torch.complex64, (2,))], {})


def test_tensors_beyond_4_gib(tmp_path):
    root = tmp_path / "c"
    root.mkdir()
    sizes = {"big": 2**32 + 5, "after": 10, "edge": 2**32 - 1}
    many = [TensorSpec(item_name(k, (0,)), torch.uint8, (size,)) for k, size in sizes.items()]
    laid_out = dcpfile.skeleton(many, {})
    with (root / "a.distcp").open("wb") as file:
        os.ftruncate(file.fileno(), laid_out.size)
        for offset, chunk in laid_out.chunks:
            os.pwrite(file.fileno(), chunk, offset)
        for key, size in sizes.items():
            os.pwrite(file.fileno(), b"\x05", laid_out.offsets[f"{key}[0]"] + size - 1)
    described = [
        dcpmetadata.Described(k, torch.uint8, (n,), (k,), [whole((n,))]) for k, n in sizes.items()
    ]
    items = [dcpmetadata.Item(k, (0,), 0, "a.distcp", *laid_out.items[f"{k}[0]"]) for k in sizes]
    (root / ".metadata").write_bytes(b"".join(dcpmetadata.write(described, items)))
    entries = index(root).entries
    assert {key: entry.offset for key, entry in entries.items()} == dict(laid_out.offsets)
    item = dcpmetadata.read(root).tensors["big"]
    assert item.boxes == (whole((2**32 + 5,)),)
    os.truncate(root / "a.distcp", laid_out.items["big[0]"][1])
    found = torch.load(root / "a.distcp", mmap=True, weights_only=True)
    assert (found.shape, int(found[-1]), int(found[0])) == ((2**32 + 5,), 5, 0)


# --- damage


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("small") / "c"
    return dcpdirs.save(root, {"a": torch.randn(2, 3), "b": torch.randn(3).to(torch.float8_e5m2)})


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10**6), piece=st.binary(min_size=1, max_size=3))
def test_a_changed_item_is_refused_or_inside_its_place(small, place, piece):
    file = small / "__0_0.distcp"
    content = file.read_bytes()
    place %= len(content) - len(piece)
    file.write_bytes(content[:place] + piece + content[place + len(piece) :])
    found, message = FileIndex({}, {}), ""
    try:
        found = index(small, file.name)
    except CheckpointError as error:
        message = str(error)
    finally:
        file.write_bytes(content)
    assert "\n" not in message
    items = {item.key: item for item in dcpmetadata.read(small).items(file.name)}
    for key, entry in found.entries.items():
        size = prod(entry.shape) * entry.dtype.itemsize
        stop = items[key].offset + items[key].length
        assert items[key].offset <= entry.offset <= entry.offset + size <= stop
