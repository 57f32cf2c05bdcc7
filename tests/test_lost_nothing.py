"""What would be lost, changed or deleted without a word is refused or kept."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import call, done, model, move, refused, write
from tests.oracles import hf

LINEAR = {"rope_type": "linear", "factor": 2.0}


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def hugging_face(path: Path, files: int = 2) -> Path:
    hf.write(model(), path, files=files)
    return path


def test_a_neighbour_called_replaced_is_kept(tmp_path: Path) -> None:
    source, mine = write("meta8", tmp_path / "src"), tmp_path / "dst.replaced" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    words = move("meta8", source, "hf", tmp_path / "dst")
    done(*words)
    done(*words)
    done(*move("meta8", source, "tp2", tmp_path / "dst"), "--force")
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_result_is_not_already_done(tmp_path: Path, damage: str) -> None:
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "meta2", tmp_path / "dst")
    done(*words)
    file = tmp_path / "dst" / "consolidated.01.pth"
    file.unlink() if damage == "gone" else file.write_bytes(b"")
    refused(tmp_path, r"consolidated.01.pth`: missing or cut", *words)


def test_small_files_are_a_part_of_the_job(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    done(*move("meta8", source, "tp2", tmp_path / "dst"))
    refused(
        tmp_path,
        "exists and is not the result of this job",
        *move("meta8", source, "tp2dp2", tmp_path / "dst"),
    )


def test_a_tensor_in_a_file_of_its_own_is_not_lost(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "src")
    save_file({"adapter": torch.ones(2)}, source / "extra.safetensors")
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"] | {"adapter": "extra.safetensors"}
    edit(index, weight_map=table)
    refused(
        tmp_path,
        "1 tensors are not part of a llama model, first `adapter` in `extra.safetensors`",
        *move("hf", source, "meta8", tmp_path / "dst"),
    )


def test_rows_that_no_file_holds_are_not_made_up(tmp_path: Path) -> None:
    source = write("tp2", tmp_path / "src")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(model().config | {"vocab_size": 160}))
    for exchange in ("direct", "collective"):
        refused(
            tmp_path,
            "vocab_size 160, but the embedding's files hold 128 rows",
            *move("tp2", source, "hf", tmp_path / "dst"),
            f"src.model={config}",
            f"engine.exchange={exchange}",
        )


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    refused(
        tmp_path,
        r"src.model has width 4096, 32 layers and 32 heads, but the files have 64, 2 and 16",
        *move("meta8", source, "hf", tmp_path / "dst"),
        "src.model=llama3-8b",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": LINEAR}, r"rope_scaling .*linear.* cannot be said in params.json"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, Meta's code has silu only"),
    ],
)
def test_what_meta_would_compute_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    source = hugging_face(tmp_path / "src")
    edit(source / "config.json", **changes)
    refused(tmp_path, message, *move("hf", source, "meta8", tmp_path / "dst"))
    done(*move("hf", source, "hf", tmp_path / "kept"))
    kept = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert changes.items() <= kept.items()


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "src", files=1)
    words = move("hf", source, "hf", tmp_path / "dst")
    edit(source / "config.json", quantization_config={"quant_method": "fp8"})
    refused(tmp_path, "a quantised model, which is not supported", *words)
    edit(source / "config.json", quantization_config=None)
    file = source / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {key: tensors[key].to(torch.int8)}, file)
    refused(tmp_path, rf"tensor `{key}` is int8: quantised", *words)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"1e-5"', "true"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, value: str) -> None:
    source = hugging_face(tmp_path / "src")
    text = (source / "config.json").read_text()
    edit(source / "config.json", rms_norm_eps="HERE")
    text = (source / "config.json").read_text().replace('"HERE"', value)
    (source / "config.json").write_text(text)
    refused(tmp_path, "`norm_eps` is .*, which is no", *move("hf", source, "hf", tmp_path / "d"))


def test_a_symlink_is_no_target(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    words = move("meta8", source, "hf", tmp_path / "link")
    refused(tmp_path, "is a symlink or a mount point", *words)


def test_the_dtype_asked_for_goes_before_that_of_a_sample(tmp_path: Path) -> None:
    source, sample = write("meta8", tmp_path / "src"), hugging_face(tmp_path / "sample")
    words = [f"src.path={source}", f"dst.like={sample}", f"dst.path={tmp_path / 'dst'}"]
    found = done("--src", "meta8", *words, "dst.dtype=float32")
    assert "target: cast from bfloat16 to float32" in found.out
    tensors = load_file(tmp_path / "dst" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_huge_number_of_layers_is_refused_at_once(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "src")
    edit(source / "config.json", num_hidden_layers=3_000_000)
    assert call("inspect", source).code == 1
    words = move("hf", source, "hf", tmp_path / "dst")
    refused(tmp_path, "`layers` is 3000000, expected a positive int up to 10000", *words)
