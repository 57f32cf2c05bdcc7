"""What conversions to transformers have in common: checks, and the files; no torch is loaded here.

All files say `PreTrainedTokenizerFast`: transformers 4.x and 5.x then take tokenizer.json as it is.
Under `LlamaTokenizer`, 5.x makes a tokenizer of its own, which swallows a leading blank.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from reshard.errors import CheckpointError
from reshard.tokenizers import HUGGINGFACE

# What conversions have got wrong: blanks at either end and in runs, line ends, digits, scripts
# without blanks, what normalisation would change, and what no vocabulary has.
PROBES = (
    "",
    " ",
    "Hello, world!",
    "  two  blanks \t and\ttabs   ",
    "\n\n\r\n lines \n",
    "don't 1234567890 3.14e-5",
    "def f(x):\n        return x**2  # ok",
    "Ärger über straße, œuvre, \ufb01n, \uff21\uff22\uff23, e\u0301",
    "Привет, мир! שלום עולם مرحبا",
    "こんにちは世界。今天天气很好 안녕하세요",
    "नमस्ते दुनिया สวัสดี \U0001f600\U0001f469\u200d\U0001f680 \U00010348",
)


@dataclass(frozen=True, slots=True)
class Converted:
    """A tokenizer, its named special tokens, and what tokenizer_config.json says besides."""

    tokenizer: Tokenizer
    named: Mapping[str, str]
    further: Mapping[str, object]


def texts(value: object) -> list[str]:
    """A list of texts from JSON."""
    return [str(item) for item in value] if isinstance(value, list) else []


def add_specials(tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    """Add special tokens, which are found in a text as they stand."""
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in specials]
    )


def check(
    tokenizer: Tokenizer, expected: Callable[[str], list[int]], among: Sequence[str], path: Path
) -> None:
    """Refuse a conversion that gives other ids than the library that the file was made for."""
    probes = (*PROBES, *(f"a {special} b{special}" for special in among))
    for text in probes:
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != (wanted := expected(text)):
            raise CheckpointError(
                f"`{path.name}`: converted, it gives {found} for {text!r}, expected {wanted}; it "
                "normalises or splits text in a way that is not converted here"
            )


def tokens_of(
    tokenizer: Tokenizer,
    arguments: Mapping[str, object],
    path: Path,
    begins: set[int],
    ends: set[int],
) -> tuple[str, str]:
    """The tokens of the model's bos and eos ids, which must be among those of the file.

    Of several that end a text, the last is the end of a turn, at which a chat stops.
    """
    rows, tokens = arguments["vocab"], tokenizer.get_vocab_size()
    if not isinstance(rows, int) or tokens > rows:
        raise CheckpointError(
            f"`{path.name}`: {tokens} tokens, but the model's embedding has {rows} rows; "
            "is it this model's? moved elsewhere, it is left out"
        )
    eos = arguments["eos"]
    said = {
        "bos": ([arguments["bos"]], begins),
        "eos": (eos if isinstance(eos, list) else [eos], ends),
    }
    for name, (ids, known) in said.items():
        if wrong := [number for number in ids if number not in known]:
            raise CheckpointError(
                f"`{path.name}`: the model's {name} is {wrong[0]}, but the tokenizer has "
                f"{' or '.join(map(str, sorted(known)))}; give the model's config with "
                "src.model=FILE"
            )
    bos, end = (str(tokenizer.id_to_token(int(str(ids[-1])))) for ids, _ in said.values())
    return bos, end


def write(converted: Converted, arguments: Mapping[str, object], path: Path, folder: Path) -> None:
    """Write the files of transformers, the same bytes whenever and wherever it is done."""
    tokenizer, named = converted.tokenizer, dict(converted.named)
    if isinstance(pad := arguments["pad"], int):
        if (token := tokenizer.id_to_token(pad)) is None:
            raise CheckpointError(
                f"`{path.name}`: the model's pad is {pad}, which is no token of it"
            )
        named["pad_token"] = token
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    config = {
        **named,
        **converted.further,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": arguments["positions"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if arguments["template"] is not None:
        config["chat_template"] = arguments["template"]
    tokenizer_file, config_file, map_file = (folder / name for name in HUGGINGFACE)
    tokenizer.save(str(tokenizer_file))
    for file, record in ((config_file, config), (map_file, named)):
        file.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
