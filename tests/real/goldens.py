"""What transformers' own converter makes of a tiny model of each release, and of a tokenizer.

    python -m tests.real.goldens FOLDER

Runs with transformers 4.45.2 alone, the last whose wheel has convert_llama_weights_to_hf.py. It
knows the releases up to 3.1, and not the scaling of positions: what it gives for 3.1 stands for
3.2 and 3.3 too, and the test has the published values of the rest.
"""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.llama import convert_llama_weights_to_hf as converter

from tests.oracles.releases import TINY, Tiny, model_of
from tests.oracles.texts import texts, write_tiktoken
from tests.real.conversations import CONVERSATIONS, MERGES, SEED, TEXTS, messages

VERSION = "4.45.2"


def main(folder: Path) -> None:
    """Write one file for each release and one for the prompts and tokenizers."""
    assert transformers.__version__ == VERSION, transformers.__version__
    folder.mkdir(parents=True, exist_ok=True)
    for name, tiny in TINY.items():
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            found = converted(tiny, Path(place))
        dump(folder / f"llama-{name}.json", found)
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        found = {version: tokenizer(version, Path(place)) for version in ("3", "3.1")}
    dump(folder / "tokenizers.json", found)


def dump(file: Path, record: dict[str, Any]) -> None:
    """Write JSON as the project has it."""
    file.write_text(
        json.dumps({"transformers": VERSION, **record}, indent=1, sort_keys=True) + "\n"
    )


def converted(tiny: Tiny, place: Path) -> dict[str, Any]:
    """The configs that the converter writes, and the checksum of each tensor."""
    tiny.write(place / "meta")
    converter.write_model(
        model_path=str(place / "hf"),
        input_base_path=str(place / "meta"),
        num_shards=tiny.mp,
        llama_version=tiny.converter,
        vocab_size=model_of(tiny).config["vocab_size"],
        instruct=tiny.instruct,
    )
    configs = ((place / "hf" / f"{name}.json") for name in ("config", "generation_config"))
    config, generation = (json.loads(path.read_text()) for path in configs)
    tensors = load_file(place / "hf" / "model.safetensors")
    # It casts all to bfloat16: only of those that were can the bits be compared.
    sums = {key: checksum(value) for key, value in tensors.items()}
    kept = sums if tiny.dtype == torch.bfloat16 else {}
    return {"config": config, "generation_config": generation, "sha256": kept}


def checksum(tensor: torch.Tensor) -> str:
    """The digest of a tensor's bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def tokenizer(version: str, place: Path) -> dict[str, Any]:
    """What the converter makes of a small tiktoken file, and how its template renders."""
    count = write_tiktoken(place / "tokenizer.model", MERGES, SEED)
    specials = converter.DEFAULT_LLAMA_SPECIAL_TOKENS[version]
    made = converter.write_tokenizer(
        str(place / version), str(place / "tokenizer.model"), version, specials, instruct=True
    )
    some = (specials[0], specials[9], specials[255])
    return {
        "tokens": count,
        "specials": {text: made.convert_tokens_to_ids(text) for text in specials},
        "config": {
            key: value
            for key, value in json.loads(
                (place / version / "tokenizer_config.json").read_text()
            ).items()
            if key not in ("added_tokens_decoder", "chat_template")
        },
        "ids": [made(text).input_ids for text in texts(TEXTS, SEED, some)],
        "prompts": {
            name: made.apply_chat_template(messages(turns), tokenize=False)
            for name, turns in CONVERSATIONS.items()
        },
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
