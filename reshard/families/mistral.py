"""Mistral: a Llama's tensors, without biases; its sliding window changes no tensor."""

from collections.abc import Mapping

from reshard.families import decoder
from reshard.families.model import Json, ModelConfig
from reshard.layout import Parameter

MODEL_TYPES = ("mistral",)
ARCHITECTURE = "MistralForCausalLM"
IMPLIED = ("attention_bias", "mlp_bias")
DEFAULTS: Mapping[str, Json] = {"num_key_value_heads": 8, "max_position_embeddings": 131072}


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters in the order of transformers' state dict."""
    return decoder.parameters(model, ())
