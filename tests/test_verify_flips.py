"""Every byte counts: one changed byte of any file of any format is found, and where it is."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import call, done, model, move, one_line, write
from tests.oracles.bytelevel import llama3
from tests.oracles.compare import files_in

pytest.importorskip("gguf")

TARGETS = {
    "meta2": ("meta2",),
    "hf": ("hf", "dst.max_shard_size=200KB"),
    "tp2pp2": ("tp2pp2",),
    "fsdp3": ("fsdp3",),
    "titan2": ("titan2",),
    "gguf": ("gguf", "dst.dtype=bfloat16"),
    "gguf-q8_0": ("gguf", "dst.dtype=q8_0"),
}
MANIFEST = "reshard.json"
Tile = tuple[int, int, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of every format, of a model with a tokenizer and what lies around it."""
    root = tmp_path_factory.mktemp("flips")
    source = write("hf2", root / "src", model(intermediate_size=192, vocab_size=352))
    llama3(source)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    for name, (spec, *more) in TARGETS.items():
        done(*move("hf", source, spec, root / name, "engine.fsync=false", *more))
    return {name: folder_of(root / name) for name in TARGETS}


def folder_of(target: Path) -> Path:
    """Where the manifest of a target is."""
    (found,) = target.rglob(MANIFEST)
    return found.parent


def tiles_of(root: Path) -> dict[str, list[Tile]]:
    """The extents of every file, by the manifest, which is one extent itself."""
    files = json.loads((root / MANIFEST).read_text())["files"]
    found = {
        file: [(start, length, what) for start, length, what, _ in record["extents"]]
        for file, record in files.items()
    }
    return found | {MANIFEST: [(0, (root / MANIFEST).stat().st_size, "manifest")]}


def places(tiles: list[Tile], chosen: random.Random, *, long: bool) -> Iterator[tuple[Tile, int]]:
    """Offsets in a file: the ends and the middle of extents of each kind, or of all of them."""
    kinds = {tile[2] in ("header", "text", "manifest"): tile for tile in tiles}
    picked = tiles if long else {*kinds.values(), tiles[-1], chosen.choice(tiles)}
    for tile in sorted(picked):
        start, length, _ = tile
        randoms = [start + chosen.randrange(length) for _ in range(24 if long else 4)]
        for offset in sorted({start, start + length - 1, *randoms}):
            yield tile, offset


def changed(file: Path, offset: int, chosen: random.Random) -> int:
    """Give one byte another value; returns the one before."""
    with file.open("r+b") as held:
        held.seek(offset)
        (before,) = held.read(1)
        held.seek(offset)
        held.write(bytes([chosen.choice([v for v in range(256) if v != before])]))
    return before


def put_back(file: Path, offset: int, value: int) -> None:
    with file.open("r+b") as held:
        held.seek(offset)
        held.write(bytes([value]))


@pytest.mark.fuzz
@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_byte_anywhere_is_found_and_named(
    target: str, made: dict[str, Path], long: bool, record_property: Callable[[str, object], None]
) -> None:
    root, chosen, flips = made[target], random.Random(target), 0
    tiles = tiles_of(root)
    assert set(tiles) == files_in(root), "a file that no extent covers"
    large = [file for file in tiles if file.endswith((".pth", ".safetensors"))]
    sampled = {*tiles} - {*large} | {*(large if long else chosen.sample(large, min(5, len(large))))}
    for file in sorted(sampled):
        for (start, length, what), offset in places(tiles[file], chosen, long=long):
            before = changed(root / file, offset, chosen)
            found = call("verify", root)
            put_back(root / file, offset, before)
            assert found.code == 1, f"`{file}`, byte {offset} of `{what}`: {found.out}{found.err}"
            expected = (
                rf"`{re.escape(file)}`: bytes {start} to {start + length} \({re.escape(what)}\)"
            )
            where = f"{MANIFEST}`: " if file == MANIFEST else expected
            assert re.search(where, one_line(found.err)), found.err
            flips += 1
    done("verify", root)
    record_property("flips", flips)
    print(f"{flips} flips of {target} found")
    assert flips >= (250 if long else 30)


def test_each_kind_of_file_is_among_them(made: dict[str, Path]) -> None:
    names = {name: {Path(file).name for file in files_in(root)} for name, root in made.items()}
    for name, found in names.items():
        assert {MANIFEST, "tokenizer.json"} <= found, name
    assert ".metadata" in names["fsdp3"] & names["titan2"]
    assert {"model.safetensors.index.json", "config.json"} <= names["hf"]
    for name in ("gguf", "gguf-q8_0"):
        tiles = tiles_of(made[name])[gguf_file(made[name])]
        header = sum(length for _, length, what in tiles if what == "header")
        assert header > 5000, "a header without a tokenizer"


def gguf_file(root: Path) -> str:
    return next(file.name for file in root.glob("*.gguf"))
