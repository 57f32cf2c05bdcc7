"""Tokenizers: from the file that Meta ships to those that transformers and llama.cpp read.

A conversion takes hundreds of MB, so each runs in a process of its own, which takes its task and
arguments as JSON and leaves files in a folder. That process imports this package: nothing in it
may load torch. Messages go into a target's manifest, so they name a file without its place.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import CheckpointError, ReshardError, StorageError

TIKTOKEN, SENTENCEPIECE = "tiktoken", "sentencepiece"
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
HEAD_BYTES = 1 << 12
HEADER, RESULT = "tokenizer.kv", "result.json"
KEYS = "tokenizer.ggml"  # what the names of the keys in a header begin with
HUGGINGFACE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PLACE = re.compile(r"(?<![\w.<|])(?:/[^\s/'\"`:()]+)+/")


class Unavailable(ReshardError):
    """A conversion that cannot be done here, though nothing is wrong; says how it could be."""


@dataclass(frozen=True, slots=True)
class Task:
    """A conversion: its module here, and the packages that it takes."""

    module: str
    packages: tuple[str, ...]


TASKS: Mapping[str, Task] = {
    TIKTOKEN: Task("bpe", ("transformers", "tiktoken")),
    SENTENCEPIECE: Task("spm", ("transformers", "sentencepiece", "protobuf")),
    "header": Task("gguf", ("gguf",)),
}


def kind_of(path: Path) -> str:
    """What a tokenizer.model is: `tiktoken` or `sentencepiece`; anything else is refused."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise StorageError(f"`{path}`: {error.strerror or error}") from None
    if TIKTOKEN_LINE.match(head):
        return TIKTOKEN
    # A protobuf whose first field is a piece, whose first field is its text.
    if len(head) > 3 and head[0] == head[2] == 0x0A and head[1] > head[3]:
        return SENTENCEPIECE
    raise CheckpointError(
        f"`{path.name}`: neither the lines of a tiktoken file nor a sentencepiece model; "
        "complete the download"
    )


def first_line(error: Exception) -> str:
    """What a library says of an error, without the places of files."""
    lines = (line.strip() for line in str(error).splitlines())
    return PLACE.sub("", next(filter(None, lines), type(error).__name__))


@contextlib.contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Whatever a library raises on what a file says, in one line; a disk's faults are not its."""
    try:
        yield
    except (CheckpointError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # each library has its own
        said = first_line(error).replace(str(path), path.name)
        raise CheckpointError(
            f"`{path.name}`: not a {kind} file that can be read ({said}); complete the download"
        ) from None
