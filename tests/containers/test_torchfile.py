"""The torch zip container against torch.load, zipfile and unzip, and against hostile files."""

import io
import os
import pickle
import shutil
import subprocess
import zipfile
import zlib
from collections import OrderedDict
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.containers import FileIndex, TensorSpec, torchfile
from reshard.containers.torchfile import skeleton
from reshard.errors import CheckpointError, LayoutError

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
LEGACY_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
DTYPES = [*LEGACY_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64]
SPECS = [
    TensorSpec("z.weight", torch.bfloat16, (3, 5)),
    TensorSpec("empty", torch.float32, (0, 4)),
    TensorSpec("a", torch.int64, ()),
    TensorSpec("naïve", torch.float8_e4m3fn, (7,)),
    TensorSpec("large.dim", torch.float32, (70_000, 1)),
]
LOADS = [{"mmap": mmap, "weights_only": safe} for mmap in (False, True) for safe in (False, True)]


def index(path: Path) -> FileIndex:
    return torchfile.index(path.parent, path.name)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(spec: TensorSpec) -> torch.Tensor:
    limit = 2 if spec.dtype is torch.bool else 120
    size = prod(spec.shape) * spec.dtype.itemsize
    return torch.randint(limit, (size,), dtype=torch.uint8).view(spec.dtype).view(spec.shape)


def filled(specs: list[TensorSpec]) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A file made of its skeleton and random tensors, with their checksums in place."""
    laid_out = skeleton(specs, {})
    content = bytearray(laid_out.size)
    for offset, chunk in laid_out.chunks:
        content[offset : offset + len(chunk)] = chunk
    tensors = {spec.key: random_tensor(spec) for spec in specs}
    for key, tensor in tensors.items():
        data, start = raw(tensor), laid_out.offsets[key]
        content[start : start + len(data)] = data
        for place in laid_out.checksums[key]:
            content[place : place + 4] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(content), tensors


def fill(path: Path, specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    content, tensors = filled(specs)
    path.write_bytes(content)
    return tensors


def assert_index_matches(path: Path, found: FileIndex, tensors: dict[str, torch.Tensor]) -> None:
    """Every entry reads the bytes that torch.load reads."""
    content = path.read_bytes()
    assert list(found.entries) == list(tensors)
    for key, tensor in tensors.items():
        entry = found.entries[key]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert entry.strides == tensor.stride()
        if not tensor.numel():
            continue
        storage = torch.frombuffer(bytearray(content[entry.offset :]), dtype=torch.uint8)
        whole = len(storage) // entry.dtype.itemsize * entry.dtype.itemsize
        flat = storage[:whole].view(entry.dtype)
        assert raw(flat.as_strided(entry.shape, entry.strides)) == raw(tensor)


def zipped(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """A torch file, as Python's zipfile writes it, around a hand-made pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/version", b"3\n")
        for name, payload in (records or {}).items():
            archive.writestr(f"m/{name}", payload)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        index(path)
    assert str(caught.value).startswith(f"`{path}`: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def index_or_message(path: Path) -> tuple[FileIndex, str]:
    try:
        return index(path), ""
    except CheckpointError as error:
        return FileIndex({}, {}), str(error)


# --- the skeleton


@pytest.mark.parametrize("options", LOADS, ids=str)
def test_torch_loads_a_filled_skeleton(tmp_path, options):
    tensors = fill(tmp_path / "m.pth", SPECS)
    found = torch.load(tmp_path / "m.pth", **options)
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert found[key].stride() == tensor.stride()
        assert raw(found[key]) == raw(tensor)
        assert not found[key].requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_every_dtype(tmp_path, dtype):
    path = tmp_path / "m.pth"
    tensors = fill(path, [TensorSpec("x", dtype, (3, 2)), TensorSpec("y", dtype, (2, 0))])
    found = torch.load(path, weights_only=True)
    assert all(found[key].dtype == dtype for key in tensors)
    assert raw(found["x"]) == raw(tensors["x"])
    assert_index_matches(path, index(path), tensors)


def test_zipfile_finds_every_checksum_right_once_patched(tmp_path):
    fill(tmp_path / "m.pth", SPECS)
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert archive.testzip() is None


def test_unzip_finds_no_error(tmp_path):
    if not shutil.which("unzip"):
        pytest.skip("unzip is not installed")
    fill(tmp_path / "m.pth", SPECS)
    done = subprocess.run(["unzip", "-tq", tmp_path / "m.pth"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_chunks_and_tensors_tile_the_file():
    laid_out = skeleton(SPECS, {})
    spans = [(offset, offset + len(chunk)) for offset, chunk in laid_out.chunks]
    assert spans == sorted(spans)
    sizes = {spec.key: prod(spec.shape) * spec.dtype.itemsize for spec in SPECS}
    spans += [(start, start + sizes[key]) for key, start in laid_out.offsets.items()]
    position = 0
    for start, stop in sorted(spans):
        assert start == position
        position = stop
    assert position == laid_out.size


def test_every_tensor_is_64_byte_aligned_in_the_given_order():
    offsets = skeleton(SPECS, {}).offsets
    assert list(offsets) == [spec.key for spec in SPECS]
    assert list(offsets.values()) == sorted(offsets.values())
    assert all(offset % 64 == 0 for offset in offsets.values())


def test_records_have_no_data_descriptor_and_no_date():
    content, _ = filled(SPECS)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            assert info.flag_bits == 0x0800
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert info.filename.startswith("archive/")
        assert "archive/.format_version" not in archive.namelist()
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/.data/serialization_id").isdigit()
        assert len(archive.read("archive/.data/serialization_id")) == 40


def test_the_same_tensors_give_the_same_bytes_and_others_another_id():
    assert skeleton(SPECS, {}) == skeleton(SPECS, {})
    ids = set()
    for specs in (SPECS, SPECS[:-1], [TensorSpec("b", torch.int64, ())]):
        with zipfile.ZipFile(io.BytesIO(filled(specs)[0])) as archive:
            ids.add(archive.read("archive/.data/serialization_id"))
    assert len(ids) == 3


def test_a_skeleton_of_no_tensors_is_an_empty_dict(tmp_path):
    fill(tmp_path / "m.pth", [])
    assert torch.load(tmp_path / "m.pth", weights_only=True) == {}
    assert index(tmp_path / "m.pth") == FileIndex({}, {})


def test_a_dtype_that_torch_stores_otherwise_is_a_layout_error():
    with pytest.raises(LayoutError, match=r"tensor `x`.*torch.complex64"):
        skeleton([TensorSpec("x", torch.complex64, (2,))], {})


# --- beyond 4 GiB, 65535 records and 32 bits: sparse files


def write_sparse(path: Path, specs: list[TensorSpec], marks: dict[str, dict[int, int]]) -> None:
    """Write the chunks, and the uint8 elements `marks[key][position]`, into a hole."""
    laid_out = skeleton(specs, {})
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), laid_out.size)
        for offset, chunk in laid_out.chunks:
            os.pwrite(file.fileno(), chunk, offset)
        for key, elements in marks.items():
            for position, value in elements.items():
                os.pwrite(file.fileno(), bytes([value]), laid_out.offsets[key] + position)


@pytest.mark.parametrize(
    "first_bytes",
    [2**32 - 2, 2**32 - 1, 2**32, 5 * 2**30, 2**32 - 1500],
)
def test_torch_maps_tensors_and_offsets_around_4_gib(tmp_path, first_bytes):
    path = tmp_path / "m.pth"
    sizes = {"big": first_bytes, "after": 10, "huge": 2**33 + 3, "last": 7}
    specs = [TensorSpec(key, torch.uint8, (size,)) for key, size in sizes.items()]
    marks = {key: {0: 3, size // 2: 4, size - 1: 5} for key, size in sizes.items()}
    write_sparse(path, specs, marks)
    found = torch.load(path, mmap=True, weights_only=True)
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {
        key: (size,) for key, size in sizes.items()
    }
    for key, elements in marks.items():
        assert {position: int(found[key][position]) for position in elements} == elements
    assert {key: entry.offset for key, entry in index(path).entries.items()} == dict(
        skeleton(specs, {}).offsets
    )
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == first_bytes


def test_dims_strides_and_storages_beyond_32_bits_survive(tmp_path):
    path = tmp_path / "m.pth"
    specs = [TensorSpec("x", torch.uint8, (2, 2**31 + 1)), TensorSpec("y", torch.int64, (2**31,))]
    write_sparse(path, specs, {"x": {2**31 + 1: 9}})
    found = torch.load(path, mmap=True, weights_only=True)
    assert found["x"].stride() == (2**31 + 1, 1) == index(path).entries["x"].strides
    assert int(found["x"][1, 0]) == 9
    assert found["y"].shape == (2**31,)


def test_more_records_than_16_bits_count(tmp_path):
    path, count = tmp_path / "m.pth", 65_530
    specs = [TensorSpec(f"t{number}", torch.uint8, (1,)) for number in range(count)]
    write_sparse(path, specs, {f"t{count - 1}": {0: 7}})
    found = torch.load(path, mmap=True, weights_only=True)
    assert (len(found), int(found[f"t{count - 1}"])) == (count, 7)
    assert len(index(path).entries) == count
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == count + 5


@pytest.mark.parametrize(("size", "is_64_bit"), [(2**32 - 2, False), (2**32 - 1, True)])
def test_a_size_that_fills_32_bits_is_written_in_64(size, is_64_bit):
    laid_out = skeleton([TensorSpec("x", torch.uint8, (size,))], {})
    header, entry = laid_out.checksums["x"][0] - 14, laid_out.checksums["x"][1] - 16
    front = b"".join(chunk for offset, chunk in laid_out.chunks if offset < laid_out.offsets["x"])
    back = b"".join(chunk for offset, chunk in laid_out.chunks if offset > laid_out.offsets["x"])
    back_start = laid_out.size - len(back)
    name = len("archive/data/0")
    extras = front[header + 30 + name :], back[entry - back_start + 46 + name :]
    wide = b"\x01\0\x10\0" + size.to_bytes(8, "little") * 2
    assert [extra.startswith(wide) for extra in extras] == [is_64_bit] * 2
    shorts = front[header + 18 :][:8], back[entry - back_start + 20 :][:8]
    assert shorts == (min(size, 2**32 - 1).to_bytes(4, "little") * 2,) * 2


@pytest.mark.parametrize(("records", "is_64_bit"), [(65_534, False), (65_535, True)])
def test_a_count_that_fills_16_bits_is_written_in_64(records, is_64_bit):
    specs = [TensorSpec(f"t{number}", torch.uint8, (1,)) for number in range(records - 5)]
    end = b"".join(chunk for _, chunk in skeleton(specs, {}).chunks[-3:])
    assert (b"PK\x06\x06" in end) == is_64_bit


# --- the index


def views() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8)
    half = torch.randn(100).bfloat16()
    return {
        "base": base,
        "transposed": base.t(),
        "rows": base[2:4],
        "column": base[:, 3],
        "steps": base[1::2, ::3],
        "permuted": half[10:34].view(2, 3, 4).permute(2, 0, 1),
        "tied": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "tail": half[100:],
        "float8": torch.randn(4, 4).to(torch.float8_e4m3fn)[1:],
        "uint16": torch.arange(9).to(torch.uint16)[2:],
    }


def parameters() -> OrderedDict:
    module = torch.nn.Linear(3, 5)
    return OrderedDict({**module.state_dict(keep_vars=True), "n": torch.nn.Parameter(module.bias)})


def module_state() -> OrderedDict:
    # Has the attribute `_metadata`, which the pickle sets by BUILD.
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).bfloat16().state_dict()


HUNDRED = tuple(f"n{n:03}" for n in range(100))
SAVED = {
    "views": views,
    "parameters": parameters,
    "module_state": module_state,
    **{str(dtype): (lambda dtype=dtype: {"x": torch.ones(3, dtype=dtype)}) for dtype in DTYPES},
}


@pytest.mark.parametrize("name", SAVED)
def test_index_matches_torch_on_its_own_files(tmp_path, name):
    path = tmp_path / "m.pth"
    torch.save(SAVED[name](), path)
    assert_index_matches(path, index(path), torch.load(path, weights_only=True))


def test_a_single_inner_dict_is_taken_and_other_values_are_skipped(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    torch.save(
        {"model": {**tensors, "step": 7, "lr": 0.5, "list": [1, None, True]}}, tmp_path / "m.pt"
    )
    assert_index_matches(tmp_path / "m.pt", index(tmp_path / "m.pt"), tensors)
    torch.save({**tensors, "optimizer": {0: {"x": torch.ones(2)}}}, tmp_path / "n.pt")
    assert_index_matches(tmp_path / "n.pt", index(tmp_path / "n.pt"), tensors)
    assert index(tmp_path / "n.pt").others == ("optimizer",)


ONE, TWO = {"a": torch.ones(3)}, {"b": torch.zeros(2)}
HELD = {
    "tensors alone": (ONE, "a", ()),
    "tensors and others": ({**ONE, "step": 7, "lr": 0.1, 5: None}, "a", ("5", "lr", "step")),
    "one dict": ({"anything": ONE}, "a", ()),
    "one dict and others": ({"x": ONE, "step": 7, "args": {"lr": 1}}, "a", ("args", "step")),
    "weights and averages": ({"ema": ONE, "model": TWO}, "b", ("ema",)),
    "another name": ({"ema": ONE, "model_state_dict": TWO, "n": 1}, "b", ("ema", "n")),
    "nothing deeper": ({"state_dict": ONE, "optimizer": {"state": {0: TWO}}}, "a", ("optimizer",)),
    "no tensor": ({"model": {"deeper": ONE}, "n": 1}, None, ("model", "n")),
    "names to escape": ({**ONE, "\x1b[31m\n": 1, "z" * 99: 2}, "a", (r"\x1b[31m\n", "z" * 80)),
    "many": ({**ONE, **{f"n{n:03}": n for n in range(300)}}, "a", HUNDRED),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_skipped_is_named(tmp_path, name):
    value, key, others = HELD[name]
    torch.save(value, tmp_path / "m.pt")
    found = index(tmp_path / "m.pt")
    assert list(found.entries) == ([] if key is None else [key])
    assert found.others == others


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {**ONE, "ema\x1b": TWO},
            r"tensors both at the top and inside `ema\x1b`; save the weights alone",
        ),
        (
            {"y\n": ONE, "x": TWO, "step": 1},
            r"holds 2 dicts of tensors, which are the weights? found `x`, `y\n`; save the weights",
        ),
        ({"model": ONE, "state_dict": TWO}, "the weights? found `model`, `state_dict`; save"),
    ],
)
def test_tensors_in_two_places_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "m.pt")
    assert message in refusal(tmp_path / "m.pt")


def test_a_dict_that_recurs_is_looked_at_once(tmp_path):
    """Otherwise this takes 10^10 steps."""
    inner = dict.fromkeys(range(100_000))
    path = zipped(tmp_path / "m.pth", pickle.dumps(dict.fromkeys(range(100_000), inner), 2))
    assert len(index(path).others) == 100


def test_an_unaligned_file_of_zipfile_with_another_prefix_is_read(tmp_path):
    tensors = views()
    torch.save(tensors, tmp_path / "m.pth")
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as source,
        zipfile.ZipFile(tmp_path / "old.pth", "w") as target,
    ):
        for name in source.namelist():
            _, _, rest = name.partition("/")
            if not rest.startswith(".") and rest != "byteorder":
                target.writestr(f"consolidated/{rest}", source.read(name))
    assert_index_matches(tmp_path / "old.pth", index(tmp_path / "old.pth"), tensors)


def test_index_matches_torch_on_the_fixtures():
    paths = sorted(FIXTURES.glob("*/checkpoint/*.pth"))
    if not paths:
        pytest.skip(f"no fixtures at {FIXTURES}")
    for path in paths:
        assert_index_matches(path, index(path), torch.load(path, weights_only=True))


# --- what is refused


class Reduced:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "shown"),
    [(os.system, r"posix.system"), (eval, r"__builtin__.eval"), (getattr, r"__builtin__.getattr")],
)
@pytest.mark.parametrize("protocol", [2, 3])
def test_a_pickle_that_calls_is_refused_by_name_and_nothing_runs(
    tmp_path, function, shown, protocol
):
    command = f"touch {tmp_path}/ran" if function is os.system else f"open('{tmp_path}/ran','w')"
    pickled = pickle.dumps({"x": Reduced(function, command)}, protocol=protocol)
    message = refusal(zipped(tmp_path / "m.pth", pickled))
    shown = shown if protocol == 2 else shown.replace("__builtin__", "builtins")
    assert message == (
        f"`{tmp_path / 'm.pth'}`: its pickle asks for `{shown}`, which is not allowed; "
        "nothing was executed"
    )
    assert not (tmp_path / "ran").exists()


def tensor_pickle(
    *, numel: int = 6, offset: int = 0, shape=(2, 3), strides=(3, 1), key="x", record="0"
) -> bytes:
    """What a file of one float32 tensor holds, with numbers to get wrong."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return ("storage", torch.FloatStorage, record, "cpu", numel)
            return None

    hooks: OrderedDict = OrderedDict()
    arguments = (Storage(), offset, shape, strides, False, hooks)
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({key: Reduced(torch._utils._rebuild_tensor_v2, *arguments)})
    return buffer.getvalue()


def test_the_handmade_tensor_is_right_before_it_is_made_wrong(tmp_path):
    path = zipped(tmp_path / "m.pth", tensor_pickle(), {"data/0": bytes(24)})
    assert_index_matches(path, index(path), torch.load(path, weights_only=True))


BAD_TENSORS = {
    "beyond the storage": ({"shape": (3, 3)}, "tensor `x` has 9 elements up to 8, but its sto"),
    "by a stride": ({"strides": (4, 1)}, "tensor `x` has 6 elements up to 6, but its storage 6"),
    "by the offset": ({"offset": 1}, "tensor `x` has 6 elements up to 6, but its storage 6"),
    "an empty one": ({"shape": (0, 3), "offset": 7}, "tensor `x` has 0 elements up to 6"),
    "expanded": ({"shape": (2**50, 3), "strides": (0, 1)}, "tensor `x` has 3377699720527872 ele"),
    "thousands of digits": ({"shape": (1 << 1900,) * 2}, "must be integers from 0"),
    "a huge shape with an empty dim": (
        {"shape": (0, 1 << 62, 4), "strides": (1, 1, 1)},
        "a tensor has more elements than any file",
    ),
    "beyond the record": ({"numel": 7}, "storage of 28 bytes, but record `data/0` holds 24"),
    "a negative numel": ({"numel": -6}, "names a storage in a way"),
    "a huge numel": ({"numel": 1 << 80}, "names a storage in a way"),
    "a negative offset": ({"offset": -1}, "must be integers from 0"),
    "a negative dim": ({"shape": (-2, 3)}, "must be integers from 0"),
    "a negative stride": ({"strides": (-3, 1)}, "must be integers from 0"),
    "a bool dim": ({"shape": (True, 3)}, "must be integers from 0"),
    "a list for a shape": ({"shape": [2, 3]}, "is not a tuple of 8 dims at most"),
    "nine dims": ({"shape": (1,) * 9, "strides": (1,) * 9}, "is not a tuple of 8 dims at most"),
    "fewer strides": ({"strides": (1,)}, "2 dims and 1 strides"),
    "no such record": ({"record": "7"}, "has no record `data/7`"),
    "a path for a record": ({"record": "../../etc"}, "has no record `data/../../etc`"),
    "a long record name": ({"record": "7" * 1000}, "names a storage in a way"),
    "a key of bytes": ({"key": 5}, "the key `5` of a tensor is not printable text"),
    "a newline in a key": ({"key": "a\nb"}, r"the key `a\nb` of a tensor is not printable text"),
    "half a surrogate": ({"key": "\ud800"}, r"the key `\ud800` of a tensor is not printable"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_a_tensor_that_lies_outside_is_refused(tmp_path, fault):
    changes, message = BAD_TENSORS[fault]
    path = zipped(tmp_path / "m.pth", tensor_pickle(**changes), {"data/0": bytes(24)})
    assert message in refusal(path)


BOMBS = {
    "nested marks": (b"(" * 10_000 + b".", "nested more than 100 deep"),
    "nested tuples": (b")" + b"\x85" * 100_000 + b".", "holds a `tuple`, expected a dict"),
    "nested lists": (b"]" * 100_000 + b"a" * 99_999 + b".", "holds a `list`, expected a dict"),
    # Deep enough to cost 2^22 hashes, and no more: without the check this must fail, not hang.
    "exponential hash": (b"})" + b"q\0h\0\x86" * 22 + b"Ns.", "key of its dicts is a `tuple`"),
    "colliding ints": (b"}\x8a\x08" + b"\x7f" * 8 + b"Ns.", "key of its dicts is a `int`"),
    "a long of 2 GiB": (b"\x8b\xff\xff\xff\x7f.", "its pickle is damaged"),
    "text of 4 GiB": (b"X\xff\xff\xff\xff.", "its pickle is damaged"),
    "bytes of 2^56": (b"\x8e" + b"\xff" * 7 + b"\0.", "its pickle is damaged"),
    "a bytearray of 2^40": (b"\x96" + b"\xff" * 5 + b"\0\0\0.", "its pickle is damaged"),
    "endless lists": (b"]" * 300_000 + b".", "makes more lists, dicts, tuples and texts than a"),
    "endless opcodes": (b"N" * 3_000_001 + b".", "more than 3000000 opcodes"),
    "a code object": (b"\x82\x01.", "uses the opcode EXT1"),
    "an empty stack": (b"u.", "its pickle is damaged"),
    "an unknown memo": (b"h\x07.", "its pickle is damaged"),
    "no end": (b"}", "its pickle is damaged"),
    "items of a list": (b"](K\0K\0u.", "sets items of what is no dict"),
    "odd items": (b"}(K\0u.", "sets items of what is no dict"),
    "appended to a dict": (b"}K\0a.", "appends to what is no list"),
    "a call of text": (b"X\x01\0\0\0a)R.", "builds a tensor in a way"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R.", "builds a tensor in a way"),
    "a foreign identity": (b"X\x01\0\0\0aQ.", "names a storage in a way"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_bomb_is_refused(tmp_path, bomb):
    pickled, message = BOMBS[bomb]
    assert message in refusal(zipped(tmp_path / "m.pth", b"\x80\x02" + pickled))


def test_a_memo_index_costs_no_memory(tmp_path):
    # Python's own unpickler allocates a table of this length.
    path = zipped(tmp_path / "m.pth", b"\x80\x02}r\xff\xff\xff\xff.")
    assert index(path) == FileIndex({}, {})


def test_a_huge_pickle_is_refused_unread(tmp_path):
    path = tmp_path / "m.pth"
    write_sparse(path, [TensorSpec("x", torch.uint8, (2**25 + 1,))], {})
    content = path.read_bytes().replace(b"archive/data.pkl", b"archive/data.xxx")
    path.write_bytes(content.replace(b"archive/data/0", b"b/////data.pkl"))
    assert "holds 0 `*/data.pkl`, expected 1" in refusal(path)
    path.write_bytes(content.replace(b"archive/data/0", b"arch1/data.pkl"))
    assert "takes 33554433 bytes, expected at most 33554432" in refusal(path)


def test_a_legacy_file_is_refused_with_what_to_do(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert "is a legacy torch file, not a zip; load it and re-save with torch.save" in refusal(
        tmp_path / "m.pth"
    )


def test_a_big_endian_file_is_refused(tmp_path):
    path = zipped(tmp_path / "m.pth", tensor_pickle(), {"data/0": bytes(24), "byteorder": b"big"})
    assert "is not little-endian" in refusal(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_a_compressed_record_is_refused(tmp_path, record):
    records = {"data.pkl": tensor_pickle(), "data/0": bytes(24)}
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        for name, payload in records.items():
            method = zipfile.ZIP_DEFLATED if name == record else zipfile.ZIP_STORED
            archive.writestr(f"m/{name}", payload, method)
    assert f"record `{record}` is compressed; re-save it with torch.save" in refusal(
        tmp_path / "m.pth"
    )


def test_a_record_that_only_claims_to_be_compressed_is_refused(tmp_path):
    path = zipped(tmp_path / "m.pth", tensor_pickle(), {"data/0": bytes(24)})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"m/data/0") - 46 + 10] = zipfile.ZIP_DEFLATED
    path.write_bytes(content)
    assert "record `data/0` is compressed" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a torch zip file"),
        (b"PK\x03\x04", "truncated or not a torch zip file: 4 bytes"),
        (b"PK\x03\x04" + bytes(100), "truncated or not a torch zip file: 104 bytes"),
        (b"GGUF" + bytes(100), "is not a torch zip file"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    (tmp_path / "m.pth").write_bytes(content)
    assert message in refusal(tmp_path / "m.pth")


def test_a_zip_of_two_checkpoints_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    assert "holds 2 `*/data.pkl`, expected 1" in refusal(tmp_path / "m.pth")


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    assert "cannot be read: No such file" in refusal(tmp_path / "m.pth")


def test_a_damaged_pickle_is_found_by_its_checksum(tmp_path):
    content, _ = filled(SPECS)
    (tmp_path / "m.pth").write_bytes(content.replace(b"z.weight", b"z.height"))
    assert "record `data.pkl` is damaged: CRC32" in refusal(tmp_path / "m.pth")


def test_a_record_beyond_the_file_is_called_truncated(tmp_path):
    content, _ = filled([TensorSpec("x", torch.uint8, (8,))])
    size = (8).to_bytes(4, "little") * 2
    entry = content.rindex(b"archive/data/0") - 26
    assert content[entry : entry + 8] == size
    longer = (2**20).to_bytes(4, "little") * 2
    (tmp_path / "m.pth").write_bytes(content[:entry] + longer + content[entry + 8 :])
    assert f"truncated: {len(content)} bytes, but `archive/data/0` ends at" in refusal(
        tmp_path / "m.pth"
    )


@pytest.mark.parametrize("sixteenth", range(16))
@pytest.mark.parametrize("writer", ["torch", "reshard"])
def test_a_file_cut_anywhere_is_refused(tmp_path, writer, sixteenth):
    path = tmp_path / "m.pth"
    if writer == "torch":
        torch.save(views(), path)
    else:
        fill(path, SPECS)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenth // 16])
    assert ("truncated" if sixteenth else "is not a torch zip file") in refusal(path)


SMALL, _ = filled(SPECS[:4])


@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, len(SMALL) - 1), value=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, position, value):
    content = bytearray(SMALL)
    content[position] ^= value
    assert_refused_or_inside(tmp_path / "m.pth", bytes(content))


PICKLED = tensor_pickle()


@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.integers(0, len(PICKLED) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_changed_pickle_with_a_right_checksum_is_refused_or_harmless(
    tmp_path, position, value, cut
):
    rest = b"" if cut else PICKLED[position + 1 :]
    path = zipped(
        tmp_path / "m.pth",
        PICKLED[:position] + bytes([value]) + rest,
        {"data/0": bytes(24)},
    )
    assert_refused_or_inside(path, path.read_bytes())


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    opcodes=st.lists(st.sampled_from([bytes([c]) for c in b"})](.tQRsuabN\x85\x86\x87\x88q\0h"]))
)
def test_random_opcodes_are_refused_or_harmless(tmp_path, opcodes):
    path = zipped(tmp_path / "m.pth", b"\x80\x02" + b"".join(opcodes) + b".")
    assert_refused_or_inside(path, path.read_bytes())


def assert_refused_or_inside(path: Path, content: bytes) -> None:
    """The file is refused in one line, or each of its tensors lies inside it."""
    path.write_bytes(content)
    found, message = index_or_message(path)
    assert "\n" not in message
    for entry in found.entries.values():
        steps = zip(entry.shape, entry.strides, strict=True)
        last = sum((length - 1) * stride for length, stride in steps) if prod(entry.shape) else -1
        assert 0 <= entry.offset <= entry.offset + (last + 1) * entry.dtype.itemsize <= len(content)
