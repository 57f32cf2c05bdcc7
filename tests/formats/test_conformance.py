"""Every registered format on every kind of model."""

import inspect

import pytest
import torch
from safetensors import safe_open

from reshard import families, formats
from reshard.errors import LayoutError
from reshard.formats.options import Mesh, Options
from reshard.geometry import whole
from reshard.layout import Layout
from tests import conformance
from tests.layouts import Case, cases, config_of, layout_of, oracle
from tests.oracles import hf as hf_oracle
from tests.oracles import meta as meta_oracle
from tests.oracles import models
from tests.oracles import nanotron as nanotron_oracle

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


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
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
