"""A tiny model of each release of Llama, in the layout, dtype and vocabulary that Meta ships."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.oracles import meta
from tests.oracles.models import LLAMA3_SCALING, Model, build, with_normal_values

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "head_dim": 8,
}
GROUPED = {"num_key_value_heads": 2}
LLAMA_3 = {"vocab_size": 128256, **GROUPED}


@dataclass(frozen=True)
class Tiny:
    """A release: `written` is the generation of params.json, `converter` the nearest version that
    the converter of transformers 4.45 knows, `said` what our command line has to be told.
    """

    version: str
    instruct: bool
    mp: int
    written: str
    overrides: dict[str, Any]
    converter: str
    said: tuple[str, ...] = ()
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def embedding_dim(self) -> int:
        """The dim on which the embedding is cut."""
        return 0 if self.written == "llama3" else 1

    @property
    def rope_factor(self) -> float:
        """The factor of scaled positions."""
        return 32.0 if self.version == "3.2" else 8.0

    def write(self, path: Path) -> None:
        """Write the directory as Meta ships it."""
        older = self.written != "llama3"
        options = {"embedding_dim": self.embedding_dim, "rope_freqs": older, "flat_storage": older}
        meta.write(model_of(self), path, self.mp, generation=self.written, **options)


def _llama_1_or_2(version: str, eps: float, **changes: Any) -> Tiny:
    config = {"vocab_size": 32000, "rope_theta": 10000.0, "rms_norm_eps": eps}
    return replace(Tiny(version, False, 2, f"llama{version}", config, version), **changes)


def _llama_3(version: str, instruct: bool, **changes: Any) -> Tiny:
    said = ("src.instruct=true",) if instruct else ()
    scaled = LLAMA3_SCALING | {"factor": 32.0 if version == "3.2" else 8.0}
    config = LLAMA_3 | ({"rope_scaling": scaled} if version != "3" else {})
    converter = "3" if version == "3" else "3.1"
    return replace(Tiny(version, instruct, 2, "llama3", config, converter, said), **changes)


CODE = {"vocab_size": 32016, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5}
SAID_2 = ("src.version=3.2",)
TINY = {
    "1": _llama_1_or_2("1", 1e-6, dtype=torch.float16),
    "2": _llama_1_or_2("2", 1e-5),
    "2-chat": _llama_1_or_2("2", 1e-5, mp=1, instruct=True, said=("src.instruct=true",)),
    "code": Tiny("code", False, 2, "llama2", CODE | GROUPED, "2"),
    "3": _llama_3("3", False),
    "3-instruct": _llama_3("3", True, mp=1),
    "3.1": _llama_3("3.1", False),
    "3.1-instruct": _llama_3("3.1", True),
    "3.2": _llama_3("3.2", False, mp=1, tied=True, said=SAID_2),
    "3.2-instruct": _llama_3("3.2", True, mp=1, tied=True, said=(*SAID_2, "src.instruct=true")),
    "3.3": _llama_3("3.3", True, said=("src.version=3.3",)),
}


@cache
def _of(name: str) -> Model:
    tiny = TINY[name]
    return with_normal_values(build(SIZES | tiny.overrides, tiny.tied, tiny.dtype, {}))


def model_of(tiny: Tiny) -> Model:
    """The model, with ordinary values."""
    return _of(next(name for name, other in TINY.items() if other is tiny))
