"""Hugging Face directories: safetensors files with an index, whole tensors, and config.json.

Names, shapes and row order are those of the logical parameters. Whether the output is tied to the
embedding is what the config says, never what is missing. config.json is written as transformers 4.x
spells it.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from reshard import containers, families
from reshard.containers import shown
from reshard.errors import CheckpointError, LayoutError
from reshard.families import Model, carried
from reshard.families.carried import CarriedConfig
from reshard.families.model import Json, ModelConfig
from reshard.formats import common, weights
from reshard.formats.options import Mesh, Options, Scan
from reshard.layout import Layout, Parameter, Slot

NAME = "hf"
ANY_FAMILY = True
CONTAINER = "safetensors"
ASSETS = common.TRANSFORMERS_ASSETS
NEEDED = {common.CONFIG: (common.CONFIG,), "tokenizer": common.TOKENIZERS}
SOURCE_KEYS = ("tied",)
TARGET_KEYS = ("max_shard_size",)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def layout(parameters: Sequence[Parameter], model: Model, options: Options) -> Layout:
    """Whole tensors in `options.files`, or in files filled in order up to `max_shard_bytes`."""
    if options.axes != Mesh():
        raise LayoutError(f"hf: Hugging Face directories have no mesh, found {options.axes}")
    files = options.files or _fill(parameters, options.max_shard_bytes)
    slots = [_slot(parameter, parameter.name, files[parameter.name]) for parameter in parameters]
    head, embedding = carried.head_of(model.model_type), weights.embedding_of(parameters)
    if model.tied and embedding is not None and head in files:
        slots.append(_slot(embedding, head, files[head]))
    return Layout(
        "hf", CONTAINER, 1, tuple(slots), metadata=lambda template, shard: {"format": "pt"}
    )


def _slot(parameter: Parameter, key: str, file: str) -> Slot:
    template = file.replace("{", "{{").replace("}", "}}")
    return Slot(parameter.name, weights.whole_tensor(parameter), template, key, parameter.dtype)


def _fill(parameters: Sequence[Parameter], limit: int) -> dict[str, str]:
    """Fill files in order; a tensor above the limit has a file of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for parameter in parameters:
        nbytes = math.prod(parameter.shape) * parameter.dtype.itemsize
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(parameter.name)
        filled += nbytes
    if len(groups) == 1:
        return dict.fromkeys(groups[0], SINGLE)
    return {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, 1)
        for name in group
    }


def notes(model: Model, options: Options) -> tuple[str, ...]:
    """What the plan says about a target of this format."""
    return ("tied embeddings: no lm_head.weight, config.json says so",) if model.tied else ()


def detect(path: Path) -> bool:
    """Whether `path` is a directory of this format."""
    return (path / INDEX).exists() or (path / SINGLE).exists()


def complete(path: Path) -> bool:
    """Whether all files of the index are there, in full length; it is written after them."""
    files = _weight_map(path).values() if (path / INDEX).exists() else (SINGLE,)
    return all(containers.index("safetensors", path, file).entries for file in set(files))


def ignored(key: str) -> bool:
    """Stored tensors that follow from the config."""
    return key.endswith(weights.UNUSED_SUFFIX)


def model_of(record: Mapping[str, Json], path: Path) -> Model | None:
    """The model that a config.json describes, or None for another file."""
    return families.read_config(record, str(path)) if "model_type" in record else None


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a directory from its config.json, its index and its files' headers."""
    if options.mesh not in (None, Mesh()):
        raise LayoutError(f"hf: Hugging Face directories have no mesh, found {options.mesh}")
    model, assumed = _model(path, options)
    files = _weight_map(path)
    if isinstance(model, CarriedConfig):
        return _scan_unknown(path, model, files, options, assumed)
    expected = families.parameters(model)
    if missing := [parameter.name for parameter in expected if parameter.name not in files]:
        hint = (
            "; if the output is tied to the embedding, say src.tied=true"
            if missing[0] == carried.HEAD
            else ""
        )
        raise CheckpointError(
            f"`{path}`: {len(missing)} tensors are missing, first `{missing[0]}`{hint}"
        )
    _refuse_unknown(path, files, {parameter.name for parameter in expected}, model)
    dtypes = {
        parameter.name: entries[parameter.name].dtype
        for parameter in expected
        if parameter.name in (entries := _entries(path, files[parameter.name]))
    }
    model = replace(model, dtype=common.dominant_dtype(dtypes.values()))
    stored = common.with_stored_dtypes(expected, dtypes)
    options = replace(options, mesh=Mesh(), files=files)
    return Scan(
        NAME,
        model,
        stored,
        layout(stored, model, options),
        path,
        options,
        tuple(assumed),
        ignored=ignored,
    )


def _model(path: Path, options: Options) -> tuple[Model, list[str]]:
    """The model by its config.json, else by what the user named; and what was assumed."""
    if (path / common.CONFIG).exists():
        model, assumed = common.read_config(path / common.CONFIG), []
    else:
        asked, origin = common.asked_config(options)
        if asked is None:
            raise CheckpointError(
                f"`{path / common.CONFIG}` is missing; "
                "give the model's config with src.model=FILE or src.assets=DIR"
            )
        model, assumed = asked, [f"model config from {origin}"]
    if options.tied is None:
        return model, assumed
    return replace(model, tied=options.tied), [*assumed, f"tied={options.tied} as asked for"]


def _scan_unknown(
    path: Path,
    model: CarriedConfig,
    files: Mapping[str, str],
    options: Options,
    assumed: Sequence[str],
) -> Scan:
    """The layout of a model of a family that is not known: all tensors, as they are stored."""
    kept = {}
    for key, file in files.items():
        entries = _entries(path, file)
        if key not in entries:
            raise CheckpointError(f"`{path / INDEX}`: `{key}` is not in `{file}`")
        name = carried.published(model.model_type, key)
        kept[name] = weights.Kept(key, entries[key].dtype, entries[key].shape)
    found = weights.as_stored(kept, model, str(path))
    by_name = {name: files[item.key] for name, item in kept.items()}
    options = replace(options, mesh=Mesh(), files=by_name)
    laid_out = layout(found.parameters, found.model, options)
    slots = (replace(slot, key=kept[slot.key].key) for slot in laid_out.slots)
    laid_out = replace(laid_out, slots=tuple(slots))
    lines = (*assumed, *found.assumed)
    return Scan(NAME, found.model, found.parameters, laid_out, path, options, lines)


def _entries(path: Path, file: str) -> Mapping[str, containers.Entry]:
    return containers.index(CONTAINER, path, file).entries


def _refuse_unknown(
    path: Path, files: Mapping[str, str], expected: Set[str], model: ModelConfig
) -> None:
    """Refuse tensors that the model has no parameter for: they would be lost without a word."""
    tied = {carried.HEAD} if model.tied else set()
    unknown = [key for key in files if key not in expected | tied and not ignored(key)]
    if unknown:
        raise CheckpointError(
            f"`{path}`: {len(unknown)} tensors are not part of a {model.model_type} model, "
            f"first `{unknown[0]}` in `{files[unknown[0]]}`"
        )


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each stored tensor, from the index or from the only file."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise CheckpointError(f"`{path}`: neither {INDEX} nor {SINGLE} is there")
        return dict.fromkeys(_entries(path, SINGLE), SINGLE)
    table = common.read_json(path / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"`{path / INDEX}`: `weight_map` is missing or empty")
    files: dict[str, str] = {}
    for key, file in table.items():
        if not containers.is_key(key):
            raise CheckpointError(f"`{path / INDEX}`: `{shown(key)}` is no name of a tensor")
        if not isinstance(file, str):
            raise CheckpointError(
                f"`{path / INDEX}`: `{key}` maps to {reprlib.repr(file)}, expected a file name"
            )
        files[key] = confined = common.confined(file, str(path / INDEX))
        if not (path / confined).exists():
            raise CheckpointError(f"`{path / INDEX}`: `{key}` is in `{file}`, which is not there")
    return files


def side_files(model: Model, layout: Layout, options: Options) -> dict[str, bytes]:
    """config.json, generation_config.json, and the index where there are several files."""
    made = common.config_files(model)
    if len(layout.files) > 1:
        table = {slot.key: slot.file for slot in layout.slots}
        index = {"metadata": {"total_size": layout.total_bytes()}, "weight_map": table}
        made[INDEX] = common.dump_json(index)
    return made
