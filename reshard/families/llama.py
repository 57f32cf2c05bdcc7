"""Llama 1, 2, 3: biases only where config.json says so, then on all of attention or of the MLP."""

from reshard.families import decoder
from reshard.families.model import ModelConfig
from reshard.layout import Parameter

MODEL_TYPES = ("llama",)
ARCHITECTURE = "LlamaForCausalLM"


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters in the order of transformers' state dict."""
    attention = decoder.ATTENTION if model.attention_bias else ()
    mlp = decoder.MLP if model.mlp_bias else ()
    return decoder.parameters(model, (*attention, *mlp))
