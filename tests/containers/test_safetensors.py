"""The safetensors container against the safetensors library, and against damaged headers."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from reshard.containers import FileIndex, TensorSpec, safetensors
from reshard.containers.safetensors import skeleton
from reshard.errors import CheckpointError, LayoutError

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SPECS = [
    TensorSpec("z.weight", torch.bfloat16, (3, 5)),
    TensorSpec("empty", torch.float32, (0, 4)),
    TensorSpec("a", torch.int64, ()),
    TensorSpec("naïve", torch.float8_e4m3fn, (7,)),
]


def index(path: Path) -> FileIndex:
    return safetensors.index(path.parent, path.name)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def random_tensor(spec: TensorSpec) -> torch.Tensor:
    size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
    limit = 2 if spec.dtype is torch.bool else 120
    return torch.randint(limit, (size,), dtype=torch.uint8).view(spec.dtype).view(spec.shape)


def fill(path: Path, specs: list[TensorSpec], metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """Write a file from its skeleton and random tensors, which are returned."""
    laid_out = skeleton(specs, metadata)
    content = bytearray(laid_out.size)
    for offset, chunk in laid_out.chunks:
        content[offset : offset + len(chunk)] = chunk
    tensors = {spec.key: random_tensor(spec) for spec in specs}
    for key, tensor in tensors.items():
        start = laid_out.offsets[key]
        content[start : start + len(raw(tensor))] = raw(tensor)
    path.write_bytes(content)
    return tensors


def header_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def assert_index_matches(path: Path, found: FileIndex) -> None:
    """Every entry reads the bytes that the safetensors library reads."""
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert found.metadata == (file.metadata() or {})
        assert set(found.entries) == set(file.keys())
        for key, entry in found.entries.items():
            tensor = file.get_tensor(key)
            assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
            assert entry.strides == tensor.stride()
            expected = raw(tensor)
            assert content[entry.offset : entry.offset + len(expected)] == expected


def written(path: Path, header: object, data: bytes = b"", *, pad: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text + pad).to_bytes(8, "little") + text + pad + data)
    return path


def described(start: int, stop: int, shape: object = (2,), dtype: object = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def index_or_message(path: Path) -> tuple[FileIndex, str]:
    try:
        return index(path), ""
    except CheckpointError as error:
        return FileIndex({}, {}), str(error)


# --- the skeleton


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "b": "é", "a": "1"}])
def test_the_library_reads_a_filled_skeleton(tmp_path, metadata):
    path = tmp_path / "m.safetensors"
    tensors = fill(path, SPECS, metadata)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
        assert all(raw(file.get_tensor(key)) == raw(t) for key, t in tensors.items())
        assert all(file.get_tensor(key).shape == t.shape for key, t in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_reads_every_dtype(tmp_path, dtype):
    path = tmp_path / "m.safetensors"
    tensors = fill(path, [TensorSpec("x", dtype, (3, 2))], {})
    with safe_open(path, "pt") as file:
        found = file.get_tensor("x")
    assert (found.dtype, raw(found)) == (dtype, raw(tensors["x"]))
    assert_index_matches(path, index(path))


def test_metadata_comes_first_and_is_written_even_if_empty(tmp_path):
    path = tmp_path / "m.safetensors"
    fill(path, SPECS, {})
    assert header_of(path).startswith(b'{"__metadata__":{},"z.weight":{"dtype":"BF16",')


def test_tensors_keep_the_given_order_without_gap(tmp_path):
    laid_out = skeleton(SPECS, {})
    position = laid_out.offsets["z.weight"]
    for spec in SPECS:
        assert laid_out.offsets[spec.key] == position
        position += torch.Size(spec.shape).numel() * spec.dtype.itemsize
    assert position == laid_out.size


@pytest.mark.parametrize("length", range(1, 65, 7))
def test_the_first_tensor_byte_is_64_byte_aligned(length):
    laid_out = skeleton([TensorSpec("k" * length, torch.float32, (2,))], {})
    assert laid_out.offsets["k" * length] % 64 == 0
    assert len(laid_out.chunks) == 1
    assert len(laid_out.chunks[0][1]) == laid_out.offsets["k" * length]


def test_no_checksum_is_asked_for():
    assert skeleton(SPECS, {}).checksums == {}


def test_a_dtype_that_the_format_lacks_is_a_layout_error():
    with pytest.raises(LayoutError, match=r"tensor `x`.*torch.complex64"):
        skeleton([TensorSpec("x", torch.complex64, (2,))], {})


# --- the index


def test_index_matches_the_library_on_its_own_files(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {"b": torch.randn(5, 3), "a": torch.randn(7).bfloat16(), "e": torch.zeros(2, 0)}
    save_file(tensors, path, {"format": "pt"})
    assert_index_matches(path, index(path))


def test_index_matches_the_library_on_the_fixtures():
    paths = sorted(FIXTURES.glob("*/checkpoint/**/*.safetensors"))
    if not paths:
        pytest.skip(f"no fixtures at {FIXTURES}")
    for path in paths:
        assert_index_matches(path, index(path))


BAD_HEADERS = {
    "a duplicate": (b'{"x":{"a":1},"x":{"a":1}}', 0, "the key `x` appears twice"),
    "a duplicate field": (b'{"x":{"dtype":"U8","dtype":"I8"}}', 0, "the key `dtype` appears twice"),
    "an unknown dtype": ({"x": described(0, 2, dtype="F4")}, 2, "has dtype `F4`, expected one of"),
    "a list as dtype": ({"x": described(0, 2, dtype=["U8"])}, 2, "has dtype `none`"),
    "a wrong span": ({"x": described(0, 3)}, 3, "spans 3 bytes, but its shape and U8 take 2"),
    "a negative dim": ({"x": described(0, 2, [-2])}, 2, "`shape` that is not a list of non-neg"),
    "a bool dim": ({"x": described(0, 1, [True])}, 1, "`shape` that is not a list of non-neg"),
    "a float dim": ({"x": described(0, 2, [2.0])}, 2, "`shape` that is not a list of non-neg"),
    "no shape": ({"x": {"dtype": "U8", "data_offsets": [0, 0]}}, 0, "has a `shape` that"),
    "nine dims": ({"x": described(0, 1, [1] * 9)}, 1, "has 9 dims, expected at most 8"),
    "a swapped span": ({"x": described(2, 0)}, 2, "not a start and a stop"),
    "a hole": ({"x": described(0, 2), "y": described(3, 5)}, 5, "tensor `y` leaves a hole"),
    "an overlap": ({"x": described(0, 2), "y": described(1, 3)}, 3, "tensor `y` overlaps the one"),
    "a late start": ({"x": described(1, 3)}, 3, "tensor `x` leaves a hole before it"),
    "missing bytes": ({"x": described(0, 2)}, 1, r"truncated: \d+ bytes, its header says \d+"),
    "trailing bytes": ({"x": described(0, 2)}, 3, r"is too long: \d+ bytes, its header says \d+"),
    "a huge shape": ({"x": described(0, 2, [10**19] * 8)}, 2, "more elements than any file"),
    "a list": ([1], 0, "its header is not a JSON object"),
    "a tensor that is text": ({"x": "y"}, 0, "tensor `x` is not a JSON object"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "`__metadata__` does not map text"),
    "bad JSON": (b"{", 0, "Expecting property name"),
    "bad UTF-8": (b'{"\xff":1}', 0, "codec can't decode"),
    "endless digits": (b'{"x":' + b"9" * 5000 + b"}", 0, "a number of 5000 digits"),
    "deep nesting": (b'{"x":' + b"[" * 100_000, 0, "nested too deeply"),
    "many values": (b'{"x":[' + b"[]," * 600_000, 0, "expected at most 1048576"),
    "a newline in a key": ({"x\ny": described(0, 2)}, 2, r"tensor `x\\ny` has a name of 3"),
    "half a surrogate": (b'{"\\ud800":{}}', 0, "surrogates not allowed"),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_line(tmp_path, fault):
    header, data_bytes, message = BAD_HEADERS[fault]
    path = written(tmp_path / "m.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        index(path)
    assert str(caught.value).startswith(f"`{path}`: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"1234567", "truncated: 7 bytes"),
        (b"\xff" * 8, "header would take 18446744073709551615 bytes, expected at most 33554432"),
        ((100).to_bytes(8, "little") + b"{}", "truncated: 10 bytes, its header alone ends at 108"),
    ],
)
def test_a_bad_length_is_refused_before_anything_is_read(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        index(path)


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"m.safetensors`: cannot be read: No such file"):
        index(tmp_path / "m.safetensors")


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_file_cut_anywhere_is_called_truncated(tmp_path, sixteenth):
    path = tmp_path / "m.safetensors"
    fill(path, SPECS, {"format": "pt"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenth // 16])
    with pytest.raises(CheckpointError, match="truncated"):
        index(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, position, value):
    path = tmp_path / "m.safetensors"
    fill(path, SPECS, {"format": "pt"})
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= value
    path.write_bytes(content)
    found, message = index_or_message(path)
    assert "\n" not in message
    for entry in found.entries.values():
        size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
        assert 0 <= entry.offset <= entry.offset + size <= len(content)
