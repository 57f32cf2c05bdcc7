"""Layouts of small models in every registered format, for tests that look at all of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from reshard import families, formats
from reshard.encodings import ENCODINGS
from reshard.families.model import ModelConfig
from reshard.formats.options import Chunks, Mesh, Options
from reshard.geometry import Region, whole
from reshard.layout import Layout, Slot
from reshard.placement import Boxes, Cut, Groups, Placement, chunked, uncut
from tests.oracles import models

BUILDERS = {"a": models.model_a, "b": models.model_b, "c": models.model_c}
QWEN2 = {"model_type": "qwen2"}


@cache
def oracle(name: str, *, tied: bool = False, **overrides: Any) -> models.Model:
    """Model A, B or C with its tensors."""
    return BUILDERS[name](tied=tied, **overrides)


def config_of(name: str, *, tied: bool = False, **overrides: Any) -> ModelConfig:
    """The canonical config of model A, B or C."""
    return families.from_hf(oracle(name, tied=tied, **overrides).config, name)


def layout_of(model: ModelConfig, name: str, dtype: torch.dtype | None = None, **chosen) -> Layout:
    """The layout of `model` in the format `name`; `chosen` are axes, and fields of Options."""
    axes = {axis: chosen.pop(axis) for axis in ("tp", "pp", "dp") if axis in chosen}
    options = Options(mesh=Mesh(**axes) if name != "hf" else None, **chosen)
    parameters = families.parameters(model)
    if dtype is not None:
        parameters = [replace(parameter, dtype=dtype) for parameter in parameters]
    return formats.laid_out(formats.named(name), parameters, model, options)


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
        shown = {key: value for key, value in self.chosen.items() if key not in ("files", "chunks")}
        facts = ",".join(f"{key}={value}" for key, value in shown.items())
        return f"{self.format}-{self.label}-{facts}"


def cases() -> list[Case]:
    """Every format on odd, square, tied, padded and interleaved models."""
    found = [
        *_hf_cases(),
        *_meta_cases(),
        *_nanotron_cases(),
        *_fsdp_cases(),
        *_titan_cases(),
        *_statedict_cases(),
        *_gguf_cases(),
    ]
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
    yield Case("hf", config_of("b", **QWEN2), "b-qwen2", {})
    yield Case("hf", config_of("a", model_type="mistral"), "a-mistral", {})
    for tied in (False, True):
        model, label = config_of("b", tied=tied), f"b{'-tied' if tied else ''}"
        yield Case("hf", model, label, {"vocab_multiple": 64, "max_shard_bytes": 1})


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
    for dim in (0, 1):
        for tied in (False, True):
            model, label = config_of("a", tied=tied), f"a{'-tied' if tied else ''}"
            yield Case("meta", model, label, {"tp": 6, "embedding_dim": dim, "vocab_multiple": 96})


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
    for name, tp, pp in (("a", 3, 2), ("a", 1, 1), ("b", 3, 1), ("c", 2, 1)):
        for interleaved in (False, True):
            model, chosen = config_of(name, **QWEN2), {"rope_interleaved": interleaved}
            yield Case("nanotron", model, f"{name}-qwen2", {"tp": tp, "pp": pp, **chosen})


def held(key: str, shape: tuple[int, ...], cut: Cut | Boxes, file: str = "f{}") -> Chunks:
    """A tensor of an existing directory, whose shards lie in files of their own."""
    spread = tuple((file.format(shard), shard) for shard in range(cut.parts))
    return Chunks(key, torch.bfloat16, shape, cut, spread)


def grid(shape: tuple[int, ...], rows: int, columns: int) -> Boxes:
    """Boxes that are cut on two dims, in an order that is neither."""
    down = [chunked(shape[0], rows).box(part, shape) for part in range(rows)]
    across = Cut(1, shape[1], -(-shape[1] // columns), columns)
    boxes = [one & across.box(part, shape) for part in range(columns) for one in reversed(down)]
    return Boxes(box for box in boxes if box is not None)


def _fsdp_cases() -> Iterator[Case]:
    for name in BUILDERS:
        for tied in (False, True):
            model, label = config_of(name, tied=tied), f"{name}{'-tied' if tied else ''}"
            for dp in (1, 3, 5, 64):
                yield Case("fsdp", model, label, {"dp": dp})
            yield Case("fsdp", model, label, {"dp": 2, "wrapper": "none"})
            yield Case("fsdp", model, label, {"dp": 5, "vocab_multiple": 512})
            shapes = {p.name: p.shape for p in families.parameters(model)}
            boxes = {
                name: held(
                    f"model.{name}", shape, grid(shape, 3, 2) if shape[1:] else uncut(shape[0])
                )
                for name, shape in shapes.items()
            }
            yield Case("fsdp", model, f"{label}-2d", {"chunks": boxes})


def _titan_cases() -> Iterator[Case]:
    for name in BUILDERS:
        for tied in (False, True):
            model, label = config_of(name, tied=tied), f"{name}{'-tied' if tied else ''}"
            for dp, tp in ((1, 1), (2, 1), (5, 1), (2, 3), (64, 2)):
                yield Case("titan", model, label, {"dp": dp, "tp": tp})
            yield Case("titan", model, label, {"dp": 3, "rope": "half", "keys": "older"})
            yield Case("titan", model, label, {"dp": 3, "tp": 2, "vocab_multiple": 512})
            for shards in (1, 2, 7):
                yield Case(
                    "titan", model, f"{label}-fused{shards}", {"chunks": fused(model, shards)}
                )
    model = config_of("a")
    yield Case("titan", model, "a-fused", {"chunks": fused(model, 5), "rope": "half"})


def fused(model: ModelConfig, shards: int) -> dict[str, Chunks]:
    """TorchTitan's native fused tensors, cut anywhere by `shards` data-parallel ranks."""
    return as_chunks(titan_oracle(model), shards)


def as_chunks(state: Mapping[str, tuple[int, ...]], shards: int) -> dict[str, Chunks]:
    """Tensors by key and shape, each cut by torch.chunk's rule."""
    return {key: held(key, shape, chunked(shape[0], shards)) for key, shape in state.items()}


def titan_oracle(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes under TorchTitan's names, q, k, v fused and gate, up stacked."""
    hidden, rows = model.hidden, (model.heads + 2 * model.kv_heads) * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (model.vocab, hidden)}
    for layer in range(model.layers):
        prefix = f"layers.{layer}."
        shapes |= {
            f"{prefix}attention.qkv_linear.wqkv.weight": (rows, hidden),
            f"{prefix}attention.wo.weight": (hidden, model.heads * model.head_dim),
            f"{prefix}feed_forward.w13.weight": (2, model.intermediate, hidden),
            f"{prefix}feed_forward.w2.weight": (hidden, model.intermediate),
            f"{prefix}attention_norm.weight": (hidden,),
            f"{prefix}ffn_norm.weight": (hidden,),
        }
    return shapes | {"norm.weight": (hidden,), "lm_head.weight": (model.vocab, hidden)}


def _statedict_cases() -> Iterator[Case]:
    for tied in (False, True):
        model = config_of("a", tied=tied)
        chunks = {
            p.name: held(f"module.{p.name}", p.shape, uncut(1), f"part{number % 2}.bin")
            for number, p in enumerate(families.parameters(model))
        }
        yield Case("statedict", model, f"a{'-tied' if tied else ''}", {"chunks": chunks})


def _gguf_cases() -> Iterator[Case]:
    for name, more in (("a", {}), ("b", {}), ("a", QWEN2), ("b", QWEN2)):
        for tied in (False, True):
            model = config_of(name, tied=tied, **more)
            label = f"{name}{'-qwen2' if more else ''}{'-tied' if tied else ''}"
            yield Case("gguf", model, label, {})
            yield Case("gguf", model, label, {"vocab_multiple": 64})
    blocks = {"hidden_size": 96, "head_dim": 16, "intermediate_size": 160, "vocab_size": 128}
    for tied in (False, True):
        model, label = config_of("c", tied=tied, **blocks), f"c{'-tied' if tied else ''}"
        for encoding in ENCODINGS:
            yield Case("gguf", model, label, {"encoding": encoding})
        yield Case("gguf", model, label, {"encoding": "q4_1", "vocab_multiple": 50})
    biased = config_of("c", attention_bias=True, **blocks)
    scaled = replace(biased, rope_scaling=models.LLAMA3_SCALING)
    yield Case("gguf", scaled, "c-scaled", {"encoding": "q8_0"})


# Layouts that no format has: random placements of random parameters.


@dataclass(frozen=True)
class Bundle:
    """Parameters that some layouts hold in one stored tensor, as others hold each on its own.

    `heights` are the rows of each in every one of `groups` groups, or, where it `stacks` them, of
    all of it. A head has `head` rows (0: there are none).
    """

    groups: int
    heights: tuple[int, ...]
    tail: tuple[int, ...]
    head: int = 0
    stacks: bool = False

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each parameter."""
        return [(self.groups * height, *self.tail) for height in self.heights]


@st.composite
def shapes_of_parameters(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """A small shape and the rows of a head (0: none)."""
    head = draw(st.sampled_from((0, 0, 2, 4, 6)))
    rows = draw(st.integers(1, 4)) * head if head else draw(st.integers(1, 12))
    return (rows, *draw(st.lists(st.integers(1, 6), max_size=2))), head


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    """A single parameter, or a few that may be stored together."""
    shape, head = draw(shapes_of_parameters())
    kind = draw(st.sampled_from(("single", "single", "groups", "stack")))
    if kind == "single":
        return Bundle(1, shape[:1], shape[1:], head)
    if kind == "stack":
        return Bundle(1, shape[:1] * draw(st.integers(1, 3)), shape[1:], head, stacks=True)
    unit = head or 1
    heights = draw(st.lists(st.integers(1, 3).map(unit.__mul__), min_size=2, max_size=3))
    return Bundle(draw(st.integers(1, 3)), tuple(heights), shape[1:], head)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], most: int = 6) -> Boxes:
    """Boxes that straight cuts make of a tensor, in any order; some may be empty."""
    boxes = [whole(shape)]
    for _ in range(draw(st.integers(0, most))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        place = draw(st.integers(box.start[dim], box.stop[dim]))
        boxes += [
            Region(box.start, (*box.stop[:dim], place, *box.stop[dim + 1 :])),
            Region((*box.start[:dim], place, *box.start[dim + 1 :]), box.stop),
        ]
    return Boxes(draw(st.permutations(boxes)))


@st.composite
def cuts(draw: st.DrawFn, space: tuple[int, ...], unit: int, copies: int | None) -> Cut | Boxes:
    """Any way to cut `space`; between units of rows, or anywhere. Boxes have no copies."""
    dim = draw(st.integers(0, len(space) - 1))
    kinds = ("uncut", "even", "padded", "chunked", "boxes", "boxes")
    kind = draw(st.sampled_from(kinds[:-2] if copies not in (None, 1) else kinds))
    if kind == "boxes":
        return draw(tilings(space))
    copies = draw(st.integers(1, 3)) if copies is None else copies
    if kind == "uncut":
        return uncut(space[0], copies)
    if kind == "chunked" and copies == 1:
        return chunked(space[0], draw(st.integers(1, 2 * space[0])))
    size = space[dim]
    unit = draw(st.sampled_from((1, unit))) if dim == 0 else 1
    if kind == "padded":
        step = draw(st.integers(1, size // unit + 1)) * unit
        parts = -(-size // step) + draw(st.integers(0, 2))
    else:
        step = -(-(size // unit) // draw(st.integers(1, 5))) * unit
        parts = -(-size // step)
    return Cut(dim, size, step, parts * copies, copies)


@st.composite
def placements(
    draw: st.DrawFn, shape: tuple[int, ...], *, whole_heads: int = 0, copies: int | None = None
) -> Placement:
    """A random placement of a parameter of `shape`; its heads have `whole_heads` rows (0: none).

    What else there is in the stored tensor belongs to no one.
    """
    kind = draw(st.sampled_from(("plain", "longer", "groups", "stack", "padded")))
    interleaved = whole_heads if draw(st.booleans()) else 0
    unit = whole_heads or 1
    if kind == "stack":
        count = draw(st.integers(1, 3))
        lead, space = draw(st.integers(0, count - 1)), (count, *shape)
        cut = draw(cuts(space, 1, copies))
        return Placement(shape, cut, interleaved=interleaved, lead=lead, whole=space)
    if kind == "groups":
        units = shape[0] // unit
        rows = draw(st.sampled_from([n for n in range(1, units + 1) if units % n == 0])) * unit
        first, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        groups = Groups(rows, first + rows + behind, first)
        space = (shape[0] // rows * groups.stride, *shape[1:])
        cut = draw(cuts(space, unit, copies))
        return Placement(shape, cut, interleaved=interleaved, groups=groups, whole=space)
    space = draw(_longer(shape)) if kind == "longer" or draw(st.booleans()) else None
    cut = draw(cuts(space or shape, unit, copies))
    placement = Placement(shape, cut, interleaved=interleaved, whole=space)
    if kind == "padded" and isinstance(cut, Cut) and cut.dim == 0:
        return _padded(draw, placement, draw(st.integers(0, 3)))
    plain = space is None and isinstance(cut, Cut) and cut.step == 1
    if shape == (1,) and plain and draw(st.booleans()):
        return Placement(shape, uncut(1, cut.copies), stored=())
    return placement


@st.composite
def _longer(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a table with rows that belong to no parameter after those of one."""
    return (shape[0] + draw(st.integers(1, 9)), *shape[1:])


def _padded(draw: st.DrawFn, placement: Placement, before: int) -> Placement:
    """With rows that belong to no parameter around each shard."""
    tail, cut = placement.shape[1:], placement.cut
    assert isinstance(cut, Cut)
    rows = before + cut.step + draw(st.integers(0, 3))
    return replace(placement, stored=(rows, *tail), offset=before * whole(tail).numel)


@st.composite
def together(draw: st.DrawFn, bundle: Bundle, copies: int) -> list[Placement]:
    """Placements of all of a bundle's parameters in one stored tensor, which they fill."""
    unit = bundle.head or 1
    one_after_another = not bundle.stacks
    if one_after_another:
        stride = sum(bundle.heights)
        space = (bundle.groups * stride, *bundle.tail)
    else:
        space = (len(bundle.heights), *bundle.shapes[0])
    cut = draw(cuts(space, unit if one_after_another else 1, copies))
    found = []
    for number, shape in enumerate(bundle.shapes):
        interleaved = bundle.head if draw(st.booleans()) else 0
        placement = Placement(shape, cut, interleaved=interleaved, whole=space)
        if one_after_another:
            groups = Groups(bundle.heights[number], stride, sum(bundle.heights[:number]))
            found.append(replace(placement, groups=groups))
        else:
            found.append(replace(placement, lead=number))
    return found


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """A source and a target that hold the same random parameters."""
    held = draw(st.lists(bundles(), min_size=1, max_size=4))
    held += held[: draw(st.integers(0, 3))]  # alike, so that caches are put to the test
    return draw(layouts(held, "source")), draw(layouts(held, "target"))


@st.composite
def layouts(draw: st.DrawFn, held: list[Bundle], name: str, *, gaps: bool = True) -> Layout:
    """A random layout; without `gaps`, only the end of a stored tensor belongs to no parameter."""
    tp, pp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    slots: list[Slot] = []
    known: dict[object, list[list[Placement]]] = {}
    copies: dict[Bundle, int] = {}  # the same in all places of a parameter
    number = 0
    for bundle in held:
        dtype = draw(st.sampled_from((torch.bfloat16, torch.float32)))
        names = [f"p{number + member}" for member in range(len(bundle.heights))]
        number += len(names)
        for place in range(draw(st.sampled_from((1, 1, 1, 2)))):
            if (bundle, place) not in known:
                copies.setdefault(bundle, draw(st.sampled_from((1, 1, 2, 3))))
                known[bundle, place] = draw(_placed(bundle, copies[bundle], gaps=gaps))
            members = iter(names)
            for tensor in known[bundle, place]:
                key = f"{name}-{len(slots)}-{place}"
                slot = draw(_slots(tensor[0], key, dtype, tp, pp))
                slots += [
                    replace(slot, parameter=next(members), placement=member) for member in tensor
                ]
    furthest = max(
        slot.coordinate_of(shard) for slot in slots for shard in range(slot.placement.cut.parts)
    )
    container = "dcpfile" if any(slot.boxed for slot in slots) else "safetensors"
    order = draw(st.permutations(range(len(slots)))) if draw(st.booleans()) else range(len(slots))
    return Layout(name, container, furthest + 1, tuple(slots[place] for place in order))


@st.composite
def _placed(draw: st.DrawFn, bundle: Bundle, copies: int, *, gaps: bool) -> list[list[Placement]]:
    """The placements of a bundle's parameters by stored tensor: one for all, or one for each."""
    if (len(bundle.heights) > 1 or bundle.stacks) and draw(st.booleans()):
        return [draw(together(bundle, copies))]
    found = []
    for shape in bundle.shapes:
        if gaps:
            one = draw(placements(shape, whole_heads=bundle.head, copies=copies))
        else:
            space = draw(_longer(shape)) if draw(st.booleans()) else None
            cut = draw(cuts(space or shape, bundle.head or 1, copies))
            interleaved = bundle.head if draw(st.booleans()) else 0
            one = Placement(shape, cut, interleaved=interleaved, whole=space)
            if isinstance(cut, Cut) and cut.dim == 0 and draw(st.booleans()):
                one = _padded(draw, one, 0)
        found.append([one])
    return found


@st.composite
def _slots(
    draw: st.DrawFn, placement: Placement, key: str, dtype: torch.dtype, tp: int, pp: int
) -> Slot:
    """A place for the shards of a placement: files by a template or each by its name."""
    boxed = placement.stored in (None, ()) and draw(st.booleans())
    coordinate = draw(st.integers(0, pp - 1)) * tp
    slot = Slot("", placement, f"{key}-{{shard}}", key, dtype, coordinate, boxed=boxed)
    if draw(st.booleans()):
        return slot
    parts = range(placement.cut.parts)
    files = [f"{key}-{shard} {{odd}}" for shard in parts]
    if boxed and placement.cut.copies == 1:  # boxes of a tensor may share a file, and with others
        files = [f"shared-{draw(st.integers(0, 2))}" for _ in parts]
    return replace(slot, spread=tuple((file, draw(st.integers(0, tp * pp - 1))) for file in files))


def elements(region: Region) -> Iterator[tuple[int, ...]]:
    """Every index of a box."""
    if not region.start:
        yield ()
        return
    for first in range(region.start[0], region.stop[0]):
        for rest in elements(Region(region.start[1:], region.stop[1:])):
            yield (first, *rest)
