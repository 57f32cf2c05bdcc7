"""Bytes on each GPU: of a layout's shards, of the KV cache, of training. Pure arithmetic.

All figures are of the fullest GPU unless they say otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from reshard.families.model import ModelConfig
from reshard.fitting.gpus import GIB
from reshard.layout import Layout, Parameter, Slot

# What every GPU keeps free of weights: CUDA's context, NCCL, the allocator's gaps, activations of
# a forward pass in chunks, CUDA graphs. A round number above what is usually seen.
ALLOWANCE = 2 * GIB
DEFAULT_CONTEXT = 8192
KV_ITEMSIZE = 2


@dataclass(frozen=True, slots=True)
class Share:
    """What one mesh coordinate holds."""

    elements: int = 0
    nbytes: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.elements + other.elements, self.nbytes + other.nbytes)


def shares(layout: Layout) -> list[Share]:
    """What each coordinate of a layout holds, a parameter that stands there twice counted once.

    What Nanotron stores once and has on all of a stage, norms, is on the first of these alone.
    """
    held = [Share()] * layout.coordinates
    seen: set[tuple[str, int]] = set()
    for slot in layout.slots:
        for shard in range(slot.placement.cut.parts):
            place = (slot.parameter, slot.coordinate_of(shard))
            if place not in seen:
                seen.add(place)
                held[place[1]] += _share(slot, shard)
    return held


def _share(slot: Slot, shard: int) -> Share:
    """One stored tensor's part of its slot's parameter."""
    elements = sum(region.numel for region in slot.placement.regions(shard))
    return Share(elements, elements * slot.dtype.itemsize)


def fullest(held: Iterable[Share]) -> Share:
    """The largest share."""
    return max(held, key=lambda share: share.nbytes)


def first_share(layout: Layout) -> Share:
    """What the first coordinate holds: none has more where chunks of dim 0 are dealt out."""
    once = {slot.parameter: slot for slot in reversed(layout.slots)}
    return sum((_share(slot, 0) for slot in once.values()), Share())


def kv_bytes(model: ModelConfig, tp: int = 1) -> int:
    """Bytes of one layer's keys and values for a token, on each of `tp` GPUs.

    A key-value head is the least that a GPU holds: with more GPUs than heads, each has a copy.
    """
    return 2 * max(1, model.kv_heads // tp) * model.head_dim * KV_ITEMSIZE


def kv_bytes_of_all(model: ModelConfig) -> int:
    """Bytes of KV cache for a token, in all layers and heads."""
    return model.layers * kv_bytes(model)


def activation_bytes(model: ModelConfig, sequence: int, tp: int = 1) -> int:
    """An allowance for the activations of one sequence, each layer recomputed in the backward pass.

    Its input is kept per layer, 34 s h bytes are those of the layer at work (Korthikanti et al.,
    2022, without the scores that flash attention does not keep), and the logits stand in 16 bits
    and in float32. Sequence parallelism cuts all of it by `tp`; pipeline stages do not, for as many
    sequences are under way.
    """
    kept = 2 * model.layers * sequence * model.hidden
    working = 34 * sequence * model.hidden
    logits = 6 * sequence * model.vocab
    return (kept + working + logits) // tp


def largest_block(parameters: Iterable[Parameter]) -> int:
    """Elements of the largest unit that FSDP gathers: a layer, or what is outside of all."""
    blocks: dict[int | None, int] = {}
    for item in parameters:
        size = 1
        for extent in item.shape:
            size *= extent
        blocks[item.layer] = blocks.get(item.layer, 0) + size
    return max(blocks.values())
