"""A directory against its manifest: what `verify` finds, and nothing where nothing is wrong."""

import json
import random
import re
import shutil
import zlib
from pathlib import Path

import pytest

from reshard import manifest, readback
from reshard.distributed import Ranks
from reshard.errors import StorageError
from reshard.manifest import Span, spans_of
from reshard.readback import differing
from tests import jobs
from tests.commands import call, done, move, one_line, refused, write
from tests.oracles.compare import files_in

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
        assert found.code == 1, f"byte {offset}: {text[offset]!r}"
        assert "reshard.json`" in one_line(found.err)


@pytest.mark.parametrize(
    ("old", "new"), [("{\n  ", "{\n\t "), ("{", "{ "), ("}\n", "}"), ("\n", "\r\n")]
)
def test_a_manifest_that_says_the_same_in_other_bytes_is_found(
    old: str, new: str, made: dict[str, Path], tmp_path: Path
) -> None:
    root = shutil.copytree(made["hf"], tmp_path / "dst")
    text = (root / "reshard.json").read_text()
    (root / "reshard.json").write_bytes(text.replace(old, new, 1).encode())
    assert json.loads((root / "reshard.json").read_bytes()) == json.loads(text)
    line = refused(root, r"reshard.json`: says what it said, but its bytes", "verify", root, code=1)
    assert "not those written" in line


def test_a_key_that_is_there_twice_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["hf"], tmp_path / "dst")
    text = (root / "reshard.json").read_text()
    (root / "reshard.json").write_text(text.replace("{", '{"job": "x", ', 1))
    assert json.loads((root / "reshard.json").read_bytes()) == json.loads(text)
    refused(root, r"reshard.json`: ", "verify", root, code=1)


def test_a_manifest_that_cannot_be_read_is_a_difference(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """design.md: 1 is a difference that verify found; a flipped byte in reshard.json is one."""
    root = shutil.copytree(made["hf"], tmp_path / "dst")
    text = (root / "reshard.json").read_text()
    (root / "reshard.json").write_text(text[:-3])
    refused(root, r"reshard.json`", "verify", root, code=1)


DATA = b"some bytes"
TILES = [[0, 4, "a", zlib.crc32(DATA[:4])], [4, 6, "b", zlib.crc32(DATA[4:])]]
WHOLE = {"size": 10, "crc32": zlib.crc32(DATA), "extents": TILES}


@pytest.mark.parametrize(
    "changes",
    [
        {"extents": TILES[:1]},
        {"extents": TILES[1:]},
        {"extents": TILES[::-1]},
        {"extents": [TILES[0], *TILES]},
        {"extents": []},
        {"extents": None},
        {"extents": [[0, 1 << 40, "a", 1]] * 1000, "size": 1 << 40},
        {"extents": [[0, 1 << 40, "a", 1]] * 1000, "size": 1000 << 40},
        {"extents": [[0, 1 << 70, "a", 1]], "size": 1 << 70},
        {"extents": [[0, 12, "a", 1], [12, -2, "b", 1]]},
        {"extents": [[False, 4, "a", TILES[0][3]], TILES[1]]},
        {"extents": [[0, True, "a", zlib.crc32(DATA[:1])]], "size": 1},
        {"extents": [[0, 10, "a", 1 << 32]]},
        {"extents": [[0, 10, "a", -1]]},
        {"extents": [[0, 10, "a", 1.0]]},
        {"extents": [[0, 10, ["a"], zlib.crc32(DATA)]]},
        {"extents": [[0, 10, "a"]]},
        {"extents": ["abcd"]},
        {"size": 11},
        {"size": 10.0},
        {"size": None},
        {"crc32": zlib.crc32(DATA) ^ 1},
        {"crc32": None},
    ],
    ids=str,
)
def test_extents_that_are_not_the_file_are_no_manifest(
    changes: dict[str, object], tmp_path: Path
) -> None:
    """Whose own checksum is right: bytes that no extent covers would never be read."""
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "reshard.json").write_bytes(manifest.written({"files": {"file": WHOLE}}))
    done("verify", tmp_path)
    record = {**WHOLE, **changes}
    (tmp_path / "reshard.json").write_bytes(manifest.written({"files": {"file": record}}))
    refused(tmp_path, r"reshard.json`: not a manifest of this program", "verify", tmp_path)


def test_true_is_no_size(tmp_path: Path) -> None:
    """True is a number to Python, and the size of a file of one byte."""
    record = {"size": True, "crc32": zlib.crc32(b"x"), "extents": [[0, 1, "a", zlib.crc32(b"x")]]}
    with pytest.raises(TypeError):
        spans_of({"file": record})
    assert spans_of({"file": {"size": 0, "crc32": 0, "extents": []}}) == []


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
    refused(root, r"`: 8 problems: .*is missing.* \(and 5 more\)", "verify", root, code=1)
    (root / weights[8]).write_bytes(b"x")
    refused(root, r"`: 9 problems: .* \(and 6 more\)", "verify", root, code=1)


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    refused(tmp_path, r"src`: has no reshard.json; .*verify A B", "verify", source)
    refused(tmp_path, r"verify: give a directory, or two", "verify")
    refused(tmp_path, r"verify: give a directory, or two", "verify", source, source, source)


def test_folders_and_links_that_were_not_written_are_named(
    made: dict[str, Path], tmp_path: Path
) -> None:
    root = shutil.copytree(made["hf"], tmp_path / "dst")
    (root / "empty" / "deeper").mkdir(parents=True)
    refused(root, r"`: `empty/deeper` is not in the manifest$", "verify", root, code=1)
    shutil.rmtree(root / "empty")
    (root / "link").symlink_to(made["meta2"])
    refused(root, r"`: `link` is not in the manifest$", "verify", root, code=1)


def test_what_is_where_it_belongs_by_a_link_is_fine(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["tp2pp2"], tmp_path / "dst")
    (root / "model").rename(tmp_path / "elsewhere")
    (root / "model").symlink_to(tmp_path / "elsewhere")
    done("verify", root)


# Several ranks, and pieces of long spans.


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


def test_the_line_is_the_same_on_any_number_of_ranks(made: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(made["tp2pp2"], tmp_path / "dst")
    weights = sorted(file for file in files_in(root) if file.endswith(".safetensors"))
    for file in weights[1::7]:
        flip(root / file, (root / file).stat().st_size - 1)
    (root / weights[0]).unlink()
    line = refused(root, r"`: 5 problems: .*is missing", "verify", root, code=1)
    for world in (2, 3):
        job = jobs.finished(world, ["verify", str(root)], tmp_path / f"ranks-{world}")
        assert (job.wait(0), one_line(job.err)) == ([1] * world, line)


def spans_and_file(tmp_path: Path) -> tuple[list[Span], Path]:
    """A file of three spans, the second of which is long, and what their manifest says."""
    data = random.Random(0).randbytes(100_000)
    (tmp_path / "file").write_bytes(data)
    tiles = [(0, 100, "header"), (100, 99_000, "a"), (99_100, 900, "b")]
    extents = [
        [start, length, what, zlib.crc32(data[start : start + length])]
        for start, length, what in tiles
    ]
    record = {"size": len(data), "crc32": zlib.crc32(data), "extents": extents}
    return spans_of({"file": record}), tmp_path / "file"


def test_a_long_span_is_read_in_pieces_by_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(readback, "PIECE_BYTES", 4000)
    spans, file = spans_and_file(tmp_path)
    assert differing(tmp_path, spans, Ranks()) == []
    for offset in (99, 100, 50_000, 99_099, 99_100):
        flip(file, offset)
        (found,) = differing(tmp_path, spans, Ranks())
        assert found.start <= offset < found.start + found.length
        flip(file, offset)
    for world in (1, 2, 3, 7):
        shares = [list(readback._share(spans, rank, world)) for rank in range(world)]
        pieces = sorted((piece.start, piece.length) for share in shares for piece in share)
        assert [start for start, _ in pieces] == [0, *range(100, 99_100, 4000), 99_100]
        assert sum(length for _, length in pieces) == 100_000
        sizes = [sum(piece.length for piece in share) for share in shares]
        assert max(sizes) - min(sizes) <= 2 * 4000


def test_what_cannot_be_read_differs_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spans, file = spans_and_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    (found,) = differing(tmp_path, spans, Ranks())
    assert "bytes 99100 to 100000 (b) cannot be compared: " in found.difference("x")
    assert "truncated" in found.reason
    file.unlink()
    assert [span.what for span in differing(tmp_path, spans, Ranks())] == ["header", "a", "b"]

    def fails(path: Path, start: int, length: int) -> int:
        raise StorageError("the disk of a test has failed")

    monkeypatch.setattr(readback, "crc32_of", fails)
    monkeypatch.setattr(readback, "PIECE_BYTES", 4000)
    found = differing(tmp_path, spans, Ranks())
    assert {span.reason for span in found} == {"the disk of a test has failed"}
    assert len(found) == 3
