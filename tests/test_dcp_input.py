"""DCP directories and torch files that are refused: one line, exit code 2, nothing run or made."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import call, done, model, move, one_line, refused
from tests.oracles import dcp, hf, mllama, titan
from tests.oracles.compare import assert_same
from tests.oracles.dcp import Trap

Damage = Callable[[Path], Any]
Q, Q1 = (f"model.model.layers.{n}.self_attn.q_proj.weight" for n in range(2))
NORM = "model.model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards below `model`, a learning rate beside them, and config.json."""
    path = tmp_path_factory.mktemp("good") / "src"
    dcp.write_fsdp(model(), path, 3, extra={"lr": {"last": [0.1]}})
    write_config(path)
    return path


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(good, tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path) -> Iterator[None]:
    """No pickle that a test has trapped is ever obeyed."""
    yield
    assert not (tmp_path / "marker").exists(), "code inside a pickle was run"


def write_config(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model().config | changes))


def refuse(root: Path, pattern: str, kind: str = "dcp", target: str = "hf", *more: object) -> str:
    """Refuse `root/src` as what is said to be in it."""
    return refused(root, pattern, *move(kind, root / "src", target, root / "dst", *more))


# Pickles that would run something.


def test_metadata_that_would_run_something_is_refused(source: Path, tmp_path: Path) -> None:
    dcp.trap_metadata(source, tmp_path / "marker")
    for kind in ("fsdp3", "titan3", "dcp", source):
        words = ["--src", kind, "--dst", "hf", f"src.path={source}", f"dst.path={tmp_path}/dst"]
        pattern = r"\.metadata`: its pickle asks for `posix.mkdir`.* nothing was executed"
        refused(tmp_path, pattern, *words)
    assert call("inspect", source).code != 0


def test_a_tensor_that_would_run_something_is_refused(source: Path, tmp_path: Path) -> None:
    dcp.trap_item(source, Q, tmp_path / "marker")
    refuse(tmp_path, r"__replaced_0.distcp`: item `model.model.layers.0.\S+\[0, 0\]`: .*mkdir")
    assert call("inspect", source).code == 1


def test_other_objects_are_not_looked_at(source: Path, tmp_path: Path) -> None:
    dcp.write_fsdp(model(), tmp_path / "trap", 2, extra={"lr": Trap(tmp_path / "marker")})
    write_config(tmp_path / "trap")
    out = done(*move("dcp", tmp_path / "trap", "hf", tmp_path / "dst")).out
    assert "left behind: `lr`" in out
    assert_same(hf.read(tmp_path / "dst"), model())


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_torch_file_that_would_run_something_is_refused(
    name: str, as_zip: bool, tmp_path: Path
) -> None:
    write_config(tmp_path / "src")
    state = {**model().tensors, "x": Trap(tmp_path / "marker")}
    torch.save(state, tmp_path / "src" / name, _use_new_zipfile_serialization=as_zip)
    words = ["--dst", "hf", f"dst.path={tmp_path}/dst"]
    what = r"its pickle asks for `posix.mkdir`" if as_zip else "is a legacy torch file"
    refused(tmp_path, rf"{name}`: {what}", "--src", tmp_path / "src", *words)
    assert call("inspect", tmp_path / "src").code == 1


def test_an_enum_does_not_open_the_door(source: Path, tmp_path: Path) -> None:
    """`getattr` is there for the enums of some Python versions, and for nothing else."""

    class Sly:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (torch.Size, "__class__")

    dcp.rewrite(source, lambda found: setattr(found, "planner_data", Sly()))
    refuse(tmp_path, r"\.metadata`: its pickle .*; nothing was executed")


# Damage.


def cut(file: str, size: int) -> Damage:
    return lambda path: os.truncate(path / file, (path / file).stat().st_size - size)


def swap_names(path: Path) -> None:
    """Two items of one file change places, so that each is of another shape or dtype."""

    def change(found: Any) -> None:
        stored = found.storage_data
        one, other = (
            next(index for index in stored if index.fqn == name and index.offset[0] == 0)
            for name in (Q, NORM)
        )
        stored[one], stored[other] = stored[other], stored[one]

    dcp.rewrite(path, change)


def unsized(path: Path) -> None:
    """Rows that the config does not have: the metadata and all items agree."""
    rows = model().tensors | {Q.removeprefix("model."): torch.ones(60, 64, dtype=torch.bfloat16)}
    shutil.rmtree(path)
    dcp.save(path, dcp.split({"model": rows}, 2, dcp.over_ranks(2)))
    write_config(path)


def saved(**changes: torch.Tensor | None) -> Damage:
    """Tensors that are too many, or missing."""

    def damage(path: Path) -> None:
        tensors = {**model().tensors, **{key: t for key, t in changes.items() if t is not None}}
        tensors = {key: t for key, t in tensors.items() if changes.get(key, t) is not None}
        shutil.rmtree(path)
        dcp.save(path, dcp.split({"model": tensors}, 2, dcp.over_ranks(2)))
        write_config(path)

    return damage


TURNED = model().tensors[Q.removeprefix("model.")][:22].clone().t().contiguous().t()
PLACE = "model.layers.9.self_attn.q_proj.weight"
BIG = torch.ones(3, dtype=torch.bfloat16)
DAMAGE: dict[str, tuple[Damage, str]] = {
    "a hole": (lambda p: dcp.drop_chunk(p, Q), rf"`{Q}` of \[64, 64\]: "),
    "an overlap": (lambda p: dcp.move_chunk(p, Q, (-1, 0)), rf"`{Q}` of \[64, 64\]: "),
    "a box twice": (lambda p: dcp.repeat_chunk(p, Q), rf"items of `{Q}` and `{Q}` overlap"),
    "a box outside": (lambda p: dcp.move_chunk(p, Q, (1, 0)), rf"`{Q}`: .*lies outside"),
    "no item": (lambda p: dcp.drop_item(p, Q), rf"`{Q}`: the box at \[0, 0\] has no entry"),
    "a transposed item": (
        lambda p: dcp.replace_item(p, Q, TURNED),
        r"__replaced_0.distcp`: item .*has the strides \[1, 22\], expected \[64, 1\].*contiguous",
    ),
    "an item of another dtype": (
        lambda p: dcp.replace_item(p, Q, torch.ones(22, 64)),
        r"holds float32 \[22, 64\], expected bfloat16 \[22, 64\] as in `.metadata`",
    ),
    "an item of another size": (
        lambda p: dcp.replace_item(p, Q, torch.ones(21, 64, dtype=torch.bfloat16)),
        r"holds bfloat16 \[21, 64\], expected bfloat16 \[22, 64\] as in `.metadata`",
    ),
    "an item that is no tensor": (lambda p: dcp.replace_item(p, Q, {"a": 1}), r"item `.*\[0, 0\]`"),
    "an item of the old kind": (
        lambda p: dcp.replace_item(p, Q, BIG, _use_new_zipfile_serialization=False),
        r"item `.*\[0, 0\]`: is a legacy torch file.*re-save with torch.save",
    ),
    "items that changed places": (swap_names, r"item `.*`: holds bfloat16 \[\d+.*as in `.metadata"),
    "a dtype in the metadata": (
        lambda p: dcp.set_dtype(p, Q, torch.float16),
        r"holds bfloat16 \[22, 64\], expected float16 \[22, 64\]",
    ),
    "a size in the metadata": (lambda p: dcp.set_size(p, Q, (60, 64)), rf"`{Q}`: .*lies outside"),
    "a larger size": (
        lambda p: dcp.set_size(p, NORM, (65,)),
        r"norm.weight` is \[65\], but the config makes it \[64\]",
    ),
    "a size that the config has not": (
        unsized,
        rf"tensor `{Q.removeprefix('model.')}|{Q}` is \[60, 64\], but the config makes it \[64, 6",
    ),
    "another encoding": (
        lambda p: dcp.set_item(p, Q, transform_descriptors=["stream.zstd/1"]),
        r"another encoding \(`transform_descriptors`\); load the .* without extensions",
    ),
    "a file upwards": (
        lambda p: dcp.set_item(p, Q, relative_path="../other.distcp"),
        r"is in the file `../other.distcp`, which lies outside",
    ),
    "a file upwards later": (
        lambda p: dcp.set_item(p, Q, relative_path="sub/../../x.distcp"),
        r"is in the file `sub/../../x.distcp`, which lies outside",
    ),
    "an absolute file": (
        lambda p: dcp.set_item(p, Q, relative_path="/etc/passwd"),
        r"is in the file `/etc/passwd`, which lies outside",
    ),
    "no file name": (lambda p: dcp.set_item(p, Q, relative_path=""), r"is in the file ``"),
    "lines in a file name": (
        lambda p: dcp.set_item(p, Q, relative_path="a\nb"),
        r"`a\\nb`, whose name cannot be printed",
    ),
    "a missing file": (
        lambda p: (p / "__1_0.distcp").unlink(),
        r"is in `__1_0.distcp`, which is not there; copy all files",
    ),
    "a byte short": (cut("__2_0.distcp", 1), r"`__2_0.distcp` is truncated: \d+ bytes, exp.* \d+;"),
    "half a file": (cut("__0_0.distcp", 50_000), r"`__0_0.distcp` is truncated"),
    "an offset before the file": (lambda p: dcp.set_item(p, Q, offset=-4), r"lies at -4 in `__"),
    "an item too long": (lambda p: dcp.set_item(p, Q, length=1 << 40), r"is truncated|overlap"),
    "an item too short": (lambda p: dcp.set_item(p, Q, length=900), r"item `.*`: "),
    "items that overlap": (
        lambda p: dcp.set_item(p, Q, relative_path="__0_0.distcp", offset=10, length=5000),
        r"in `__0_0.distcp`, items of `.*` and `.*` overlap",
    ),
    "a torn .metadata": (cut(".metadata", 10), r"/\.metadata`: "),
    "an empty .metadata": (lambda p: (p / ".metadata").write_bytes(b""), r"/\.metadata`: "),
    "no pickle": (lambda p: (p / ".metadata").write_bytes(b"GGUF" * 99), r"/\.metadata`: "),
    "a .metadata lost in copying": (
        lambda p: (p / ".metadata").unlink(),
        r"\.metadata` is missing: the hidden file was lost .*`cp -r`",
    ),
    "a .metadata by rank": (
        lambda p: (p / ".metadata").rename(p / "__0.metadata"),
        r"is missing: .*use_collectives=False; load it with dcp.load and save it",
    ),
    "no config anywhere": (
        lambda p: (p / "config.json").unlink(),
        r"no config.json beside the weights; give src.assets=DIR.* or src.model=NAME\|config.json",
    ),
    "a config that is no JSON": (
        lambda p: (p / "config.json").write_text("{"),
        r"config.json`: not valid JSON",
    ),
    "a config of more layers": (
        lambda p: write_config(p, num_hidden_layers=3),
        r"src`: 9 tensors are missing, first `model.layers.2.input_layernorm.weight`",
    ),
    "a config of fewer layers": (
        lambda p: write_config(p, num_hidden_layers=1),
        r"src`: 9 tensors are not part of this llama, first `model.layers.1.",
    ),
    "a config of another width": (
        lambda p: write_config(p, hidden_size=128, head_dim=8),
        r"is \[128, 64\], but the config makes it \[128, 128\]",
    ),
    "a tensor too many": (saved(extra=BIG), r"1 tensors? (are|is) not part of this.* `extra`"),
    "a layer too many": (
        saved(**{PLACE: model().tensors["model.norm.weight"]}),
        rf"1 tensors are not part of this llama, first `{PLACE}`",
    ),
    "a tensor missing": (
        saved(**{"model.norm.weight": None}),
        r"src`: 1 tensors are missing, first `model.norm.weight`$",
    ),
    "no head": (
        saved(**{"lm_head.weight": None}),
        r"are missing, first `lm_head.weight`; if the output is tied, say src.tied=true",
    ),
    "flat parameters": (
        saved(**{"model.layers.0._flat_param": BIG}),
        r"`model.layers.0._flat_param` is of flat parameters of LOCAL_STATE_DICT.*SHARDED_STATE",
    ),
    "older flat parameters": (
        saved(flat_param_0=BIG),
        r"`flat_param_0` is of flat parameters of LOCAL_STATE_DICT",
    ),
    "LoRA": (
        saved(**{f"base_model.model.{PLACE[:-6]}lora_A.default.weight": BIG}),
        r"lora_A.* is of LoRA adapters; merge them .*merge_and_unload",
    ),
    "a wrapped base of LoRA": (
        saved(**{f"{PLACE[:-6]}base_layer.weight": BIG}),
        r"base_layer.* is of LoRA adapters",
    ),
    "one tensor under two names": (
        saved(**{"_orig_mod.model.norm.weight": model().tensors["model.norm.weight"]}),
        r"`model.norm.weight` and `_orig_mod.model.norm.weight` are both the tensor `model.norm",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, source: Path, tmp_path: Path) -> None:
    damage, pattern = DAMAGE[name]
    damage(source)
    refuse(tmp_path, pattern)
    found = call("inspect", source)
    assert found.code != 0, "inspect finds it good"
    assert "unexpected" not in found.err + found.out


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ([torch.ones(2)], r"model.pt`: holds a `list`, expected a dict of tensors"),
        (torch.nn.Linear(2, 2), r"model.pt`: its pickle asks for `torch.nn.*nothing was executed"),
        ({**model().tensors, "extra": BIG}, r"1 tensors are not part of this llama, first `extra`"),
        ({"model.norm.weight": BIG}, r"20 tensors are missing, first `lm_head.weight`"),
        (
            {**model().tensors, "lm_head.weight": torch.ones((128, 64), dtype=torch.int8)},
            r"`model.pt`: tensor `lm_head.weight` is int8: quantised, not weights",
        ),
        (
            {**model().tensors, "lm_head.weight": torch.ones(128, 60)},
            r"tensor `lm_head.weight` is \[128, 60\], but the config makes it \[128, 64\]",
        ),
    ],
)
def test_a_torch_file_of_something_else_is_refused(
    value: object, pattern: str, tmp_path: Path
) -> None:
    write_config(tmp_path / "src")
    torch.save(value, tmp_path / "src" / "model.pt")
    words = ["--dst", "hf", f"dst.path={tmp_path}/dst"]
    refused(tmp_path, pattern, "--src", tmp_path / "src", *words)


def test_a_directory_of_an_optimizer_alone_holds_no_weights(tmp_path: Path) -> None:
    state = {"optimizer": {"state": {"model.norm.weight": {"exp_avg": torch.ones(64)}}}}
    dcp.save(tmp_path / "src", dcp.split(state, 2, dcp.over_ranks(2)))
    write_config(tmp_path / "src")
    refuse(tmp_path, r"src`: holds no weights, only optimizer states; name the directory")


def test_the_good_one_is_good(good: Path, tmp_path: Path) -> None:
    done(*move("dcp", good, "hf", tmp_path / "dst"))
    assert_same(hf.read(tmp_path / "dst"), model())
    assert "health      good" in done("inspect", good).out


def test_two_checkpoints_below_one_folder_are_not_guessed_at(good: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(good, tmp_path / "src" / "run" / name)
    refuse(tmp_path, r"holds 2 DCP directories, first `.*/one` and `.*/two`; name one of them")
    refuse(tmp_path, r"holds 2 DCP directories", "dcp")
    refused(tmp_path, r"holds 2 DCP", "--src", tmp_path / "src", "--dst", "hf", "dst.path=/nowhere")


def test_llama_recipes_names_the_model_that_it_began_with(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    (source / "train_params.yaml").write_text("model_name: meta-llama/Llama-3.2-1B\nlr: 0.1\n")
    pattern = r"src.assets=DIR.*trained from `meta-llama/Llama-3.2-1B`, by train_params.yaml"
    line = refuse(tmp_path, pattern)
    assert "src.model=" in line


# What other programs leave.


OTHERS = {
    "verl": (("model_world_size_4_rank_0.pt",), r"verl's files.*verl.model_merger"),
    "deepspeed": (("mp_rank_00_model_states.pt",), r"DeepSpeed ZeRO.*zero_to_fp32.py"),
    "deepspeed's root": (
        ("latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"),
        r"DeepSpeed ZeRO.*run its own zero_to_fp32.py",
    ),
    "deepspeed's step": (
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",),
        r"DeepSpeed ZeRO checkpoint",
    ),
    "accelerate's pickles": (("pytorch_model_fsdp_rank0.bin",), r"one pickle per rank.*DCP"),
    "accelerate's pickles, later": (
        ("pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_0_rank1.bin"),
        r"one pickle per rank.*SHARDED_STATE_DICT",
    ),
    "an adapter": (
        ("adapter_config.json", "adapter_model.safetensors"),
        r"LoRA adapter.*merge_and_unload",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["dcp", "fsdp2", "titan2", "hf", "statedict", ""])
def test_what_is_not_read_is_named_with_a_way_out(name: str, kind: str, tmp_path: Path) -> None:
    files, pattern = OTHERS[name]
    for file in files:
        (tmp_path / "src" / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"x": torch.ones(1)}, tmp_path / "src" / file)
    write_config(tmp_path / "src")
    spec = kind or tmp_path / "src"
    if kind == "statedict":
        words = ["--dst", "hf", f"src.path={tmp_path}/src", "src.format=statedict"]
        refused(tmp_path, pattern, *words, f"dst.path={tmp_path}/dst")
        return
    words = ["--src", spec, "--dst", "hf", f"src.path={tmp_path}/src", f"dst.path={tmp_path}/dst"]
    refused(tmp_path, pattern, *words)


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    refuse(tmp_path, r"src`: holds no DCP checkpoint: no .metadata in it or below", "fsdp2")
    refuse(tmp_path, r"src`: holds no complete step: no step-N with a .metadata", "titan2")
    refuse(tmp_path, r"src`: holds no checkpoint of fsdp or titan", "dcp")


# What cannot be asked for.


WORDS = {
    "dcp as a target": ("dcp", "dcp", [], r"--dst: fsdp or titan\?.* like fsdp8"),
    "files as a target": (
        "dcp",
        "hf",
        ["dst.format=statedict"],
        r"statedict: is a source only; for a target use --dst hf",
    ),
    "stages of fsdp": ("dcp", "fsdp2", ["dst.mesh.pp=2"], r"fsdp: .*a dp axis only.*pp=2"),
    "tensor parallelism of fsdp": (
        "dcp",
        "fsdp2",
        ["dst.mesh.tp=2"],
        r"fsdp: as a target it has a dp axis only",
    ),
    "stages of titan": ("dcp", "titan2", ["dst.mesh.pp=2"], r"titan: .*the axes dp and tp"),
    "no shards": ("dcp", "fsdp0", [], r"topology `fsdp0`: sizes begin at 1"),
    "two axes by name": ("dcp", "fsdp2tp2", [], r"topology `fsdp2tp2` is not known"),
    "a topology": ("fspd", "hf", [], r"topology `fspd` is not known: did you mean `fsdp\d+`"),
    "a target": ("dcp", "titn8", [], r"topology `titn8` is not known: did you mean `titan8`"),
    "the rows of fsdp": ("dcp", "hf", ["src.rope=half"], r"src.rope does not apply to fsdp as a s"),
    "the rows of an fsdp target": (
        "dcp",
        "fsdp2",
        ["dst.rope=half"],
        r"dst.rope does not apply to fsdp as a target; what does: wrapper",
    ),
    "keys of fsdp": ("dcp", "fsdp2", ["dst.keys=older"], r"dst.keys does not apply to fsdp"),
    "a wrapper of titan": ("dcp", "titan2", ["dst.wrapper=none"], r"dst.wrapper does not apply to"),
    "a wrapper of hf": ("dcp", "hf", ["dst.wrapper=none"], r"dst.wrapper does not apply to hf"),
    "a wrapper": ("dcp", "fsdp2", ["dst.wrapper=modle"], r"`modle`: did you mean `model`"),
    "a wrapper's key": ("dcp", "fsdp2", ["dst.wraper=none"], r"`dst.wraper`: did.* `wrapper`"),
    "rows": ("titan2", "hf", ["src.rope=halff"], r"src.rope: `halff`: did you mean `half`"),
    "a key of rows": ("titan2", "hf", ["src.ropee=half"], r"`src.ropee`: did you mean `rope`"),
    "generations": ("dcp", "titan2", ["dst.keys=curent"], r"`curent`: did you mean `current`"),
    "assets": ("dcp", "hf", ["src.asset=x"], r"unknown key `src.asset`: did you mean `assets`"),
    "assets that are not there": ("dcp", "hf", ["src.assets=/gone"], r"src.assets: `/gone` is not"),
    "completeness": (
        "dcp",
        "hf",
        ["engine.require_complet=true"],
        r"`engine.require_complet`: did you mean `require_complete`",
    ),
    "assets of a target": ("dcp", "hf", ["dst.assets=x"], r"unknown key `dst.assets`"),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_cannot_be_is_refused(name: str, source: Path, tmp_path: Path) -> None:
    kind, target, more, pattern = WORDS[name]
    refuse(tmp_path, pattern, kind, target, *more)


def test_names_of_the_other_kind_are_not_taken(good: Path, tmp_path: Path) -> None:
    titan.write_titan(model(), tmp_path / "src", 2)
    write_config(tmp_path / "src")
    refuse(tmp_path, r"src`: 2\d tensors are missing, first `", "fsdp2")
    shutil.rmtree(tmp_path / "src")
    shutil.copytree(good, tmp_path / "src")
    refuse(tmp_path, r"`\S+wq.weight` is missing|tok_embeddings.weight` is missing", "titan2")


def test_titan_asks_for_what_its_files_do_not_say(tmp_path: Path) -> None:
    step = titan.write_titan(model(), tmp_path / "src", 2, step=3)
    pattern = r"number of heads and the rotary base are not in the files; give src.model=.*src.ass"
    refuse(tmp_path, pattern, "titan2")
    write_config(step, num_attention_heads=8, head_dim=4)
    refuse(tmp_path, r"wq.weight` is \[64, 64\], but the config makes it \[32, 64\]", "titan2")
    write_config(step, num_hidden_layers=1)
    refuse(tmp_path, r"tensors are not part of this model, first `layers.1.", "titan2")
    write_config(step, num_hidden_layers=3)
    refuse(tmp_path, r"`layers.2.attention.\S+` is missing, under this and all older", "titan2")


def test_a_family_that_is_not_known_moves_by_name_only(tmp_path: Path) -> None:
    mllama.write_fsdp(tmp_path / "src", 2)
    mllama.write_config(tmp_path / "src")
    pattern = r"model type mllama is not known; use --dst hf or fsdpN, which move by name"
    for target in ("meta2", "tp2", "titan2"):
        refuse(tmp_path, rf"\w+: needs to know what each tensor of a model is.*{pattern}", "dcp",
               target)  # fmt: skip
    words = ["plan", "--src", "fsdp2", "--dst", "hf", f"src.model={tmp_path}/src/config.json"]
    refused(tmp_path, r"mllama is not known, so that .* only from a checkpoint", *words)


def test_a_plan_for_a_dcp_source_asks_for_the_files(tmp_path: Path) -> None:
    words = ["plan", "--src", "dcp", "--dst", "hf", "src.model=llama3-8b"]
    refused(tmp_path, r"only the files tell whether it is fsdp or titan; give src.path=DIR", *words)
    assert one_line(call("plan", "--src", "hf", "--dst", "dcp", "src.model=llama3-8b").err)
