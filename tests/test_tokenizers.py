"""Tokenizers: what transformers reads gives the ids of tiktoken and sentencepiece themselves."""

import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import transformers
from sentencepiece import SentencePieceProcessor

from reshard import tokenizers
from reshard.conversions import to_header, to_huggingface
from reshard.errors import CheckpointError, StorageError
from reshard.families.model import ModelConfig
from reshard.families.prompts import SPECIALS_3, SPECIALS_3_1
from reshard.families.releases import ROPE_SCALING
from reshard.tokenizers import Unavailable, child, kind_of
from tests.oracles.texts import PATTERN, texts, write_sentencepiece, write_tiktoken
from tests.real.conversations import CONVERSATIONS, MERGES, SEED, TEXTS, messages

ROOT = Path(__file__).parents[1]
GOLDENS = json.loads((ROOT / "tests/goldens/tokenizers.json").read_text())
PEERS = Path(os.environ.get("PEERS_VENV", ROOT / ".venv-peers")) / "bin" / "python"
SIZES = {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 96}
LLAMA_3_FILE = "llama3/tokenizer.model"


def llama_3(tokens: int, version: str = "3.1", *, instruct: bool = False) -> ModelConfig:
    """A model whose vocabulary is that of a tiktoken file of `tokens` tokens."""
    scaling = dict(ROPE_SCALING) if version == "3.1" else None
    ends = [tokens + 1, tokens + 8, tokens + 9] if version == "3.1" else [tokens + 1, tokens + 9]
    return ModelConfig(
        "llama",
        **SIZES,
        vocab=tokens + 256,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaling,
        max_positions=131072 if scaling else 8192,
        bos=tokens,
        eos=ends if instruct else tokens + 1,
    )


def llama_2(pieces: int, *, chat: bool = False) -> ModelConfig:
    """A model whose vocabulary is that of a sentencepiece file."""
    generation = {"do_sample": True} if chat else {}
    sizes = {**SIZES, "kv_heads": 4}
    return ModelConfig(
        "llama", **sizes, vocab=pieces, norm_eps=1e-5, max_positions=4096, generation=generation
    )


def encoding_of(file: Path, specials: tuple[str, ...]) -> tiktoken.Encoding:
    """tiktoken over the file itself; its special tokens stand behind the others."""
    lines = (line.split() for line in file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    tail = {text: len(ranks) + place for place, text in enumerate(specials)}
    return tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=tail)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A small tiktoken file, and the number of its tokens."""
    file = tmp_path_factory.mktemp("small") / "tokenizer.model"
    return file, write_tiktoken(file)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A sentencepiece model of Llama 2's kind, and the number of its pieces."""
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    return file, write_sentencepiece(file)


@pytest.fixture(scope="module")
def chat(small: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted instruct variant."""
    return made(small[0], llama_3(small[1], instruct=True), tmp_path_factory.mktemp("chat"))


def made(file: Path, model: ModelConfig, folder: Path) -> Path:
    """A Hugging Face directory as far as a tokenizer needs one."""
    assert to_huggingface(file, model, folder) == tokenizers.HUGGINGFACE
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def loaded(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_same(folder: Path, encoding: tiktoken.Encoding, specials: tuple[str, ...]) -> None:
    """On 1,000 texts, with special tokens and without: the same ids, and the text again."""
    ours = loaded(folder)
    several = (specials[0], specials[1], specials[9], specials[4], specials[-1])
    begin = encoding.encode_single_token(specials[0])
    for text in (*texts(500, 1), *texts(500, 2, several)):
        expected = encoding.encode(text, allowed_special="all")
        assert ours(text, add_special_tokens=False).input_ids == expected, repr(text)
        assert ours(text).input_ids == [begin, *expected], repr(text)
        assert ours.decode(expected) == encoding.decode(expected), repr(text)
    assert len(ours) == encoding.n_vocab
    assert [ours.convert_tokens_to_ids(text) for text in specials] == [*range(begin, len(ours))]
    assert ours.bos_token_id == begin


# ----------------------------------------------------------------------------------------- tiktoken


@pytest.mark.parametrize("version", ["3", "3.1"])
def test_a_small_file_gives_the_ids_of_tiktoken(
    version: str, small: tuple[Path, int], tmp_path: Path
) -> None:
    file, count = small
    specials = SPECIALS_3 if version == "3" else SPECIALS_3_1
    folder = made(file, llama_3(count, version), tmp_path)
    check_same(folder, encoding_of(file, specials), specials)
    assert loaded(folder).eos_token == "<|end_of_text|>"
    assert loaded(folder).chat_template is None


@pytest.fixture(scope="session")
def llama_3_file() -> Path:
    """The tokenizer of Llama 3 itself."""
    package = importlib.util.find_spec("llama_models")
    if package is None or package.origin is None:
        pytest.skip("llama-models is not installed, which has the file: pip install --no-deps")
    return Path(package.origin).parent / LLAMA_3_FILE


def test_the_tokenizer_of_llama_3_gives_the_ids_of_tiktoken(
    llama_3_file: Path, tmp_path: Path
) -> None:
    file = llama_3_file
    folder = made(file, llama_3(128000, instruct=True), tmp_path)
    encoding = encoding_of(file, SPECIALS_3_1)
    check_same(folder, encoding, SPECIALS_3_1)
    ours = loaded(folder)
    for token in range(0, 128000, 16):  # also those that no merges lead to
        text = encoding.decode([token])
        expected = encoding.encode(text)
        assert ours(text, add_special_tokens=False).input_ids == expected, (token, text)


MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "reshard.tokenizers"], stdin=sys.stdin, check=True)
print(f"; {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10} MB")
"""


def test_the_process_of_a_conversion_is_small(llama_3_file: Path, tmp_path: Path) -> None:
    """260 MB, which the caller never holds; with torch it would be 440."""
    model = llama_3(128000)
    arguments = {
        **{"file": str(llama_3_file), "vocab": model.vocab, "bos": model.bos, "eos": model.eos},
        **{"pad": None, "positions": 8192, "specials": list(SPECIALS_3_1), "template": None},
    }
    job = {"task": "tiktoken", "arguments": arguments, "folder": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-c", MEASURED],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    outcome, _, size = shown.stdout.partition("; ")
    assert json.loads(outcome) == {"done": True}
    assert int(size.split()[0]) < 350


def test_special_tokens_have_the_ids_that_transformers_own_converter_gives() -> None:
    for version, specials in (("3", SPECIALS_3), ("3.1", SPECIALS_3_1)):
        count = GOLDENS[version]["tokens"]
        expected = {text: count + place for place, text in enumerate(specials)}
        assert GOLDENS[version]["specials"] == expected
        assert len(set(specials)) == 256


@pytest.mark.parametrize("version", ["3", "3.1"])
def test_ids_settings_and_prompts_are_those_of_transformers_own_converter(
    version: str, tmp_path: Path
) -> None:
    golden, file = GOLDENS[version], tmp_path / "tokenizer.model"
    assert write_tiktoken(file, MERGES, SEED) == golden["tokens"]
    ours = loaded(made(file, llama_3(golden["tokens"], version, instruct=True), tmp_path))
    specials = SPECIALS_3 if version == "3" else SPECIALS_3_1
    some = (specials[0], specials[9], specials[255])
    found = [ours(text, add_special_tokens=False).input_ids for text in texts(TEXTS, SEED, some)]
    assert found == golden["ids"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {key: config[key] for key in golden["config"]} == golden["config"]
    for name, turns in CONVERSATIONS.items():
        prompt = ours.apply_chat_template(
            messages(turns), tokenize=False, add_generation_prompt=True
        )
        assert prompt == golden["prompts"][name]  # which has the header of the answer always
        plain = ours.apply_chat_template(messages(turns), tokenize=False)
        assert plain + "<|start_header_id|>assistant<|end_header_id|>\n\n" == prompt


def test_a_prompt_has_one_bos_and_results_of_tools_their_own_role(chat: Path) -> None:
    ours = loaded(chat)
    turns = [("user", "6 * 7?"), ("assistant", "call"), ("tool", "42")]
    text = ours.apply_chat_template(messages(turns), tokenize=False)
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>" in text
    ids = ours(text, add_special_tokens=False).input_ids
    assert ids.count(ours.bos_token_id) == 1
    assert ids[-1] == ours.eos_token_id == ours.convert_tokens_to_ids("<|eot_id|>")
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    with pytest.raises(Exception, match="has no place for tools"):
        ours.apply_chat_template(messages(turns), tools=[tool], tokenize=False)


# ------------------------------------------------------------------------------------ sentencepiece


def check_pieces(ours: Any, theirs: SentencePieceProcessor, seed: int) -> None:
    """The same ids on texts without special tokens; around those, each part as a text."""
    for text in texts(700, seed):
        if "<s>" not in text:
            assert ours(text).input_ids == [1, *theirs.encode(text)], repr(text)
            found = ours.decode(ours(text, add_special_tokens=False).input_ids)
            assert found == theirs.decode(theirs.encode(text)), repr(text)
    for text in texts(300, seed + 1, ("<s>", "</s>")):
        expected = []
        for number, part in enumerate(text.replace("</s>", "<s>").split("<s>")):
            expected += [1] if number else []
            expected += theirs.encode(part)
        found = [1 if token == 2 else token for token in ours(text).input_ids]
        assert found == [1, *expected], repr(text)


def test_a_sentencepiece_model_gives_its_own_ids(pieces: tuple[Path, int], tmp_path: Path) -> None:
    file, count = pieces
    ours = loaded(made(file, llama_2(count), tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(file.read_bytes())  # as it is carried along
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [(token["content"], token["special"], token["normalized"]) for token in added] == [
        (text, True, False) for text in ("<unk>", "<s>", "</s>")
    ]
    theirs = SentencePieceProcessor(model_file=str(file))
    assert any(theirs.is_byte(token) for token in theirs.encode("\u2603\U0001f980"))
    for tokenizer in (ours, loaded(tmp_path)):
        check_pieces(tokenizer, theirs, 5)
        assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (count, 1, 2)
        assert (tokenizer.unk_token_id, tokenizer.model_max_length) == (0, 4096)
        assert tokenizer.chat_template is None


def test_a_model_of_unigrams_gives_its_own_ids(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    options = {"model_type": "unigram", "hard_vocab_limit": False}
    count = write_sentencepiece(file, 1, **options)
    found = loaded(made(file, llama_2(count), tmp_path))
    theirs = SentencePieceProcessor(model_file=str(file))
    assert found("Hello 世界").input_ids == [1, *theirs.encode("Hello 世界")]


def test_the_prompts_of_llama_2_are_as_documented(pieces: tuple[Path, int], tmp_path: Path) -> None:
    ours = loaded(made(pieces[0], llama_2(pieces[1], chat=True), tmp_path))
    render: Callable[..., str] = ours.apply_chat_template
    assert render(messages(CONVERSATIONS["turns"]), tokenize=False) == (
        "<s>[INST] <<SYS>>\nBe brief.\n\n<</SYS>>\n\n1 + 1? [/INST] 2 </s>"
        "<s>[INST] Sure?\n\nReally? [/INST] Yes. </s>"
        "<s>[INST] Thanks [/INST]"
    )
    assert render(messages(CONVERSATIONS["system"]), tokenize=False) == (
        "<s>[INST] <<SYS>>\nYou are a helpful assistant\n<</SYS>>\n\n Who are you? [/INST]"
    )
    with pytest.raises(Exception, match="turns must alternate"):
        render(messages([("user", "a"), ("user", "b")]), tokenize=False)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_a_model_that_treats_text_in_another_way_is_refused(
    options: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.model"
    count = write_sentencepiece(file, **options)
    with pytest.raises(CheckpointError, match=r"converted, it gives \[.*normalises or splits"):
        to_huggingface(file, llama_2(count), tmp_path)


# ------------------------------------------------------------------------------- files and refusals


def test_files_are_the_same_wherever_and_whenever_they_are_made(
    small: tuple[Path, int], chat: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere" / "renamed.bin"
    other.parent.mkdir()
    other.write_bytes(small[0].read_bytes())
    (tmp_path / "out").mkdir()
    again = made(other, llama_3(small[1], instruct=True), tmp_path / "out")
    assert {path.name for path in again.iterdir()} == {*tokenizers.HUGGINGFACE, "config.json"}
    for name in tokenizers.HUGGINGFACE:
        data = (again / name).read_bytes()
        assert data == (chat / name).read_bytes(), name
        assert str(tmp_path).encode() not in data
    assert json.loads((again / "special_tokens_map.json").read_text()) == {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    }


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    """tiktoken keeps copies of what it reads by their paths."""
    file = tmp_path / "tokenizer.model"
    for merges in (5, 9):
        count = write_tiktoken(file, merges)
        found = loaded(made(file, llama_3(count), tmp_path))
        assert len(found) == 256 + merges + 256


def test_kinds_are_told_by_what_is_inside(
    small: tuple[Path, int], pieces: tuple[Path, int], tmp_path: Path
) -> None:
    assert kind_of(small[0]) == "tiktoken"
    assert kind_of(pieces[0]) == "sentencepiece"
    for data in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\n\n\n\n", b"{}"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x`: neither the lines of a tiktoken file nor"):
            kind_of(tmp_path / "x")
    with pytest.raises(StorageError, match="No such file"):
        kind_of(tmp_path / "y")


def spoilt(data: bytes, kind: str) -> bytes:
    """A file that begins well."""
    if kind == "half a line":
        return data[: len(data) // 2] + b"?"
    if kind == "a long token":
        return data + base64.b64encode(b"x" * 1025) + b" 456\n"
    if kind == "a gap":
        return b"".join(line for n, line in enumerate(data.splitlines(True)) if n != 300)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [
        ("small", "half a line", r"not a tiktoken file that can be read \(.*\); complete"),
        ("small", "a gap", r"the ranks of 455 tokens are not 0 to 454; complete"),
        ("small", "a long token", r"a token of 1025 bytes, expected 1024 at most; complete"),
        ("pieces", "half", r"not a sentencepiece file that can be read \(.*\); complete"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(
    which: str, kind: str, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    file, count = request.getfixturevalue(which)
    (tmp_path / "tokenizer.model").write_bytes(spoilt(file.read_bytes(), kind))
    model = llama_3(count) if which == "small" else llama_2(count)
    with pytest.raises(CheckpointError, match=message) as caught:
        to_huggingface(tmp_path / "tokenizer.model", model, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("`tokenizer.model`: ")  # whose place is not told
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 711}, r"712 tokens, but the model's embedding has 711 rows; is it"),
        ({"bos": 457}, r"the model's bos is 457, but the tokenizer has 456; give .*src.model"),
        ({"eos": [457, 460]}, r"the model's eos is 460, but the tokenizer has 457 or 464 or 465"),
        ({"eos": None}, r"the model's eos is None"),
        ({"pad": 9999}, r"the model's pad is 9999, which is no token"),
    ],
)
def test_another_model_s_tokenizer_is_refused(
    changes: dict[str, Any], message: str, small: tuple[Path, int], tmp_path: Path
) -> None:
    model = replace(llama_3(small[1]), **changes)
    with pytest.raises(CheckpointError, match=message):
        to_huggingface(small[0], model, tmp_path)


def test_padded_embeddings_and_a_pad_token_are_fine(
    small: tuple[Path, int], tmp_path: Path
) -> None:
    model = replace(llama_3(small[1]), vocab=1024, pad=small[1] + 4)
    assert loaded(made(small[0], model, tmp_path)).pad_token == "<|finetune_right_pad_id|>"


def test_a_tiktoken_file_of_no_llama_3_is_left_out(small: tuple[Path, int], tmp_path: Path) -> None:
    model = replace(llama_3(small[1]), rope_theta=10000.0, rope_scaling=None)
    with pytest.raises(Unavailable, match=r"tokenizer.json is left out: .* no Llama 3; src.assets"):
        to_huggingface(small[0], model, tmp_path)


@pytest.mark.parametrize(
    ("files", "lacking", "expected"),
    [
        ("tiktoken", {"tiktoken"}, r"tokenizer.json is left out: it needs tiktoken; .* tiktoken$"),
        ("tiktoken", {"gguf"}, r"the tokenizer in the header is .* needs gguf; .* gguf$"),
        (
            "tiktoken",
            {"tiktoken", "gguf"},
            r"the tokenizer in the header is left out: it needs tiktoken and gguf; "
            r"pip install tiktoken gguf$",
        ),
        ("sentencepiece", {"protobuf"}, r"in the header .* needs protobuf; .* protobuf$"),
    ],
)
def test_what_is_not_installed_is_named_and_how_to_get_it(
    files: str,
    lacking: set[str],
    expected: str,
    small: tuple[Path, int],
    pieces: tuple[Path, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "_is_missing", lacking.__contains__)
    file, count = small if files == "tiktoken" else pieces
    model = llama_3(count) if files == "tiktoken" else llama_2(count)

    def convert() -> object:
        if lacking == {"tiktoken"}:
            return to_huggingface(file, model, tmp_path)
        return to_header({file.name: file}, model, tmp_path)

    with pytest.raises(Unavailable, match=expected):
        convert()


def test_a_tokenizer_json_goes_into_a_header_without_the_package_of_sentencepiece(
    pieces: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_is_missing", {"sentencepiece", "protobuf"}.__contains__)
    started: list[str] = []

    def run_child(task: str, arguments: dict[str, Any], folder: Path, *others: object) -> None:
        started.append(task)
        assert sorted(os.listdir(arguments["folder"])) == ["tokenizer.json", "tokenizer.model"]
        (folder / "tokenizer.kv").write_bytes(b"keys")
        (folder / "result.json").write_text('{"count": 1, "notes": []}')

    monkeypatch.setattr(child, "run_child", run_child)
    held = dict.fromkeys(("tokenizer.json", "tokenizer.model"), pieces[0])
    assert to_header(held, llama_2(pieces[1]), tmp_path) == ((1, 4), ())
    assert started == ["header"]


def test_what_cannot_be_imported_is_named_too(
    small: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiktoken.py").write_text("import no_such_thing\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"tokenizer.json is left out: .*'no_such_thing'"):
        to_huggingface(small[0], llama_3(small[1]), tmp_path)


def test_a_process_that_dies_is_told_in_one_line(
    small: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiktoken.py").write_text("import os; os.write(2, b'no more'); os._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StorageError, match=r"json failed \(exit code 9\): no more; try again, or"):
        to_huggingface(small[0], llama_3(small[1]), tmp_path)


def test_the_process_of_a_conversion_loads_no_torch() -> None:
    code = (
        "import sys, reshard.tokenizers.__main__ as entry; "
        "assert 'torch' not in sys.modules; sys.modules['torch'] = None; "
        "import reshard.tokenizers.bpe, reshard.tokenizers.spm"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


READ_BY_PEERS = """
import json, sys, transformers
assert transformers.__version__ == "4.45.2"
for folder, texts in json.load(sys.stdin).items():
    found = transformers.AutoTokenizer.from_pretrained(folder)
    print(json.dumps([found(text).input_ids for text in texts]))
    print(json.dumps(found.decode(found(texts[-1]).input_ids)))
"""


def test_transformers_4_reads_the_same(
    chat: Path, pieces: tuple[Path, int], tmp_path: Path
) -> None:
    if not PEERS.exists():
        pytest.skip("no .venv-peers with transformers 4.45: make goldens")
    folders = (chat, made(pieces[0], llama_2(pieces[1]), tmp_path))
    several = texts(200, 8, ("<|eot_id|>", "</s>"))
    job = json.dumps({str(folder): several for folder in folders})
    shown = subprocess.run(
        [PEERS, "-c", READ_BY_PEERS], input=job, capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    for folder, (ids, decoded) in zip(folders, (lines[:2], lines[2:]), strict=True):
        ours = loaded(folder)
        assert [ours(text).input_ids for text in several] == ids
        assert ours.decode(ours(several[-1]).input_ids) == decoded
