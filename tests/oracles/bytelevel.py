"""Small byte-level tokenizers of the tests' own, made by the package tokenizers."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567 times; the dog's lazy, isn't it?",
    "Ünïcödé wörds und Straßen, наш текст, 日本語の文章 and    runs  of   blanks\n\n\tand tabs",
    "def quick(fox):\n    return fox.jumps(over='the lazy dog')  # 42\n",
] * 4
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]


def bytes_after(*steps) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, plain])


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return bytes_after(pre_tokenizers.Split(Regex(pattern), "isolated"))


def byte_level(splitter, *, whole=False, specials=SPECIALS, corpus=CORPUS, size=320) -> Tokenizer:
    """A trained byte-level BPE tokenizer of `size` tokens before the special ones."""
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer, made.decoder = splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens(list(specials))
    return made


def save(folder: Path, made: Tokenizer, **config) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama3(folder: Path) -> tuple[Path, Tokenizer]:
    """A directory as those of Llama 3 Instruct: bos first, specials, a word that is user's own."""
    made = byte_level(split(LLAMA3), whole=True)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    bos = (SPECIALS[0], made.token_to_id(SPECIALS[0]))
    template = processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A $B", [bos])
    made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    save(folder, made, bos_token=SPECIALS[0], eos_token={"content": SPECIALS[3]})
    return folder, made
