"""The device_map that accelerate makes of a model, on a skeleton that has no weights.

The skeleton is a tree of modules on the meta device with the names, shapes and dtypes of the
parameters; modules of transformers are not needed. accelerate places them as
`from_pretrained(..., device_map="auto")` does: balanced first (get_balanced_memory), in order
(infer_auto_device_map), no decoder layer split, a tied output beside its embedding.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn

from reshard.errors import LayoutError
from reshard.families import Model
from reshard.families.carried import STACKS, head_of
from reshard.families.model import ModelConfig
from reshard.layout import Parameter

MIB = 1 << 20
ROTARY = "model.rotary_emb"
Place = int | str


class Block(nn.Module):
    """A decoder layer, which is not split."""


def skeleton(parameters: Sequence[Parameter], model: Model) -> nn.Module:
    """A model's modules, without weights; a tied output is the embedding's own tensor."""
    root, made = nn.Module(), {}
    for item in parameters:
        weight = nn.Parameter(
            torch.empty(item.shape, dtype=item.dtype, device="meta"), requires_grad=False
        )
        made[item.name] = weight
        _put(root, item.name, weight)
        if isinstance(model, ModelConfig) and item.role == "norm":
            # transformers keeps the frequencies in buffers of a module beside the layers.
            for name in ("inv_freq", "original_inv_freq"):
                shape = (model.head_dim // 2,)
                _put(root, f"{ROTARY}.{name}", torch.empty(shape, device="meta"))
    embedding = next((item.name for item in parameters if item.role == "embedding"), None)
    if model.tied and embedding is not None:
        _put(root, head_of(model.model_type), made[embedding])
    return root


def _put(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a tensor under its name, with the modules that lead to it."""
    module, before = root, ""
    *path, last = name.split(".")
    try:
        for part in path:
            if part not in module._modules:
                numbered = before in STACKS and part.isdigit()
                module.add_module(part, Block() if numbered else nn.Module())
            module, before = module.get_submodule(part), part
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(last, tensor)
        else:
            module.register_buffer(last, tensor, persistent=False)
    except (KeyError, AttributeError):
        raise LayoutError(
            f"hf: `{name}` is no name that a module of torch can have: no device_map is made"
        ) from None


@dataclass(frozen=True, slots=True)
class Placed:
    """Where each module goes, and what from_pretrained is told to put it there.

    `caps` is the max_memory of each GPU, in whole MiB. `how` is its device_map: "auto" balances no
    further what is balanced, and "sequential" never does.
    """

    places: Mapping[str, Place]
    caps: tuple[int, ...]
    how: str

    @property
    def used(self) -> set[int]:
        """The GPUs that have something."""
        return {place for place in self.places.values() if isinstance(place, int)}

    @property
    def spills(self) -> bool:
        """Whether some of it finds no place on a GPU."""
        return not all(isinstance(place, int) for place in self.places.values())


def device_map(root: nn.Module, count: int, most: int) -> Placed:
    """Where accelerate puts a model on `count` GPUs with `most` bytes of weights at most each.

    Where balanced shares of a small model are smaller than its embedding, GPUs would be left empty
    before others are full; then fewer are used, if they suffice. What fits nowhere is on "disk".
    """
    count = min(count, 2 + sum(isinstance(module, Block) for module in root.modules()))
    tried = []
    with _silent():
        while count:
            found = _placed(root, count, most // MIB * MIB)
            if not found.spills and found.used == set(range(len(found.used))):
                return found
            tried.append(found)
            count //= 2
    return next((found for found in tried if not found.spills), tried[0])


def _placed(root: nn.Module, count: int, most: int) -> Placed:
    """The map of balanced shares, or of whole GPUs where the shares are too small for it."""
    everything = dict.fromkeys(range(count), most)
    shares = get_balanced_memory(root, dict(everything), [Block.__name__])
    caps = {gpu: int(shares[gpu]) // MIB * MIB for gpu in everything}
    found = _inferred(root, caps, "auto")
    return _inferred(root, everything, "sequential") if found.spills else found


def _inferred(root: nn.Module, caps: Mapping[int, int], how: str) -> Placed:
    places = infer_auto_device_map(root, dict(caps), [Block.__name__])
    return Placed(dict(places), tuple(caps.values()), how)


@contextmanager
def _silent() -> Iterator[None]:
    """accelerate warns of GPUs that this machine has not, and of what it puts on the disk."""
    log = logging.getLogger("accelerate.utils.modeling")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        log.disabled = before


def held_by(root: nn.Module, places: Mapping[str, Place]) -> dict[Place, int]:
    """Bytes of parameters and buffers on each device, a tied tensor counted once on each."""
    held: dict[Place, int] = {}
    seen: set[tuple[int, Place]] = set()
    tensors = [
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        device = place_of(name, places)
        if (id(tensor), device) not in seen:
            seen.add((id(tensor), device))
            held[device] = held.get(device, 0) + tensor.nbytes
    return held


def place_of(name: str, places: Mapping[str, Place]) -> Place:
    """The device of a tensor: that of the module around it which the map names."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places[name]


def condensed(places: Mapping[str, Place]) -> dict[Place, list[str]]:
    """The modules of each device, runs of numbered ones as `model.layers.0-18`."""
    found: dict[Place, list[str]] = {}
    for name, device in places.items():
        names = found.setdefault(device, [])
        match = re.fullmatch(r"(.*\.)(\d+)", name)
        last = re.fullmatch(r"(.*\.)(\d+)(?:-(\d+))?", names[-1]) if names else None
        if match and last and match[1] == last[1] and int(match[2]) == int(last[3] or last[2]) + 1:
            names[-1] = f"{last[1]}{last[2]}-{match[2]}"
        else:
            names.append(name or "everything")
    return found
