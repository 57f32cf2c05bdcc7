"""What a person sees: progress, the plan as a table, the last line, and the JSON report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.assets import Readiness
from reshard.engine import Counters
from reshard.moves import Load
from reshard.plan import Plan
from reshard.schedule import FIELDS
from reshard.traffic import loads_by_rank
from reshard.units import size_text

if TYPE_CHECKING:
    from reshard.prepare import Prepared

FILES_SHOWN = 16
RANKS_SHOWN = 64
UNEVEN = 1.2


def memory_of(field: str) -> int:
    """A memory figure of this process in bytes, by its name in /proc/self/status (VmHWM, VmRSS)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a rank gathered: bytes moved, and its memory in bytes at the peak and before the job."""

    counters: Counters
    peak_rss: int
    import_rss: int


@dataclass(frozen=True, slots=True)
class Report:
    """How a job ended: `ranks` by rank, `file_bytes` the size of all target files."""

    plan: Plan
    target: Path
    state: str
    seconds: Mapping[str, float]
    ranks: Sequence[Figures]
    file_bytes: int
    purpose: str
    notes: Sequence[str]
    warnings: Sequence[str]
    readiness: Readiness

    def to_json(self) -> str:
        """The report file."""
        return json.dumps(self.record(), indent=2) + "\n"

    def record(self) -> dict[str, object]:
        """All figures. The bounds are those of the plan, not of what was done."""
        plan, counters = self.plan, [figures.counters for figures in self.ranks]
        return {
            "source": plan.source.name,
            "target": plan.target.name,
            "state": self.state,
            "world": plan.world,
            "exchange": plan.exchange,
            "writers": plan.writers,
            "seconds": dict(self.seconds),
            "bytes": {
                "read": sum(counter.read for counter in counters),
                "read_bound": plan.source.total_bytes(),
                "exchanged": sum(counter.exchanged for counter in counters),
                "exchanged_bound": sum(load.sent for load in loads_by_rank(plan)),
                "written": sum(counter.written for counter in counters),
                "written_bound": self.file_bytes,
                "resumed": sum(counter.resumed for counter in counters),
                "copied": sum(counter.copied for counter in counters),
            },
            "peak_rss": {str(rank): figures.peak_rss for rank, figures in enumerate(self.ranks)},
            "import_rss": {
                str(rank): figures.import_rss for rank, figures in enumerate(self.ranks)
            },
            "balance": {
                "read": balance([counter.read for counter in counters]),
                "write": balance([counter.written for counter in counters]),
            },
            "blocks": plan.block_count(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "ready": list(self.readiness.ready),
            "missing": list(self.readiness.missing),
        }

    def last_line(self) -> str:
        """How much, how fast, and where."""
        if self.state == "done":
            return f"already done: {self.target} is the finished result of this very job"
        total, seconds = self.plan.target.total_bytes(), self.seconds["total"]
        resumed = sum(figures.counters.resumed for figures in self.ranks)
        before = f", {size_text(resumed)} of it done before" if resumed else ""
        rate = size_text((total - resumed) / seconds)
        return (
            f"done: {size_text(total)} in {seconds:.2f} s ({rate}/s{before}), "
            f"{self.plan.source.name} -> {self.plan.target.name} in {self.target}"
            + (f" ({self.purpose})" if self.purpose else "")
        )


def balance(values: Sequence[int]) -> float:
    """The largest over the mean; 1 is perfect."""
    return max(values) * len(values) / sum(values) if sum(values) else 1.0


def plan_lines(
    prepared: "Prepared",
    plan: Plan,
    loads: Sequence[Load],
    memory: tuple[int, int],
    further: Sequence[str] = (),
) -> list[str]:
    """The plan as text: sizes, choices, the `loads` by rank, and what feeds every target file.

    `memory` has the bytes of a rank, and the least that works.
    """
    model, source, target = prepared.model, plan.source, plan.target
    source_bytes, target_bytes = (size_text(side.total_bytes()) for side in (source, target))
    writers = plan.writers if plan.exchange == "collective" else "the readers"
    lines = [
        f"{source.name} ({len(source.files)} files, {source_bytes}) -> "
        f"{target.name} ({len(target.files)} files, {target_bytes})",
        f"model: {model.describe()}, {model.dtype}{', tied' if model.tied else ''}",
        *prepared.notes,
        f"{plan.world} ranks, exchange {plan.exchange}, writers {writers}; "
        f"{plan.block_count():,} blocks of up to {size_text(plan.block_bytes)}",
        f"memory per rank: {memory[0] >> 20} MiB (least that works: {memory[1] >> 20} MiB)",
        "",
        f"{'rank':>6} {'read':>10} {'sent':>10} {'received':>10} {'written':>10}",
    ]
    lines += _load_lines(loads)
    everything = Load()
    for load in loads:
        everything.add(load)
    lines += [_load_line("all", everything), ""]
    read_balance = balance([load.read for load in loads])
    write_balance = balance([load.written for load in loads])
    lines.append(
        f"bounds: read {source_bytes} (each byte once), crossing {size_text(everything.sent)}, "
        f"written {target_bytes}; balance read {read_balance:.3f}, write {write_balance:.3f}"
    )
    if max(read_balance, write_balance) > UNEVEN:
        lines += _even_ways(plan)
    lines += further
    if prepared.scan is not None:
        lines.append(prepared.readiness().line())
    return [*lines, "", *feeding_lines(plan)]


def _even_ways(plan: Plan) -> list[str]:
    """What would share out better than a plan that is uneven, if anything is known."""
    parts = plan.source.coordinates
    if plan.exchange == "direct" or max(parts, plan.world) % min(parts, plan.world) == 0:
        return []
    direct = "" if plan.local or plan.machines else "engine.exchange=direct, or "
    return [
        f"uneven: {parts} part{'s' if parts > 1 else ''} of the source on {plan.world} ranks; "
        f"{direct}a number of ranks that divides {parts} or is a multiple of it shares out better"
    ]


def _load_lines(loads: Sequence[Load]) -> list[str]:
    """A line for each rank; of many, the first ones and the largest figures of all."""
    shown = loads if len(loads) <= RANKS_SHOWN else loads[: RANKS_SHOWN // 2]
    lines = [_load_line(str(rank), load) for rank, load in enumerate(shown)]
    if len(shown) < len(loads):
        most = Load(*(max(getattr(load, name) for load in loads) for name in FIELDS))
        lines += [f"   ... and {len(loads) - len(shown):,} more ranks", _load_line("most", most)]
    return lines


def _load_line(name: str, load: Load) -> str:
    cells = (size_text(value) for value in (load.read, load.sent, load.received, load.written))
    return f"{name:>6} " + " ".join(f"{cell:>10}" for cell in cells)


def feeding_lines(plan: Plan) -> list[str]:
    """For the first target files, the source files that feed each."""
    shown = plan.target.files[:FILES_SHOWN]
    feeds: dict[str, dict[str, None]] = {file: {} for file in shown}
    for slot in plan.target.slots:
        for shard in range(slot.placement.cut.parts):
            file = slot.file_of(shard)
            for region in slot.placement.regions(shard) if file in feeds else ():
                feeds[file] |= {
                    stored.file: None
                    for stored in plan.source.tensors_on(slot.parameter, region)
                    if stored.copy == 0
                }
    lines = [f"{file} <- {_some(list(sources))}" for file, sources in feeds.items()]
    more = len(plan.target.files) - len(shown)
    return [*lines, f"... and {more:,} more files"] if more else lines


def _some(names: Sequence[str]) -> str:
    """A few of many names."""
    if len(names) <= 8:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, ... {names[-1]} ({len(names)} files)"
