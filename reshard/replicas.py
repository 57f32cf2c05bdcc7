"""What a source holds more than once: whether the copies agree, and by how much they do not."""

from collections.abc import Sequence
from pathlib import Path

import torch

from reshard import containers
from reshard.checks import Check
from reshard.errors import CheckpointError
from reshard.geometry import Region, row_major
from reshard.layout import StoredTensor
from reshard.packing import copies, packed, plain
from reshard.storage import read_bytes

Pair = tuple[Check, Check]


def compare(checks: Sequence[Check], root: Path, container: str, *, strict: bool) -> list[str]:
    """Warnings on copies that differ where they may; where they must not, a CheckpointError.

    `strict` refuses any difference. Differences are measured by reading the differing tensors
    again, where this rank sees their files.
    """
    pairs = differing(checks)
    forbidden = [pair for pair in pairs if strict or pair[1].stored.slot.strict]
    if forbidden:
        raise CheckpointError(_refusal(forbidden, strict=strict))
    if not pairs:
        return []
    tensors = {(copy.stored.file, copy.stored.key) for _, copy in pairs}
    measured = [
        found
        for first, copy in pairs
        if (found := difference(root, container, first, copy)) is not None
    ]
    largest = f"{max(measured):g}" if measured else "not measured, in files of other machines"
    names = {copy.stored.key for _, copy in pairs}
    first = pairs[0][1].stored
    return [
        f"{len(tensors)} copies of {len(names)} replicated tensors differ from the first "
        f"coordinate's, which is taken; largest difference {largest}, first `{first.key}` in "
        f"`{first.file}` (src.replicas=strict refuses this)"
    ]


def differing(checks: Sequence[Check]) -> list[Pair]:
    """Pairs (first, further place) of a box whose checksums differ, in the order of the checks."""
    table: dict[tuple[str, Region, int], dict[int, Check]] = {}
    for check in checks:
        table.setdefault((check.parameter, check.region, check.of), {})[check.copy] = check
    found = []
    for (_, _, place), members in table.items():
        if members[0].crc != members[place].crc:
            found.append((members[0], members[place]))
    return found


def _refusal(pairs: Sequence[Pair], *, strict: bool) -> str:
    """One line on copies that differ and must not."""
    copy, first = pairs[0][1].stored, pairs[0][0].stored
    what = (
        f"`{copy.file}`: tensor `{copy.key}` differs from its copy `{first.key}` in `{first.file}`"
    )
    if copy.slot.parameter != first.slot.parameter or copy.key != first.key:
        return f"{what}, but the model config says they are tied; src.tied=false keeps both"
    remedy = (
        "src.replicas=first takes the first coordinate's"
        if strict
        else "the heads are stored more than once and must agree"
    )
    return f"{what} ({len(pairs)} such differences); {remedy}"


def difference(root: Path, container: str, first: Check, copy: Check) -> float | None:
    """The largest absolute difference between two copies of a box; NaN where either holds one.

    None where one of the two is in a file on another machine.
    """
    if any(containers.absent(root / check.stored.file) is not None for check in (first, copy)):
        return None
    one, other = (_values(root, container, check.stored, check.region) for check in (first, copy))
    return float((one - other).abs().max())


def _values(root: Path, container: str, stored: StoredTensor, box: Region) -> torch.Tensor:
    """The values of a box of a stored tensor, as float32."""
    entry = containers.index(container, root, stored.file).entries[stored.key]
    odd = entry.strides if entry.strides != row_major(entry.shape) else None
    part = packed(stored.slot.placement, stored.shard, box, odd)
    size = entry.dtype.itemsize
    data = b"".join(
        read_bytes(root / stored.file, entry.offset + start * size, count * size)
        for start, count in part.runs
    )
    flat = torch.frombuffer(bytearray(data), dtype=entry.dtype)
    values = torch.empty(box.numel, dtype=torch.float32)
    for move in copies(part, plain(box), box):
        move.run(flat, 0, values, 0)
    return values
