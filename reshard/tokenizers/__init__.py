"""Tokenizers: from the file that Meta ships to those that transformers and llama.cpp read.

A conversion takes hundreds of MB, so each runs in a process of its own, which takes its task and
arguments as JSON and leaves files in a folder. That process imports this module too: torch, and
all of this program that imports it, is therefore loaded by the caller alone.
"""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reshard.errors import CheckpointError, ReshardError

if TYPE_CHECKING:
    from reshard.families.model import ModelConfig
    from reshard.families.releases import Release

TIKTOKEN, SENTENCEPIECE = "tiktoken", "sentencepiece"
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
HEAD_BYTES = 1 << 12
HEADER = "tokenizer.kv"
HUGGINGFACE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Unavailable(ReshardError):
    """A conversion that cannot be done here, though nothing is wrong; says how it could be."""


@dataclass(frozen=True, slots=True)
class Task:
    """A conversion: its module here, what it makes, and the packages and extra that it takes."""

    module: str
    makes: str
    packages: tuple[str, ...]
    extra: str


TASKS: Mapping[str, Task] = {
    TIKTOKEN: Task("bpe", HUGGINGFACE[0], ("transformers", "tiktoken"), "hf"),
    SENTENCEPIECE: Task("spm", HUGGINGFACE[0], ("transformers", "sentencepiece", "protobuf"), "hf"),
    "header": Task("gguf", "the tokenizer in the header", ("gguf",), "gguf"),
}


def kind_of(path: Path) -> str:
    """What a tokenizer.model is: `tiktoken` or `sentencepiece`; anything else is refused."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"`{path}`: {error.strerror or error}") from None
    if TIKTOKEN_LINE.match(head):
        return TIKTOKEN
    # A protobuf whose first field is a piece, whose first field is its text.
    if len(head) > 3 and head[0] == head[2] == 0x0A and head[1] > head[3]:
        return SENTENCEPIECE
    raise CheckpointError(
        f"`{path}`: neither the lines of a tiktoken file nor a sentencepiece model; "
        "complete the download"
    )


def to_huggingface(model_file: Path, model: "ModelConfig", folder: Path) -> tuple[str, ...]:
    """Convert a tokenizer.model into the files in `folder` that transformers reads; their names."""
    kind = kind_of(model_file)
    known = _recognise(model)
    release, instruct = known or (None, False)
    if kind == TIKTOKEN and (release is None or not release.specials):
        raise Unavailable(
            f"{HUGGINGFACE[0]} is left out: `{model_file}` is a tiktoken file, which names no "
            "special tokens, and the model is no Llama 3; src.assets=DIR takes one from there"
        )
    arguments = {
        "file": str(model_file),
        "vocab": model.vocab,
        "bos": model.bos,
        "eos": model.eos,
        "pad": model.pad,
        "positions": model.max_positions,
        "specials": [] if release is None else list(release.specials),
        "template": release.template if release is not None and instruct else None,
    }
    run_child(kind, arguments, folder)
    return HUGGINGFACE


def to_header(source: Path, rows: int, folder: Path) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Convert the tokenizer files in `source` into the key-values of a GGUF header.

    They are left in `folder`, in the file `HEADER`. Returned are their number and their bytes, and
    what is to be said of them. `rows` are those of the embedding.
    """
    run_child("header", {"folder": str(source), "vocab": rows}, folder)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return (result["count"], (folder / HEADER).stat().st_size), tuple(result["notes"])


def _recognise(model: "ModelConfig") -> "tuple[Release, bool] | None":
    module = importlib.import_module("reshard.families.releases")
    return cast("tuple[Release, bool] | None", module.recognise(model))


def run_child(task: str, arguments: Mapping[str, object], folder: Path) -> None:
    """Run a task of `TASKS` in a process of its own, which leaves its files in `folder`."""
    known = TASKS[task]
    if any(map(_is_missing, known.packages)):
        raise Unavailable(_left_out(known))
    job = {"task": task, "arguments": dict(arguments), "folder": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = _outcome(ended.stdout) if ended.returncode == 0 else {}
    if outcome.get("missing"):
        raise Unavailable(f"{_left_out(known)} ({outcome['missing']})")
    if outcome.get("wrong"):
        raise CheckpointError(str(outcome["wrong"]))
    if not outcome.get("done"):
        said = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"`{arguments.get('file', folder)}`: making {known.makes} of it failed "
            f"(exit code {ended.returncode}): {said}"
        )


def _outcome(printed: str) -> Mapping[str, object]:
    """What the process says at its end; a library may have printed something before."""
    try:
        found = json.loads(printed[printed.rindex("{") :])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _left_out(task: Task) -> str:
    *first, last = task.packages
    needed = f"{', '.join(first)} and {last}" if first else last
    return f"{task.makes} is left out: it needs {needed}; pip install 'reshard[{task.extra}]'"


def _is_missing(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return True
    return False
