"""The parameters of a dense decoder: grouped-query attention, rotary positions and a gated MLP.

What families of this kind differ in is which projections have a bias.
"""

from collections.abc import Collection
from functools import partial

import torch

from reshard.families.model import ModelConfig
from reshard.layout import Parameter

ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")


def parameters(model: ModelConfig, biased: Collection[str]) -> list[Parameter]:
    """All parameters in the order of transformers' state dict; a tied model has no `lm_head`.

    `biased` are the roles of the projections that have a bias.
    """
    make = partial(Parameter, dtype=getattr(torch, model.dtype))
    found = [
        make("model.embed_tokens.weight", (model.vocab, model.hidden), "embedding", None, dim=0)
    ]
    for layer in range(model.layers):
        found += _layer(model, layer, biased)
    found.append(make("model.norm.weight", (model.hidden,), "norm", None))
    if not model.tied:
        found.append(make("lm_head.weight", (model.vocab, model.hidden), "output", None, dim=0))
    return found


def _layer(model: ModelConfig, layer: int, biased: Collection[str]) -> list[Parameter]:
    """One decoder layer: its projections with their biases, then its norms."""
    hidden, head, ffn = model.hidden, model.head_dim, model.intermediate
    queries, keys = model.heads * head, model.kv_heads * head
    prefix = f"model.layers.{layer}."
    make = partial(Parameter, layer=layer, dtype=getattr(torch, model.dtype))
    q = partial(make, dim=0, head=head, rotary=True)
    v = partial(make, dim=0, head=head)
    column, row = partial(make, dim=0), partial(make, dim=1)
    projections = (
        ("self_attn.q_proj", "attention.q", (queries, hidden), q),
        ("self_attn.k_proj", "attention.k", (keys, hidden), q),
        ("self_attn.v_proj", "attention.v", (keys, hidden), v),
        ("self_attn.o_proj", "attention.o", (hidden, queries), row),
        ("mlp.gate_proj", "mlp.gate", (ffn, hidden), column),
        ("mlp.up_proj", "mlp.up", (ffn, hidden), column),
        ("mlp.down_proj", "mlp.down", (hidden, ffn), row),
    )
    found = []
    for module, role, shape, kind in projections:
        found.append(kind(f"{prefix}{module}.weight", shape, role))
        if role in biased:
            # A column-parallel bias is cut with the rows, a row-parallel one not at all.
            bias = make if kind is row else kind
            found.append(bias(f"{prefix}{module}.bias", shape[:1], f"{role}.bias"))
    norms = (("input_layernorm", "attention.norm"), ("post_attention_layernorm", "mlp.norm"))
    return [*found, *(make(f"{prefix}{name}.weight", (hidden,), role) for name, role in norms)]
