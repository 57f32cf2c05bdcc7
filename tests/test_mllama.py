"""Families that are not known: Llama 3.2 Vision and one made up, moved tensor by tensor."""

import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from tests.commands import done, move, refused
from tests.oracles import dcp, mllama

DTYPES = (torch.float32, torch.bfloat16)
GATE = "model.language_model.layers.1.cross_attn_attn_gate"
SMALL = ("tokenizer.json", "preprocessor_config.json", "chat_template.json")


@cache
def tiny(dtype: torch.dtype) -> MllamaForConditionalGeneration:
    return mllama.tiny(dtype)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mllama")


@pytest.fixture(scope="module")
def saved(root: Path) -> dict[torch.dtype, Path]:
    """What transformers saves, with small files beside it."""
    found = {}
    for dtype in DTYPES:
        found[dtype] = root / f"saved-{dtype}"
        tiny(dtype).save_pretrained(found[dtype])
        for name in SMALL:
            (found[dtype] / name).write_text("{}")
    return found


@pytest.fixture(scope="module")
def sharded(root: Path) -> Callable[[str, torch.dtype], Path]:
    """FSDP checkpoints of 3 shards, without a config."""

    @cache
    def write(spelling: str, dtype: torch.dtype) -> Path:
        path = root / f"fsdp-{spelling}-{dtype}"
        mllama.write_fsdp(path, 3, spelling, dtype)
        return path

    return write


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def elements(file: Path) -> bytes:
    """The data of a safetensors file, without its header."""
    content = file.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


Sharded = Callable[[str, torch.dtype], Path]


@pytest.mark.parametrize("spelling", mllama.SPELLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_loads_what_becomes_of_shards(
    spelling: str, dtype: torch.dtype, sharded: Sharded, saved: dict[Any, Path], tmp_path: Path
) -> None:
    source, base = sharded(spelling, dtype), saved[dtype]
    assert len(dcp.boxes(source)) == len(tiny(dtype).state_dict())
    shards = {sizes for name, held in dcp.boxes(source).items() if name.endswith("attn_gate")
              for _, sizes in held}  # fmt: skip
    assert shards == {(1,), (0,)}, "no rank without a row"
    words = move("dcp", source, "hf", tmp_path / "dst", f"src.assets={base}")
    found = done(*words, "engine.require_complete=true")
    assert "mllama: tensors are moved by name" in found.out
    assert ("halves them" in found.out) == (dtype == torch.float32)
    assert "missing" not in found.out
    mllama.check_loads(tmp_path / "dst", tiny(dtype))
    released = mllama.published(tiny(dtype).state_dict())
    dcp.assert_same_tensors(weights_of(tmp_path / "dst"), released)
    config = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == config
    for name in (*SMALL, "generation_config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (base / name).read_bytes()


def test_a_config_alone_is_enough(sharded: Sharded, saved: dict[Any, Path], tmp_path: Path) -> None:
    config = saved[torch.bfloat16] / "config.json"
    words = move("dcp", sharded("new", torch.bfloat16), "hf", tmp_path / "dst")
    refused(tmp_path, r"no config.json beside the weights; give src.assets=DIR", *words)
    found = done(*words, f"src.model={config}")
    assert "missing: tokenizer, preprocessor (src.assets=DIR" in found.out
    mllama.check_loads(tmp_path / "dst", tiny(torch.bfloat16))


def test_a_cast_is_said_in_the_config(
    sharded: Sharded, saved: dict[Any, Path], tmp_path: Path
) -> None:
    base = saved[torch.float32]
    words = move("dcp", sharded("old", torch.float32), "hf", tmp_path / "dst")
    done(*words, f"src.assets={base}", "dst.dtype=bfloat16")
    expected = {name: tensor.bfloat16() for name, tensor in weights_of(base).items()}
    dcp.assert_same_tensors(weights_of(tmp_path / "dst"), expected)
    config = json.loads((base / "config.json").read_text())
    text = json.dumps(config).replace('"float32"', '"bfloat16"')
    assert text != json.dumps(config)
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == json.loads(text)
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path / "dst")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_to_shards_and_back(
    dtype: torch.dtype, saved: dict[Any, Path], tmp_path: Path
) -> None:
    source = saved[dtype]
    first, back = tmp_path / "fsdp", tmp_path / "back"
    done(*move("hf", source, "fsdp2", first))
    expected = tiny(dtype).state_dict()
    dcp.assert_same_tensors(dcp.read_fsdp(first), expected)
    with torch.device("meta"):
        empty = MllamaForConditionalGeneration(tiny(dtype).config)
    state = {name: torch.zeros_like(expected[name]) for name in empty.state_dict()}
    dcp.load({"model": state}, first)
    dcp.assert_same_tensors(state, expected)
    (first / "reshard.json").unlink()
    done(*move("dcp", first, "hf", back, "engine.require_complete=true"))
    mllama.check_loads(back, tiny(dtype))
    dcp.assert_same_tensors(weights_of(back), weights_of(source))
    names = {file.name for file in source.iterdir()}
    for name in names - {"config.json", "model.safetensors"}:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert one == other
    done(*move("hf", source, "hf", tmp_path / "same"))
    assert elements(tmp_path / "same" / "model.safetensors") == elements(
        source / "model.safetensors"
    )
    dcp.assert_same_tensors(weights_of(tmp_path / "same"), weights_of(source))


@pytest.mark.parametrize("target", ["meta2", "tp2", "titan2"])
def test_formats_that_know_their_tensors_refuse(
    target: str, saved: dict[Any, Path], tmp_path: Path
) -> None:
    pattern = r"the model type mllama is not known; use --dst hf or fsdpN, which move by name"
    words = move("hf", saved[torch.bfloat16], target, tmp_path / "dst")
    refused(tmp_path, pattern, *words)


def test_two_spellings_of_one_tensor_are_refused(saved: dict[Any, Path], tmp_path: Path) -> None:
    name = "lm_head.weight"
    state = tiny(torch.bfloat16).state_dict() | {
        f"language_model.{name}": tiny(torch.bfloat16).state_dict()[name]
    }
    dcp.save(tmp_path / "src", dcp.split({"model": state}, 2, dcp.over_ranks(2)))
    words = move("dcp", tmp_path / "src", "hf", tmp_path / "dst")
    pattern = r"`(language_model.)?lm_head.weight` and `\S+` are both the tensor"
    refused(tmp_path, pattern, *words, f"src.assets={saved[torch.bfloat16]}")


# A family that no one knows.


def mystery(tied: bool = False) -> dict[str, Tensor]:
    """Tensors of no dims, of integers, of three dims, of a row, of other dtypes."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {
        "model.embed_tokens.weight": noise(31, 8).bfloat16(),
        "model.temperature": torch.tensor(0.7),
        "model.steps": torch.tensor(2**40 + 1),
        "model.buckets": torch.arange(7) * 2**40,
        "model.mask": torch.tensor([True, False, True]),
        "model.bytes": torch.arange(5, dtype=torch.uint8),
        "model.experts": noise(3, 4, 5).bfloat16(),
        "model.one": noise(1).bfloat16(),
        "model.half": noise(2, 3).half(),
    }
    return found if tied else {**found, "lm_head.weight": noise(31, 8).bfloat16()}


def write_mystery(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    record = {"model_type": "mystery", "dtype": "bfloat16", "odd": {"dtype": "bfloat16", "n": [1]}}
    (folder / "config.json").write_text(json.dumps(record | config))
    if tensors:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_any_tensor_survives(tied: bool, shards: int, tmp_path: Path) -> None:
    tensors = mystery(tied)
    source = write_mystery(tmp_path / "src", tensors, tie_word_embeddings=tied)
    done(*move("hf", source, f"fsdp{shards}", tmp_path / "fsdp"))
    expected = dict(tensors)
    if tied:
        expected[dcp.HEAD] = tensors[dcp.TABLE]
    dcp.assert_same_tensors(dcp.read_fsdp(tmp_path / "fsdp"), expected)
    done(*move("dcp", tmp_path / "fsdp", "hf", tmp_path / "back"))
    dcp.assert_same_tensors(weights_of(tmp_path / "back"), tensors)
    config = json.loads((source / "config.json").read_text())
    for folder in ("fsdp", "back"):
        assert json.loads((tmp_path / folder / "config.json").read_text()) == config


@pytest.mark.parametrize("made", ["dcp.save", "torch.save"])
def test_any_tensor_is_read_from_torch(made: str, tmp_path: Path) -> None:
    source, tensors = tmp_path / "src", mystery()
    if made == "dcp.save":
        dcp.save(source, dcp.split({"model": tensors}, 3, dcp.over_ranks(3)))
        write_mystery(tmp_path / "base", {})
    else:
        write_mystery(source, {})
        torch.save(tensors, source / "model.pt")
    words = move(str(source), source, "hf", tmp_path / "dst")
    done(*words, *([f"src.assets={tmp_path}/base"] if made == "dcp.save" else []))
    dcp.assert_same_tensors(weights_of(tmp_path / "dst"), tensors)


def test_a_cast_leaves_integers_alone(tmp_path: Path) -> None:
    source = write_mystery(tmp_path / "src", mystery())
    done(*move("hf", source, "fsdp3", tmp_path / "fsdp", "dst.dtype=float32"))
    expected = {n: t.float() if t.is_floating_point() else t for n, t in mystery().items()}
    dcp.assert_same_tensors(dcp.read_fsdp(tmp_path / "fsdp"), expected)
    config = json.loads((tmp_path / "fsdp" / "config.json").read_text())
    assert (config["dtype"], config["odd"]["dtype"]) == ("float32", "float32")
    done(*move("dcp", tmp_path / "fsdp", "hf", tmp_path / "dst", "dst.dtype=bfloat16"))
    expected = {n: t.bfloat16() if t.is_floating_point() else t for n, t in expected.items()}
    dcp.assert_same_tensors(weights_of(tmp_path / "dst"), expected)
    record = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == record


def test_a_tied_head_that_is_stored_is_the_embedding(tmp_path: Path) -> None:
    tensors = mystery(tied=True)
    state = tensors | {dcp.HEAD: tensors[dcp.TABLE]}
    dcp.save(tmp_path / "src", dcp.split({"model": state}, 2, dcp.over_ranks(2)))
    base = write_mystery(tmp_path / "base", {}, text_config={"tie_word_embeddings": True})
    done(*move("dcp", tmp_path / "src", "hf", tmp_path / "dst", f"src.assets={base}"))
    dcp.assert_same_tensors(weights_of(tmp_path / "dst"), tensors)
    untied = write_mystery(tmp_path / "untied", {})
    done(*move("dcp", tmp_path / "src", "hf", tmp_path / "dst2", f"src.assets={untied}"))
    dcp.assert_same_tensors(weights_of(tmp_path / "dst2"), state)


def test_a_config_without_a_family_is_refused(tmp_path: Path) -> None:
    source = write_mystery(tmp_path / "src", mystery(), model_type=None)
    refused(tmp_path, r"config.json`: model_type is None", *move("hf", source, "fsdp2",
            tmp_path / "dst"))  # fmt: skip
