"""Small valid checkpoints of every format, as the bytes of their files by relative path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from reshard import families
from tests.fuzz.harness import Files
from tests.oracles import dcp, gguf, hf, meta, models, nanotron, titan
from tests.oracles.models import Model

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "vocab_size": 10,
    "head_dim": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
JOB = b"""\
src: {topology: meta8, path: '${oc.env:HOME,/tmp}/x'}
dst:
  topology: tp4
  path: ${src.path}/out
  mesh:
    tp: 4
engine: {memory: 256MiB, fsync: false}
"""


def small_model() -> Model:
    """A Llama of one layer."""
    return models.build(SIZES, False, torch.bfloat16, {})


def with_config(write: Callable[..., object]) -> Callable[[Model, Path, int], None]:
    """A writer that also leaves a config.json, as users put it beside a run's shards."""

    def written(model: Model, path: Path, shards: int) -> None:
        write(model, path, shards)
        hf.write(model, path / "apart")
        shutil.move(path / "apart" / "config.json", path / "config.json")
        shutil.rmtree(path / "apart")

    return written


def write_state_dict(model: Model, path: Path) -> None:
    """FULL_STATE_DICT, as accelerate leaves it."""
    hf.write(model, path)
    (path / "model.safetensors").unlink()
    torch.save(model.tensors, path / "pytorch_model.bin")


def write_unknown(model: Model, path: Path) -> None:
    """A model of a family that is not known."""
    hf.write(model, path, files=2)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"llama"', '"other"'))


WRITERS: dict[str, Callable[[Model, Path], object]] = {
    "hf": lambda model, path: hf.write(model, path, files=2),
    "unknown": write_unknown,
    "meta": lambda model, path: meta.write(model, path, 2),
    "nanotron": lambda model, path: nanotron.write(model, path / "5", 2, 1),
    "fsdp": lambda model, path: with_config(dcp.write_fsdp)(model, path, 2),
    "titan": lambda model, path: with_config(titan.write_titan)(model, path, 2),
    "gguf": lambda model, path: (path.mkdir(), gguf.write(model, path)),
    "statedict": write_state_dict,
}
TRAIN_PARAMS = b"model_name: meta-llama/Llama-2-7b\nlr: 1e-4\n"


def manifest() -> bytes:
    """What an earlier run of ours leaves, as far as a scan reads it."""
    model = families.from_hf(small_model().config, "seed").to_json()
    return json.dumps({"model": model, "target": {"declared": {"rope": "half"}}}).encode()


def beside(form: str) -> Files:
    """Small files that a scan of a format reads where they are there."""
    if form == "fsdp":
        return {"train_params.yaml": TRAIN_PARAMS}
    if form in ("meta", "gguf", "titan"):
        return {"reshard.json": manifest()}
    return {"5/reshard.json": manifest()} if form == "nanotron" else {}


def checkpoint(form: str, folder: Path) -> Files:
    """The files of a checkpoint, which is written to `folder` for a moment."""
    root = folder / form
    WRITERS[form](small_model(), root)
    files = {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    shutil.rmtree(root)
    return files | beside(form)
