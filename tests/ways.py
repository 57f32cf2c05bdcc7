"""Ways between the real formats at random: small models of odd sizes, meshes, ranks and nodes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from unittest import mock

import torch
from hypothesis import strategies as st

from reshard import blocks, families
from reshard.families.model import ModelConfig
from reshard.layout import Layout
from reshard.placement import uncut
from reshard.plan import Plan
from tests.layouts import fused, grid, held, layout_of

Ranks = tuple[int, ...]
Sizes = Mapping[str, int]

MODES = (("collective", "nearest"), ("collective", "owner"), ("direct", "nearest"))
CODECS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
# Of a source, what other tools leave beside what this program makes.
KINDS = {"fsdp": "grid", "titan": "fused", "hf": "twice"}
WIDE, NARROW = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Side:
    """A format with its options; `kind` names what another tool has made of it."""

    format: str
    options: Mapping[str, int | str | None]
    kind: str = ""

    def parts(self, *formats: str) -> int:
        """In how many parts the heads are cut, where this is one of some formats."""
        parts = self.options.get("tp", 1) if self.format in formats else 1
        assert isinstance(parts, int)
        return parts

    def layout(self, model: ModelConfig, dtype: torch.dtype) -> Layout:
        """The layout of a model."""
        shapes = {p.name: p.shape for p in families.parameters(model)}
        if self.kind == "grid":
            cuts = {name: grid(s, 3, 2) if s[1:] else uncut(s[0]) for name, s in shapes.items()}
            boxes = {name: held(f"model.{name}", s, cuts[name]) for name, s in shapes.items()}
            return layout_of(model, self.format, chunks=boxes)
        if self.kind == "fused":
            return layout_of(model, self.format, chunks=fused(model, 5))
        if self.kind == "twice":
            files = {name: f"part{n % 3}.safetensors" for n, name in enumerate(shapes)}
            files["lm_head.weight"] = "another.safetensors"
            return layout_of(model, self.format, dtype, files=files)
        return layout_of(model, self.format, dtype, **self.options)


@dataclass(frozen=True)
class Way:
    """From one topology to another, on `world` ranks, in blocks of `block` bytes or one row.

    The ranks live on `nodes`; file `n` of the source is on node `seen[n % len(seen)]`, or on all
    where that is none.
    """

    sizes: Sizes
    source: Side
    target: Side
    world: int
    exchange: str = "collective"
    writers: str = "nearest"
    block: int = 4096
    model_type: str = "llama"
    dtypes: tuple[torch.dtype, torch.dtype] = (NARROW, NARROW)
    tied: bool = False
    nodes: int = 1
    seen: Ranks = (0,)

    def homes(self) -> list[Ranks]:
        """The ranks of each node."""
        edges = [self.world * node // self.nodes for node in range(self.nodes + 1)]
        return [tuple(range(*edge)) for edge in pairwise(edges)]

    def local(self, files: tuple[str, ...]) -> dict[str, Ranks]:
        """The files that not all ranks see."""
        homes = self.homes() if self.nodes > 1 else []
        seen = {file: self.seen[n % len(self.seen)] for n, file in enumerate(files)}
        return {file: homes[node] for file, node in seen.items() if node < len(homes)}

    def plan(self, **more: object) -> Plan:
        """The plan, with its block size decided."""
        model = ModelConfig(self.model_type, tied=self.tied, **self.sizes)
        source = self.source.layout(model, self.dtypes[0])
        target = self.target.layout(model, self.dtypes[1])
        known = {"local": self.local(source.files), **more}
        plan = Plan(source, target, self.world, self.exchange, self.writers, **known)
        with mock.patch.object(blocks, "MIN_BLOCK_BYTES", self.block):
            assert plan.block_bytes  # cached from here on
        return plan


@st.composite
def sides(draw: st.DrawFn, model_type: str, *, source: bool) -> Side:
    """A format that holds such models, on a small mesh."""
    names = ["nanotron", "nanotron", "hf", "fsdp", "gguf"]
    names += ["meta", "meta", "meta", "titan", "titan"] if model_type == "llama" else []
    name = draw(st.sampled_from(names))
    if source and name in KINDS and draw(st.booleans()):
        return Side(name, {}, KINDS[name])
    options: dict[str, int | str | None] = {}
    if name == "meta":
        tp = draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12)))
        options = {"tp": tp, "vocab_multiple": tp, "embedding_dim": draw(st.integers(0, 1))}
    if name == "nanotron":
        options = {"tp": draw(st.sampled_from((1, 2, 3, 4, 6))), "pp": draw(st.integers(1, 3))}
        options |= {"vocab_multiple": 1, "rope_interleaved": draw(st.booleans())}
    if name in ("fsdp", "titan"):
        options["dp"] = draw(st.sampled_from((1, 2, 3, 5, 8, 16)))
    if name == "titan":
        options["tp"] = draw(st.integers(1, 3))
    if name == "hf":
        options["max_shard_bytes"] = draw(st.sampled_from((1, 5_000, 20_000, 1 << 30)))
    if name == "gguf" and not source:
        options["encoding"] = draw(st.sampled_from((None, *CODECS)))
    return Side(name, options)


@st.composite
def sizes_for(draw: st.DrawFn, source: Side, target: Side) -> Sizes:
    """The sizes of a model that both sides can hold; as odd as that allows."""
    both = source, target
    meta = [side.parts("meta") for side in both]
    exact = math.lcm(*(side.parts("nanotron") for side in both))
    unit = math.lcm(exact, *meta)
    legal = [
        heads
        for heads in range(exact, unit + 4 * exact, exact)
        if all(heads % parts == 0 or parts % heads == 0 for parts in meta)
    ]
    kv_heads = draw(st.sampled_from(legal[:4]))
    heads = math.lcm(kv_heads, unit)
    heads *= draw(st.integers(1, 2)) if heads <= 6 else 1
    code = 32 if target.options.get("encoding") else 1
    head_dim = 2 * draw(st.integers(1, 3)) if code == 1 else max(2, 32 // math.gcd(32, heads))
    plain = any(side.format in ("meta", "nanotron") for side in both) or code > 1
    ffn = math.lcm(unit, code)
    return {
        "hidden": heads * head_dim if plain else draw(st.integers(1, 30)),
        "layers": draw(st.integers(1, 2)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": ffn * draw(st.integers(1, max(1, 30 // ffn))),
        "vocab": draw(st.integers(1, 50)),
    }


@st.composite
def ways(draw: st.DrawFn, *, mode: str = "", anywhere: bool = True) -> Way:
    """Any way between two formats; with files that not all ranks see, if they may be `anywhere`."""
    model_type = draw(st.sampled_from(("llama", "llama", "llama", "qwen2")))
    source, target = draw(sides(model_type, source=True)), draw(sides(model_type, source=False))
    world = draw(st.one_of(st.integers(1, 12), st.integers(1, 12), st.sampled_from((24, 64))))
    way = Way(
        draw(sizes_for(source, target)),
        source,
        target,
        world,
        *draw(st.sampled_from([known for known in MODES if mode in ("", *known)])),
        block=draw(st.sampled_from((1, 256, 1024, 4096))),
        model_type=model_type,
        dtypes=draw(st.tuples(*[st.sampled_from((NARROW, WIDE))] * 2)),
        tied=source.kind == "twice" or (source.kind == "" and draw(st.booleans())),
    )
    if way.exchange == "direct" or world == 1 or not anywhere or draw(st.booleans()):
        return way
    nodes = draw(st.integers(2, min(4, world)))
    seen = draw(st.lists(st.integers(0, nodes), min_size=1, max_size=5))
    return replace(way, nodes=nodes, seen=tuple(seen))


@st.composite
def deep_ways(draw: st.DrawFn) -> Way:
    """Between layouts of equal shards, of which one side's are parts of the other's; many layers.

    The ranks are a multiple of the source's coordinates.
    """
    one, times = draw(st.sampled_from((1, 2, 3, 4, 8))), draw(st.sampled_from((1, 2, 4)))
    counts = draw(st.permutations((one, one * times)))
    pair = [draw(equal_sides(count)) for count in counts]
    unit = one * times
    sizes = {
        "heads": unit,
        "kv_heads": unit,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "layers": draw(st.integers(8, 24)),
        "intermediate": unit * draw(st.integers(1, 60)),
        "vocab": unit * draw(st.integers(1, 60)),
    }
    sizes["hidden"] = unit * sizes["head_dim"]
    world = counts[0] * draw(st.integers(1, 16))
    return Way(
        sizes, *pair, world, *draw(st.sampled_from(MODES)), block=draw(st.sampled_from((64, 512)))
    )


@st.composite
def equal_sides(draw: st.DrawFn, count: int) -> Side:
    """A format of so many shards, or of whole tensors."""
    name = draw(st.sampled_from(("meta", "nanotron", "fsdp") if count > 1 else ("hf", "gguf")))
    axis = {"meta": "tp", "nanotron": "tp", "fsdp": "dp"}.get(name)
    return Side(name, {axis: count} if axis else {})
