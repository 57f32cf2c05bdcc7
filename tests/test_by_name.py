"""Weights that are moved by name: nothing is lost, doubled or taken for a weight without a word."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.commands import call, done, model, move, read, refused, write
from tests.oracles import dcp, hf, titan
from tests.oracles.compare import assert_same
from tests.oracles.dcp import assert_same_tensors

CONFIG = {"model_type": "mystery", "hidden_size": 4}


def tensors() -> dict[str, Tensor]:
    """The weights of a family that no one knows."""
    return {
        "encoder.weight": torch.arange(15.0).view(5, 3),
        "encoder.rotary_emb.inv_freq": torch.arange(4.0),
        "decoder.bias": torch.arange(7.0),
    }


def save(path: Path, state: Mapping[str, Any]) -> None:
    dcp.save(path, [dict(state)])


def described(path: Path, **more: Any) -> Path:
    """A directory with a config."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **more}))
    return path


def to_hf(root: Path, *more: str) -> list[str]:
    return move("dcp", root / "src", "hf", root / "dst", f"src.assets={root / 'assets'}", *more)


@pytest.mark.parametrize("around", [("model",), ("app", "model"), ("state_dict",)])
def test_weights_are_found_in_the_dict_around_them(around: tuple[str, ...], tmp_path: Path) -> None:
    state: dict[str, Any] = tensors()
    for name in reversed(around):
        state = {name: state, "optim": {"state": {"encoder.weight": {"exp_avg": torch.ones(5)}}}}
    save(tmp_path / "src", state)
    described(tmp_path / "assets")
    assert "left behind: optimizer states" in done(*to_hf(tmp_path)).out
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), tensors())


def test_weights_in_a_dict_of_another_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "src", {"net": tensors()})
    described(tmp_path / "assets")
    refused(tmp_path, r"is in a dict `net`, expected in one called model", *to_hf(tmp_path))


def test_weights_in_two_dicts_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "src", {"a": {"model": tensors()}, "b": {"model": tensors()}})
    described(tmp_path / "assets")
    refused(tmp_path, r"weights are in 2 dicts, `a.model`, `b.model`", *to_hf(tmp_path))


def test_a_model_inside_an_optimizer_is_no_model(tmp_path: Path) -> None:
    save(tmp_path / "src", {"model": tensors(), "optimizer": {"model": {"x": torch.ones(2)}}})
    described(tmp_path / "assets")
    done(*to_hf(tmp_path))
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), tensors())


def test_names_that_may_be_a_dicts_are_refused_where_nothing_says_it(tmp_path: Path) -> None:
    save(tmp_path / "src", {"model": tensors()})
    dcp.without_nesting(tmp_path / "src")
    described(tmp_path / "assets")
    refused(tmp_path, r"nothing says whether `model.` is a part of the names", *to_hf(tmp_path))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_two_tensors_of_one_name_are_refused(prefix: str, tmp_path: Path) -> None:
    held = titan.titan_tensors(model(), keys="0.3")
    save(tmp_path / "src", held | {f"{prefix}norm.weight": held["norm.weight"] + 1})
    write("hf", tmp_path / "assets")
    line = refused(tmp_path, r"are both `norm.weight`", *to_hf(tmp_path))
    assert f"`{prefix}norm.weight`" in line


def test_peft_names_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "src", {"model": {f"base_model.model.{k}": v for k, v in tensors().items()}})
    described(tmp_path / "assets")
    refused(tmp_path, r"of PEFT; merge the adapters", *to_hf(tmp_path))


def test_a_config_says_tied_as_the_files_are(tmp_path: Path) -> None:
    state = {"m.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    save(tmp_path / "src", {"model": state})
    described(tmp_path / "assets", tie_word_embeddings=True, text_config={"x": 1})
    assert "differs from its copy" in call(*to_hf(tmp_path)).err
    done(*to_hf(tmp_path, "src.tied=false"))
    assert (
        json.loads((tmp_path / "dst" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), state)


def test_quantised_weights_are_refused_or_kept_as_they_are(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.scale": torch.ones(1)}
    source = described(tmp_path / "src")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    words = move("hf", source, "hf", tmp_path / "dst")
    refused(
        tmp_path, r"`a.weight` is float8_e4m3fn, .*dst.dtype=keep", *words, "dst.dtype=bfloat16"
    )
    done(*words)
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), state)
    described(source, text_config={"quantization_config": {"bits": 8}})
    refused(tmp_path, r"a quantised model", *move("hf", source, "hf", tmp_path / "dst2"))


def test_tensors_without_elements_and_without_dims_survive(tmp_path: Path) -> None:
    state = {
        "empty": torch.ones(5, 0),
        "none": torch.ones(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "matrix": torch.arange(6.0).view(3, 2),
    }
    source = described(tmp_path / "src")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    done(*move("hf", source, "fsdp3", tmp_path / "there"))
    done(*move("fsdp3", tmp_path / "there", "hf", tmp_path / "dst"))
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), state)
    # A scalar is stored once.
    files = [(tmp_path / "there" / f"__{rank}_0.distcp").read_bytes() for rank in range(3)]
    assert [content.count(b"LongStorage") for content in files] == [1, 0, 0]


def test_spellings_of_one_model_are_the_same_to_verify(tmp_path: Path) -> None:
    new = {"model.language_model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(2, 3)}
    old = {
        "language_model.model.norm.weight": torch.ones(3),
        "language_model.lm_head.weight": torch.ones(2, 3),
    }
    for name, state in (("new", new), ("old", old)):
        source = described(tmp_path / name, model_type="mllama")
        save_file(state, source / "model.safetensors", {"format": "pt"})
    done("verify", tmp_path / "new", tmp_path / "old")
    done(*move("hf", tmp_path / "new", "fsdp2", tmp_path / "there"))
    done("verify", tmp_path / "there", tmp_path / "new")
    done(*move("hf", tmp_path / "new", "hf", tmp_path / "dst"))
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), old)


@pytest.mark.parametrize("beside", ["pytorch_model.bin", "scaler.pt", "scheduler.pt", "model.pt"])
def test_torch_files_beside_a_checkpoint_do_not_hide_it(beside: str, tmp_path: Path) -> None:
    for kind in ("hf", "fsdp2"):
        write("hf", tmp_path / "hf")
        if kind == "fsdp2":
            done(*move("hf", tmp_path / "hf", kind, tmp_path / kind))
        torch.save({"x": torch.ones(2)}, tmp_path / kind / beside)
        assert "health      good" in done("inspect", tmp_path / kind).out
    done(*move("fsdp2", tmp_path / "fsdp2", "meta2", tmp_path / "dst"))
    assert_same(read("meta2", tmp_path / "dst"), model())


def test_a_refused_place_leaves_what_lies_there(tmp_path: Path) -> None:
    source, run = write("hf", tmp_path / "src"), tmp_path / "run"
    (run / "reshard.partial-0123456789abcdef" / "data").mkdir(parents=True)
    titan.write_titan(model(), run, 2, keys="0.3", step=100)
    refused(tmp_path, r"TorchTitan would resume", *move("hf", source, "titan2", run), "--force")
    assert (run / "reshard.partial-0123456789abcdef" / "data").is_dir()


def test_like_a_sample_of_ours(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    sample = tmp_path / "sample"
    given = ("dst.keys=older", "dst.rope=half")
    done(*move("hf", source, "titan3", sample, *given))
    like = f"dst.like={sample / 'step-0'}"
    words = ("--src", "hf", f"src.path={source}")
    done(*words, like, f"dst.path={tmp_path / 'same'}")
    one, other = (dcp.boxes(place / "step-0") for place in (sample, tmp_path / "same"))
    assert one == other
    assert_same_tensors(
        titan.read_titan(tmp_path / "same" / "step-0", model().config, rope="half"),
        dict(model().tensors),
    )
    done(*words, like, f"dst.path={tmp_path / 'newer'}", "dst.keys=current")
    assert "lm_head.weight" in dcp.boxes(tmp_path / "newer" / "step-0")
    grid = tmp_path / "grid"
    done(*move("hf", source, "titan2", grid, "dst.mesh.tp=2"))
    refused(
        tmp_path,
        r"dst.like: .*not cut along dim 0 alone",
        *(*words, f"dst.like={grid / 'step-0'}", f"dst.path={tmp_path / 'no'}"),
    )


def test_a_line_says_which_directory_was_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hf.write(model(), tmp_path / "hf")
    for step in (4, 5):
        titan.write_titan(model(), run, 2, keys="0.3", step=step)
    said = done("inspect", run, f"src.assets={tmp_path / 'hf'}").out
    assert "assumed     `step-5` is taken" in said


def layered(count: int, lost: str = "") -> dict[str, Tensor]:
    """Layers of an unknown family, and a module list of another sort that has gaps."""
    names = [f"model.layers.{n}.{part}" for n in range(count) for part in ("a", "b")]
    held = {name: torch.full((2, 3), number) for number, name in enumerate(names)}
    held |= {"mlp.0.weight": torch.ones(2), "mlp.2.weight": torch.zeros(2)}
    return {name: value.float() for name, value in held.items() if name != lost}


@pytest.mark.parametrize(
    ("stored", "said", "pattern"),
    [
        (layered(3), {"num_hidden_layers": 2}, "the config says 2 layers, but the tensors have 3"),
        (layered(3), {"text_config": {"num_hidden_layers": 4}}, "says 4 layers"),
        (
            {k: v for k, v in layered(3).items() if ".1." not in k},
            {},
            "`model.layers.1` are missing",
        ),
    ],
    ids=["too many", "too few", "a gap"],
)
def test_layers_are_those_of_the_config(
    stored: dict[str, Tensor], said: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    save(tmp_path / "src", {"model": stored})
    described(tmp_path / "assets", **said)
    refused(tmp_path, pattern, *to_hf(tmp_path))
    described(tmp_path / "assets", num_hidden_layers=2, num_nextn_predict_layers=1)
    if len(stored) == len(layered(3)):
        done(*to_hf(tmp_path))


def test_tensors_are_those_of_the_weights_in_the_assets(tmp_path: Path) -> None:
    save(tmp_path / "src", {"model": layered(2, lost="model.layers.1.b")})
    assets = described(tmp_path / "assets", num_hidden_layers=2)
    save_file(layered(2), assets / "model.safetensors")
    line = refused(
        tmp_path, r"1 tensors are missing that the weights in src.assets", *to_hf(tmp_path)
    )
    assert "`model.layers.1.b`" in line
    save_file(layered(2, lost="model.layers.0.a"), assets / "model.safetensors")
    save(tmp_path / "src2", {"model": layered(2)})
    words = move("dcp", tmp_path / "src2", "hf", tmp_path / "dst", f"src.assets={assets}")
    refused(tmp_path, r"1 tensors are not in .*first `model.layers.0.a`", *words)


def test_a_resized_vocabulary_is_that_of_the_tensors(tmp_path: Path) -> None:
    state = {"embed_tokens.weight": torch.ones(9, 2), "lm_head.weight": torch.zeros(7, 2)}
    save(tmp_path / "src", {"model": state})
    for number, said in enumerate(({"vocab_size": 5}, {"text_config": {"vocab_size": 5}})):
        assets = described(tmp_path / f"assets{number}", **said)
        target = tmp_path / f"dst{number}"
        words = move("dcp", tmp_path / "src", "hf", target, f"src.assets={assets}")
        assert "vocab_size is 7 by the tensors, where the config has 5" in done(*words).out
        found = json.loads((target / "config.json").read_text())
        assert found.get("text_config", found)["vocab_size"] == 7


def test_eight_bit_weights_of_a_known_family_are_refused(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].float().to(torch.float8_e4m3fn)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    words = move("hf", source, "fsdp2", tmp_path / "dst")
    refused(tmp_path, rf"`{name}` is float8_e4m3fn: quantised", *words)


def test_a_run_folder_is_verified_and_a_step_is_no_folder(tmp_path: Path) -> None:
    source = write("hf", tmp_path / "src")
    done(*move("hf", source, "titan2", tmp_path / "run"))
    assert "verified" in done("verify", tmp_path / "run").out
    words = move("hf", source, "titan2", tmp_path / "run2" / "step-0")
    refused(tmp_path, r"looks like a step; name the run's folder", *words)
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/x"):
        words = move("hf", source, "titan2", tmp_path / place)
        refused(tmp_path, r"file`: is not a directory; choose another dst.path", *words)


@pytest.mark.parametrize("around", ["model", "state_dict", None])
def test_what_stands_beside_weights_in_a_torch_file_is_left_behind(
    around: str | None, tmp_path: Path
) -> None:
    source = described(tmp_path / "src")
    state = tensors() if around is None else {around: tensors(), "optimizer": {"lr": 1.0}}
    torch.save({**state, "epoch": 3}, source / "model.pt")
    said = done(*move("statedict", source, "hf", tmp_path / "dst")).out
    assert re.search(rf"left behind: `epoch`{'' if around is None else ', `optimizer`'} ", said)
    assert_same_tensors(load_file(tmp_path / "dst" / "model.safetensors"), tensors())


def test_weights_at_the_top_and_inside_are_refused(tmp_path: Path) -> None:
    source = described(tmp_path / "src")
    torch.save({"model": tensors(), "step": torch.tensor(7)}, source / "model.pt")
    refused(
        tmp_path, r"both at the top and inside", *move("statedict", source, "hf", tmp_path / "x")
    )


def test_a_pipe_in_place_of_the_metadata_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "src", {"model": tensors()})
    (tmp_path / "src" / ".metadata").unlink()
    os.mkfifo(tmp_path / "src" / ".metadata")
    described(tmp_path / "assets")
    refused(tmp_path, r"`.*/\.metadata`: is not a file", *to_hf(tmp_path))
