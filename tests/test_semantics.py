"""What we write computes what the model computes, and the libraries of each format accept it."""

import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import forward, hf, meta
from tests.oracles.compare import assert_same, assert_same_tensor
from tests.oracles.models import LLAMA3_SCALING, Model, model_a, model_b, with_normal_values
from tests.settings import Job, must_convert

FEW_KV_HEADS = {"num_key_value_heads": 2, "intermediate_size": 216, "vocab_size": 240}
# 12 values per head, so that the frequencies of a head are on both sides of the scaling
SCALED = {"head_dim": 12, "hidden_size": 144, "rope_scaling": LLAMA3_SCALING}
LLAMA_2 = {"num_key_value_heads": 12, "rope_theta": 10000.0}
GROUPED: dict[str, tuple[Callable[[], Model], int]] = {
    "12 heads on 6": (partial(model_a, dtype=torch.float32), 3),
    "12 heads on 2, each twice": (partial(model_a, dtype=torch.float32, **FEW_KV_HEADS), 4),
    "6 heads on 3": (partial(model_b, dtype=torch.float32), 3),
    "scaled": (partial(model_a, dtype=torch.float32, **SCALED), 2),
    "llama 2": (partial(model_a, dtype=torch.float32, **LLAMA_2), 2),
    "tied": (partial(model_a, tied=True, dtype=torch.float32), 2),
}
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 111


def transformers_logits(path: Path) -> Tensor:
    """Logits of a Hugging Face directory by transformers, in float32."""
    import transformers

    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("name", GROUPED)
def test_logits_survive_both_directions(name: str, tmp_path: Path) -> None:
    """Meta's own forward pass over Meta files, against transformers over Hugging Face files."""
    make, mp = GROUPED[name]
    model = with_normal_values(make())
    hf.write(model, tmp_path / "hf")
    meta.write(model, tmp_path / "meta", mp, embedding_dim=int(name == "llama 2"))
    jobs = [
        Job(tmp_path / "hf", tmp_path / "our-meta", f"meta{mp}", (), "least"),
        Job(tmp_path / "meta", tmp_path / "our-hf", "hf", (), "least"),
        Job(tmp_path / "our-hf", tmp_path / "again-meta", f"meta{mp}", (), "least"),
        Job(tmp_path / "our-meta", tmp_path / "tp", "tp2" if mp % 2 == 0 else "tp3"),
        Job(tmp_path / "tp", tmp_path / "again-hf", "hf", ("dst.max_shard_size=100KB",)),
    ]
    must_convert(2, jobs)
    expected = transformers_logits(tmp_path / "hf")
    assert expected.std() > 0.1
    torch.testing.assert_close(
        forward.logits(tmp_path / "meta", TOKENS), expected, rtol=1e-4, atol=1e-5
    )
    for place in ("our-meta", "again-meta"):
        found = forward.logits(tmp_path / place, TOKENS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for place in ("our-hf", "again-hf"):
        assert torch.equal(transformers_logits(tmp_path / place), expected), place


def test_the_llama_of_transformers_places_our_files_on_devices(tmp_path: Path) -> None:
    import transformers

    model = model_a()
    meta.write(model, tmp_path / "meta", 2)
    must_convert(2, [Job(tmp_path / "meta", tmp_path / "hf", "hf", ("dst.max_shard_size=90KB",))])
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 5
    loaded, said = transformers.LlamaModel.from_pretrained(
        tmp_path / "hf", device_map="auto", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert said.pop("unexpected_keys") == {"lm_head.weight"}
    assert not any(said.values()), said
    for name, tensor in loaded.state_dict().items():
        assert_same_tensor(name, tensor, model.tensors[f"model.{name}"])


@pytest.mark.parametrize("source", ["meta", "nanotron"])
def test_a_tied_model_loads_without_missing_keys(source: str, tmp_path: Path) -> None:
    import transformers

    model = model_a(tied=True)
    hf.write(model, tmp_path / "one")
    spec = "meta3" if source == "meta" else "tp2pp2"
    jobs = [
        Job(tmp_path / "one", tmp_path / source, spec),
        Job(tmp_path / source, tmp_path / "hf", "hf"),
    ]
    must_convert(2, jobs)
    loaded, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    wrong = {key: found for key, found in said.items() if found}
    assert not wrong, f"transformers says {wrong}"
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings
    found = dict(loaded.state_dict())
    assert_same_tensor("lm_head", found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(Model({}, found), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_and_unzip_accept_our_pth_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_a(dtype=dtype, rope_theta=10000.0)
    hf.write(model, tmp_path / "hf")
    must_convert(3, [Job(tmp_path / "hf", tmp_path / "meta2", "meta2", (), "least")])
    files = sorted((tmp_path / "meta2").glob("*.pth"))
    assert [file.name for file in files] == ["consolidated.00.pth", "consolidated.01.pth"]
    for rank, file in enumerate(files):
        expected = {key: shard(key, whole, rank) for key, whole in meta.to_meta(model, 1).items()}
        for mmap in (False, True):
            stored: dict[str, Any] = torch.load(file, weights_only=True, mmap=mmap)
            assert set(stored) == {*expected, "rope.freqs"}
            for key, tensor in expected.items():
                assert_same_tensor(f"{file.name}: {key} mmap={mmap}", stored[key], tensor)
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        said = subprocess.run(["unzip", "-t", file], capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "No errors detected" in said.stdout


def shard(key: str, whole: Tensor, rank: int) -> Tensor:
    """One of two files' part of a tensor; Llama 1 and 2 cut the embedding on dim 1."""
    dim = 1 if key == meta.EMBEDDING else meta.split_dim(key)
    return whole if dim is None else whole.chunk(2, dim)[rank]
