"""Tokenizers as GGUF keys: against their sources, against gguf-py's own reading, and as ids."""

import io
import json
import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from reshard.containers import gguffile, pieces_of
from reshard.errors import CheckpointError

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")

from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from reshard.tokenizers import gguf as task  # noqa: E402
from reshard.tokenizers import gguf_vocab  # noqa: E402
from tests.oracles.bytelevel import (  # noqa: E402
    CORPUS,
    LLAMA3,
    SPECIALS,
    byte_level,
    bytes_after,
    llama3,
    save,
    split,
)

QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STRINGS = [
    "",
    " ",
    "The lazy dog",
    "  two  blanks ",
    "naïve 🦙 日本\n\n\ttab",
    "the dogs' 1234567 jumps\r\n",
]


def digits_first() -> pre_tokenizers.PreTokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])


def converted(folder: Path, rows: int, **ids: int) -> tuple[dict[str, object], list[str]]:
    """The keys that were made of a directory, as gguf-py reads them, and the notes."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    task.run({"folder": str(folder), "vocab": rows, "ids": ids}, out)
    result = json.loads((out / "result.json").read_text())
    keys = (out / "tokenizer.kv").read_bytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, result["count"])
    (out / "keys.gguf").write_bytes(head + keys + bytes(-len(head + keys) % 32))
    fields = gguf.GGUFReader(out / "keys.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("tok")}
    assert list(gguffile.index(out, "keys.gguf").metadata) == list(found)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}, result[
        "notes"
    ]


def kinds(found: dict[str, object], *, of: int) -> list[str]:
    return [
        token
        for token, kind in zip(found["tokens"], found["token_type"], strict=True)
        if kind == of
    ]


def assert_as_gguf_reads_it(folder: Path, found: dict[str, object], rows: int) -> None:
    """What gguf-py's own reading of the directory finds is what was written."""
    said = gguf.SpecialVocab(folder, load_merges="merges" in found, n_vocab=rows)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, number in said.special_token_ids.items():
        assert found[f"{names[name]}_token_id"] == number
    for name, adds in said.add_special_token.items():
        assert found[f"add_{name}_token"] == adds
    assert said.merges == found.get("merges", [])
    assert said.chat_template == found.get("tokenizer.chat_template")


# --- byte-level


def test_a_llama3_like_tokenizer_has_every_key(tmp_path):
    folder, made = llama3(tmp_path / "hf")
    found, notes = converted(folder, 330)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert notes == []
    assert (found["model"], found["pre"]) == ("gpt2", "llama-bpe")
    assert [made.id_to_token(number) for number in range(325)] == found["tokens"][:325]
    assert found["tokens"][325:] == [f"[PAD{number}]" for number in range(325, 330)]
    assert kinds(found, of=gguf.TokenType.UNUSED) == found["tokens"][325:]
    assert kinds(found, of=gguf.TokenType.CONTROL) == SPECIALS
    assert kinds(found, of=gguf.TokenType.USER_DEFINED) == ["<tool>"]
    assert len(kinds(found, of=gguf.TokenType.NORMAL)) == 320
    assert found["merges"] == [" ".join(pair) for pair in model["merges"]]
    ids = {key: value for key, value in found.items() if key.endswith("_token_id")}
    assert ids == {
        "bos_token_id": 320,
        "eos_token_id": 323,
        "eot_token_id": 323,
        "eom_token_id": 322,
    }
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert found["add_space_prefix"] is False
    assert "scores" not in found
    assert_as_gguf_reads_it(folder, found, 330)


@pytest.mark.parametrize(
    ("splitter", "whole", "name"),
    [
        (lambda: split(LLAMA3), True, "llama-bpe"),
        (lambda: split(LLAMA3), False, "smaug-bpe"),
        (lambda: split(QWEN2), False, "qwen2"),
        (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (digits_first, False, "smollm"),
    ],
)
def test_the_way_to_split_has_llama_cpps_name(tmp_path, splitter, whole, name):
    save(tmp_path, byte_level(splitter(), whole=whole))
    found, notes = converted(tmp_path, 324)
    assert (found["pre"], notes) == (name, [])
    assert found["add_bos_token"] is False


@pytest.mark.parametrize(
    ("splitter", "whole", "name", "note"),
    [
        (lambda: split(TEKKEN), True, "tekken", "`tekken` splits words with combining marks"),
        (lambda: split(QWEN2), True, "qwen2", "`qwen2` treats words that are tokens"),
        (lambda: split(r"\p{L}+|\p{N}+"), False, "default", "no name for how this tokenizer"),
        (lambda: bytes_after(pre_tokenizers.Punctuation()), False, "default", "no name for how"),
        (
            lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
            False,
            "gpt-2",
            "no blank before",
        ),
    ],
)
def test_what_llama_cpp_does_otherwise_is_noted(tmp_path, splitter, whole, name, note):
    save(tmp_path, byte_level(splitter(), whole=whole))
    found, [said] = converted(tmp_path, 324)
    assert found["pre"] == name
    assert note in said


def test_vocab_json_and_merges_txt_do_without_tokenizer_json(tmp_path):
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), specials=["<|endoftext|>"])
    save(tmp_path, made)
    whole, _ = converted(tmp_path, 321)
    made.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 320}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    assert converted(tmp_path, 321) == (whole, [])
    (tmp_path / "tokenizer_config.json").unlink()
    found, [note] = converted(tmp_path, 321)
    assert found["pre"] == "default"
    assert "without tokenizer.json" in note


@pytest.mark.parametrize("end", ["config", "special_tokens_map", "model", "generation"])
def test_a_special_token_is_found_wherever_it_is_said(tmp_path, end):
    save(tmp_path, byte_level(split(QWEN2)))
    if end == "config":
        save(tmp_path, byte_level(split(QWEN2)), eos_token=SPECIALS[1])
    elif end == "special_tokens_map":
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": SPECIALS[1]}))
    elif end == "generation":
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [321, 323]}')
    ids = {"config": {"eos": 322}, "special_tokens_map": {"eos": 322}, "model": {"eos": 321}}
    assert converted(tmp_path, 324, **ids.get(end, {}))[0]["eos_token_id"] == 321


def test_a_flag_of_the_config_stands_over_the_template(tmp_path):
    folder, _ = llama3(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    found, _ = converted(folder, 325)
    assert found["add_bos_token"] is False
    assert_as_gguf_reads_it(folder, found, 325)


def test_a_bos_that_is_not_known_is_not_put_first_and_noted(tmp_path):
    save(tmp_path, byte_level(split(QWEN2)), add_bos_token=True)
    found, [note] = converted(tmp_path, 324)
    assert "bos_token_id" not in found
    assert found["add_bos_token"] is False
    assert "does not put bos around a text" in note


def test_merges_with_blanks_are_written_without_them(tmp_path):
    save(tmp_path, byte_level(split(LLAMA3), whole=True))
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    record["model"]["merges"].append([" a", "b c"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert converted(tmp_path, 324)[0]["merges"][-1] == "Ġa bĠc"


@pytest.mark.parametrize("where", ["config", "file", "both", "several"])
def test_the_chat_template_is_carried(tmp_path, where):
    template, other = "{% for m in messages %}é{{ m }}{% endfor %}", "{{ other }}"
    named = [{"name": "default", "template": template}, {"name": "tool", "template": other}]
    in_config = {"config": template, "both": other, "several": named}.get(where)
    save(tmp_path, byte_level(split(LLAMA3)), chat_template=in_config)
    if where in ("file", "both"):
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    found, _ = converted(tmp_path, 324)
    assert found["tokenizer.chat_template"] == template
    assert found.get("tokenizer.chat_template.tool") == (other if where == "several" else None)


def test_transformers_reads_the_same_ids_from_a_file_with_our_keys(tmp_path):
    """Its reader of GGUF splits as GPT-2 does, whatever the name says."""
    transformers = pytest.importorskip("transformers")
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), specials=["<|endoftext|>"])
    save(tmp_path, made, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    task.run({"folder": str(tmp_path), "vocab": 321, "ids": {}}, tmp_path)
    count = json.loads((tmp_path / "result.json").read_text())["count"]
    fields = gguffile.Fields(count, (tmp_path / "tokenizer.kv").read_bytes())
    arch = gguffile.Value("string", "llama")
    laid_out = gguffile.skeleton([], {"general.architecture": arch, "": fields})
    (tmp_path / "m.gguf").write_bytes(
        b"".join(piece for _, chunk in laid_out.chunks for piece in pieces_of(chunk))
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in STRINGS:
        assert theirs.encode(text, add_special_tokens=False) == made.encode(text).ids


# --- sentencepiece


def train_pieces(corpus: list[str], size: int, **options) -> bytes:
    """A sentencepiece model as Llama 2's: BPE, bytes for what it lacks, no normalisation."""
    as_llama = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        minloglevel=2,
        **(options or as_llama),
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return train_pieces(CORPUS, 340)


def as_tokenizer_json(processor) -> Tokenizer:
    """The same as BPE with byte fallback: all ways to split a piece are merges, best first."""
    texts = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    vocab = {text: number for number, text in enumerate(texts)}
    merges = []
    for number in sorted(range(259, len(texts)), key=processor.get_score, reverse=True):
        text = texts[number]
        ways = [(text[:at], text[at:]) for at in range(1, len(text))]
        merges += [way for way in ways if way[0] in vocab and way[1] in vocab]
    made = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(blanks)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


def encode_as_llama_cpp(found: dict[str, object], text: str) -> list[int]:
    """Merge the neighbours with the best score first, the leftmost of equals; then bytes."""
    where = {token: number for number, token in enumerate(found["tokens"])}
    symbols = list((" " + text if found["add_space_prefix"] else text).replace(" ", "▁"))
    while True:
        pairs = [(left + right, at) for at, (left, right) in enumerate(pairwise(symbols))]
        known = [(-found["scores"][where[pair]], at) for pair, at in pairs if pair in where]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids = [
        [where[s]] if s in where else [where[f"<0x{b:02X}>"] for b in s.encode()] for s in symbols
    ]
    return [number for part in ids for number in part]


def test_a_sentencepiece_model_has_every_key(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    found, notes = converted(tmp_path, 356)
    assert notes == []
    assert (found["model"], found["pre"]) == ("llama", "default")
    for number in range(340):
        assert found["tokens"][number] == processor.id_to_piece(number)
        assert found["scores"][number] == processor.get_score(number)
    assert kinds(found, of=gguf.TokenType.UNKNOWN) == ["<unk>"]
    assert kinds(found, of=gguf.TokenType.CONTROL) == ["<s>", "</s>"]
    assert kinds(found, of=gguf.TokenType.BYTE) == [f"<0x{byte:02X}>" for byte in range(256)]
    assert kinds(found, of=gguf.TokenType.UNUSED) == [
        f"[PAD{number}]" for number in range(340, 356)
    ]
    ids = {key: value for key, value in found.items() if key.endswith("_token_id")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    flags = {key: value for key, value in found.items() if key.startswith("add_")}
    assert flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert "merges" not in found
    for text in STRINGS[2:]:
        assert encode_as_llama_cpp(found, text) == processor.encode(text)


def test_merges_of_a_tokenizer_json_give_the_scores_of_its_sentencepiece_model(tmp_path, pieces):
    """Without its package, which need not be installed then."""
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    plain, _ = converted(tmp_path, 340)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    made = as_tokenizer_json(processor)
    save(tmp_path, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found, notes = converted(tmp_path, 340)
    assert notes == []
    assert {**found, "scores": None} == {**plain, "scores": None}
    merged = {left + right for left, right in json.loads(made.to_str())["model"]["merges"]}
    for token, ours, theirs in zip(found["tokens"], found["scores"], plain["scores"], strict=True):
        assert ours == theirs or token not in merged
    for text in STRINGS[2:]:
        assert encode_as_llama_cpp(found, text) == made.encode(text, add_special_tokens=False).ids
    assert_as_gguf_reads_it(tmp_path, found, 340)


def test_of_two_ways_to_merge_a_token_the_first_gives_its_score(tmp_path):
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    save(tmp_path, Tokenizer(models.BPE(vocab, merges, byte_fallback=True)))
    assert converted(tmp_path, 6)[0]["scores"] == [-3, -3, -3, 0, -1, -2]


@pytest.mark.parametrize(("scheme", "first"), [("first", True), ("always", True), ("never", False)])
def test_metaspace_says_whether_a_blank_stands_first(tmp_path, pieces, scheme, first):
    made = as_tokenizer_json(sentencepiece.SentencePieceProcessor(model_proto=pieces))
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    save(tmp_path, made)
    assert converted(tmp_path, 340)[0]["add_space_prefix"] is first


def test_added_tokens_stand_behind_the_pieces(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    added = {
        "0": {"content": "<unk>", "special": True},
        "2": {"content": "</s>", "special": True},
        "340": {"content": "<|im_end|>", "special": False},
        "341": {"content": "▁word", "special": False},
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found, _ = converted(tmp_path, 342)
    assert found["tokens"][340:] == ["<|im_end|>", " word"]
    assert found["token_type"][340:] == [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    assert found["token_type"][0] == gguf.TokenType.UNKNOWN
    assert (found["eos_token_id"], found["padding_token_id"], found["eot_token_id"]) == (
        340,
        2,
        340,
    )


def test_a_sentencepiece_model_that_normalises_is_noted(tmp_path):
    model = train_pieces(CORPUS, 340, normalization_rule_name="nmt_nfkc")
    (tmp_path / "tokenizer.model").write_bytes(model)
    _, [note] = converted(tmp_path, 340)
    assert "nmt_nfkc, remove_extra_whitespaces=True" in note


# --- what is refused


def refusal(folder: Path, rows: int = 324, **ids: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(folder, rows, **ids)
    assert "\n" not in str(caught.value)
    assert str(folder) not in str(caught.value)
    return str(caught.value)


def test_pieces_of_another_model_are_refused(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    found, _ = converted(tmp_path, 600, bos=1)
    assert found["bos_token_id"] == 1
    assert "its bos is 1, but the model's is 128000" in refusal(tmp_path, 600, bos=128000)


def test_a_vocabulary_that_is_no_table_is_refused(tmp_path):
    folder, _ = llama3(tmp_path)
    record = json.loads((folder / "tokenizer.json").read_text())
    record["model"]["vocab"] = []
    (folder / "tokenizer.json").write_text(json.dumps(record))
    assert "tokenizer.json: its vocabulary is empty" in refusal(folder)


def test_more_tokens_than_rows_are_refused(tmp_path):
    save(tmp_path, byte_level(split(LLAMA3)))
    said = refusal(tmp_path, 323)
    assert "token 323 is '<|eot_id|>', but the embedding has 323 rows" in said


def test_two_tokens_of_one_text_are_refused(tmp_path):
    save(tmp_path, byte_level(split(LLAMA3)))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"324": {"content": SPECIALS[0]}}})
    )
    assert "tokens 320 and 324 are both '<|begin_of_text|>'" in refusal(tmp_path, 325)


BAD_FILES = {
    "nothing": ({}, "no tokenizer.json, tokenizer.model or vocab.json"),
    "no JSON": ({"tokenizer.json": "{"}, "tokenizer.json`: no JSON that can be read"),
    "a list": ({"tokenizer_config.json": "[]"}, "tokenizer_config.json`: expected a JSON object"),
    "deep": ({"tokenizer.json": "[" * 100_000}, "tokenizer.json`: no JSON that can be read"),
    "another model": (
        {"tokenizer.json": '{"model": {"type": "Unigram", "vocab": {}}}'},
        "a Unigram model, expected BPE",
    ),
    "a list for a vocabulary": (
        {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}'},
        "its vocabulary is no map from texts to ids of their own",
    ),
    "text for an id": (
        {"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": "0"}}}'},
        "its vocabulary is no map from texts to ids of their own",
    ),
    "no merges": ({"vocab.json": '{"a": 0}'}, "merges.txt`: missing beside vocab.json"),
    "no sentencepiece": (
        {"tokenizer.model": "IQ== 0\n"},
        "tokenizer.model`: no sentencepiece model",
    ),
    "an added token without text": (
        {
            "tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "byte_fallback": true},'
            '"added_tokens": [{"id": 7}]}'
        },
        "has no text or no id",
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, fault):
    files, message = BAD_FILES[fault]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert message in refusal(tmp_path)


def test_a_unigram_model_is_refused(tmp_path, pieces):
    proto = gguf_vocab.importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(pieces)
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert "not a BPE model" in refusal(tmp_path)


def test_no_torch_is_needed(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from reshard.tokenizers import gguf\n"
        "gguf.run({'folder': sys.argv[1], 'vocab': 340, 'ids': {}}, Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert json.loads((tmp_path / "result.json").read_text())["count"] == 11
