"""Texts in several scripts, and small tokenizers of the tests' own, of both kinds."""

import base64
import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

SOME = """
the a of and model tokens layer don't it's we'll Hello World 2024 3.14159 1234567 C++ e-mail
straße über Ärger naïve café œuvre señor ação Łódź İstanbul
Привет мир модель слово объём Καλημέρα κόσμε γλώσσα שלום עולם مرحبا بالعالم
こんにちは 世界 トークン 日本語 今天天气很好 机器学习 모델 안녕하세요 세계 नमस्ते दुनिया สวัสดี ชาวโลก
def return lambda self.x[i] += 1 ->{ }; // /* */ #! != && || <s> [INST] \\n \\t
\U0001f600 \U0001f469\u200d\U0001f680 \U0001f1ef\U0001f1f5 \U00010348 e\u0301 \ufb01 \uff21
"""
WORDS = SOME.split()
BLANKS = (
    " ",
    " ",
    " ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u3000",
    "",
)
# How tiktoken's own Llama 3 splits a text before it merges.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts(count: int, seed: int, specials: tuple[str, ...] = ()) -> list[str]:
    """Texts of words in several scripts between runs of blanks, some with special tokens."""
    rng = random.Random(seed)
    found = ["", " ", "   ", "\n", "x", " x", "x "]
    while len(found) < count:
        parts = []
        for _ in range(rng.randint(1, 14)):
            special = specials and rng.random() < 0.15
            parts.append(rng.choice(specials) if special else rng.choice(WORDS))
            parts.append(rng.choice(BLANKS))
        if rng.random() < 0.3:
            parts.insert(0, rng.choice(BLANKS))
        if rng.random() < 0.2:
            parts.append("".join(chr(rng.choice(UNUSUAL)) for _ in range(5)))
        found.append("".join(parts))
    return found


UNUSUAL = [*range(0x20, 0x7F), *range(0xA0, 0x250), *range(0x370, 0x3FF), *range(0x4E00, 0x4E80)]


@cache
def _ranks(merges: int, seed: int) -> tuple[bytes, ...]:
    """The tokens of a byte-level BPE in the order of their ranks."""
    words: Counter[tuple[bytes, ...]] = Counter()
    for text in texts(1500, seed):
        for word in re.findall(r" ?\w+| ?[^\w\s]+|\s+", text):
            words[tuple(bytes([byte]) for byte in word.encode())] += 1
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        pairs = Counter({pair: n for pair, n in pairs.items() if pair[0] + pair[1] not in tokens})
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        words = Counter({_merged(word, best): count for word, count in words.items()})
    return tuple(tokens)


def _merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    found: list[bytes] = []
    place = 0
    while place < len(word):
        both = word[place : place + 2] == pair
        found.append(pair[0] + pair[1] if both else word[place])
        place += 2 if both else 1
    return tuple(found)


def write_tiktoken(path: Path, merges: int = 200, seed: int = 0) -> int:
    """Write a tiktoken file; the number of its tokens."""
    tokens = _ranks(merges, seed)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines))
    return len(tokens)


def write_sentencepiece(path: Path, seed: int = 0, **options: object) -> int:
    """Train and write a sentencepiece model of Llama 2's kind; the number of its pieces."""
    import sentencepiece

    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(text.replace("\n", " ") for text in texts(3000, seed)))
    wanted = {
        "model_type": "bpe",
        "vocab_size": 900,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.995,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path.with_suffix("")),
        num_threads=1,
        minloglevel=2,
        **(wanted | options),
    )
    corpus.unlink()
    made = path.with_suffix(".model")
    if made != path:
        made.rename(path)
    return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
