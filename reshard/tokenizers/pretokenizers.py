"""How a tokenizer splits a text into words before merging, by llama.cpp's names.

llama.cpp has the splitting itself in its code. Its name for it is found by what tokenizer.json
says, not by trying.
"""

from collections.abc import Mapping, Sequence

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _REST = r"[^\r\n\p{L}\p{N}]?", rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
# How a text is split, and whether a word that is a token is never merged: llama.cpp's names.
PRE: Mapping[tuple[str, bool], str] = {
    (_WORDS % r"\p{N}{1,3}", True): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}", False): "smaug-bpe",
    (_WORDS % r"\p{N}", False): "qwen2",
    (_TEKKEN, True): "tekken",
    ("bytes", False): "gpt-2",
    ("digits bytes", False): "smollm",
}
# Of these, llama.cpp has no more than an approximation.
INEXACT = ("tekken",)
PRE_OF_CLASS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}


def by_steps(steps: Sequence[Mapping[str, object]], *, whole: bool) -> tuple[str, str | None]:
    """The name for the steps of a pre-tokenizer, and what is to be said of it.

    `whole` tells whether a word that is a token is taken as it is, whatever the merges say.
    """
    said = " ".join(filter(None, map(_split, steps)))
    # A pattern makes the words, and ByteLevel after it only their bytes.
    said = said.removesuffix(" plain").replace("\r", r"\r").replace("\n", r"\n")
    if (name := PRE.get((said, whole))) is not None:
        elsewhere = f"llama.cpp's `{name}` splits words with combining marks elsewhere"
        return name, elsewhere if name in INEXACT else None
    if (name := PRE.get((said, not whole))) is not None:
        return name, f"llama.cpp's `{name}` treats words that are tokens in another way"
    return "default", (
        "llama.cpp has no name for how this tokenizer splits a text: tokenizer.ggml.pre is "
        "`default`, which may give other tokens"
    )


def _split(step: Mapping[str, object]) -> str:
    """One step of a pre-tokenizer, as `PRE` has it."""
    if step.get("type") == "ByteLevel":
        return "bytes" if step.get("use_regex", True) else "plain"
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    how = step.get("behavior"), bool(step.get("invert"))
    if step.get("type") == "Split" and how in (("Isolated", False), ("Removed", True)):
        pattern = step.get("pattern")
        return str(pattern.get("Regex") if isinstance(pattern, dict) else None)
    return str(step.get("type"))


def by_class(name: str) -> tuple[str, str | None]:
    """The name for a class of transformers, and what is to be said of it."""
    known = name.removesuffix("Fast")
    if known in PRE_OF_CLASS:
        return PRE_OF_CLASS[known], None
    return "default", (
        f"how a {known} splits a text is not known without tokenizer.json: tokenizer.ggml.pre is "
        "`default`, which may give other tokens"
    )
