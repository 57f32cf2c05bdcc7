"""Which small files go along, which a checkpoint has, and which it is of no use without."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard import assets, formats, tokenizers
from reshard.assets import carried, present, readiness, tokens_of
from reshard.errors import StorageError
from reshard.formats.options import Mesh, Options
from tests.layouts import cases

KNOWN = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "absent.json")


def fill(folder, *names: str, text: str | None = None) -> None:
    """Files that hold their own names, or `text`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or f"{folder.name}/{name}")


# Carried along.


def test_small_files_go_to_the_root_or_to_assets(tmp_path):
    source, outside = tmp_path / "source", tmp_path / "outside"
    names = ("tokenizer.model", "tokenizer.json", "LICENSE.txt", "notes.txt", "weights.pth")
    fill(source, *names, "assets/vocab.json")
    fill(source / "assets", "tokenizer.json", text="older")
    fill(outside, "merges.txt")
    (source / "merges.txt").symlink_to(outside / "merges.txt")
    found = carried([source], KNOWN, ("tokenizer.model",))
    assert {name: path.read_text() for name, path in found.items()} == {
        "tokenizer.model": "source/tokenizer.model",
        "assets/tokenizer.json": "source/tokenizer.json",
        "LICENSE.txt": "source/LICENSE.txt",
        "assets/vocab.json": "source/assets/vocab.json",
        "assets/merges.txt": "outside/merges.txt",
    }


def test_the_first_folder_that_has_a_file_wins(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    fill(first, "assets/tokenizer.json", "LICENSE")
    fill(second, "tokenizer.json", "vocab.json", "license", "LICENSE")
    fill(third, "vocab.json", "tokenizer.model", "assets/merges.txt")
    found = carried([first, second, third], KNOWN, KNOWN)
    assert {name: path.read_text() for name, path in found.items()} == {
        "tokenizer.json": "first/assets/tokenizer.json",
        "LICENSE": "first/LICENSE",
        "license": "second/license",
        "vocab.json": "second/vocab.json",
        "tokenizer.model": "third/tokenizer.model",
        "merges.txt": "third/assets/merges.txt",
    }
    again = carried([third, second, first], KNOWN, KNOWN)
    assert again["tokenizer.json"] == second / "tokenizer.json"
    assert again["vocab.json"] == third / "vocab.json"


@settings(deadline=None)
@given(st.data())
def test_folders_are_searched_in_order_and_their_assets_after_them(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("folders")
    places = [f"f{number}{below}" for number in range(3) for below in ("", "/assets")]
    having = data.draw(st.dictionaries(st.sampled_from(KNOWN), st.sets(st.sampled_from(places))))
    kept = data.draw(st.sets(st.sampled_from(KNOWN)))
    for name, folders in having.items():
        for folder in folders:
            fill(root / folder, name)
    found = carried([root / f"f{number}" for number in range(3)], KNOWN, tuple(kept))
    assert found == {
        name if name in kept else f"assets/{name}": root / min(folders, key=places.index) / name
        for name, folders in having.items()
        if folders
    }


def test_folders_that_are_not_there_and_odd_entries_are_passed_over(tmp_path):
    source = tmp_path / "source"
    fill(source, "tokenizer.json")
    (source / "vocab.json").mkdir()
    (source / "merges.txt").symlink_to("nowhere")
    (source / "assets").write_text("no folder")
    os.mkfifo(source / "tokenizer.model")
    found = carried([tmp_path / "absent", source, source / "tokenizer.json"], KNOWN, KNOWN)
    assert found == {"tokenizer.json": source / "tokenizer.json"}
    assert carried([], KNOWN, KNOWN) == {}


@pytest.mark.parametrize("extra", [0, 1])
def test_a_huge_file_is_not_small(tmp_path, extra):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(assets.MAX_ASSET_BYTES + extra)
    assert bool(carried([tmp_path], KNOWN, KNOWN)) == (not extra)


@pytest.mark.parametrize("name", ["LICENSE", "license.md", "Notice.txt", "USE_POLICY.md", "README"])
def test_legal_texts_stay_at_the_root_whatever_they_are_called(tmp_path, name):
    fill(tmp_path / "a", f"assets/{name}", "config.json", "MY_LICENSE")
    assert carried([tmp_path / "a"], (), ()) == {name: tmp_path / "a" / "assets" / name}


# What is there, and what is missing.


NEEDED = {"config.json": ("config.json",), "tokenizer": ("tokenizer.json", "tokenizer.model")}


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ((), ("config.json", "tokenizer")),
        (("tokenizer.model",), ("config.json",)),
        (("config.json", "vocab.json"), ("tokenizer",)),
        (("config.json", "assets/tokenizer.json"), ()),
        (("tokenizer.json", "tokenizer.model", "config.json"), ()),
        (("other/tokenizer.json", "config.json"), ("tokenizer",)),
    ],
)
def test_one_file_of_a_kind_is_enough(names, missing):
    found = readiness(names, NEEDED, {})
    assert found.missing == missing
    assert found.ready == tuple(sorted(names))


def test_models_that_see_need_the_settings_of_their_images():
    config = {"vision_config": {}}
    names = ("config.json", "tokenizer.json")
    assert readiness(names, NEEDED, {}).missing == ()
    assert readiness(names, NEEDED, config).missing == ("preprocessor",)
    for name in ("preprocessor_config.json", "assets/processor_config.json"):
        assert readiness((*names, name), NEEDED, config).missing == ()


def test_a_line_says_what_is_there_and_what_would_help():
    assert readiness((), {}, {}).line() == "ready: no small files"
    assert readiness(("b", "a"), {}, {}).line() == "ready: a, b"
    assert readiness((), NEEDED, {}).line() == (
        "ready: no small files; missing: config.json, tokenizer (src.assets=DIR takes it from "
        "there)"
    )


@pytest.mark.parametrize("name", sorted({case.format for case in cases()} - {"statedict"}))
def test_what_a_format_needs_is_made_or_carried_along(tmp_path, name):
    """Nothing is asked for that no one could give."""
    case, target = next(c for c in cases() if c.format == name), formats.named(name)
    axes = {axis: case.chosen[axis] for axis in ("tp", "dp") if axis in case.chosen}
    made = target.side_files(case.model, case.layout(), Options(mesh=Mesh(**axes)))
    assert readiness(tuple(made), target.NEEDED, {}).missing == ("tokenizer",)
    known = formats.asset_names()
    fill(tmp_path, *known)
    found = carried([tmp_path], known, target.ASSETS)
    inside = (tokenizers.KEYS,) if target.EMBEDS_TOKENIZER else ()
    names = (*found, *made, *inside)
    assert readiness(names, target.NEEDED, {"vision_config": {}}).missing == ()


def test_present_files_are_named_by_their_place(tmp_path):
    fill(tmp_path, "vocab.json", "assets/vocab.json", "assets/merges.txt", "other.json")
    (tmp_path / "tokenizer.json").mkdir()
    assert present(tmp_path, reversed(KNOWN)) == [
        "assets/merges.txt",
        "vocab.json",
        "assets/vocab.json",
    ]
    assert present(tmp_path / "absent", KNOWN) == []


# Tokens.


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"model": {"vocab": {"a": 0, "b": 1}}}, 2),
        ({"model": {"vocab": {"a": 7}}}, 8),
        ({"model": {"vocab": {}}}, None),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 5}, {"id": 2}]}, 6),
        ({"model": {"vocab": {"a": 9}}, "added_tokens": [{"id": 5}]}, 10),
        ({"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": "x"}, 3, {}, None]}, 2),
        ({"added_tokens": [{"id": 8, "special": True}], "model": {"vocab": {"a": 1}}}, 9),
        ({"padding": {"pad_id": 70}, "model": {"vocab": {"a": 1}, "merges": [["a", "b"]]}}, 2),
        ({"model": {"vocab": {f"t{n}": n for n in range(90_000)}, "merges": []}}, 90_000),
        ({"model": {"vocab": ["a", "b"]}}, None),
        ({"model": []}, None),
        ({}, None),
        ([], None),
        ("text", None),
    ],
)
def test_tokens_are_counted_up_to_the_last(tmp_path, record, expected):
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert tokens_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"tokenizer_config.json": {"added_tokens_decoder": {"1": {}, "7": {}}}}, 8),
        ({"added_tokens.json": {"<a>": 3, "<b>": 9}}, 10),
        ({"tokenizer_config.json": {"added_tokens_decoder": ["8"]}}, 4),
        ({"tokenizer_config.json": ["8"], "added_tokens.json": {"a": None, "b": "9" * 5000}}, 4),
    ],
)
def test_tokens_that_are_added_beside_are_counted(tmp_path, beside, expected):
    text = json.dumps({"model": {"vocab": {"a": 3}}})
    for name, record in beside.items():
        (tmp_path / name).write_text(json.dumps(record))
    assert tokens_of(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(text)
    assert tokens_of(tmp_path) == expected
    (tmp_path / "added_tokens.json").write_text("{")
    assert tokens_of(tmp_path) is not None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_tokenizer_that_is_no_json_tells_nothing(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert tokens_of(tmp_path) is None


def test_without_a_tokenizer_there_is_no_count(tmp_path):
    assert tokens_of(tmp_path) is None
    assert tokens_of(tmp_path / "absent") is None
    (tmp_path / "tokenizer.json").mkdir()
    assert tokens_of(tmp_path) is None
    (tmp_path / "tokenizer.json").rmdir()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(assets.MAX_ASSET_BYTES + 1)
    assert tokens_of(tmp_path) is None


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "tokenizer.json")

    def refuse(path, *mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(StorageError, match=r"tokenizer.json"):
        tokens_of(tmp_path)
