"""Seeded models of true shapes, written piece by piece: no more than a piece is ever in memory."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from reshard import families
from reshard.families.model import Json
from reshard.layout import Parameter

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
ELEMENT_BYTES = 2
PIECE_BYTES = 1 << 24
# Of four bfloat16: the highest bit of each exponent is off, so that no value is infinite or a NaN.
FINITE = np.uint64(0xBFFF_BFFF_BFFF_BFFF)


@dataclass(frozen=True, slots=True)
class Model:
    """A model in bfloat16: `config` is as in config.json."""

    name: str
    config: Mapping[str, Json]
    seed: int = 0

    @property
    def parameters(self) -> list[Parameter]:
        """The tensors, in Hugging Face's order."""
        return families.parameters(families.from_hf(dict(self.config), self.name))

    @property
    def total_bytes(self) -> int:
        """The size of all tensors."""
        return ELEMENT_BYTES * sum(math.prod(parameter.shape) for parameter in self.parameters)


def untied(name: str, config: str) -> Model:
    """A model of configs/models, with an output of its own."""
    record = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    return Model(name, {**record, "tie_word_embeddings": False})


def write(model: Model, folder: Path) -> None:
    """Write a Hugging Face directory of one safetensors file; config.json comes last."""
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(model))
        for piece in values(model):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    (folder / "config.json").write_text(json.dumps(dict(model.config), indent=1) + "\n")


def header(model: Model) -> bytes:
    """What a safetensors file begins with: the length of its JSON, and that."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for parameter in model.parameters:
        stop = start + ELEMENT_BYTES * math.prod(parameter.shape)
        place = {"dtype": "BF16", "shape": parameter.shape, "data_offsets": (start, stop)}
        entries[parameter.name], start = place, stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def values(model: Model) -> Iterator[bytes]:
    """The bytes of all tensors, in pieces."""
    rng, left = np.random.default_rng(model.seed), model.total_bytes
    while left > 0:
        words = rng.integers(0, 1 << 64, PIECE_BYTES // 8, dtype=np.uint64) & FINITE
        yield words.tobytes()[:left]
        left -= PIECE_BYTES
