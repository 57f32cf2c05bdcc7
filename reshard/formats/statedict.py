"""Whole models in torch files under Hugging Face's names: a source only.

FULL_STATE_DICT files of llama-recipes (`*.pt`) and accelerate (`pytorch_model_fsdp.bin`), and older
Hugging Face directories (`pytorch_model*.bin`, with or without an index).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reshard import containers
from reshard.errors import CheckpointError, LayoutError
from reshard.families import Model
from reshard.families.carried import head_of
from reshard.formats import common, weights
from reshard.formats.options import Chunks, Mesh, Options, Scan
from reshard.layout import Layout, Parameter, Slot
from reshard.placement import uncut

NAME = "statedict"
ANY_FAMILY = True
SOURCE_ONLY = True
FALLBACK = True
ASSETS = common.TRANSFORMERS_ASSETS
NEEDED = {common.CONFIG: (common.CONFIG,), "tokenizer": common.TOKENIZERS}
SOURCE_KEYS = ("tied",)
CONTAINER = "torchfile"
INDEX = "pytorch_model.bin.index.json"
# What trainers leave beside, and what other tools call their files of one rank (see foreign).
NO_WEIGHTS = re.compile(
    r"optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args"
    r"|model_world_size_|mp_rank_|.*zero_pp_rank_"
)
NAMES = ("pytorch_model.bin", "pytorch_model_fsdp.bin")


def layout(parameters: Sequence[Parameter], model: Model, options: Options) -> Layout:
    """Whole tensors where the files hold them."""
    if options.chunks is None:
        raise LayoutError("statedict: is a source only; for a target use --dst hf")
    slots = [_slot(parameter, options.chunks[parameter.name]) for parameter in parameters]
    head, embedding = head_of(model.model_type), weights.embedding_of(parameters)
    if model.tied and embedding is not None and head in options.chunks:
        slots.append(_slot(embedding, options.chunks[head]))
    return Layout(NAME, CONTAINER, 1, tuple(slots))


def _slot(parameter: Parameter, held: Chunks) -> Slot:
    place = weights.whole_tensor(parameter)
    return Slot(parameter.name, place, held.spread[0][0], held.key, held.dtype, spread=held.spread)


def detect(path: Path) -> bool:
    """Whether `path` holds a model in torch files."""
    return bool(_candidates(path))


def _candidates(path: Path) -> list[str]:
    """The names of files that may hold a model: one index, or else single files."""
    if (path / INDEX).is_file():
        return [INDEX]
    named_so = [name for name in NAMES if (path / name).is_file()]
    return named_so or sorted(
        file.name for file in path.glob("*.pt") if not NO_WEIGHTS.match(file.name)
    )


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a directory from its files' headers; the model from a config beside."""
    files = _files(path)
    stored, places = [], {}
    left = [file.name for file in path.glob("optimizer*")]
    for file in files:
        held = containers.index(CONTAINER, path, file)
        left += (f"`{key}`" for key in held.others)
        for key, entry in held.entries.items():
            stored.append(weights.Kept(key, entry.dtype, entry.shape))
            places[key] = file
    advice = (
        "give src.assets=DIR, the Hugging Face directory of the model, or "
        "src.model=NAME|config.json"
    )
    found = weights.described(stored, (path,), options, str(path), advice)
    chunks = {
        name: Chunks(kept.key, kept.dtype, kept.shape, uncut(1), ((places[kept.key], 0),))
        for name, kept in found.kept.items()
    }
    options = replace(options, chunks=chunks, mesh=Mesh())
    return Scan(
        NAME,
        found.model,
        found.parameters,
        layout(found.parameters, found.model, options),
        path,
        options,
        found.assumed,
        tuple(sorted(left)),
        ignored=lambda key: key.endswith(weights.UNUSED_SUFFIX),
    )


def _files(path: Path) -> list[str]:
    """The files that hold the model."""
    names = _candidates(path)
    if not names:
        raise CheckpointError(f"`{path}`: holds no pytorch_model*.bin and no *.pt")
    if len(names) > 1:
        raise CheckpointError(
            f"`{path}`: which file? found {', '.join(names)}; "
            "make a directory that holds one of them alone (a symlink will do)"
        )
    if names != [INDEX]:
        return names
    table = common.read_json(path / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"`{path / INDEX}`: `weight_map` is missing or empty")
    return sorted({common.confined(str(name), str(path / INDEX)) for name in table.values()})
