"""The picture of a plan: its numbers against the plan and brute force, its page against readers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard import blocks, config
from reshard.assets import Readiness
from reshard.engine import Counters
from reshard.layout import Layout, Slot
from reshard.pictures import Memory, figures_of, page
from reshard.pictures.bands import bands_of
from reshard.pictures.columns import MAX_COLUMNS, columns_of, labels
from reshard.pictures.figures import MAX_BINS, Figures, Side
from reshard.pictures.shares import ranks_text
from reshard.placement import Cut, Placement, uncut
from reshard.plan import Plan
from reshard.prepare import prepare
from reshard.report import Figures as RankFigures
from reshard.report import Report
from reshard.traffic import loads_by_rank
from tests.layouts import elements, layout_pairs

MODES = [("collective", "nearest"), ("collective", "owner"), ("direct", "nearest")]
MEMORY = Memory(256 << 20, 36 << 20, 108 << 20)
VOID = {"meta"}
few_inputs = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plan_of(source: str, target: str, model: str, world: int, *overrides: str) -> Plan:
    job = config.load(source, target, [f"src.model={model}", *overrides], None)
    return prepare(job).plan(world)


@pytest.fixture(scope="module")
def shown() -> Figures:
    return figures_of(plan_of("meta8", "tp4", "llama3-70b", 8))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Random layouts, in blocks so small that a tiny parameter has many."""
    source, target = draw(layout_pairs())
    plan = Plan(source, target, draw(st.integers(1, 7)), *draw(st.sampled_from(MODES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MIN_BLOCK_BYTES", draw(st.sampled_from((1, 32, 128))))
        assert plan.block_bytes >= 1  # cached from here on
    return plan


class Reader(HTMLParser):
    """What a browser makes of a page: its elements, their texts, and the data of its script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self.unnamed = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags[tag] += 1
        self.ids += [given["id"]] if "id" in given else []
        self.unnamed += tag in ("figure", "button") and not given.get("aria-label")
        assert not [name for name in given if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts.setdefault(tag, []).append(data)
        if tag == "script":
            self.scripts.append(data)

    @property
    def record(self) -> dict:
        return json.loads(self.scripts[0])


def drawn(figures: Figures) -> dict:
    """The data of the page's script."""
    return Reader(page(figures, MEMORY)).record


# The numbers.


def check_sums(plan: Plan, figures: Figures) -> None:
    totals, record = dict(enumerate(loads_by_rank(plan))), drawn(figures)
    assert dict(enumerate(figures.loads)) == totals
    for name, values in record["loads"].items():
        assert values == [getattr(load, name) for load in totals.values()]
    sent, received = Counter(), Counter()
    for reader, writer, crossing, staying in record["matrix"]:
        assert crossing or staying
        sent[reader] += crossing
        received[writer] += crossing
        assert reader == writer or not staying
    assert len(record["bins"]) == plan.world
    assert [sent[rank] for rank in totals] == [load.sent for load in totals.values()]
    assert [received[rank] for rank in totals] == [load.received for load in totals.values()]
    assert sum(band["crossing"] for band in record["bands"]) == sum(sent.values())
    check_side(figures.source, sum(load.read for load in totals.values()))
    check_side(figures.target, sum(load.written for load in totals.values()))


def check_side(side: Side, moved: int) -> None:
    """Its cells hold all that is moved, which is all that there is but padding and constants."""
    layout = side.layout
    cells = sum(cell.nbytes for cell in side.cells)
    assert cells == moved
    besides = sum(constant.content.nbytes for constant in layout.constants) + sum(
        content.padding_bytes for file in layout.files for content in layout.contents(file)
    )
    assert side.nbytes == layout.total_bytes() == cells + besides
    files = [file for column in side.columns.columns for file in column.files]
    assert sorted(files) == sorted(layout.files)
    assert len(side.columns.columns) <= MAX_COLUMNS


def check_holders(plan: Plan, figures: Figures) -> None:
    """Which rank holds what of a cell, and what is needed: element by element."""
    rows = {name: row for row, band in enumerate(figures.bands) for name in band.names}
    assert sorted(rows) == sorted(plan.names)
    held = {"source": Counter(), "target": Counter()}
    needed: Counter[int] = Counter()
    for name in plan.names:
        for block in plan.blocks(name):
            move = plan.move(block)
            for side, parts in (("source", move.reads), ("target", move.pieces)):
                numbers = getattr(figures, side).columns.numbers
                for rank, stored in parts:
                    held[side][rows[name], numbers[stored.file], rank] += stored.nbytes
            size = min(move.reads[0][1].dtype.itemsize, move.pieces[0][1].dtype.itemsize)
            wanted = {
                (writer, at) for writer, piece in move.pieces for at in elements(piece.region)
            }
            needed.update({rows[name]: len(wanted) * size})
    assert [pair[1] for pair in figures.crossing] == [
        needed[row] for row in range(len(figures.bands))
    ]
    for side, counted in held.items():
        check_cells(getattr(figures, side), figures, counted)


def check_cells(side: Side, figures: Figures, counted: Counter) -> None:
    seen = set()
    for cell in side.cells:
        ranks = {
            rank: nbytes
            for (row, column, rank), nbytes in counted.items()
            if (row, column) == (cell.band, cell.column)
        }
        share = figures.shares[cell.share]
        assert cell.nbytes == sum(ranks.values())
        assert share.text == ranks_text(sorted(ranks))
        assert dict(share.stripes) == {
            rank: round(1000 * nbytes / cell.nbytes) for rank, nbytes in ranks.items()
        }
        seen.add((cell.band, cell.column))
    assert seen == {(row, column) for row, column, _ in counted}


@few_inputs
@given(plans())
def test_numbers_of_random_layouts_are_those_of_the_plan(plan):
    figures = figures_of(plan)
    check_sums(plan, figures)
    check_holders(plan, figures)


@pytest.mark.parametrize(("exchange", "writers"), MODES)
@pytest.mark.parametrize("world", [1, 5, 8])
@pytest.mark.parametrize(
    ("source", "target"), [("meta8", "tp4pp2"), ("hf", "gguf"), ("meta2", "hf")]
)
def test_numbers_of_real_layouts_are_those_of_the_plan(source, target, world, exchange, writers):
    modes = (f"engine.exchange={exchange}", f"engine.writers={writers}")
    plan = plan_of(source, target, "llama3.2-1b", world, *modes)
    check_sums(plan, figures_of(plan))


@pytest.mark.parametrize("source", ["meta8", "hf"])
def test_files_that_only_some_ranks_see_are_read_by_these(source):
    whole = plan_of(source, "tp4", "llama3-8b", 5)
    files = whole.source.files
    assert len(files) >= 4
    local = {file: (number % 2, 3 + number % 2) for number, file in enumerate(files)}
    plan = Plan(whole.source, whole.target, 5, local=local)
    figures = figures_of(plan)
    check_sums(plan, figures)
    for cell in figures.source.cells:
        ranks = local[files[cell.column]]
        assert {rank for rank, _ in figures.shares[cell.share].stripes} <= set(ranks)


def test_eight_files_become_four_shards(shown):
    text = page(shown, MEMORY)
    words = (
        "8 ranks turn 8 files into 4 shards (1,449 files); 24.2 GB of 141 GB cross between them."
    )
    assert words in text
    record = Reader(text).record
    assert [column[0] for column in record["source"]["columns"]] == list("01234567")
    assert [column[0] for column in record["target"]["columns"]] == list("0123")
    bands = {band["label"]: band for band in record["bands"]}
    halves = {name for name, band in bands.items() if band["crossing"]}
    assert halves == {"self_attn.o_proj", "mlp.down_proj"}, "cut by columns, which two ranks hold"
    assert all(2 * bands[name]["crossing"] == bands[name]["needed"] for name in halves)
    assert bands["self_attn.o_proj"]["group"] == "layers 0-79"
    assert sum(band["count"] for band in record["bands"]) == 723
    assert "rows 0 to 1,023, all columns of 8,192 x 8,192" in record["source"]["regions"]


# What is drawn together.


def test_stages_of_a_pipeline_are_told_apart():
    plan = plan_of("meta2", "tp1pp3", "llama3.2-1b", 2)
    bands = bands_of(plan, columns_of(plan.source), columns_of(plan.target))
    groups = list(dict.fromkeys(band.group for band in bands if band.group))
    assert groups[0].startswith("layers 0-")
    assert groups[-1].endswith("-15")
    assert len(groups) == 3


def test_stacks_of_layers_and_what_stands_beside_them_are_kept_apart():
    names = [f"vision.blocks.{layer}.w.weight" for layer in range(99)]
    names += [f"text.layers.{layer}.experts.{one}.w" for layer in range(99) for one in (0, 1)]
    names += [f"loose_{number}" for number in range(5)]
    files = [f"f{number % 2}" for number in range(len(names))]
    source, target = (
        Layout(
            "s",
            "safetensors",
            1,
            tuple(
                Slot(name, Placement((1,), uncut(1)), file, name, torch.bfloat16)
                for name, file in zip(names, chosen, strict=True)
            ),
        )
        for chosen in (files, ["f"] * len(names))
    )
    plan = Plan(source, target, 2)
    bands = bands_of(plan, columns_of(source), columns_of(target))
    assert [name for band in bands for name in band.names] == names
    shown = [band.label for band in bands]
    assert shown[:2] == ["vision.blocks 0-1", "vision.blocks 2-3"]
    assert {"vision.block 98", "text.layers 0-98"} <= set(shown)
    assert shown[-3:] == ["loose_0 and 1 more", "loose_2 and 1 more", "loose_4"]


def test_many_files_are_grouped_by_neighbours_and_all_are_counted():
    plan = plan_of("hf", "fsdp1024", "llama3.2-1b", 3)
    columns = columns_of(plan.target)
    assert (columns.unit, columns.units) == ("file", 1024)
    assert [len(column.files) for column in columns.columns] == [16] * 64
    assert columns.columns[1].label == "16-31"
    assert columns.columns[1].files[0] == "__16_0.distcp"


def test_labels_are_what_tells_names_apart():
    assert labels(["a.00.pth", "a.01.pth", "a.10.pth"]) == ["00", "01", "10"]
    assert labels(["x"]) == ["0"]
    assert labels(["one and another", "of quite some length"]) == ["0", "1"]
    assert labels(["aa", "a"]) == ["0", "1"]


def test_ranks_in_words():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([4, 0]) == "ranks 0, 4"
    assert ranks_text(range(2, 12)) == "ranks 2-11"
    assert ranks_text(range(0, 1024, 8)) == "128 ranks: 0, 8, 16, ... 1016"


# The page.


def test_the_page_is_whole_and_has_names_for_all_that_is_drawn(shown):
    text = page(shown, MEMORY, model="llama", notes=("a note",), command="reshard plan")
    reader = Reader(text)
    assert not reader.open
    assert text.startswith("<!doctype html>")
    assert len(reader.ids) == len(set(reader.ids))
    assert (reader.tags["title"], reader.tags["h1"], reader.tags["figure"]) == (1, 1, 3)
    assert not reader.unnamed
    assert reader.texts["title"] == reader.texts["h1"] == ["meta8 → tp4"]
    assert {"llama", "reshard plan", "34,529 of up to 4.19 MB"} <= set(reader.texts["dd"])
    assert "a note" in reader.texts["li"]


def test_the_page_asks_no_network_for_anything(shown):
    text = page(shown, MEMORY).lower()
    for word in (
        "http:",
        "https:",
        "//www",
        "src=",
        "href=",
        "url(",
        "@import",
        "fetch(",
        "xmlhttp",
    ):
        assert word not in text, word
    assert (
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\""
        in text
    )


def hostile_plan(name: str) -> Plan:
    sides = [
        Layout(
            name,
            "safetensors",
            3,
            (
                Slot(
                    name,
                    Placement((6, 4), Cut(0, 6, step, 6 // step)),
                    f"{name}-{{shard}}",
                    "k",
                    torch.bfloat16,
                ),
                Slot("plain", Placement((5,), uncut(5)), "f", "k", torch.bfloat16),
            ),
        )
        for step in (2, 3)
    ]
    return Plan(*sides, 3)


@pytest.mark.parametrize(
    "name",
    [
        "</script><img src=x onerror=alert(1)>",
        "<!--<script>",
        "a&lt;b \"'` $title ]]>",
        "\u2028é\x7f\n",
    ],
)
def test_names_are_text_and_nothing_else(name):
    text = page(figures_of(hostile_plan(name)), MEMORY, model=name, notes=[name], command=name)
    reader = Reader(text)
    assert not reader.open
    assert (reader.tags["img"], reader.tags["script"], len(reader.scripts)) == (0, 2, 2)
    assert reader.texts["h1"] == [f"{name} → {name}"]
    assert reader.record["bands"][0]["names"] == [name]
    assert reader.record["source"]["files"][0] == [f"{name}-0"]
    assert reader.texts["li"] == [name]
    assert "<!--" not in text


def test_the_page_after_a_run_says_what_was_measured(shown):
    plan = shown.plan
    ranks = [
        RankFigures(
            Counters(load.read, load.sent + rank, load.written), (400 + rank) << 20, 300 << 20
        )
        for rank, load in enumerate(shown.loads)
    ]
    seconds = {"plan": 0.25, "move": 40.0, "commit": 1.5, "total": 50.0}
    ready = Readiness(("config.yaml",), ("tokenizer",))
    for state in ("fresh", "done"):
        report = Report(
            plan,
            Path("/ckpt/<x>"),
            state,
            seconds,
            ranks,
            1,
            "for training",
            (),
            ("beware",),
            ready,
        )
        reader = Reader(page(shown, MEMORY, report=report))
        facts = set(reader.texts["dd"])
        assert "commit 1.50 s, move 40.00 s, plan 0.25 s, total 50.00 s" in facts
        assert {"50.00 s", "107 MiB", "/ckpt/<x>"} <= facts
        assert "beware" in reader.texts["li"]
        assert reader.record["memory"]["used"] == [(100 + rank) << 20 for rank in range(8)]
        surplus = [
            one - load.sent
            for one, load in zip(reader.record["loads"]["sent"], shown.loads, strict=True)
        ]
        assert surplus == ([0] * 8 if state == "done" else list(range(8)))
        assert ("2.82 GB/s" if state == "fresh" else "already done") in reader.texts["small"]


@pytest.mark.parametrize(
    ("source", "target", "model"),
    [("meta8", "tp4", "llama3-70b"), ("fsdp1024", "hf", "llama3.2-1b")],
)
def test_a_thousand_ranks_are_binned_and_the_page_is_small(source, target, model):
    plan = plan_of(source, target, model, 1024)
    figures = figures_of(plan)
    text = page(figures, MEMORY)
    assert len(text.encode()) < 500_000
    record = Reader(text).record
    assert record["bins"] == [[first, first + 15] for first in range(0, 1024, 16)]
    assert len(record["bins"]) == MAX_BINS
    assert sum(cell[2] for cell in record["matrix"]) == sum(load.sent for load in figures.loads)
    cells = sum(cell.nbytes for cell in figures.target.cells)
    assert cells == sum(load.written for load in figures.loads)
    assert sorted(record["order"]) == list(range(1024))


def test_the_page_is_the_same_in_any_process():
    words = ("hf", "tp2pp5", "llama3.2-1b", 5)
    made = (
        "import sys; from tests.test_picture import *;"
        f"sys.stdout.buffer.write(page(figures_of(plan_of(*{words})), MEMORY).encode())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", made],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
        timeout=100,
    )
    assert elsewhere.stdout.decode() == page(figures_of(plan_of(*words)), MEMORY)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_draws_it(shown, tmp_path):
    file = tmp_path / "plan.html"
    file.write_text(page(shown, MEMORY), encoding="utf-8")
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    browser = subprocess.run(
        ["chromium", *words, "--enable-logging=stderr", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert "CONSOLE" not in browser.stderr, "a script failed, or was refused"
    assert browser.stdout.count("<svg viewBox") == 7
    assert re.search(r"<text[^>]*>self_attn\.o_proj</text>", browser.stdout)
    assert browser.stdout.count(">50%</text>") == 2
