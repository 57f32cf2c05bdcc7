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
    """One decoder layer; biases of column-parallel projections are cut with their rows."""
    name = f"model.layers.{layer}.".__add__
    make = partial(Parameter, layer=layer, dtype=getattr(torch, model.dtype))
    hidden, head, ffn = model.hidden, model.head_dim, model.intermediate
    queries, keys = model.heads * head, model.kv_heads * head
    found = [
        make(
            name("self_attn.q_proj.weight"),
            (queries, hidden),
            "attention.q",
            dim=0,
            head=head,
            rotary=True,
        ),
        make(
            name("self_attn.k_proj.weight"),
            (keys, hidden),
            "attention.k",
            dim=0,
            head=head,
            rotary=True,
        ),
        make(name("self_attn.v_proj.weight"), (keys, hidden), "attention.v", dim=0, head=head),
        make(name("self_attn.o_proj.weight"), (hidden, queries), "attention.o", dim=1),
    ]
    if model.attention_bias:
        found += [
            make(
                name("self_attn.q_proj.bias"),
                (queries,),
                "attention.q.bias",
                dim=0,
                head=head,
                rotary=True,
            ),
            make(
                name("self_attn.k_proj.bias"),
                (keys,),
                "attention.k.bias",
                dim=0,
                head=head,
                rotary=True,
            ),
            make(name("self_attn.v_proj.bias"), (keys,), "attention.v.bias", dim=0, head=head),
            make(name("self_attn.o_proj.bias"), (hidden,), "attention.o.bias"),
        ]
    found += [
        make(name("mlp.gate_proj.weight"), (ffn, hidden), "mlp.gate", dim=0),
        make(name("mlp.up_proj.weight"), (ffn, hidden), "mlp.up", dim=0),
        make(name("mlp.down_proj.weight"), (hidden, ffn), "mlp.down", dim=1),
    ]
    if model.mlp_bias:
        found += [
            make(name("mlp.gate_proj.bias"), (ffn,), "mlp.gate.bias", dim=0),
            make(name("mlp.up_proj.bias"), (ffn,), "mlp.up.bias", dim=0),
            make(name("mlp.down_proj.bias"), (hidden,), "mlp.down.bias"),
        ]
    return [
        *found,
        make(name("input_layernorm.weight"), (hidden,), "attention.norm"),
        make(name("post_attention_layernorm.weight"), (hidden,), "mlp.norm"),
    ]
