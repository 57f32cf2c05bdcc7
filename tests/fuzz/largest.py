"""Files that cost as much as their kind may: the widest that is read, or just too wide."""

import io
import struct
import zipfile

from tests.fuzz import texts
from tests.fuzz.cases import (
    read_gguf,
    read_index,
    read_job,
    read_json,
    read_safetensors,
    read_torch,
)
from tests.fuzz.harness import Files, Reader
from tests.fuzz.mutations import torch_item
from tests.fuzz.seeds import JOB

MIB = 1 << 20
GOOD_HEADER = b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'


def _json(unit: bytes, count: int) -> bytes:
    return b'{"a":[' + unit * count + b"0]}"


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _many_records() -> bytes:
    """A directory of nearly 16 MiB, of the smallest entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
    data = buffer.getvalue()
    start = data.find(b"PK\x01\x02")
    entry = bytearray(data[start : data.find(b"PK\x05\x06")])
    entry[28:30], name = struct.pack("<H", 5), b"%05x"
    entries = [bytes(entry[:46]) + name % number for number in range(16 * MIB // 51 - 2)]
    directory = b"".join(entries)
    wide = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *[len(entries)] * 2, len(directory), start)
    locator = struct.pack("<IQI", 0, start + len(directory), 1)
    last = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    return data[:start] + directory + b"PK\x06\x06" + wide + b"PK\x06\x07" + locator + last


def _pickle(unit: bytes, size: int = 31 * MIB) -> bytes:
    """Opcodes, and a text that makes the pickle as long as one may be."""
    filling = b"B" + struct.pack("<I", size) + bytes(size)
    return torch_item(b"\x80\x04" + filling + b"0" + unit * (2_999_000 // len(unit)) + b".")


def _gguf(fields: int, tail: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, fields) + tail


def _long_strings() -> bytes:
    count = 8 * MIB - 100
    return _gguf(
        1, struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)
    )


JSON = {
    "lists": lambda: _json(b"[],", (1 << 20) // 2),
    "dicts": lambda: _json(b"{},", (1 << 20) // 2),
    "dicts of one": lambda: _json(b'{"a":1},', (1 << 20) // 2 - 2),
    "texts": lambda: _json(b'"ab",', (1 << 20) - 2),
    "wide text": lambda: b'{"a":"' + b"a" * (8 * MIB - 100) + "\U0001f600".encode() + b'"}',
    "long text": lambda: b'{"a":"' + b"a" * (32 * MIB - 100) + b'"}',
    "too long": lambda: b'{"a":"' + b"a" * (40 * MIB) + b'"}',
}
TORCH = {
    "records": _many_records,
    "tuples": lambda: _pickle(b")\x85"),
    "dicts": lambda: _pickle(b"}"),
    "lists": lambda: _pickle(b"]"),
    "texts": lambda: _pickle(b"\x8c\x02ab"),
    "numbers": lambda: _pickle(b"J\xff\xff\xff\x7f"),
    "dicts of one": lambda: _pickle(b"}K\0Ns"),
    "memo": lambda: _pickle(b"N\x94"),
    "named": lambda: _pickle(b"ccollections\nOrderedDict\n", MIB),
}
CONFIGS = (("read", (1 << 16) - 2), ("too many", 1 << 16))
BOMBS = {
    "json": {name: lambda count=count: _json(b'{"a":1},', count) for name, count in CONFIGS},
    "index": JSON,
    "safetensors": {name: lambda made=made: _header(made()) for name, made in JSON.items()},
    "torchfile": TORCH,
    "gguf": {"strings": _long_strings},
    "yaml": {
        "tokens": lambda: b"src: [" + b"1," * 8000 + b"1]",
        "references": lambda: (
            b"a: {x: ["
            + b"1," * 7000
            + b"1]}\n"
            + b"".join(b"b%d: {x: ${%s}, y: ${%s}}\n" % (n, p, p) for n, p in CHAIN)
        ),
        "comment": lambda: b"#" + b"a" * (MIB - 1),
        "lines": lambda: b"\n" * MIB,
        "quoted": lambda: b"a: '" + b"x" * (MIB - 10) + b"'",
        "flow": lambda: b"a: " + b"[" * (MIB - 10),
        "keys": lambda: b"".join(b"k%d: 1\n" % number for number in range(100_000))[:MIB],
    },
}
CHAIN = [(0, b"a"), (1, b"b0"), (2, b"b1"), (3, b"b2")]
NAMES = {
    "json": "file.json",
    "index": "x.index.json",
    "safetensors": "file.safetensors",
    "torchfile": "file.pth",
}
NAMES |= {"gguf": "file.gguf", "yaml": "job.yaml"}
GOOD = {
    "json": (texts.INDEX, read_json),
    "index": (texts.INDEX, read_index),
    "safetensors": (_header(GOOD_HEADER), read_safetensors),
    "torchfile": (torch_item(b"\x80\x02}."), read_torch),
    "gguf": (_gguf(0, b"") + bytes(8), read_gguf),
    "yaml": (JOB, read_job),
}
READERS = {
    reader: Reader(lambda folder, name=NAMES[reader], data=data: {name: data}, ("",), read)
    for reader, (data, read) in GOOD.items()
}


def case(reader: str, files: Files, seed: int, number: int) -> tuple[str, str, bytes]:
    """The bomb of a number."""
    name = list(BOMBS[reader])[number]
    return NAMES[reader], name, BOMBS[reader][name]()
