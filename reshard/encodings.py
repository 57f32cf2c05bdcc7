"""Codecs of rows: how a stored tensor's elements become bytes where they are no plain elements.

A row is cut into blocks of a fixed number of elements, and each block becomes a fixed number of
bytes: the quantised types of GGUF. Values are float32 on this side of a codec. The arithmetic is
that of the `gguf` package, an optional one.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from reshard.errors import ConfigError, LayoutError

# Elements that are coded at a time: the codecs of `gguf` take up to ten times the memory of these.
STEP = 1 << 16


@dataclass(frozen=True, slots=True)
class Encoding:
    """`block` consecutive elements of a row are stored in `nbytes` bytes.

    The first `scales` of these are float16 numbers that the rest is multiplied by or added to.
    """

    name: str
    block: int
    nbytes: int
    scales: int

    def size(self, elements: int) -> int:
        """Bytes of `elements`, which are whole blocks."""
        return elements // self.block * self.nbytes


ENCODINGS: Mapping[str, Encoding] = {
    name: Encoding(name, 32, nbytes, scales)
    for name, nbytes, scales in (
        ("q4_0", 18, 2),
        ("q4_1", 20, 4),
        ("q5_0", 22, 2),
        ("q5_1", 24, 4),
        ("q8_0", 34, 2),
    )
}

# Codecs that have no arithmetic here: only llama.cpp's own tool makes them.
TOOL_ONLY = (
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)


def stored_bytes(shape: Sequence[int], dtype: torch.dtype, encoding: Encoding | None) -> int:
    """Bytes that a tensor takes in its file."""
    numel = math.prod(shape)
    return numel * dtype.itemsize if encoding is None else encoding.size(numel)


def require(encoding: Encoding, shape: Sequence[int], what: str) -> None:
    """Refuse a tensor whose rows are no whole blocks, or a codec that is not installed."""
    if shape[-1] % encoding.block:
        raise LayoutError(
            f"{what}: rows of {shape[-1]} elements are no whole {encoding.name} blocks of "
            f"{encoding.block}; use dst.dtype=bfloat16, float16 or float32"
        )
    require_codecs()


def require_codecs() -> None:
    """Refuse where the codecs are not installed."""
    _codecs()


def encode(encoding: Encoding, memory: memoryview) -> memoryview:
    """Code the float32 values that fill `memory` in place; the bytes, which begin it."""
    values, codecs = np.frombuffer(memory, dtype=np.float32), _codecs()
    kind, done = _kind(codecs, encoding), 0
    for start in range(0, len(values), STEP):
        # Scales that overflow are counted, see `spoilt`.
        with np.errstate(over="ignore", invalid="ignore"):
            coded = codecs.quants.quantize(values[start : start + STEP], kind).tobytes()
        memory[done : done + len(coded)] = coded
        done += len(coded)
    return memory[:done]


def decode(encoding: Encoding, memory: memoryview) -> None:
    """Fill `memory` with the float32 values of the coded bytes that end it."""
    values, codecs = np.frombuffer(memory, dtype=np.float32), _codecs()
    kind, first = _kind(codecs, encoding), len(memory) - encoding.size(len(values))
    for start in range(0, len(values), STEP):
        stop = min(start + STEP, len(values))
        held = memory[first + encoding.size(start) : first + encoding.size(stop)]
        coded = np.frombuffer(bytes(held), dtype=np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):
            values[start:stop] = codecs.quants.dequantize(coded, kind)


def spoilt(encoding: Encoding, coded: memoryview) -> int:
    """How many values lie in blocks whose scale is not finite."""
    blocks = np.frombuffer(coded, dtype=np.uint8).reshape(-1, encoding.nbytes)
    scales = np.ascontiguousarray(blocks[:, : encoding.scales]).view(np.float16)
    return int((~np.isfinite(scales)).any(axis=1).sum()) * encoding.block


def _kind(codecs: ModuleType, encoding: Encoding) -> object:
    """The type as the package `gguf` names it."""
    return codecs.GGMLQuantizationType[encoding.name.upper()]


def _codecs() -> ModuleType:
    """The package `gguf`, which is optional."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError(
            "quantised tensors need the package gguf; pip install 'reshard[gguf]'"
        ) from None
