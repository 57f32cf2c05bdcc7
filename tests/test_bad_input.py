"""Input that is refused: exit code 2, one line that names the thing, and nothing touched."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reshard.backends import choose_backend
from reshard.errors import ConfigError
from tests.commands import call, done, model, move, read, refused, write
from tests.oracles import meta
from tests.oracles.compare import assert_same

Damage = Callable[[Path], None]
Usage = namedtuple("Usage", "total used free")
INDEX = "model.safetensors.index.json"


# What the command line, a job file or a topology asks for.

WORDS = {
    "a key of dst": (["dst.max_shard_sise=1GB"], r"`dst.max_shard_sise`.*`max_shard_size`"),
    "a key of src": (["src.replica=first"], r"`src.replica`.*did you mean `replicas`"),
    "a key of engine": (["engine.memry=1GiB"], r"`engine.memry`: did you mean `memory`"),
    "a branch": (["engin.memory=1GiB"], r"`engin.memory=1GiB`.* src, dst or engine"),
    "an axis": (["dst.mesh.tpp=2"], r"`dst.mesh.tpp`: did you mean `tp`"),
    "a word": (["pln"], r"`pln`.*did you mean `plan`"),
    "a flag": (["--frobnicate"], r"unrecognized arguments: --frobnicate; see --help"),
    "a size": (["engine.memory=12parsecs"], r"engine.memory: `12parsecs`.*256MiB"),
    "a negative size": (["engine.memory=-5MiB"], r"engine.memory: `-5MiB` is not a size"),
    "no size": (["dst.max_shard_size=big"], r"dst.max_shard_size: `big` is not a size"),
    "memory of 0": (["engine.memory=0"], r"engine.memory: 0MiB is too little.* works is \d+MiB"),
    "an exchange": (["engine.exchange=dirct"], r"engine.exchange: `dirct`.*`direct`"),
    "writers": (["engine.writers=nearst"], r"engine.writers: `nearst`.*`nearest`"),
    "owners without exchange": (
        ["engine.exchange=direct", "engine.writers=owner"],
        r"engine.writers=owner.*engine.exchange=direct",
    ),
    "a backend": (["engine.backend=ncl"], r"engine.backend: `ncl`.*`nccl`"),
    "no GPU": (["engine.backend=nccl"], r"engine.backend=nccl: no CUDA device.*backend=gloo"),
    "no time": (["engine.timeout=0"], r"engine.timeout: 0 is not a time"),
    "text for a number": (["engine.timeout=soon"], r"engine.timeout: .*soon"),
    "text for a bool": (["engine.fsync=perhaps"], r"engine.fsync: .*perhaps"),
    "a dtype": (["dst.dtype=bfloat61"], r"dst.dtype: `bfloat61`: did you mean `bfloat16`"),
    "a dim": (["dst.embedding_dim=2"], r"dst.embedding_dim: `2`: use one of auto, 0, 1"),
    "replicas": (["src.replicas=frist"], r"src.replicas: `frist`: did you mean `first`"),
    "a model": (["src.model=llama3-7b"], r"src.model: `llama3-7b`.*`llama3-70?8?b`"),
    "an empty axis": (["dst.mesh.tp=0"], r"dst.mesh: tp=0.*begin at 1"),
    "a padding of 0": (["dst.vocab_multiple=0"], r"dst.vocab_multiple: 0, expected 1 to"),
    "a format": (["dst.format=nanotorn"], r"`nanotorn`.*nanotron"),
    "no such sample": (["dst.like=nowhere"], r"`nowhere`: no such directory \(dst.like\)"),
    "no such job file": (["--config", "nowhere.yaml"], r"`nowhere.yaml`: No such file"),
}


@pytest.mark.parametrize(("words", "pattern"), WORDS.values(), ids=WORDS)
def test_a_wrong_word_is_named(words: list[str], pattern: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    refused(tmp_path, pattern, *move("meta8", source, "tp4", tmp_path / "dst"), *words)


SPECS = {
    "a typo": ("metta8", "tp4", r"--src: topology `metta8` is not known: did you mean `meta8`"),
    "a typo of the target": ("meta8", "ttp4", r"--dst: topology `ttp4`.*did you mean `tp4`"),
    "size 0": ("meta8", "tp0", r"topology `tp0`: sizes begin at 1"),
    "another number": ("meta4", "tp4", r"holds 8 consolidated files, but the source is meta4"),
    "more files": ("meta16", "tp4", r"consolidated.08.pth` is missing: found 8 of 16"),
    "another format": ("tp4", "hf", r"model_config.json|no sharded file"),
    "a file not there": ("meta8", "my/tp4.yaml", r"--dst my/tp4.yaml: no such"),
    "files that do not divide": ("meta8", "meta3", r"meta3: 3 files do not divide 16 heads"),
    "too many ranks": ("meta8", "tp16", r"tp=16 .*8 key-value heads.*the largest.* is 8"),
    "odd ranks": ("meta8", "tp3", r"tp=3 .*must divide 16 heads.*the largest that does is 8"),
    "too many stages": ("meta8", "tp1pp9", r"pp=9: 2 layers have work for 4 stages at most"),
}


@pytest.mark.parametrize(("kind", "target", "pattern"), SPECS.values(), ids=SPECS)
def test_a_wrong_topology_is_named(kind: str, target: str, pattern: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    refused(tmp_path, pattern, *move(kind, source, target, tmp_path / "dst"))


def test_what_is_not_said_is_asked_for(tmp_path: Path) -> None:
    source, target = write("meta8", tmp_path / "src"), tmp_path / "dst"
    refused(
        tmp_path,
        r"src.path: which checkpoint",
        "--src",
        "meta8",
        "--dst",
        "tp4",
        f"dst.path={target}",
    )
    refused(tmp_path, r"dst.path: where to", "--src", source, "--dst", "tp4")
    refused(tmp_path, r"--dst: which layout", "--src", source, f"dst.path={target}")
    refused(tmp_path, r"src.path: which checkpoint", "plan", "--src", "meta8", "--dst", "tp4")
    refused(tmp_path, r"--src .*/gone: no such", "--src", tmp_path / "gone", "--dst", "tp4")
    refused(tmp_path, r"a directory is not a target", "--src", source, "--dst", source)
    gone = f"src.path={tmp_path}/gone"
    refused(
        tmp_path,
        r"gone`: no such directory",
        "--src",
        "meta8",
        "--dst",
        "tp4",
        gone,
        f"dst.path={target}",
    )
    refused(
        tmp_path,
        r"--world: 0 is not a number of ranks from 1 to 65,536",
        "plan",
        "--src",
        source,
        "--dst",
        "tp4",
        "--world",
        0,
    )
    refused(tmp_path, r"--world.*many", "plan", "--src", source, "--dst", "tp4", "--world", "many")


FILES = {
    "no YAML": ("src: [1, 2", r"job.yaml`: .*"),
    "a list": ("- src\n- dst\n", r"job.yaml`: .*expected keys and values|job.yaml`"),
    "a branch": ("sorce: {path: here}\n", r"unknown key `sorce`: did you mean `src`"),
    "a key": ("engine: {memroy: 1GiB}\n", r"unknown key `engine.memroy`: did you mean `memory`"),
    "a value for a branch": ("engine: fast\n", r"`engine` is 'fast', expected keys and values"),
    "a mapping for a value": ("engine: {timeout: {a: 1}}\n", r"engine.timeout"),
    "text for a number": ("dst: {mesh: {tp: four}}\n", r"dst.mesh.tp"),
    "a list for a size": ("engine: {memory: [1, 2]}\n", r"engine.memory"),
    "a loop": ("engine: {memory: '${engine.memory}'}\n", r"job.yaml"),
}


@pytest.mark.parametrize(("text", "pattern"), FILES.values(), ids=FILES)
def test_a_wrong_job_file_is_named(text: str, pattern: str, tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    file = tmp_path / "job.yaml"
    file.write_text(text)
    words = move("meta8", source, "hf", tmp_path / "dst")
    refused(tmp_path, pattern, *words, "--config", file)


# Where the target lies.


def test_a_target_that_is_the_source_is_refused(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "a" / "src")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "inside").symlink_to(source.parent)
    pattern = r"dst.path: `.*` and the source `.*` are one, or one lies in the other"
    places = (source, source / "dst", source.parent, tmp_path / "link", tmp_path / "link" / "dst")
    for target in (*places, tmp_path / "a" / "b" / ".." / "src" / "dst", tmp_path / "inside"):
        refused(tmp_path, pattern, *move("meta8", source, "tp4", target))
        refused(tmp_path, pattern, *move("meta8", source, "tp4", target), "--force")


def test_a_target_of_others_is_refused_and_kept(tmp_path: Path) -> None:
    source, target = write("meta8", tmp_path / "src"), tmp_path / "dst"
    target.mkdir()
    (target / "thesis.tex").write_text("three years")
    words = move("meta8", source, "tp4", target)
    refused(tmp_path, r"dst`: exists and is not the result of this job .*; choose another", *words)
    refused(tmp_path, r"dst`: exists without our reshard.json.*--force", *words, "--force")


def test_a_target_of_another_job_is_replaced_only_by_force(tmp_path: Path) -> None:
    source, target = write("meta8", tmp_path / "src"), tmp_path / "dst"
    done(*move("meta8", source, "hf", target))
    words = move("meta8", source, "tp4", target)
    refused(tmp_path, r"dst`: exists and is not the result of this job.*--force", *words)
    done(*words, "--force")
    assert_same(read("tp4", target), model())
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    source, target = write("meta8", tmp_path / "src"), tmp_path / "dst"
    target.write_text("three years")
    words = move("meta8", source, "tp4", target)
    refused(tmp_path, r"dst`: exists and is not a directory", *words)
    refused(tmp_path, r"dst`: exists and is not a directory", *words, "--force")


def test_an_empty_target_counts_as_absent(tmp_path: Path) -> None:
    source, target = write("meta8", tmp_path / "src"), tmp_path / "dst"
    target.mkdir()
    done(*move("meta8", source, "tp4", target))
    assert_same(read("tp4", target), model())


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write("meta8", tmp_path / "src"), tmp_path / "dst"
    words = move("meta8", source, "tp4", target)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
        refused(tmp_path, r"dst.path: needs [\d,]+ bytes, but 1,000 are free in `.*`", *words)
    done(*words)


# Damaged sources. Each function damages a good one.


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of one file."""
    if file.suffix == ".pth":
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)
        return
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def replaced(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def cut(file: str, share: float) -> Damage:
    def damage(source: Path) -> None:
        size = (source / file).stat().st_size
        os.truncate(source / file, int(size * share) if share < 1 else size - 1)

    return damage


def edit_json(file: str, **changes: Any) -> Damage:
    def damage(source: Path) -> None:
        record = json.loads((source / file).read_text()) | changes
        (source / file).write_text(json.dumps(record))

    return damage


def edit_map(key: str, name: str) -> Damage:
    def damage(source: Path) -> None:
        record = json.loads((source / INDEX).read_text())
        record["weight_map"][key] = name
        (source / INDEX).write_text(json.dumps(record))

    return damage


def overwrite(file: str, text: str) -> Damage:
    return lambda source: (source / file).write_text(text) and None


def remove(file: str) -> Damage:
    return lambda source: (source / file).unlink()


def tensors_of(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda source: rewrite(source / file, change)


def without_layers(tensors: dict[str, torch.Tensor]) -> None:
    """Leave what is in no layer."""
    for key in [key for key in tensors if key.startswith("layers.")]:
        del tensors[key]


def hostile(file: str) -> Damage:
    """A pickle that asks for os.system, inside an otherwise good file."""

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {flag}",)

    flag = ""

    def damage(source: Path) -> None:
        nonlocal flag
        flag = str(source.parent / "executed")
        records = {}
        with zipfile.ZipFile(source / file) as archive:
            for name in archive.namelist():
                records[name] = archive.read(name)
        with zipfile.ZipFile(source / file, "w") as archive:
            for name, data in records.items():
                bad = pickle.dumps({"norm.weight": Attack()}, protocol=2)
                archive.writestr(name, bad if name.endswith("/data.pkl") else data)

    return damage


def twice(source: Path) -> None:
    """The header of the only file names the same tensor twice."""
    file = source / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    entry = re.search(r'"model.norm.weight":\{[^}]*\}', header)
    assert entry
    header = header[:-1] + "," + entry[0] + "}"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + size :])


def drop_output(source: Path) -> None:
    """Remove lm_head.weight from index and file, while the config says that it is there."""
    record = json.loads((source / INDEX).read_text())
    del record["weight_map"]["lm_head.weight"]
    (source / INDEX).write_text(json.dumps(record))
    for file in source.glob("*.safetensors"):
        rewrite(file, lambda tensors: tensors.pop("lm_head.weight", None))


def wrong_slices(source: Path) -> None:
    """Two tensor-parallel ranks of one parameter change places: their headers tell."""
    folder = source / "model/model/decoder/1/pp_block/mlp/down_proj"
    one, other = sorted(folder.iterdir())
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def stale(source: Path) -> None:
    """A file of another topology lies among the others."""
    folder = source / "model/model/decoder/0/pp_block/attn/o_proj"
    file = sorted(folder.iterdir())[0]
    shutil.copy(file, folder / "model_weight_pp-rank-0-of-1_tp-rank-0-of-4.safetensors")


def one_layer_more(source: Path) -> None:
    """A layer that the model does not have, of the same topology."""
    shutil.copytree(source / "model/model/decoder/1", source / "model/model/decoder/2")


W2 = "layers.1.feed_forward.w2.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
QKV = "model/model/decoder/1/pp_block/attn/qkv_proj"
QKV_FILE = f"{QKV}/model_weight_pp-rank-0-of-2_tp-rank-1-of-2.safetensors"

META = {
    "a shard is missing": (
        remove("consolidated.03.pth"),
        r"consolidated.03.pth` is missing: found 7 of 8 consolidated files",
    ),
    "the last shard is missing": (
        remove("consolidated.07.pth"),
        r"consolidated.07.pth` is missing: found 7 of 8",
    ),
    "no shard": (
        lambda source: [file.unlink() for file in source.glob("*.pth")],
        r"no consolidated.NN.pth",
    ),
    "half a shard": (cut("consolidated.05.pth", 0.5), r"consolidated.05.pth`: truncated"),
    "a byte short": (cut("consolidated.05.pth", 1), r"consolidated.05.pth`: truncated"),
    "an empty shard": (cut("consolidated.00.pth", 0), r"consolidated.00.pth`: "),
    "a shape": (
        tensors_of("consolidated.06.pth", replaced(W2, lambda t: t[:, :-1])),
        rf"`consolidated.06.pth`: tensor `{W2}` is \S+ \[64, 21\], expected \S+ \[64, 22\]",
    ),
    "a transposed tensor": (
        tensors_of("consolidated.06.pth", replaced(W2, lambda t: t.T)),
        rf"`consolidated.06.pth`: tensor `{W2}` is \S+ \[22, 64\], expected \S+ \[64, 22\]",
    ),
    "a shape in the first shard": (
        tensors_of("consolidated.00.pth", replaced(W2, lambda t: t[:, :-1])),
        rf"`consolidated.00.pth`: tensor `{W2}` is .*\[64, 21\], expected .*\[64, 22\]",
    ),
    "a dtype": (
        tensors_of("consolidated.06.pth", replaced(W2, lambda t: t.half())),
        rf"`consolidated.06.pth`: tensor `{W2}` is float16 .*, expected bfloat16",
    ),
    "a tensor is missing": (
        tensors_of("consolidated.02.pth", lambda t: t.pop(W2)),
        rf"`consolidated.02.pth`: tensor `{W2}` is missing",
    ),
    "a tensor too many": (
        tensors_of("consolidated.02.pth", lambda t: t.update(extra=t[W2].clone())),
        r"`consolidated.02.pth`: tensor `extra` is not part of a meta8 checkpoint",
    ),
    "params without heads": (edit_json("params.json", n_heads=None), r"params.json`: n_heads is"),
    "dim": (edit_json("params.json", dim=128), r"params.json`: dim is 128, .* 64"),
    "n_layers": (edit_json("params.json", n_layers=3), r"params.json`: n_layers is 3, .* 2"),
    "n_heads": (edit_json("params.json", n_heads=8), r"params.json`: n_(kv_)?heads is 8, .* \d+"),
    "n_heads of no width": (
        edit_json("params.json", n_heads=7),
        r"params.json`: n_heads 7 does not divide the width 64",
    ),
    "n_kv_heads": (edit_json("params.json", n_kv_heads=4), r"params.json`: n_kv_heads is 4, .* 8"),
    "vocab_size": (
        edit_json("params.json", vocab_size=99),
        r"params.json`: vocab_size is 99, .* 128",
    ),
    "norm_eps": (edit_json("params.json", norm_eps="small"), r"params.json`: norm_eps is 'small'"),
    "rope_theta without bounds": (
        edit_json("params.json", rope_theta=float("inf")),
        r"params.json`: rope_theta is inf, expected a positive number",
    ),
    "norm_eps that is no number": (
        edit_json("params.json", norm_eps=float("nan")),
        r"params.json`: norm_eps is nan, expected a positive number",
    ),
    "a huge rope_theta": (
        edit_json("params.json", rope_theta=10**400),
        r"params.json`: rope_theta is 10+\.\.\.0+, expected a positive number",
    ),
    "a huge dim": (
        edit_json("params.json", dim=10**400),
        r"params.json`: dim is 10+\.\.\.0+, .* 64",
    ),
    "huge n_heads": (
        edit_json("params.json", n_heads=10**400),
        r"params.json`: n_heads is 10+\.\.\.",
    ),
    "no layers": (
        tensors_of("consolidated.00.pth", without_layers),
        r"consolidated.00.pth`: tensor `layers.0.attention.wq.weight` is missing; this is not a",
    ),
    "no width": (
        tensors_of("consolidated.00.pth", replaced("norm.weight", lambda t: t[:0])),
        r"params.json`: n_heads 16 does not divide the width 0 of norm.weight",
    ),
    "no params.json": (remove("params.json"), r"params.json`: No such file"),
    "no JSON": (overwrite("params.json", '{"dim": 64,'), r"params.json`: not valid JSON"),
    "a JSON list": (overwrite("params.json", "[1, 2]"), r"params.json`: holds list, expected"),
    "a hostile pickle first": (hostile("consolidated.00.pth"), r"consolidated.00.pth`: .*system"),
    "a hostile pickle": (hostile("consolidated.05.pth"), r"consolidated.05.pth`: .*system"),
    "not a torch file": (
        lambda source: (source / "consolidated.04.pth").write_bytes(b"GGUF" * 100) and None,
        r"consolidated.04.pth`: is not a torch zip file",
    ),
}

HF = {
    "half a file": (cut("model-00002-of-00002.safetensors", 0.5), r"00002-of-00002.*truncated"),
    "a byte short": (cut("model-00002-of-00002.safetensors", 1), r"00002-of-00002.*truncated"),
    "a file of 4 bytes": (
        lambda source: os.truncate(source / "model-00001-of-00002.safetensors", 4),
        r"00001-of-00002.*truncated: 4 bytes",
    ),
    "a file is missing": (
        remove("model-00002-of-00002.safetensors"),
        rf"{INDEX}`: `.*` is in `model-00002-of-00002.safetensors`, which is not there",
    ),
    "a path upwards": (
        edit_map(Q, "../other/model.safetensors"),
        rf"{INDEX}`: names the file `../other/model.safetensors`, which lies outside",
    ),
    "a path upwards later": (
        edit_map(Q, "sub/../../model.safetensors"),
        rf"{INDEX}`: names the file `sub/../../model.safetensors`, which lies outside",
    ),
    "an absolute path": (
        edit_map(Q, "/etc/passwd"),
        rf"{INDEX}`: names the file `/etc/passwd`, which lies outside",
    ),
    "no file name": (edit_map(Q, ""), rf"{INDEX}`: names the file ``"),
    "a file that is not there": (
        edit_map(Q, "model-00003-of-00002.safetensors"),
        rf"{INDEX}`: `{Q}` is in `model-00003-of-00002.safetensors`, which is not there",
    ),
    "a number for a file": (edit_map(Q, 3), rf"{INDEX}`: `{Q}` maps to 3"),  # type: ignore[arg-type]
    "a file that is no safetensors": (edit_map(Q, "config.json"), r"config.json"),
    "the other file": (
        edit_map("model.norm.weight", "model-00001-of-00002.safetensors"),
        r"`model-0000\d-of-00002.safetensors`: tensor `model.norm.weight` is ",
    ),
    "no map": (overwrite(INDEX, "{}"), rf"{INDEX}`: `weight_map` is missing"),
    "an index that is no JSON": (overwrite(INDEX, "{"), rf"{INDEX}`: not valid JSON"),
    "a config that is no JSON": (overwrite("config.json", "nope"), r"config.json`: not valid JSON"),
    "a deep config": (overwrite("config.json", "[" * 100_000), r"config.json`: not valid JSON"),
    "no config": (remove("config.json"), r"config.json` is missing.*src.model=FILE"),
    "a config of 3 kv heads": (
        edit_json("config.json", num_key_value_heads=3),
        r"3 key-value heads do not divide 16 attention heads",
    ),
    "a config of no layers": (
        edit_json("config.json", num_hidden_layers=None),
        r"config.json`: `num_hidden_layers` is missing",
    ),
    "a config with text for a size": (
        edit_json("config.json", vocab_size="128"),
        r"`vocab.*` is '128', expected a positive int",
    ),
    "a config of more layers": (
        edit_json("config.json", num_hidden_layers=3),
        r"src`: 9 tensors are missing, first `model.layers.2.",
    ),
    "a config of fewer layers": (
        edit_json("config.json", num_hidden_layers=1),
        r"tensors are not part of a llama model, first `model.layers.1.\S+` in",
    ),
    "a config of another width": (
        edit_json("config.json", intermediate_size=160),
        r"tensor `\S+` is bfloat16 \[\d+, \d+\], expected bfloat16 \[\d+, \d+\]",
    ),
    "a config of a huge rotary base": (
        edit_json("config.json", rope_theta=10**400),
        r"`rope_theta` is 10+\.\.\.0+, which is no rope_theta",
    ),
    "a config of huge positions": (
        edit_json("config.json", max_position_embeddings=10**400),
        r"`max_positions` is 10+\.\.\.0+, which is no max_positions",
    ),
    "a config of a huge width": (
        edit_json("config.json", hidden_size=10**400),
        r"`hidden` is 10+\.\.\.0+, expected a positive int",
    ),
    "a config of another family": (
        edit_json("config.json", model_type="mamba"),
        r"meta: needs to know .* model type mamba is not known; use --dst hf or fsdpN",
    ),
    "untied without output": (
        drop_output,
        r"1 tensors are missing, first `lm_head.weight`; .*src.tied=true",
    ),
}


NANOTRON = {
    "a shard is missing": (remove(QKV_FILE), rf"{QKV_FILE}` is missing: 1 of \d+ files"),
    "a module is missing": (
        lambda source: shutil.rmtree(source / QKV),
        r"decoder/1/pp_block/attn/qkv_proj/\S+` is missing: 2 of \d+ files of tp=2 pp=2",
    ),
    "a norm is missing": (
        remove("model/model/final_layer_norm/pp_block/model_weight.safetensors"),
        r"final_layer_norm/pp_block/model_weight.safetensors` is missing",
    ),
    "no embedding": (
        lambda source: shutil.rmtree(source / "model/model/token_position_embeddings"),
        r"no file of token_position_embeddings",
    ),
    "a stale shard": (stale, r"of-1_tp-rank-0-of-4\S+ and \S+of-2_tp-rank-\d-of-2.*one topology"),
    "a layer too many": (one_layer_more, r"decoder/2/\S+` does not belong to this model"),
    "a file of another kind": (
        lambda source: shutil.copy(source / QKV_FILE, source / QKV / "model_scale.safetensors"),
        r"model_scale.safetensors`: not the name of a file that Nanotron writes",
    ),
    "slices that disagree": (wrong_slices, r"down_proj\S+`: its header says local_global_slices"),
    "half a shard": (cut(QKV_FILE, 0.5), r"tp-rank-1-of-2.safetensors.*truncated"),
    "another key": (
        tensors_of(QKV_FILE, lambda t: t.update(weight=t.pop("data"))),
        r"`\S*tp-rank-1-of-2\S*`: .*`(data|weight)`",
    ),
    "a dtype": (
        tensors_of(QKV_FILE, replaced("data", lambda t: t.half())),
        r"tensor `data` is float16 .*, expected bfloat16",
    ),
    "a shape": (
        tensors_of(QKV_FILE, replaced("data", lambda t: t[:-1])),
        r"tensor `data` is bfloat16 \[63, 64\], expected bfloat16 \[64, 64\]",
    ),
    "no config": (remove("model_config.json"), r"model_config.json`: No such file"),
    "no JSON": (overwrite("model_config.json", "{,}"), r"model_config.json`: not valid JSON"),
    "a vocabulary": (
        edit_json("model_config.json", vocab_size=120),
        r"model_config.json`: vocab_size 120, but the embedding's files hold 128 rows",
    ),
    "an unknown row order": (
        edit_json("model_config.json", rope_interleaved=None),
        r"model_config.json`: says nothing of rope_interleaved",
    ),
}

DAMAGES = [
    pytest.param(kind, target, damage, pattern, id=f"{kind}: {name}")
    for kind, target, table in (
        ("meta8", "tp4", META),
        ("hf2", "meta8", HF),
        ("tp2pp2", "hf", NANOTRON),
    )
    for name, (damage, pattern) in table.items()
]


@pytest.mark.parametrize(("kind", "target", "damage", "pattern"), DAMAGES)
def test_a_damaged_source_is_refused(
    kind: str, target: str, damage: Damage, pattern: str, tmp_path: Path
) -> None:
    source = write(kind, tmp_path / "src")
    damage(source)
    words = move(kind.replace("hf2", "hf"), source, target, tmp_path / "dst")
    refused(tmp_path, pattern, *words)
    assert not (tmp_path / "executed").exists(), "code of a checkpoint was run"


def test_a_params_json_that_makes_no_model_is_refused(tmp_path: Path) -> None:
    source, params = write("hf2", tmp_path / "src"), tmp_path / "params.json"
    (source / "config.json").unlink()
    sizes = '"dim": 64, "n_layers": 2, "n_heads": 16, "vocab_size": 128, "multiple_of": 16'
    params.write_text(f'{{{sizes}, "ffn_dim_multiplier": 1e400}}')
    words = move("hf", source, "tp2", tmp_path / "dst")
    pattern = r"params.json`: ffn_dim_multiplier is inf, expected a positive number up to 1e\+30"
    refused(tmp_path, pattern, *words, f"src.model={params}")


def test_the_undamaged_sources_are_accepted(tmp_path: Path) -> None:
    for kind, target in (("meta8", "tp4"), ("hf2", "meta8"), ("tp2pp2", "hf")):
        source = write(kind, tmp_path / kind)
        done(*move(kind.replace("hf2", "hf"), source, target, tmp_path / f"to-{target}"))
        assert_same(read(target, tmp_path / f"to-{target}"), model())


def test_a_tensor_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    twice(source)
    pattern = r"model.safetensors`: .*the key `model.norm.weight` appears twice"
    refused(tmp_path, pattern, *move("hf", source, "tp4", tmp_path / "dst"))


def test_the_same_damage_is_refused_wherever_the_source_is_detected(tmp_path: Path) -> None:
    source = write("meta8", tmp_path / "src")
    (source / "consolidated.03.pth").unlink()
    words = ("--src", source, "--dst", "tp4", f"dst.path={tmp_path / 'dst'}")
    refused(tmp_path, r"consolidated.03.pth` is missing", *words)
    refused(tmp_path, r"consolidated.03.pth` is missing", "plan", *words)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    to = f"dst.path={tmp_path / 'dst'}"
    pattern = r"empty`: looks like none of .*hf.*meta.*nanotron"
    refused(tmp_path, pattern, "--src", tmp_path / "empty", "--dst", "tp4", to)
    refused(tmp_path, pattern, "inspect", tmp_path / "empty")
    refused(tmp_path, pattern, "verify", tmp_path / "empty", tmp_path / "empty")
    refused(tmp_path, r"empty`: has no reshard.json", "verify", tmp_path / "empty")
    refused(tmp_path, r"gone`: no such directory", "inspect", tmp_path / "gone")


def test_a_directory_of_two_formats_is_refused_unless_one_is_named(tmp_path: Path) -> None:
    source = write("meta8", write("hf", tmp_path / "src"))
    to = f"dst.path={tmp_path / 'dst'}"
    pattern = r"src`: looks like (hf and meta|meta and hf); name its topology with --src NAME"
    refused(tmp_path, pattern, "--src", source, "--dst", "tp4", to)
    done("--src", "meta8", f"src.path={source}", "--dst", "tp4", to)


def test_a_run_folder_whose_step_is_gone_is_refused(tmp_path: Path) -> None:
    source = write("tp2", tmp_path / "run" / "10")
    (source.parent / "latest.txt").write_text("../20")
    words = ("--src", source.parent, "--dst", "hf", f"dst.path={tmp_path / 'dst'}")
    refused(tmp_path, r"latest.txt`: names step `../20`, which is not there", *words)


# Copies that differ.


def test_kv_heads_whose_copies_differ_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    source = tmp_path / "src"
    meta.write(model(num_key_value_heads=4), source, 8)
    key = "layers.1.attention.wk.weight"
    rewrite(source / "consolidated.05.pth", replaced(key, lambda t: -t))
    pattern = rf"`consolidated.05.pth`: tensor `{key}` differs from its copy .*consolidated.04.pth"
    found = refused(tmp_path, pattern, *move("meta8", source, "tp4", tmp_path / "dst"))
    assert "must agree" in found


def test_norms_that_differ_are_taken_once_and_reported_or_refused(tmp_path: Path) -> None:
    source = tmp_path / "src"
    meta.write(model(), source, 8, norm_noise=3)
    words = move("meta8", source, "hf", tmp_path / "dst")
    pattern = r"`consolidated.03.pth`: tensor `\S*norm.weight` differs .*src.replicas=first"
    refused(tmp_path, pattern, *words, "src.replicas=strict")
    found = done(*words)
    assert len(re.findall("^warning: ", found.out, re.MULTILINE)) == 1, found.out
    assert re.search(r"warning: 5 copies of 5 .*norm.weight` in `consolidated.03.pth`", found.out)
    assert_same(read("hf", tmp_path / "dst"), model())


# What a target cannot hold.


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("target", ["meta8", "tp4"])
def test_biases_are_refused_where_there_is_no_place_for_them(
    bias: str, target: str, tmp_path: Path
) -> None:
    source = write("hf", tmp_path / "src", model(**{bias: True}))
    pattern = rf"the model has {bias}=true, and .* holds no biases; use --dst hf"
    refused(tmp_path, pattern, *move("hf", source, target, tmp_path / "dst"))
    config = f"src.model={source / 'config.json'}"
    refused(tmp_path, pattern, "plan", "--src", "hf", "--dst", target, config)


def test_hugging_face_keeps_biases(tmp_path: Path) -> None:
    biased = model(attention_bias=True, mlp_bias=True)
    source = write("hf", tmp_path / "src", biased)
    done(*move("hf", source, "hf", tmp_path / "dst", "dst.max_shard_size=60KB"))
    assert_same(read("hf", tmp_path / "dst"), biased)
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) > 2


ODD = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 36, "head_dim": 3}
ODD |= {"intermediate_size": 60, "vocab_size": 60}


def test_odd_heads_have_no_interleaved_rows(tmp_path: Path) -> None:
    odd = model(**ODD)
    source = write("hf", tmp_path / "src", odd)
    pattern = r"rotary heads of 3 rows have no two halves.*--dst hf"
    refused(tmp_path, pattern, *move("hf", source, "meta2", tmp_path / "dst"))
    interleaved = move("hf", source, "tp2", tmp_path / "dst", "dst.rope_interleaved=true")
    refused(tmp_path, pattern, *interleaved)
    done(*move("hf", source, "tp2", tmp_path / "dst"))
    assert_same(read("tp2", tmp_path / "dst"), odd)


@pytest.mark.parametrize("target", ["meta8", "tp4"])
def test_heads_of_another_size_are_refused_where_no_field_says_it(
    target: str, tmp_path: Path
) -> None:
    source = write("hf", tmp_path / "src", model(head_dim=8))
    pattern = r"16 heads of 8 are not the hidden size 64"
    refused(tmp_path, pattern, *move("hf", source, target, tmp_path / "dst"))


def test_a_vocabulary_that_does_not_divide_can_be_padded_as_the_message_says(
    tmp_path: Path,
) -> None:
    uneven = model(vocab_size=130)
    source = write("hf", tmp_path / "src", uneven)
    words = move("hf", source, "tp4", tmp_path / "dst")
    pattern = r"tp does not divide the vocabulary of 130; .*dst.vocab_multiple=1 \(to 132 rows\)"
    line = refused(tmp_path, rf"{pattern}, or use tp in \[1, 2\]", *words)
    assert "tp=4" in line
    done(*words, "dst.vocab_multiple=1")
    assert_same(read("tp4", tmp_path / "dst", vocab_size=130), uneven)
    refused(
        tmp_path,
        r"meta4: 4 files do not divide .*vocabulary 130; use one of \[1, 2\]",
        *move("hf", source, "meta4", tmp_path / "other"),
    )


def test_the_largest_tp_that_a_message_names_works(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    line = refused(
        tmp_path, r"the largest that does is \d+", *move("hf", source, "tp16", tmp_path / "dst")
    )
    largest = re.findall(r"the largest that does is (\d+)", line)[0]
    assert largest == "8"
    done(*move("hf", source, f"tp{largest}", tmp_path / "dst"))
    assert_same(read("tp8", tmp_path / "dst"), model())


def test_the_least_memory_that_a_message_names_works(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    words = move("hf", source, "tp4", tmp_path / "dst")
    line = refused(tmp_path, r"engine.memory: 1MiB is too little", *words, "engine.memory=1MiB")
    least = int(re.findall(r"the least that works is (\d+)MiB", line)[0])
    refused(
        tmp_path, rf"the least that works is {least}MiB", *words, f"engine.memory={least - 1}MiB"
    )
    assert f"(least that works: {least} MiB)" in done("plan", *words).out
    done(*words, f"engine.memory={least}MiB")
    assert_same(read("tp4", tmp_path / "dst"), model())


def test_a_cast_of_what_a_manifest_says_is_no_surprise(tmp_path: Path) -> None:
    """A sample whose format is another than the one asked for is refused."""
    source, sample = write("hf", tmp_path / "src"), write("meta4", tmp_path / "sample")
    words = move("hf", source, "tp4", tmp_path / "dst", f"dst.like={sample}")
    refused(tmp_path, r"dst.like: `.*sample` is meta4, but --dst says nanotron", *words)


# What must not be refused.


def test_a_hub_cache_of_symbolic_links_is_accepted(tmp_path: Path) -> None:
    real = write("hf2", tmp_path / "real")
    (real / "tokenizer.json").write_text("{}")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    done("--src", snapshot, "--dst", "meta4", f"dst.path={tmp_path / 'meta'}")
    assert_same(read("meta4", tmp_path / "meta"), model())
    done("--src", snapshot, "--dst", "hf", f"dst.path={tmp_path / 'dst'}")
    carried = tmp_path / "dst" / "tokenizer.json"
    assert carried.read_text() == "{}"
    assert not carried.is_symlink()


# Backends.


@pytest.mark.parametrize(
    ("asked", "ranks", "devices", "chosen", "remark"),
    [
        ("auto", 4, 0, "gloo", None),
        ("auto", 4, 4, "nccl", None),
        ("auto", 1, 8, "nccl", None),
        ("auto", 8, 4, "gloo", r"8 ranks on 4 GPUs: using Gloo on CPU"),
        ("gloo", 2, 8, "gloo", None),
        ("nccl", 8, 8, "nccl", None),
    ],
)
def test_the_backend_follows_from_ranks_and_devices(
    asked: str, ranks: int, devices: int, chosen: str, remark: str | None
) -> None:
    found, said = choose_backend(asked, ranks, devices)
    assert found == chosen
    assert said is None if remark is None else re.search(remark, said or "")


@pytest.mark.parametrize(
    ("ranks", "devices", "pattern"),
    [
        (1, 0, r"engine.backend=nccl: no CUDA device"),
        (8, 4, r"8 ranks .*4 GPUs.*--nproc-per-node 4"),
    ],
)
def test_nccl_without_enough_devices_is_refused(ranks: int, devices: int, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        choose_backend("nccl", ranks, devices)


def test_help_is_no_failure() -> None:
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
