"""Layouts of small models in every registered format, for tests that look at all of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from reshard import families, formats
from reshard.families.model import ModelConfig, from_hf
from reshard.formats.options import Mesh, Options
from reshard.geometry import Cut, Placement, Region, uncut
from reshard.layout import Layout, Slot
from tests.oracles import models

BUILDERS = {"a": models.model_a, "b": models.model_b, "c": models.model_c}


@cache
def oracle(name: str, *, tied: bool = False, **overrides: Any) -> models.Model:
    """Model A, B or C with its tensors."""
    return BUILDERS[name](tied=tied, **overrides)


def config_of(name: str, *, tied: bool = False, **overrides: Any) -> ModelConfig:
    """The canonical config of model A, B or C."""
    return from_hf(oracle(name, tied=tied, **overrides).config, name)


def layout_of(model: ModelConfig, name: str, dtype: torch.dtype | None = None, **chosen) -> Layout:
    """The layout of `model` in the format `name`; `chosen` are axes, and fields of Options."""
    axes = {axis: chosen.pop(axis) for axis in ("tp", "pp", "dp") if axis in chosen}
    options = Options(mesh=Mesh(**axes) if name != "hf" else None, **chosen)
    parameters = families.parameters(model)
    if dtype is not None:
        parameters = [replace(parameter, dtype=dtype) for parameter in parameters]
    return formats.named(name).layout(parameters, model, options)


@dataclass(frozen=True)
class Case:
    """A model and a topology of it."""

    format: str
    model: ModelConfig
    label: str
    chosen: dict[str, Any]

    def layout(self) -> Layout:
        """Its layout, made anew."""
        return layout_of(self.model, self.format, **self.chosen)

    def __str__(self) -> str:
        facts = ",".join(f"{key}={value}" for key, value in self.chosen.items() if key != "files")
        return f"{self.format}-{self.label}-{facts}"


def cases() -> list[Case]:
    """Every format on odd, square, tied, padded and interleaved models."""
    found = [*_hf_cases(), *_meta_cases(), *_nanotron_cases()]
    assert {case.format for case in found} == set(formats.formats()), "a format without a case"
    return found


def _hf_cases() -> Iterator[Case]:
    for name in BUILDERS:
        for tied in (False, True):
            model, label = config_of(name, tied=tied), f"{name}{'-tied' if tied else ''}"
            yield Case("hf", model, label, {})
            yield Case("hf", model, label, {"max_shard_bytes": 20_000})
            yield Case("hf", model, label, {"max_shard_bytes": 1})
    model = config_of("a", tied=True)
    names = [parameter.name for parameter in families.parameters(model)]
    files = {name: f"part{number % 3}.safetensors" for number, name in enumerate(names)}
    both = files | {"lm_head.weight": "a {strange} name.safetensors"}
    yield Case("hf", model, "a-tied-stored-twice", {"files": both})
    biased = config_of("b", attention_bias=True, mlp_bias=True)
    yield Case("hf", biased, "b-biased", {"max_shard_bytes": 20_000})


def _meta_cases() -> Iterator[Case]:
    sizes = {"a": (1, 2, 3, 6), "b": (1, 3), "c": (1, 2, 3, 6)}
    for name, counts in sizes.items():
        for tied in (False, True):
            model, label = config_of(name, tied=tied), f"{name}{'-tied' if tied else ''}"
            for tp in counts:
                yield Case("meta", model, label, {"tp": tp})
            yield Case("meta", model, label, {"tp": counts[-1], "embedding_dim": 1})
    copied = config_of("a", num_key_value_heads=2)
    yield Case("meta", copied, "a-kv2", {"tp": 6})
    yield Case("meta", copied, "a-kv2", {"tp": 2})
    many = config_of("a", num_key_value_heads=3, intermediate_size=228, vocab_size=228)
    yield Case("meta", many, "a-kv3", {"tp": 12, "embedding_dim": 0})
    old = config_of("c", rope_theta=10000.0)
    yield Case("meta", old, "c-old", {"tp": 3})


def _nanotron_cases() -> Iterator[Case]:
    meshes = {
        "a": ((1, 1), (2, 1), (3, 2), (6, 3), (2, 5), (1, 7)),
        "b": ((1, 1), (3, 2), (1, 5)),
        "c": ((1, 2), (2, 1), (3, 3), (6, 1)),
    }
    for name, axes in meshes.items():
        for tied in (False, True):
            model, label = config_of(name, tied=tied), f"{name}{'-tied' if tied else ''}"
            for tp, pp in axes:
                yield Case("nanotron", model, label, {"tp": tp, "pp": pp})
            tp, pp = axes[-2]
            interleaved = {"tp": tp, "pp": pp, "dp": 2, "rope_interleaved": True}
            yield Case("nanotron", model, label, interleaved)
            yield Case("nanotron", model, label, {"tp": tp, "pp": pp, "vocab_multiple": 64})
            yield Case("nanotron", model, label, {"tp": tp, "pp": pp, "vocab_multiple": 1})


# Layouts that no format has: random placements of random parameters.


@st.composite
def placements(draw: st.DrawFn, shape: tuple[int, ...], *, whole_heads: int = 0) -> Placement:
    """A random placement of a parameter of `shape`; its heads have `whole_heads` rows (0: none)."""
    dim = draw(st.integers(0, len(shape) - 1))
    size = shape[dim]
    copies = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(("uncut", "even", "uneven", "padded")))
    unit = whole_heads if dim == 0 and whole_heads else 1
    if kind == "uncut":
        cut = uncut(shape[0], copies)
        dim = 0
    elif kind == "padded":
        step = draw(st.integers(1, size // unit + 1)) * unit
        cut = Cut(dim, size, step, (-(-size // step) + draw(st.integers(0, 2))) * copies, copies)
    else:
        parts = draw(st.integers(1, 5))
        step = -(-(size // unit) // parts) * unit
        cut = Cut(dim, size, step, -(-size // step) * copies, copies)
    interleaved = whole_heads if draw(st.booleans()) else 0
    if dim == 0 and draw(st.booleans()):
        row = Region((0,) * len(shape[1:]), shape[1:]).numel
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        stored = (before + cut.step + after, *shape[1:])
        return Placement(shape, cut, stored, before * row, interleaved)
    return Placement(shape, cut, None, 0, interleaved)


@st.composite
def shapes_of_parameters(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """A small shape and the rows of a head (0: none)."""
    head = draw(st.sampled_from((0, 0, 2, 4, 6)))
    rows = draw(st.integers(1, 4)) * head if head else draw(st.integers(1, 12))
    return (rows, *draw(st.lists(st.integers(1, 6), max_size=2))), head


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """A source and a target that hold the same random parameters."""
    parameters = draw(st.lists(shapes_of_parameters(), min_size=1, max_size=5))
    parameters += parameters[: draw(st.integers(0, 3))]  # alike, so that caches are put to the test
    return draw(_layouts(parameters, "source")), draw(_layouts(parameters, "target"))


@st.composite
def _layouts(draw: st.DrawFn, parameters: list[tuple[tuple[int, ...], int]], name: str) -> Layout:
    tp, pp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dtypes = st.sampled_from((torch.bfloat16, torch.float32))
    slots, furthest = [], 1
    known: dict[object, Placement] = {}
    for number, (shape, head) in enumerate(parameters):
        places, dtype = draw(st.sampled_from((1, 1, 1, 2))), draw(dtypes)
        for place in range(places):
            placement = known.get((shape, head, place))
            if placement is None:
                placement = draw(placements(shape, whole_heads=head))
                known[shape, head, place] = placement
            coordinate = draw(st.integers(0, pp - 1)) * tp
            furthest = max(furthest, coordinate + placement.cut.parts)
            file = f"{name}-{number}-{place}-{{shard}}"
            slots.append(Slot(f"p{number}", placement, file, "key", dtype, coordinate))
    return Layout(name, "safetensors", furthest, tuple(slots))


def elements(region: Region) -> Iterator[tuple[int, ...]]:
    """Every index of a box."""
    if not region.start:
        yield ()
        return
    for first in range(region.start[0], region.stop[0]):
        for rest in elements(Region(region.start[1:], region.stop[1:])):
            yield (first, *rest)
