"""Sources that are written again in place between two conversions of one process."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reshard import containers
from tests.commands import done, model, move
from tests.containers import dcpdirs
from tests.oracles import dcp, hf
from tests.oracles.compare import assert_same
from tests.oracles.models import Model

FILE = "model.safetensors"


def other() -> Model:
    """The model with other values: shapes, names and config are the same."""
    tensors = {name: tensor.flip(0) * 2 for name, tensor in model().tensors.items()}
    return Model(model().config, tensors)


def overwrite(path: Path, content: bytes) -> None:
    """Write into a file that exists, which keeps its inode."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    assert path.stat().st_ino == before.st_ino
    if path.stat().st_mtime_ns == before.st_mtime_ns:
        os.utime(path, ns=(before.st_mtime_ns + 1, before.st_mtime_ns + 1))


def rewrite_with_a_longer_header(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), folder / "new", {"format": "pt", "note": "x" * 500})
    overwrite(folder / FILE, (folder / "new").read_bytes())
    (folder / "new").unlink()


def test_a_file_of_hf_with_another_header(tmp_path: Path) -> None:
    hf.write(model(), tmp_path / "src")
    done(*move("hf", tmp_path / "src", "fsdp2", tmp_path / "one"))
    rewrite_with_a_longer_header(tmp_path / "src", other().tensors)
    done(*move("hf", tmp_path / "src", "fsdp2", tmp_path / "two"))
    assert_moved(tmp_path, model(), other())


def assert_moved(path: Path, first: Model, second: Model) -> None:
    """Two directories of ours hold two models."""
    for name, held in (("one", first), ("two", second)):
        dcp.assert_same_tensors(dcp.read_fsdp(path / name), held.tensors)


@pytest.mark.parametrize("extra", [{}, {"lr": "0.1" * 300}], ids=["same places", "others"])
def test_a_directory_of_dcp(tmp_path: Path, extra: dict[str, str]) -> None:
    """Objects that are no tensors come first in a file."""
    source = tmp_path / "src"
    dcp.write_fsdp(model(), source, 2)
    (source / "config.json").write_text(json.dumps(model().config))
    done(*move("fsdp2", source, "hf", tmp_path / "one"))
    dcp.write_fsdp(other(), tmp_path / "new", 2, extra=extra)
    for file in sorted((tmp_path / "new").iterdir()):
        overwrite(source / file.name, file.read_bytes())
    done(*move("fsdp2", source, "hf", tmp_path / "two"))
    assert_same(hf.read(tmp_path / "one"), model())
    assert_same(hf.read(tmp_path / "two"), other())


def test_an_index_is_made_anew_when_metadata_alone_is_written_again(tmp_path: Path) -> None:
    path = dcpdirs.save(tmp_path / "c", {"a": torch.ones(3), "b": torch.zeros(3)})
    file = "__0_0.distcp"
    before = containers.index("dcpfile", path, file).entries
    places = {key: before[key].offset for key in before}
    assert containers.index("dcpfile", path, file).entries is before
    found = dcpdirs.metadata_of(path)
    one, two = found.storage_data
    stored = found.storage_data
    stored[one], stored[two] = stored[two], stored[one]
    dcpdirs.pickle_metadata(path, found)
    after = containers.index("dcpfile", path, file).entries
    assert {key: after[key].offset for key in after} == {
        "a[0]": places["b[0]"],
        "b[0]": places["a[0]"],
    }


def test_an_index_is_made_once_for_a_file_that_stays(tmp_path: Path) -> None:
    hf.write(model(), tmp_path / "src")
    first = containers.index("safetensors", tmp_path / "src", FILE)
    assert containers.index("safetensors", tmp_path / "src", FILE) is first
    rewrite_with_a_longer_header(tmp_path / "src", model().tensors)
    assert containers.index("safetensors", tmp_path / "src", FILE) is not first
