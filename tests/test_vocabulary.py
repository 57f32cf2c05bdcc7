"""Padding of the vocabulary: made in any format, dropped from any, never guessed."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reshard import families, formats, vocabulary
from reshard.errors import LayoutError
from reshard.families.carried import CarriedConfig
from reshard.formats.options import Mesh, Options
from reshard.geometry import whole
from reshard.layout import Parameter
from tests.commands import done, move, refused
from tests.layouts import config_of, layout_of, oracle
from tests.oracles import dcp, hf, meta, nanotron, titan
from tests.oracles.compare import assert_same, assert_same_config, assert_same_tensor, bits
from tests.oracles.models import Model, model_a
from tests.settings import SMALL_FILES, Job, must_convert, read_fsdp

VOCAB, ROWS = 221, 240
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
NEW = f"vocabulary padded from {VOCAB} to {ROWS} rows of zeros"
DROPPED = f"{ROWS - VOCAB} rows beyond the vocabulary of {VOCAB} dropped (src.vocab)"
Write = Callable[[Model, Path], object]


def odd_model(tied: bool = False, **overrides: Any) -> Model:
    """A vocabulary that only 13 and 17 divide."""
    return model_a(tied=tied, vocab_size=VOCAB, **overrides)


def with_zeros(model: Model, rows: int) -> Model:
    """A model with more rows of zeros."""
    tensors = dict(model.tensors)
    for name in set(TABLES) & set(tensors):
        table = tensors[name]
        tensors[name] = torch.cat([table, table.new_zeros(rows - len(table), table.shape[1])])
    return replace(model, config=model.config | {"vocab_size": rows}, tensors=tensors)


def with_values(model: Model, rows: int) -> Model:
    """A model with more rows of any values, as trainers leave them."""
    return nanotron.padded(model, rows)


# Which rows are whose.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("hf", {"max_shard_bytes": 1}),
        ("meta", {"tp": 6, "embedding_dim": 0}),
        ("meta", {"tp": 6, "embedding_dim": 1}),
        ("nanotron", {"tp": 6, "pp": 2}),
        ("fsdp", {"dp": 7}),
        ("fsdp", {"dp": 300}),
        ("titan", {"dp": 5, "tp": 3}),
    ],
    ids=str,
)
def test_windows_find_each_value_in_the_first_rows_of_what_is_stored(name, chosen, tied):
    """Shards of the padded tables, put together by the windows of a layout of the true ones."""
    model = oracle("a", tied=tied, vocab_size=VOCAB)
    config, longer = config_of("a", tied=tied, vocab_size=VOCAB), with_values(model, ROWS)
    padded_config = replace(config, vocab=ROWS)
    stored = layout_of(padded_config, name, **chosen)
    held = vocabulary.trimmed(stored, families.parameters(config))
    assert held.files == stored.files
    for file in held.files:
        ours, theirs = held.contents(file), stored.contents(file)
        assert [(c.key, c.shape, c.dtype) for c in ours] == [
            (c.key, c.shape, c.dtype) for c in theirs
        ]
        assert held.header(file) == stored.header(file)
    tables = {name: held.places[name] for name in TABLES if name in held.places}
    for parameter, places in tables.items():
        found = torch.full_like(model.tensors[parameter], torch.nan)
        count = 0
        for part in held.tensors_on(parameter, whole(tuple(found.shape))):
            box = part.slot.placement.box(part.shard)
            cut = longer.tensors[parameter][tuple(map(slice, box.start, box.stop))]
            for window in part.windows:
                index = tuple(map(slice, window.region.start, window.region.stop))
                found[index] = window.view(cut.contiguous().flatten())
                count += window.region.numel if part.copy == 0 else 0
        assert count == found.numel()
        assert_same_tensor(parameter, found, model.tensors[parameter])
        edges = [edge for slot in places for edge in slot.placement.edges()]
        assert all(0 <= edge < VOCAB for edge in edges)
    padding = sum(content.padding for file in held.files for content in held.contents(file))
    assert padding == (ROWS - VOCAB) * 72 * sum(map(len, tables.values()))
    assert vocabulary.stored_rows(held, families.parameters(config)) == ROWS
    assert vocabulary.trimmed(held, families.parameters(padded_config)) == stored


@pytest.mark.parametrize(
    ("name", "tp", "multiple", "expected"),
    [("hf", 1, 64, 256), ("hf", 1, 13, VOCAB), ("nanotron", 3, 64, 384), ("nanotron", 2, 1, 222)],
)
def test_a_multiple_is_counted_for_each_rank_where_a_format_does_so(name, tp, multiple, expected):
    config = config_of("a", vocab_size=VOCAB)
    options = Options(mesh=Mesh(tp=tp), vocab_multiple=multiple)
    parameters = families.parameters(config)
    stored, tables = formats.padded(formats.named(name), parameters, config, options)
    assert stored == replace(config, vocab=expected)
    assert list(tables) == families.parameters(stored)


# Made.


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def padded_titan(path: Path) -> Model:
    """A target of TorchTitan's, with the config that lies in it."""
    state = dcp.read(path / "step-0")
    config = hf.spelled_as_4(read_json(path / "step-0" / "config.json"))
    return Model(config, titan.to_hf(state, config, rope="interleaved"))


# How targets are asked for and read back; Nanotron pads to a multiple for each rank.
TARGETS: dict[str, tuple[str, Callable[[Path], Model], tuple[str, ...]]] = {
    "hf": ("hf", hf.read, ("dst.vocab_multiple=48",)),
    "hf-many": ("hf", hf.read, ("dst.vocab_multiple=48", SMALL_FILES)),
    "meta3": ("meta3", meta.read, ("dst.vocab_multiple=48", "dst.embedding_dim=0")),
    "meta3-columns": ("meta3", meta.read, ("dst.vocab_multiple=48", "dst.embedding_dim=1")),
    "tp3pp2": ("tp3pp2", nanotron.read, ("dst.vocab_multiple=16",)),
    "fsdp8": ("fsdp8", read_fsdp, ("dst.vocab_multiple=48",)),
    "titan2tp3": ("titan2", padded_titan, ("dst.vocab_multiple=48", "dst.mesh.tp=3")),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_format_pads_with_zeros_and_drops_them_again(
    name: str, tied: bool, tmp_path: Path
) -> None:
    spec, read, asked = TARGETS[name]
    model, source, target = odd_model(tied), tmp_path / "hf", tmp_path / "padded"
    hf.write(model, source)
    assert NEW in done(*move("hf", source, spec, target, *asked)).out
    assert_same(read(target), with_zeros(model, ROWS))
    assert read(target).config["vocab_size"] == ROWS
    assert "verified" in done("verify", target).out
    (manifest,) = target.rglob("reshard.json")
    assert read_json(manifest)["model"]["vocab"] == VOCAB
    kind = "dcp" if spec.startswith(("fsdp", "titan")) else spec
    said = done(*move(kind, target, "hf", tmp_path / "back", "src.vocab=221")).out
    assert DROPPED in said
    assert_same(hf.read(tmp_path / "back"), model)
    assert_same_config(hf.read(tmp_path / "back"), model)


def test_ranks_with_little_memory_pad_alike(tmp_path: Path) -> None:
    model = odd_model()
    hf.write(with_values(model, ROWS), tmp_path / "hf")
    ways = [("direct", "nearest"), ("collective", "owner")]
    jobs = [
        Job(
            tmp_path / "hf",
            tmp_path / f"{name}-{mode}",
            TARGETS[name][0],
            (f"engine.exchange={mode}", f"engine.writers={writers}", "src.vocab=221", *asked),
            "least",
        )
        for name, (_, _, asked) in TARGETS.items()
        for mode, writers in ways
    ]
    must_convert(3, jobs)
    for name, (_, read, _) in TARGETS.items():
        for mode, _ in ways:
            assert_same(read(tmp_path / f"{name}-{mode}"), with_zeros(model, ROWS))


def test_a_cast_leaves_zeros(tmp_path: Path) -> None:
    hf.write(odd_model(), tmp_path / "hf")
    asked = ("dst.vocab_multiple=48", "dst.dtype=float32")
    done(*move("hf", tmp_path / "hf", "meta2", tmp_path / "meta2", *asked))
    _, stored = meta.whole(tmp_path / "meta2")
    for key in ("tok_embeddings.weight", "output.weight"):
        assert stored[key].shape[0] == ROWS
        assert not bits(stored[key][VOCAB:]).any()


def test_without_being_asked_nothing_is_padded(tmp_path: Path) -> None:
    hf.write(odd_model(), tmp_path / "hf")
    said = done(*move("hf", tmp_path / "hf", "hf", tmp_path / "same", "dst.vocab_multiple=13")).out
    assert "padded" not in said
    pattern = r"3 files do not divide .* vocabulary 221"
    refused(tmp_path, pattern, *move("hf", tmp_path / "hf", "meta3", tmp_path / "meta3"))


# Dropped.


def beside(write: Write, model: Model, path: Path) -> None:
    write(model, path)
    (path / "config.json").write_text(json.dumps(model.config))


SOURCES: dict[str, tuple[str, Write]] = {
    "hf": ("hf", partial(hf.write, files=2)),
    "meta2": ("meta2", partial(meta.write, mp=2)),
    "meta3-columns": ("meta3", partial(meta.write, mp=3, embedding_dim=1)),
    "tp2pp2": ("tp2pp2", partial(nanotron.write, tp=2, pp=2)),
    "fsdp3": ("dcp", partial(beside, partial(dcp.write_fsdp, shards=3))),
    "2d": ("dcp", partial(beside, partial(dcp.write_2d, dp=3, tp=2))),
    "titan": ("dcp", partial(beside, partial(titan.write_titan, shards=4, keys="fused+w13"))),
}


def tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer.json of so many tokens, the last of which is an added one."""
    folder.mkdir(parents=True, exist_ok=True)
    added = [{"id": tokens - 1, "content": "<end>", "special": True}]
    entries = {f"t{number}": number for number in range(tokens - 1)}
    model = {"type": "BPE", "vocab": entries, "merges": []}
    text = json.dumps({"version": "1.0", "added_tokens": added, "model": model})
    (folder / "tokenizer.json").write_text(text)


@pytest.mark.parametrize("name", SOURCES)
def test_foreign_padding_is_dropped_from_every_format(name: str, tmp_path: Path) -> None:
    kind, write = SOURCES[name]
    model, source = odd_model(tied=name in ("meta2", "fsdp3")), tmp_path / "src"
    write(with_values(model, ROWS), source)
    tokenizer(tmp_path / "assets", VOCAB)
    assets = f"src.assets={tmp_path / 'assets'}"
    ways = [("hf", "tokenizer", hf.read), ("fsdp2", "221", read_fsdp)]
    ways += [("meta1", "221", meta.read), ("tp1", "tokenizer", nanotron.read)]
    for target, vocab, read in ways:
        given = (f"src.vocab={vocab}", *((assets,) if vocab == "tokenizer" else ()))
        said = done(*move(kind, source, target, tmp_path / target, *given)).out
        assert f"source: {DROPPED}" in said
        assert "warning" not in said
        assert_same(read(tmp_path / target), model)
        assert read(tmp_path / target).config["vocab_size"] == VOCAB
    # Never guessed: all rows are moved, and the warning says how to drop them.
    said = done(*move(kind, source, "hf", tmp_path / "all", assets)).out
    assert "dropped" not in said
    expected = "240 rows, but the tokenizer in src.assets knows 221 tokens; src.vocab=tokenizer"
    assert expected in said
    assert_same(hf.read(tmp_path / "all"), with_values(model, ROWS))


def test_a_source_s_own_tokenizer_counts_its_tokens(tmp_path: Path) -> None:
    model = odd_model()
    hf.write(with_values(model, ROWS), tmp_path / "hf")
    tokenizer(tmp_path / "hf", VOCAB)
    done(*move("hf", tmp_path / "hf", "tp3", tmp_path / "tp3"))  # its tokenizer is in assets/
    for source in ("hf", "tp3"):
        words = move(source, tmp_path / source, "hf", tmp_path / f"from-{source}")
        assert DROPPED in done(*words, "src.vocab=tokenizer").out
        assert_same(hf.read(tmp_path / f"from-{source}"), model)


def test_what_is_asked_for_outdoes_the_manifest(tmp_path: Path) -> None:
    model = odd_model()
    hf.write(model, tmp_path / "hf")
    done(*move("hf", tmp_path / "hf", "tp2", tmp_path / "tp2", "dst.vocab_multiple=120"))
    words = move("tp2", tmp_path / "tp2", "hf", tmp_path / "all", f"src.vocab={ROWS}")
    assert "dropped" not in done(*words).out
    assert_same(hf.read(tmp_path / "all"), with_zeros(model, ROWS))


def test_padding_is_dropped_and_made_in_one_go(tmp_path: Path) -> None:
    model = odd_model()
    hf.write(with_values(model, ROWS), tmp_path / "hf")
    given = ("src.vocab=221", "dst.vocab_multiple=1")
    said = done(*move("hf", tmp_path / "hf", "tp2", tmp_path / "tp2", *given)).out
    assert DROPPED in said
    assert "vocabulary padded from 221 to 222 rows of zeros" in said
    assert_same(nanotron.read(tmp_path / "tp2"), with_zeros(model, 222))


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ("src.vocab=223", r"a vocabulary of 223, but the files hold 222 rows"),
        ("src.vocab=tokenizer", r"src.vocab=tokenizer: no tokenizer.json in .*; give src.vocab=N"),
        ("src.vocab=0", r"src.vocab: `0` is neither a number of rows nor `tokenizer`"),
        ("src.vocab=-1", r"`-1` is neither"),
        ("src.vocab=tokens", r"`tokens` is neither"),
        ("src.vocab=1.5", r"`1.5` is neither"),
        ("src.vocab_multiple=2", r"src.vocab_multiple does not apply to \w+ as a source"),
        ("dst.vocab=7", r"unknown key `dst.vocab`"),
    ],
)
@pytest.mark.parametrize("kind", ["hf", "tp2"])
def test_no_vocabulary_that_cannot_be_is_taken(
    kind: str, given: str, pattern: str, tmp_path: Path
) -> None:
    write: dict[str, Write] = {"hf": hf.write, "tp2": partial(nanotron.write, tp=2, pp=1)}
    write[kind](model_a(), tmp_path / "src")
    refused(tmp_path, pattern, *move(kind, tmp_path / "src", "fsdp2", tmp_path / "x", given))


def test_rows_of_an_imagined_source_are_not_dropped(tmp_path: Path) -> None:
    hf.write(odd_model(), tmp_path / "hf")
    given = (f"src.model={tmp_path / 'hf' / 'config.json'}", "src.vocab=200")
    pattern = r"src.vocab: drops rows of a checkpoint that exists; give src.path=DIR"
    refused(tmp_path, pattern, "plan", "--src", "hf", "--dst", "tp1", *given)
    words = ("plan", "--src", "hf", "--dst", "tp2", given[0], "dst.vocab_multiple=1")
    assert "padded from 221 to 222" in done(*words).out


# Families that are not known.

MYSTERY = {"model_type": "mystery", "vocab_size": 9, "hidden_size": 4}


def mystery(**more: Tensor) -> dict[str, Tensor]:
    """The weights of a family that no one knows."""
    return {
        "m.embed_tokens.weight": torch.arange(36.0).view(9, 4) + 1,
        "m.mixer.weight": torch.arange(20.0).view(5, 4),
        "lm_head.weight": -torch.arange(36.0).view(9, 4) - 1,
    } | more


def write_mystery(path: Path, state: dict[str, Tensor], **said: Any) -> None:
    path.mkdir()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(MYSTERY | said))


@pytest.mark.parametrize("nested", [False, True])
def test_an_unknown_family_is_padded_and_cut_by_its_tables(nested: bool, tmp_path: Path) -> None:
    said = {"vocab_size": None, "text_config": {"vocab_size": 9}} if nested else {}
    write_mystery(tmp_path / "hf", mystery(), **said)
    words = move("hf", tmp_path / "hf", "fsdp3", tmp_path / "fsdp", "dst.vocab_multiple=8")
    assert "vocabulary padded from 9 to 16 rows of zeros" in done(*words).out
    config = read_json(tmp_path / "fsdp" / "config.json")
    assert config.get("text_config", config)["vocab_size"] == 16
    found = dcp.read_fsdp(tmp_path / "fsdp")
    for name, table in mystery().items():
        assert_same_tensor(name, found[name][: len(table)], table)
        assert not found[name][len(table) :].any()
        assert len(found[name]) == (5 if "mixer" in name else 16)
    words = move("dcp", tmp_path / "fsdp", "hf", tmp_path / "back", "src.vocab=9")
    assert "7 rows beyond the vocabulary of 9 dropped" in done(*words).out
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert_same_tensor(name, tensor, mystery()[name])


@pytest.mark.parametrize("given", ["src.vocab=8", "dst.vocab_multiple=16"])
@pytest.mark.parametrize(
    ("more", "said", "pattern"),
    [
        ({"lm_head.weight": torch.ones(11, 4)}, {}, r"mystery have 9 and 11 rows, expected"),
        ({"extra.head.weight": torch.ones(9, 3)}, {}, r"`extra.head.weight` has 9 rows too"),
        ({}, {"vocab_size": None}, r"this mystery have 9 rows, expected those of one vocabulary"),
    ],
)
def test_an_unknown_family_whose_tables_are_not_sure_is_refused(
    more: dict[str, Tensor], said: dict[str, Any], pattern: str, given: str, tmp_path: Path
) -> None:
    write_mystery(tmp_path / "hf", mystery(**more), **said)
    line = refused(tmp_path, pattern, *move("hf", tmp_path / "hf", "hf", tmp_path / "x", given))
    assert f"leave {given.partition('=')[0]} out" in line


def test_a_model_without_tables_has_no_vocabulary() -> None:
    parameters = [Parameter("x", (9, 4), "other", None, torch.float32)]
    with pytest.raises(LayoutError, match=r"mystery have no rows"):
        vocabulary.rows_of(CarriedConfig("mystery", MYSTERY), parameters, "src.vocab")
