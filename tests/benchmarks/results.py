"""What samples come to: medians, ratios, bounds; as JSON, and as a table in Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks import machine
from tests.benchmarks.measure import Sample
from tests.benchmarks.rows import Bound, Row

FURTHER = ("transformers-1b", "transformers-3b")
FURTHER_BOUND = 0.25
Pair = Mapping[str, Sample]
Record = dict[str, object]
HEAD = (
    "row",
    "what",
    "seconds, median (min to max)",
    "÷ copy (min to max)",
    "whole command",
    "peak RSS",
    "read",
    "exchanged",
    "written",
    "bounds",
)


@dataclass(slots=True)
class Found:
    """A row as far as it was measured, pair by pair; `problem` says what could not run, and why."""

    row: Row
    model_bytes: int
    pairs: list[Pair] = field(default_factory=list)
    problem: str = ""
    checked: list[str] = field(default_factory=list)

    def of(self, name: str) -> list[Sample]:
        """The samples of a step."""
        return [pair[name] for pair in self.pairs if name in pair]

    def record(self) -> Record:
        """All of it, for the JSON file."""
        names = [step.name for step in self.row.steps if self.of(step.name)]
        return {
            "row": self.row.name,
            "model": self.row.model,
            "model_bytes": self.model_bytes,
            "source": self.row.source,
            "caches": "cold" if self.row.cold else "warm",
            "problem": self.problem,
            "checked": self.checked,
            "figures": {name: figures(self.pairs, name) for name in names},
            "bounds": [
                {"bound": str(bound), "found": found, "met": bound.met(found)}
                for bound, found in self.bounds()
            ],
            "pairs": [{name: asdict(one) for name, one in pair.items()} for pair in self.pairs],
        }

    def bounds(self) -> list[tuple[Bound, float]]:
        """The bounds of a row that was measured, each with the figure that it is held against."""
        return [
            (bound, value)
            for bound in self.row.bounds
            if (value := self.figure(bound.what)) is not None
        ]

    def figure(self, what: str) -> float | None:
        """The median over pairs: copies (`times`), how much `faster`, or a share of `memory`."""
        peer, own, each = self.row.peer, self.row.ours.name, []
        other = "copy" if what == "times" or peer is None else peer.name
        for pair in self.pairs:
            if own in pair and other in pair:
                each.append(_figure(what, pair[own], pair[other], self.row.compared))
        return median(each) if each else None


def _figure(what: str, own: Sample, other: Sample, compared: str) -> float:
    if what == "times":
        return own.seconds / other.seconds
    if what == "memory":
        return own.peak_rss / other.peak_rss
    return float(getattr(other, compared)) / float(getattr(own, compared))


def figures(pairs: Sequence[Pair], name: str) -> Record:
    """What the samples of a step come to; ratios are taken pair by pair."""
    samples = [pair[name] for pair in pairs if name in pair]
    ratios = [
        pair[name].seconds / pair["copy"].seconds
        for pair in pairs
        if name in pair and "copy" in pair
    ]
    return {
        "seconds": spread([one.seconds for one in samples]),
        "total": spread([one.total for one in samples]),
        "wall": spread([one.wall for one in samples]),
        "times_copy": spread(ratios),
        "peak_rss": max(one.peak_rss for one in samples),
        "read": samples[-1].read,
        "exchanged": samples[-1].exchanged,
        "written": samples[-1].written,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest; nothing of nothing."""
    if not values:
        return {}
    return {"median": median(values), "min": min(values), "max": max(values)}


def further(rows: Sequence[Found]) -> Record | None:
    """Seconds per further GB of the converter and of ours, from the smaller model to the larger."""
    held = {found.row.name: found for found in rows}
    if not all(name in held and held[name].of("ours") for name in FURTHER):
        return None
    small, large = (held[name] for name in FURTHER)
    peer = small.row.peer
    if peer is None or not all(found.of(peer.name) for found in (small, large)):
        return None
    gigabytes = (large.model_bytes - small.model_bytes) / 1e9
    slopes = {
        name: (_wall(large, name) - _wall(small, name)) / gigabytes for name in (peer.name, "ours")
    }
    share = slopes["ours"] / slopes[peer.name]
    bound = f"≤ {FURTHER_BOUND:g} × its seconds per further GB"
    return {"slopes": slopes, "bound": bound, "found": share, "met": share <= FURTHER_BOUND}


def _wall(found: Found, name: str) -> float:
    return median(one.wall for one in found.of(name))


def record_of(rows: Sequence[Found], facts: Record, date: str) -> Record:
    """The whole result."""
    return {
        "date": date,
        "machine": facts,
        "rows": [found.record() for found in rows],
        "further": further(rows),
    }


def write(folder: Path, name: str, rows: Sequence[Found], record: Record) -> None:
    """Write both files, whole at any time."""
    for suffix, text in (
        (".json", json.dumps(record, indent=1) + "\n"),
        (".md", markdown(rows, record)),
    ):
        partial = folder / f"{name}{suffix}.partial"
        partial.write_text(text)
        partial.rename(folder / f"{name}{suffix}")


def markdown(rows: Sequence[Found], record: Record) -> str:
    """The table, with what it was measured on."""
    facts = record["machine"]
    assert isinstance(facts, dict)
    lines = [f"{record['date']}. {machine.line(facts)}.", "", _line(HEAD), _line(["---"] * 10)]
    for found in rows:
        lines += [_line(cells) for cells in cells_of(found)]
    slopes = record["further"]
    if isinstance(slopes, dict):
        each = ", ".join(f"{name} {value:.2f} s" for name, value in slopes["slopes"].items())
        met = _met(bool(slopes["met"]))
        lines += ["", f"Per further GB: {each}; {slopes['bound']}: {slopes['found']:.2f}, {met}."]
    return "\n".join(lines) + "\n"


def cells_of(found: Found) -> list[list[str]]:
    """A line of cells for the peer and for ours, or one that says why there is none."""
    row = f"{found.row.name} ({len(found.pairs)} pairs)"
    shown = [step for step in found.row.steps[1:] if found.of(step.name)]
    lines = []
    for step in shown:
        bounds = _bounds_text(found) if step is found.row.ours else ""
        lines.append([row, step.name, *_cells(figures(found.pairs, step.name)), bounds])
    if found.problem:
        lines.append([row, found.problem, *[""] * 8])
    return lines


def _cells(record: Record) -> list[str]:
    sizes = [record["peak_rss"], record["read"], record["exchanged"], record["written"]]
    return [
        _spread_text(record["seconds"]),
        _spread_text(record["times_copy"]),
        _spread_text(record["wall"]),
        *("" if size is None else f"{int(str(size)) / 1e9:.2f} GB" for size in sizes),
    ]


def _spread_text(record: object) -> str:
    if not isinstance(record, dict) or not record:
        return ""
    return f"{record['median']:.2f} ({record['min']:.2f} to {record['max']:.2f})"


def _bounds_text(found: Found) -> str:
    texts = [f"{bound}: {value:.2f}, {_met(bound.met(value))}" for bound, value in found.bounds()]
    peer_ratio = found.figure("faster") if found.row.peer is not None else None
    if peer_ratio is not None and not any(bound.what == "faster" for bound, _ in found.bounds()):
        texts.insert(0, f"{peer_ratio:.2f} × faster")
    return "; ".join(texts)


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
