"""Whether TorchTitan reads a checkpoint as the Hugging Face model that it should be.

titan_adapter.py STEP_DIR HF_DIR

Runs on TorchTitan's Python, not on ours. A Llama3Model with the sizes of HF_DIR/config.json is
loaded from STEP_DIR, Llama3StateDictAdapter.to_hf is run over it, and every tensor is compared bit
for bit with those of HF_DIR. A folder called step-0 is loaded once more as a new run would find it:
by TorchTitan's CheckpointManager, from the folder above.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
)
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

INIT = {"weight": nn.init.zeros_}
TRAINING_STATE = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")
LONGEST_SEQUENCE = 64  # only the cache of the rotary embedding has this size

Tensors = dict[str, Tensor]


def differ(what: str) -> NoReturn:
    """Name the first difference and stop."""
    print(f"different: {what}")
    raise SystemExit(1)


def model_config(hf: dict[str, Any]) -> Llama3Model.Config:
    """The sizes of a Hugging Face Llama, in TorchTitan's words."""
    hidden, vocabulary = hf["hidden_size"], hf["vocab_size"]
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hidden // heads
    norm = RMSNorm.Config(normalized_shape=hidden, param_init=INIT)
    block = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=hidden,
            n_heads=heads,
            n_kv_heads=hf.get("num_key_value_heads"),
            head_dim=head_dim,
            wqkv_param_init=INIT,
            wo_param_init=INIT,
            inner_attention=get_attention_config("flex"),
            fuse_qkv=True,
            rope=ComplexRoPE.Config(dim=head_dim, max_seq_len=LONGEST_SEQUENCE),
        ),
        feed_forward=make_ffn_config(
            dim=hidden,
            hidden_dim=hf["intermediate_size"],
            w1_param_init=INIT,
            w2w3_param_init=INIT,
        ),
    )
    return Llama3Model.Config(
        dim=hidden,
        vocab_size=vocabulary,
        enable_weight_tying=hf.get("tie_word_embeddings", False),
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=hidden, param_init=INIT
        ),
        norm=norm,
        lm_head=Linear.Config(in_features=hidden, out_features=vocabulary, param_init=INIT),
        layers=[block] * hf["num_hidden_layers"],
    )


def empty_model(config: Llama3Model.Config, dtype: torch.dtype) -> Llama3Model:
    """A model full of NaN, so that what is never loaded is seen."""
    torch.set_default_dtype(dtype)
    built = Llama3Model(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(torch.nan)
    return built


def stored_tensors(folder: Path) -> Tensors:
    """Every tensor in the safetensors files of a folder."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
    if not found:
        raise SystemExit(f"no tensors in {folder}")
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: -0.0 is not 0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def check_stored(step: Path, keys: set[str], dtype: torch.dtype) -> None:
    """Stop where the model's keys or their types differ: dcp.load casts and skips silently."""
    stored = FileSystemReader(step).read_metadata().state_dict_metadata
    found = {key for key in stored if not key.startswith(TRAINING_STATE)}
    if found != keys:
        key = min(found ^ keys)
        differ(f"{key} is {'not a key of the model' if key in found else 'not stored'}")
    for key in sorted(keys):
        entry = stored[key]
        if not isinstance(entry, TensorStorageMetadata):
            differ(f"{key} is not a tensor")
        if entry.properties.dtype != dtype:
            differ(f"{key} is stored as {entry.properties.dtype}, not as {dtype}")


def loaded(config: Llama3Model.Config, step: Path, dtype: torch.dtype) -> Llama3Model:
    """A model loaded from the files, each key into memory of its own first."""
    model = empty_model(config, dtype)
    state = {key: torch.full_like(value, torch.nan) for key, value in model.state_dict().items()}
    check_stored(step, set(state), dtype)
    dcp.load(state, checkpoint_id=str(step))
    tied = state["tok_embeddings.weight"], state["lm_head.weight"]
    if config.enable_weight_tying and not same_bits(*tied):
        differ("lm_head.weight is not tok_embeddings.weight, but they are tied")
    model.load_state_dict(state, strict=True)
    return model


def started(config: Llama3Model.Config, folder: Path, dtype: torch.dtype) -> Llama3Model:
    """A model loaded as a new run loads it: from the newest step of a folder."""
    model = empty_model(config, dtype)
    manager = CheckpointManager(
        CheckpointManager.Config(enable=True, folder=str(folder), load_only=True),
        dataloader=None,
        model_parts=[model],
        optimizers=None,
        lr_schedulers=None,
        states={},
        sd_adapter=None,
    )
    if not manager.load():
        differ(f"CheckpointManager finds no step in {folder}")
    manager.close()
    return model


def compare(config: Llama3Model.Config, model: Llama3Model, expected: Tensors) -> None:
    """Stop where TorchTitan's own conversion gives anything but the expected tensors."""
    found = Llama3StateDictAdapter(config, None).to_hf(model.state_dict())
    for key in sorted(found.keys() | expected.keys()):
        if key not in found or key not in expected:
            differ(f"{key} is only in {'TorchTitan' if key in found else 'the reference'}")
        if not same_bits(found[key], expected[key]):
            differ(key)


def main(step: Path, reference: Path) -> None:
    """Compare, and say how many tensors are equal."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", "torch.distributed is")
    expected = stored_tensors(reference)
    config = model_config(json.loads((reference / "config.json").read_text()))
    if config.enable_weight_tying:
        expected.pop("lm_head.weight", None)
    dtype = expected["model.norm.weight"].dtype
    compare(config, loaded(config, step, dtype), expected)
    if step.name == "step-0":
        compare(config, started(config, step.parent, dtype), expected)
    print(f"equal: {len(expected)} tensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
