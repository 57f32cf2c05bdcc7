"""`verify --load`: the libraries of the targets open them, and what they give is checked."""

import importlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from reshard import containers, loading, transformed
from reshard.containers import Entry, FileIndex
from reshard.errors import VerifyError
from tests import jobs
from tests.commands import call, done, model, move, one_line, refused, write
from tests.oracles.bytelevel import llama3
from tests.oracles.compare import files_in

pytest.importorskip("gguf")

# For each target: its keys, the library, and the tensors that are to be counted.
TARGETS = {
    "meta2": (("meta2",), "torch.load", "2 files, 42 tensors"),
    "hf": (("hf", "dst.max_shard_size=200KB"), "safetensors.safe_open", "2 files, 21 tensors"),
    "tp2pp2": (("tp2pp2",), "safetensors.safe_open", "25 files, 25 tensors"),
    "fsdp3": (("fsdp3",), "torch.distributed.checkpoint.load", "3 files, 21 tensors"),
    "titan2": (("titan2",), "torch.distributed.checkpoint.load", "2 files, 21 tensors"),
    "gguf": (("gguf", "dst.dtype=bfloat16"), "gguf.GGUFReader", "1 files, 21 tensors"),
    "q8_0": (("gguf", "dst.dtype=q8_0"), "gguf.GGUFReader", "1 files, 21 tensors"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of every format, of a model with a tokenizer."""
    root = tmp_path_factory.mktemp("load")
    source = write("hf2", root / "src", model(intermediate_size=192, vocab_size=352))
    llama3(source)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    for name, ((spec, *more), _, _) in TARGETS.items():
        done(*move("hf", source, spec, root / name, "engine.fsync=false", *more))
    return {name: root / name for name in (*TARGETS, "src")}


def without_manifest(target: Path, place: Path) -> Path:
    """A copy of a target that says nothing of its bytes."""
    shutil.copytree(target, place)
    for manifest in place.rglob("reshard.json"):
        manifest.unlink()
    return place


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_opened_by_its_own_library(
    target: str, made: dict[str, Path], tmp_path: Path
) -> None:
    _, library, counted = TARGETS[target]
    said = done("verify", made[target], "--load").out
    assert re.match(r"verified: \d+ files, \S+ KB agree with reshard.json in .*\n", said)
    line = rf"(?m)^loaded: {counted} by {re.escape(library)} \(\w+ [\w.+]+\)$"
    assert re.search(line, said), said
    bare = without_manifest(made[target], tmp_path / target)
    extra = ("src.tied=false",) if target == "titan2" else ()
    given = ("src.model=" + str(made["src"] / "config.json"),) if target in ("titan2",) else ()
    said = done("verify", "--load", bare, *given, *extra).out
    assert re.search(line, said), said
    assert "verified" not in said


def test_transformers_reads_config_names_and_tokenizer(made: dict[str, Path]) -> None:
    said = done("verify", made["hf"], "--load").out.splitlines()
    assert re.fullmatch(
        r"loaded: LlamaConfig, LlamaForCausalLM with 21 names, \w+ by transformers [\d.]+", said[-1]
    ), said
    assert not any("transformers" in line for line in done("verify", made["tp2pp2"], "--load").out)


def test_a_tied_output_is_no_missing_name(tmp_path: Path) -> None:
    source = write("meta2", tmp_path / "src", model(tied=True))
    done(*move("meta2", source, "hf", tmp_path / "hf"))
    assert "LlamaForCausalLM with 20 names" in done("verify", tmp_path / "hf", "--load").out


def test_ranks_share_the_files(made: dict[str, Path], tmp_path: Path) -> None:
    for target in ("tp2pp2", "fsdp3"):
        alone = done("verify", made[target], "--load").out
        job = jobs.finished(2, ["verify", str(made[target]), "--load"], tmp_path / target)
        assert (job.wait(0), job.err, job.out) == ([0, 0], "", alone)


# Damage that only a library sees, since nothing here reads what is damaged.


def edited(path: Path, **changes: object) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


def test_a_config_that_transformers_cannot_use_is_named(
    made: dict[str, Path], tmp_path: Path
) -> None:
    bare = without_manifest(made["hf"], tmp_path / "hf")
    edited(bare / "config.json", hidden_act="no such function")
    pattern = r"transformers cannot make a LlamaForCausalLM of config.json: .*no such function"
    refused(bare, pattern, "verify", bare, "--load", code=1)


@pytest.mark.parametrize(
    "name", ["LlamaForAll", "logging", "is_torch_available", "LlamaConfig", "PreTrainedConfig"]
)
def test_an_architecture_that_is_no_model_of_transformers_is_named(
    name: str, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transformers.AutoConfig.from_pretrained

    def other(*given: Any, **named: Any) -> Any:
        config = real(*given, **named)
        config.architectures = [name]
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", other)
    said = rf"transformers has no model `{name}`, which config.json names"
    refused(made["hf"], said, "verify", made["hf"], "--load", code=1)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([5], r"has no model `5`, which"),
        (["__doc__"], r"has no model `__doc__`, which"),
        (["a\x1bb"], r"has no model `a\\x1bb`, which"),
    ],
)
def test_an_architecture_may_be_anything(names: list[object], said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        transformed._class(transformers, names)


def test_a_config_that_names_no_architecture_makes_the_usual_one(
    made: dict[str, Path], tmp_path: Path
) -> None:
    bare = without_manifest(made["hf"], tmp_path / "hf")
    edited(bare / "config.json", architectures=None)
    said = done("verify", bare, "--load").out
    assert "loaded: LlamaConfig, AutoModelForCausalLM with 21 names" in said


def test_names_and_shapes_are_those_that_transformers_has(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, changes = transformers.AutoConfig.from_pretrained, dict[str, Any]()

    def other(*given: Any, **named: Any) -> Any:
        config = real(*given, **named)
        for key, value in changes.items():
            setattr(config, key, value)
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", other)
    for change, said in (
        ({"intermediate_size": 96}, r"has `\S+` as \[[\d, ]*96[\d, ]*\], the files as \[\d"),
        ({"attention_bias": True}, r"has `\S+.bias` as \[\d+\], the files as nothing"),
        ({"num_hidden_layers": 1}, r"has `model.layers.1.\S+` as nothing, the files as \[\d"),
    ):
        changes.clear()
        changes.update(change)
        refused(made["hf"], f"LlamaForCausalLM {said}", "verify", made["hf"], "--load", code=1)


def test_a_tokenizer_that_transformers_cannot_read_is_named(
    made: dict[str, Path], tmp_path: Path
) -> None:
    bare = without_manifest(made["hf"], tmp_path / "hf")
    edited(bare / "tokenizer.json", model={"type": "BPE"})
    refused(bare, r"transformers cannot read the tokenizer: ", "verify", bare, "--load", code=1)


def test_a_record_that_only_torch_reads_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    bare = without_manifest(made["meta2"], tmp_path / "meta2")
    file = bare / "consolidated.01.pth"
    data = file.read_bytes()
    (at,) = (found.end() - 2 for found in re.finditer(rb"(?s)archive/version.{0,80}?3\n", data))
    file.write_bytes(data[:at] + b"x" + data[at + 1 :])
    done("inspect", bare)
    pattern = r"torch.load \(torch \S+\) cannot open `consolidated.01.pth`: \S"
    refused(bare, pattern, "verify", bare, "--load", code=1)


# Damage that both see is one line too, and an exit code of 1.


@pytest.mark.parametrize("target", TARGETS)
def test_a_cut_file_is_named(target: str, made: dict[str, Path], tmp_path: Path) -> None:
    bare = without_manifest(made[target], tmp_path / target)
    suffixes = (".pth", ".safetensors", ".distcp", ".gguf")
    file = sorted(bare / name for name in files_in(bare) if name.endswith(suffixes))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    found = call("verify", bare, "--load", f"src.model={made['src'] / 'config.json'}")
    # a .metadata that does not fit its files is no checkpoint of any format
    assert found.code == (2 if file.suffix == ".distcp" else 1), found.out + found.err
    assert file.name in one_line(found.err)


# What a library gives is compared with what is indexed here.


def shifted(entry: Entry) -> Entry:
    return replace(entry, offset=entry.offset - 2)


def turned(entry: Entry) -> Entry:
    return replace(entry, shape=entry.shape[::-1], strides=(entry.shape[0], 1))


def retyped(entry: Entry) -> Entry:
    return replace(entry, dtype=torch.float16)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shifted, r"other bytes than those that begin at byte \d+"),
        (turned, r" as \w+ \[(\d+), (\d+)\], expected \w+ \[\2, \1\]"),
        (retyped, r" as \w+ \[[\d, ]+\], expected (float16|q8_0) \["),
    ],
)
def test_an_index_that_is_wrong_is_found(
    target: str, change: object, said: str, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if change is retyped and target == "q8_0":
        pytest.skip("what is stored in codes has no dtype of its own")
    real, chosen = containers.index, []

    def index(container: str, root: Path, file: str) -> FileIndex:
        found = real(container, root, file)
        entries: Mapping[str, Entry] = found.entries
        keys = [key for key in entries if "down" in key or "w2" in key or key == "data"]
        chosen.extend(key for key in keys if len(entries[key].shape) == 2)
        wrong = {key: change(entries[key]) for key in chosen[:1] if key in entries}  # type: ignore
        return replace(found, entries={**entries, **wrong})

    monkeypatch.setattr(loading.containers, "index", index)
    monkeypatch.setattr(loading, "_scan", lambda path, options: scanned)
    monkeypatch.setattr(containers, "index", real)
    scanned = loading.formats.detect(made[target]).scan(made[target], loading.Options())
    monkeypatch.setattr(containers, "index", index)
    with pytest.raises(loading.VerifyError, match=said):
        loading.load(made[target], loading.Options(), loading.Ranks())


def test_a_tensor_that_a_library_does_not_find_is_named(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = loading.LIBRARIES["torchfile"]
    real = loading.by_torch

    def fewer(path: Path, index: FileIndex) -> object:
        return (given for given in real(path, index) if given.key != "norm.weight")

    less = replace(held, check=loading._file_by_file(fewer))  # type: ignore[arg-type]
    monkeypatch.setitem(loading.LIBRARIES, "torchfile", less)  # type: ignore[arg-type]
    pattern = r"`consolidated.00.pth`: torch.load \(torch \S+\) finds no tensor `norm.weight`"
    refused(made["meta2"], pattern, "verify", made["meta2"], "--load", code=1)


# Optional packages.


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def lacking(asked: str, package: str | None = None) -> ModuleType:
        if asked == name:
            raise ImportError(name)
        return real(asked, package)

    monkeypatch.setattr(importlib, "import_module", lacking)


def test_what_is_not_installed_is_named(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("gguf", monkeypatch)
    refused(made["gguf"], r"--load: .*pip install gguf", "verify", made["gguf"], "--load")
    without("transformers", monkeypatch)
    said = done("verify", made["hf"], "--load").out
    assert said.endswith("config and tokenizer were not tried: pip install transformers\n")
