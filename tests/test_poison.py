"""Every byte of a target is written by this program: none stays from what was there before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard import commit
from reshard.engine import Engine
from reshard.storage import Files
from tests.commands import call, done, move, one_line, write
from tests.oracles.compare import assert_same_files, files_in

pytestmark = pytest.mark.fault

POISON = b"\xa5"
BLOCK = 64
TARGETS = {
    "meta2": [],
    "hf": ["dst.max_shard_size=100KB"],
    "hf, padded": ["dst.vocab_multiple=48"],
    "tp2pp2, padded": ["dst.vocab_multiple=24"],
    "fsdp3": [],
    "titan3": [],
    "gguf": ["dst.dtype=bfloat16"],
    "gguf, padded": ["dst.vocab_multiple=48"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("meta8", tmp_path_factory.mktemp("poison") / "src")


def words_of(source: Path, target: str, where: Path) -> list[str]:
    kind = target.partition(",")[0]
    return move("meta8", source, kind, where, *TARGETS.get(target, []))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_a_poisoned_file_stays(
    target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(*words_of(source, target, tmp_path / "plain"))
    create, poisoned = commit.create, []

    def poison(path: Path, size: int, chunks: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(POISON * size)
        poisoned.append(path.name)
        create(path, size, chunks)

    monkeypatch.setattr(commit, "create", poison)
    done(*words_of(source, target, tmp_path / "poisoned"))
    assert set(poisoned) == {Path(name).name for name in files_in(tmp_path / "plain")}
    for file in files_in(tmp_path / "poisoned"):
        assert POISON * BLOCK not in (tmp_path / "poisoned" / file).read_bytes(), file
    assert_same_files(tmp_path / "poisoned", tmp_path / "plain")


def skip_a_piece(current: Any) -> None:
    """Forget one piece of a round: no record, no bytes."""
    del current.pieces[len(current.pieces) // 2]


@pytest.mark.parametrize("target", ["hf", "tp2pp2, padded", "gguf", "fsdp3"])
def test_a_block_that_no_rank_writes_is_found_before_it_is_published(
    target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(source, target, tmp_path / "dst")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_write", disturbed(Engine._write, skip_a_piece))
        found = call(*words)
    assert found.code == 1
    line = one_line(found.err)
    assert "no rank has written bytes" in line
    assert "the result is not published" in line
    assert not (tmp_path / "dst").exists()
    done(*words)
    done("verify", tmp_path / "dst")


def disturbed(original: Callable[..., int], disturb: Callable[[Any], None]) -> Any:
    """`Engine._write` whose first round is disturbed."""
    struck = []

    def write_disturbed(self: Engine, current: Any, *args: Any) -> int:
        if not struck:
            disturb(current)
            struck.append(1)
        return original(self, current, *args)

    return write_disturbed


@pytest.mark.parametrize("target", ["hf", "meta2", "tp2pp2, padded"])
def test_bytes_that_the_disk_lost_are_found_by_reading_back(
    target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says that a run was written, and the file does not have it."""
    words = words_of(source, target, tmp_path / "dst")
    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", losing(Files.write))
        done(*words_of(source, target, tmp_path / "unseen"))
    assert call("verify", tmp_path / "unseen").code == 1
    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", losing(Files.write))
        found = call(*words, "engine.verify=true")
    assert found.code == 1
    line = one_line(found.err)
    assert "differ from what was written; a disk or a memory is at fault" in line
    assert line.endswith("the same command goes on where this one stopped")
    assert not (tmp_path / "dst").exists()
    done(*words, "engine.verify=true")
    done("verify", tmp_path / "dst")


def losing(original: Callable[..., None]) -> Any:
    """`Files.write` that loses the bytes of its second call."""
    calls = []

    def write_or_lose(self: Files, file: str, offset: int, buffers: list[memoryview]) -> None:
        calls.append(file)
        if len(calls) == 2:
            buffers = [memoryview(bytes(view.nbytes)) for view in buffers]
        original(self, file, offset, buffers)

    return write_or_lose
