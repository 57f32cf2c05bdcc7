"""The numbers of a plan, and of the run that it became, as a person reads them."""

from collections.abc import Iterable
from dataclasses import dataclass

from reshard.pictures.figures import Figures
from reshard.report import Report, balance
from reshard.units import size_text

Fact = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per rank: `engine.memory`, the least that works, and what is planned of it.

    `least` and `planned` are 0 where they are not known.
    """

    limit: int
    least: int = 0
    planned: int = 0


def lead(figures: Figures) -> str:
    """The job in one sentence."""
    plan, crossing = figures.plan, figures.total().sent
    sources, targets = len(plan.source.files), len(plan.target.files)
    became = _count(targets, "file")
    if figures.target.columns.unit == "shard":
        became = f"{_count(figures.target.columns.units, 'shard')} ({became})"
    ranks = f"{_count(plan.world, 'rank')} turn{'s' if plan.world == 1 else ''}"
    made = f"{ranks} {_count(sources, 'file')} into {became}"
    if plan.world == 1:
        return f"{made}."
    if not crossing:
        return f"{made}; nothing crosses between them."
    return f"{made}; {size_text(crossing)} of {size_text(figures.needed())} cross between them."


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def tiles(
    figures: Figures, memory: Memory, report: Report | None
) -> Iterable[tuple[str, str, str]]:
    """The few figures that are seen first: what each is, its value, and a remark."""
    sent, needed = figures.total().sent, figures.needed()
    part = f"{sent / needed:.1%} of what is needed" if sent else "nothing leaves its rank"
    yield "read", size_text(figures.source.nbytes), "each byte once"
    yield "crosses", size_text(sent), part
    yield "written", size_text(figures.target.nbytes), f"as {figures.plan.target.name}"
    if report is None:
        yield "memory per rank", _mib(memory.limit), "a hard bound"
        return
    peak = max((rank.peak_rss - rank.import_rss for rank in report.ranks), default=0)
    yield "memory at its peak", _mib(peak), f"of {_mib(memory.limit)} per rank"
    seconds = report.seconds["total"]
    speed = f"{size_text(figures.target.nbytes / seconds)}/s" if seconds else ""
    yield "took", _seconds(seconds), "already done" if report.state == "done" else speed


def plan_facts(figures: Figures, memory: Memory, model: str) -> Iterable[Fact]:
    """What is known before a byte moves."""
    plan, loads = figures.plan, figures.loads
    for name, side in (("source", figures.source), ("target", figures.target)):
        files = _count(len(side.layout.files), "file")
        yield name, f"{side.layout.name}, {files}, {size_text(side.nbytes)}"
    if model:
        yield "model", model
    yield "parameters", f"{len(plan.names):,}"
    yield "ranks", f"{plan.world:,}"
    writers = plan.writers if plan.exchange == "collective" else "the readers"
    yield "exchange", f"{plan.exchange}, writers {writers}"
    yield "blocks", f"{plan.block_count():,} of up to {size_text(plan.block_bytes)}"
    yield "crossing bound", size_text(figures.total().sent)
    read = balance([load.read for load in loads])
    written = balance([load.written for load in loads])
    yield "balance", f"read {read:.3f}, write {written:.3f} (largest over mean)"
    least = f", least that works {_mib(memory.least)}" if memory.least else ""
    yield "memory per rank", f"{_mib(memory.limit)}{least}"


def run_facts(report: Report | None) -> Iterable[Fact]:
    """What a run has measured."""
    if report is None:
        return
    yield "state", report.state
    yield (
        "seconds",
        ", ".join(f"{name} {_seconds(value)}" for name, value in sorted(report.seconds.items())),
    )
    counters = [figures.counters for figures in report.ranks]
    done = {
        "read": sum(counter.read for counter in counters),
        "exchanged": sum(counter.exchanged for counter in counters),
        "written": sum(counter.written for counter in counters),
        "found done": sum(counter.resumed for counter in counters),
    }
    yield "moved", ", ".join(f"{name} {size_text(value)}" for name, value in done.items())
    peaks = [rank.peak_rss for rank in report.ranks]
    libraries = [rank.import_rss for rank in report.ranks]
    if peaks:
        yield "peak memory", f"{_mib(max(peaks))}, of which libraries {_mib(max(libraries))}"
    yield "result", str(report.target)
    if report.purpose:
        yield "purpose", report.purpose
    yield "small files", report.readiness.line()


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s"
