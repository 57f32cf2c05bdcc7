"""What the audit and the fuzzer found, each as small as it can be."""

import json
import os
import struct
from pathlib import Path

import pytest

from reshard import formats
from reshard.containers import dcpmetadata, gguffile, is_inside, safetensors, torchfile
from reshard.families.model import ModelConfig, from_hf
from reshard.formats import common, hf
from reshard.formats.options import Mesh, Options
from tests.fuzz import seeds
from tests.fuzz.harness import refusal, write
from tests.fuzz.mutations import torch_item


def directory(form: str, path: Path) -> Path:
    root = path / "files"
    write(seeds.checkpoint(form, path), root)
    return root


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scan(root: Path) -> formats.Scan:
    found = formats.detect(root).scan(root, Options())
    common.check_headers(found, found.layout.files)
    return found


# --- JSON


@pytest.mark.parametrize("depth", [65, 900])
def test_a_config_that_is_parsed_but_too_deep_to_be_copied(tmp_path, depth):
    """The manifest copies a config by recursion."""
    root = directory("hf", tmp_path)
    text = (root / "config.json").read_text()
    nested = '{"deep": ' + "[" * depth + "]" * depth + ","
    (root / "config.json").write_text(text.replace("{", nested, 1))
    assert "nested too deeply" in refusal(lambda: scan(root))


def test_a_config_that_is_not_too_deep(tmp_path):
    root = directory("hf", tmp_path)
    edit(root / "config.json", deep=json.loads("[" * 60 + "]" * 60))
    common.dump_json(scan(root).model.to_json())


def test_a_key_twice_in_a_config(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1, "b": {"vocab_size": 1, "vocab_size": 2}}')
    message = refusal(lambda: common.read_json(tmp_path / "config.json"))
    assert message.endswith("not valid JSON (the key `vocab_size` appears twice)")


def test_half_a_surrogate_in_a_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "\\ud800"}')
    assert "surrogates not allowed" in refusal(lambda: common.read_json(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"emoji": "\\ud83d\\ude00"}')
    assert common.read_json(tmp_path / "config.json") == {"emoji": "\U0001f600"}


def test_more_values_than_any_config_has(tmp_path):
    (tmp_path / "config.json").write_text('{"a": [' + "[]," * 200_000 + "0]}")
    assert "holds 400002 values, expected at most 131072" in refusal(
        lambda: common.read_json(tmp_path / "config.json")
    )


# --- model configs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model_type", wrong) for wrong in ({}, [], "", "a\nb", "x" * 100)],
        *[("rope_scaling", wrong) for wrong in ([1], "linear", 2)],
        *[("eos_token_id", wrong) for wrong in ([], {}, ["2"], True)],
        *[("bos_token_id", wrong) for wrong in ([1], "1")],
    ],
)
def test_a_config_of_another_kind_than_its_key(tmp_path, key, value):
    root = directory("hf", tmp_path)
    edit(root / "config.json", **{key: value})
    message = refusal(lambda: scan(root))
    assert key.removesuffix("_token_id") in message


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 5000])
def test_an_architecture_that_cannot_be_printed(tmp_path, name):
    root = directory("hf", tmp_path)
    edit(root / "config.json", architectures=[name])
    found = scan(root)
    refusal(lambda: formats.require_held(formats.named("gguf"), found.model))


@pytest.mark.parametrize("number", ["Infinity", "NaN", "1e999"])
def test_a_number_that_json_does_not_know_is_not_written(tmp_path, number):
    root = directory("unknown", tmp_path)
    text = (root / "config.json").read_text()
    (root / "config.json").write_text(text.replace("{", '{"time_step_limit": ' + number + ",", 1))
    found = scan(root)
    assert "infinite or none" in refusal(
        lambda: hf.side_files(found.model, found.layout, Options())
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"low_freq_factor": 0},
        {"high_freq_factor": 0},
        {"factor": 10**400},
        {"factor": float("inf")},
        {"low_freq_factor": 4.0, "high_freq_factor": 4.0},
    ],
    ids=str,
)
def test_a_rotary_scaling_that_divides_by_nothing(changes):
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    model = from_hf(seeds.small_model().config | {"rope_scaling": scaling | changes}, "config.json")
    known = formats.named("gguf")
    refusal(lambda: formats.laid_out(known, formats.families.parameters(model), model, Options()))


def test_a_manifest_of_a_model_that_the_format_cannot_hold(tmp_path):
    root = directory("meta", tmp_path)
    record = json.loads((root / "reshard.json").read_text())
    record["model"]["mlp_bias"] = True
    (root / "reshard.json").write_text(json.dumps(record))
    assert "mlp_bias=true" in refusal(lambda: scan(root))


def test_sizes_whose_divisors_would_take_minutes_to_try():
    model = ModelConfig("llama", 1 << 31, 1, *[1 << 31] * 2, 1, 1 << 31, 1 << 31)
    layout = formats.named("nanotron").layout
    assert common.divisors(model.heads, model.intermediate) == [1 << bit for bit in range(32)]
    assert common.divisors(360, 84) == [1, 2, 3, 4, 6, 12]
    refusal(lambda: layout((), model, Options(mesh=Mesh(tp=3))))


# --- names


OUTSIDE = [
    "",
    ".",
    "..",
    "/x",
    "../x",
    "a/../b",
    "a//b",
    "a/",
    "x\0",
    "a\nb",
    "é" * 200,
    "x/" * 600,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_outside_or_is_none(name):
    assert not is_inside(name)
    message = refusal(lambda: common.confined(name, "index.json"))
    assert "lies outside the checkpoint's directory" in message


@pytest.mark.parametrize("name", ["x", "a/b.safetensors", "..x", "a b", "é" * 127, "a\\b"])
def test_a_name_inside(name):
    assert is_inside(name)
    assert common.confined(name, "index.json") == name


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "../m", "\x1b[2J", "m\0"])
def test_an_index_that_names_such_a_file(tmp_path, name):
    root = directory("hf", tmp_path)
    table = json.loads((root / hf.INDEX).read_text())["weight_map"]
    edit(root / hf.INDEX, weight_map=dict.fromkeys(table, name))
    assert "lies outside" in refusal(lambda: scan(root))


@pytest.mark.parametrize("key", ["a\nb", "\u202e", "x" * 600])
def test_an_index_that_names_a_tensor_so(tmp_path, key):
    root = directory("hf", tmp_path)
    edit(root / hf.INDEX, weight_map={key: "model.safetensors"})
    assert "is no name of a tensor" in refusal(lambda: scan(root))


def test_a_latest_step_that_cannot_be_printed(tmp_path):
    root = directory("nanotron", tmp_path)
    (root / "latest.txt").write_text("5\x1b[2J\n6")
    assert r"names step `5\x1b[2J\n6`, which is not there" in refusal(lambda: scan(root))


def test_slices_that_cannot_be_printed(tmp_path):
    root = directory("nanotron", tmp_path)
    file = next(root.rglob("*o_proj/*.safetensors"))
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["local_global_slices_pairs"] = "a\nb"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    assert r"says local_global_slices_pairs a\nb, expected" in refusal(lambda: scan(root))


def test_a_mesh_of_many_more_ranks_than_files(tmp_path):
    """Each rank that a file's name speaks of would have taken memory."""
    root = directory("nanotron", tmp_path)
    for file in sorted(root.rglob("*_tp-rank-*")):
        file.rename(str(file).replace("-of-2.", "-of-999998."))
    assert "but there are 15 files" in refusal(lambda: scan(root))


@pytest.mark.parametrize("name", ["x\0y", "x" * 5000, "\x1b[2J", "nowhere"])
def test_a_model_name_that_is_no_directory(tmp_path, name):
    root = directory("fsdp", tmp_path)
    (root / "config.json").unlink()
    (root / "train_params.yaml").write_text(f"lr: 1\nmodel_name: {name}\n")
    assert "it was trained from" in refusal(lambda: scan(root))


def test_a_model_name_that_took_quadratic_time(tmp_path):
    root = directory("fsdp", tmp_path)
    (root / "train_params.yaml").write_text("model_name: a" + (" " * 500 + "b") * 2000 + "\n")
    scan(root)


# --- containers


def test_an_empty_dim_does_not_hide_a_huge_one(tmp_path):
    described = {"dtype": "U8", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}
    text = json.dumps({"x": described}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "more elements than any file" in refusal(
        lambda: safetensors.index(tmp_path, "m.safetensors")
    )


def test_a_key_longer_than_a_message(tmp_path):
    described = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({"x" * 5000: described}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "a name of 5000 characters" in refusal(
        lambda: safetensors.index(tmp_path, "m.safetensors")
    )


def test_an_alignment_as_long_as_a_header(tmp_path):
    text = b"a" * 100_000
    key = struct.pack("<Q", 17) + b"general.alignment"
    value = struct.pack("<IQ", 8, len(text)) + text
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value)
    assert "general.alignment is string aaa" in refusal(lambda: gguffile.index(tmp_path, "m.gguf"))


@pytest.mark.parametrize("value", ["a" * 100_000, tuple(range(1000)), float("inf"), float("nan")])
def test_a_number_of_a_header_that_is_none(value):
    metadata = {"general.architecture": "llama", "llama.attention.head_count": 2}
    sizes = dict.fromkeys(("embedding_length", "block_count", "feed_forward_length"), 4)
    metadata |= {f"llama.{key}": size for key, size in sizes.items()}
    metadata |= {"llama.context_length": 8, "llama.rope.freq_base": value}
    header = formats.named("gguf").gguf_keys.Header(Path("m.gguf"), metadata)
    assert "llama.rope.freq_base is " in refusal(lambda: header.model(8, tied=True, biased=False))


def test_records_of_a_zip_that_share_their_bytes(tmp_path):
    content = bytearray(torch_item(b"\x80\x02}."))
    start = content.find(b"PK\x01\x02")
    last = content.find(b"PK\x05\x06")
    twin = bytes(content[start:last]).replace(b"m/data.pkl", b"m/data.pkm")
    tail = bytearray(content[last:])
    struct.pack_into("<HHI", tail, 8, 2, 2, 2 * (last - start))
    (tmp_path / "m.pth").write_bytes(bytes(content[:last]) + twin + bytes(tail))
    message = refusal(lambda: torchfile.index(tmp_path, "m.pth"))
    assert "its records `m/data.pkl` and `m/data.pkm` overlap" in message


# --- what is no plain file, and what is linked


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("hf", "config.json"),
        ("hf", hf.INDEX),
        ("hf", "model-00001-of-00002.safetensors"),
        ("meta", "params.json"),
        ("meta", "consolidated.00.pth"),
        ("gguf", "model.gguf"),
        ("fsdp", "__0_0.distcp"),
        ("nanotron", "5/model_config.json"),
    ],
)
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, form, name, kind):
    root = directory(form, tmp_path)
    path = root / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    refusal(lambda: scan(root))


@pytest.mark.parametrize(
    ("container", "name"),
    [(safetensors, "m.safetensors"), (torchfile, "m.pth"), (gguffile, "m.gguf")],
)
def test_a_container_does_not_wait_either(tmp_path, container, name):
    os.mkfifo(tmp_path / name)
    assert "is no plain file" in refusal(lambda: container.index(tmp_path, name))
    assert "is no plain file" in refusal(lambda: common.read_text(tmp_path / name))
    os.mkfifo(tmp_path / ".metadata")
    refusal(lambda: dcpmetadata.read(tmp_path))


@pytest.mark.parametrize("form", seeds.WRITERS)
def test_links_that_the_users_directory_holds_are_followed(tmp_path, form):
    """As in the hub's cache: each file a link, and here each folder too."""
    root, linked = directory(form, tmp_path), tmp_path / "linked"
    linked.mkdir()
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        if path.is_file() or path.name in ("model", "decoder", "0"):
            stored = linked / str(number)
            path.rename(stored)
            path.symlink_to(stored)
    assert scan(root).parameters


def test_a_link_to_a_folder_above_ends(tmp_path):
    root = directory("nanotron", tmp_path)
    (root / "5" / "model" / "model" / "again").symlink_to(root / "5" / "model")
    assert scan(root).parameters
