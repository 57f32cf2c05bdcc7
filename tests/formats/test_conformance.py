"""Every registered format on every kind of model."""

import inspect
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from reshard import families, formats
from reshard.errors import LayoutError
from reshard.formats.options import Mesh, Options
from reshard.geometry import item_name, whole
from reshard.layout import Layout
from reshard.placement import uncut
from tests import conformance
from tests.layouts import Case, cases, config_of, fused, held, layout_of, oracle
from tests.oracles import dcp as dcp_oracle
from tests.oracles import gguf as gguf_oracle
from tests.oracles import hf as hf_oracle
from tests.oracles import meta as meta_oracle
from tests.oracles import models
from tests.oracles import nanotron as nanotron_oracle
from tests.oracles import titan as titan_oracle

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_stores_every_element_and_declares_the_rest(case):
    conformance.check_layout(case.layout())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_is_pure(case):
    conformance.check_same(case.layout(), case.layout())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_holds_the_parameters_of_the_model_and_no_others(case):
    expected = {parameter.name: parameter.shape for parameter in families.parameters(case.model)}
    found = {name: slots[0].placement.shape for name, slots in case.layout().places.items()}
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("name", sorted(formats.formats()))
def test_a_format_has_what_the_registry_promises(name):
    found = formats.named(name)
    assert name == found.NAME
    assert all(isinstance(asset, str) for asset in found.ASSETS)
    promised = {
        key: list(inspect.signature(value).parameters)[1:]
        for key, value in vars(formats.Format).items()
        if inspect.isfunction(value) and not key.startswith("_")
    }
    assert promised
    for key, arguments in promised.items():
        assert list(inspect.signature(getattr(found, key)).parameters) == arguments, key


@pytest.mark.parametrize("case", CASES, ids=str)
def test_side_files_and_notes_are_pure_and_do_not_collide_with_the_layout(case):
    chosen = dict(case.chosen)
    axes = {axis: chosen.pop(axis) for axis in ("tp", "pp", "dp") if axis in chosen}
    options = Options(mesh=Mesh(**axes), **chosen)
    made, layout = formats.named(case.format), case.layout()
    files = made.side_files(case.model, layout, options)
    assert files == made.side_files(case.model, case.layout(), options)
    assert not set(files) & set(layout.files)
    assert all(isinstance(data, bytes) and data for data in files.values())
    assert all("\n" not in note for note in made.notes(case.model, options))


def _values(layout: Layout, read) -> dict[str, torch.Tensor]:
    """Every parameter, put together by windows from the stored tensors that `read` gives."""
    found = {}
    for name, slots in layout.places.items():
        for copy in (0, 1):
            table = torch.zeros(slots[0].placement.shape, dtype=slots[0].dtype)
            parts = list(layout.tensors_on(name, whole(table.shape)))
            if not any(part.copy == copy for part in parts):
                continue
            for part in (part for part in parts if part.copy == copy):
                stored = read(part.file, part.key)
                assert tuple(stored.shape) == part.shape, part.file
                for window in part.windows:
                    box = tuple(map(slice, window.region.start, window.region.stop))
                    table[box] = window.view(stored.contiguous().flatten())
            found[name if copy == 0 else f"{name} again"] = table
    return found


def _check_values(layout: Layout, model: models.Model, read) -> None:
    found = _values(layout, read)
    for name, tensor in model.tensors.items():
        assert torch.equal(found.pop(name), tensor), name
        again = found.pop(f"{name} again", None)
        assert again is None or torch.equal(again, tensor), name
    assert not found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "tp", "dim"), [("a", 6, 0), ("a", 3, 1), ("b", 3, 0), ("c", 2, 1), ("c", 6, 0)]
)
def test_meta_windows_find_each_value_in_files_of_the_oracle(tmp_path, name, tp, dim, tied):
    model = oracle(name, tied=tied)
    meta_oracle.write(model, tmp_path, tp, embedding_dim=dim)
    files = {path.name: torch.load(path) for path in tmp_path.glob("*.pth")}
    layout = layout_of(config_of(name, tied=tied), "meta", tp=tp, embedding_dim=dim)
    assert set(files) == set(layout.files)
    _check_values(layout, model, lambda file, key: files[file][key])


def test_meta_windows_find_heads_that_are_stored_more_than_once(tmp_path):
    model = oracle("a", num_key_value_heads=2)
    meta_oracle.write(model, tmp_path, 6)
    files = {path.name: torch.load(path) for path in tmp_path.glob("*.pth")}
    layout = layout_of(config_of("a", num_key_value_heads=2), "meta", tp=6)
    _check_values(layout, model, lambda file, key: files[file][key])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "tp", "pp", "multiple"),
    [("a", 3, 2, None), ("a", 6, 1, 5), ("b", 3, 5, 64), ("c", 2, 3, None)],
)
def test_nanotron_windows_find_each_value_in_files_of_the_oracle(
    tmp_path, name, tp, pp, multiple, tied, interleaved
):
    model = oracle(name, tied=tied)
    nanotron_oracle.write(
        model, tmp_path, tp, pp, rope_interleaved=interleaved, vocab_multiple=multiple
    )
    layout = layout_of(
        config_of(name, tied=tied),
        "nanotron",
        tp=tp,
        pp=pp,
        rope_interleaved=interleaved,
        vocab_multiple=multiple,
    )
    stored = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert stored == set(layout.files)

    def read(file, key):
        with safe_open(tmp_path / file, "pt") as opened:
            assert (opened.metadata() or {}) == dict(layout.header(file)), file
            return opened.get_tensor(key)

    _check_values(layout, model, read)


@pytest.mark.parametrize("tied", [False, True])
def test_hf_windows_find_each_value_in_files_of_the_oracle(tmp_path, tied):
    model = oracle("b", tied=tied)
    hf_oracle.write(model, tmp_path, files=2)
    layout = layout_of(config_of("b", tied=tied), "hf", max_shard_bytes=20_000)
    where = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            where |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no dict
    assert set(where) == {slot.key for slot in layout.slots}
    _check_values(layout, model, lambda file, key: where[key])


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_windows_find_each_value_in_files_of_the_oracle(tmp_path, tied):
    facts = {"attention_bias": True, "dtype": torch.float32}
    model = oracle("b", tied=tied, **facts)
    gguf_oracle.write(model, tmp_path, gguf_oracle.Kind.F32)
    stored = gguf_oracle.read(tmp_path)
    layout = layout_of(config_of("b", tied=tied, **facts), "gguf")
    (file,) = layout.files
    kept = gguf_oracle.to_gguf(model)
    assert [content.key for content in layout.contents(file)] == list(stored.kinds) == list(kept)
    _check_values(layout, model, lambda file, key: kept[key])


@pytest.mark.parametrize("encoding", ["q8_0", "q4_1"])
def test_coded_tensors_take_the_bytes_that_they_take_in_files_of_the_oracle(tmp_path, encoding):
    blocks = {"hidden_size": 96, "head_dim": 16, "intermediate_size": 160, "vocab_size": 128}
    gguf_oracle.write(oracle("c", **blocks), tmp_path, gguf_oracle.Kind[encoding.upper()])
    expected = {key: len(raw) for key, raw in gguf_oracle.read(tmp_path).raw.items()}
    layout = layout_of(config_of("c", **blocks), "gguf", encoding=encoding)
    (file,) = layout.files
    assert {content.key: content.nbytes for content in layout.contents(file)} == expected
    assert layout.total_bytes() == sum(expected.values())


def placed_boxes(layout: Layout) -> dict[tuple[str, tuple[int, ...]], tuple[object, ...]]:
    """The shape, dtype and file of every box, by its key and where it begins."""
    return {
        (slot.key, slot.placement.box(shard).start): (
            slot.placement.stored_shape(shard),
            slot.dtype,
            slot.file_of(shard),
        )
        for slot in layout.slots
        for shard in range(slot.placement.cut.parts)
        if slot.placement.box(shard).numel
    }


def saved_boxes(path: Path) -> dict[tuple[str, tuple[int, ...]], tuple[object, ...]]:
    """The same of a directory, by torch's own reader."""
    found = dcp_oracle.metadata(path)
    files = {(index.fqn, index.offset): i.relative_path for index, i in found.storage_data.items()}
    return {
        (fqn, tuple(chunk.offsets)): (
            tuple(chunk.sizes),
            entry.properties.dtype,
            files[fqn, chunk.offsets],
        )
        for fqn, entry in dcp_oracle.tensors_in(found).items()
        for chunk in entry.chunks
        if whole(chunk.sizes).numel
    }


def _check_boxes(layout: Layout, model: models.Model, path: Path, *, tp: int = 1) -> None:
    """A layout is what torch has saved, to the file; of copies on a tp axis it may save any."""
    ours, theirs = placed_boxes(layout), saved_boxes(path)
    assert ours.keys() == theirs.keys()
    for place, box in ours.items():
        assert box[:2] == theirs[place][:2]
        assert "norm" in place[0] or tp == 1 or box[2] == theirs[place][2]
    if tp == 1:
        assert ours == theirs
    saved = dcp_oracle.read(path)
    parts = {
        item_name(key, start): saved[key][tuple(map(slice, start, map(int.__add__, start, box[0])))]
        for (key, start), box in ours.items()
    }
    _check_values(layout, model, lambda file, key: parts[key])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "dp", "wrapper"), [("a", 1, True), ("b", 5, False), ("c", 64, True)]
)
def test_fsdp_layouts_are_what_torch_saves(tmp_path, name, dp, wrapper, tied):
    model = oracle(name, tied=tied)
    dcp_oracle.write_fsdp(model, tmp_path, dp, wrapper=wrapper)
    chosen = {} if wrapper else {"wrapper": "none"}
    _check_boxes(layout_of(config_of(name, tied=tied), "fsdp", dp=dp, **chosen), model, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("name", "dp", "tp", "keys"),
    [("a", 1, 1, "current"), ("b", 5, 1, "older"), ("c", 7, 1, "current"), ("a", 2, 3, "older"),
     ("b", 5, 2, "older"), ("c", 64, 2, "current")],
)  # fmt: skip
def test_titan_layouts_are_what_torch_saves(tmp_path, name, dp, tp, keys, rope, tied):
    """Chunks of 5 and 7 end inside heads; on 64 ranks many are empty."""
    model = oracle(name, tied=tied)
    names = {"current": "0.3", "older": "0.2"}[keys]
    if tp > 1:
        titan_oracle.write_2d(model, tmp_path, dp, tp, keys=names, rope=rope)
    else:
        titan_oracle.write_titan(model, tmp_path, dp, keys=names, rope=rope, whole_qkv=False)
    layout = layout_of(config_of(name, tied=tied), "titan", dp=dp, tp=tp, keys=keys, rope=rope)
    _check_boxes(layout, model, tmp_path, tp=tp)


def test_whole_models_in_one_file_are_a_source_only():
    with pytest.raises(
        LayoutError, match=r"statedict: is a source only; for a target use --dst hf"
    ):
        layout_of(config_of("a"), "statedict")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "titan: the model has attention_bias=true"),
        ({"mlp_bias": True}, "titan: the model has mlp_bias=true"),
        ({"head_dim": 3, "hidden_size": 36}, "titan: rotary heads of 3 rows have no two halves"),
    ],
)
def test_what_torchtitan_cannot_hold_is_refused(changes, message):
    with pytest.raises(LayoutError, match=message):
        layout_of(config_of("a", **changes), "titan")


def test_torchtitan_may_hold_heads_without_halves_in_their_own_order():
    layout = layout_of(config_of("a", head_dim=3, hidden_size=36), "titan", rope="half", dp=5)
    conformance.check_layout(layout)
    assert not any(slot.placement.interleaved for slot in layout.slots)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0.attention.wo.weight", (72, 71), r"is \[72, 71\], but .* makes it \[72, 72\]"),
        (
            "layers.1.feed_forward.w13.weight",
            (3, 222, 72),
            r"but the config makes it \[2, 222, 72\]",
        ),
        ("layers.1.attention.qkv_linear.wqkv.weight", (72, 72), r"makes it \[144, 72\]"),
        ("norm.weight", (), r"is \[\], but the config makes it \[72\]"),
    ],
)
def test_a_stored_tensor_of_another_shape_is_refused(name, shape, message):
    model = config_of("a")
    chunks = {**fused(model, 2), name: held(name, shape, uncut(*shape[:1] or (1,)))}
    with pytest.raises(LayoutError, match=message) as caught:
        layout_of(model, "titan", chunks=chunks)
    assert f"tensor `{name}`" in str(caught.value)


def test_a_parameter_under_no_known_name_is_named():
    model = config_of("a")
    chunks = {k: v for k, v in fused(model, 2).items() if k != "layers.3.feed_forward.w2.weight"}
    with pytest.raises(LayoutError, match=r"`layers.3.feed_forward.w2.weight` is missing, under"):
        layout_of(model, "titan", chunks=chunks)


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("fsdp", {"dp": 2, "tp": 2}, "fsdp: as a target it has a dp axis only"),
        ("fsdp", {"dp": 2, "pp": 2}, "fsdp: as a target it has a dp axis only"),
        ("titan", {"dp": 2, "pp": 2}, "titan: as a target it has the axes dp and tp"),
        ("meta", {"tp": 5}, r"meta5: 5 files do not divide .* use one of \[1, 2, 3, 6\]"),
        ("meta", {"tp": 2, "pp": 2}, "tp axis only"),
        ("nanotron", {"tp": 4}, r"tp must divide 12 heads, 6 key-value heads .* does is 6"),
        ("nanotron", {"tp": 1, "pp": 8}, "5 layers have work for 7 stages at most"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(name, chosen, message):
    with pytest.raises(LayoutError, match=message):
        layout_of(config_of("a"), name, **chosen)


def test_an_uneven_vocabulary_is_refused_with_the_padding_that_would_do():
    with pytest.raises(LayoutError, match=r"vocabulary of 223; .* \(to 224 rows\)"):
        layout_of(config_of("a", vocab_size=223), "nanotron", tp=2)


@pytest.mark.parametrize("name", ["meta", "nanotron"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_bias": True}, "attention_bias=true"),
        ({"head_dim": 8}, "12 heads of 8 are not the hidden size 72"),
        ({"head_dim": 3, "hidden_size": 36}, "3 rows have no two halves"),
    ],
)
def test_a_model_that_a_format_cannot_say_is_refused(name, overrides, message):
    with pytest.raises(LayoutError, match=message):
        layout_of(config_of("a", **overrides), name, rope_interleaved=True)


def test_case_names_are_unique():
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    assert all(isinstance(case, Case) for case in CASES)
