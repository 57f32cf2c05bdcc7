"""The parameters of a model as rows of a picture: layers that lie alike are drawn once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from reshard.pictures.columns import Columns, span
from reshard.plan import Plan

# So many rows still have room for a name each; with more, a row is a whole layer, or several.
MAX_NAMED, MAX_BANDS = 40, 96
NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class Band:
    """Parameters that are drawn as one row: `group` says of which layers, `label` which of them."""

    group: str
    label: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Parameters with one number in their names, or a single one without any.

    `word` is what their stack is called.
    """

    stem: str
    number: int | None
    names: tuple[str, ...]
    word: str


def bands_of(plan: Plan, source: Columns, target: Columns) -> tuple[Band, ...]:
    """All parameters in rows, in the order of their layers."""
    runs = list(_runs(plan, source, target))
    named = [band for run in runs for band in _by_role(run)]
    if len(named) <= MAX_NAMED:
        return tuple(named)
    step = -(-len(runs) // MAX_BANDS)
    stacks = [list(members) for _, members in groupby(runs, _stack)]
    return tuple(
        _together(stack[start : start + step])
        for stack in stacks
        for start in range(0, len(stack), step)
    )


def _stack(run: Sequence[_Layer]) -> str | None:
    """Which stack of layers a run is of; None for parameters beside them."""
    return run[0].stem if run[0].number is not None else None


def _layers(names: Sequence[str]) -> list[_Layer]:
    """Parameters by layer; the first number in a name is taken for its layer's."""
    found: dict[tuple[str, int | None], list[str]] = {}
    for name in names:
        match = NUMBER.search(name)
        key = (name[: match.start()], int(match[1])) if match else (name, None)
        found.setdefault(key, []).append(name)
    first: dict[str, int] = {}
    for place, (stem, _) in enumerate(found):
        first.setdefault(stem, place)
    ordered = sorted(found, key=lambda key: (first[key[0]], key[1] or 0))
    several = len({stem for stem, number in found if number is not None}) > 1
    return [
        _Layer(stem, number, tuple(found[stem, number]), stem if several else "layers")
        for stem, number in ordered
    ]


def _runs(plan: Plan, source: Columns, target: Columns) -> Iterator[list[_Layer]]:
    """Consecutive layers of which every parameter lies in the same columns on both sides.

    In direct mode ranks have one stretch of the parameters each, and no two layers are alike.
    """

    def look(layer: _Layer) -> object:
        if plan.exchange == "direct" and plan.world > 1:
            return layer
        return layer.stem, [
            (
                _role(name),
                [source.of(slot) for slot in plan.source.places[name]],
                [target.of(slot) for slot in plan.target.places[name]],
            )
            for name in layer.names
        ]

    for _, members in groupby(_layers(plan.names), look):
        yield list(members)


def _role(name: str) -> str:
    """A name without the numbers of its layer and of experts."""
    return NUMBER.sub(".#.", name)


def _short(role: str) -> str:
    return role.rsplit(".#.", 1)[-1].removesuffix(".weight")


def _by_role(run: Sequence[_Layer]) -> list[Band]:
    """A row for each kind of parameter in layers that lie alike."""
    roles: dict[str, list[str]] = {}
    for layer in run:
        for name in layer.names:
            roles.setdefault(_role(name), []).append(name)
    group = _title(run)
    if run[0].number is None:
        return [Band("", run[0].stem.removesuffix(".weight"), run[0].names)]
    return [Band(group, _short(role), tuple(names)) for role, names in roles.items()]


def _together(runs: Sequence[Sequence[_Layer]]) -> Band:
    """One row for everything in some runs."""
    layers = [layer for run in runs for layer in run]
    names = tuple(name for layer in layers for name in layer.names)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Band("", _title(layers) or layers[0].stem.removesuffix(".weight") + more, names)


def _title(layers: Sequence[_Layer]) -> str:
    """Which layers these are, by their numbers; nothing where none has one."""
    numbered = [layer for layer in layers if layer.number is not None]
    if not numbered:
        return ""
    word = numbered[0].word if len(numbered) > 1 else numbered[0].word.removesuffix("s")
    return f"{word} {span(numbered[0].number, numbered[-1].number)}"


def band_numbers(bands: Sequence[Band]) -> Mapping[str, int]:
    """The row of each parameter."""
    return {name: number for number, band in enumerate(bands) for name in band.names}
