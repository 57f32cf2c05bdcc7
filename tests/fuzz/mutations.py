"""Damage to files, random or with a plan: each from a generator of random numbers alone."""

import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Damage = Callable[[Random, bytes], bytes]

NUMBERS = [
    *(0, 1, 2, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
]
TEXTS = [
    *("", ".", "..", "../x", "/etc/passwd", "a/../../b", "a//b", "x\0y", "a\nb", "\x1b[2J"),
    *("é" * 300, "a" * 5000, "\u202e", "__metadata__", "dtype", "lm_head.weight", "9" * 4400),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, -0.0),
    *(1e308, 1e-320, float("inf"), float("nan"), [], {}, [[]], [None], {"": {}}, [1] * 9),
    *TEXTS,
]


def anywhere(rng: Random, data: bytes) -> int:
    """A place in the data: half of the time near the begin or the end, where headers are."""
    if not data:
        return 0
    place = rng.randrange(len(data))
    near = rng.randrange(min(len(data), 64))
    return rng.choice((place, place, near, len(data) - 1 - near))


def flip(rng: Random, data: bytes) -> bytes:
    """Up to four bytes are others."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[anywhere(rng, data)] = rng.randrange(256)
    return bytes(changed)


def cut(rng: Random, data: bytes) -> bytes:
    """The file ends, begins, or goes on too early."""
    first, second = sorted((anywhere(rng, data), anywhere(rng, data)))
    return rng.choice((data[:first], data[second:], data[:first] + data[second:]))


def repeat(rng: Random, data: bytes) -> bytes:
    """A piece stands twice, or many times."""
    first, size = anywhere(rng, data), rng.choice((1, 2, 4, 8, 16, 64, 256))
    times = rng.choice((1, 1, 2, 1000))
    return data[:first] + data[first : first + size] * times + data[first:]


def number(rng: Random, data: bytes) -> bytes:
    """A number of some width is another."""
    place, form = anywhere(rng, data), rng.choice("BHIIQQ")
    size = struct.calcsize(form)
    value = rng.choice(NUMBERS) % (1 << 8 * size)
    return data[:place] + struct.pack("<" + form, value) + data[place + size :]


def insert(rng: Random, data: bytes) -> bytes:
    """Some bytes too many."""
    place = anywhere(rng, data)
    extra = rng.choice((rng.randbytes(rng.randint(1, 9)), bytes(8), b"\xff" * 8, b"[" * 3000))
    return data[:place] + extra + data[place:]


def splice(rng: Random, data: bytes, other: bytes) -> bytes:
    """The begin of one file and the end of another."""
    return data[: anywhere(rng, data)] + other[anywhere(rng, other) :]


GENERIC: Sequence[Damage] = (flip, flip, cut, repeat, number, number, insert)


# --- JSON, and the header of safetensors


def edit(rng: Random, value: Any) -> Any:
    """The same JSON with one value or key somewhere in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            text = rng.choice(TEXTS)
            return {text if name == key else name: item for name, item in value.items()}
        if kind < 0.3:
            return value | {rng.choice(TEXTS): rng.choice([*VALUES, value[key]])}
        return value | {key: edit(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], edit(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, -value, value))
    return rng.choice(VALUES)


def edit_json(rng: Random, data: bytes) -> bytes:
    """One to three values of a JSON text are others; or the text is a bomb."""
    if rng.random() < 0.1:
        return json_bomb(rng, data)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        value = edit(rng, value)
    return json.dumps(value).encode()


def json_bomb(rng: Random, data: bytes) -> bytes:
    """Deep, wide, endless or ambiguous."""
    deep = rng.choice((70, 900, 5_000, 100_000))
    bomb: bytes = rng.choice(
        (
            b'{"a":' * deep + b"1" + b"}" * deep,
            b"[" * deep + b"]" * deep,
            b'{"a":[' + b"[]," * 50_000 + b"[]]}",
            b'{"a":' + b"9" * 20_000 + b"}",
            b'{"a":1e' + b"9" * 20_000 + b"}",
            b'{"a":"' + rb"\ud800" + b'"}',
            data.replace(b"{", b'{"a":1,"a":2,', 1),
            data.replace(b"{", b'{"a":' + b"[" * 900 + b"]" * 900 + b",", 1),
        )
    )
    return bomb


def edit_safetensors(rng: Random, data: bytes) -> bytes:
    """The header says something else, and its length is right most of the time."""
    size = int.from_bytes(data[:8], "little")
    header = edit_json(rng, data[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return length.to_bytes(8, "little") + header + data[8 + size :]


# --- pickles, alone and in the zip that torch puts around them


def _whole(value: int) -> bytes:
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


HOSTILE: Sequence[bytes] = (
    *(b"cos\nsystem\nX\x02\0\0\0id\x85R0", b"\x8c\x02os\x8c\x06system\x93", b"cbuiltins\neval\n"),
    *(
        b"(i__main__\nx\n",
        b"\x82\x01",
        b"\x84\xff\xff\xff\xff",
        b"Pid\n",
        b"Q",
        b"R",
        b"b",
        b"\x81",
    ),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8b\0\x01\0\0" + b"\x7f" * 256, b"\x95" + b"\xff" * 8),
    *(b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x96"),
    *(b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"q\xff", b"h\xff", b"\x94", b"(" * 200),
    *(b")" + b"\x85" * 5000, b"]" * 5000, b"}" * 5000, b")" + b"q\0h\0\x86" * 40 + b"0"),
    *(b"}" + b")" + b"q\0h\0\x86" * 22 + b"Ns0", b"\x80\x05", b"I" + b"9" * 5000 + b"\n", b"\x8f"),
    *(_whole(2**62), _whole(-1), _text("../../x"), _text("a\nb"), b"G\x7f\xf8" + bytes(6), b"."),
)


def edit_pickle(rng: Random, data: bytes) -> bytes:
    """A number or a text of the pickle is another, or an opcode stands where none should."""
    steps = list(pickletools.genops(data))
    for _ in range(rng.randint(1, 2)):
        number = rng.randrange(1, len(steps) - 1)
        (_, argument, start), stop = steps[number], steps[number + 1][2]
        if isinstance(argument, int) and rng.random() < 0.8 and b"PUT" not in data[start:start]:
            made = _whole(rng.choice([*NUMBERS, argument + 1, max(argument - 1, 0), 2**100]))
        elif isinstance(argument, str) and rng.random() < 0.7:
            made = _text(rng.choice(TEXTS))
        else:
            kept = rng.choice((b"", data[start or 0 : stop], data[start or 0 : stop]))
            made = kept + rng.choice(HOSTILE)
        return data[:start] + made + data[stop or len(data) :]
    return data


def edit_torch(rng: Random, data: bytes) -> bytes:
    """The pickle inside is damaged and its checksum is right; or the directory of the zip is."""
    kind = rng.random()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if kind < 0.6:
        records[pickles[0]] = rng.choice((edit_pickle, edit_pickle, flip))(rng, records[pickles[0]])
        return zipped(rng, records)
    return edit_zip(rng, data)


def zipped(rng: Random, records: dict[str, bytes]) -> bytes:
    """A zip of records, of which some are compressed at times."""
    buffer = io.BytesIO()
    bomb = rng.random() < 0.05
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in records.items():
            method = zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED
            archive.writestr(name, content + bytes(1_000_000 * bomb), method)
    return buffer.getvalue()


# Offsets and widths of the fields of an entry of a zip's directory, and of its last record.
ENTRY = ((4, "H"), (8, "H"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (28, "H"), (30, "H"))
ENTRY += ((32, "H"), (42, "I"), (42, "I"))
LAST = ((4, "H"), (8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "H"))


def edit_zip(rng: Random, data: bytes) -> bytes:
    """A field of the directory says something else, or the directory is another."""
    start, last = data.find(b"PK\x01\x02"), data.rfind(b"PK\x05\x06")
    if start < 0 or last < 0 or rng.random() < 0.2:
        wide = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *(rng.choice(NUMBERS) for _ in "abcd"))
        locator = struct.pack("<IQI", 0, rng.choice((last, *NUMBERS)), 1)
        return data[:last] + b"PK\x06\x06" + wide + b"PK\x06\x07" + locator + data[last:]
    entries = [place for place in range(start, last) if data.startswith(b"PK\x01\x02", place)]
    if rng.random() < 0.2:
        first, second = rng.choice(entries), rng.choice([*entries, last])
        return data[:start] + data[first:second] + data[start:]
    base, fields = rng.choice([(last, LAST), *((place, ENTRY) for place in entries)])
    changed = bytearray(data)
    for offset, form in rng.sample(fields, rng.randint(1, 2)):
        value = rng.choice([*NUMBERS, *entries, start]) % (1 << 8 * struct.calcsize(form))
        struct.pack_into("<" + form, changed, base + offset, value)
    return bytes(changed)


def torch_item(pickled: bytes) -> bytes:
    """A zip with a pickle alone."""
    return zipped(Random(1), {"m/data.pkl": pickled})


def trap(path: str) -> bytes:
    """A pickle that makes a file when it is run as Python does."""

    class Trap:
        def __reduce__(self) -> Any:
            return open, (path, "w")

    return pickle.dumps({"x": Trap()}, 2)


# --- GGUF


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def edit_gguf(rng: Random, data: bytes) -> bytes:
    """The counts say something else, or there is one key more, of a value that is wrong."""
    keys = struct.unpack_from("<Q", data, 16)[0]
    if rng.random() < 0.3:
        place = rng.choice((4, 8, 16))
        form = "I" if place == 4 else "Q"
        made = struct.pack("<" + form, rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form)))
        return data[:place] + made + data[place + len(made) :]
    name = rng.choice((b"k", b"general.alignment", b"general.architecture", b"llama.block_count"))
    name = rng.choice((name, name, b"a\nb", b"\xff\xfe", b"x" * 70_000))
    count, kind = rng.choice(NUMBERS), rng.randrange(14)
    value = rng.choice(
        (
            struct.pack("<I", kind) + rng.randbytes(8),
            struct.pack("<I", 4) + struct.pack("<I", count % 2**32),
            struct.pack("<I", 8) + struct.pack("<Q", count) + b"abc",
            struct.pack("<I", 8) + _string(b"a\x1b[2J\n" * rng.choice((1, 1000))),
            struct.pack("<IIQ", 9, kind, count) + rng.randbytes(8),
            struct.pack("<I", 9) * 500 + struct.pack("<Q", 1) * 500,
            struct.pack("<IIQ", 9, 8, 3) + _string(b"a") * 3,
        )
    )
    first = _string(name) + value
    old = data[24:]
    if rng.random() < 0.3 and name in old:
        place = old.find(_string(name))
        old = old[:place] + first + old[place + len(_string(name)) + 8 :] if place >= 0 else old
        return data[:24] + old
    return data[:16] + struct.pack("<Q", keys + 1) + first + old
