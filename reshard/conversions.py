"""Which conversion a tokenizer takes, and what it must know of the model: to transformers, to GGUF.

The conversions themselves run in processes of their own, which know nothing of models.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from reshard.errors import CheckpointError
from reshard.families import releases
from reshard.families.model import ModelConfig
from reshard.tokenizers import (
    HEADER,
    HUGGINGFACE,
    RESULT,
    SENTENCEPIECE,
    TASKS,
    TIKTOKEN,
    Unavailable,
    child,
    kind_of,
)

MODEL_FILE = "tokenizer.model"
KEPT_IN_HEADER = "the tokenizer in the header"
# What a tokenizer.model that becomes a header takes besides; of sentencepiece, only the pieces.
READ_WITH = {TIKTOKEN: TASKS[TIKTOKEN].packages, SENTENCEPIECE: ("sentencepiece", "protobuf")}
OnStep = Callable[[], None]


def no_step() -> None:
    """For those who need not say that they get on."""


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is a tiktoken file; what is neither kind is not."""
    try:
        return kind_of(path) == TIKTOKEN
    except CheckpointError:
        return False


def to_huggingface(
    model_file: Path,
    model: ModelConfig,
    folder: Path,
    on_step: OnStep = no_step,
    loses: str = HUGGINGFACE[0],
) -> tuple[str, ...]:
    """Convert a tokenizer.model into the files in `folder` that transformers reads; their names."""
    kind = kind_of(model_file)
    release, _ = releases.recognise(model) or (None, False)
    if kind == TIKTOKEN and (release is None or not release.specials):
        raise Unavailable(
            f"{loses} is left out: `{model_file.name}` is a tiktoken file, which names no special "
            "tokens, and the model is no Llama 3; src.assets=DIR takes one from there"
        )
    arguments = {
        "file": str(model_file),
        "vocab": model.vocab,
        "bos": model.bos,
        "eos": model.eos,
        "pad": model.pad,
        "positions": model.max_positions,
        "specials": [] if release is None else list(release.specials),
        "template": _template(model),
    }
    child.run_child(kind, arguments, folder, loses, on_step)
    return HUGGINGFACE


def to_header(
    held: Mapping[str, Path], model: ModelConfig, folder: Path, on_step: OnStep = no_step
) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Convert tokenizer files, by their names, into the key-values of a GGUF header.

    They are left in `folder`, in the file `HEADER`. Returned are their number and their bytes, and
    what is to be said of them.
    """
    trained = HUGGINGFACE[0] not in held and MODEL_FILE in held
    kind = kind_of(held[MODEL_FILE]) if trained else ""
    further = READ_WITH.get(kind, ())
    child.require((*further, *TASKS["header"].packages), KEPT_IN_HEADER)
    staged = folder / "staged"
    staged.mkdir()
    if kind == TIKTOKEN:
        to_huggingface(held[MODEL_FILE], model, staged, on_step, KEPT_IN_HEADER)
    for name, path in held.items():
        # What the source says stands over what was made here; the links lead into the source, so
        # nothing is written once they are there.
        (staged / name).unlink(missing_ok=True)
        (staged / name).symlink_to(path.resolve())
    arguments = {
        "folder": str(staged),
        "vocab": model.vocab,
        "ids": _ids(model),
        "template": _template(model) if trained else None,
    }
    child.run_child("header", arguments, folder, KEPT_IN_HEADER, on_step, further)
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return (result["count"], (folder / HEADER).stat().st_size), tuple(result["notes"])


def _template(model: ModelConfig) -> str | None:
    """The chat template of an instruct model of a release."""
    release, instruct = releases.recognise(model) or (None, False)
    return release.template if release is not None and instruct else None


def _ids(model: ModelConfig) -> dict[str, int | None]:
    """The ids of special tokens by the model's config, the first of several."""
    eos = model.eos
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    return {"bos": model.bos, "eos": eos, "pad": model.pad}
