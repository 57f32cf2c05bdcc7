"""Journals that were torn, damaged, or written by several attempts."""

import resource
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.errors import StorageError
from reshard.journal import READ_RECORDS, SIZE, Journal, Record, journals, next_attempt, read

RECORDS = [
    Record(number, 1 << (number + 30), number + 1, 0xFFFFFFFF - number) for number in range(7)
]
files_are_rewritten = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(directory, records=RECORDS, attempt=1, rank=0):
    with Journal(directory, attempt, rank) as journal:
        journal.append(records[:3])
        journal.append(records[3:])
        journal.append([])
    return journals(directory)[-1]


def test_records_come_back_as_they_were_written(tmp_path):
    path = write(tmp_path)
    assert list(read(tmp_path)) == RECORDS
    assert path.stat().st_size == SIZE * len(RECORDS)


@pytest.mark.parametrize("count", [READ_RECORDS - 1, READ_RECORDS, 2 * READ_RECORDS + 1])
def test_long_journals_are_read_in_steps(tmp_path, count):
    records = [Record(number, number, 1, number) for number in range(count)]
    write(tmp_path, records)
    assert list(read(tmp_path)) == records


@pytest.mark.parametrize("length", range(SIZE * len(RECORDS) + 1))
def test_a_torn_tail_is_ignored(tmp_path, length):
    path = write(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(length)
    assert list(read(tmp_path)) == RECORDS[: length // SIZE]


@files_are_rewritten
@given(place=st.integers(0, SIZE * len(RECORDS) - 1), bit=st.integers(0, 7))
def test_a_damaged_record_is_never_believed_and_those_before_it_are(tmp_path, place, bit):
    for old in journals(tmp_path):
        old.unlink()
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    found = list(read(tmp_path))
    assert found[: place // SIZE] == RECORDS[: place // SIZE]
    assert set(found) <= set(RECORDS) - {RECORDS[place // SIZE]}


@pytest.mark.parametrize("tail", [b"\0", b"\0" * SIZE, b"\xff" * (SIZE * 3 + 5)])
def test_a_tail_of_zeros_or_garbage_is_ignored(tmp_path, tail):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + tail)
    assert list(read(tmp_path)) == RECORDS


def test_a_torn_journal_does_not_hide_the_next_one(tmp_path):
    torn = write(tmp_path, RECORDS[:4], attempt=1, rank=0)
    write(tmp_path, RECORDS[4:], attempt=1, rank=1)
    with open(torn, "r+b") as file:
        file.truncate(SIZE * 2 + 5)
    assert list(read(tmp_path)) == RECORDS[:2] + RECORDS[4:]


def test_attempts_are_counted_on_and_read_in_order(tmp_path):
    assert next_attempt(tmp_path) == 1
    write(tmp_path, RECORDS[:1], attempt=1, rank=123456)
    assert next_attempt(tmp_path) == 2
    write(tmp_path, RECORDS[1:2], attempt=10, rank=0)
    write(tmp_path, RECORDS[2:3], attempt=2, rank=5)
    assert next_attempt(tmp_path) == 11
    assert list(read(tmp_path)) == [RECORDS[0], RECORDS[2], RECORDS[1]]


def test_a_journal_goes_on_where_it_ended(tmp_path):
    write(tmp_path, RECORDS[:3])
    write(tmp_path, RECORDS[3:])
    assert list(read(tmp_path)) == RECORDS


def test_a_journal_in_a_directory_that_is_not_there_names_its_path(tmp_path):
    with pytest.raises(StorageError, match=r"absent/journal-0001-000002`: cannot create: No such"):
        Journal(tmp_path / "absent", 1, 2)


def test_a_full_disk_is_an_error_even_where_a_part_still_fits(tmp_path):
    """A record that is half there would hide every later one of its journal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    journal = Journal(tmp_path, 1, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE + 5, hard))
        with pytest.raises(StorageError, match="cannot write"):
            journal.append(RECORDS[:3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
        journal.close()
