"""Damaged files of every kind, by the thousand: no crash, hang, execution or large allocation."""

import pytest

from tests.fuzz import harness
from tests.fuzz.cases import READERS

SEED = 1
SHORT, LONG = 125, 2500  # cases of each reader
BATCH = 625


def pytest_generate_tests(metafunc):
    if "numbers" in metafunc.fixturenames:
        count = LONG if metafunc.config.getoption("--long") else SHORT
        batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
        metafunc.parametrize("numbers", batches, ids=lambda batch: f"{batch.start}-{batch.stop}")


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS)
def test_damage_is_refused_in_a_line_or_harmless(reader, numbers, record_property):
    report = harness.run(reader, SEED, numbers)
    count = sum(report.ends.values())
    record_property("mutations", count)
    record_property("findings", len(report.findings))
    assert not report.findings, "\n".join(report.findings[:5])
    assert count == len(numbers)
