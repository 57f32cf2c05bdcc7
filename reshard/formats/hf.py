"""Hugging Face directories: safetensors files with an index, whole tensors, and config.json.

Names, shapes and row order are those of the logical parameters. Whether the output is tied to the
embedding is what the config says, never what is missing. config.json is written as transformers 4.x
spells it.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from reshard import containers, families
from reshard.errors import CheckpointError, LayoutError
from reshard.families.model import Json, ModelConfig, from_hf, to_hf
from reshard.formats import common
from reshard.formats.options import Mesh, Options, Scan
from reshard.geometry import Placement, uncut
from reshard.layout import Layout, Parameter, Slot

NAME = "hf"
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "generation_config.json",
)
SOURCE_KEYS = ("tied",)
TARGET_KEYS = ("max_shard_size",)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
# A buffer that old transformers saved with the weights; it follows from the config.
UNUSED_SUFFIX = ".rotary_emb.inv_freq"


def layout(parameters: Sequence[Parameter], model: ModelConfig, options: Options) -> Layout:
    """Whole tensors in `options.files`, or in files filled in order up to `max_shard_bytes`."""
    if options.axes != Mesh():
        raise LayoutError(f"hf: Hugging Face directories have no mesh, found {options.axes}")
    files = options.files or _fill(parameters, options.max_shard_bytes)
    slots = [_slot(parameter, parameter.name, files[parameter.name]) for parameter in parameters]
    if model.tied and HEAD in files:
        embedding = next(parameter for parameter in parameters if parameter.name == EMBEDDING)
        slots.append(_slot(embedding, HEAD, files[HEAD]))
    return Layout(
        "hf", "safetensors", 1, tuple(slots), metadata=lambda template, shard: {"format": "pt"}
    )


def _slot(parameter: Parameter, key: str, file: str) -> Slot:
    template = file.replace("{", "{{").replace("}", "}}")
    return Slot(
        parameter.name,
        Placement(parameter.shape, uncut(parameter.shape[0])),
        template,
        key,
        parameter.dtype,
    )


def _fill(parameters: Sequence[Parameter], limit: int) -> dict[str, str]:
    """Fill files in order; a tensor above the limit has a file of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for parameter in parameters:
        nbytes = (
            Placement(parameter.shape, uncut(parameter.shape[0])).region(0).numel
            * parameter.dtype.itemsize
        )
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


def purpose(options: Options) -> str:
    """What a target of this format is for, where that needs saying."""
    return ""


def notes(model: ModelConfig, options: Options) -> tuple[str, ...]:
    """What the plan says about a target of this format."""
    return ("tied embeddings: no lm_head.weight, config.json says so",) if model.tied else ()


def detect(path: Path) -> bool:
    """Whether `path` is a directory of this format."""
    return (path / INDEX).exists() or (path / SINGLE).exists()


def ignored(key: str) -> bool:
    """Stored tensors that follow from the config."""
    return key.endswith(UNUSED_SUFFIX)


def model_of(record: Mapping[str, Json], path: Path) -> ModelConfig | None:
    """The model that a config.json describes, or None for another file."""
    return from_hf(record, str(path)) if "model_type" in record else None


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a directory from its config.json, its index and its files' headers."""
    if options.mesh not in (None, Mesh()):
        raise LayoutError(f"hf: Hugging Face directories have no mesh, found {options.mesh}")
    assumed = []
    if (path / "config.json").exists():
        model = from_hf(common.read_json(path / "config.json"), str(path / "config.json"))
    elif options.model is not None:
        model = options.model
        assumed.append("model config from src.model")
    else:
        raise CheckpointError(
            f"`{path / 'config.json'}` is missing; give the model's config with src.model=FILE"
        )
    if options.tied is not None:
        model = replace(model, tied=options.tied)
        assumed.append(f"tied={options.tied} as asked for")
    files = _weight_map(path)
    expected = families.parameters(model)
    if missing := [parameter.name for parameter in expected if parameter.name not in files]:
        hint = (
            "; if the output is tied to the embedding, say src.tied=true"
            if missing[0] == HEAD
            else ""
        )
        raise CheckpointError(
            f"`{path}`: {len(missing)} tensors are missing, first `{missing[0]}`{hint}"
        )
    _refuse_unknown(path, files, {parameter.name for parameter in expected}, model)
    dtypes = {
        parameter.name: containers.index(path / files[parameter.name]).entries[parameter.name].dtype
        for parameter in expected
        if parameter.name in containers.index(path / files[parameter.name]).entries
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


def _refuse_unknown(
    path: Path, files: Mapping[str, str], expected: Set[str], model: ModelConfig
) -> None:
    """Refuse tensors that the model has no parameter for: they would be lost without a word."""
    tied = {HEAD} if model.tied else set()
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
        return dict.fromkeys(containers.index(path / SINGLE).entries, SINGLE)
    table = common.read_json(path / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"`{path / INDEX}`: `weight_map` is missing or empty")
    files: dict[str, str] = {}
    for key, file in table.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"`{path / INDEX}`: `{key}` maps to {file!r}, expected a file name"
            )
        files[key] = confined = common.confined(file, str(path / INDEX))
        if not (path / confined).exists():
            raise CheckpointError(f"`{path / INDEX}`: `{key}` is in `{file}`, which is not there")
    return files


def side_files(model: ModelConfig, layout: Layout, options: Options) -> dict[str, bytes]:
    """config.json, generation_config.json, and the index where there are several files."""
    config = {**to_hf(model), "architectures": [families.architecture(model)]}
    generation = {"_from_model_config": True, "bos_token_id": model.bos, "eos_token_id": model.eos}
    made = {
        "config.json": common.dump_json(config),
        "generation_config.json": common.dump_json(generation),
    }
    if len(layout.files) > 1:
        table = {slot.key: slot.file for slot in layout.slots}
        index = {"metadata": {"total_size": layout.total_bytes()}, "weight_map": table}
        made[INDEX] = common.dump_json(index)
    return made
