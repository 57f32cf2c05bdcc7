"""The files of a checkpoint as columns of a picture: each file, or groups of neighbours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from reshard.layout import Layout, Slot

MAX_COLUMNS = 64
MAX_LABEL = 8


@dataclass(frozen=True, slots=True)
class Column:
    """Files that are drawn as one: those of one mesh coordinate, or of several neighbours."""

    label: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """All columns of a layout; `unit` is what one of them stands for where it is not a group."""

    unit: str
    units: int
    columns: tuple[Column, ...]
    numbers: Mapping[str, int]
    _known: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict, compare=False)

    def of(self, slot: Slot) -> tuple[int, ...]:
        """The column of each shard of a slot."""
        parts = slot.placement.cut.parts
        # A thousand slots may share one template of a thousand files.
        known = None if slot.spread else self._known.get((slot.file, parts))
        if known is None:
            known = tuple(self.numbers[slot.file_of(shard)] for shard in range(parts))
            if not slot.spread:
                self._known[slot.file, parts] = known
        return known


def columns_of(layout: Layout) -> Columns:
    """The columns: files, or mesh coordinates where these have several files, at most 64.

    A format with one file per parameter and coordinate is read by its coordinates.
    """
    files = layout.files
    if 1 < layout.coordinates < len(files):
        homes = _coordinates(layout)
        by_home: dict[int, list[str]] = {}
        for file in files:
            by_home.setdefault(homes.get(file, 0), []).append(file)
        ordered = sorted(by_home)
        return _grouped("shard", [by_home[home] for home in ordered], list(map(str, ordered)))
    return _grouped("file", [[file] for file in files], labels(files))


def _coordinates(layout: Layout) -> Mapping[str, int]:
    """The mesh coordinate of each file: that of the first shard in it."""
    homes: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for slot in layout.slots:
        parts = slot.placement.cut.parts
        if not slot.spread and (slot.file, parts) in seen:
            continue
        seen.add((slot.file, parts))
        for shard in range(parts):
            homes.setdefault(slot.file_of(shard), slot.coordinate_of(shard))
    return homes


def _grouped(unit: str, members: Sequence[Sequence[str]], names: Sequence[str]) -> Columns:
    """Columns of one unit each, or of as many neighbours as keep them few."""
    step = max(1, -(-len(members) // MAX_COLUMNS))
    columns = []
    for start in range(0, len(members), step):
        group = members[start : start + step]
        label = span(names[start], names[start + len(group) - 1])
        columns.append(Column(label, tuple(file for files in group for file in files)))
    numbers = {file: number for number, column in enumerate(columns) for file in column.files}
    return Columns(unit, len(members), tuple(columns), numbers)


def span(first: object, last: object) -> str:
    """`first-last`, or one of them where they are the same."""
    return str(first) if first == last else f"{first}-{last}"


def _beginning(names: Sequence[str]) -> int:
    """How many characters all names begin with in common."""
    pairs = zip(min(names), max(names), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def labels(files: Sequence[str]) -> list[str]:
    """What tells names apart: each without what all begin and end with; else their numbers."""
    if len(files) < 2:
        return ["0"] * len(files)
    before = _beginning(files)
    after = _beginning([file[before:][::-1] for file in files])
    found = [file[before : len(file) - after] for file in files]
    if max(map(len, found)) > MAX_LABEL or not all(found):
        return [str(number) for number in range(len(files))]
    return found
