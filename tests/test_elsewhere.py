"""Sources of which no rank sees all files: found out, looked at together, read where they are."""

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from reshard import formats
from reshard.elsewhere import whole_everywhere
from reshard.sights import look
from tests import two_nodes
from tests.commands import done, model, move, one_line, read, write
from tests.oracles import hf, meta, models, nanotron
from tests.oracles.compare import assert_same, assert_same_files
from tests.oracles.models import LLAMA3_SCALING, Model
from tests.sabotage import WRITE
from tests.two_nodes import Outcome, Pair, halves, last, part

HELD = model()
FIRST = "consolidated.00.pth"
SMALL_FILE = re.compile(r"[\w.]*\.(json|txt|yaml|metadata|jinja|toml)")


def scaled() -> Model:
    return models.build(HELD.config, False, torch.bfloat16, {"rope_scaling": LLAMA3_SCALING})


def wide() -> Model:
    """A model of which no matrix is small, even in one of 16 files."""
    sizes = {"hidden_size": 256, "head_dim": 16}
    return models.build(HELD.config, False, torch.bfloat16, sizes)


def by_way_of(target: str, held: Model, path: Path) -> None:
    """Write a source as the program itself does."""
    hf.write(held, path.with_name("first"))
    done(*move("hf", path.with_name("first"), target, path))


def tokenized(path: Path) -> None:
    hf.write(HELD, path, 5)
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("as you like")


# What is split: how it is written, its topology, that of the target, and which node has what.
SPLIT: dict[str, tuple[Callable[[Path], object], str, str, two_nodes.Share]] = {
    "meta": (lambda path: meta.write(HELD, path, 8), "meta8", "tp4", halves),
    "tied": (lambda path: meta.write(model(tied=True), path, 1), "meta1", "hf", last),
    "copied": (lambda path: meta.write(wide(), path, 16), "meta16", "hf", last),
    "hf": (tokenized, "hf", "meta4", halves),
    "nanotron": (lambda path: nanotron.write(HELD, path, 2, 2), "tp2pp2", "hf", halves),
    "dcp": (lambda path: by_way_of("fsdp4", HELD, path), "dcp", "tp2", halves),
    "gguf": (lambda path: by_way_of("gguf", scaled(), path), "gguf", "meta2", last),
    "only small": (tokenized, "hf", "meta2", halves),
    "texts": (lambda path: meta.write(HELD, path, 2), "meta2", "tp2", halves),
    "noisy": (lambda path: meta.write(HELD, path, 4, norm_noise=1), "meta4", "tp2", halves),
    "noisy far": (lambda path: meta.write(HELD, path, 4, norm_noise=3), "meta4", "tp2", halves),
}
# Small files that may differ: what no format reads, and what a download has left.
OF_NO_MATTER = ("log", "logs/stats.json", ".cache/huggingface/download/config.json.metadata")
OF_NO_MATTER += (".cache/config.json",)
# What is changed on the first node before: such a source is refused.
REFUSED = {
    "two of one name": r"`src/consolidated.00.pth`: ranks 0-1 see \d+ bytes of 20.*, ranks 2-3 ",
    "two of one time": r"`src/consolidated.00.pth`: ranks 0-1 see 9 bytes of .*, ranks 2-3 \d+ ",
    "two texts": r"`src/params.json`: ranks 0-1 see \d+ bytes of .*, ranks 2-3 \d+ bytes of",
    "none": r"`src/consolidated.00.pth` is missing: found 1 of 2 consolidated files; complete",
    "damaged": r"`src/consolidated.00.pth`: truncated or not a torch zip file: 5000 bytes, but",
    "inside": r"dst.path: `src/below` and the source `src` are one, or one lies in the other",
    "too large": r"`src`: 900,0\d\d,\d+ bytes of small files that not all ranks see, expected 805,",
    "direct": r"`consolidated.00.pth` is seen by ranks 0-1 alone; use engine.exchange=collective",
}

ASKED = {"direct": ("engine.exchange=direct",), "inside": ("dst.path=src/below",)}


def spoiled(case: str, pair: Pair) -> None:
    """Make a source one that is to be refused."""
    one, other = (pair.root / f"node{number}" / "src" for number in range(2))
    if case.startswith("two of"):
        shutil.copy2(one / FIRST, other / FIRST)
    if case == "two of one name":
        os.utime(other / FIRST, (1e9, 1e9))
    if case == "two of one time":
        (one / FIRST).write_bytes(b"a tensor?")
    if case == "two texts":
        (one / "params.json").write_text((other / "params.json").read_text() + " ")
    if case == "none":
        (one / FIRST).unlink()
    if case == "too large":
        for folder in (one / "step-1", other / "step-2"):
            folder.mkdir()
            (folder / ".metadata").touch()
            os.truncate(folder / ".metadata", 450_000_000)
    if case == "damaged":
        os.truncate(one / FIRST, 5000)


def test_what_two_nodes_hold_becomes_what_one_would_make_of_it(tmp_path: Path) -> None:
    pairs = {}
    for case, (made, source, target, share) in SPLIT.items():
        root = tmp_path / case
        made(root / "whole")
        part(root / "whole", root, share)
        pairs[case] = Pair(root, source, target)
    with_texts_of_its_own(pairs["texts"].root)
    with_all_weights(pairs["only small"].root)
    found = dict(zip(pairs, two_nodes.run_all(list(pairs.values()), tmp_path), strict=True))
    assert {case: outcome.error for case, outcome in found.items()} == dict.fromkeys(SPLIT, "")
    for case, pair in pairs.items():
        done(*move(pair.source, pair.root / "whole", pair.target, pair.root / "plain"))
        assert_same_files(pair.root / "dst", pair.root / "plain")
        counted = found[case].bytes
        for what in ("read", "exchanged", "written"):
            assert counted[what] == counted[f"{what}_bound"], (case, what)
    check_samples(pairs, found)
    check_small_files(pairs)
    check_copies(found)


def with_texts_of_its_own(root: Path) -> None:
    """Texts on both nodes, one the same but for its time, and some that are of no matter."""
    shutil.copy(root / "whole" / "params.json", root / "node0" / "src")
    for node in ("node0", "node1"):
        for name in OF_NO_MATTER:
            file = root / node / "src" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(node)


def with_all_weights(root: Path) -> None:
    """All on both nodes, but for the tokenizer."""
    for node in ("node0", "node1"):
        shutil.copytree(root / "whole", root / node / "src", dirs_exist_ok=True)
    (root / "node0" / "src" / "tokenizer.json").unlink()


def check_samples(pairs: dict[str, Pair], found: dict[str, Outcome]) -> None:
    """What a scan reads of weights has been read where they are."""
    assert "tied embeddings: output.weight equals" in found["tied"].said
    assert "8 key-value heads, each stored 2 times" in found["copied"].said
    params = json.loads((pairs["gguf"].root / "dst" / "params.json").read_text())
    assert params["use_scaled_rope"] is True


def check_small_files(pairs: dict[str, Pair]) -> None:
    """What only the second node has is in the target."""
    for case in ("hf", "only small"):
        target = pairs[case].root / "dst"
        assert (target / "assets" / "tokenizer.json").read_text() == "{}"
        assert (target / "LICENSE").read_text() == "as you like"


def check_copies(found: dict[str, Outcome]) -> None:
    """Copies are compared wherever they are; the first rank measures what it sees."""
    for case, measured in (("noisy", "7.9"), ("noisy far", "not measured")):
        (warning,) = found[case].warnings
        assert warning.startswith("5 copies of 5 replicated tensors differ from the first")
        assert f"largest difference {measured}" in warning


def test_what_is_no_source_is_refused_in_the_users_words(tmp_path: Path) -> None:
    pairs = {case: Pair(tmp_path / case, "meta2", "tp2", ASKED.get(case, ())) for case in REFUSED}
    for case, pair in pairs.items():
        part(write("meta2", pair.root / "whole"), pair.root)
        spoiled(case, pair)
    outcomes = two_nodes.run_all(list(pairs.values()), tmp_path)
    for (case, pair), found in zip(pairs.items(), outcomes, strict=True):
        assert re.search(REFUSED[case], found.error), (case, found.error)
        assert "reshard-" not in found.error
        assert not (pair.root / "dst").exists()


def test_only_what_a_writer_does_not_hold_crosses(tmp_path: Path) -> None:
    """Files 0 to 3 are on the node of ranks 0 and 1, and theirs in turn; 4 to 7 of 2 and 3."""
    part(write("meta8", tmp_path / "whole"), tmp_path)
    pair = Pair(tmp_path, "meta8", "tp4", ("engine.writers=owner",))
    (found,) = two_nodes.run_all([pair], tmp_path)
    assert not found.error
    assert_same(read("tp4", tmp_path / "dst"), HELD)
    crossing = two_nodes.crossing_to_owners(tmp_path, HELD, (0, 1, 0, 1, 2, 3, 2, 3))
    assert 0 < crossing == found.bytes["exchanged"] == found.bytes["exchanged_bound"]


def test_a_job_begun_on_two_nodes_is_finished_where_all_is_seen(tmp_path: Path) -> None:
    meta.write(models.wide_model(4 << 20), tmp_path / "whole", 4)
    part(tmp_path / "whole", tmp_path)
    pair = Pair(tmp_path, "meta4", "tp2", ("engine.memory=14MiB",))
    codes, job = two_nodes.command(pair, WRITE, 1, 3, "fail")
    assert codes == [1] * 4
    assert "a test has failed; the same command goes on" in one_line(job.err)
    assert not os.listdir(tmp_path / "scratch")
    assert not (tmp_path / "dst").exists()
    report = ("--report", tmp_path / "report.json")
    done(*move("meta4", tmp_path / "whole", "tp2", tmp_path / "dst", *report))
    assert json.loads((tmp_path / "report.json").read_text())["bytes"]["resumed"] > 0
    done(*move("meta4", tmp_path / "whole", "tp2", tmp_path / "plain"))
    assert_same_files(tmp_path / "dst", tmp_path / "plain")


def test_looking_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / "blob").write_text("abc")
    (tmp_path / "src" / ".cache").mkdir()
    for name in (".cache/file", ".metadata"):
        shutil.copy2(tmp_path / "blob", tmp_path / "src" / name)
    (tmp_path / "src" / "deep" / "file").symlink_to(tmp_path / "blob")
    (tmp_path / "src" / "deep" / "back").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "round").symlink_to("round")
    os.mkfifo(tmp_path / "src" / "pipe")
    (tmp_path / "current").symlink_to(tmp_path / "src")
    state = (3, (tmp_path / "blob").stat().st_mtime_ns)
    seen = {"deep/file": state, ".metadata": state}
    assert look(tmp_path / "src", ()) == seen
    assert look(tmp_path / "current", ("../blob", "../none")) == {**seen, "../blob": state}
    assert look(tmp_path / "nowhere", ()) == {}


def test_every_small_file_that_a_format_speaks_of_is_whole_everywhere() -> None:
    """But for those of which it is only told that they are there, or which are only written."""
    named = set()
    for module in Path(formats.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and SMALL_FILE.fullmatch(value):
                named.add(value)
    unread = {"checkpoint_metadata.json", "config.yaml", "adapter_config.json"}
    assert {"model_config.json", "pytorch_model.bin.index.json", ".metadata"} <= named
    assert named - whole_everywhere(named) == unread
