"""Hugging Face directories, through the safetensors package."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.models import Model, checked

DEFAULTS = {
    "model_type": "llama",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


# Keys of a Llama's config.json that the config classes of other families do not know.
UNKNOWN_KEYS = {
    "qwen2": ("attention_bias", "mlp_bias", "head_dim"),
    "mistral": ("attention_bias", "mlp_bias"),
}


def write(model: Model, path: Path, files: int = 1, *, spelling: int = 4) -> None:
    """Write safetensors (dealt round robin over `files`), the index, and both configs."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = model.config if spelling == 4 else spelled_as_5(model.config)
    unknown = UNKNOWN_KEYS.get(config["model_type"], ())
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        unknown = tuple(key for key in unknown if key != "head_dim")
    config = {key: value for key, value in config.items() if key not in unknown}
    generation = {key: model.config[key] for key in ("bos_token_id", "eos_token_id")}
    _dump(path / "config.json", config)
    _dump(path / "generation_config.json", {"_from_model_config": True, **generation})
    if files == 1:
        _save(model.tensors, path / "model.safetensors")
        return
    names = list(model.tensors)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        weight_map |= dict.fromkeys(names[number::files], file)
        _save({name: model.tensors[name] for name in names[number::files]}, path / file)
    index = {"metadata": {"total_size": _nbytes(model.tensors)}, "weight_map": weight_map}
    _dump(path / "model.safetensors.index.json", index)


def read(path: Path) -> Model:
    """Read every tensor; the index, where there is one, must tell the truth about the files."""
    path = Path(path)
    stored = json.loads((path / "config.json").read_text())
    config = spelled_as_4(stored)
    implied = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    for key in UNKNOWN_KEYS.get(config["model_type"], ()):
        assert key not in stored or (key == "head_dim" and not implied), f"{key} in config.json"
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                assert name not in tensors, f"{name} is in {where[name]} and in {file.name}"
                tensors[name], where[name] = opened.get_tensor(name), file.name
    _check_index(path, where, tensors)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    said = config.setdefault("torch_dtype", next(iter(dtypes)))
    assert dtypes == {said}, f"config says {said}, tensors are {sorted(dtypes)}"
    return checked(config, tensors)


def spelled_as_4(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4.x writes it, with the defaults that tensors depend on."""
    config = dict(config)
    config.pop("transformers_version", None)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if "rope_parameters" in config:
        rope = dict(config.pop("rope_parameters"))
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config = DEFAULTS | config
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // heads
    return config


def spelled_as_5(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 5.x writes it."""
    config = dict(config)
    config["dtype"] = config.pop("torch_dtype")
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **scaling}
    return config


def _check_index(path: Path, where: dict[str, str], tensors: dict[str, Tensor]) -> None:
    file = path / "model.safetensors.index.json"
    if set(where.values()) == {"model.safetensors"}:
        assert not file.exists(), "an index stands beside a single file"
        return
    index = json.loads(file.read_text())
    assert index["weight_map"] == where, "weight_map differs from the files"
    assert index["metadata"]["total_size"] == _nbytes(tensors), "total_size is wrong"
    count = len(set(where.values()))
    expected = {f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
    assert set(where.values()) == expected, f"files are named {sorted(set(where.values()))}"


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
