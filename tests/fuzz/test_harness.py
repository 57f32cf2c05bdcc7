"""The harness finds each fault that it is there for, and files that cost as much as any can."""

import re

import pytest

from tests.fuzz import harness
from tests.fuzz.largest import BOMBS
from tests.fuzz.sabotaged import FAULTS

SABOTAGED, LARGEST = "tests.fuzz.sabotaged", "tests.fuzz.largest"
SHORT = ("json", "safetensors")  # without --long


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(fault):
    report = harness.run(fault, 1, range(2), table=SABOTAGED, seconds=0.3)
    assert len(report.findings) == 1
    assert re.search(
        rf"^'{fault}' 1 1( \(file: planned\))?: {FAULTS[fault][1]}", *report.findings, re.S
    )


@pytest.mark.parametrize("reader", ["nothing", "a small allocation"])
def test_what_is_allowed_is_not_found(reader):
    report = harness.run(reader, 1, range(2), table=SABOTAGED)
    assert (report.findings, report.ends) == ([], {"read": 2})


@pytest.mark.parametrize("reader", BOMBS)
def test_the_largest_files_are_read_or_refused_within_the_limits(reader, long):
    if not long and reader not in SHORT:
        pytest.skip("with --long")
    report = harness.run(reader, 1, range(len(BOMBS[reader])), table=LARGEST)
    assert not report.findings, "\n".join(report.findings)
    assert sum(report.ends.values()) == len(BOMBS[reader])
