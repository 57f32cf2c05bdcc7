"""TorchTitan's own model and adapter read what we write for it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import commands
from tests.oracles import hf, models
from tests.oracles.models import Model

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("TITAN_VENV", ROOT / ".venv-titan")) / "bin" / "python"
FIXTURES = {"titan_dcp_3rank": 30, "titan_dcp_2rank_tied_model_only": 29}
MODELS = {
    "untied": models.model_a(),
    "tied": models.model_a(tied=True),
    "heads-wider-than-hidden": models.model_a(head_dim=10),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.is_file(), reason=f"no TorchTitan at {PYTHON}: tests/real/titan.sh installs it"
    ),
]


@pytest.mark.parametrize("held", MODELS.values(), ids=MODELS)
def test_torchtitan_starts_from_what_we_write(held: Model, tmp_path: Path) -> None:
    source, target = tmp_path / "hf", tmp_path / "checkpoint"
    hf.write(held, source)
    commands.done(*commands.move("hf", source, "titan2", target))
    assert compared(target / "step-0", source) == (0, f"equal: {len(held.tensors)} tensors")


@pytest.mark.parametrize("name", FIXTURES)
def test_the_adapter_finds_upstream_checkpoints_equal(name: str, fixtures_root: Path) -> None:
    fixture = fixtures_root / name
    found = compared(fixture / "checkpoint" / "step-10", fixture / "reference")
    assert found == (0, f"equal: {FIXTURES[name]} tensors")


@pytest.mark.parametrize("name", FIXTURES)
def test_the_adapter_finds_a_changed_bit(name: str, fixtures_root: Path, tmp_path: Path) -> None:
    step, reference = tmp_path / "step-10", fixtures_root / name / "reference"
    shutil.copytree(fixtures_root / name / "checkpoint" / "step-10", step)
    key = "model.layers.1.self_attn.o_proj.weight"
    flip_first_bit(step, load_file(reference / "model.safetensors")[key][0])
    assert compared(step, reference) == (1, f"different: {key}")


def flip_first_bit(folder: Path, row: Tensor) -> None:
    """Change the lowest bit of the one place in the files where the values of a row are stored."""
    wanted = bytes(row.view(torch.uint8).tolist())
    files = {file: file.read_bytes() for file in folder.glob("*.distcp")}
    [(file, content)] = [pair for pair in files.items() if pair[1].count(wanted) == 1]
    at = content.index(wanted)
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def compared(step: Path, reference: Path) -> tuple[int, str]:
    """How the adapter ends on TorchTitan's Python, and the one line that it prints."""
    words = [PYTHON, ROOT / "tests" / "real" / "titan_adapter.py", step, reference]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert ended.returncode in (0, 1), ended.stderr
    assert ended.stdout.count("\n") == 1, f"{ended.stdout}\n{ended.stderr}"
    return ended.returncode, ended.stdout.strip()
