"""The GGUF container against gguf-py's writer and reader, and against damaged headers."""

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.containers import Blob, FileIndex, Skeleton, TensorSpec, gguffile, pieces_of
from reshard.containers.gguffile import Fields, Value, skeleton
from reshard.containers.ggufvalues import LongArray, pack
from reshard.encodings import ENCODINGS, stored_bytes
from reshard.errors import CheckpointError, LayoutError

gguf = pytest.importorskip("gguf")

PLAIN = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
}
SPECS = [
    TensorSpec("rope_freqs.weight", torch.float32, (5,)),
    TensorSpec("a.weight", torch.bfloat16, (3, 7)),
    TensorSpec("b.weight", torch.float16, (2, 3, 5)),
    TensorSpec("c.weight", torch.float64, (1, 2, 3, 1)),
    TensorSpec("naïve", torch.float32, (0, 4)),
    *(
        TensorSpec(f"{name}.weight", torch.float32, (3, 64), encoding)
        for name, encoding in ENCODINGS.items()
    ),
]
METADATA = {
    "general.architecture": Value("string", "llama"),
    "general.name": Value("string", "naïve 🦙"),
    "n.uint8": Value("uint8", 255),
    "n.int8": Value("int8", -128),
    "n.uint16": Value("uint16", 65535),
    "n.int16": Value("int16", -32768),
    "n.uint32": Value("uint32", 2**32 - 1),
    "n.int32": Value("int32", -(2**31)),
    "n.uint64": Value("uint64", 2**64 - 1),
    "n.int64": Value("int64", -(2**63)),
    "n.float32": Value("float32", 0.1),
    "n.float64": Value("float64", 0.1),
    "n.yes": Value("bool", True),
    "n.no": Value("bool", False),
    "list.string": Value("[string]", ["a", "", "é\n", "▁b"]),
    "list.int32": Value("[int32]", [3, 1, -2]),
    "list.float32": Value("[float32]", [0.5, -1.25]),
    "list.bool": Value("[bool]", [True, False]),
}
FAST = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def index(path: Path) -> FileIndex:
    return gguffile.index(path.parent, path.name)


def size_of(spec: TensorSpec) -> int:
    return stored_bytes(spec.shape, spec.dtype, spec.encoding)


def laid_out_bytes(laid_out: Skeleton, payloads: dict[str, bytes]) -> bytes:
    """The file of a skeleton, whose chunks and tensors must tile it."""
    parts = [(offset, b"".join(pieces_of(chunk))) for offset, chunk in laid_out.chunks]
    parts += [(laid_out.offsets[key], payload) for key, payload in payloads.items() if payload]
    content = b""
    for offset, part in sorted(parts):
        assert offset == len(content)
        content += part
    assert len(content) == laid_out.size
    return content


def random_bytes(specs: list[TensorSpec]) -> dict[str, bytes]:
    return {spec.key: os.urandom(size_of(spec)) for spec in specs}


def type_of(spec: TensorSpec) -> "gguf.GGMLQuantizationType":
    name = spec.encoding.name.upper() if spec.encoding else PLAIN[spec.dtype]
    return gguf.GGMLQuantizationType[name]


def write_by_gguf(path: Path, specs, payloads, metadata, alignment: int | None = None) -> None:
    """The file that gguf-py writes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        element = value.kind.strip("[]").upper()
        kind = gguf.GGUFValueType[element]
        if element.lower() == value.kind:
            writer.add_key_value(key, value.value, kind)
        else:
            writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, kind)
    for spec in specs:
        kind = type_of(spec)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*spec.shape[:-1], spec.shape[-1] // block * nbytes)
        data = np.frombuffer(payloads[spec.key], dtype=np.uint8).reshape(shape)
        writer.add_tensor(spec.key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_gguf_reads(path: Path, specs, payloads, metadata) -> None:
    """gguf-py's reader finds every tensor and every value with its type."""
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == [spec.key for spec in specs]
    for spec, tensor in zip(specs, reader.tensors, strict=True):
        assert tensor.tensor_type == type_of(spec)
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        assert tensor.data.tobytes() == payloads[spec.key]
    for key, value in metadata.items():
        field = reader.fields[key]
        kinds = [kind.name.lower() for kind in field.types]
        assert kinds == ([value.kind] if len(kinds) == 1 else ["array", value.kind[1:-1]])
        if "float32" in value.kind:
            assert np.array_equal(field.contents(), np.float32(value.value))
        else:
            assert field.contents() == value.value


# --- the skeleton


@pytest.mark.parametrize("alignment", [None, 8, 32, 64, 4096])
def test_a_file_is_the_one_that_gguf_writes(tmp_path, alignment):
    payloads = random_bytes(SPECS)
    write_by_gguf(tmp_path / "theirs.gguf", SPECS, payloads, METADATA, alignment)
    first = {} if alignment is None else {"general.alignment": Value("uint32", alignment)}
    ours = laid_out_bytes(skeleton(SPECS, first | METADATA), payloads)
    assert ours == (tmp_path / "theirs.gguf").read_bytes()


def test_gguf_reads_a_filled_skeleton(tmp_path):
    payloads = random_bytes(SPECS)
    path = tmp_path / "m.gguf"
    path.write_bytes(laid_out_bytes(skeleton(SPECS, METADATA), payloads))
    # Its reader stops at a tensor without elements.
    full = [spec for spec in SPECS if 0 not in spec.shape]
    path.write_bytes(
        laid_out_bytes(skeleton(full, METADATA), {s.key: payloads[s.key] for s in full})
    )
    assert_gguf_reads(path, full, payloads, METADATA)


def test_a_file_without_tensors_or_keys_is_read_back(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(laid_out_bytes(skeleton([], {}), {}))
    assert index(path) == FileIndex({}, {})
    path.write_bytes(path.read_bytes()[:24])
    assert index(path) == FileIndex({}, {})


def test_prepared_fields_are_a_chunk_of_their_own_which_is_not_read(tmp_path):
    names = list(METADATA)
    chosen = [(name, METADATA[name]) for name in names[3:9]]
    count, prepared = len(chosen), b"".join(pack(name, v.kind, v.value) for name, v in chosen)
    before = {name: METADATA[name] for name in names[:3]}
    after = {name: METADATA[name] for name in names[9:]}
    payloads = random_bytes(SPECS)
    whole = laid_out_bytes(skeleton(SPECS, METADATA), payloads)
    blob = Blob(tmp_path / "not there yet", len(prepared))
    laid_out = skeleton(SPECS, {**before, "tokenizer": Fields(count, blob), **after})
    assert [chunk for _, chunk in laid_out.chunks].count(blob) == 1
    (tmp_path / "not there yet").write_bytes(prepared)
    assert laid_out_bytes(laid_out, payloads) == whole
    inline = skeleton(SPECS, {**before, "tokenizer": Fields(count, prepared), **after})
    assert laid_out_bytes(inline, payloads) == whole


def test_a_vocabulary_is_walked_over(tmp_path):
    values = {
        "string": [f"tökén {number}" for number in range(20_000)],
        "float32": [float(-number) for number in range(20_000)],
        "int32": [number % 7 for number in range(2_000)],
        "bool": [number % 3 == 0 for number in range(1_025)],
    }
    metadata = {f"long.{kind}": Value(f"[{kind}]", value) for kind, value in values.items()}
    short = {"short": Value("[int32]", list(range(1_024)))}
    path = tmp_path / "m.gguf"
    payloads = random_bytes(SPECS[:2])
    path.write_bytes(laid_out_bytes(skeleton(SPECS[:2], metadata | short), payloads))
    found = index(path)
    assert found.metadata["short"] == tuple(range(1_024))
    for kind, value in values.items():
        array = found.metadata[f"long.{kind}"]
        assert isinstance(array, LongArray)
        assert (array.kind, array.count) == (kind, len(value))
    assert_gguf_reads(path, SPECS[:2], payloads, metadata)


BAD_VALUES = {
    "a float": Value("uint32", 1.5),
    "a negative": Value("uint32", -1),
    "too large": Value("int8", 128),
    "a truth value": Value("uint32", True),
    "a number for text": Value("string", 5),
    "text for a number": Value("float32", "1"),
    "a number for a truth value": Value("bool", 1),
    "half a surrogate": Value("string", "\ud800"),
    "a number for an array": Value("[uint32]", 1),
    "text for an array": Value("[string]", "abc"),
    "a mixed array": Value("[string]", ["a", 1]),
    "beyond float32": Value("float32", 1e39),
    "no GGUF value": 5,
}


@pytest.mark.parametrize("fault", BAD_VALUES)
def test_a_value_of_another_kind_is_a_layout_error(fault):
    with pytest.raises(LayoutError, match="key `k`") as caught:
        skeleton([], {"k": BAD_VALUES[fault]})
    assert "\n" not in str(caught.value)


BAD_SPECS = {
    "an integer": (TensorSpec("x", torch.int32, (2,)), "cannot hold torch.int32"),
    "a coded bfloat16": (
        TensorSpec("x", torch.bfloat16, (32,), ENCODINGS["q8_0"]),
        "cannot hold torch.bfloat16 as q8_0",
    ),
    "half a block": (TensorSpec("x", torch.float32, (32, 48), ENCODINGS["q4_0"]), "no whole q4_0"),
    "a long name": (TensorSpec("x" * 64, torch.float32, (2,)), "its name has 64 bytes"),
    "five dims": (TensorSpec("x", torch.float32, (1,) * 5), "its shape 5 dims"),
}


@pytest.mark.parametrize("fault", BAD_SPECS)
def test_a_tensor_that_gguf_cannot_hold_is_a_layout_error(fault):
    spec, message = BAD_SPECS[fault]
    with pytest.raises(LayoutError, match=message):
        skeleton([spec], {})


@pytest.mark.parametrize("value", [Value("uint32", 48), Value("uint32", 0), Value("uint64", 32)])
def test_an_alignment_that_llama_cpp_refuses_is_a_layout_error(value):
    with pytest.raises(LayoutError, match="expected uint32, a power of 2"):
        skeleton([], {"general.alignment": value})


# --- the index


@pytest.mark.parametrize("alignment", [None, 8, 128])
@pytest.mark.parametrize("version", [2, 3])
def test_index_finds_what_gguf_wrote(tmp_path, alignment, version):
    path, payloads = tmp_path / "m.gguf", random_bytes(SPECS)
    write_by_gguf(path, SPECS, payloads, METADATA, alignment)
    content = bytearray(path.read_bytes())
    content[4] = version
    path.write_bytes(content)
    found = index(path)
    assert list(found.entries) == [spec.key for spec in SPECS]
    for spec in SPECS:
        entry = found.entries[spec.key]
        expected = payloads[spec.key]
        assert (entry.dtype, entry.shape, entry.encoding) == (spec.dtype, spec.shape, spec.encoding)
        assert entry.strides == torch.empty(spec.shape).stride()
        assert content[entry.offset : entry.offset + len(expected)] == expected
    for key, value in METADATA.items():
        wanted = value.value
        if "float32" in value.kind:
            wanted = np.float32(wanted).tolist()
        assert found.metadata[key] == (tuple(wanted) if isinstance(wanted, list) else wanted)


def test_what_pads_the_last_tensor_may_be_missing(tmp_path):
    path, payloads = tmp_path / "m.gguf", random_bytes(SPECS[:1])
    content = laid_out_bytes(skeleton(SPECS[:1], {}), payloads)
    path.write_bytes(content[: -(32 - 20)])
    assert list(index(path).entries) == ["rope_freqs.weight"]
    path.write_bytes(content[: -(32 - 20) - 1])
    with pytest.raises(CheckpointError, match=r"truncated: \d+ bytes, its header says \d+"):
        index(path)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def start(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def info(name: bytes, ne=(2,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def field(key: bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def one(name: bytes = b"x", **changes) -> bytes:
    """A file of one tensor with 64 bytes of data, which are more than enough."""
    return start(1, 0) + info(name, **changes) + bytes(64)


HUGE = 2**64 - 1
BAD_FILES = {
    "nothing": (b"", "truncated: 0 bytes"),
    "text": (b"GGML" + bytes(64), "is not a GGUF file: it starts with `GGML`"),
    "version 1": (start(0, 0, 1), "has GGUF version 1, expected 2 or 3"),
    "version 4": (start(0, 0, 4), "has GGUF version 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian; convert it with"),
    "huge counts": (start(HUGE, HUGE) + bytes(99), f"said to have {HUGE} tensors"),
    "huge keys": (start(0, HUGE) + bytes(99), f"said to have {HUGE} keys"),
    "a missing key": (start(0, 1), "truncated: 24 bytes, its header goes on to 32"),
    "a nameless key": (start(0, 1) + field(b"", 0, b"\0"), "key 0 has a name of 0 bytes"),
    "a huge key": (start(0, 1) + struct.pack("<Q", HUGE), f"key 0 has a name of {HUGE} bytes"),
    "a key of two lines": (start(0, 1) + field(b"a\nb", 0, b"\0"), r"key `a\\nb` has characters"),
    "a key of no text": (start(0, 1) + field(b"\xff", 0, b"\0"), "is no UTF-8 text"),
    "a key twice": (start(0, 2) + 2 * field(b"k", 0, b"\0"), "key `k` appears twice"),
    "an unknown kind": (start(0, 1) + field(b"k", 13, bytes(8)), "key `k`: .* of kind 13"),
    "a strange truth": (start(0, 1) + field(b"k", 7, b"\2"), "is no truth value: 2"),
    "a value of no text": (start(0, 1) + field(b"k", 8, string(b"\xe9")), "key `k`: .*no UTF-8"),
    "a huge string": (
        start(0, 1) + field(b"k", 8, struct.pack("<Q", HUGE)),
        "key `k`: keys and values up to here take more than 4194304 bytes",
    ),
    "a long string": (
        start(0, 1) + field(b"k", 8, struct.pack("<Q", 5000)),
        "key `k`: truncated: 45 bytes, its header goes on to 5045",
    ),
    "arrays in an array": (start(0, 1) + field(b"k", 9, array(9, 1)), "an array of arrays"),
    "an array of what": (start(0, 1) + field(b"k", 9, array(77, 1)), "is of kind 77"),
    "a huge array": (start(0, 1) + field(b"k", 9, array(4, HUGE)), "truncated: 49 bytes"),
    "huge strings": (start(0, 1) + field(b"k", 9, array(8, HUGE)), "truncated: 49 bytes"),
    "a huge string in a long array": (
        start(0, 1) + field(b"k", 9, array(8, 2000, bytes(9000) + b"\xff" * 9000)),
        r"key `k`: truncated: 18049 bytes, its header goes on to 1844\d+",
    ),
    "a huge string at the end of a long array": (
        start(0, 1) + field(b"k", 9, array(8, 2000, bytes(8 * 1999) + b"\xff" * 8)),
        r"key `k`: truncated: 16049 bytes, its header goes on to 1844\d+",
    ),
    "no alignment": (
        start(0, 1) + field(b"general.alignment", 4, struct.pack("<I", 24)),
        "general.alignment is uint32 24, expected uint32, a power of 2",
    ),
    "an alignment of bytes": (
        start(0, 1) + field(b"general.alignment", 0, b"\x20"),
        "general.alignment is uint8 32, expected uint32",
    ),
    "a long name": (one(b"x" * 65), "tensor 0 has a name of 65 bytes"),
    "a name of two lines": (one(b"x\ny"), r"tensor `x\\ny` has a name with characters"),
    "a name of no text": (one(b"\xff"), "has a name with characters"),
    "a tensor twice": (
        start(2, 0) + 2 * info(b"x") + bytes(64),
        "tensor `x` appears twice in the header",
    ),
    "five dims": (one(ne=(1,) * 5), "tensor `x` has 5 dims, expected 4 at most"),
    "a huge shape": (one(ne=(HUGE, HUGE)), "more elements than any file"),
    "a shape that wraps": (one(ne=(2**32, 2**32)), "more elements than any file"),
    "half a block": (one(ne=(48,), kind=8), "tensor `x` has rows of 48 elements, expected whole"),
    "a block without rows": (one(ne=(), kind=8), "tensor `x` has rows of 1 elements"),
    "a K-quant": (one(kind=12), "stored as Q4_K, .*llama-quantize --allow-requantize IN OUT F16"),
    "an I-quant": (one(kind=20), "tensor `x` is stored as IQ4_NL"),
    "MXFP4": (one(kind=39), "tensor `x` is stored as MXFP4"),
    "integers": (one(kind=26), "tensor `x` holds integers, I32, expected one of float32"),
    "a removed type": (one(kind=4), "tensor `x` has type 4, which is not known"),
    "an unknown type": (one(kind=2**32 - 1), "has type 4294967295, which is not known"),
    "a hole": (one(offset=32), "leaves a hole before it: it starts at 32, expected 0"),
    "an overlap": (
        start(2, 0) + info(b"x") + info(b"y", offset=0) + bytes(96),
        "tensor `y` overlaps the one before: it starts at 0, expected 32",
    ),
    "missing bytes": (one(ne=(1000,)), r"truncated: \d+ bytes, its header says \d+"),
    "trailing bytes": (one() + bytes(64), r"is too long: \d+ bytes, its header says \d+"),
    "a missing tensor": (start(2, 0) + info(b"x"), "truncated: 57 bytes"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path, fault):
    content, message = BAD_FILES[fault]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        index(path)
    assert str(caught.value).startswith(f"`{path}`: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [*range(2, 4), *range(6, 31), 34, 35, *range(39, 42)])
def test_every_type_is_read_or_refused_by_the_name_that_gguf_has_for_it(tmp_path, kind):
    path = tmp_path / "m.gguf"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    path.write_bytes(start(1, 0) + info(b"x", (block,), kind) + bytes(4096))
    name = gguf.GGMLQuantizationType(kind).name
    with pytest.raises(CheckpointError) as caught:
        index(path)
    known = {**{name.upper(): None for name in ENCODINGS}, **dict.fromkeys(PLAIN.values())}
    assert ("is too long" if name in known else f" {name},") in str(caught.value)


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"m.gguf`: cannot be read: No such file"):
        index(tmp_path / "m.gguf")


def test_a_file_that_is_cut_while_it_is_read_is_called_truncated(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(start(0, 0) + bytes(8))
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: b"GGU")
    with pytest.raises(CheckpointError, match="truncated while it was read, at byte 0"):
        index(tmp_path / "m.gguf")


MIB = 1 << 20
TWO = string(b"ab")


def one_key(number: int) -> bytes:
    return field(b"%06d" % number, 0, b"\0")


def one_tensor(number: int) -> bytes:
    return info(b"%056d" % number, (0, 1, 1, 1))


# As much as a header may cost, or a part of it, and the MiB that this may take.
COSTLY = {
    "keys": (100, lambda: start(0, 1 << 14) + b"".join(map(one_key, range(1 << 14)))),
    "tensors": (25, lambda: start(1 << 14, 0) + b"".join(map(one_tensor, range(1 << 14)))),
    "short arrays": (
        100,
        lambda: (
            start(0, 4000)
            + b"".join(field(b"%06d" % key, 9, array(1, 1000, b"U" * 1000)) for key in range(4000))
        ),
    ),
    "short strings": (
        25,
        lambda: (
            start(0, 100)
            + b"".join(field(b"%06d" % key, 9, array(8, 1000, 1000 * TWO)) for key in range(100))
        ),
    ),
    "one string": (100, lambda: start(0, 1) + field(b"k", 8, string(b"a" * (4 * MIB - 1)))),
    "empty strings": (
        1,
        lambda: start(0, 1) + field(b"k", 9, array(8, MIB // 4)) + bytes(2 * MIB),
    ),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_header_that_costs_as_much_as_it_can_takes_bounded_memory(tmp_path, kind):
    limit, made = COSTLY[kind]
    path, content = tmp_path / "m.gguf", made()
    path.write_bytes(content + bytes(-len(content) % 32))
    tracemalloc.start()
    index(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit * MIB


@pytest.mark.parametrize("kind", ["string", "int8", "uint64"])
def test_a_header_without_end_is_refused_where_it_may_not_go_on(tmp_path, kind):
    """A sparse file has room for any count."""
    path = tmp_path / "m.gguf"
    number = gguf.GGUFValueType[kind.upper()]
    path.write_bytes(start(0, 1) + field(b"k", 9, array(number, 2**37)))
    os.truncate(path, 2**42)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"goes on to byte \d+, expected 67108864 at most"):
        index(path)
    assert time.monotonic() - began < 1


# --- damage


@pytest.fixture(scope="module")
def good() -> bytes:
    metadata = {**METADATA, "tokens": Value("[string]", [str(number) for number in range(1_100)])}
    return laid_out_bytes(skeleton(SPECS, metadata), random_bytes(SPECS))


def header_bytes(content: bytes) -> int:
    return len(content) - sum(map(size_of, SPECS))


def assert_refused_or_harmless(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = index(path)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  # either outcome is right
        assert len(str(error)) < 600  # noqa: PT017
        return
    for entry in found.entries.values():
        size = stored_bytes(entry.shape, entry.dtype, entry.encoding)
        assert 0 <= entry.offset <= entry.offset + size <= len(content)
    for value in found.metadata.values():
        if isinstance(value, LongArray):
            assert 1024 < value.count <= len(content)


@pytest.mark.fuzz
@FAST
@given(cut=st.integers(0, 10**6))
def test_a_file_cut_anywhere_is_called_truncated(tmp_path, good, cut):
    path = tmp_path / "m.gguf"
    padding = -size_of(SPECS[-1]) % 32
    path.write_bytes(good[: cut % (len(good) - padding)])
    with pytest.raises(CheckpointError, match="truncated"):
        index(path)


@pytest.mark.fuzz
@FAST
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_flipped_bytes_are_refused_or_harmless(tmp_path, good, changes):
    content = bytearray(good)
    for position, value in changes:
        content[position % header_bytes(good)] ^= value
    assert_refused_or_harmless(tmp_path / "m.gguf", bytes(content))


@pytest.mark.fuzz
@FAST
@given(
    position=st.integers(0, 10**6),
    number=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, HUGE]),
    width=st.sampled_from(["I", "Q"]),
)
def test_huge_numbers_anywhere_are_refused_or_harmless(tmp_path, good, position, number, width):
    content = bytearray(good)
    at = position % header_bytes(good)
    raw = struct.pack("<Q", number)[: struct.calcsize(width)]
    content[at : at + len(raw)] = raw
    assert_refused_or_harmless(tmp_path / "m.gguf", bytes(content))


@pytest.mark.fuzz
@FAST
@given(
    first=st.integers(0, 10**6),
    second=st.integers(0, 10**6),
    size=st.integers(1, 300),
    drop=st.integers(0, 300),
)
def test_spliced_headers_are_refused_or_harmless(tmp_path, good, first, second, size, drop):
    at, other = first % header_bytes(good), second % header_bytes(good)
    content = good[:at] + good[other : other + size] + good[at + drop :]
    assert_refused_or_harmless(tmp_path / "m.gguf", content)
