"""DCP directories and torch files as training tools leave them, and the small files around them."""

import json
import os
import re
import shutil
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.commands import Outcome, call, done, model, move, refused, state_of, write
from tests.oracles import dcp, hf, meta, titan
from tests.oracles.compare import assert_same, assert_same_config
from tests.oracles.models import Model

HUB = "meta-llama/Llama-3.2-1B"
TOKENS = {f"t{number}": number for number in range(128)}
SMALL = {
    "tokenizer.json": json.dumps({"model": {"vocab": TOKENS}}),
    "tokenizer_config.json": '{"model_max_length": 8192}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": '{"size": 560}',
    "generation_config.json": '{"temperature": 0.6, "eos_token_id": [2, 3]}',
    "LICENSE.txt": "as is",
}


@cache
def tied() -> Model:
    return model(tied=True)


@cache
def other() -> Model:
    """A model of the same sizes with other values, as more training makes it."""
    return replace(model(), tensors={n: -t for n, t in model().tensors.items()})


def config_in(folder: Path, held: Model | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps((held or model()).config | changes))
    return folder


def small_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or SMALL:
        (folder / name).write_text(SMALL[name])
    return folder


def sharded(folder: Path, tensors: Mapping[str, Tensor], wrapper: bool = True) -> Path:
    """A DCP directory of 2 shards with these names."""
    states = dcp.split(dict(tensors), 2, dcp.over_ranks(2))
    dcp.save(folder, [{"model": state} if wrapper else state for state in states])
    return folder


def to_hf(source: Path, target: Path, *more: object, kind: object = None) -> Outcome:
    """Convert what is in `source`, recognised by its files where no kind is given."""
    return done(*move(str(kind or source), source, "hf", target, *more))


def check(target: Path, held: Model | None = None) -> None:
    """A Hugging Face directory holds the model, and its config says so."""
    expected, found = held or model(), hf.read(target)
    assert_same(found, expected)
    assert_same_config(found, expected)


# llama-recipes.


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_llama_recipes_begins_with_a_directory(quote: str, tmp_path: Path) -> None:
    """Its config is taken, as nothing else lies around, and its tokenizer is carried."""
    base = small_files(write("hf", tmp_path / "base"))
    run = tmp_path / "run" / "fine-tuned-org" / "tiny"
    dcp.write_fsdp(other(), run, 3)
    (run / "train_params.yaml").write_text(
        f"batch_size: 4\nlr: 0.0001\nmodel_name: {quote}{base}{quote}\nuse_fp16: false\n"
    )
    for number, source in enumerate((run, tmp_path / "run")):
        target = tmp_path / f"dst{number}"
        found = to_hf(source, target)
        assert "model config from config.json" in found.out
        check(target, other())
        assert all((target / name).read_text() == text for name, text in SMALL.items())
        assert "missing" not in found.out


def test_llama_recipes_begins_with_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched and nothing asked: the message names what is needed."""

    def forbidden(*args: object) -> None:
        raise AssertionError("a connection or a question")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr("builtins.input", forbidden)
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.chdir(tmp_path)
    dcp.write_fsdp(model(), tmp_path / "src", 2)
    (tmp_path / "src" / "train_params.yaml").write_text(f"model_name: {HUB}\n")
    words = move("dcp", tmp_path / "src", "hf", tmp_path / "dst")
    pattern = rf"src.assets=DIR.*trained from `{HUB}`, by train_params.yaml.*src.model="
    refused(tmp_path, pattern, *words)
    assert HUB in call("inspect", tmp_path / "src").out
    config_in(tmp_path / "base")
    done(*words, "src.assets=base")
    check(tmp_path / "dst")
    small_files(config_in(tmp_path / HUB), "tokenizer.json")
    found = to_hf(tmp_path / "src", tmp_path / "here")
    assert "ready: config.json, generation_config.json, tokenizer.json\n" in found.out


# accelerate and the Trainer of transformers.


def trainer_folder(root: Path) -> Path:
    """checkpoint-10 of a Trainer with FSDP."""
    folder = root / "checkpoint-10"
    dcp.write_fsdp(model(), folder / "pytorch_model_fsdp_0", 2)
    state = {"optimizer": {"state": {"model.norm.weight": {"exp_avg": torch.ones(64)}}}}
    dcp.save(folder / "optimizer_0", dcp.split(state, 2, dcp.over_ranks(2)))
    small_files(config_in(folder), "tokenizer.json", "generation_config.json")
    (folder / "trainer_state.json").write_text('{"global_step": 10}')
    torch.save({"last_epoch": 10}, folder / "scheduler.pt")
    torch.save({"python": 1}, folder / "rng_state_0.pth")
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    return folder


@pytest.mark.parametrize("kind", ["", "dcp", "fsdp2"])
def test_a_folder_of_the_trainer_is_read(kind: str, tmp_path: Path) -> None:
    source = trainer_folder(tmp_path)
    found = to_hf(source, tmp_path / "dst", kind=kind)
    check(tmp_path / "dst")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "dst" / name).read_text() == SMALL[name]
    assert "missing" not in found.out
    assert not (tmp_path / "dst" / "trainer_state.json").exists()


def test_the_folder_of_a_run_with_one_checkpoint_leads_to_it(tmp_path: Path) -> None:
    """The config and the tokenizer lie between the two."""
    trainer_folder(tmp_path / "run")
    found = to_hf(tmp_path / "run", tmp_path / "dst")
    check(tmp_path / "dst")
    assert "tokenizer.json" in found.out.splitlines()[-2]


def test_the_optimizer_beside_is_left_behind_in_words(tmp_path: Path) -> None:
    source = trainer_folder(tmp_path)
    said = to_hf(source, tmp_path / "dst", kind="dcp").out
    assert any("optimizer" in line for line in said.splitlines() if line.startswith("left behind"))


def test_a_folder_of_the_trainer_without_sharding_is_read(tmp_path: Path) -> None:
    """Its scheduler.pt is no model."""
    source = write("hf", tmp_path / "checkpoint-10")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"lr": torch.ones(2)}, source / name)
    to_hf(source, tmp_path / "dst")
    check(tmp_path / "dst")


def test_the_folder_of_accelerate_is_read(tmp_path: Path) -> None:
    source = tmp_path / "state"
    sharded(source / "pytorch_model_fsdp_0", model().tensors)
    sharded(source / "optimizer_0", {"x": torch.ones(4)})
    config_in(source)
    to_hf(source, tmp_path / "dst")
    check(tmp_path / "dst")
    inner = source / "pytorch_model_fsdp_0"
    to_hf(inner, tmp_path / "dst2", f"src.assets={source}")
    check(tmp_path / "dst2")


# Names.


def named(change: Callable[[str], str], held: Model | None = None) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in dcp.with_head(held or model()).items()}


WRAPPERS: dict[str, Callable[[str], str]] = {
    "FSDP1": lambda name: (
        "_fsdp_wrapped_module." + name.replace(".self_attn", "._fsdp_wrapped_module.self_attn")
    ),
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "activation checkpoints": lambda name: name.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
    "all of them": lambda name: (
        "module._orig_mod._fsdp_wrapped_module."
        + name.replace(".mlp", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp")
    ),
}


@pytest.mark.parametrize("wrapper", [True, False])
@pytest.mark.parametrize("name", WRAPPERS)
def test_names_lose_what_wrappers_put_into_them(name: str, wrapper: bool, tmp_path: Path) -> None:
    config_in(sharded(tmp_path / "src", named(WRAPPERS[name]), wrapper))
    to_hf(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst")
    config_in(tmp_path / "file")
    torch.save(named(WRAPPERS[name]), tmp_path / "file" / "model.pt")
    to_hf(tmp_path / "file", tmp_path / "dst2")
    check(tmp_path / "dst2")


@pytest.mark.parametrize("held", [model, tied])
@pytest.mark.parametrize("wrapper", [True, False])
@pytest.mark.parametrize("written", [None, dcp.without_nesting, dcp.as_older_torch])
def test_the_dict_around_names_is_told_from_names(
    held: Callable[[], Model], wrapper: bool, written: Callable[[Path], None], tmp_path: Path
) -> None:
    source = tmp_path / "src"
    dcp.write_fsdp(held(), source, 3, wrapper=wrapper)
    config_in(source, held())
    if written:
        written(source)
    to_hf(source, tmp_path / "dst")
    check(tmp_path / "dst", held())


@pytest.mark.parametrize("wrapper", [True, False])
def test_what_is_saved_beside_is_left_behind_in_words(wrapper: bool, tmp_path: Path) -> None:
    source = tmp_path / "src"
    extra = {
        "optim": {"state": {"model.norm.weight": {"exp_avg": torch.ones(64)}}, "lr": 0.1},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 4,
    }
    dcp.write_fsdp(model(), source, 2, wrapper=wrapper, extra=extra)
    config_in(source)
    found = to_hf(source, tmp_path / "dst")
    line = next(line for line in found.out.splitlines() if line.startswith("left behind: "))
    assert "optimizer states" in line
    assert "learning-rate scheduler" in line
    assert "`epoch`" in line
    check(tmp_path / "dst")
    told = json.loads(done("inspect", source, "--json").out)["left_behind"]
    assert "optimizer states" in told


# Files.


def with_names_of_no_meaning(path: Path) -> None:
    """Data files are called anything, one of them in a folder."""
    new = {
        "__0_0.distcp": "weights a.bin",
        "__1_0.distcp": "deep/b",
        "__2_0.distcp": "__7_9.distcp",
    }
    (path / "deep").mkdir()
    for old, name in new.items():
        (path / old).rename(path / name)

    def change(found: Any) -> None:
        for index, info in found.storage_data.items():
            found.storage_data[index] = replace(info, relative_path=new[info.relative_path])

    dcp.rewrite(path, change)


FILES: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None]] = {
    "threads": ({"thread_count": 40}, None),
    "a file per item": ({"single_file_per_rank": False}, None),
    "one process": ({"no_dist": True}, None),
    "hybrid sharding": ({"replicas": 2}, None),
    "more shards than rows": ({}, None),
    "names of no meaning": ({}, with_names_of_no_meaning),
}


@pytest.mark.parametrize("name", FILES)
def test_files_may_be_of_any_number_and_name(name: str, tmp_path: Path) -> None:
    given, change = FILES[name]
    source = tmp_path / "src"
    shards = 100 if "more" in name else 3
    dcp.write_fsdp(model(), source, shards, **given)
    config_in(source)
    if change:
        change(source)
    if name == "threads":
        assert any(not file.stat().st_size for file in source.glob("*.distcp")), "no empty file"
    to_hf(source, tmp_path / "dst")
    check(tmp_path / "dst")
    assert "health      good" in done("inspect", source).out


def test_boxes_of_a_mesh_of_two_axes_are_read(tmp_path: Path) -> None:
    dcp.write_2d(model(), tmp_path / "src", 3, 2)
    config_in(tmp_path / "src")
    to_hf(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst")


# The vocabulary.


def test_a_resized_vocabulary_is_that_of_the_tensors(tmp_path: Path) -> None:
    grown = model(vocab_size=131)
    dcp.write_fsdp(grown, tmp_path / "src", 2)
    config_in(tmp_path / "src", model())
    found = to_hf(tmp_path / "src", tmp_path / "dst")
    assert "vocab_size is 131 by the tensors, where the config has 128" in found.out
    check(tmp_path / "dst", grown)
    loaded, said = LlamaForCausalLM.from_pretrained(
        tmp_path / "dst", output_loading_info=True, local_files_only=True
    )
    assert not any(said.values()), said
    assert loaded.config.vocab_size == len(loaded.lm_head.weight) == 131
    done(*move("dcp", tmp_path / "src", "titan2", tmp_path / "run"))
    read = titan.read_titan(tmp_path / "run" / "step-0", grown.config)
    dcp.assert_same_tensors(read, grown.tensors)


# Whole models in torch files.


def shared() -> dict[str, Tensor]:
    """A tied state dict: one storage under two names."""
    tensors = dcp.with_head(tied())
    assert tensors[dcp.HEAD].data_ptr() == tensors[dcp.TABLE].data_ptr()
    return tensors


def write_pt(folder: Path, name: str, beside: tuple[str, ...] = ()) -> None:
    torch.save(model().tensors, folder / name)
    for other_name in beside:
        torch.save({"state": {0: torch.ones(3)}}, folder / other_name)


def write_bins(folder: Path) -> None:
    """pytorch_model-0000x-of-00003.bin and their index."""
    names, table = list(model().tensors), {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        held = {name: model().tensors[name] for name in names[number::3]}
        torch.save(held, folder / file)
        table |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": table}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WHOLE: dict[str, Callable[[Path], None]] = {
    "model.pt": lambda folder: write_pt(folder, "model.pt"),
    "an epoch": lambda folder: write_pt(folder, "tiny-3.pt", ("optimizer-tiny-3.pt",)),
    "accelerate": lambda folder: write_pt(folder, "pytorch_model_fsdp.bin", ("optimizer.bin",)),
    "transformers": lambda folder: write_pt(folder, "pytorch_model.bin", ("training_args.bin",)),
    "a Trainer": lambda folder: write_pt(
        folder, "pytorch_model.bin", ("optimizer.pt", "scheduler.pt")
    ),
    "several": write_bins,
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_are_read(name: str, tmp_path: Path) -> None:
    source = config_in(tmp_path / "src")
    WHOLE[name](source)
    found = to_hf(source, tmp_path / "dst")
    check(tmp_path / "dst")
    for optimizer in source.glob("optimizer*"):
        assert f"left behind: {optimizer.name}" in found.out
    assert "health      good" in done("inspect", source).out


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_one_storage_under_two_names_is_a_tied_head(name: str, tmp_path: Path) -> None:
    source = config_in(tmp_path / "src", tied())
    torch.save(shared(), source / name)
    assert (source / name).stat().st_size < 1.2 * sum(
        t.numel() * t.itemsize for t in tied().tensors.values()
    )
    to_hf(source, tmp_path / "dst")
    check(tmp_path / "dst", tied())


def test_a_state_dict_as_a_module_gives_it(tmp_path: Path) -> None:
    """Ordered, with versions; of parameters, some of them not row-major; with an old buffer."""
    state = OrderedDict(
        (name, torch.nn.Parameter(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor))
        for name, tensor in model().tensors.items()
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(state, config_in(tmp_path / "src") / "model.pt")
    to_hf(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst")


@pytest.mark.parametrize("where", ["dcp", "file"])
def test_norms_of_another_dtype_keep_it(where: str, tmp_path: Path) -> None:
    tensors = {n: t.float() if "norm" in n else t for n, t in model().tensors.items()}
    source = config_in(tmp_path / "src")
    if where == "dcp":
        sharded(source, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    else:
        torch.save(tensors, source / "model.pt")
    to_hf(source, tmp_path / "dst")
    dcp.assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), tensors)


def test_two_torch_files_are_not_guessed_at(tmp_path: Path) -> None:
    source = config_in(tmp_path / "src")
    write_pt(source, "tiny-3.pt")
    write_pt(source, "tiny-4.pt")
    pattern = r"which file\? found tiny-3.pt, tiny-4.pt; make a directory"
    refused(tmp_path, pattern, *move(str(source), source, "hf", tmp_path / "dst"))
    alone = config_in(tmp_path / "alone")
    (alone / "tiny-4.pt").symlink_to(source / "tiny-4.pt")
    to_hf(alone, tmp_path / "dst")
    check(tmp_path / "dst")


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    source = config_in(tmp_path / "src")
    write_bins(source)
    index = source / "pytorch_model.bin.index.json"
    text = index.read_text()
    words = move(str(source), source, "hf", tmp_path / "dst")
    index.write_text(text.replace('"pytorch_model-00001', '"../pytorch_model-00001'))
    refused(tmp_path, r"`../pytorch_model-00001-of-00003.bin`, which lies outside", *words)
    index.write_text(text.replace("model-00001-of", "model-00009-of"))
    refused(tmp_path, r"pytorch_model-00009-of-00003.bin`: no such file", *words)
    index.write_text("{}")
    refused(tmp_path, r"`weight_map` is missing or empty", *words)


def test_a_torch_file_without_a_config_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    write_pt(tmp_path / "src", "model.pt")
    words = move(str(tmp_path / "src"), tmp_path / "src", "hf", tmp_path / "dst")
    refused(tmp_path, r"no config.json beside the weights; give src.assets=DIR", *words)
    done(*words, f"src.model={config_in(tmp_path / 'base')}")
    check(tmp_path / "dst")


# The small files.


def test_assets_are_carried_and_what_is_missing_is_told(tmp_path: Path) -> None:
    source, bare = tmp_path / "src", tmp_path / "bare"
    dcp.write_fsdp(model(), source, 2)
    config_in(source)
    words = move("dcp", source, "hf", bare)
    strict = [*words, "engine.require_complete=true"]
    refused(tmp_path, r"dst: tokenizer would be missing; give src.assets=DIR", *strict, code=1)
    plan = done("plan", *words).out
    line = "ready: config.json, generation_config.json; missing: tokenizer (src.assets=DIR"
    assert f"\n{line}" in plan
    found = done(*words, "--report", tmp_path / "report.json")
    assert found.out.splitlines()[-2].startswith(line)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ready"] == ["config.json", "generation_config.json"]
    assert report["missing"] == ["tokenizer"]
    for place in (source, bare):
        told = json.loads(done("inspect", place, "--json").out)
        assert told["missing"] == ["tokenizer"]

    assets, full = small_files(tmp_path / "assets"), tmp_path / "full"
    found = done(*move("dcp", source, "hf", full), f"src.assets={assets}",
                 "engine.require_complete=true", "--report", tmp_path / "report.json")  # fmt: skip
    assert "missing" not in found.out
    assert found.out.splitlines()[-2].startswith("ready: LICENSE.txt, chat_template.jinja, config.")
    for name, text in SMALL.items():
        assert (full / name).read_text() == text, name
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ready"] == sorted({*SMALL, "config.json"})
    assert report["missing"] == []
    assert json.loads(done("inspect", full, "--json").out)["missing"] == []
    assert "missing     nothing" in done("inspect", source, f"src.assets={assets}").out


def test_the_config_of_the_assets_comes_before_the_one_beside(tmp_path: Path) -> None:
    dcp.write_fsdp(model(), tmp_path / "src", 2)
    config_in(tmp_path / "src", rope_theta=10000.0)
    config_in(tmp_path / "assets", rope_theta=700000.0)
    to_hf(tmp_path / "src", tmp_path / "dst", f"src.assets={tmp_path}/assets")
    assert hf.read(tmp_path / "dst").config["rope_theta"] == 700000.0


@pytest.mark.parametrize("target", ["hf", "meta2", "titan2", "fsdp2"])
def test_a_tokenizer_of_another_size_warns(target: str, tmp_path: Path) -> None:
    dcp.write_fsdp(model(vocab_size=136), tmp_path / "src", 2)
    assets = small_files(config_in(tmp_path / "assets"), "tokenizer.json")
    words = move("dcp", tmp_path / "src", target, tmp_path / "dst", f"src.assets={assets}")
    warning = "warning: the embedding has 136 rows, but the tokenizer in src.assets knows 128 tok"
    assert warning in done("plan", *words).out
    assert warning in done(*words).out
    dcp.write_fsdp(model(), tmp_path / "src2", 2)
    words = move("dcp", tmp_path / "src2", target, tmp_path / "dst2", f"src.assets={assets}")
    assert "warning" not in done(*words).out


def test_float32_is_told_with_its_size(tmp_path: Path) -> None:
    held = model(dtype=torch.float32)
    dcp.write_fsdp(held, tmp_path / "src", 2)
    config_in(tmp_path / "src")
    hint = "weights are float32, 435 KB; dst.dtype=bfloat16 halves them"
    words = move("dcp", tmp_path / "src", "hf", tmp_path / "dst")
    assert hint in done("plan", *words).out
    assert hint in done(*words).out
    check(tmp_path / "dst", replace(held, config=held.config))
    words = move("dcp", tmp_path / "src", "hf", tmp_path / "half", "dst.dtype=bfloat16")
    said = done(*words).out
    assert "cast from float32 to bfloat16" in said
    assert "halves" not in said
    tensors = {name: tensor.bfloat16() for name, tensor in held.tensors.items()}
    check(tmp_path / "half", Model(model().config, tensors))


# The way out and back.


@pytest.mark.parametrize("held", [model, tied])
@pytest.mark.parametrize("wrapper", ["model", "none"])
def test_the_way_back_needs_nothing_else(
    held: Callable[[], Model], wrapper: str, tmp_path: Path
) -> None:
    source = small_files(write("hf", tmp_path / "src", held()))
    first, back = tmp_path / "fsdp", tmp_path / "back"
    said = done(*move("hf", source, "fsdp4", first, f"dst.wrapper={wrapper}")).out
    assert ("below a dict `model`" in said) == (wrapper == "model")
    dcp.assert_same_tensors(dcp.read_fsdp(first), dcp.with_head(held()))
    nested = {len(path) for path in dcp.metadata(first).planner_data.values()}
    assert nested == ({2} if wrapper == "model" else {1})
    assert len(list(first.glob("*.distcp"))) == 4
    config = json.loads((source / "config.json").read_text())
    assert json.loads((first / "config.json").read_text()).items() >= config.items()
    assert all((first / name).read_text() == text for name, text in SMALL.items())
    (first / "reshard.json").unlink()  # as after copying no more than a trainer needs
    done(*move("dcp", first, "hf", back))
    check(back, held())
    again = tmp_path / "again"
    done(*move("hf", source, "hf", again))
    names = sorted(file.name for file in again.iterdir() if file.name != "reshard.json")
    assert sorted(file.name for file in back.iterdir() if file.name != "reshard.json") == names
    for name in names:
        assert (back / name).read_bytes() == (again / name).read_bytes(), name


def test_two_directories_are_compared_whatever_their_shards(tmp_path: Path) -> None:
    for shards in (2, 3):
        dcp.write_fsdp(model(), tmp_path / f"{shards}", shards)
        config_in(tmp_path / f"{shards}")
    assert call("verify", tmp_path / "2", tmp_path / "3").code == 0
    dcp.write_fsdp(other(), tmp_path / "4", 4)
    config_in(tmp_path / "4")
    assert call("verify", tmp_path / "2", tmp_path / "4").code == 1


def test_a_sample_gives_the_number_of_shards(tmp_path: Path) -> None:
    dcp.write_fsdp(other(), tmp_path / "like", 3)
    config_in(tmp_path / "like")
    write("hf", tmp_path / "src")
    done("--src", tmp_path / "src", f"dst.like={tmp_path}/like", f"dst.path={tmp_path}/dst")
    dcp.check_same_layout(tmp_path / "dst", tmp_path / "like", where=False)
    dcp.assert_same_tensors(dcp.read_fsdp(tmp_path / "dst"), model().tensors)


def test_a_head_that_equals_the_embedding_may_be_said_to_be_tied(tmp_path: Path) -> None:
    """The config does not say so; without its head, the checkpoint is not whole."""
    sharded(tmp_path / "src", tied().tensors)
    config_in(tmp_path / "src", model())
    words = move("dcp", tmp_path / "src", "hf", tmp_path / "dst")
    refused(tmp_path, r"first `lm_head.weight`; if the output is tied, say src.tied=true", *words)
    done(*words, "src.tied=true")
    check(tmp_path / "dst", tied())


def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    """It would be lost: a config that says so is refused, and src.tied=false keeps it."""
    dcp.write_fsdp(model(), tmp_path / "src", 2)
    config_in(tmp_path / "src", tied())
    words = move("dcp", tmp_path / "src", "hf", tmp_path / "dst", "src.replicas=strict")
    before = state_of(tmp_path)
    found = call(*words)
    assert found.code != 0, found.out
    assert "lm_head" in found.err or "embed" in found.err, found.err
    assert {path for path in state_of(tmp_path) if "/dst/" in path} == set()
    assert before.keys() <= state_of(tmp_path).keys()
    done(*words[:-1], "src.tied=false", "--force")
    check(tmp_path / "dst")


# TorchTitan.


def test_params_beside_a_step_are_a_config(tmp_path: Path) -> None:
    meta.write(model(), tmp_path / "meta", 1)
    step = titan.write_titan(model(), tmp_path / "run", 2, step=5)
    shutil.copy(tmp_path / "meta" / "params.json", step)
    found = to_hf(tmp_path / "run", tmp_path / "dst")
    assert "model config from params.json" in found.out
    dcp.assert_same_tensors(hf.read(tmp_path / "dst").tensors, model().tensors)
    (step / "params.json").unlink()
    params = tmp_path / "meta" / "params.json"
    to_hf(tmp_path / "run", tmp_path / "dst2", f"src.model={params}")
    dcp.assert_same_tensors(hf.read(tmp_path / "dst2").tensors, model().tensors)


def test_training_that_began_with_our_step_is_read(tmp_path: Path) -> None:
    """The newest complete step is taken, with the config and the tokenizer beside the first."""
    source, run = small_files(write("hf", tmp_path / "src")), tmp_path / "run"
    done(*move("hf", source, "titan2", run))
    assert sorted(os.listdir(run)) == ["step-0"]
    titan.write_titan(other(), run, 3, step=10, training=True)
    (run / "step-20").mkdir()
    (run / "step-20" / "__0_0.distcp").write_bytes(b"being written")
    for number, spec in enumerate(("titan8", "dcp", run)):
        target = tmp_path / f"dst{number}"
        said = to_hf(run, target, kind=spec).out
        assert "model config from reshard.json" in said
        check(target, other())
        assert all((target / name).read_text() == text for name, text in SMALL.items())
        line = next(line for line in said.splitlines() if line.startswith("left behind"))
        for word in ("optimizer", "scheduler", "data loader", "counters"):
            assert word in line
    to_hf(run / "step-0", tmp_path / "first")
    check(tmp_path / "first")
    assert "already done" in done(*move("hf", source, "titan2", run)).last
    words = move("hf", source, "titan3", run, "--force")
    refused(
        tmp_path, r"step-10`: TorchTitan would resume from this step and not from step-0", *words
    )


@pytest.mark.parametrize("keys", ["older", "current"])
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_titan_is_written_as_asked_for(keys: str, rope: str, tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    more = [f"dst.keys={keys}", f"dst.rope={rope}", "dst.mesh.dp=2", "dst.mesh.tp=2"]
    said = done(*move("hf", source, "titan2", tmp_path / "run", *more)).out
    assert f"rotary rows {rope}, as " in said
    step = tmp_path / "run" / "step-0"
    found = titan.read_titan(step, model().config, rope=rope)
    dcp.assert_same_tensors(found, model().tensors)
    generation = "0.2" if keys == "older" else "0.3"
    assert dcp.read(step).keys() == titan.titan_tensors(model(), keys=generation).keys()
    to_hf(tmp_path / "run", tmp_path / "dst", f"src.rope={rope}")
    check(tmp_path / "dst")
    told = json.loads(done("inspect", tmp_path / "run", f"src.rope={rope}", "--json").out)
    assert told["rope"] == f"{rope} rows"


def test_inspect_tells_the_tensors_of_a_model_that_no_config_describes(tmp_path: Path) -> None:
    dcp.write_fsdp(model(), tmp_path / "src", 3)
    told = call("inspect", tmp_path / "src")
    assert told.code == 1
    assert re.search(r"PROBLEM .*no config.json beside the weights; give src.assets", told.out)
    assert "health      good, but its model is not known\n" in told.out
    assert "assumed" not in told.out
    found = json.loads(call("inspect", tmp_path / "src", "--json").out)
    assert found["parameters"] == sum(tensor.numel() for tensor in model().tensors.values())
    assert (found["family"], found["layout"], found["healthy"]) == ("unknown", "fsdp3", False)
