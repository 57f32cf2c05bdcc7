"""What all formats share: reading small files safely, and comparing headers with a layout."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reshard import containers, families
from reshard.containers import jsontext, shown
from reshard.encodings import Encoding
from reshard.errors import CheckpointError, ConfigError, LayoutError, some
from reshard.families import Model, carried
from reshard.families.carried import CarriedConfig
from reshard.families.model import Json, ModelConfig
from reshard.formats.options import Options, Scan
from reshard.layout import Parameter

MAX_TEXT_BYTES = 64 << 20
MANIFEST = "reshard.json"
CONFIG = "config.json"
ASSETS = "assets"
TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
# What transformers reads beside the weights.
TRANSFORMERS_ASSETS = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    TOKENIZER_MODEL,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
TOKENIZERS = (TOKENIZER_JSON, TOKENIZER_MODEL, "vocab.json")
# A manifest of 405B as fsdp512 has 1.2 million extents, which are 61 MiB and 5.8 million values;
# reading it takes 6 s and 0.5 GiB.
MAX_MANIFEST_BYTES = 128 << 20
# The bytes and the values that a JSON file may have, by the end of its name. A manifest has five
# values for every extent of every file, an index one for every tensor; a vocabulary of 10^5
# tokens with its merges has 10^6, in texts beyond ASCII. A config has few, and is written again.
MAX_JSON = {
    MANIFEST: (MAX_MANIFEST_BYTES, 8 << 20),
    TOKENIZER_JSON: (4 * MAX_TEXT_BYTES, 8 << 20),
    "vocab.json": (4 * MAX_TEXT_BYTES, 8 << 20),
    ".index.json": (jsontext.MAX_BYTES, jsontext.MAX_VALUES),
    "": (jsontext.MAX_BYTES, 1 << 17),
}


def read_bytes(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """A small file; one that is missing, huge or no plain file is a CheckpointError."""
    try:
        with containers.opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise CheckpointError(f"`{path}`: {size} bytes, expected {most} at most")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"`{path}`: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"`{path}`: {error}") from None


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """A small text file; a missing, huge or undecodable one is a CheckpointError."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"`{path}`: not a text file") from None


def read_json(path: Path) -> dict[str, Json]:
    """A JSON object from a small file, within the bounds of `jsontext`."""
    most_bytes, most_values = next(
        limits for ending, limits in MAX_JSON.items() if path.name.endswith(ending)
    )
    text = read_bytes(path, MAX_MANIFEST_BYTES if path.name == MANIFEST else MAX_TEXT_BYTES)
    try:
        value = jsontext.parse(text, most_bytes=most_bytes, most_values=most_values)
    except ValueError as error:
        raise CheckpointError(f"`{path}`: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}`: holds {type(value).__name__}, expected a JSON object")
    return value


def dump_json(value: Mapping[str, object]) -> bytes:
    """JSON as every output file has it: sorted keys, two blanks, a final newline."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except ValueError:
        raise ConfigError(
            "the model's config has a number that is infinite or none, which JSON does not know; "
            "remove it from config.json"
        ) from None


def config_files(model: Model) -> dict[str, bytes]:
    """config.json, and generation_config.json for a family that is known."""
    if isinstance(model, CarriedConfig):
        return {CONFIG: dump_json(carried.to_hf(model))}
    config = families.to_hf(model)
    ids = {"bos_token_id": model.bos, "eos_token_id": model.eos}
    generation = {**(model.generation or {"_from_model_config": True}), **ids}
    return {CONFIG: dump_json(config), "generation_config.json": dump_json(generation)}


def confined(name: str, origin: str) -> str:
    """A file name that another file gives, which must stay inside the checkpoint's directory."""
    if not containers.is_inside(name):
        raise CheckpointError(
            f"`{origin}`: names the file `{shown(name)}`, which lies outside the checkpoint's "
            "directory, or has no name of a file"
        )
    return name


def manifest_model(root: Path) -> Model | None:
    """The canonical config that an earlier run left in this directory's manifest, if any."""
    if not (root / MANIFEST).is_file():
        return None
    record = read_json(root / MANIFEST).get("model")
    if not isinstance(record, dict):
        return None
    try:
        return families.from_json(record)
    except ConfigError as error:
        raise CheckpointError(f"`{root / MANIFEST}`: {error}") from None


def names_in(folder: Path) -> list[str]:
    """The names of the weights in a Hugging Face directory, by its index; none without one."""
    for index in folder.glob("*.safetensors.index.json"):
        table = read_json(index).get("weight_map")
        return list(table) if isinstance(table, dict) else []
    single = folder / "model.safetensors"
    if single.is_file():
        return list(containers.index("safetensors", folder, single.name).entries)
    return []


def declared(folders: Iterable[Path], key: str) -> Json:
    """What an earlier run noted in its manifest of a target's files, which themselves do not say.

    The first manifest in `folders` that has any such note is taken.
    """
    for folder in folders:
        if (folder / MANIFEST).is_file():
            target = read_json(folder / MANIFEST).get("target")
            found = target.get("declared") if isinstance(target, dict) else None
            if isinstance(found, dict) and key in found:
                return found[key]
    return None


def read_config(path: Path) -> Model:
    """The model of a config.json, of a family that is known or not."""
    return families.read_config(read_json(path), str(path))


def asked_config(options: Options) -> tuple[Model | None, str]:
    """The config that the user named, and where: src.model, else the one in src.assets."""
    if options.model is not None:
        return options.model, "src.model"
    if options.assets is not None and (options.assets / CONFIG).is_file():
        return read_config(options.assets / CONFIG), "src.assets"
    return None, ""


def config_beside(folders: Sequence[Path], options: Options) -> tuple[Model | None, str]:
    """The config of weights that carry none, and the name of where it was found.

    Looked for in src.model, src.assets, and our manifest or a config.json in `folders`. The name
    holds no path: it goes into the manifest, which is the same wherever a job ran.
    """
    known, name = asked_config(options)
    for folder in folders if known is None else ():
        if (known := manifest_model(folder)) is not None:
            return known, MANIFEST
        if (folder / CONFIG).is_file():
            return read_config(folder / CONFIG), CONFIG
    return known, name


def config_for(
    root: Path, options: Options, found: Sequence[int], model_types: Sequence[str] = ("llama",)
) -> tuple[ModelConfig | None, list[str]]:
    """The config for what files do not say: as asked for, else our manifest; and a note on it.

    `found` are hidden size, layers and heads as the files have them, `model_types` those that the
    files may be of. A config that was asked for and is of another size or family is refused, a
    manifest of another is left aside.
    """
    asked, name = asked_config(options)
    known = asked or manifest_model(root)
    if known is None:
        return None, []
    sizes = (known.hidden, known.layers, known.heads) if isinstance(known, ModelConfig) else ()
    of_family = known.model_type in model_types
    if isinstance(known, ModelConfig) and of_family and sizes == tuple(found):
        return known, [f"what the files do not say is from {name or MANIFEST}"]
    if isinstance(asked, ModelConfig) and not of_family:
        raise CheckpointError(
            f"`{root}`: {name} is of a {asked.model_type} model, but the files are of "
            f"{' or '.join(model_types)}"
        )
    if asked is not None:
        has = (
            f"width {sizes[0]}, {sizes[1]} layers and {sizes[2]} heads"
            if sizes
            else f"the model type {known.model_type}, which is not known"
        )
        raise CheckpointError(
            f"`{root}`: {name} has {has}, but the files have {found[0]}, {found[1]} and {found[2]}"
        )
    return None, [f"{MANIFEST} describes another model and is left aside"]


def with_stored_dtypes(
    parameters: Iterable[Parameter], dtypes: Mapping[str, torch.dtype]
) -> tuple[Parameter, ...]:
    """Parameters in the dtype in which the checkpoint stores them."""
    return tuple(
        replace(parameter, dtype=dtypes.get(parameter.name, parameter.dtype))
        for parameter in parameters
    )


def dominant_dtype(dtypes: Iterable[torch.dtype]) -> str:
    """The dtype of most tensors, as config.json spells it."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return max(sorted(set(names)), key=names.count) if names else "bfloat16"


def divisors(*numbers: int) -> list[int]:
    """All common divisors."""
    largest = math.gcd(*numbers)
    small = [value for value in range(1, math.isqrt(largest) + 1) if largest % value == 0]
    return sorted({*small, *(largest // value for value in small)})


def require_plain_heads(model: ModelConfig, name: str) -> None:
    """Refuse heads whose size does not follow from the hidden size: the format cannot say it."""
    if model.heads * model.head_dim != model.hidden:
        raise LayoutError(
            f"{name}: {model.heads} heads of {model.head_dim} are not the hidden size "
            f"{model.hidden}, and {name} has no field for another head size; use --dst hf"
        )


def require_even_heads(model: ModelConfig, name: str) -> None:
    """Refuse to interleave rotary heads that have no two halves."""
    if model.head_dim % 2:
        raise LayoutError(
            f"{name}: rotary heads of {model.head_dim} rows have no two halves; "
            "such a model can be stored in Hugging Face's row order only (--dst hf)"
        )


def require_no_bias(model: ModelConfig, name: str) -> None:
    """Refuse biases, for formats that have no place for them."""
    held = [key for key in ("attention_bias", "mlp_bias") if getattr(model, key)]
    if held:
        raise LayoutError(
            f"{name}: the model has {held[0]}=true, and {name} holds no biases; use --dst hf"
        )


def check_headers(scan: Scan, files: Iterable[str]) -> None:
    """Refuse files whose headers do not hold exactly the stored tensors of the layout."""
    problems = [problem for file in files for problem in header_problems(scan, file)]
    if problems:
        raise CheckpointError(some(problems))


def header_problems(scan: Scan, file: str) -> list[str]:
    """What is wrong with the header of one file, one line each."""
    header = containers.index(scan.layout.container, scan.root, file)
    entries = header.entries
    expected = {content.key: content for content in scan.layout.contents(file)}
    found = [f"`{file}`: tensor `{key}` is missing" for key in expected if key not in entries]
    for key in entries:
        if key not in expected:
            if not scan.ignored(key):
                found.append(
                    f"`{file}`: tensor `{key}` is not part of a {scan.layout.name} checkpoint of "
                    "this model"
                )
            continue
        entry = entries[key]
        weight = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
        if isinstance(scan.model, ModelConfig) and not weight:
            found.append(
                f"`{file}`: tensor `{key}` is {stored_text(entry.dtype, None)}: "
                "quantised, not weights"
            )
        wanted = expected[key]
        if (entry.dtype, entry.shape, entry.encoding) != (
            wanted.dtype,
            wanted.shape,
            wanted.encoding,
        ):
            found.append(
                f"`{file}`: tensor `{key}` is {stored_text(entry.dtype, entry.encoding)} "
                f"{list(entry.shape)}, expected {stored_text(wanted.dtype, wanted.encoding)} "
                f"{list(wanted.shape)}"
            )
    wrong = scan.wrong_metadata(file, header.metadata)
    return [*found, wrong] if wrong else found


def stored_text(dtype: torch.dtype, encoding: Encoding | None) -> str:
    """How elements are stored, in a word."""
    return str(dtype).removeprefix("torch.") if encoding is None else encoding.name
