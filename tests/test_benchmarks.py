"""The machinery of `make bench`, on a toy model and against figures worked out by hand."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.benchmarks import __main__ as command
from tests.benchmarks import machine, measure, results, running, seeded
from tests.benchmarks.measure import Sample, StepError
from tests.benchmarks.peers.consolidation import files_of
from tests.benchmarks.place import Place
from tests.benchmarks.results import Found
from tests.benchmarks.rows import COPY, Bound, Row, Step, all_rows, chosen, ours
from tests.commands import SIZES

TOY = seeded.Model("toy", {"model_type": "llama", "torch_dtype": "bfloat16", **SIZES}, seed=3)
REPORTS = 'cp -r "$0" "$1" && echo \'{{"seconds": {{"load": 0.5, "save": 1.5}}}}\' > "$2"'
PEER = Step("peer", ("sh", "-c", REPORTS, "{source}", "{out}", "{report}"), ("load", "save"), False)
QUICK = replace(ours("hf", "meta2", 1), checked=False)
ALONE = ("{python}", *QUICK.words[QUICK.words.index("-m") :])  # one rank needs no launcher
FACTS = {
    "cpu": "Example",
    "cores": 2,
    "memory_bytes": 24 << 30,
    "kernel": "6.1",
    "disk": "ext4 on /dev/a (rw)",
    "python": "3.11",
    "torch": "2.13",
    "load": [0.25, 0.0, 0.0],
}
# Two children that hold 60 MB each, at once, and one that moves 5 MiB.
CHILDREN = f"""
hold() {{ {sys.executable} -S -c 'import time; held = bytearray(60_000_000); time.sleep(0.6)'; }}
hold & hold & dd if=/dev/zero of="$0" bs=1M count=5 2> /dev/null; wait
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A work directory with a toy model."""
    return Place(tmp_path / "bench", {"toy": TOY}, sys.executable, "no-such-python")


def row(*steps: Step, **more: object) -> Row:
    return Row("toy", "toy", "hf", steps, **more)  # type: ignore[arg-type]


def run(
    place: Place, one: Row, asked: int, say: Callable[[str], None] = lambda line: None
) -> Found:
    def keep(found: list[Found]) -> None:
        place.root.mkdir(exist_ok=True)
        results.write(place.root, "results", found, results.record_of(found, FACTS, "today"))

    return running.Run([one], place, asked, say, keep).all()[0]


def test_a_row_is_measured_pair_by_pair_and_leaves_nothing_but_its_figures(place: Place) -> None:
    own = replace(QUICK, words=ALONE)
    found = run(place, row(COPY, PEER, own, bounds=(Bound("memory", 99.0),)), 1)
    assert found.problem == ""
    (pair,) = found.pairs
    assert list(pair) == ["copy", "peer", "ours"]
    size = (place.source("toy", "hf") / "model.safetensors").stat().st_size
    assert size <= pair["copy"].written < size + 10_000
    assert (pair["peer"].seconds, pair["peer"].stages["save"]) == (2.0, 1.5)
    assert 0 < pair["ours"].seconds <= pair["ours"].total < pair["ours"].wall
    assert pair["ours"].read >= TOY.total_bytes
    assert pair["ours"].peak_rss > 50e6 > pair["copy"].peak_rss > 0
    assert list(place.scratch.iterdir()) == []
    record = json.loads((place.root / "results.json").read_text())
    assert record["rows"][0]["pairs"][0]["ours"]["seconds"] == pair["ours"].seconds
    assert not place.missing([found.row]), "the source is not reused"


def test_figures_are_those_worked_out_by_hand() -> None:
    one = Sample(0, 0, 0, peak_rss=0, read=3_000_000_000, written=3_000_000_000)
    copies = (2.0, 4.0, 1.0)
    own = ((3.0, 5.0, 300e6), (4.0, 6.0, 500e6), (4.0, 10.0, 400e6))
    peers = ((8.0, 20.0, 2e9), (12.0, 18.0, 2e9), (9.0, 20.0, 2e9))
    pairs = [
        {
            "copy": replace(one, seconds=copy, total=copy, wall=copy),
            "peer": replace(one, seconds=a, total=a, wall=b, peak_rss=int(c)),
            "ours": replace(one, seconds=d, total=d, wall=e, peak_rss=int(f), exchanged=0),
        }
        for copy, (a, b, c), (d, e, f) in zip(copies, peers, own, strict=True)
    ]
    bounds = (Bound("times", 1.4), Bound("faster", 3.0), Bound("memory", 0.25))
    found = Found(row(COPY, PEER, QUICK, bounds=bounds, compared="wall"), 0, pairs)
    # ours in copies: 1.5, 1, 4; faster, as whole commands: 4, 3, 2; memory: 0.15, 0.25, 0.2
    assert [value for _, value in found.bounds()] == [1.5, 3.0, 0.2]
    figures = results.figures(pairs, "ours")
    assert figures["seconds"] == {"median": 4.0, "min": 3.0, "max": 4.0}
    assert figures["times_copy"] == {"median": 1.5, "min": 1.0, "max": 4.0}
    assert figures["peak_rss"] == 500_000_000
    assert [bound["met"] for bound in found.record()["bounds"]] == [False, True, True]
    record = results.record_of([found], FACTS, "today")
    assert results.markdown([found], record).splitlines() == [
        "today. Example, 2 cores, 24 GiB, Linux 6.1, ext4 on /dev/a (rw), Python 3.11, torch 2.13, "
        "load average before 0.25.",
        "",
        f"| {' | '.join(results.HEAD)} |",
        f"| {' | '.join(['---'] * 10)} |",
        "| toy (3 pairs) | peer | 9.00 (8.00 to 12.00) | 4.00 (3.00 to 9.00) | "
        "20.00 (18.00 to 20.00) | 2.00 GB | 3.00 GB |  | 3.00 GB |  |",
        "| toy (3 pairs) | ours | 4.00 (3.00 to 4.00) | 1.50 (1.00 to 4.00) | "
        "6.00 (5.00 to 10.00) | 0.50 GB | 3.00 GB | 0.00 GB | 3.00 GB | ≤ 1.4 × the copy: 1.50, "
        "missed; ≥ 3 × faster: 3.00, met; ≤ 0.25 × its memory: 0.20, met |",
    ]


def test_seconds_per_further_gb_are_the_slope_between_two_sizes() -> None:
    def of(name: str, size: int, peer: float, own: float) -> Found:
        walls = {"transformers": peer, "ours": own}
        pair = {step: Sample(0, 0, wall, 0, 0, 0) for step, wall in walls.items()}
        known = next(row for row in all_rows() if row.name == name)
        return Found(known, size, [pair])

    small = of("transformers-1b", 3_000_000_000, 24.0, 6.0)
    slopes = results.further([small, of("transformers-3b", 7_000_000_000, 56.0, 8.0)])
    assert slopes is not None
    assert (slopes["slopes"], slopes["found"]) == ({"transformers": 8.0, "ours": 0.5}, 0.0625)
    assert slopes["met"]
    assert results.further([small]) is None


def test_memory_and_bytes_are_those_of_all_processes(tmp_path: Path) -> None:
    life = measure.run(["sh", "-c", CHILDREN, str(tmp_path / "zeros")], tmp_path / "said")
    assert 120e6 < life.peak_rss < 200e6
    assert 5 << 20 <= life.written < (5 << 20) + 10_000
    assert life.wall > 0.6


def test_a_command_that_hangs_or_fails_is_ended_and_quoted(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(StepError, match=r"took longer than 0\.2 s: it said nothing"):
        measure.run(["sh", "-c", "sleep 61; true"], tmp_path / "said", 0.2)
    with pytest.raises(StepError, match=r"exit 3: one / two"):
        measure.run(["sh", "-c", "echo one; echo two >&2; exit 3"], tmp_path / "said")
    assert time.monotonic() - began < 3


def test_what_cannot_run_is_told_and_the_rest_is_measured(place: Place) -> None:
    broken = Step("peer", ("{peers}", "{source}"), ("load",), False)
    found = run(place, row(COPY, broken, replace(COPY, name="ours")), 2)
    assert found.problem == "peer: there is no `no-such-python`"
    assert [list(pair) for pair in found.pairs] == [["copy", "ours"]] * 2
    huge = replace(PEER, memory=1e9)
    found = run(place, row(COPY, huge, replace(COPY, name="ours")), 1)
    assert found.problem.startswith("peer: needs about ")
    assert results.cells_of(found)[-1][:2] == ["toy (1 pairs)", found.problem]


def test_what_was_measured_before_an_interruption_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def interrupted(words: list[str], *more: object) -> Sample:
        Path(words[-1]).mkdir()
        steps.append(words[0])
        if len(steps) == 4:
            raise KeyboardInterrupt
        return Sample(1, 1, 1, 1, 1, 1)

    monkeypatch.setattr(measure, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(place, row(COPY, replace(COPY, name="ours")), 3)
    record = json.loads((place.root / "results.json").read_text())
    assert len(record["rows"][0]["pairs"]) == 1
    assert list(place.scratch.iterdir()) == []


def test_a_seeded_model_is_the_same_each_time_and_finite(tmp_path: Path) -> None:
    for name, model in (("a", TOY), ("b", TOY), ("c", replace(TOY, seed=4))):
        seeded.write(model, tmp_path / name)
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same != other
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        parameter.name: parameter.shape for parameter in TOY.parameters
    }
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.unique().numel() > 40 for tensor in tensors.values())


def test_cold_is_out_of_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    os.sync()
    with file.open("rb") as opened:
        measure.warm(tmp_path)
        try:
            assert os.preadv(opened.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
        except OSError:
            pytest.skip("this file system cannot say what is cached")
        measure.drop(tmp_path)
        with pytest.raises(BlockingIOError):
            os.preadv(opened.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)


def test_rows_are_picked_by_a_part_of_their_name() -> None:
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    picked = [row.name for row in chosen(rows, ["dcp-flip-8"], False)]
    assert picked == ["dcp-flip-8-direct", "dcp-flip-8-collective"]
    assert len(chosen(rows, [], False)) < len(chosen(rows, [], True)) == len(rows)


def test_too_little_disk_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Place, "free_bytes", lambda self: 10 << 30)
    where = ["--dir", str(tmp_path / "bench")]
    assert command.main([*where, "--only", "transformers-3b"]) == 2
    assert "too little disk" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()
    assert command.main([*where, "--only", "no such row"]) == 2


def test_a_place_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--dir", str(tmp_path / "file" / "bench"), "--only", "dcp-merge"]) == 2
    assert "choose a directory" in capsys.readouterr().err


def test_the_machine_is_told() -> None:
    facts = machine.facts(Path.cwd())
    assert facts.keys() == FACTS.keys()
    assert "unknown" not in machine.line(facts)


def test_consolidated_files_are_of_about_equal_size() -> None:
    state = {name: torch.zeros(n) for name, n in zip("abcde", (90, 10, 5, 5, 90), strict=True)}
    assert files_of(state, 2) == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 2}
