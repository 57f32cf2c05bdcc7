"""Proof by reading: what `verify` finds, and that it finds nothing where nothing is wrong."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.commands import call, done, model, move, one_line, refused, write
from tests.oracles import hf, meta, nanotron
from tests.oracles.compare import files_in
from tests.oracles.models import Model

TARGETS = ("meta2", "hf", "tp2pp2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One output of each format."""
    root = tmp_path_factory.mktemp("verify")
    source = write("meta8", root / "src")
    (source / "tokenizer.model").write_text("some words")
    for target in TARGETS:
        more = ["dst.max_shard_size=100KB"] if target == "hf" else []
        done(*move("meta8", source, target, root / target, *more))
    return {target: root / target for target in TARGETS}


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def extents(root: Path, file: str) -> list[tuple[int, int, str]]:
    """Start, length and name of every extent, as the manifest has them."""
    record = json.loads((root / "reshard.json").read_text())["files"][file]
    return [(start, length, what) for start, length, what, _ in record["extents"]]


@pytest.mark.parametrize("target", TARGETS)
def test_an_output_agrees_with_its_manifest(target: str, made: dict[str, Path]) -> None:
    files = len(files_in(made[target])) - 1
    found = done("verify", made[target])
    assert re.fullmatch(
        rf"verified: {files} files, \S+ KB agree with reshard.json in .*\n", found.out
    )


@pytest.mark.parametrize("target", TARGETS)
def test_extents_tile_every_file(target: str, made: dict[str, Path]) -> None:
    for file in sorted(files_in(made[target]) - {"reshard.json"}):
        position = 0
        for start, length, _ in extents(made[target], file):
            assert start == position
            position += length
        assert position == (made[target] / file).stat().st_size, file


@pytest.mark.parametrize("target", TARGETS)
def test_a_flipped_byte_anywhere_is_found_and_named(
    target: str, made: dict[str, Path], tmp_path: Path
) -> None:
    root = shutil.copytree(made[target], tmp_path / "dst")
    chosen = random.Random(7)
    files = sorted(files_in(root) - {"reshard.json"})
    weights = [file for file in files if file.endswith((".pth", ".safetensors"))]
    sampled = [file for file in files if file not in weights] + chosen.sample(
        weights, min(6, len(weights))
    )
    places = 0
    for file in sampled:
        tiles = extents(root, file)
        for start, length, what in {tiles[0], tiles[-1], *chosen.sample(tiles, min(3, len(tiles)))}:
            for offset in {start, start + length - 1, start + chosen.randrange(length)}:
                good = (root / file).read_bytes()
                flip(root / file, offset)
                pattern = (
                    rf"`{re.escape(file)}`: bytes {start} to {start + length} \({re.escape(what)}\)"
                )
                line = refused(root, pattern, "verify", root, code=1)
                assert line.count("differ from the manifest") == 1
                (root / file).write_bytes(good)
                places += 1
    assert places > 20
    done("verify", root)


def test_every_header_byte_counts(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["meta2"], tmp_path / "dst")
    file = root / "consolidated.01.pth"
    start, length, what = extents(root, file.name)[0]
    assert what == "header"
    for offset in range(start, start + length, 97):
        flip(file, offset)
        assert call("verify", root).code == 1, f"byte {offset}"
        flip(file, offset)


def test_a_damaged_manifest_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["hf"], tmp_path / "dst")
    text = (root / "reshard.json").read_text()
    record = json.loads(text)
    first = next(iter(record["files"]))
    record["files"][first]["size"] += 1
    (root / "reshard.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    refused(root, r"reshard.json`: differs from its own checksum", "verify", root, code=1)
    chosen = random.Random(3)
    for offset in chosen.sample(range(len(text)), 40):
        (root / "reshard.json").write_text(text)
        flip(root / "reshard.json", offset)
        found = call("verify", root)
        if json_of(root / "reshard.json") != json.loads(text):
            assert found.code in (1, 2), f"byte {offset}: {text[offset]!r}"
            one_line(found.err)


def json_of(file: Path) -> Any:
    """What a file says, or None where it is no JSON."""
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


def test_a_manifest_that_cannot_be_read_is_a_difference(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """design.md: 1 is a difference that verify found; a flipped byte in reshard.json is one."""
    root = shutil.copytree(made["hf"], tmp_path / "dst")
    text = (root / "reshard.json").read_text()
    (root / "reshard.json").write_text(text[:-3])
    refused(root, r"reshard.json`", "verify", root, code=1)


@pytest.mark.parametrize("target", TARGETS)
def test_missing_extra_and_cut_files_are_named(
    target: str, made: dict[str, Path], tmp_path: Path
) -> None:
    root = shutil.copytree(made[target], tmp_path / "dst")
    weights = sorted(file for file in files_in(root) if file.endswith((".pth", ".safetensors")))
    data = (root / weights[0]).read_bytes()
    (root / weights[0]).unlink()
    refused(root, rf"`{re.escape(weights[0])}` is missing", "verify", root, code=1)
    (root / weights[0]).write_bytes(data[:-1])
    sizes = rf"`{re.escape(weights[0])}`: {len(data) - 1} bytes, expected {len(data)}"
    refused(root, sizes, "verify", root, code=1)
    (root / weights[0]).write_bytes(data + b"x")
    refused(root, rf"{len(data) + 1} bytes, expected {len(data)}", "verify", root, code=1)
    (root / weights[0]).write_bytes(data)
    extra = Path(weights[-1]).parent / "stray.safetensors"
    (root / extra).write_bytes(b"x")
    refused(root, rf"`{re.escape(str(extra))}` is not in the manifest", "verify", root, code=1)
    (root / extra).unlink()
    done("verify", root)


def test_many_differences_are_counted(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["tp2pp2"], tmp_path / "dst")
    weights = sorted(file for file in files_in(root) if file.endswith(".safetensors"))
    for file in weights[:8]:
        (root / file).unlink()
    refused(root, r"is missing.* \(and 5 more\)", "verify", root, code=1)


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    refused(tmp_path, r"src`: has no reshard.json; .*verify A B", "verify", source)
    refused(tmp_path, r"verify: give a directory, or two", "verify")
    refused(tmp_path, r"verify: give a directory, or two", "verify", source, source, source)


# Two checkpoints.


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as the oracles write it."""
    root = tmp_path_factory.mktemp("layouts")
    found = {kind: write(kind, root / kind) for kind in ("meta8", "meta1", "hf2", "tp2pp2", "tp8")}
    meta.write(model(), root / "dim1", 4, embedding_dim=1)
    nanotron.write(model(), root / "interleaved", 4, 1, rope_interleaved=True)
    return found | {"dim1": root / "dim1", "interleaved": root / "interleaved"}


def test_checkpoints_of_any_two_layouts_are_equal(layouts: dict[str, Path]) -> None:
    for one in layouts:
        for other in ("meta8", "hf2", "tp2pp2", "interleaved"):
            found = done("verify", layouts[one], layouts[other])
            assert re.match(r"equal: 21 parameters, \S+ KB: ", found.out), found.out


@pytest.mark.parametrize("kind", ["hf2", "meta4", "tp2pp2"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", (127, 63)),
        ("model.layers.1.self_attn.k_proj.weight", (5, 0)),
        ("model.layers.0.mlp.down_proj.weight", (0, 175)),
        ("model.norm.weight", (31,)),
        ("lm_head.weight", (0, 0)),
    ],
)
def test_one_value_that_differs_is_named(
    kind: str, name: str, place: tuple[int, ...], layouts: dict[str, Path], tmp_path: Path
) -> None:
    other = write(kind, tmp_path / kind, changed(name, place))
    for one in ("meta8", "tp2pp2"):
        line = refused(tmp_path, rf"`{re.escape(name)}`", "verify", layouts[one], other, code=1)
        assert len(re.findall(r"`(?:model|lm_head)\.[^`]*weight`", line)) == 1, line
        assert re.search(r": \S+ against \S+ ", line), line


def changed(name: str, place: tuple[int, ...]) -> Model:
    """The model with one bit of one element flipped."""
    import torch

    held = model()
    tensor = held.tensors[name].clone()
    tensor.view(torch.int16)[place] ^= 1
    return Model(held.config, held.tensors | {name: tensor})


def test_other_models_are_different(layouts: dict[str, Path], tmp_path: Path) -> None:
    import torch

    deep = write("hf", tmp_path / "deep", model(num_hidden_layers=3))
    refused(tmp_path, r"model.layers.2", "verify", layouts["meta8"], deep, code=1)
    wide = write("hf", tmp_path / "wide", model(intermediate_size=160))
    refused(tmp_path, r"model.layers.\d.mlp", "verify", layouts["meta8"], wide, code=1)
    half = write("hf", tmp_path / "half", model(dtype=torch.float16))
    refused(
        tmp_path, r"`\S+`: \S*bfloat16 against \S*float16", "verify", layouts["meta8"], half, code=1
    )


def test_ranks_share_the_work_and_find_the_same(layouts: dict[str, Path], tmp_path: Path) -> None:
    job = jobs.finished(2, ["verify", str(layouts["meta8"]), str(layouts["hf2"])], tmp_path / "a")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert job.out.count("equal: 21 parameters") == 1
    name = "model.layers.1.mlp.up_proj.weight"
    hf.write(changed(name, (100, 3)), tmp_path / "other")
    words = ["verify", str(layouts["tp2pp2"]), str(tmp_path / "other")]
    job = jobs.finished(2, words, tmp_path / "b")
    assert job.wait(0) == [1, 1]
    assert f"`{name}`" in one_line(job.err)


def test_ranks_share_a_manifest(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["meta2"], tmp_path / "dst")
    job = jobs.finished(3, ["verify", str(root)], tmp_path / "a")
    assert (job.wait(0), job.err) == ([0, 0, 0], "")
    assert job.out.count("verified: ") == 1
    for file in ("consolidated.00.pth", "consolidated.01.pth"):
        flip(root / file, (root / file).stat().st_size // 2)
    job = jobs.finished(3, ["verify", str(root)], tmp_path / "b")
    assert job.wait(0) == [1, 1, 1]
    assert set(re.findall(r"`(consolidated.0\d.pth)`: bytes", one_line(job.err))) == {
        "consolidated.00.pth",
        "consolidated.01.pth",
    }


def test_a_tied_model_equals_itself_in_every_layout(tmp_path: Path) -> None:
    tied = model(tied=True)
    one, other = write("hf", tmp_path / "hf", tied), write("meta4", tmp_path / "meta4", tied)
    done("verify", one, other)
    third = write("tp4", tmp_path / "tp4", tied)
    done("verify", other, third)
    untied = write("hf", tmp_path / "untied")
    refused(tmp_path, r"lm_head.weight", "verify", one, untied, code=1)


# Places that hold the same parameter again.

NORMS = 5


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files whose norms differ on one rank, as released checkpoints' do, and one made of them."""
    root = tmp_path_factory.mktemp("noisy")
    meta.write(model(), root / "first", 4, norm_noise=0)
    meta.write(model(), root / "third", 4, norm_noise=2)
    found = done(*move("meta4", root / "third", "hf", root / "hf"))
    assert "5 copies of 5 replicated tensors differ" in found.out
    return {name: root / name for name in ("first", "third", "hf")}


def test_copies_that_may_differ_are_a_warning(noisy: dict[str, Path]) -> None:
    warning = rf"warning: {NORMS} copies of replicated tensors differ .*consolidated.02.pth`\n"
    for one, other in (("third", "third"), ("third", "hf"), ("hf", "third")):
        found = done("verify", noisy[one], noisy[other])
        assert re.match(rf"{warning}equal: 21 parameters", found.out), found.out
    assert "warning" not in done("verify", noisy["hf"], noisy["hf"]).out


def test_the_first_place_is_what_is_compared(noisy: dict[str, Path], tmp_path: Path) -> None:
    line = refused(tmp_path, r"norm.weight`", "verify", noisy["first"], noisy["third"], code=1)
    assert "consolidated.00.pth` against `consolidated.00.pth" in line
    refused(tmp_path, r"norm.weight`", "verify", noisy["first"], noisy["hf"], code=1)


def test_ranks_count_the_copies_together(noisy: dict[str, Path], tmp_path: Path) -> None:
    words = ["verify", str(noisy["third"]), str(noisy["hf"])]
    job = jobs.finished(2, words, tmp_path / "said")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert job.out.count("warning: ") == job.out.count(f"warning: {NORMS} copies") == 1


def spoil(file: Path, key: str) -> None:
    """Change one bit of the first element of a stored tensor."""
    import torch

    held = torch.load(file, weights_only=True)
    held[key].view(torch.int16)[-1, -1] ^= 1
    torch.save(held, file)


def test_repeated_heads_that_differ_are_a_difference(tmp_path: Path) -> None:
    held = model(num_key_value_heads=4)
    meta.write(held, tmp_path / "good", 8)
    meta.write(held, tmp_path / "bad", 8)
    key = "layers.1.attention.wk.weight"
    spoil(tmp_path / "bad" / "consolidated.03.pth", key)
    done("verify", tmp_path / "good", tmp_path / "good")
    for words in (("good", "bad"), ("bad", "good"), ("bad", "bad")):
        pattern = (
            rf"bad/consolidated.03.pth`: tensor `{key}` differs from its copy `{key}` in `\S+02"
        )
        paths = [tmp_path / word for word in words]
        refused(tmp_path, pattern, "verify", *paths, code=1)


def test_a_tied_output_that_differs_is_a_difference(tmp_path: Path) -> None:
    source = write("meta2", tmp_path / "src", model(tied=True))
    write("hf", tmp_path / "hf", model(tied=True))
    spoil(source / "consolidated.01.pth", "output.weight")
    words = ("verify", source, tmp_path / "hf", "src.tied=true")
    pattern = r"01.pth`: tensor `output.weight` differs from its copy `tok_embeddings.weight`"
    refused(tmp_path, pattern, *words, code=1)


# Memory, and what the files do not say.


def test_too_little_memory_is_refused_with_the_least(layouts: dict[str, Path]) -> None:
    words = ("verify", layouts["meta8"], layouts["hf2"])
    line = refused(
        layouts["hf2"], r"engine.memory: 1MiB is too little", *words, "engine.memory=1MiB"
    )
    least = re.search(r"the least that works is (\d+)MiB", line)
    assert least is not None, line
    done(*words, f"engine.memory={least[1]}MiB")
    refused(layouts["hf2"], "too little", *words, f"engine.memory={int(least[1]) - 1}MiB")


def test_options_hold_for_both_sides(layouts: dict[str, Path], tmp_path: Path) -> None:
    old = shutil.copytree(layouts["interleaved"], tmp_path / "old")
    record = json.loads((old / "model_config.json").read_text())
    del record["rope_interleaved"]
    (old / "model_config.json").write_text(json.dumps(record))
    refused(tmp_path, r"src.rope_interleaved=true", "verify", old, layouts["hf2"])
    for words in ((old, layouts["hf2"]), (layouts["hf2"], old)):
        done("verify", *words, "src.rope_interleaved=true")
    refused(tmp_path, "proj", "verify", old, layouts["hf2"], "src.rope_interleaved=false", code=1)
