"""JSON that nobody vouches for: bounded in size, depth and digits, and no key twice.

Python's own parser takes up to 30 times the length of a text (`[[],[],...`), recurses as deep as a
text is nested, and keeps the last of two values of one key where other readers keep the first.
"""

import json
import re

from reshard.containers import shown

MAX_BYTES = 32 << 20
MAX_VALUES = 1 << 20  # of 130 bytes at most; the headers and weight maps of releases have 10^5
_MAX_DEPTH = 64
_MAX_DIGITS = 500
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(text: bytes, *, most_bytes: int = MAX_BYTES, most_values: int = MAX_VALUES) -> object:
    """The value of a JSON text; ValueError where it is none, or larger than any that is meant.

    All texts in it can be encoded. Floats may be such as JSON does not know: inf and nan.
    """
    held = len(text) * (1 if text.isascii() else 4)  # as Python keeps it, at worst
    if held > most_bytes:
        raise ValueError(f"takes {held} bytes in memory, expected at most {most_bytes}")
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > most_values:
        raise ValueError(f"holds {values} values, expected at most {most_values}")
    try:
        value: object = json.loads(text.decode(), object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    _require_shallow(value)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError for half a pair
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object that has no key twice: readers differ in which of two they take."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key `{shown(key)}` appears twice")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    # Python 3.10 before 3.10.7 converts any number of digits, in quadratic time.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"has a number of {len(digits)} digits")
    return int(digits)


def _require_shallow(value: object) -> None:
    """Refuse what would exhaust the stack of a function that walks it by recursion."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += [child for child in item.values() if isinstance(child, dict | list)]
            elif isinstance(item, list):
                inner += [child for child in item if isinstance(child, dict | list)]
        if not inner:
            return
        level = inner
    raise ValueError("is nested too deeply")
