"""What a cast loses: values that become infinite, and values that become zero. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from reshard.buffers import Buffer, Part
from reshard.encodings import Coded

# Elements that are looked at together, which bounds the memory of the copies made of them.
STEP = 1 << 17


@dataclass(slots=True)
class Losses:
    """Counts of values; `overflowed` by parameter, and `vanished` likewise."""

    overflowed: dict[str, int] = field(default_factory=dict)
    vanished: dict[str, int] = field(default_factory=dict)

    def count(self, part: Part, buffer: Buffer, dtype: torch.dtype) -> None:
        """Count what a part that was read loses when it becomes `dtype`."""
        stored = part.stored
        if not narrows(stored.dtype, dtype):
            return
        values = buffer.view(stored.dtype)[part.element() :][: stored.region.numel]
        overflowed, vanished = lost(values, dtype)
        _add(self.overflowed, stored.slot.parameter, overflowed)
        _add(self.vanished, stored.slot.parameter, vanished)

    def count_coded(self, parameter: str, coded: Coded) -> None:
        """Count what was lost by coding a run of a parameter."""
        _add(self.overflowed, parameter, coded.overflowed)
        _add(self.vanished, parameter, coded.vanished)


def _add(counts: dict[str, int], parameter: str, count: int) -> None:
    if count:
        counts[parameter] = counts.get(parameter, 0) + count


@lru_cache(maxsize=64)
def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a finite value of `source` may be too large or too small for `target`."""
    if source == target or not (source.is_floating_point and target.is_floating_point):
        return False
    ours, theirs = torch.finfo(source), torch.finfo(target)
    return theirs.max < ours.max or theirs.smallest_normal * theirs.eps > (
        ours.smallest_normal * ours.eps
    )


def lost(values: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """How many of `values` become infinite, and how many zero, as `dtype`."""
    overflowed = vanished = 0
    for start in range(0, values.numel(), STEP):
        before = values[start : start + STEP]
        after = before.to(dtype)
        overflowed += int(after.isinf().sum()) - int(before.isinf().sum())
        vanished += int(before.count_nonzero()) - int(after.count_nonzero())
    return overflowed, vanished


def summary(parts: Iterable[Losses]) -> list[str]:
    """One line on what all ranks lost, if they lost anything."""
    overflowed: dict[str, int] = {}
    vanished: dict[str, int] = {}
    for part in parts:
        for total, counts in ((overflowed, part.overflowed), (vanished, part.vanished)):
            for parameter, count in counts.items():
                _add(total, parameter, count)
    said = [
        f"{sum(counts.values()):,} values {what} in {len(counts)} tensors, "
        f"most in `{max(sorted(counts), key=lambda name: counts[name])}`"
        for what, counts in (("overflow to infinity", overflowed), ("become zero", vanished))
        if counts
    ]
    return [f"the cast loses: {'; '.join(said)}"] if said else []
