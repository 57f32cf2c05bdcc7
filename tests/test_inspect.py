"""What `inspect` tells of a directory."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from reshard import damage, journal
from tests.commands import call, done, model, move, refused, write
from tests.oracles import meta, nanotron

PARAMETERS = sum(tensor.numel() for tensor in model().tensors.values())


@pytest.mark.parametrize(
    ("kind", "files", "mesh", "rope"),
    [
        ("meta8", 8, {"tp": 8, "pp": 1, "dp": 1}, "interleaved rows"),
        ("hf2", 2, {"tp": 1, "pp": 1, "dp": 1}, "half rows"),
        ("tp2pp2", 25, {"tp": 2, "pp": 2, "dp": 1}, "half rows"),
    ],
)
def test_the_facts_of_every_format_are_told(
    kind: str, files: int, mesh: dict[str, int], rope: str, tmp_path: Path
) -> None:
    source = write(kind, tmp_path / "src")
    found = json.loads(done("inspect", source, "--json").out)
    assert found["format"] == {"m": "meta", "h": "hf", "t": "nanotron"}[kind[0]]
    assert found["layout"] == kind.replace("hf2", "hf")
    assert found["mesh"] == mesh
    assert (
        found["files"]
        == len([f for f in source.rglob("*") if f.suffix in (".pth", ".safetensors")])
        == files
    )
    assert (found["family"], found["dtypes"], found["tied"]) == ("llama", ["bfloat16"], False)
    assert found["parameters"] == PARAMETERS
    assert found["rope"] == rope
    assert (found["healthy"], found["problems"], found["manifest"]) == (True, [], False)
    assert found["missing"] == ["tokenizer"]
    sizes = {
        "hidden": 64,
        "layers": 2,
        "heads": 16,
        "kv_heads": 8,
        "intermediate": 176,
        "vocab": 128,
    }
    assert {key: found["model"][key] for key in sizes} == sizes


def test_the_text_says_the_same(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    out = done("inspect", source).out
    assert out.startswith(f"{source}: meta8\n")
    assert (
        "llama: 2 layers, width 64, 16 heads, 8 key-value heads, feed-forward 176, vocabulary 128"
        in out
    )
    assert re.search(
        rf"weights +{PARAMETERS:,} parameters, \S+ KB in 8 files, bfloat16, untied", out
    )
    assert re.search(r"missing +tokenizer\n", out)
    assert re.search(r"health +good\n", out)
    (source / "tokenizer.model").write_text("x")
    assert re.search(r"missing +nothing\n", done("inspect", source).out)


def test_a_run_folder_an_interleaved_and_a_tied_model_are_told(tmp_path: Path) -> None:
    nanotron.write(model(tied=True), tmp_path / "run" / "3", 2, 1, rope_interleaved=True)
    found = json.loads(done("inspect", tmp_path / "run", "--json").out)
    assert (found["layout"], found["tied"], found["rope"]) == ("tp2", True, "interleaved rows")


def test_what_is_left_behind_is_told(tmp_path: Path) -> None:
    step = write("tp2", tmp_path / "3")
    for name in ("optimizer", "lr_scheduler", "random"):
        (step / name).mkdir()
    found = json.loads(done("inspect", step, "--json").out)
    said = done(*move("tp2", step, "hf", tmp_path / "dst")).out
    for word in ("optimizer", "scheduler", "random"):
        assert any(word in line for line in found["left_behind"]), word
        assert re.search(rf"left behind: .*{word}", said), said
    shutil.rmtree(step / "optimizer")
    assert not any(
        "optimizer" in line
        for line in json.loads(done("inspect", step, "--json").out)["left_behind"]
    )


def test_an_output_has_a_manifest(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    done(*move("meta8", source, "tp4", tmp_path / "dst"))
    found = json.loads(done("inspect", tmp_path / "dst", "--json").out)
    assert (found["layout"], found["manifest"], found["healthy"]) == ("tp4", True, True)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("meta8", "consolidated.05.pth"),
        ("hf2", "model-00002-of-00002.safetensors"),
        (
            "tp2pp2",
            "model/model/decoder/0/pp_block/mlp/down_proj/"
            "model_weight_pp-rank-0-of-2_tp-rank-1-of-2.safetensors",
        ),
    ],
)
def test_damage_is_told_and_exits_1(kind: str, file: str, tmp_path: Path) -> None:
    source = write(kind, tmp_path / "src")
    os.truncate(source / file, (source / file).stat().st_size - 1)
    found = call("inspect", source, "--json")
    assert found.code == 1
    told = json.loads(found.out)
    assert told["healthy"] is False
    assert re.search(rf"{Path(file).name}`: .*truncated", told["problems"][0])
    text = call("inspect", source)
    assert text.code == 1
    assert re.search(r"PROBLEM +`.*truncated", text.out)
    assert re.search(r"health +damaged\n", text.out)
    (source / file).unlink()
    missing = call("inspect", source)
    assert missing.code == 1
    assert Path(file).name in missing.out


def checklist(source: Path) -> None:
    """checklist.chk as Meta's download has it."""
    lines = [
        f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}"
        for file in sorted(source.iterdir())
    ]
    (source / "checklist.chk").write_text("\n".join(lines) + "\n")


def test_a_checklist_is_run_when_asked_for(tmp_path: Path) -> None:
    source = write("meta4", tmp_path / "src")
    refused_without = call("inspect", source, "--checksums")
    assert refused_without.code == 1
    assert "checklist.chk` is missing" in refused_without.out
    checklist(source)
    assert "health      good" in done("inspect", source, "--checksums").out
    file = source / "consolidated.02.pth"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert call("inspect", source).code == 0, "headers are good: only the checklist can tell"
    found = call("inspect", source, "--checksums")
    assert found.code == 1
    expected = (
        rf"consolidated.02.pth`: md5 {hashlib.md5(data).hexdigest()}, expected [0-9a-f]{{32}}"
    )
    assert re.search(expected, found.out)
    (source / "checklist.chk").write_text(f"{'0' * 32}  ../elsewhere\n")
    outside = call("inspect", source, "--checksums")
    assert outside.code in (1, 2)
    assert "outside" in outside.out + outside.err


def test_repeated_heads_are_told(tmp_path: Path) -> None:
    meta.write(model(num_key_value_heads=4), tmp_path / "src", 8)
    found = json.loads(done("inspect", tmp_path / "src", "--json").out)
    assert found["model"]["kv_heads"] == 4
    assert any("4 key-value heads, each stored 2 times" in line for line in found["assumed"])


def test_one_directory_is_asked_for(tmp_path: Path) -> None:
    refused(tmp_path, r"inspect: give one directory", "inspect")
    refused(tmp_path, r"inspect: give one directory", "inspect", tmp_path, tmp_path)


def test_what_the_files_do_not_say_can_be_given(tmp_path: Path) -> None:
    nanotron.write(model(), tmp_path / "src", 2, 1, rope_interleaved=True)
    record = json.loads((tmp_path / "src" / "model_config.json").read_text())
    del record["rope_interleaved"]
    (tmp_path / "src" / "model_config.json").write_text(json.dumps(record))
    found = call("inspect", tmp_path / "src")
    assert found.code == 1
    assert "give src.rope_interleaved=true" in found.out
    told = json.loads(done("inspect", tmp_path / "src", "--json", "src.rope_interleaved=true").out)
    assert (told["rope"], told["healthy"]) == ("interleaved rows", True)
    bare = write("hf", tmp_path / "bare")
    config = (bare / "config.json").rename(tmp_path / "config.json")
    assert "src.model=FILE" in call("inspect", bare).out
    assert "health      good" in done("inspect", bare, f"src.model={config}").out
    refused(tmp_path, r"`src.tide`: did you mean `tied`", "inspect", bare, "src.tide=true")


def test_what_cannot_be_scanned_has_a_format_and_problems_only(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    (source / "config.json").unlink()
    found = json.loads(call("inspect", source, "--json").out)
    assert set(found) == {"path", "format", "problems", "beside", "healthy"}
    said = call("inspect", source).out
    assert re.match(rf"{source}: hf\n  manifest    no\n  PROBLEM ", said), said


# All that is damaged, and what unfinished jobs have left.


def problems(path: Path, *words: object) -> list[str]:
    """What `inspect` finds wrong, which it must."""
    found = call("inspect", path, "--json", *words)
    assert (found.code, found.err) == (1, ""), found.err
    said: list[str] = json.loads(found.out)["problems"]
    assert said
    return said


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Targets of ours, with a manifest."""
    root = tmp_path_factory.mktemp("outputs")
    source = write("hf2", root / "src")
    (source / "tokenizer.json").write_text("{}")
    for spec in ("meta4", "hf", "tp2pp2", "fsdp3", "titan2", "gguf"):
        more = ["dst.max_shard_size=60KB"] if spec == "hf" else []
        done(*move("hf", source, spec, root / spec, "engine.fsync=false", *more))
    return {spec: root / spec for spec in ("meta4", "hf", "tp2pp2", "fsdp3", "titan2", "gguf")}


@pytest.mark.parametrize("spec", ["meta4", "hf", "tp2pp2", "fsdp3", "titan2", "gguf"])
def test_every_file_of_ours_that_is_gone_or_cut_is_told(
    spec: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    done("inspect", outputs[spec])
    copy = shutil.copytree(outputs[spec], tmp_path / spec)
    suffixes = (".pth", ".safetensors", ".distcp", ".gguf")
    files = sorted(path for path in copy.rglob("*") if path.suffix in suffixes)
    sizes = {path: path.stat().st_size for path in files}
    for number, path in enumerate(files):
        if number % 3 == 2:
            path.unlink()
        else:
            os.truncate(path, sizes[path] - 1 - number)
    said = problems(copy)
    for number, path in enumerate(files):
        (manifest,) = copy.rglob("reshard.json")
        name = re.escape(str(path.relative_to(manifest.parent)))
        fault = "is missing" if number % 3 == 2 else rf"{sizes[path] - 1 - number} bytes, expected"
        lines = [line for line in said if re.search(rf"`{name}`:? {fault}", line)]
        assert len(lines) == 1, (path, said)
    assert "manifest    yes: verify checks every byte" in call("inspect", copy).out


@pytest.mark.parametrize("kind", ["meta8", "hf4", "tp2pp2"])
def test_every_file_of_others_that_is_cut_is_told(kind: str, tmp_path: Path) -> None:
    source = write(kind, tmp_path / "src")
    files = [path for path in sorted(source.rglob("*")) if path.suffix in (".pth", ".safetensors")]
    for path in files[1:4]:
        os.truncate(path, path.stat().st_size - 1)
    files[4 % len(files)].write_bytes(b"no header")
    said = problems(source)
    for path in {*files[1:4], files[4 % len(files)]}:
        assert any(path.name in line for line in said), (path, said)


def test_every_header_that_is_wrong_is_told(tmp_path: Path) -> None:
    source, other = write("hf4", tmp_path / "src"), write("hf4", tmp_path / "other")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    shutil.copy(other / names[0], source / names[2])
    said = problems(source)
    wrong = [line for line in said if names[2] in line]
    assert len(wrong) > 3, "each tensor that is missing, and each that does not belong there"
    assert all(re.search(r"tensor `\S+` is (missing|not part)", line) for line in wrong), wrong


def test_small_files_that_cannot_be_read_are_told_together(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(outputs["hf"], tmp_path / "hf")
    for name in ("generation_config.json", "tokenizer.json", "config.json"):
        (copy / name).write_text((copy / name).read_text()[:-2] + "}}")
    (copy / "model.safetensors.index.json").write_text("[]")
    (copy / "tokenizer.model").write_text("")
    (copy / "reshard.json").write_bytes((copy / "reshard.json").read_bytes() + b" ")
    said = problems(copy)
    for name, fault in (
        ("generation_config.json", "not valid JSON"),
        ("tokenizer.json", "not valid JSON"),
        ("config.json", "not valid JSON"),
        ("model.safetensors.index.json", "holds list, expected a JSON object"),
        ("tokenizer.model", "is empty"),
        ("reshard.json", "its bytes are not those written"),
    ):
        assert any(re.search(rf"/{name}`: .*{fault}", line) for line in said), (name, said)


def test_files_that_an_index_names_are_told(tmp_path: Path) -> None:
    source = write("hf4", tmp_path / "src")
    gone = sorted(source.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    said = problems(source)
    for path in gone:
        assert any(f"{path.name}`: is missing, but `model.safe" in line for line in said), said


def test_of_many_problems_twenty_are_printed(outputs: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(outputs["tp2pp2"], tmp_path / "tp2pp2")
    files = sorted(copy.rglob("*.safetensors"))
    for path in files:
        path.unlink()
    every = problems(copy)
    assert len(every) >= len(files) == 25
    text = call("inspect", copy).out
    assert text.count("PROBLEM") == 20
    assert f"... and {len(every) - 20} more problems (--json has all)\n" in text


def unfinished(tmp_path: Path) -> tuple[Path, Path]:
    """A target whose job was stopped before it was published, and its partial directory."""
    source = write("meta4", tmp_path / "src")
    target = tmp_path / "dst"
    done(*move("meta4", source, "hf", target))
    partial = tmp_path / "dst.partial-0123456789abcdef"
    (partial / "journals").mkdir(parents=True)
    target.rename(partial / "data")
    (size,) = (path.stat().st_size for path in (partial / "data").glob("*.safetensors"))
    with journal.Journal(partial / "journals", 1, 0) as records:
        records.append([journal.Record(0, 0, size // 4, 7), journal.Record(0, size // 4, 100, 7)])
    with journal.Journal(partial / "journals", 2, 0) as records:
        records.append([journal.Record(0, 0, size // 4, 7)])
    return target, partial


def test_a_partial_directory_says_what_it_is_and_how_far(tmp_path: Path) -> None:
    target, partial = unfinished(tmp_path)
    for path in (partial, partial / "data"):
        (said,) = problems(path)
        pattern = r"`\S+`: the unfinished result `dst` \(5\d.\d KB of 22\d KB written\); the same"
        assert re.match(pattern, said), said
        assert re.search(r"health +unfinished\n", call("inspect", path).out)
    line = refused(tmp_path, r"dst`: no such directory", "inspect", target)
    assert re.search(rf"; beside it: `{partial}`: an unfinished job", line), line


def test_what_lies_beside_is_told_and_no_fault(tmp_path: Path) -> None:
    target, partial = unfinished(tmp_path)
    shutil.copytree(partial / "data", target)
    (tmp_path / "dst.lock").touch()
    found = json.loads(done("inspect", target, "--json").out)
    assert found["healthy"] is True
    assert [re.sub(r"`\S+/", "`", line)[:32] for line in found["beside"]] == [
        "`dst.partial-0123456789abcdef`: ",
        "`dst.lock`: a job is at work on ",
    ]
    said = done("inspect", target).out
    assert said.count("  beside      `") == 2
    assert re.search(r"health +good\n", said)


def test_a_tokenizer_of_a_release_is_no_fault(tmp_path: Path) -> None:
    """128,000 tokens and 280,000 merges, in letters beyond ASCII."""
    source = write("hf", tmp_path / "src")
    tokens = {f"Ġ{number:x}": number for number in range(128_000)}
    merges = [["Ġ", f"{number:x}"] for number in range(280_000)]
    record = {"added_tokens": [], "model": {"type": "BPE", "vocab": tokens, "merges": merges}}
    (source / "tokenizer.json").write_text(json.dumps(record, ensure_ascii=False))
    found = json.loads(done("inspect", source, "--json").out)
    assert found["healthy"]
    assert "tokenizer.json" in found["ready"]


def leftover_indexes(source: Path) -> None:
    """Indexes of weights that a download left out, and of another variant."""
    for name in (
        "pytorch_model.bin",
        "tf_model.h5",
        "model.fp16.safetensors",
        "flax_model.msgpack",
    ):
        record = {"weight_map": {"a": f"part-of-{name}"}}
        (source / f"{name}.index.json").write_text(json.dumps(record))


def test_an_index_of_weights_that_were_left_out_is_no_fault(tmp_path: Path) -> None:
    for kind in ("hf", "hf2"):
        source = write(kind, tmp_path / kind)
        leftover_indexes(source)
        assert json.loads(done("inspect", source, "--json").out)["healthy"] is True
    (source / "model-00001-of-00002.safetensors").unlink()
    assert not [line for line in problems(source) if "part-of" in line]


def test_an_index_is_looked_at_where_no_weights_are(tmp_path: Path) -> None:
    leftover_indexes(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    said = problems(tmp_path)
    assert any("part-of-pytorch_model.bin`: is missing, but `pytorch" in line for line in said)
    assert not [line for line in said if "tf_model" in line or "fp16" in line]


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/passwd", "a\x1b[2Jb", "a/../../b", ""])
def test_a_name_of_an_index_stays_inside_and_is_printed_as_text(name: str, tmp_path: Path) -> None:
    source = write("hf2", tmp_path / "src")
    index = source / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"]["more"] = name
    index.write_text(json.dumps(record))
    assert any("lies outside the checkpoint's directory" in line for line in problems(source))
    said = call("inspect", source).out
    assert "PROBLEM" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_findings_are_printed_as_text(tmp_path: Path) -> None:
    source = write("hf2", tmp_path / "a\x1b[2Jb")
    said = done("inspect", source).out
    assert said.startswith(f"{tmp_path}/a\\x1b[2Jb: hf\n")
    assert json.loads(done("inspect", source, "--json").out)["path"] == str(source)


def test_a_checklist_that_names_what_is_no_file_does_not_block(tmp_path: Path) -> None:
    source = write("meta4", tmp_path / "src")
    os.mkfifo(source / "pipe")
    (source / "checklist.chk").write_text(f"{'0' * 32}  pipe\n{'0' * 32}  gone\n")
    said = problems(source, "--checksums")
    assert [line.split("`")[2] for line in said] == [": is no plain file", " is missing"]
    (source / "checklist.chk").write_bytes(b"\n" * ((1 << 20) + 1))
    (said,) = problems(source, "--checksums")
    assert said.endswith("checklist.chk`: 1048577 bytes, expected 1048576 at most")


def test_what_is_damaged_is_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all headers, of which there may be thousands."""
    seen, real = [], damage.found_in

    def counted(*given: Any) -> list[str]:
        seen.append(given)
        return real(*given)

    monkeypatch.setattr(damage, "found_in", counted)
    (tmp_path / "tokenizer.json").write_text("{")
    problems(tmp_path)
    assert seen == [(tmp_path, None)]
