"""Llama 1, 2, 3: a dense decoder with grouped-query attention, rotary positions and a gated MLP."""

from functools import partial

import torch

from reshard.families.model import ModelConfig
from reshard.layout import Parameter

MODEL_TYPES = ("llama",)
ARCHITECTURE = "LlamaForCausalLM"


def parameters(model: ModelConfig) -> list[Parameter]:
    """All parameters in the order of transformers' state dict; a tied model has no `lm_head`."""
    make = partial(Parameter, dtype=getattr(torch, model.dtype))
    found = [
        make("model.embed_tokens.weight", (model.vocab, model.hidden), "embedding", None, dim=0)
    ]
    for layer in range(model.layers):
        found += _layer(model, layer)
    found.append(make("model.norm.weight", (model.hidden,), "norm", None))
    if not model.tied:
        found.append(make("lm_head.weight", (model.vocab, model.hidden), "output", None, dim=0))
    return found


def _layer(model: ModelConfig, layer: int) -> list[Parameter]:
    """One decoder layer: its projections with their biases, then its norms."""
    hidden, head, ffn = model.hidden, model.head_dim, model.intermediate
    queries, keys = model.heads * head, model.kv_heads * head
    prefix = f"model.layers.{layer}."
    make = partial(Parameter, layer=layer, dtype=getattr(torch, model.dtype))
    q = partial(make, dim=0, head=head, rotary=True)
    v = partial(make, dim=0, head=head)
    column, row = partial(make, dim=0), partial(make, dim=1)
    attention = (
        ("self_attn.q_proj", "attention.q", (queries, hidden), q),
        ("self_attn.k_proj", "attention.k", (keys, hidden), q),
        ("self_attn.v_proj", "attention.v", (keys, hidden), v),
        ("self_attn.o_proj", "attention.o", (hidden, queries), row),
    )
    mlp = (
        ("mlp.gate_proj", "mlp.gate", (ffn, hidden), column),
        ("mlp.up_proj", "mlp.up", (ffn, hidden), column),
        ("mlp.down_proj", "mlp.down", (hidden, ffn), row),
    )
    found = []
    for group, biased in ((attention, model.attention_bias), (mlp, model.mlp_bias)):
        for module, role, shape, kind in group:
            found.append(kind(f"{prefix}{module}.weight", shape, role))
            if biased:
                # A column-parallel bias is cut with the rows, a row-parallel one not at all.
                bias = make if kind is row else kind
                found.append(bias(f"{prefix}{module}.bias", shape[:1], f"{role}.bias"))
    norms = (("input_layernorm", "attention.norm"), ("post_attention_layernorm", "mlp.norm"))
    return [*found, *(make(f"{prefix}{name}.weight", (hidden,), role) for name, role in norms)]
