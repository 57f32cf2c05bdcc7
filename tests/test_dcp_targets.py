"""What we write for torch.distributed.checkpoint: torch, accelerate and TorchTitan take it."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from reshard import job
from tests import commands
from tests.oracles import dcp, hf, titan
from tests.oracles.compare import assert_same, assert_same_files, files_in, same_bits
from tests.oracles.models import Model
from tests.ranks import run_ranks
from tests.settings import MODELS, STEP, Job, must_convert

FSDP = ("fsdp3", "fsdp8")
TITAN: dict[str, tuple[int, int, dict[str, Any]]] = {  # dp, tp, and how the keys are
    "titan2": (2, 1, {}),
    "titan2tp2": (2, 2, {}),
    "titan3tp3": (3, 3, {"keys": "0.2"}),
    "titan1": (1, 1, {"rope": "half"}),
}
MODEL = "a-tied"


def expected_of(name: str, model: Model) -> dict[str, Tensor]:
    """The tensors of a directory under their stored keys."""
    if name in FSDP:
        return {f"model.{key}": tensor for key, tensor in dcp.with_head(model).items()}
    return titan.titan_tensors(model, **TITAN[name][2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our directories of one model, by name."""
    root = tmp_path_factory.mktemp("made")
    hf.write(MODELS[MODEL](), root / "hf")
    jobs = [Job(root / "hf", root / name, name) for name in FSDP]
    for name, (dp, tp, given) in TITAN.items():
        keys = [f"dst.mesh.tp={tp}"]
        keys += ["dst.keys=older"] if given.get("keys") == "0.2" else []
        keys += ["dst.rope=half"] if given.get("rope") == "half" else []
        jobs.append(Job(root / "hf", root / name, f"titan{dp}", tuple(keys)))
    must_convert(1, jobs)
    return {name: root / name / (STEP if name in TITAN else "") for name in (*FSDP, *TITAN)}


# ------------------------------------------------------------------------------------------- torch


def test_torch_loads_them_onto_other_meshes(made: dict[str, Path]) -> None:
    model = MODELS[MODEL]()
    for name, meshes in {"fsdp8": [(3, 1)], "titan2tp2": [(3, 2), (1, 1)]}.items():
        dcp.check_loads_on_mesh(made[name], expected_of(name, model), meshes)


@pytest.mark.parametrize("name", [*FSDP, *TITAN])
def test_boxes_are_those_of_dtensors(name: str, made: dict[str, Path]) -> None:
    dp, tp = (int(name[4:]), 1) if name in FSDP else TITAN[name][:2]
    expected = expected_of(name, MODELS[MODEL]())
    dcp.assert_same_tensors(dcp.read(made[name], everything=True), expected)
    found = dcp.boxes(made[name])
    assert found.keys() == expected.keys()
    files = {(index.fqn, index.offset): info.relative_path
             for index, info in dcp.metadata(made[name]).storage_data.items()}  # fmt: skip
    for key, tensor in expected.items():
        theirs = dcp.chunk_boxes(tensor.shape, dp)
        if tp > 1:
            theirs = dcp.grid_boxes(tensor.shape, dp, tp, dcp.parallel_dim(key))
        first = {box: rank for rank, box in reversed([*enumerate(theirs)]) if 0 not in box[1]}
        assert sorted(found[key]) == sorted(first), key
        for box, rank in first.items():
            assert files[key, torch.Size(box[0])] == f"__{rank}_0.distcp", (key, box)
    names = {f"__{rank}_0.distcp" for rank in range(dp * tp)}
    assert {file.name for file in made[name].glob("*.distcp")} == names


@pytest.mark.parametrize("name", ["fsdp8", "titan2tp2"])
def test_items_stand_for_themselves(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Each is a torch file whose sums are right; its data can be mapped where it lies."""
    expected, found = expected_of(name, MODELS[MODEL]()), dcp.metadata(made[name])
    assert len(found.storage_data) > len(expected)
    for index, info in found.storage_data.items():
        file = made[name] / info.relative_path
        item = file.read_bytes()[info.offset : info.offset + info.length]
        with zipfile.ZipFile(io.BytesIO(item)) as opened:
            assert opened.testzip() is None
            assert opened.read("archive/byteorder") == b"little"
        start = torch._C.PyTorchFileReader(io.BytesIO(item)).get_record_offset("data/0")
        assert (info.offset + start) % 64 == 0, f"{index}: {info.offset} + {start}"
        cut_out = tmp_path / "item.pt"
        cut_out.write_bytes(item)
        tensor = torch.load(cut_out, weights_only=True)
        assert same_bits(tensor, torch.load(cut_out, weights_only=True, mmap=True))
        box = dcp.slices((tuple(index.offset), tuple(tensor.shape)))
        assert same_bits(tensor, expected[index.fqn][box].contiguous())
        storage = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        mapped = storage[info.offset + start :][: tensor.nbytes].view(tensor.dtype)
        assert mapped.data_ptr() % 64 == 0
        assert same_bits(mapped.view(tensor.shape), tensor)


@pytest.mark.parametrize("name", ["fsdp8", "titan2tp2"])
def test_torchs_own_converter_takes_them(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    with dcp.quiet():
        dcp_to_torch_save(made[name], tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    if name in FSDP:
        assert [*state] == ["model"]
        state = {f"model.{key}": tensor for key, tensor in state["model"].items()}
    dcp.assert_same_tensors(state, expected_of(name, MODELS[MODEL]()))


# -------------------------------------------------------------------------------------- accelerate


def load_by_accelerate(folder: Path, expected: Path) -> list[str]:
    """For `run_ranks`: accelerate loads the directory into a model that it has sharded by FSDP2.

    Says which tensors differ. accelerate allows FSDP on accelerators only: the kind of its state is
    set by hand, all else is its own.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from accelerate.utils.fsdp_utils import load_fsdp_model
    from torch.distributed.tensor import DTensor
    from transformers import AutoConfig, AutoModelForCausalLM

    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    whole = torch.load(expected, weights_only=True)
    before = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    assert before.keys() == whole.keys()
    assert not any(same_bits(before[name], tensor) for name, tensor in whole.items())
    load_fsdp_model(plugin, accelerator, model, str(folder.parent))
    after = model.state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in after.values())
    return [name for name, held in after.items() if not same_bits(held.full_tensor(), whole[name])]


def test_accelerate_loads_what_would_be_its_own(tmp_path: Path) -> None:
    jobs, calls, names = [], [], ("c", "c-tied")
    for name in names:
        root, model = tmp_path / name, MODELS[name]()
        hf.write(model, root / "hf")
        torch.save(dcp.with_head(model), root / "expected.pt")
        folder = root / "saved" / "pytorch_model_fsdp_0"
        jobs += [Job(root / "hf", folder, "fsdp8"), Job(folder.parent, root / "back", "hf")]
        calls.append(partial(load_by_accelerate, folder, root / "expected.pt"))
    must_convert(1, jobs)
    assert run_ranks(3, dcp.in_turn, calls) == [[[], []]] * 3
    for name in names:
        assert_same(hf.read(tmp_path / name / "back"), MODELS[name]())


# ------------------------------------------------------------------------- steps of TorchTitan runs


def test_two_places_get_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the time, the place or chance is in what is published."""
    hf.write(MODELS["b"](), tmp_path / "hf")
    places = [(spec, number) for spec in ("fsdp8", "titan3") for number in (1, 2)]
    for spec, number in places:
        place = tmp_path / (f"{number}" * number) / spec
        must_convert(number, [Job(tmp_path / "hf", place, spec)])
    for spec in ("fsdp8", "titan3"):
        one, other = (tmp_path / (f"{number}" * number) / spec for number in (1, 2))
        assert_same_files(one, other)
        for name in files_in(one):
            assert os.fsencode(tmp_path) not in (one / name).read_bytes(), name
        (found,) = one.rglob(".metadata")
        said = dcp.metadata(found.parent).storage_meta
        assert (said.checkpoint_id, said.save_id) == (None, None)  # load_id is the reader's own


def arguments(source: Path, run: Path, *more: str) -> list[str]:
    """The command line of a step for a run's folder."""
    keys = (f"src.path={source}", f"dst.path={run}", "engine.fsync=false", *more)
    return ["--src", "hf", "--dst", "titan2", *keys]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    hf.write(commands.model(), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("file", [".metadata", "model.safetensors.index.json"])
def test_a_run_that_has_begun_is_refused(file: str, source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "step-100").mkdir(parents=True)
    (run / "step-100" / file).write_text("{}")
    (run / "notes.txt").write_text("kept")
    line = commands.refused(run, r"step-100.+resume", *arguments(source, run))
    assert "step-0" in line
    commands.refused(run, r"step-100.+resume", *arguments(source, run), "--force")
    (run / "step-100" / file).unlink()  # it was never complete: TorchTitan takes no notice of it
    siblings = {path: state for path, state in commands.state_of(run).items() if path != str(run)}
    commands.done(*arguments(source, run))
    after = commands.state_of(run)
    assert siblings == {path: after[path] for path in siblings}
    assert sorted(os.listdir(run)) == ["notes.txt", "step-0", "step-100"]
    assert not any("partial" in name or "lock" in name for name in files_in(run))


def test_a_second_run_finds_it_done_and_force_replaces_only_ours(
    source: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    (run / "events.log").write_text("kept")
    commands.done(*arguments(source, run))
    before = commands.state_of(run)
    assert "already done" in commands.done(*arguments(source, run)).out
    assert commands.state_of(run) == before
    hf.write(commands.model(tied=True), other)
    commands.refused(run, r"step-0.+--force", *arguments(other, run))
    commands.done(*arguments(other, run), "--force")
    after = commands.state_of(run)
    assert after[str(run / "events.log")] == before[str(run / "events.log")]
    assert sorted(os.listdir(run)) == ["events.log", "step-0"]
    tied = commands.model(tied=True)
    found = titan.read_titan(run / STEP, tied.config)
    dcp.assert_same_tensors(found, tied.tensors)
    for inner in (STEP, "else"):  # a step-0 that is not ours stays
        foreign = tmp_path / "foreign" / inner
        foreign.mkdir(parents=True)
        (foreign / "__0_0.distcp").write_bytes(b"theirs")
    words = r"step-0.+without our reshard\.json"
    commands.refused(foreign.parent, words, *arguments(source, foreign.parent), "--force")
    (tmp_path / "foreign" / STEP / ".metadata").write_bytes(b"theirs")
    commands.refused(foreign.parent, words, *arguments(source, foreign.parent), "--force")


def test_what_is_under_way_looks_like_no_step(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", set()
    moving: Callable[..., Any] = job._Run._run_rounds

    def looking(*given: Any) -> Any:
        seen.update(os.listdir(run))
        return moving(*given)

    monkeypatch.setattr(job._Run, "_run_rounds", looking)
    commands.done(*arguments(source, run))
    assert any("partial-" in name for name in seen), seen
    assert any(name.endswith("lock") for name in seen), seen
    assert not any("step" in name for name in seen), seen
    assert os.listdir(run) == [STEP]
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"]


def test_the_newest_complete_step_is_taken(tmp_path: Path) -> None:
    older, newer = commands.model(), commands.model(tied=True)
    run, jobs = tmp_path / "run", []
    for step, held in ((9, older), (10, newer)):
        titan.write_titan(held, run, 3, step=step)
        (run / f"step-{step}" / "config.json").write_text(json.dumps(held.config))
    titan.write_titan(older, run, 2, step=300)
    (run / "step-300" / ".metadata").unlink()
    for number, place in enumerate((run, run / "step-10", run / "step-9")):
        jobs.append(Job(place, tmp_path / f"{number}", "hf"))
    must_convert(2, jobs)
    for number, held in enumerate((newer, newer, older)):
        assert_same(hf.read(tmp_path / f"{number}"), held)
    line = commands.refused(
        run, r"step-300.+\.metadata", "--src", run / "step-300", "--dst", "hf",
        f"dst.path={tmp_path / 'torn'}", f"src.model={run / 'step-9' / 'config.json'}",
    )  # fmt: skip
    assert line


# --------------------------------------------------------------------- what our manifest remembers


def test_half_rows_are_remembered_where_no_file_says_them(tmp_path: Path) -> None:
    """By the step itself, and by later steps of the run that began with it."""
    model = MODELS["a"]()
    hf.write(model, tmp_path / "hf")
    run = tmp_path / "run"
    commands.done(*arguments(tmp_path / "hf", run, "dst.rope=half"))
    titan.write_titan(model, run, 2, keys="0.3", rope="half", step=7)
    for number, place in enumerate((run / "step-0", run)):
        target = tmp_path / f"back{number}"
        said = commands.done(*commands.move("dcp", place, "hf", target)).out
        assert "source: rotary rows half" in said
        assert_same(hf.read(target), model)
    commands.refused(
        tmp_path,
        r"reshard.json says that its rotary rows are half, but src.rope=interleaved",
        *commands.move("dcp", run, "hf", tmp_path / "no", "src.rope=interleaved"),
    )


def test_the_place_of_a_source_leaves_no_trace(tmp_path: Path) -> None:
    dcp.write_fsdp(MODELS["a"](), tmp_path / "here" / "src", 3)
    hf.write(MODELS["a"](), tmp_path / "here" / "assets")
    shutil.copytree(tmp_path / "here", tmp_path / "over" / "there")  # with all times
    targets = []
    for place in ("here", "over/there"):
        root = tmp_path / place
        targets.append(root / "dst")
        words = commands.move("dcp", root / "src", "titan2", root / "dst")
        commands.done(*words, f"src.assets={root / 'assets'}")
    assert_same_files(*targets)
