"""An interpreter of pickles that builds plain values and does nothing else.

A pickle can run code and exhaust memory, and Python's own unpickler allocates by numbers that it
reads and hashes whatever it is given. `Machine` runs the opcodes that data needs (protocols 2 to
5); a name in a pickle becomes a `Global`, which stands for nothing but itself, and what a call
would give is said by `reduced()` of a subclass. Nothing here could look up or call a name.

Time and memory are bounded by the length of the pickle: an opcode takes a constant time, a length
is checked against what is left, and no value is traversed. Containers and texts, which opcodes of
few bytes make, may take some times the length beyond a constant.
"""

import pickletools
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

from reshard.containers import shown

_MAX_MARKS = 100
_MAX_LONG_BYTES = 255
# What a container is taken to cost, with an item or two; a `.metadata` needs 10 bytes per byte.
_LIST_BYTES, _DICT_BYTES, _TUPLE_BYTES = 120, 200, 64
_FREE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle asks for, as `module name`."""

    name: str


class Built:
    """A stand-in for an object: the name of its class, and its state as it was pickled."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: object = None


class Machine:
    """Runs one pickle; a subclass says which names it may ask for and what becomes of them.

    Every hook raises ValueError for what it does not know. Arguments come from the pickle: any
    value, however wrong, nested or cyclic.
    """

    subject = "data"  # what the pickle should hold
    advice = "re-save it"
    names: Collection[str] = ()  # the permitted names, as `module name`
    bytes_per_byte = 16  # what containers and texts may take for each byte of the pickle

    def __init__(self, pickled: bytes) -> None:
        self._data = pickled
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: list[object] = []
        self._far: dict[int, object] = {}  # of memo indices that leave a gap
        self._budget = _FREE_BYTES + self.bytes_per_byte * len(pickled)

    def run(self, most: int | None = None) -> object:
        """The pickled value; `most` is the number of opcodes that it may take, where given."""
        data, steps, at = self._data, _STEPS, 0
        limit = len(data) + 1 if most is None else most
        try:
            for _ in range(limit):
                code = data[at]
                if code == _STOP:
                    return self._stack.pop()
                at = steps[code](self, at + 1)
        except (IndexError, KeyError, struct.error) as error:
            raise ValueError("its pickle is damaged") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"its pickle is damaged: {error}") from error
        raise ValueError(f"its pickle has more than {limit} opcodes")

    def reduced(self, function: object, arguments: object) -> object:
        """The stand-in for what `function(*arguments)` would be."""
        raise self._foreign()

    def created(self, kind: object, arguments: object) -> object:
        """The stand-in for a new object of the class `kind`, before its state is set."""
        if isinstance(kind, Global) and isinstance(arguments, tuple) and not arguments:
            self._spend(_TUPLE_BYTES)
            return Built(kind.name)
        raise self._foreign()

    def built(self, made: object, state: object) -> None:
        """Give `made` its state."""
        if not isinstance(made, Built) or made.state is not None:
            raise ValueError("its pickle is damaged: it sets the state of what has none")
        made.state = state

    def persistent(self, identity: object) -> object:
        """The stand-in for what lies outside the pickle under `identity`."""
        raise ValueError(f"its pickle names something outside, which {self.subject} does not need")

    def empty_dict(self) -> dict[object, object]:
        """A new dict: its memory is accounted for."""
        self._spend(_DICT_BYTES)
        return {}

    def _spend(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise ValueError(
                f"its pickle of {len(self._data)} bytes makes more lists, dicts, tuples and texts "
                f"than {self.subject} needs"
            )

    def _foreign(self) -> ValueError:
        return ValueError(
            f"its pickle builds {self.subject} in a way that this program does not know; "
            "nothing was executed"
        )

    # What follows are the opcodes: each takes the place after its own byte and returns the next's.

    def _unknown(self, at: int) -> int:
        code = self._data[at - 1]
        name = _NAMES.get(code)
        if name is None:
            raise ValueError(f"its pickle is damaged: no opcode 0x{code:02x}")
        raise ValueError(
            f"its pickle uses the opcode {name}, which {self.subject} does not need; {self.advice}"
        )

    def _empty_dict(self, at: int) -> int:
        self._stack.append(self.empty_dict())
        return at

    def _empty_list(self, at: int) -> int:
        self._spend(_LIST_BYTES)
        self._stack.append([])
        return at

    def _mark(self, at: int) -> int:
        if len(self._marks) == _MAX_MARKS:
            raise ValueError(f"its pickle is nested more than {_MAX_MARKS} deep")
        self._marks.append(self._stack)
        self._stack = []
        return at

    def _since_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, at: int) -> int:
        self._spend(_TUPLE_BYTES)
        items = tuple(self._since_mark())
        self._stack.append(items)
        return at

    def _append(self, at: int) -> int:
        item = self._stack.pop()
        return self._extend([item], at)

    def _appends(self, at: int) -> int:
        return self._extend(self._since_mark(), at)

    def _extend(self, items: list[object], at: int) -> int:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise ValueError("its pickle is damaged: it appends to what is no list")
        target.extend(items)
        return at

    def _set_item(self, at: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        return self._update([key, value], at)

    def _set_items(self, at: int) -> int:
        return self._update(self._since_mark(), at)

    def _update(self, items: list[object], at: int) -> int:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its pickle is damaged: it sets items of what is no dict")
        pairs = iter(items)
        for key in pairs:
            # To hash a nested tuple can take for ever; ints of any length can be made to collide.
            if not isinstance(key, (str, Built)) and not (
                isinstance(key, int) and key.bit_length() < 32
            ):
                raise ValueError(f"a key of its dicts is a `{type(key).__name__}`, expected text")
            target[key] = next(pairs)
        return at

    def _global(self, at: int) -> int:
        module_stop = self._data.find(b"\n", at)
        name_stop = self._data.find(b"\n", module_stop + 1)
        if module_stop < 0 or name_stop < 0:
            raise IndexError
        self._name(str(self._data[at:name_stop], "utf-8").replace("\n", " "))
        return name_stop + 1

    def _stack_global(self, at: int) -> int:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("its pickle is damaged: it asks for a name that is no text")
        self._name(f"{module} {name}")
        return at

    def _name(self, name: str) -> None:
        if name not in self.names:
            asked = shown(name.replace(" ", "."))
            raise ValueError(
                f"its pickle asks for `{asked}`, which is not allowed; nothing was executed"
            )
        self._stack.append(Global(name))

    def _reduce(self, at: int) -> int:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self.reduced(function, arguments))
        return at

    def _new(self, at: int) -> int:
        arguments, kind = self._stack.pop(), self._stack.pop()
        self._stack.append(self.created(kind, arguments))
        return at

    def _build(self, at: int) -> int:
        state = self._stack.pop()
        self.built(self._stack[-1], state)
        return at

    def _persistent(self, at: int) -> int:
        self._stack.append(self.persistent(self._stack.pop()))
        return at

    def _memoize(self, at: int) -> int:
        self._memo.append(self._stack[-1])
        return at

    def _slice(self, at: int, width: int) -> tuple[bytes, int]:
        """The bytes whose length stands in the `width` bytes before them, and where they end."""
        start = at + width
        stop = start + int.from_bytes(self._data[at:start], "little")
        if stop > len(self._data):
            raise IndexError
        return self._data[start:stop], stop

    def _long(self, at: int, width: int) -> int:
        digits, stop = self._slice(at, width)
        if len(digits) > _MAX_LONG_BYTES:
            raise ValueError(f"its pickle has a number of {len(digits)} bytes")
        self._stack.append(int.from_bytes(digits, "little", signed=True))
        return stop

    def _text(self, at: int, width: int) -> int:
        encoded, stop = self._slice(at, width)
        text = str(encoded, "utf-8", "surrogatepass")
        self._spend(sys.getsizeof(text))
        self._stack.append(text)
        return stop

    def _bytes(self, at: int, width: int) -> int:
        content, stop = self._slice(at, width)
        self._spend(sys.getsizeof(content))
        self._stack.append(content)
        return stop


_Step = Callable[[Machine, int], int]


def _pushed(value: object) -> _Step:
    def step(machine: Machine, at: int) -> int:
        machine._stack.append(value)
        return at

    return step


def _number(layout: str) -> _Step:
    form = struct.Struct(layout)

    def step(machine: Machine, at: int) -> int:
        machine._stack.append(form.unpack_from(machine._data, at)[0])
        return at + form.size

    return step


def _sized(take: Callable[[Machine, int, int], int], width: int) -> _Step:
    def step(machine: Machine, at: int) -> int:
        return take(machine, at, width)

    return step


def _put(layout: str) -> _Step:
    form = struct.Struct(layout)

    def step(machine: Machine, at: int) -> int:
        index: int = form.unpack_from(machine._data, at)[0]
        memo, value = machine._memo, machine._stack[-1]
        if index == len(memo):
            memo.append(value)
        elif index < len(memo):
            memo[index] = value
        else:
            machine._far[index] = value
        return at + form.size

    return step


def _get(layout: str) -> _Step:
    form = struct.Struct(layout)

    def step(machine: Machine, at: int) -> int:
        index: int = form.unpack_from(machine._data, at)[0]
        memo = machine._memo
        machine._stack.append(memo[index] if index < len(memo) else machine._far[index])
        return at + form.size

    return step


def _skipped(width: int) -> _Step:
    return lambda _, at: at + width


def _packed(count: int) -> _Step:
    def step(machine: Machine, at: int) -> int:
        stack = machine._stack
        if len(stack) < count:
            raise IndexError
        machine._spend(_TUPLE_BYTES)
        stack[-count:] = [tuple(stack[-count:])]
        return at

    return step


def _table() -> list[_Step]:
    named: dict[str, _Step] = {
        **{"PROTO": _skipped(1), "FRAME": _skipped(8)},
        **{"NONE": _pushed(None), "NEWTRUE": _pushed(True), "NEWFALSE": _pushed(False)},
        **{"BININT": _number("<i"), "BININT1": _number("<B"), "BININT2": _number("<H")},
        **{"BINFLOAT": _number(">d"), "EMPTY_TUPLE": _pushed(()), "TUPLE": Machine._tuple},
        **{f"TUPLE{count}": _packed(count) for count in (1, 2, 3)},
        **{"EMPTY_DICT": Machine._empty_dict, "EMPTY_LIST": Machine._empty_list},
        **{"MARK": Machine._mark, "APPEND": Machine._append, "APPENDS": Machine._appends},
        **{"SETITEM": Machine._set_item, "SETITEMS": Machine._set_items},
        **{"GLOBAL": Machine._global, "STACK_GLOBAL": Machine._stack_global},
        **{"REDUCE": Machine._reduce, "NEWOBJ": Machine._new, "BUILD": Machine._build},
        **{"BINPERSID": Machine._persistent, "MEMOIZE": Machine._memoize},
        **{"BINPUT": _put("<B"), "LONG_BINPUT": _put("<I")},
        **{"BINGET": _get("<B"), "LONG_BINGET": _get("<I")},
        **{"LONG1": _sized(Machine._long, 1), "LONG4": _sized(Machine._long, 4)},
        "SHORT_BINUNICODE": _sized(Machine._text, 1),
        **{"BINUNICODE": _sized(Machine._text, 4), "BINUNICODE8": _sized(Machine._text, 8)},
        **{"SHORT_BINBYTES": _sized(Machine._bytes, 1), "BINBYTES": _sized(Machine._bytes, 4)},
        **{"BINBYTES8": _sized(Machine._bytes, 8), "BYTEARRAY8": _sized(Machine._bytes, 8)},
    }
    return [named.get(_NAMES.get(code, ""), Machine._unknown) for code in range(256)]


_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_STEPS = _table()
_STOP = ord(".")
