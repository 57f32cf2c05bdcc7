"""Qwen2 and Qwen2.5 without experts: a Llama's tensors, and biases on q, k and v alone."""

from collections.abc import Mapping

from reshard.families import decoder
from reshard.families.model import Json, ModelConfig
from reshard.layout import Parameter

MODEL_TYPES = ("qwen2",)
ARCHITECTURE = "Qwen2ForCausalLM"
# Its config.json has no such keys; a head of another size is read and written all the same.
IMPLIED = ("attention_bias", "mlp_bias", "head_dim")
DEFAULTS: Mapping[str, Json] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 32768,
}


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters in the order of transformers' state dict."""
    return decoder.parameters(model, ("attention.q", "attention.k", "attention.v"))
