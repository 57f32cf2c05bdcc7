"""Meta's forward pass in float32, over the tensors of a Meta directory."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import meta

Weights = dict[str, Tensor]


@torch.no_grad()
def logits(path: Path, tokens: Tensor, *, rope_factor: float = 8.0) -> Tensor:
    """Logits [batch, position, vocabulary] of a Meta directory for tokens [batch, position]."""
    params, weights = meta.whole(path)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    eps = params["norm_eps"]
    rotation = rotations(params, tokens.shape[1], rope_factor)
    x = weights["tok_embeddings.weight"][tokens]
    for number in range(params["n_layers"]):
        prefix = f"layers.{number}."
        layer = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        x = x + attention(norm(x, layer["attention_norm.weight"], eps), layer, params, rotation)
        x = x + feed_forward(norm(x, layer["ffn_norm.weight"], eps), layer)
    return norm(x, weights["norm.weight"], eps) @ weights["output.weight"].T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def feed_forward(x: Tensor, layer: Weights) -> Tensor:
    """SwiGLU."""
    gate = F.silu(x @ layer["feed_forward.w1.weight"].T)
    return (gate * (x @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T


def attention(x: Tensor, layer: Weights, params: dict[str, Any], rotation: Tensor) -> Tensor:
    """Causal grouped-query attention; the kv heads are those of params.json, copies included."""
    heads = params["n_heads"]
    kv_heads = params.get("n_kv_heads", heads)
    q = rotated((x @ layer["attention.wq.weight"].T).unflatten(-1, (heads, -1)), rotation)
    k = rotated((x @ layer["attention.wk.weight"].T).unflatten(-1, (kv_heads, -1)), rotation)
    v = (x @ layer["attention.wv.weight"].T).unflatten(-1, (kv_heads, -1))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)
    return mixed @ layer["attention.wo.weight"].T


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring elements (2j, 2j + 1) of each head, turned as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation[:, None, :]).flatten(-2)


def rotations(params: dict[str, Any], length: int, factor: float) -> Tensor:
    """Unit complex numbers [position, pair]."""
    dim = params["dim"] // params["n_heads"]
    theta = params.get("rope_theta", 10000.0)
    frequencies = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if params.get("use_scaled_rope"):
        frequencies = [scaled(frequency, factor) for frequency in frequencies]
    angles = torch.outer(torch.arange(length).float(), torch.tensor(frequencies))
    return torch.polar(torch.ones_like(angles), angles)


def scaled(frequency: float, factor: float) -> float:
    """Llama 3.1's scaling: long waves are stretched, short ones kept, those between blended."""
    low, high, original = 1.0, 4.0, 8192
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency
