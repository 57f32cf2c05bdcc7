"""The command line: verbs, flags, topologies, the report, and what a person reads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reshard.arguments import VERBS
from tests import jobs
from tests.commands import call, done, model, move, one_line, read, refused, write
from tests.oracles import hf, meta, models, nanotron
from tests.oracles.compare import assert_same, assert_same_files, files_in

ROOT = Path(__file__).parents[1]
MODELS = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml"))
TOPOLOGIES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
NANOTRON_NOTE = r"Nanotron TP=4 PP=1, for training; for inference use --dst hf"


# Help and verbs.


def test_help_fits_a_screen_and_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    from reshard.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) <= 78
    keys = {f"{side}.path" for side in ("src", "dst")} | {
        "src.model",
        "dst.dtype",
        "dst.max_shard_size",
    }
    keys |= {
        f"engine.{key}"
        for key in ("memory", "exchange", "writers", "backend", "timeout", "fsync", "verify")
    }
    flags = {"--src", "--dst", "--config", "--report", "--force", "--world", "--json", "--debug"}
    flags |= {"--cast", "--load", "--checksums", "--html", "--log-dir", "--verbose", "--quiet"}
    missing = {word for word in keys | flags | set(VERBS) if word not in text}
    assert not missing
    assert re.search(r"exit codes: 0 .* 1 .* 2 ", text)
    assert re.search(r"between the two\s+renames it is absent", text.replace("\n", " "))
    for verb, flag in (("fit", "--gpus"), ("serve", "--watch")):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = capsys.readouterr().out
        assert flag in text
        assert len(text.splitlines()) < 50


def test_run_is_implied(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    done("run", *move("meta8", source, "tp4", tmp_path / "one"))
    done(*move("meta8", source, "tp4", tmp_path / "two"))
    assert_same(read("tp4", tmp_path / "one"), model())
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_words_may_come_in_any_order(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    orders = (
        [
            "--src",
            "meta8",
            f"src.path={source}",
            "dst.path={}",
            "--dst",
            "hf",
            "dst.max_shard_size=60KB",
        ],
        [
            "dst.max_shard_size=60KB",
            "dst.path={}",
            "--dst",
            "hf",
            f"src.path={source}",
            "--src",
            "meta8",
        ],
        [f"src.path={source}", "--src=meta8", "--dst=hf", "dst.max_shard_size=60KB", "dst.path={}"],
        [
            "run",
            "dst.path={}",
            "--dst",
            "hf",
            "dst.max_shard_size=60KB",
            "--src",
            "meta8",
            f"src.path={source}",
        ],
    )
    for number, words in enumerate(orders):
        target = tmp_path / f"dst{number}"
        done(*(word.format(target) for word in words))
        assert_same_files(target, tmp_path / "dst0")
    assert len(list((tmp_path / "dst0").glob("*.safetensors"))) > 1
    before = done("plan", "--world", 8, "--src", "meta8", "src.model=llama3-8b", "--dst", "tp4").out
    assert (
        before
        == done("plan", "src.model=llama3-8b", "--dst", "tp4", "--src", "meta8", "--world=8").out
    )


def test_the_last_line_says_what_went_where(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    found = done(*move("meta8", source, "tp4", tmp_path / "dst"))
    expected = rf"done: \S+ KB in [\d.]+ s \(\S+ [KMG]B/s\), meta8 -> tp4 in {tmp_path}/dst"
    assert re.search(expected, found.last), found.last
    assert re.search(NANOTRON_NOTE, found.out)


def test_the_last_line_says_that_a_nanotron_target_is_for_training(tmp_path: Path) -> None:
    """design.md, section 4: `plan and the last line say so`."""
    source = write("meta8", tmp_path / "src")
    found = done(*move("meta8", source, "tp4", tmp_path / "dst"))
    assert re.search(r"Nanotron TP=4.*for training; for inference use --dst hf", found.last), (
        found.last
    )


def test_what_is_already_done_is_not_done_again(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "tp4", tmp_path / "dst")
    done(*words)
    before = {
        file: (tmp_path / "dst" / file).stat().st_mtime_ns for file in files_in(tmp_path / "dst")
    }
    for more in ([], ["engine.memory=64MiB"], ["engine.exchange=direct"], ["--force"]):
        found = done(*words, *more)
        assert re.match(rf"already done: {tmp_path}/dst", found.last), found.last
    after = {
        file: (tmp_path / "dst" / file).stat().st_mtime_ns for file in files_in(tmp_path / "dst")
    }
    assert after == before
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_a_traceback_is_shown_only_with_debug(tmp_path: Path) -> None:
    words = move("meta8", tmp_path / "gone", "tp4", tmp_path / "dst")
    assert "Traceback" not in call(*words).err
    found = call(*words, "--debug")
    assert found.code == 2
    assert "Traceback" in found.err
    assert sum(line.startswith("reshard: ") for line in found.err.splitlines()) == 1


def test_a_bug_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("reshard.engine.Engine.run", broken)
    source = write("meta8", tmp_path / "src")
    found = call(*move("meta8", source, "tp4", tmp_path / "dst"))
    assert found.code == 1
    assert re.search(r"unexpected ZeroDivisionError: one two \(--debug", one_line(found.err))


@pytest.mark.parametrize(
    ("verb", "flag", "owner"),
    [
        ("run", "--world=8", "plan"),
        ("run", "--json", "inspect and fit"),
        ("plan", "--force", "run and serve"),
        ("plan", "--report=x", "run"),
        ("inspect", "--src=hf", "run, plan, fit and serve"),
        ("inspect", "--world=0", "plan"),
        ("verify", "--checksums", "inspect"),
        ("plan", "--log-dir=x", "run, verify and serve"),
        ("verify", "--config=x", "run and plan"),
    ],
)
def test_flags_of_other_verbs_are_refused(verb: str, flag: str, owner: str, tmp_path: Path) -> None:
    name = flag.partition("=")[0]
    pattern = rf"`{name}` does not apply to `{verb}`; it is for {owner}$"
    refused(tmp_path, pattern, verb, flag)
    if verb == "run":
        refused(tmp_path, pattern, flag, "--src", "meta8", "--dst", "tp4")


def test_a_rank_that_alone_is_refused_speaks_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("reshard.cli.ELSEWHERE_SECONDS", 0.01)
    found = call("--src", "meta8", "--dst", "tp4", "engine.memry=1GiB")
    assert found.code == 2
    assert "`engine.memry`" in one_line(found.err)


@pytest.mark.parametrize("verb", ["plan", "inspect", "run"])
def test_a_reader_that_goes_away_is_no_failure(verb: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = ["inspect", source] if verb == "inspect" else [verb]
    if verb != "inspect":
        words += move("meta8", source, "tp4", tmp_path / "dst")
    reading, writing = os.pipe()
    os.close(reading)
    found = subprocess.run(
        [sys.executable, "-m", "reshard", *map(str, words)],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, b"")
    assert (tmp_path / "dst").exists() == (verb == "run")


# Plans of models that are not there.


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_planned_without_its_checkpoint(name: str) -> None:
    tied = {"llama3.2-1b", "llama3.2-3b"}
    sources = ["meta8", "hf"] if "405b" not in name else ["meta16"]
    for source in sources:
        for target in ("tp2pp2dp2", "hf" if source != "hf" else "meta8"):
            words = ("plan", "--src", source, "--dst", target, f"src.model={name}", "--world", 4)
            found = done(*words).out
            assert re.search(rf"^{source} \(\d+ files?.*-> {target} ", found), found.splitlines()[0]
            assert (", tied" in found) == (name in tied)


def test_a_plan_says_what_each_rank_does_and_what_feeds_each_file() -> None:
    words = ("--src", "meta8", "--dst", "tp4", "src.model=llama3-70b")
    found = done("plan", *words, "--world", 8).out
    rows = re.findall(
        r"^ +(\d+|all) +([\d.]+) GB +([\d.]+) GB +([\d.]+) GB +([\d.]+) GB$", found, re.MULTILINE
    )
    assert [row[0] for row in rows] == [*"01234567", "all"]
    assert rows[-1][1] == rows[-1][4] == "141"
    assert re.search(r"8 ranks, exchange collective, writers nearest", found)
    assert re.search(r"memory per rank: 256 MiB \(least that works: \d+ MiB\)", found)
    assert re.search(NANOTRON_NOTE, found)
    feeds = dict(re.findall(r"^(\S+) <- (.*)$", found, re.MULTILINE))
    folder = "model/model/token_position_embeddings/pp_block/token_embedding"
    file = folder + "/model_weight_pp-rank-0-of-1_tp-rank-{}-of-4.safetensors"
    assert feeds[file.format(0)] == "consolidated.00.pth, consolidated.01.pth"
    assert feeds[file.format(3)] == "consolidated.06.pth, consolidated.07.pth"
    assert re.search(r"and 1,4\d\d more files", found)
    assert re.search(
        r"1 ranks, exchange direct, writers the readers",
        done("plan", *words, "engine.exchange=direct").out,
    )


HINTS = ("uneven: ", "too little memory: ", "nodes of ")


@pytest.mark.parametrize(
    ("world", "more", "hints"),
    [
        (7, (), {"uneven: "}),
        (4, (), set()),
        (7, ("engine.exchange=direct",), set()),
        (2, ("engine.memory=13MiB",), {"too little memory: "}),
        (16, (), {"nodes of "}),
        (16, ("engine.shared_files=never",), set()),
        (16, ("engine.shared_files=always",), set()),
    ],
)
def test_a_plan_says_what_could_be_better(world: int, more: tuple[str, ...], hints: set[str]):
    words = ("plan", "--src", "meta8", "--dst", "hf", "src.model=llama3.2-1b", *more)
    found = done(*words, "--world", world).out
    assert {hint for hint in HINTS if f"\n{hint}" in found} == hints


def test_a_plan_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("meta8", tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    done("plan", *move("meta8", source, "tp4", tmp_path / "dst"))
    done("plan", "--src", "meta8", "--dst", "tp4", "src.model=llama3-8b")
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("kind", [name for name in TOPOLOGIES if name not in ("dcp", "statedict")])
def test_every_shipped_topology_is_a_source_and_a_target(kind: str) -> None:
    name = "llama2-7b" if kind not in ("tp2pp5", "pp10") else "llama3-70b"
    for source, target in ((kind, "hf"), ("hf", kind)):
        found = done("plan", "--src", source, "--dst", target, f"src.model={name}").out
        assert re.match(
            rf"{source.replace('pp10', r'tp1pp10')} .*-> {target.replace('pp10', 'tp1pp10')} ",
            found,
        ), found


def test_a_layout_that_only_files_tell_is_a_source_with_a_path(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"--src: only the files tell whether it is fsdp or titan; give src.path=DIR",
        *("plan", "--src", "dcp", "--dst", "hf", "src.model=llama2-7b"),
    )
    refused(
        tmp_path,
        r"--dst: fsdp or titan\? name a topology of one of them",
        *("plan", "--src", "hf", "--dst", "dcp", "src.model=llama2-7b"),
    )


def test_a_model_may_be_a_file(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    by_file = done(
        "plan", "--src", "meta8", "--dst", "tp4", f"src.model={source / 'config.json'}"
    ).out
    assert by_file == done("plan", "--src", "meta8", "--dst", "tp4", f"src.model={source}").out
    assert "2 layers, width 64, 16 heads, 8 key-value heads" in by_file


def test_a_model_may_be_a_params_json(tmp_path: Path) -> None:
    """design.md, section 4: src.model is a name, or the path of a config.json/params.json."""
    source = write("meta8", tmp_path / "src")
    found = done(
        "plan", "--src", "meta8", "--dst", "tp4", f"src.model={source / 'params.json'}"
    ).out
    assert "2 layers, width 64, 16 heads, 8 key-value heads" in found


# Topologies: by file, with other numbers, by directory, and like another.


def test_a_job_file_says_the_same_as_flags(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    job = {
        "src": {"topology": "meta8", "path": str(source)},
        "dst": {"topology": "hf", "path": str(tmp_path / "two"), "max_shard_size": "60KB"},
        "engine": {"memory": "64MiB", "exchange": "direct", "fsync": False, "timeout": 60},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done(*move("meta8", source, "hf", tmp_path / "one", "dst.max_shard_size=60KB"))
    done("--config", tmp_path / "job.yaml")
    assert_same_files(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    done(
        "--config",
        tmp_path / "job.yaml",
        f"dst.path={tmp_path / 'three'}",
        "dst.max_shard_size=1GB",
    )
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 1, "words go before the file"
    del job["dst"]["max_shard_size"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done("--config", tmp_path / "job.yaml", "--dst", "tp2", f"dst.path={tmp_path / 'four'}")
    assert_same(read("tp2", tmp_path / "four"), model())


def test_a_key_that_the_format_does_not_know_is_refused(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    for target, key in (("hf", "dst.rope_interleaved=true"), ("tp2", "dst.max_shard_size=1MB")):
        words = move("meta8", source, target, tmp_path / "dst", key)
        refused(tmp_path, rf"{key.partition('=')[0]} does not apply to \w+ as a target", *words)
    words = move("meta8", source, "hf", tmp_path / "dst", "src.rope_interleaved=true")
    refused(tmp_path, r"src.rope_interleaved does not apply to meta as a source", *words)


def test_a_topology_may_be_a_yaml_file(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    (tmp_path / "mine.yaml").write_text(
        f"format: nanotron\nmesh: {{tp: 2, pp: 2}}\npath: {tmp_path / 'dst'}\n"
        "rope_interleaved: true\n"
    )
    (tmp_path / "from.yml").write_text(f"format: meta\npath: {source}\n")
    done("--src", tmp_path / "from.yml", "--dst", tmp_path / "mine.yaml")
    assert_same(read("tp2", tmp_path / "dst"), model())
    assert nanotron.topology(tmp_path / "dst") == (2, 2)
    assert (
        json.loads((tmp_path / "dst" / "model_config.json").read_text())["rope_interleaved"] is True
    )
    (tmp_path / "bad.yaml").write_text("format: nanotron\nmesh: {tp: 2, ppp: 2}\n")
    refused(
        tmp_path,
        r"`dst.mesh.ppp`: did you mean `pp`",
        "--src",
        source,
        "--dst",
        tmp_path / "bad.yaml",
    )
    (tmp_path / "bad.yaml").write_text("format: nanotron\npadding: 3\n")
    refused(tmp_path, r"unknown key `dst.padding`", "--src", source, "--dst", tmp_path / "bad.yaml")


def test_names_may_have_other_numbers(tmp_path: Path) -> None:
    held = models.model_a()
    source = write("meta3", tmp_path / "src", held)
    assert not {"meta3", "meta6", "tp3pp2", "tp6"} & set(TOPOLOGIES)
    for target in ("tp3pp2", "tp6", "meta6", "tp3pp2dp2"):
        found = done(*move("meta3", source, target, tmp_path / target))
        assert f"meta3 -> {target} in" in found.last
        assert_same(read(target, tmp_path / target), held)
    assert nanotron.topology(tmp_path / "tp3pp2") == (3, 2)
    assert len(list((tmp_path / "meta6").glob("*.pth"))) == 6


def test_a_source_may_be_a_directory(tmp_path: Path) -> None:
    sources = {
        "meta8": write("meta8", tmp_path / "meta8"),
        "hf": write("hf2", tmp_path / "hf"),
        "tp2pp2": write("tp2pp2", tmp_path / "run" / "10"),
    }
    sources["tp2pp2 "] = tmp_path / "run"
    for kind, source in sources.items():
        target = tmp_path / f"from {kind} {source.name}"
        found = done("--src", source, "--dst", "tp4", f"dst.path={target}")
        assert f"{kind.strip()} -> tp4 in" in found.last
        assert_same(read("tp4", target), model())


def test_a_run_folder_means_its_latest_step(tmp_path: Path) -> None:
    old, new = model(), model(rms_norm_eps=1e-6)
    write("tp2", tmp_path / "run" / "20", old)
    write("tp2", tmp_path / "run" / "9", new)
    assert (tmp_path / "run" / "latest.txt").read_text() == "9"
    done("--src", tmp_path / "run", "--dst", "hf", f"dst.path={tmp_path / 'dst'}")
    assert read("hf", tmp_path / "dst").config["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize("kind", ["tp2pp2", "meta4", "hf"])
def test_a_target_may_be_like_another_checkpoint(kind: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    sample = tmp_path / "sample"
    if kind == "tp2pp2":
        nanotron.write(model(), sample, 2, 2, rope_interleaved=True)
    elif kind == "meta4":
        meta.write(model(), sample, 4, embedding_dim=1)
    else:
        hf.write(model(), sample)
    done("--src", source, f"dst.like={sample}", f"dst.path={tmp_path / 'dst'}")
    assert_same(read(kind, tmp_path / "dst"), model())
    weights = {name for name in files_in(sample) if name.endswith((".pth", ".safetensors"))}
    assert weights <= files_in(tmp_path / "dst")
    if kind == "tp2pp2":
        assert json.loads((tmp_path / "dst" / "model_config.json").read_text())["rope_interleaved"]
    if kind == "meta4":
        shard = meta.load(tmp_path / "dst" / "consolidated.00.pth")
        assert shard["tok_embeddings.weight"].shape == (128, 16)


def test_configs_are_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = done("plan", "--src", "meta8", "--dst", "tp4", "src.model=llama3-8b").out
    monkeypatch.chdir(tmp_path)
    assert done("plan", "--src", "meta8", "--dst", "tp4", "src.model=llama3-8b").out == expected


def test_a_directory_that_is_called_like_a_topology_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("meta8", tmp_path / "meta8")
    monkeypatch.chdir(tmp_path)
    done("--src", "meta8", "--dst", "tp4", "src.path=meta8", "dst.path=dst")
    assert_same(read("tp4", tmp_path / "dst"), model())
    done("--src", f"./{source.name}", "--dst", "tp4", "dst.path=other")
    assert_same_files(tmp_path / "other", tmp_path / "dst")


# The report.


@pytest.mark.parametrize("world", [1, 2])
def test_the_report_has_the_figures_of_the_contract(world: int, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = [
        *move("meta8", source, "tp4", tmp_path / "dst"),
        "--report",
        str(tmp_path / "report.json"),
    ]
    if world == 1:
        done(*words)
    else:
        assert jobs.finished(world, words, tmp_path / "said").wait(0) == [0] * world
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    expected = {"source", "target", "world", "exchange", "writers", "seconds", "bytes"}
    expected |= {"peak_rss", "import_rss", "balance", "blocks"}
    assert expected <= report.keys()
    assert set(report["seconds"]) == {"plan", "move", "commit", "total"}
    keys = {"read", "exchanged", "written"}
    assert set(report["bytes"]) == keys | {f"{key}_bound" for key in keys} | {"resumed", "copied"}
    assert (report["source"], report["target"], report["world"]) == ("meta8", "tp4", world)
    assert (report["exchange"], report["writers"]) == ("collective", "nearest")
    assert set(report["peak_rss"]) == set(report["import_rss"]) == {str(r) for r in range(world)}
    assert all(report["peak_rss"][r] >= report["import_rss"][r] > 10**7 for r in report["peak_rss"])
    found, held = report["bytes"], model()
    stored = sum(t.numel() * 2 * (8 if "norm" in n else 1) for n, t in held.tensors.items())
    files = sum((tmp_path / "dst" / name).stat().st_size for name in files_in(tmp_path / "dst"))
    assert found["read"] == found["read_bound"] == stored
    assert found["written_bound"] == files
    assert found["written"] == files
    assert found["exchanged"] == found["exchanged_bound"]
    assert (found["exchanged"] > 0) == (world > 1)
    assert found["resumed"] == 0
    assert report["blocks"] > 20


def test_a_report_that_cannot_be_written_is_said_before_anything_is_moved(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "tp4", tmp_path / "dst")
    found = call(*words, "--report", tmp_path / "no" / "report.json")
    assert found.code in (1, 2)
    line = one_line(found.err)
    assert "report.json" in line
    assert "unexpected" not in line
    assert not (tmp_path / "dst").exists()


def test_a_report_is_refused_before_the_job(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    words = move("meta8", source, "tp4", tmp_path / "dst")
    absent = tmp_path / "no" / "report.json"
    refused(tmp_path, r"--report: `\S+no/report.json`: its dir", *words, "--report", absent)
    refused(tmp_path, r"--report: `\S+` is a directory", *words, "--report", tmp_path)
    job = jobs.finished(2, [*words, "--report", str(absent)], tmp_path / "said")
    assert job.wait(0) == [2, 2]
    assert "--report" in one_line(job.err)


def test_a_refused_job_leaves_no_report(tmp_path: Path) -> None:
    words = move("meta8", tmp_path / "gone", "tp4", tmp_path / "dst")
    refused(tmp_path, r"gone", *words, "--report", tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device without space")
def test_a_report_that_fails_in_the_end_is_named(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    found = call(*move("meta8", source, "tp4", tmp_path / "dst"), "--report", "/dev/full")
    assert found.code == 1
    assert re.search(r"`/dev/full`: cannot report on .*dst`, which is comp", one_line(found.err))
    done("verify", tmp_path / "dst")


# The demo.


def test_without_paths_there_is_a_demo_that_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = done("--src", "meta8", "--dst", "tp4")
    assert first.out.startswith("DEMO: no paths given"), first.out
    assert first.last.startswith("done: ")
    assert os.listdir(tmp_path) == ["reshard-demo"]
    source = next((tmp_path / "reshard-demo").glob("source-*"))
    target = next((tmp_path / "reshard-demo").glob("target-*"))
    assert_same(read("tp4", target), meta.read(source))
    again = done("--src", "meta8", "--dst", "tp4")
    assert again.out.startswith("DEMO: no paths given"), again.out
    assert again.last.startswith("already done: ")
    assert re.match("DEMO", done("--src", "tp2pp2", "--dst", "hf").out)


# Small files.


def test_small_files_find_their_place_and_the_way_back(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    root = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "x"}
    for name, text in root.items():
        (source / name).write_text(text)
    (source / "LICENSE.txt").write_text("be good")
    (source / "pytorch_model.bin").write_text("not this one")
    chain = [("hf", "meta4"), ("meta4", "tp2"), ("tp2", "hf")]
    here = source
    for kind, target in chain:
        done(*move(kind, here, target, tmp_path / f"as-{target}"))
        here = tmp_path / f"as-{target}"
        for name, text in root.items():
            place = here / name if target == "hf" else here / "assets" / name
            assert place.read_text() == text, f"{name} in {target}"
        assert (here / "LICENSE.txt").read_text() == "be good"
        assert "pytorch_model.bin" not in {Path(name).name for name in files_in(here)}
        done("verify", here)
    assert not (here / "assets").exists()
    assert_same(read("hf", here), model())


def test_a_tokenizer_model_stays_at_the_root_where_it_means_the_same(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    (source / "tokenizer.model").write_text("ranks")
    for kind, name in (
        ("hf", "tokenizer.model"),
        ("meta4", "tokenizer.model"),
        ("tp2", "assets/tokenizer.model"),
    ):
        done(*move("meta8", source, kind, tmp_path / kind))
        assert (tmp_path / kind / name).read_text() == "ranks"


def test_generation_settings_of_the_source_go_before_made_ones(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    done(*move("hf", source, "hf", tmp_path / "dst", "dst.max_shard_size=60KB"))
    assert json.loads((tmp_path / "dst" / "generation_config.json").read_text()) == {
        "temperature": 0.6
    }
    shutil.rmtree(source)
