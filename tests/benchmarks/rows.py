"""What is measured: each row is a copy, perhaps a peer, and ours, in turn on the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

LAUNCH = ("{python}", "{root}/launch/torchrun", "--nproc")
PEER = "tests.benchmarks.peers."
USUAL, FEW = 5, 3  # pairs; few where there is no bound
COPIED = 'cp -r "$1" "$2" && sync'


@dataclass(frozen=True, slots=True)
class Step:
    """A command; words may hold {source}, {out}, {report}, {python}, {peers} and {root}.

    Args:
        counted: stages of its report that are compared with the copy; none: all of its life.
        checked: whether `verify SOURCE OUT` has to find what it made equal.
        cost: roughly, seconds to start and per GB, from which it is told how long all will take.
        disk: what it leaves or needs beside the source, in sizes of the model.
        memory: what it holds, in sizes of the model.
    """

    name: str
    words: tuple[str, ...]
    counted: tuple[str, ...] = ()
    checked: bool = True
    cost: tuple[float, float] = (0.0, 0.8)
    disk: float = 1.0
    memory: float = 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """What a row is to reach: `times` the copy, `faster` than the peer, a share of its `memory`."""

    what: str
    value: float

    def met(self, found: float) -> bool:
        """Whether a figure reaches it."""
        return found >= self.value if self.what == "faster" else found <= self.value

    def __str__(self) -> str:
        if self.what == "faster":
            return f"≥ {self.value:g} × faster"
        return f"≤ {self.value:g} × {'the copy' if self.what == 'times' else 'its memory'}"


@dataclass(frozen=True, slots=True)
class Row:
    """Steps that are taken in turn, ours last, and what is expected.

    `compared` is the figure of a sample in which ours is set against the peer.
    """

    name: str
    model: str
    source: str
    steps: tuple[Step, ...]
    bounds: tuple[Bound, ...] = ()
    compared: str = "total"
    cold: bool = False
    usual: bool = True
    pairs: int = USUAL

    @property
    def ours(self) -> Step:
        """Our step."""
        return self.steps[-1]

    @property
    def peer(self) -> Step | None:
        """The step of another tool."""
        return self.steps[1] if len(self.steps) > 2 else None


COPY = Step("copy", ("sh", "-c", COPIED, "sh", "{source}", "{out}"), checked=False)
MODES = {
    "direct": ("engine.exchange=direct",),
    "collective": ("engine.exchange=collective",),
    "owner": ("engine.exchange=collective", "engine.writers=owner"),
}
ROUTES = (("meta8", "tp4"), ("hf", "meta8"), ("meta8", "hf"), ("fsdp8", "hf"))
WORLDS = (2, 8)


def ours(source: str, target: str, world: int, *options: str) -> Step:
    """Our own command on `world` ranks."""
    words = (*LAUNCH, str(world), "-m", "reshard", "--src", spec(source), "--dst", target)
    paths = ("src.path={source}", "dst.path={out}", "--report", "{report}")
    cost = (3.0 + 0.75 * world, 1.0)
    return Step("ours", (*words, *paths, *options), ("move", "commit"), cost=cost)


def spec(source: str) -> str:
    """The topology that a source is read as."""
    return "dcp" if source.startswith(("fsdp", "flipped")) else source


def _on_ranks(
    name: str, module: str, world: int, stages: tuple[str, ...], disk: float = 1.0
) -> Step:
    words = (*LAUNCH, str(world), "-m", f"{PEER}{module}", "{source}", "{out}", "{report}")
    cost = (3.0 + world, 3.0)
    return Step(name, words, stages, cost=cost, disk=disk, memory=1.2)


def _routes() -> list[Row]:
    """All modes on the routes of the contract, warm and cold; usually cold for a few only."""
    rows = []
    for cold, (source, target), world in product((False, True), ROUTES, WORLDS):
        for mode, options in MODES.items():
            name = f"{source}-{target}-{world}-{mode}-{'cold' if cold else 'warm'}"
            bound = Bound("times", 2.5 if mode == "owner" else 1.5)
            steps = (COPY, ours(source, target, world, *options))
            row = Row(name, "1b", source, steps, () if cold else (bound,), cold=cold)
            usual = world == 2 or mode != "owner" or target == "tp4"
            if cold:
                usual = source == "meta8" and world == 2 and mode == "collective"
            rows.append(replace(row, usual=usual, pairs=FEW if cold else USUAL))
    return rows


def _converter(model: str, pairs: int) -> Row:
    words = ("{peers}", "-m", f"{PEER}converter", "{source}", "{out}", "{report}")
    peer = Step("transformers", words, ("convert",), cost=(8.0, 7.0), disk=2.0, memory=1.6)
    bounds = (Bound("faster", 2.0), Bound("memory", 0.25)) if model == "1b" else ()
    steps = (COPY, peer, ours("meta8", "hf", 2))
    return Row(f"transformers-{model}", model, "meta8", steps, bounds, "wall", pairs=pairs)


def _flip(world: int, mode: str) -> Row:
    """Eight files of columns into a file of rows for each rank: every matrix changes its dim."""
    peer = _on_ranks("dcp.load + dcp.save", "dcp_reshard", world, ("load", "save"))
    own = ours("flipped8", f"fsdp{world}", world, *MODES[mode])
    bounds = (Bound("faster", 3.0),)
    return Row(f"dcp-flip-{world}-{mode}", "1b", "flipped8", (COPY, peer, own), bounds)


def _merge() -> Row:
    """Into one file: ours has no torch file as a target, its nearest is one safetensors file."""
    words = ("{python}", "-m", f"{PEER}dcp_merge", "{source}", "{out}", "{report}")
    peer = Step("dcp_to_torch_save", words, ("merge",), cost=(4.0, 3.0), memory=1.2)
    own = ours("fsdp8", "hf", 2, "dst.max_shard_size=1000GB")
    return Row("dcp-merge", "1b", "fsdp8", (COPY, peer, own), pairs=FEW)


def _consolidation(world: int, usual: bool) -> Row:
    stages = ("load", "save", "consolidate")
    peer = _on_ranks("HF consolidation", "consolidation", world, stages, disk=2.0)
    steps = (COPY, peer, ours("fsdp8", "hf", world))
    return Row(f"hf-consolidation-{world}", "1b", "fsdp8", steps, usual=usual, pairs=FEW)


def all_rows() -> list[Row]:
    """Every row that there is, in the order of running."""
    flips = [_flip(world, mode) for world in WORLDS for mode in ("direct", "collective")]
    peers = [_converter("1b", USUAL), *flips, _merge()]
    peers += [_consolidation(2, True), _consolidation(8, False), _converter("3b", FEW)]
    return _routes() + peers


def chosen(rows: Sequence[Row], only: Sequence[str], everything: bool) -> list[Row]:
    """The rows whose names have one of the texts `only` in them; else the usual ones, or all."""
    if only:
        return [row for row in rows if any(text in row.name for text in only)]
    return [row for row in rows if everything or row.usual]
