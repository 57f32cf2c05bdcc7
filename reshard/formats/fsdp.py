"""Sharded checkpoints of Hugging Face models trained with FSDP: DCP directories.

What llama-recipes, accelerate and the HF Trainer save: Hugging Face's names below a dict `model`,
rows (dim 0) cut by torch.chunk's rule. A source may hold any boxes, as FSDP with tensor parallelism
leaves them, and a model of any family; its config and tokenizer are those beside it, or those of
`src.assets`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reshard.containers import Skeleton, shown
from reshard.errors import LayoutError
from reshard.families import Model, carried
from reshard.families.carried import CarriedConfig
from reshard.formats import common, dcp, weights
from reshard.formats.options import Mesh, Options, Scan
from reshard.layout import Layout, Parameter, Slot
from reshard.placement import chunked

NAME = "fsdp"
ABSENT = "no DCP checkpoint: no .metadata in it or below"
ANY_FAMILY = True
ASSETS = common.TRANSFORMERS_ASSETS
NEEDED = {common.CONFIG: (common.CONFIG,), "tokenizer": common.TOKENIZERS}
SOURCE_KEYS = ("tied",)
TARGET_KEYS = ("wrapper",)
TRAIN_PARAMS = "train_params.yaml"
MAX_PARAMS_BYTES, MAX_PATH_BYTES = 1 << 20, 1 << 10


def layout(parameters: Sequence[Parameter], model: Model, options: Options) -> Layout:
    """A file per data-parallel rank, each with its rows of every parameter."""
    mesh = options.axes
    if options.chunks is None and (mesh.tp, mesh.pp) != (1, 1):
        raise LayoutError(f"fsdp: as a target it has a dp axis only, found {mesh}")
    slots = [_slot(parameter, parameter.name, model, options) for parameter in parameters]
    head, embedding = carried.head_of(model.model_type), weights.embedding_of(parameters)
    twice = options.chunks is None or head in options.chunks
    if model.tied and embedding is not None and twice:
        slots.append(_slot(embedding, head, model, options))
    shards = mesh.dp if options.chunks is None else dcp.coordinates(slots)
    return Layout(f"fsdp{shards}", dcp.CONTAINER, shards, tuple(slots))


def _slot(parameter: Parameter, name: str, model: Model, options: Options) -> Slot:
    """Where a parameter lies, in a directory that exists or in one that is to be made."""
    if options.chunks is not None:
        chunks = options.chunks[name]
        return dcp.existing(chunks, parameter, dcp.place(parameter, chunks.cut))
    placement = dcp.place(parameter, chunked((*parameter.shape, 1)[0], options.axes.dp))
    key = carried.current(model.model_type, name)
    if options.wrapper != "none":
        key = f"{dcp.WRAPPER}.{key}"
    return Slot(parameter.name, placement, dcp.FILE, key, parameter.dtype, boxed=True)


def notes(model: Model, options: Options) -> tuple[str, ...]:
    """What the plan says of a target."""
    below = (
        "without a dict around them"
        if options.wrapper == "none"
        else "below a dict `model`, as accelerate and llama-recipes have them"
    )
    return (f"names {below} (dst.wrapper=model|none)",)


def detect(path: Path) -> bool:
    """Whether `path` is, or leads to, a DCP directory with Hugging Face's names."""
    return dcp.is_titan(path) is False


def complete(path: Path) -> bool:
    """Whether `.metadata` is there, which is written last."""
    return bool(dcp.opened(path, ABSENT).keys)


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a directory from its `.metadata`; the model from a config beside it."""
    found_at = dcp.opened(path, ABSENT)
    root, directory, keys = found_at.root, found_at.directory, found_at.keys
    mesh = options.mesh
    folders = (*dcp.surroundings(path, root), *_trained_from(root))
    stored = [
        weights.Kept(name, directory.tensors[key].dtype, directory.tensors[key].shape)
        for name, key in keys.items()
    ]
    found = weights.described(stored, folders, options, str(root), _advice(root))
    held = dcp.chunks_of(directory, {name: keys[kept.key] for name, kept in found.kept.items()})
    if isinstance(found.model, CarriedConfig):
        dcp.require_said(root, directory)
    bare = set(keys) <= set(directory.tensors)
    options = replace(options, chunks=held, wrapper="none" if bare else "model")
    laid_out = layout(found.parameters, found.model, options)
    return Scan(
        NAME,
        found.model,
        found.parameters,
        laid_out,
        root,
        replace(options, mesh=Mesh(dp=laid_out.coordinates)),
        (
            *dcp.led_to(path, root),
            *found.assumed,
            *dcp.mesh_note(mesh, laid_out.coordinates),
        ),
        tuple(dict.fromkeys((*found_at.left, *dcp.beside(root)))),
        folders=folders,
        ignored=dcp.foreign_to({chunks.key for chunks in held.values()}),
    )


def _trained_from(root: Path) -> tuple[Path, ...]:
    """The directory of the model that llama-recipes began with, where it is one."""
    name = _model_name(root)
    if name is None or not name.isprintable() or len(name.encode()) > MAX_PATH_BYTES:
        return ()
    return (Path(name),) if Path(name).is_dir() else ()


def _model_name(root: Path) -> str | None:
    """The model that train_params.yaml names: a directory, or a model of the hub."""
    if not (root / TRAIN_PARAMS).is_file():
        return None
    for line in common.read_text(root / TRAIN_PARAMS, MAX_PARAMS_BYTES).splitlines():
        key, _, name = line.partition(":")
        if key == "model_name" and name.strip():
            return name.strip().strip("'\"")
    return None


def _advice(root: Path) -> str:
    """Where the config of a model can come from."""
    name = _model_name(root)
    known = f" (it was trained from `{shown(name)}`, by {TRAIN_PARAMS})" if name else ""
    return (
        "give src.assets=DIR, the Hugging Face directory of the model with its config and "
        f"tokenizer{known}, or src.model=NAME|config.json"
    )


def side_files(model: Model, layout: Layout, options: Options) -> dict[str, bytes]:
    """config.json, so that the way back needs no other file."""
    return common.config_files(model)


def closing_files(
    layout: Layout, options: Options, skeleton: Callable[[str], Skeleton]
) -> Mapping[str, Iterator[bytes]]:
    """`.metadata`, which makes the directory a checkpoint."""
    return dcp.metadata(layout, skeleton, None if options.wrapper == "none" else dcp.WRAPPER)
