"""The tokenizer of a Hugging Face directory as key-values of a GGUF header.

Two kinds are known to llama.cpp's llama and qwen2: byte-level BPE, which it calls `gpt2`, and
sentencepiece BPE with byte fallback, `llama`. No torch is loaded here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUFWriter, TokenType

from reshard.errors import CheckpointError
from reshard.tokenizers import HEADER, RESULT, readable
from reshard.tokenizers.gguf_vocab import (
    SPECIALS,
    Source,
    Token,
    Vocabulary,
    items,
    read,
    record,
)

START_BYTES = 24  # of a GGUF file, before its key-values
PAD_SCORE = -10000.0
# Tokens at which llama.cpp ends a turn or a message, if they are there.
END_OF = {"eot": ("<|eot_id|>", "<|im_end|>", "▁<EOT>"), "eom": ("<|eom_id|>",)}


def run(arguments: Mapping[str, object], folder: Path) -> None:
    """Leave the serialised keys in `folder`, and beside them their number and what to tell."""
    with readable(Path("tokenizer"), "tokenizer"):
        _write(arguments, folder)


def _write(arguments: Mapping[str, object], folder: Path) -> None:
    source, rows = Source(Path(str(arguments["folder"]))), int(str(arguments["vocab"]))
    vocabulary = read(source)
    _require_same_begin(record(arguments.get("ids")).get("bos"), vocabulary)
    tokens = padded(vocabulary.tokens, rows)
    # Without an architecture, the writer writes nothing but what is added here.
    writer = GGUFWriter(folder / HEADER, "")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_types([int(token.kind) for token in tokens])
    if vocabulary.model == "llama":
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_merges(vocabulary.merges)
    numbered = (record(arguments.get("ids")), source.generation_ids(), vocabulary.ids)
    _add_specials(writer, source, vocabulary, tokens, numbered)
    writer.add_add_space_prefix(vocabulary.blank_first)
    if template := _template(source) or str(arguments.get("template") or ""):
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    written = (folder / HEADER).read_bytes()
    (folder / HEADER).write_bytes(written[START_BYTES:])
    count = int.from_bytes(written[START_BYTES - 8 : START_BYTES], "little")
    (folder / RESULT).write_text(json.dumps({"count": count, "notes": source.notes}))


def _require_same_begin(bos: object, vocabulary: Vocabulary) -> None:
    """Refuse a sentencepiece model whose texts begin with another token than the model's."""
    own = vocabulary.ids.get("bos", -1)
    if own >= 0 and bos not in (None, own):
        raise CheckpointError(
            f"tokenizer.model: its bos is {own}, but the model's is {bos}; "
            "is it the tokenizer of this model?"
        )


def padded(tokens: Mapping[int, Token], rows: int) -> list[Token]:
    """A token for each row of the embedding; what no token has is an unused one."""
    last = max(tokens, default=-1)
    if last >= rows:
        raise CheckpointError(
            f"tokenizer: token {last} is {tokens[last].text!r}, but the embedding has {rows} "
            "rows; is it the tokenizer of this model?"
        )
    unused = (Token(f"[PAD{row}]", TokenType.UNUSED, PAD_SCORE) for row in range(rows))
    found = [tokens.get(row, token) for row, token in enumerate(unused)]
    seen: dict[str, int] = {}
    for row, token in enumerate(found):
        if seen.setdefault(token.text, row) != row:
            raise CheckpointError(
                f"tokenizer: tokens {seen[token.text]} and {row} are both {token.text!r}, "
                "which llama.cpp does not load"
            )
    return found


def _add_specials(
    writer: GGUFWriter,
    source: Source,
    vocabulary: Vocabulary,
    tokens: Sequence[Token],
    numbered: Sequence[Mapping[str, object]],
) -> None:
    """The ids of tokens with a meaning, and which of them are put around a text.

    A token that the tokenizer's files name stands over the ids in `numbered`, the first of which
    are those of the model's config.
    """
    where = {token.text: number for number, token in enumerate(tokens)}
    around = _around(source)
    ids: dict[str, int] = {}
    for name in SPECIALS:
        said = where.get(source.named(name) or around.get(name, ""))
        for number in (said, *(other.get(name) for other in numbered)):
            if isinstance(number, int) and 0 <= number < len(tokens):
                ids.setdefault(name, number)
    for name, texts in END_OF.items():
        if found := [where[text] for text in texts if text in where]:
            ids[name] = found[0]
    for name, number in ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for name in ("bos", "eos"):
        usual = name == "bos" and not source.tokenizer and vocabulary.model == "llama"
        flag, put = source.config.get(f"add_{name}_token"), around.get(name)
        adds = flag if isinstance(flag, bool) else usual or put is not None
        if adds and (name not in ids or where.get(put or "", ids[name]) != ids[name]):
            source.notes.append(f"llama.cpp does not put {put or name} around a text, as is usual")
            adds = False
        getattr(writer, f"add_add_{name}_token")(adds)


def _around(source: Source) -> dict[str, str]:
    """The special tokens that tokenizer.json puts before (bos) and behind (eos) a text."""
    found = {}
    for step in source.steps("post_processor"):
        single = [record(item) for item in items(step.get("single"))]
        for name, item in zip(("bos", "eos"), (single[:1], single[-1:]), strict=True):
            text = record(item[0].get("SpecialToken")).get("id") if item else None
            if isinstance(text, str):
                found[name] = text
    return found


def _template(source: Source) -> str | list[dict[str, str]] | None:
    """The chat template or templates, from where transformers looks first."""
    file = source.path("chat_template.jinja")
    if file.is_file():
        return file.read_bytes().decode(errors="replace")
    found = source.config.get("chat_template") or source.load("chat_template.json").get(
        "chat_template"
    )
    if isinstance(found, str):
        return found
    return [{key: str(text) for key, text in record(item).items()} for item in items(found)]
