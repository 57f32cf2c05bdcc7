"""Two checkpoints of any layouts: that `verify` finds what differs, and says where."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from tests import jobs
from tests.commands import done, model, move, one_line, refused, write
from tests.oracles import dcp, hf, meta, nanotron
from tests.oracles.models import Model, with_normal_values
from tests.settings import beside


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


PLACES = [
    ("model.embed_tokens.weight", (127, 63)),
    ("model.layers.1.self_attn.q_proj.weight", (6, 9)),
    ("model.layers.1.self_attn.k_proj.weight", (5, 0)),
    ("model.layers.0.self_attn.v_proj.weight", (31, 63)),
    ("model.layers.1.mlp.up_proj.weight", (100, 3)),
    ("model.layers.0.mlp.gate_proj.weight", (175, 1)),
    ("model.layers.0.mlp.down_proj.weight", (0, 175)),
    ("model.norm.weight", (31,)),
    ("lm_head.weight", (0, 0)),
]


@pytest.mark.parametrize("kind", ["hf2", "meta4", "tp2pp2", "fsdp3"])
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_one_value_that_differs_is_named_with_its_index_and_both_values(
    kind: str, name: str, place: tuple[int, ...], layouts: dict[str, Path], tmp_path: Path
) -> None:
    held = changed({name: [place]})
    if kind == "fsdp3":
        beside(dcp.write_fsdp, held, tmp_path / kind, shards=3)
    else:
        write(kind, tmp_path / kind, held)
    ours, theirs = (one.tensors[name][place].item() for one in (model(), held))
    numel = held.tensors[name].numel()
    said = (
        rf"`{re.escape(name)}{re.escape(str(list(place)))}`: {re.escape(repr(ours))} against "
        rf"{re.escape(repr(theirs))} \(`\S+` against `\S+`\), 1 of {numel:,} elements, "
        rf"by at most {re.escape(f'{abs(ours - theirs):g}')}$"
    )
    for one in ("meta8", "interleaved", "tp2pp2"):
        line = refused(tmp_path, said, "verify", layouts[one], tmp_path / kind, code=1)
        assert "`: 1 of 21 parameters differ: `" in line
        assert len(re.findall(r"`(?:model|lm_head)\.[^`]*weight[^`]*`", line)) == 1, line


def changed(places: dict[str, list[tuple[int, ...]]], held: Model | None = None) -> Model:
    """The model with one bit of some elements flipped."""
    held = held or model()
    tensors = dict(held.tensors)
    for name, elements in places.items():
        tensors[name] = tensors[name].clone()
        for place in elements:
            bits = {2: torch.int16, 4: torch.int32}[tensors[name].element_size()]
            tensors[name].view(bits)[place] ^= 1
    return Model(held.config, tensors)


@pytest.mark.parametrize(
    ("name", "place", "files"),
    [
        # 176 rows or columns: 22 of them in each of 8 files, 88 on each of 2 ranks
        (
            "mlp.up_proj",
            (100, 3),
            r"`consolidated.04.pth` against `\S+gate_up_proj/\S+_tp-rank-1-of",
        ),
        (
            "mlp.down_proj",
            (3, 100),
            r"`consolidated.04.pth` against `\S+down_proj/\S+_tp-rank-1-of",
        ),
    ],
)
def test_the_files_that_hold_the_element_are_named(
    name: str, place: tuple[int, ...], files: str, layouts: dict[str, Path], tmp_path: Path
) -> None:
    held = changed({f"model.layers.1.{name}.weight": [place]})
    write("tp2pp2", tmp_path / "other", held)
    refused(tmp_path, files, "verify", layouts["meta8"], tmp_path / "other", code=1)


def test_all_that_differs_is_counted_and_the_first_is_shown(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    held = changed({up: [(175, 63), (3, 1), (90, 0), (3, 2)], down: [(63, 0)]})
    other = write("hf2", tmp_path / "other", held)
    words = ["verify", str(layouts["tp8"]), str(other)]
    line = refused(tmp_path, r"`: 2 of 21 parameters differ: ", *words, code=1)
    away = (model().tensors[up].double() - held.tensors[up].double()).abs().max()
    assert f"`{up}[3, 1]`: " in line
    assert f"4 of 11,264 elements, by at most {away:g}; `{down}[63, 0]`: " in line
    job = jobs.finished(3, words, tmp_path / "ranks")
    assert (job.wait(0), one_line(job.err)) == ([1, 1, 1], line)


def test_of_many_parameters_the_first_are_shown(layouts: dict[str, Path], tmp_path: Path) -> None:
    names = list(model().tensors)[:5]
    held = changed({name: [(0,) * model().tensors[name].dim()] for name in names})
    other = write("hf", tmp_path / "other", held)
    line = refused(
        tmp_path, r"`: 5 of 21 parameters differ: ", "verify", layouts["hf2"], other, code=1
    )
    assert re.search(r"\(and 2 more\)$", line), line
    assert re.findall(r"`([\w.]+)\[0", line) == [n for n in names if f"`{n}[" in line]
    assert len(re.findall(r" against \S+ \(", line)) == 3


def test_other_models_are_different(layouts: dict[str, Path], tmp_path: Path) -> None:
    deep = write("hf", tmp_path / "deep", model(num_hidden_layers=3))
    refused(tmp_path, r"model.layers.2", "verify", layouts["meta8"], deep, code=1)
    wide = write("hf", tmp_path / "wide", model(intermediate_size=160))
    refused(tmp_path, r"model.layers.\d.mlp", "verify", layouts["meta8"], wide, code=1)
    half = write("hf", tmp_path / "half", model(dtype=torch.float16))
    pattern = (
        r"`: 21 of 21 parameters differ: `\S+`: bfloat16 against float16;"
        r".* \(and 18 more\); --cast compares after B's dtype$"
    )
    refused(tmp_path, pattern, "verify", layouts["meta8"], half, code=1)


def test_ranks_share_the_work_and_find_the_same(layouts: dict[str, Path], tmp_path: Path) -> None:
    job = jobs.finished(2, ["verify", str(layouts["meta8"]), str(layouts["hf2"])], tmp_path / "a")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert job.out.count("equal: 21 parameters") == 1
    name = "model.layers.1.mlp.up_proj.weight"
    hf.write(changed({name: [(100, 3)]}), tmp_path / "other")
    words = ["verify", str(layouts["tp2pp2"]), str(tmp_path / "other")]
    job = jobs.finished(2, words, tmp_path / "b")
    assert job.wait(0) == [1, 1]
    assert f"`{name}[100, 3]`" in one_line(job.err)


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
    line = refused(
        tmp_path, r"norm.weight\[\d+\]`", "verify", noisy["first"], noisy["third"], code=1
    )
    assert "consolidated.00.pth` against `consolidated.00.pth" in line
    refused(tmp_path, r"norm.weight\[\d+\]`", "verify", noisy["first"], noisy["hf"], code=1)


def test_ranks_count_the_copies_together(noisy: dict[str, Path], tmp_path: Path) -> None:
    words = ["verify", str(noisy["third"]), str(noisy["hf"])]
    job = jobs.finished(2, words, tmp_path / "said")
    assert (job.wait(0), job.err) == ([0, 0], "")
    assert job.out.count("warning: ") == job.out.count(f"warning: {NORMS} copies") == 1


def spoil(file: Path, key: str) -> None:
    """Change one bit of the first element of a stored tensor."""
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


# After a cast.


@pytest.fixture(scope="module")
def casts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in float32 and what we make of it in other dtypes, of ordinary values."""
    root = tmp_path_factory.mktemp("casts")
    held = with_normal_values(model(dtype=torch.float32, intermediate_size=192))
    source = write("hf2", root / "float32", held)
    for spec, name in (
        ("meta4", "bfloat16"),
        ("hf", "float16"),
        ("gguf", "q8_0"),
        ("gguf", "q4_1"),
        ("tp2pp2", "float32"),
    ):
        target = root / f"{spec}-{name}"
        done(*move("hf", source, spec, target, f"dst.dtype={name}", "engine.fsync=false"))
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize("name", ["meta4-bfloat16", "hf-float16", "gguf-q8_0", "gguf-q4_1"])
def test_what_was_cast_is_equal_after_the_cast_only(name: str, casts: dict[str, Path]) -> None:
    words = ("verify", casts["float32"], casts[name])
    line = refused(casts[name], r" of 21 parameters differ: ", *words, code=1)
    assert line.endswith("; --cast compares after B's dtype")
    found = done(*words, "--cast").out
    target = name.partition("-")[2]
    assert re.search(rf"\nof these, \d+ after a cast, first `\S+`: float32 to {target}\n", found)
    done("verify", "--cast", casts["tp2pp2-float32"], casts[name])


def test_a_cast_back_is_another_question(casts: dict[str, Path]) -> None:
    half = casts["meta4-bfloat16"]
    refused(half, "parameters differ", "verify", "--cast", half, casts["float32"], code=1)
    refused(half, "parameters differ", "verify", "--cast", half, casts["gguf-q8_0"], code=1)
    for name in ("meta4-bfloat16", "gguf-q8_0"):
        assert "after a cast" not in done("verify", "--cast", casts[name], casts[name]).out


@pytest.mark.parametrize("name", ["gguf-q8_0", "gguf-q4_1"])
def test_a_code_that_is_not_what_a_cast_gives_is_named(
    name: str, casts: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(casts[name], tmp_path / "copy")
    (file,) = copy.glob("*.gguf")
    (tensor,) = (
        found for found in GGUFReader(file).tensors if found.name == "blk.1.ffn_down.weight"
    )
    block = {"gguf-q8_0": 34, "gguf-q4_1": 20}[name]
    # row 3 of 64 has 6 blocks of 32: the third, and in it the first value's code
    row, number, scales = 3, 2, {"gguf-q8_0": 2, "gguf-q4_1": 4}[name]
    flip(file, int(tensor.data_offset) + (row * 6 + number) * block + scales)
    line = refused(tmp_path, "1 of 21", "verify", "--cast", casts["float32"], copy, code=1)
    assert f"`model.layers.1.mlp.down_proj.weight[{row}, {number * 32}]`: " in line
    assert ", 1 of 12,288 elements, by at most " in line


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_flags_that_do_not_fit_are_refused(layouts: dict[str, Path]) -> None:
    one = layouts["hf2"]
    refused(one, r"verify --cast: compares two directories", "verify", "--cast", one)
    refused(one, r"verify --load: opens one directory", "verify", "--load", one, one)
    refused(one, r"`--cast` does not apply to `inspect`", "inspect", "--cast", one)
