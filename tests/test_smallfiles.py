"""Small files of a target: what is converted, what is said of it, and how a conversion may end."""

import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from reshard import conversions, formats, smallfiles
from reshard.errors import CheckpointError, StorageError
from reshard.families.model import ModelConfig
from reshard.formats.options import Options, Scan
from reshard.smallfiles import Alone, Facts, SmallFiles, gather
from reshard.tokenizers import __main__ as entry
from reshard.tokenizers import child
from tests.commands import SIZES, call, done, move, one_line, write
from tests.jobs import finished
from tests.oracles import models

BF16 = torch.bfloat16
SPECIALS = {120: "<s>", 121: "<end>", 122: "<turn>", 123: "<pad>"}
IDS = {"bos_token_id": 120, "eos_token_id": [122, 121], "pad_token_id": 123}
TOKENIZER = {
    "added_tokens": [{"id": n, "content": text, "special": True} for n, text in SPECIALS.items()],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {chr(97 + n): n for n in range(26)}, "merges": []},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with tokenizer.json, whose special tokens only the config names."""
    path = write(
        "hf", tmp_path_factory.mktemp("plain") / "hf", models.build(SIZES, False, BF16, IDS)
    )
    (path / "generation_config.json").unlink()
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return path


@pytest.fixture(scope="module")
def in_header(plain: Path) -> Path:
    """The same as GGUF."""
    done(*move("hf", plain, "gguf", target := plain.parent / "gguf"))
    return target


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def scan_of(path: Path) -> Scan:
    return formats.detect(path).scan(path, Options())


def gathered(path: Path, target: str, meeting: Alone | None = None) -> SmallFiles:
    scan = scan_of(path)
    return gather(scan, formats.named(target), scan.model, meeting or Alone())


def copied(path: Path, to: Path, **texts: str) -> Path:
    """A directory of links to the files of another, with some texts of its own."""
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).symlink_to(file)
    for name, text in texts.items():
        (to / name.replace("__", ".")).unlink(missing_ok=True)
        (to / name.replace("__", ".")).write_text(text)
    return to


# In the header.


def test_a_header_has_the_ids_of_the_models_config(in_header: Path) -> None:
    fields = GGUFReader(next(in_header.glob("*.gguf"))).fields
    found = {key.split(".")[-1]: f.contents() for key, f in fields.items() if "_token_id" in key}
    assert found == {"bos_token_id": 120, "eos_token_id": 122, "padding_token_id": 123}


class Watched(Alone):
    """Notes what is said while something is under way."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str) -> None:
        self.said.append(name)

    def step(self) -> None:
        self.said.append("step")


def test_a_conversion_shows_that_it_gets_on_and_is_told_apart(
    plain: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "STEP_SECONDS", 0.01)
    found = gathered(plain, "gguf", watched := Watched())
    assert found.facts.inside == ("tokenizer.ggml",)
    assert "tokenizer.ggml" not in found.facts.names
    first, *steps, last = watched.said
    assert (first, set(steps), last) == ("tokenizer", {"step"}, "plan")
    assert len(steps) > 1
    assert len(list(scratch.iterdir())) == 1
    smallfiles.discard_scratch()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_a_tokenizer_inside_the_source_is_told_of(
    in_header: Path, tmp_path: Path, target: str
) -> None:
    (tmp_path / "gguf").mkdir()
    for file in in_header.glob("*.gguf"):
        (tmp_path / "gguf" / file.name).symlink_to(file)
    facts = gathered(tmp_path / "gguf", target).facts
    assert facts.inside == ()
    [note] = facts.notes
    assert note.startswith("target: the tokenizer in the header of the source is not converted; ")
    assert "src.assets=DIR" in note


def test_without_any_tokenizer_that_is_said(plain: Path, tmp_path: Path) -> None:
    source = copied(plain, tmp_path / "hf")
    (source / "tokenizer.json").unlink()
    assert "the source has no tokenizer" in gathered(source, "gguf").facts.notes[0]
    assert gathered(source, "hf").facts == Facts((), gathered(source, "hf").facts.digest)


def test_a_release_brings_its_template_with_a_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def noted(task: str, arguments: Any, folder: Path, *_: object) -> None:
        asked.append(arguments["template"])
        (folder / "result.json").write_text('{"count": 0, "notes": []}')
        (folder / "tokenizer.kv").write_bytes(b"")

    monkeypatch.setattr(child, "run_child", noted)
    (tmp_path / "tokenizer.model").write_bytes(bytes([0x0A, 9, 0x0A, 5, *b"<unk>"]))
    held = {"tokenizer.model": tmp_path / "tokenizer.model"}
    sizes = {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128}
    base = ModelConfig("llama", **sizes, intermediate=11008, vocab=32000, norm_eps=1e-5)
    for number, model in enumerate((base, replace(base, generation={"do_sample": True}))):
        (tmp_path / str(number)).mkdir()
        conversions.to_header(held, model, tmp_path / str(number))
    assert [bool(template) for template in asked] == [False, True]


def test_what_is_made_on_the_way_to_a_header_never_goes_into_the_source(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"tokenizer_config.json": '{"eos_token": "mine"}', "tokenizer.model": "IQ== 0\n"}
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    staged: dict[str, str] = {}

    def run_child(task: str, arguments: dict[str, Any], folder: Path, *others: object) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json") if task == "tiktoken" else ():
            (folder / name).write_text("made")
        if task == "header":
            paths = Path(arguments["folder"]).iterdir()
            staged.update({path.name: path.read_text() for path in paths})
            (folder / "tokenizer.kv").write_bytes(b"keys")
            (folder / "result.json").write_text('{"count": 1, "notes": []}')

    monkeypatch.setattr(child, "run_child", run_child)
    monkeypatch.setattr(conversions.releases, "recognise", lambda model: (LLAMA_3, False))
    (tmp_path / "out").mkdir()
    held = {name: tmp_path / name for name in own}
    conversions.to_header(held, scan_of(plain).model, tmp_path / "out")
    assert staged == {**own, "tokenizer.json": "made"}
    assert {name: (tmp_path / name).read_text() for name in own} == own


LLAMA_3 = conversions.releases.RELEASES["3"]


# Beside the weights.


@pytest.mark.parametrize(
    "beside", ["", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
)
def test_only_a_trained_model_alone_is_converted(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """What transformers reads as it is keeps the tokens that were added."""
    source = copied(plain, tmp_path / "hf", tokenizer__model="\n\x05\n\x03<s>")
    (source / "tokenizer.json").unlink()
    if beside:
        (source / beside).write_text("{}")
    asked: list[Path] = []

    def convert(file: Path, *others: object) -> tuple[str, ...]:
        asked.append(file)
        return ()

    monkeypatch.setattr(conversions, "to_huggingface", convert)
    names = gathered(source, "hf").facts.names
    assert asked == ([] if beside else [source / "tokenizer.model"])
    assert set(names) == {"tokenizer.model", beside} - {""}


# How a conversion may end.


def test_a_broken_tokenizer_is_warned_of_alike_wherever_it_is_tried(
    plain: Path, tmp_path: Path, scratch: Path
) -> None:
    manifests = []
    for name in ("one", "two"):
        source = copied(plain, tmp_path / name, tokenizer__json="{")
        call(*move("hf", source, "gguf", target := tmp_path / f"{name}-gguf"))
        manifests.append(json.loads((target / "reshard.json").read_text()))
    [note] = [text for text in manifests[0]["notes"] if "no tokenizer is made" in text]
    assert note.startswith("warning: no tokenizer is made: `tokenizer.json`: no JSON that can be")
    assert str(tmp_path) not in json.dumps(manifests)
    assert manifests[0] == manifests[1]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("import os; os._exit(3)", r"failed \(exit code 3\): no message; try again"),
        ("import os; os.kill(os.getpid(), 9)", r"was killed by signal 9: no message"),
        ("print('{}')", r"failed \(exit code 0\)"),
        ("""print('{"failed": "No space left on device"}')""", r"No space left on device; try"),
    ],
)
def test_a_conversion_that_dies_ends_the_job(
    plain: Path,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    said: str,
) -> None:
    monkeypatch.setattr(child, "START", start)
    found = call(*move("hf", plain, "gguf", tmp_path / "gguf"))
    assert found.code == 1
    assert re.search(rf"making the tokenizer in the header .*{said}", one_line(found.err))
    assert not (tmp_path / "gguf").exists()
    assert not list(scratch.iterdir())


def test_an_outcome_is_the_last_line_whatever_is_printed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        child, "START", r"""print('{"done": 1}\n{x\n{"wrong": "a {b} {\\"c\\": 1}"}')"""
    )
    with pytest.raises(CheckpointError, match=r'^a \{b\} \{"c": 1\}$'):
        child.run_child("header", {}, tmp_path, "it")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(28, "No space left on device", "/a/b"), {"failed": "No space left on device"}),
        (ImportError("no x from y (/a b/y.py)"), {"missing": "no x from y"}),
        (CheckpointError("`x`: {}"), {"wrong": "`x`: {}"}),
    ],
)
def test_faults_of_a_file_a_disk_and_an_installation_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: dict[str, str]
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("reshard.tokenizers.gguf.run", fail)
    job = {"task": "header", "arguments": {}, "folder": str(tmp_path)}
    assert entry._outcome(job) == outcome


SLEEP = "import os, sys, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"


def ended(pid_file: Path) -> bool:
    """Whether a process is gone that has left its number."""
    return not Path("/proc", pid_file.read_text()).exists()


def test_a_conversion_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "START", SLEEP.format(str(tmp_path / "pid")))
    monkeypatch.setattr(child, "LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(child, "STEP_SECONDS", 0.1)
    steps: list[float] = []
    with pytest.raises(StorageError, match=r"making it did not end within 1 s; .* left out$"):
        child.run_child("header", {}, tmp_path, "it", lambda: steps.append(time.monotonic()))
    assert len(steps) > 3
    assert ended(tmp_path / "pid")


def test_a_conversion_ends_with_who_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "START", SLEEP.format(str(tmp_path / "pid")))
    monkeypatch.setattr(child, "STEP_SECONDS", 0.05)

    def interrupt() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.run_child("header", {}, tmp_path, "it", interrupt)
    assert ended(tmp_path / "pid")


def test_modules_of_the_working_directory_are_not_taken(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "gguf.py", "reshard.py"):
        (tmp_path / name).write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    arguments = {"folder": str(plain), "vocab": 128, "ids": {}}
    child.run_child("header", arguments, tmp_path, "it")
    assert json.loads((tmp_path / "result.json").read_text())["count"] > 5


def use(rank: int, folder: str) -> None:
    """Have this rank make its temporary directories in `folder`."""
    tempfile.tempdir = folder


@pytest.mark.parametrize("in_the_way", [False, True])
def test_ranks_leave_nothing_behind(plain: Path, tmp_path: Path, in_the_way: bool) -> None:
    target, scratch = tmp_path / "gguf", tmp_path / "scratch"
    scratch.mkdir()
    if in_the_way:
        target.mkdir()
        (target / "else").write_text("x")
    command = move("hf", plain, "gguf", target)
    job = finished(2, command, tmp_path / "said", use, str(scratch))
    assert any(job.wait(1)) == in_the_way, job.err
    assert not list(scratch.glob("reshard-*"))
