"""Elements against elements: as bits where both sides have one kind of them, else as values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reshard.buffers import as_memory
from reshard.encodings import Encoding, decode, encode

# Of which dtypes a wider one holds every value.
WIDENED = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
}
# Elements that are compared together: whole blocks of any encoding. It bounds the copies of them.
STEP = 1 << 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Kind:
    """How a side stores the elements of a parameter; `dtype` is that of their values."""

    dtype: torch.dtype
    encoding: Encoding | None = None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.encoding is None else self.encoding.name


@dataclass(frozen=True, slots=True)
class Unequal:
    """What differs: the first place, the two values there, how many do, and by how much at most.

    `largest` is NaN where only NaNs differ.
    """

    place: int
    values: tuple[str, str]
    count: int
    largest: float


def comparable(one: Kind, other: Kind) -> bool:
    """Whether the values of either are all values of the wider one, so that nothing is cast."""
    wide = _wider(one.dtype, other.dtype)
    return all(kind.dtype == wide or kind.dtype in WIDENED.get(wide, ()) for kind in (one, other))


def unequal(
    ours: torch.Tensor, theirs: torch.Tensor, kinds: tuple[Kind, Kind], *, cast: bool
) -> Unequal | None:
    """Compare flat tensors of as many elements; None where all are equal.

    Elements of one kind must have the same bits. Those of two are compared as values of the wider
    dtype, or with `cast` as what `ours` become when they are stored as the other kind; there any
    NaN equals any other, since a conversion need not keep what is in one.
    """
    alike = kinds[0] == kinds[1]
    if alike and _same_bytes(ours, theirs):
        return None
    found: list[Unequal] = []
    for start in range(0, ours.numel(), STEP):
        pair = ours[start : start + STEP], theirs[start : start + STEP]
        if cast and not alike:
            pair = _stored(pair[0], kinds[1]), pair[1]
        wide = _wider(pair[0].dtype, pair[1].dtype)
        part = _unequal(pair[0].to(wide), pair[1].to(wide), start, exact=alike)
        if part is not None:
            found.append(part)
    return joined(found) if found else None


def joined(parts: Sequence[Unequal]) -> Unequal:
    """Differences of several parts of a tensor together, at the place of the first."""
    numbers = [part.largest for part in parts if not math.isnan(part.largest)]
    return Unequal(
        parts[0].place,
        parts[0].values,
        sum(part.count for part in parts),
        max(numbers, default=math.nan),
    )


def _wider(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max((one, other), key=lambda dtype: dtype.itemsize)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(_BITS[values.dtype.itemsize])


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two flat tensors hold the same bytes, eight at a time: the rule, and thus quick."""
    if not one.numel():
        return True
    word = np.uint64 if one.nbytes % 8 == 0 else np.uint8
    ours, theirs = (np.frombuffer(as_memory(side), word) for side in (one, other))
    return np.array_equal(ours, theirs)


def _stored(values: torch.Tensor, kind: Kind) -> torch.Tensor:
    """What becomes of values that are stored as another kind: cast, or coded and decoded."""
    if kind.encoding is None:
        return values.to(kind.dtype)
    room = values.to(torch.float32, copy=True)
    memory = as_memory(room)
    coded = bytes(encode(kind.encoding, memory).memory)
    memory[len(memory) - len(coded) :] = coded
    decode(kind.encoding, memory)
    return room


def _unequal(
    ours: torch.Tensor, theirs: torch.Tensor, start: int, *, exact: bool
) -> Unequal | None:
    """Compare a step's elements, which are of one dtype; `start` is the place of the first."""
    differ = _bits(ours) != _bits(theirs)
    if not exact:
        differ &= ~(ours.isnan() & theirs.isnan())
    places = differ.nonzero()
    if not len(places):
        return None
    wide = torch.complex128 if ours.is_complex() else torch.float64
    away = (ours[differ].to(wide) - theirs[differ].to(wide)).abs()
    away = away[~away.isnan()]
    first = int(places[0])
    largest = float(away.max()) if len(away) else math.nan
    return Unequal(start + first, _texts(ours[first], theirs[first]), len(places), largest)


def _texts(one: torch.Tensor, other: torch.Tensor) -> tuple[str, str]:
    """Two values such that they are told apart: exactly, with their bits if nothing else does."""
    ours, theirs = repr(one.item()), repr(other.item())
    if ours != theirs:
        return ours, theirs
    return f"{ours} ({_hex(one)})", f"{theirs} ({_hex(other)})"


def _hex(value: torch.Tensor) -> str:
    data = value.reshape(1).view(torch.uint8).tolist()
    return f"0x{bytes(reversed(data)).hex()}"
