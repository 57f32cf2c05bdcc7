"""Journals that were torn, damaged, or written by several attempts."""

import resource
import signal
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.errors import StorageError
from reshard.journal import (
    READ_RECORDS,
    SIZE,
    Journal,
    Record,
    Table,
    journals,
    next_attempt,
    read,
)

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


# The table of all journals.


def table_of(directory, records, **share):
    write(directory, records)
    return Table.read(directory, lambda: None, **share)


@files_are_rewritten
@given(
    st.lists(
        st.builds(
            Record,
            st.integers(0, 4) | st.just(2**32 - 1),
            st.integers(0, 5) | st.integers(2**40 - 2, 2**40 + 2) | st.just(2**63 - 1),
            st.integers(0, 2**63 - 1),
            st.integers(0, 2**32 - 1),
        ),
        max_size=40,
    )
)
def test_a_table_holds_the_latest_record_of_each_place(tmp_path, records):
    for old in journals(tmp_path):
        old.unlink()
    table = table_of(tmp_path, records)
    latest = {(record.file, record.offset): record for record in records}
    assert len(table) == len(latest)
    for (file, offset), record in latest.items():
        assert table.get(file, offset) == record.crc
        assert ((file, offset + 1) in latest) == (table.get(file, offset + 1) is not None)
    for file in {record.file for record in records}:
        expected = sorted(
            (record for record in latest.values() if record.file == file),
            key=lambda record: record.offset,
        )
        assert list(table.of_file(file)) == expected
    assert table.digest() == Table.read(tmp_path, lambda: None).digest()


def test_an_empty_table_is_asked_like_any_other(tmp_path):
    for table in (Table.empty(), Table.read(tmp_path, lambda: None), table_of(tmp_path, [])):
        assert (len(table), table.get(0, 0), list(table.of_file(0))) == (0, None, [])
        assert len(table.kept([table.check(lambda _: True, rank, 3) for rank in range(3)])) == 0


@pytest.mark.parametrize("world", [1, 2, 3, 8, 20])
def test_ranks_share_the_check_and_keep_the_same(tmp_path, world):
    records = [Record(number % 3, number, 1, number) for number in range(17)]
    table, seen = table_of(tmp_path, records), []

    def intact(record):
        seen.append(record)
        return record.crc % 5 != 0

    kept = table.kept([table.check(intact, rank, world) for rank in range(world)])
    assert sorted(seen, key=lambda record: record.crc) == records, "each is checked by one rank"
    for record in records:
        assert (kept.get(record.file, record.offset) is not None) == (record.crc % 5 != 0)


def test_a_table_of_a_share_of_the_files_holds_no_other(tmp_path):
    records = [Record(number % 5, number, 1, number) for number in range(50)]
    table = table_of(tmp_path, records, files=[1, 3])
    assert [record.file for file in range(5) for record in table.of_file(file)] == [1] * 10 + [
        3
    ] * 10


def test_200000_records_are_resumed_in_12_mib(tmp_path):
    count, steps = 200_000, []
    with Journal(tmp_path, 1, 0) as journal:
        for start in range(0, count, 1000):
            numbers = range(start, start + 1000)
            journal.append(Record(n % 7, (n * 7919 % count) << 22, 1 << 22, n) for n in numbers)
    tracemalloc.start()
    try:
        table = Table.read(tmp_path, lambda: steps.append(1))
        bits = table.check(lambda record: record.crc % 100 != 0, 0, 1)
        kept = table.kept([bits])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(table), len(kept)) == (count, count - count // 100)
    assert len(bits) <= count // 8 + 1
    assert len(steps) >= count // READ_RECORDS
    assert peak < 12 << 20, f"{peak / (1 << 20):.1f} MiB"
