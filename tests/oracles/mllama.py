"""A tiny Llama 3.2 Vision, through transformers.

The released files, and what `save_pretrained` writes to this day, spell `language_model.model.x`,
`language_model.lm_head.x`, `vision_model.x`, `multi_modal_projector.x`: "old". In memory it is
`model.language_model.x`, `lm_head.x`, `model.vision_model.x`, since transformers 4.52: "new".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from tests.oracles import dcp

SPELLINGS = ("old", "new")
RENAMES = (  # old, new; the first that fits
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
TEXT = {
    "vocab_size": 93,
    "hidden_size": 36,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "cross_attention_layers": [1],
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 92,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
VISION = {
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 2,
    "intermediate_size": 23,
    "vision_output_dim": 60,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": [0, 2],
}


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> MllamaForConditionalGeneration:
    """A model with seeded values, whose gates are open: each tensor shows in the logits."""
    config = MllamaConfig(
        text_config=TEXT, vision_config=VISION, image_token_index=TEXT["vocab_size"], dtype=dtype
    )
    config.architectures = ["MllamaForConditionalGeneration"]
    model = MllamaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = (0.3 * noise + mean).to(dtype)
    return model.eval()


def published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the spelling of the released files."""
    return {respelled(name, "old"): tensor for name, tensor in state_dict.items()}


def respelled(name: str, spelling: str) -> str:
    """One name in the other spelling; a name that is spelled so already stays."""
    turn = 1 if spelling == "old" else -1
    for wanted, other in (pair[::turn] for pair in RENAMES):
        if not name.startswith(wanted) and name.startswith(other):
            return wanted + name.removeprefix(other)
    return name


def spelled(model: MllamaForConditionalGeneration, spelling: str) -> dict[str, Tensor]:
    """The state dict of a model as transformers of that time had it."""
    return {respelled(name, spelling): tensor for name, tensor in model.state_dict().items()}


def write_fsdp(
    path: Path, shards: int, spelling: str = "new", dtype: torch.dtype = torch.float32
) -> None:
    """The state dict of `tiny(dtype)` as FSDP saves it, {"model": state dict}."""
    states = dcp.split(spelled(tiny(dtype), spelling), shards, dcp.over_ranks(shards))
    dcp.save(path, [{"model": state} for state in states])


def write_config(path: Path, dtype: torch.dtype = torch.float32) -> None:
    """config.json beside a checkpoint, as `save_pretrained` writes it."""
    tiny(dtype).config.save_pretrained(path)


def check_loads(directory: Path, expected: MllamaForConditionalGeneration) -> None:
    """from_pretrained finds each tensor, and nothing else, and the logits are the same."""
    found, said = MllamaForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, local_files_only=True
    )
    assert not any(said.values()), f"{directory}: {said}"
    dcp.assert_same_tensors(found.state_dict(), expected.state_dict())
    assert torch.equal(logits(found.eval()), logits(expected)), f"{directory}: logits differ"


def logits(model: MllamaForConditionalGeneration) -> Tensor:
    """The logits of a short text with one image of one tile."""
    config = model.config
    size, tiles = config.vision_config.image_size, config.vision_config.max_num_tiles
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[config.image_token_index, 1, 5, 17, 92, 40]]),
        "pixel_values": torch.randn((1, 1, tiles, 3, size, size), generator=generator),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1] + [0] * (tiles - 1)]]),
        "cross_attention_mask": torch.tensor([[[1] + [0] * (tiles - 1)]] * 6)[None],
    }
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits
