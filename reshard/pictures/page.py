"""The picture of a plan as one page of HTML that needs nothing else: no file, no network."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from reshard.pictures.facts import Fact, Memory, lead, plan_facts, run_facts, tiles
from reshard.pictures.figures import Figures
from reshard.pictures.record import record_of, script_text
from reshard.report import Report

SCRIPTS = ("tools.js", "layouts.js", "ranks.js", "main.js")


def page(
    figures: Figures,
    memory: Memory,
    *,
    model: str = "",
    notes: Sequence[str] = (),
    command: str = "",
    report: Report | None = None,
) -> str:
    """The whole page; with the `report` of a run, with what was measured.

    `model` is a line on the model, `notes` are lines on the job, `command` is what was typed. The
    same arguments give the same page: it names no date, host or user.
    """
    plan = figures.plan
    lines = [*notes, *(report.warnings if report is not None else ())]
    facts = [*plan_facts(figures, memory, model), *run_facts(report)]
    record = record_of(figures, _memory(figures, memory, report), _measured(report))
    return Template(_part("page.html")).substitute(
        title=escape(f"{plan.source.name} → {plan.target.name}"),
        lead=escape(lead(figures)),
        tiles="\n".join(_tile(*tile) for tile in tiles(figures, memory, report)),
        facts=_listed([*facts, *([("command", command)] if command else [])]),
        notes="\n".join(f"<li>{escape(line)}</li>" for line in lines),
        style=_part("style.css"),
        script="\n".join(map(_part, SCRIPTS)),
        record=script_text(record),
    )


def _part(name: str) -> str:
    """What of the page is the same for all plans."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _tile(name: str, value: str, remark: str) -> str:
    return (
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
    )


def _listed(facts: Iterable[Fact]) -> str:
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts
    )


def _memory(figures: Figures, memory: Memory, report: Report | None) -> dict[str, object]:
    """The bars of memory: what ranks used at their peak, or what is planned."""
    used = [memory.planned] * figures.plan.world
    if report is not None:
        used = [max(0, rank.peak_rss - rank.import_rss) for rank in report.ranks]
    return {"limit": memory.limit, "used": used, "measured": report is not None}


def _measured(report: Report | None) -> Mapping[str, Sequence[int]]:
    """What every rank has read, sent and written; nothing where there was nothing to do."""
    if report is None or report.state == "done":
        return {}
    counters = [rank.counters for rank in report.ranks]
    return {
        "read": [counter.read for counter in counters],
        "sent": [counter.exchanged for counter in counters],
        "written": [counter.written for counter in counters],
    }
