"""What all tests share."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.ranks import PRELOAD

multiprocessing.set_forkserver_preload(PRELOAD)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fixtures_root() -> Path:
    """The directory of small checkpoints that other packages wrote."""
    root = Path(__file__).parents[1].parent / "shared" / "fixtures"
    if not root.is_dir():
        pytest.skip(f"no upstream fixtures at {root}")
    return root
