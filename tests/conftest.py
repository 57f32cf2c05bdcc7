"""What all tests share."""

import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.interrupted import Undisturbed
from tests.ranks import PRELOAD

multiprocessing.set_forkserver_preload(PRELOAD)
torch.set_num_threads(1)

# What tests count with `record_property`, by the first of the keys that they use.
COUNTED = {
    "mutations": "fuzz: {mutations:,} mutations, {findings} findings",
    "kills": "kills: {kills} tried, {inside} in the middle of the work, {lost} lost, {wrong} wrong",
    "troubles": "errors that travel: {troubles} tried",
    "faults": "faults below storage: {faults:,} tried",
    "flips": "flips: {flips:,} bytes changed, each found by verify",
    "conversions": "soak: {conversions:,} conversions in one process group",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was tried at random, and what came of it."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    totals: Counter[str] = Counter()
    for report in reports:
        totals.update({key: n for key, n in report.user_properties if isinstance(n, int)})
    for first, text in COUNTED.items():
        if totals[first]:
            terminalreporter.write_line(text.format_map(totals))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What the `source` becomes when nothing goes wrong, by target."""
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def source(undisturbed: Undisturbed) -> Path:
    """4 Meta files of together 4 MB."""
    return undisturbed.source


@pytest.fixture(scope="session")
def fixtures_root() -> Path:
    """The directory of small checkpoints that other packages wrote."""
    root = Path(__file__).parents[1].parent / "shared" / "fixtures"
    if not root.is_dir():
        pytest.skip(f"no upstream fixtures at {root}")
    return root


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the command line of pytest takes besides."""
    parser.addoption("--long", action="store_true", help="many more random cases")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether many more random cases are asked for."""
    asked: bool = request.config.getoption("--long")
    return asked
