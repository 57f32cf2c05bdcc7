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

from reshard.errors import ConfigError

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
    "q3_k",
    "q4_k",
    "q5_k",
    "iq4_nl",
    "iq4_xs",
)


def stored_bytes(shape: Sequence[int], dtype: torch.dtype, encoding: Encoding | None) -> int:
    """Bytes that a tensor takes in its file."""
    numel = math.prod(shape)
    return numel * dtype.itemsize if encoding is None else encoding.size(numel)


def require_codecs() -> None:
    """Refuse where the codecs are not installed."""
    _codecs()


@dataclass(frozen=True, slots=True)
class Coded:
    """Values as a file has them; `overflowed` and `vanished` count those that were lost.

    These are the values of blocks whose scale is not finite, and what is not zero in blocks whose
    scale is.
    """

    memory: memoryview
    overflowed: int = 0
    vanished: int = 0


def encode(encoding: Encoding, memory: memoryview) -> Coded:
    """Code the float32 values that fill `memory` in place; the bytes begin it."""
    values, codecs = np.frombuffer(memory, dtype=np.float32), _codecs()
    kind, done, overflowed, vanished = _kind(codecs, encoding), 0, 0, 0
    for start in range(0, len(values), STEP):
        step = values[start : start + STEP]
        with np.errstate(over="ignore", invalid="ignore"):
            coded = codecs.quants.quantize(step, kind).reshape(-1, encoding.nbytes)
        scales = np.ascontiguousarray(coded[:, : encoding.scales]).view(np.float16)
        overflowed += int((~np.isfinite(scales)).any(axis=1).sum()) * encoding.block
        flat = (scales == 0).all(axis=1)
        vanished += int(np.count_nonzero(step.reshape(-1, encoding.block)[flat]))
        memory[done : done + coded.nbytes] = coded.tobytes()
        done += coded.nbytes
    return Coded(memory[:done], overflowed, vanished)


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


def _kind(codecs: ModuleType, encoding: Encoding) -> object:
    """The type as the package `gguf` names it."""
    return codecs.GGMLQuantizationType[encoding.name.upper()]


def _codecs() -> ModuleType:
    """The package `gguf`, which is optional."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ConfigError("quantised tensors need the package gguf; pip install gguf") from None
