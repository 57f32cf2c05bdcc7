"""Checksums against zlib on the real files, and every way in which a file can be incomplete."""

import json
import math
import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard import commit, containers, formats, manifest
from reshard.commit import Extent, SourcePlaces, TargetPlaces, finish_file, lay_out
from reshard.errors import StorageError
from reshard.formats import common
from reshard.formats.options import Options
from reshard.geometry import whole
from reshard.journal import Record
from reshard.layout import Layout, Slot
from reshard.packing import packed
from reshard.placement import Cut, Placement, uncut
from reshard.storage import Files
from tests.layouts import config_of, layout_of

LAYOUTS = {
    "pth": ("meta", {"tp": 3}),
    "pth with constants": ("meta", {"tp": 3, "embedding_dim": 1}),
    "safetensors": ("hf", {"max_shard_bytes": 40_000}),
    "a file per tensor": ("nanotron", {"tp": 3, "pp": 2}),
    "padded": ("nanotron", {"tp": 3, "pp": 2, "vocab_multiple": 64}),
    "dcp": ("fsdp", {"dp": 3}),
    "dcp with empty files": ("fsdp", {"dp": 256}),
    "dcp with rows that cut heads": ("titan", {"dp": 5}),
    "dcp on two axes": ("titan", {"dp": 2, "tp": 3}),
}


def padded(container: str) -> Layout:
    """Two stored tensors with padding at their end, one with nothing else, and an empty one."""
    slots = (
        Slot("p", Placement((5, 3), Cut(0, 5, 4, 3), (4, 3)), "f{shard}", "p", torch.bfloat16),
        Slot("q", Placement((2,), uncut(2, 3), (700_000,)), "f{shard}", "q", torch.float32),
        Slot("r", Placement((2, 2), Cut(0, 2, 1, 3)), "f{shard}", "r", torch.float32),
    )
    return Layout("x", container, 3, slots)


def layouts() -> dict[str, Layout]:
    found = {
        label: layout_of(config_of("b"), name, **chosen)
        for label, (name, chosen) in LAYOUTS.items()
    }
    return found | {f"{name} with padding": padded(name) for name in ("torchfile", "safetensors")}


@pytest.fixture(params=sorted(layouts()))
def written(request, tmp_path) -> "Written":
    return Written(layouts()[request.param], tmp_path)


class Written:
    """A target whose every piece is written and journalled, a few elements at a time."""

    def __init__(self, layout: Layout, root: Path, piece: int = 5_000) -> None:
        self.layout, self.root, self.places = layout, root, TargetPlaces(layout)
        lay_out(root, layout, self.places, layout.files)
        self.records: dict[str, list[Record]] = {file: [] for file in layout.files}
        files = Files(root, os.O_WRONLY)
        for name, slots in layout.places.items():
            for stored in layout.tensors_on(name, whole(slots[0].placement.shape)):
                start, _ = self.places.locate(stored)
                size = stored.dtype.itemsize
                runs = packed(stored.slot.placement, stored.shard, stored.region).runs
                for first, count in runs:
                    for part in range(first, first + count, piece):
                        length = min(piece, first + count - part) * size
                        data = os.urandom(length)
                        files.write(stored.file, start + part * size, [memoryview(data)])
                        record = Record(0, start + part * size, length, zlib.crc32(data))
                        self.records[stored.file].append(record)
        files.close()

    def finish(self, file: str, records: list[Record] | None = None) -> list[Extent]:
        own = self.records[file] if records is None else records
        skeleton = self.places.skeleton(file)
        return finish_file(self.root, self.layout, file, skeleton, own[::-1])


def test_checksums_and_extents_are_those_of_the_real_file(written):
    for file in written.layout.files:
        extents = written.finish(file)
        data = (written.root / file).read_bytes()
        position = 0
        for extent in extents:
            assert extent.start == position
            position += extent.length
            assert extent.crc == zlib.crc32(data[extent.start : position]), extent
        assert position == len(data)
        record = commit.file_record(extents)
        assert (record["size"], record["crc32"]) == (len(data), zlib.crc32(data))
        keys = {extent.what for extent in extents} - {"header"}
        contents = [content for content in written.layout.contents(file) if content.nbytes]
        assert keys == {content.key for content in contents}
    assert written.places.size() == sum(
        (written.root / file).stat().st_size for file in written.layout.files
    )


def test_a_finished_file_can_be_finished_again(written):
    file = written.layout.files[0]
    extents = written.finish(file)
    data = (written.root / file).read_bytes()
    assert written.finish(file) == extents
    assert (written.root / file).read_bytes() == data


def test_readers_find_the_constants_and_zeros_in_the_padding(written):
    for file in written.layout.files:
        written.finish(file)
        data = (written.root / file).read_bytes()
        offsets = written.places.skeleton(file).offsets
        for content in written.layout.contents(file):
            end = offsets[content.key] + content.nbytes
            padding = content.padding * content.dtype.itemsize
            constants = [c for c in written.layout.constants if c.content.key == content.key]
            if constants:
                assert data[offsets[content.key] : end] in [item.data for item in constants]
            else:
                assert data[end - padding : end] == bytes(padding)


@pytest.mark.parametrize("container", ["torchfile", "safetensors"])
def test_checksum_fields_of_the_container_are_filled(tmp_path, container):
    written = Written(padded(container), tmp_path)
    for file in written.layout.files:
        extents = {extent.what: extent for extent in written.finish(file)}
        data = (tmp_path / file).read_bytes()
        for key, places in written.places.skeleton(file).checksums.items():
            expected = extents[key].crc if key in extents else 0
            assert [int.from_bytes(data[at : at + 4], "little") for at in places] == [
                expected
            ] * len(places)
    assert (container == "torchfile") == bool(written.places.skeleton("f0").checksums)


def test_pth_files_are_loaded_with_their_checksums_right(tmp_path):
    import zipfile

    written = Written(layouts()["pth"], tmp_path)
    for file in written.layout.files:
        written.finish(file)
        assert zipfile.ZipFile(tmp_path / file).testzip() is None
        loaded = torch.load(tmp_path / file, weights_only=True)
        assert set(loaded) == {content.key for content in written.layout.contents(file)}


def test_a_missing_run_is_refused(written):
    for file in written.layout.files:
        for gone in range(len(written.records[file]))[:12]:
            rest = written.records[file][:gone] + written.records[file][gone + 1 :]
            with pytest.raises(StorageError, match=r"no rank has written bytes \d+ to \d+ of"):
                written.finish(file, rest)


def test_a_doubled_or_overlapping_run_is_refused(written):
    for file in written.layout.files:
        for record in written.records[file][:6]:
            for shift, length in ((0, record.length), (0, 1), (1, record.length)):
                extra = Record(0, record.offset + shift, length, 0)
                with pytest.raises(StorageError, match="is not published"):
                    written.finish(file, [*written.records[file], extra])


def test_a_run_that_is_too_long_or_lies_in_the_padding_is_refused(written):
    for file in written.layout.files:
        last = max(written.records[file], key=lambda record: record.offset, default=None)
        if last is None:
            continue
        rest = [record for record in written.records[file] if record is not last]
        longer = Record(0, last.offset, last.length + 1, last.crc)
        with pytest.raises(StorageError, match="is not published"):
            written.finish(file, [*rest, longer])


def test_a_run_outside_all_tensors_is_refused(written):
    for file in written.layout.files:
        size = (written.root / file).stat().st_size
        for offset in (0, size):
            stray = Record(0, offset, 1, 0)
            with pytest.raises(StorageError):
                written.finish(file, [*written.records[file], stray])


def test_laying_out_writes_the_bytes_that_it_reports(tmp_path):
    layout = layouts()["pth with constants"]
    places = TargetPlaces(layout)
    written = lay_out(tmp_path, layout, places, layout.files)
    tensors = sum(
        content.nbytes
        for file in layout.files
        for content in layout.contents(file)
        if content.key != "rope.freqs"
    )
    assert written == places.size() - tensors
    entries = containers.index(layout.container, tmp_path, layout.files[0]).entries
    assert entries["rope.freqs"].shape == (3,)
    assert places.skeleton(layout.files[0]).offsets["norm.weight"] == entries["norm.weight"].offset


@given(st.integers(0, 3 << 20))
def test_the_checksum_of_zeros(length):
    assert commit.zero_crc(length) == zlib.crc32(bytes(length))


def test_extents_with_a_gap_or_an_overlap_are_refused():
    commit.file_record([Extent(0, 4, "a", 0), Extent(4, 4, "b", 0)])
    for start in (3, 5):
        with pytest.raises(StorageError, match="do not tile a file at byte 4"):
            commit.file_record([Extent(0, 4, "a", 0), Extent(start, 4, "b", 0)])
    with pytest.raises(StorageError, match="at byte 0"):
        commit.file_record([Extent(1, 4, "a", 0)])


@pytest.mark.parametrize("pieces", [[], [b""], [b"a"], [b"abc", b"", b"de"]])
def test_a_small_file_is_recorded_like_a_large_one(pieces, tmp_path):
    record = commit.write_pieces(tmp_path / "folder" / "file", pieces, "text", fsync=True)
    data = b"".join(pieces)
    assert (tmp_path / "folder" / "file").read_bytes() == data
    assert (record["size"], record["crc32"]) == (len(data), zlib.crc32(data))
    assert sum(length for _, length, *_ in record["extents"]) == len(data)


def test_the_manifest_proves_itself():
    body = {"job": "x", "files": {"b": 1, "a": 2}}
    record = json.loads(manifest.written(body))
    crc = record.pop("crc32")
    assert record == {**body, "version": manifest.VERSION}
    assert crc == zlib.crc32(manifest.dump(record))
    assert zlib.crc32(manifest.dump({**record, "job": "y"})) != crc
    assert manifest.written(dict(reversed(body.items()))) == manifest.written(body)


def test_a_manifest_has_a_line_for_each_file():
    """As plain JSON with two blanks, but for what there may be a million of."""
    record = commit.file_record([Extent(0, 4, 'a "b"', 7), Extent(4, 5, "ü", 8)])
    body = {"notes": ["a", {"b": "c\n"}], "files": {"b": record, "a": record}, "none": {}}
    text = manifest.written(body).decode()
    read = json.loads(text)
    assert read["files"]["a"]["extents"] == [[0, 4, 'a "b"', 7], [4, 5, "ü", 8]]
    lines = text.splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith('    "a": '))
    assert lines[place - 1] == '  "files": {'
    assert lines[place].endswith('[[0,4,"a \\"b\\"",7],[4,5,"\\u00fc",8]],"size":9},')
    assert lines[place + 1].startswith('    "b": ')
    without = {key: value for key, value in read.items() if key != "files"}
    assert manifest.dump(without) == common.dump_json(without)
    assert manifest.dump({"files": {}}) == common.dump_json({"files": {}})


def test_a_manifest_of_the_largest_model_can_be_read():
    """405B in 512 parts: 2,275 extents each, whose names are as long as these."""
    name = "model.layers.125.post_attention_layernorm.weight"
    extent = [3_000_000_000, 1_000_000_000, name, 4_000_000_000]
    length = len(manifest.dump({"files": {"": [extent] * 11}}))
    length -= len(manifest.dump({"files": {"": [extent]}}))
    most_bytes, most_values = common.MAX_JSON[common.MANIFEST]
    assert length // 10 * 512 * 2276 <= most_bytes
    assert most_values >= 5 * 512 * 2276


def test_places_of_a_layout_are_those_that_readers_find(written):
    layout, skeleton = written.layout, written.places.skeleton
    for file in layout.files:
        written.finish(file)
    if layout.container == "dcpfile":
        pieces = formats.named("fsdp").closing_files(layout, Options(wrapper="none"), skeleton)
        for name, content in pieces.items():
            commit.write_pieces(written.root / name, content, "header", fsync=False)
    found = SourcePlaces(written.root, layout.container)
    count = 0
    for name, slots in layout.places.items():
        for stored in layout.tensors_on(name, whole(slots[0].placement.shape)):
            offset, strides = found.locate(stored)
            expected, row_major = written.places.locate(stored)
            assert offset == expected
            sized = [dim for dim, size in enumerate(stored.shape) if size > 1]
            assert [strides[dim] for dim in sized] == [row_major[dim] for dim in sized]
            count += 1
    assert count >= len(layout.slots)
    for file in layout.files:
        entries = containers.index(layout.container, written.root, file).entries
        own = {content.key for content in layout.contents(file)}
        assert set(entries) == own
        for content in layout.contents(file):
            assert (entries[content.key].dtype, entries[content.key].shape) == (
                content.dtype,
                content.shape,
            )
            if math.prod(content.shape):
                assert entries[content.key].offset == skeleton(file).offsets[content.key]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.binary(max_size=2000))
def test_a_file_written_in_pieces_is_recorded_as_one(tmp_path_factory, pieces, before):
    path = tmp_path_factory.getbasetemp() / "pieces"
    path.write_bytes(before)
    record = commit.write_pieces(path, iter(pieces), "header", fsync=True)
    data = b"".join(pieces)
    assert path.read_bytes() == data
    assert (record["size"], record["crc32"]) == (len(data), zlib.crc32(data))
    assert record["extents"] == ([[0, len(data), "header", zlib.crc32(data)]] if data else [])


def test_pieces_are_written_one_by_one(tmp_path):
    """None is held back: a list of thousands of tensors is never in memory as a whole."""

    def pieces():
        for number in range(5):
            assert (tmp_path / "list").stat().st_size == 10 * number
            yield bytes(10)

    assert commit.write_pieces(tmp_path / "list", pieces(), "header", fsync=False)["size"] == 50
