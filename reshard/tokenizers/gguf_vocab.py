"""The tokens of a Hugging Face directory as llama.cpp knows them; no torch is loaded here."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf import TokenType

from reshard.errors import CheckpointError
from reshard.tokenizers import pretokenizers

ADDED_SCORE = -1000.0
SPECIALS = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True, slots=True)
class Token:
    """One token as GGUF holds it."""

    text: str
    kind: int = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the two kinds of tokenizers have: tokens by id, and what is put before a text."""

    model: str
    pre: str
    tokens: Mapping[int, Token]
    merges: Sequence[str] = ()
    blank_first: bool = False
    ids: Mapping[str, int] = field(default_factory=dict)


class Source:
    """The tokenizer files of a directory; one that is not there is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = self.load("tokenizer.json")
        self.config = self.load("tokenizer_config.json")
        self.notes: list[str] = []

    def path(self, name: str) -> Path:
        """A file of the directory."""
        return self.folder / name

    def load(self, name: str) -> dict[str, object]:
        """A file that holds one JSON object."""
        path = self.path(name)
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"`{name}`: no JSON that can be read: {error}") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"`{name}`: expected a JSON object, as transformers writes it")
        return found

    def steps(self, part: str) -> list[dict[str, object]]:
        """The steps of a part of tokenizer.json, one or a sequence."""
        found = record(self.tokenizer.get(part))
        if found.get("type") != "Sequence":
            return [found] if found else []
        held = next((value for value in found.values() if isinstance(value, list)), [])
        return [record(item) for item in held]

    def added(self) -> dict[int, Token]:
        """The tokens that were added to the vocabulary, which are found in a text as they stand."""
        decoder = record(self.config.get("added_tokens_decoder"))
        found = [{"id": number, **record(item)} for number, item in decoder.items()]
        found += map(record, items(self.tokenizer.get("added_tokens")))
        if not found:
            plain = self.load("added_tokens.json")
            found = [{"id": number, "content": text} for text, number in plain.items()]
        return dict(map(_added_token, found))

    def named(self, name: str) -> str | None:
        """The text of a special token, such as bos."""
        key = f"{name}_token"
        found = self.config.get(key) or self.load("special_tokens_map.json").get(key)
        text = record(found).get("content", found)
        return text if isinstance(text, str) else None

    def generation_ids(self) -> dict[str, object]:
        """The ids of special tokens that generation_config.json has, the first of several."""
        found = self.load("generation_config.json")
        ids = {name: found.get(f"{name}_token_id") for name in SPECIALS}
        return {name: next(iter(items(held)), held) for name, held in ids.items()}


def read(source: Source) -> Vocabulary:
    """The vocabulary of a directory; tokenizer.json says of which kind it is."""
    model = record(source.tokenizer.get("model"))
    steps = source.steps("pre_tokenizer") + source.steps("decoder")
    if model:
        vocab = _vocab("tokenizer.json", model.get("vocab"))
        if not vocab and model.get("type") == "BPE":
            raise CheckpointError("tokenizer.json: its vocabulary is empty; complete the download")
        merges = [_merge(item) for item in items(model.get("merges"))]
        if model.get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps):
            return _byte_level(source, vocab, merges, _pre(source))
        if model.get("type") == "BPE" and model.get("byte_fallback"):
            return _fallback(source, vocab, merges)
        raise CheckpointError(
            f"`tokenizer.json`: a {model.get('type')} model, expected BPE of "
            "bytes or with byte_fallback, as Llama and Qwen have it"
        )
    if source.path("tokenizer.model").is_file():
        return _sentencepiece(source)
    if vocab := _vocab("vocab.json", source.load("vocab.json")):
        return _byte_level(
            source, vocab, _merge_lines(source.path("merges.txt")), _pre_of_class(source)
        )
    raise CheckpointError(
        "tokenizer: no tokenizer.json, tokenizer.model or vocab.json with merges.txt"
    )


def _byte_level(
    source: Source, vocab: Mapping[str, int], merges: Sequence[str], pre: str
) -> Vocabulary:
    tokens = {number: Token(text) for text, number in vocab.items()} | source.added()
    steps = source.steps("pre_tokenizer")
    blank_first = any(step.get("add_prefix_space") is True for step in steps)
    if blank_first:
        source.notes.append("llama.cpp puts no blank before a text, as this tokenizer does")
    return Vocabulary("gpt2", pre, tokens, merges, blank_first)


def _pre(source: Source) -> str:
    """llama.cpp's name for how tokenizer.json splits a text."""
    whole = record(source.tokenizer.get("model")).get("ignore_merges") is True
    name, note = pretokenizers.by_steps(source.steps("pre_tokenizer"), whole=whole)
    source.notes += [note] if note else []
    return name


def _pre_of_class(source: Source) -> str:
    """The name by the tokenizer's class, where there is no tokenizer.json."""
    name, note = pretokenizers.by_class(str(source.config.get("tokenizer_class")))
    source.notes += [note] if note else []
    return name


def _fallback(source: Source, vocab: Mapping[str, int], merges: Sequence[str]) -> Vocabulary:
    """A sentencepiece tokenizer that became a tokenizer.json, whose merges stand for scores.

    What is merged first has the highest score. For Llama 2 these are the scores of its own file.
    """
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    unknown = record(source.tokenizer.get("model")).get("unk_token")
    tokens = {
        number: Token(text, _kind(text, unknown), -float(ranks.get(text, len(ranks))))
        for text, number in vocab.items()
    }
    return Vocabulary("llama", "default", _with_added(source, tokens), (), _blank_first(source))


def _kind(text: str, unknown: object) -> int:
    if text == unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _blank_first(source: Source) -> bool:
    """Whether tokenizer.json puts a blank before a text."""
    steps = source.steps("pre_tokenizer")
    scheme = [step.get("prepend_scheme") for step in steps if step.get("type") == "Metaspace"]
    normalizers = source.steps("normalizer")
    prepends = any(step.get("type") == "Prepend" for step in normalizers)
    return prepends or any(said != "never" for said in scheme)


def _sentencepiece(source: Source) -> Vocabulary:
    """The pieces of tokenizer.model, whose kinds have the numbers of GGUF's."""
    path = source.path("tokenizer.model")
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf has its own, outside of all others
        raise CheckpointError(f"`{path.name}`: no sentencepiece model: {error}") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if model.HasField("trainer_spec") and trainer.model_type != trainer.BPE:
        raise CheckpointError(f"`{path.name}`: not a BPE model, which llama.cpp expects of a Llama")
    if normalizer.name not in ("", "identity") or normalizer.remove_extra_whitespaces:
        source.notes.append(
            f"llama.cpp does not normalise a text as this tokenizer does ({normalizer.name}, "
            f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces})"
        )
    pieces = {
        number: Token(item.piece, item.type, item.score) for number, item in enumerate(model.pieces)
    }
    ids = {name: int(getattr(trainer, f"{name}_id")) for name in SPECIALS}
    tokens = _with_added(source, pieces)
    return Vocabulary("llama", "default", tokens, (), normalizer.add_dummy_prefix, ids)


def _with_added(source: Source, tokens: Mapping[int, Token]) -> dict[int, Token]:
    """Tokens with those that were added; what sentencepiece says of one of its own stands."""
    found = dict(tokens)
    for number, token in source.added().items():
        held = found.get(number)
        if held is None or held.text != token.text or held.kind == TokenType.NORMAL:
            found[number] = token
    return found


def _added_token(item: Mapping[str, object]) -> tuple[int, Token]:
    """The id and the token of an added one; only special ones are hidden from a plain text."""
    text, number = item.get("content"), str(item.get("id"))
    if not isinstance(text, str) or not number.isdecimal():
        raise CheckpointError(f"tokenizer: the added token {str(item)[:80]!r} has no text or no id")
    if item.get("special") or (text.startswith("<|") and text.endswith("|>")):
        return int(number), Token(text, TokenType.CONTROL, ADDED_SCORE)
    return int(number), Token(text.replace("▁", " "), TokenType.USER_DEFINED, ADDED_SCORE)


def _vocab(file: str, value: object) -> dict[str, int]:
    found = record(value)
    numbers = {
        text: number for text, number in found.items() if isinstance(number, int) and number >= 0
    }
    if len(numbers) != len(found) or len(set(numbers.values())) != len(found):
        raise CheckpointError(f"`{file}`: its vocabulary is no map from texts to ids of their own")
    return numbers


def _merge(item: object) -> str:
    """Two texts to merge, as llama.cpp has them: one blank between, and none inside."""
    if isinstance(item, list):
        return " ".join(str(part).replace(" ", "Ġ") for part in item)
    return str(item)


def _merge_lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode().splitlines()
    except FileNotFoundError:
        raise CheckpointError(f"`{path.name}`: missing beside vocab.json") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"`{path.name}`: cannot be read: {error}") from None
    return [line for line in lines if line and not line.startswith("#version")]


def record(value: object) -> dict[str, object]:
    """A JSON object; anything else is an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[object]:
    """A JSON array; anything else is an empty one."""
    return value if isinstance(value, list) else []
