"""The pickle interpreter against Python's own pickler, and against hostile pickles."""

import os
import pickle
import pickletools
import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.containers import pickles
from reshard.containers.pickles import Built, Global, Machine

PROTOCOLS = (2, 3, 4, 5)


class Thing:
    def __init__(self, **state):
        self.__dict__ |= state


class Reduced:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Things(Machine):
    subject = "a thing"
    advice = "make another"
    names = frozenset({f"{__name__} Thing", "collections OrderedDict"})

    def reduced(self, function: object, arguments: object) -> object:
        return ("reduced", function, arguments)

    def persistent(self, identity: object) -> object:
        return ("outside", identity)


def run(pickled: bytes, most: int | None = None) -> object:
    return Things(pickled).run(most)


def refusal(pickled: bytes) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each test looks at the message
        run(pickled)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain(value: object) -> object:
    """A value from our interpreter or of Python, such that the two compare."""
    match value:
        case Built():
            return {"Thing": plain(value.state or {})}
        case Thing():
            return {"Thing": plain(vars(value))}
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list():
            return [plain(item) for item in value]
        case tuple():
            return tuple(plain(item) for item in value)
    return value


# --- what is built

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**300), 2**300)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
KEYS = st.text() | st.integers(0, 2**31 - 1)


def trees(children):
    lists = st.lists(children, max_size=5)
    dicts = st.dictionaries(KEYS, children, max_size=4)
    names = st.dictionaries(st.sampled_from("abc"), children)
    return lists | lists.map(tuple) | dicts | names.map(lambda state: Thing(**state))


@settings(max_examples=300, deadline=None)
@given(value=st.recursive(LEAVES, trees), protocol=st.sampled_from(PROTOCOLS))
def test_what_python_pickles_is_built_again(value, protocol):
    if protocol == 2:
        value = without_bytes(value)  # pickled as a call
    for pickler in (pickle.dumps, pickle._dumps):
        pickled = pickler(value, protocol)
        assert plain(run(pickled)) == plain(value)
        assert plain(run(pickletools.optimize(pickled))) == plain(value)


def without_bytes(value: object) -> object:
    match value:
        case bytes():
            return value.hex()
        case dict():
            return {key: without_bytes(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(without_bytes(item) for item in value)
        case Thing():
            return Thing(**{key: without_bytes(item) for key, item in vars(value).items()})
    return value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_values_and_shared_ones(protocol):
    shared = [1, 2]
    text = "é" * 70_000
    value = {"many": [shared] * 3000, "text": [text, text], **{str(n): n for n in range(3000)}}
    found = run(pickle.dumps(value, protocol))
    assert found == value
    assert found["many"][0] is found["many"][2999]
    assert found["text"][0] is found["text"][1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_calls_and_states_become_stand_ins(protocol):
    found = run(pickle.dumps([OrderedDict, Reduced(OrderedDict, 1, "a")], protocol))
    name = Global("collections OrderedDict")
    assert found == [name, ("reduced", name, (1, "a"))]
    thing = run(pickle.dumps(Thing(a=1), protocol))
    assert (type(thing), thing.name, thing.state) == (Built, f"{__name__} Thing", {"a": 1})
    key = run(pickle.dumps({Thing(a=1): 5}, protocol))
    assert [(type(k), k.state, v) for k, v in key.items()] == [(Built, {"a": 1}, 5)]


def test_what_lies_outside_is_up_to_the_subclass():
    assert run(b"\x80\x02X\x01\0\0\0aQ.") == ("outside", "a")
    with pytest.raises(ValueError, match="names something outside, which data does not need"):
        Machine(b"\x80\x02X\x01\0\0\0aQ.").run()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_by_default_nothing_is_named_called_or_made(protocol):
    with pytest.raises(ValueError, match=r"asks for `collections.OrderedDict`, which is not allow"):
        Machine(pickle.dumps(OrderedDict, protocol)).run()

    class Naming(Machine):
        names = Things.names

    with pytest.raises(ValueError, match="in a way that this program does not know; nothing was"):
        Naming(pickle.dumps(Reduced(OrderedDict), protocol)).run()


# --- what is refused


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("function", [os.system, eval, getattr, Reduced], ids=str)
def test_a_name_that_is_not_permitted_is_refused_and_nothing_runs(tmp_path, function, protocol):
    command = f"touch {tmp_path}/ran" if function is os.system else f"open('{tmp_path}/ran','w')"
    message = refusal(pickle.dumps({"x": Reduced(function, command)}, protocol))
    assert f".{function.__name__}`, which is not allowed; nothing was executed" in message
    assert not (tmp_path / "ran").exists()


def test_the_hostile_pickle_would_have_run_in_python(tmp_path):
    pickle.loads(pickle.dumps(Reduced(os.system, f"touch {tmp_path}/ran")))
    assert (tmp_path / "ran").exists()


def test_a_permitted_name_is_matched_in_full():
    for module, name in (("collections", "OrderedDict.x"), ("collections OrderedDict", "")):
        pickled = b"".join(b"\x8c%c%s" % (len(t), t.encode()) for t in (module, name))
        assert "not allowed" in refusal(b"\x80\x04" + pickled + b"\x93.")


DAMAGED = "its pickle is damaged"
BOMBS = {
    "nested marks": (b"(" * 10_000 + b".", "nested more than 100 deep"),
    "exponential hash": (b"})" + b"q\0h\0\x86" * 22 + b"Ns.", "key of its dicts is a `tuple`"),
    "colliding ints": (b"}\x8a\x08" + b"\x7f" * 8 + b"Ns.", "key of its dicts is a `int`"),
    "a name for a key": (b"}ccollections\nOrderedDict\nNs.", "key of its dicts is a `Global`"),
    "a long of 2 GiB": (b"\x8b\xff\xff\xff\x7f.", DAMAGED),
    "a long of 256 bytes": (b"\x8b\0\x01\0\0" + bytes(256) + b".", "a number of 256 bytes"),
    "text of 4 GiB": (b"X\xff\xff\xff\xff.", DAMAGED),
    "text of 2^64": (b"\x8d" + b"\xff" * 8 + b".", DAMAGED),
    "short text": (b"\x8c\xffa.", DAMAGED),
    "bytes of 2^63": (b"\x8e" + b"\xff" * 7 + b"\x7f.", DAMAGED),
    "bytes of 4 GiB": (b"B\xff\xff\xff\xff.", DAMAGED),
    "a bytearray of 2^40": (b"\x96" + b"\xff" * 5 + b"\0\0\0.", DAMAGED),
    "half a length": (b"X\xff", DAMAGED),
    "half a number": (b"J\0.", DAMAGED),
    "a name without end": (b"ccollections\nOrderedDict.", DAMAGED),
    "a module without end": (b"c" * 1000, DAMAGED),
    "no opcode": (b"\xff.", "no opcode 0xff"),
    "an extension": (b"\x82\x01.", "uses the opcode EXT1, which a thing does not need; make anoth"),
    "an instance": (b"(i__main__\nx\n.", "uses the opcode INST"),
    "an instance by arguments": (b"(N]N\x92.", "uses the opcode NEWOBJ_EX"),
    "a set": (b"\x8f.", "uses the opcode EMPTY_SET"),
    "an empty stack": (b"u.", DAMAGED),
    "nothing at all": (b"", DAMAGED),
    "nothing to return": (b".", DAMAGED),
    "too few for a tuple": (b"N\x87.", DAMAGED),
    "a tuple beyond the mark": (b"NN(\x86.", DAMAGED),
    "no mark": (b"Nt.", DAMAGED),
    "an unknown memo": (b"h\x07.", DAMAGED),
    "a far memo that was not set": (b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.", DAMAGED),
    "no end": (b"}", DAMAGED),
    "items of a list": (b"](K\0K\0u.", "sets items of what is no dict"),
    "odd items": (b"}(K\0u.", "sets items of what is no dict"),
    "appended to a dict": (b"}K\0a.", "appends to what is no list"),
    "a name of numbers": (b"K\0K\0\x93.", "asks for a name that is no text"),
    "an object of text": (b"X\x01\0\0\0a)\x81.", "in a way that this program does not know"),
    "an object with arguments": (
        b"ccollections\nOrderedDict\nK\0\x85\x81.",
        "in a way that this program does not know",
    ),
    "the state of a list": (b"]}b.", "sets the state of what has none"),
    "a state set twice": (
        b"ccollections\nOrderedDict\n)\x81}b}b.",
        "sets the state of what has none",
    ),
    "text that is no UTF-8": (b"\x8c\x01\xff.", "damaged: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_little_memory(bomb):
    opcodes, message = BOMBS[bomb]
    tracemalloc.start()
    try:
        assert message in refusal(b"\x80\x04" + opcodes if opcodes else b"")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_far_memo_index_costs_no_memory():
    tracemalloc.start()
    try:
        assert run(b"\x80\x02}r\xff\xff\xff\xffj\xff\xff\xff\xff.") == {}
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [b"}", b"]", b")\x85", b"N\x85", b"}\x94", b"ccollections\na\n"])
def test_memory_is_bounded_by_the_length(value):
    class Named(Things):
        names = frozenset({"collections a"})

    pickled = b"\x80\x04" + value * (200_000 // len(value)) + b"."
    tracemalloc.start()
    try:
        Named(pickled).run()
        assert tracemalloc.get_traced_memory()[1] < 100 * len(pickled)
    except ValueError as error:
        assert "dicts, tuples and texts than a thing needs" in str(error)  # noqa: PT017
    finally:
        tracemalloc.stop()


CONTAINERS = {
    "lists": b"]",
    "dicts": b"}",
    "nested tuples": b"\x85",
    "tuples of marks": b"(Nt",
    "lists of one": b"]Na",
    "dicts of one": b"}K\0Ns",
}


@pytest.fixture
def nothing_free(monkeypatch):
    """Without the constant part of the budget, which would take long to spend, short pickles do."""
    assert pickles._FREE_BYTES <= 16 << 20
    monkeypatch.setattr(pickles, "_FREE_BYTES", 0)


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.usefixtures("nothing_free")
def test_containers_alone_are_refused_before_they_take_much(kind):
    pickled = b"\x80\x02)" + CONTAINERS[kind] * ((1 << 18) // len(CONTAINERS[kind])) + b"."
    tracemalloc.start()
    try:
        assert "makes more lists, dicts, tuples and texts than a thing needs" in refusal(pickled)
        assert tracemalloc.get_traced_memory()[1] < 22 * len(pickled)
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("nothing_free")
@pytest.mark.parametrize("text", [b"\x8c\x02ab", b"C\x01a"], ids=["texts", "bytes"])
def test_short_texts_are_held_against_the_length_too(monkeypatch, text):
    monkeypatch.setattr(Things, "bytes_per_byte", 4)
    assert "makes more lists, dicts, tuples and texts" in refusal(b"\x80\x04" + text * 1000 + b".")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_metadata_holds_is_no_bomb(protocol, monkeypatch):
    """As dense as `.metadata` of empty chunks: the densest that torch writes, a tenth of it."""
    monkeypatch.setattr(pickles, "_FREE_BYTES", pickles._FREE_BYTES // 10)
    things = [Thing(a=((0,),), b=((n % 9,),)) for n in range(20_000)]
    pickled = pickle.dumps(things, protocol)
    assert len(run(pickled)) == 20_000


def test_a_list_in_itself_and_a_deep_tuple_end():
    found = run(b"\x80\x02]q\0h\0a.")
    assert found[0] is found
    assert type(run(b"\x80\x02)" + b"\x85" * 200_000 + b".")) is tuple


def test_the_number_of_opcodes_can_be_capped():
    assert run(b"}}}.", 4) == {}
    with pytest.raises(ValueError, match="its pickle has more than 3 opcodes"):
        run(b"}}}.", 3)


SEED = pickle.dumps({"a": [Thing(b=(1, 2.5, "x")), OrderedDict, {}, None] * 2, "c": 2**70}, 4)


@settings(max_examples=500, deadline=None)
@given(place=st.integers(0, len(SEED) - 1), piece=st.binary(max_size=6), cut=st.integers(0, 6))
def test_a_changed_pickle_is_a_value_or_refused(place, piece, cut):
    value_or_refusal(SEED[:place] + piece + SEED[place + cut :])


@settings(max_examples=500, deadline=None)
@given(
    pickled=st.binary()
    | st.lists(st.sampled_from([bytes([c]) for c in b"})](.tQRsuabN\x85\x86\x87\x94\x81\x93h\0q"]))
    .map(b"".join)
    .map(lambda opcodes: opcodes + b".")
)
def test_any_bytes_are_a_value_or_refused(pickled):
    value_or_refusal(pickled)


def value_or_refusal(pickled: bytes) -> None:
    message = ""
    try:
        run(pickled)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
