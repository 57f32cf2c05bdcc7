"""A format from outside of the package: one short file and an entry point are all that it takes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from reshard import formats
from tests.commands import call, done, model, move, refused, write
from tests.oracles import hf
from tests.oracles.compare import assert_same
from tests.oracles.dcp import assert_same_tensors
from tests.oracles.rope import interleave

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).parent / "toy"
PYTHON = [sys.executable, "-m"]
TWO_RANKS = [*PYTHON, "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
ENTRY_POINTS = "[reshard.formats]\ntoy = toy_format\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of installed packages, as pip leaves it of a package with that entry point."""
    site = tmp_path_factory.mktemp("site")
    (site / "toy_format.py").symlink_to(TOY / "toy_format.py")
    installed = site / "toy_format-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


@pytest.fixture
def known(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The format is known in this process."""
    monkeypatch.syspath_prepend(site)
    formats.formats.cache_clear()
    yield
    formats.formats.cache_clear()


def topology(folder: Path) -> Path:
    """What `--dst` names."""
    (folder / "toy.yaml").write_text("format: toy\n")
    return folder / "toy.yaml"


def start(site: Path, begin: list[str], *words: object) -> None:
    """Run a command in processes of its own, where the format is installed."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    paths = {"PYTHONPATH": f"{ROOT}:{site}", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*begin, "reshard", *map(str, words)],
        env=kept | paths,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "done: " in found.stdout


def stored() -> dict[str, Tensor]:
    """The files of the format by its description."""
    names = {
        "model.embed_tokens": "embedding",
        "model.norm": "norm",
        "lm_head": "output",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.o_proj": "attention.o",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
        "input_layernorm": "attention.norm",
        "post_attention_layernorm": "mlp.norm",
    }
    heads = {"q_proj": 16, "k_proj": 8}
    found = {}
    for key, tensor in model().tensors.items():
        name = key.removesuffix(".weight")
        *folder, rest = name.removeprefix("model.").split(".", 2) if ".layers." in name else [name]
        count = heads.get(name.rpartition(".")[2])
        file = "/".join([*folder, f"{names[rest]}.safetensors"])
        found[file] = interleave(tensor, count) if count else tensor
    return found


def read(target: Path) -> dict[str, Tensor]:
    """All files, each of which holds one tensor."""
    found = {}
    for file in target.rglob("*.safetensors"):
        [(key, found[str(file.relative_to(target))])] = load_file(file).items()
        assert key == "weight"
    return found


def check_same_bytes(one: Path, other: Path) -> None:
    """Both directories hold the same files, but for the manifest."""
    names = [{file.name for file in folder.iterdir()} - {"reshard.json"} for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0] - {"assets"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_it_takes_no_more_than_a_short_file() -> None:
    assert len((TOY / "toy_format.py").read_text().splitlines()) <= 60


def test_ranks_that_find_it_installed_write_and_read_it(site: Path, tmp_path: Path) -> None:
    source, toy = write("hf", tmp_path / "src"), tmp_path / "toy"
    start(site, TWO_RANKS, *move("hf", source, str(topology(tmp_path)), toy))
    assert_same_tensors(read(toy), stored())
    start(site, PYTHON, "--src", toy, "--dst", "meta2", f"dst.path={tmp_path}/meta")
    done(*move("hf", source, "meta2", tmp_path / "expected"))
    check_same_bytes(tmp_path / "meta", tmp_path / "expected")


@pytest.mark.usefixtures("known")
def test_it_is_a_format_like_any_other(tmp_path: Path) -> None:
    source, toy, spec = write("meta8", tmp_path / "src"), tmp_path / "toy", topology(tmp_path)
    words = move("meta8", source, str(spec), toy)
    assert "meta8 (8 files, " in done("plan", *words).out
    assert "meta8 -> toy in " in done(*words).last
    assert_same_tensors(read(toy), stored())
    done(*move(str(spec), toy, "hf", tmp_path / "hf"))
    assert_same(hf.read(tmp_path / "hf"), model())
    for target in ("tp2pp2", "fsdp3", "titan2", "meta4"):
        done("--src", toy, "--dst", target, f"dst.path={tmp_path}/{target}")
    done("--src", tmp_path / "fsdp3", f"dst.path={tmp_path}/back", "dst.format=toy")
    assert_same_tensors(read(tmp_path / "back"), stored())
    assert call("verify", toy).code == 0
    assert call("verify", toy, source).code == 0


@pytest.mark.usefixtures("known")
def test_it_is_detected_and_looked_into(tmp_path: Path) -> None:
    write("hf", tmp_path / "src")
    done("--src", tmp_path / "src", "--dst", topology(tmp_path), f"dst.path={tmp_path}/toy")
    found = json.loads(done("inspect", tmp_path / "toy", "--json").out)
    assert (found["format"], found["files"], found["rope"]) == ("toy", 21, "interleaved rows")
    file = tmp_path / "toy" / "layers" / "1" / "mlp.up.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    words = ["--src", tmp_path / "toy", "--dst", "hf", f"dst.path={tmp_path}/dst"]
    refused(tmp_path, r"layers/1/mlp.up.safetensors`: .*truncated", *words)
    file.unlink()
    refused(tmp_path, r"layers/1/mlp.up.safetensors`: no such file", *words)


def test_without_its_package_it_is_not_known(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    words = move("hf", source, str(topology(tmp_path)), tmp_path / "dst")
    refused(tmp_path, r"format `toy` is not known; use one of fsdp, gguf, hf, meta", *words)
