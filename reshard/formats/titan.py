"""TorchTitan's Llama checkpoints: DCP directories with Meta's names, below `step-N` of a run.

Names have changed over time, and two parameters or three may be one tensor; all generations are
read, see KEYS. Rotary rows are interleaved, as in Meta's files, unless the maker of a checkpoint
left them as Hugging Face has them (`src.rope=half`). A model's head counts and rotary base are not
in the files: they come from a config.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reshard import families
from reshard.containers import Skeleton
from reshard.errors import CheckpointError, ConfigError, LayoutError
from reshard.families.model import ModelConfig
from reshard.formats import common, dcp, meta_params
from reshard.formats.options import Chunks, Mesh, Options, Scan
from reshard.formats.titan_mesh import tiled
from reshard.layout import Layout, Parameter, Slot
from reshard.placement import Groups, Placement

NAME = "titan"
ABSENT = "no complete step: no step-N with a .metadata"
FAMILIES = ("llama",)
FOLDER = "step-0"
SOURCE_KEYS = ("tied", "rope")
TARGET_KEYS = ("rope", "keys")
# The names of each parameter: as TorchTitan 0.3 writes them, then older ones.
KEYS: Mapping[str, tuple[str, ...]] = {
    "embedding": ("tok_embeddings.weight",),
    "attention.q": ("attention.qkv_linear.wq.weight", "attention.wq.weight"),
    "attention.k": ("attention.qkv_linear.wk.weight", "attention.wk.weight"),
    "attention.v": ("attention.qkv_linear.wv.weight", "attention.wv.weight"),
    "attention.o": ("attention.wo.weight",),
    "mlp.gate": ("feed_forward.w1.weight",),
    "mlp.up": ("feed_forward.w3.weight",),
    "mlp.down": ("feed_forward.w2.weight",),
    "attention.norm": ("attention_norm.weight",),
    "mlp.norm": ("ffn_norm.weight",),
    "norm": ("norm.weight",),
    "output": ("lm_head.weight", "output.weight"),
}
# Native tensors of the fused modules: q, k, v of each key-value head in turn; gate and up stacked.
QKV = ("attention.qkv_linear.wqkv.weight",)
GATE_UP = ("feed_forward.w13.weight", "feed_forward.w13")
FUSED = {
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), QKV),
    **dict.fromkeys(("mlp.gate", "mlp.up"), GATE_UP),
}
GENERATIONS = {"current": 0, "older": -1}
# Follows from the config; a persistent buffer until August 2025.
UNUSED = "freqs_cis"


def layout(parameters: Sequence[Parameter], model: ModelConfig, options: Options) -> Layout:
    """A file per rank of the mesh (dp, tp); rows are cut by tp first and by dp within."""
    mesh = options.axes
    if mesh.pp != 1:
        raise LayoutError(f"titan: as a target it has the axes dp and tp, found {mesh}")
    common.require_no_bias(model, "titan")
    if options.rope != "half":
        common.require_even_heads(model, "titan")
    slots = []
    for parameter in parameters:
        slots.append(_slot(parameter, parameter.role, model, options))
        if parameter.role == "embedding" and model.tied and _stores_head(options):
            slots.append(_slot(parameter, "output", model, options))
    shards = mesh.dp * mesh.tp if options.chunks is None else dcp.coordinates(slots)
    tp = f"tp{mesh.tp}" if options.chunks is None and mesh.tp > 1 else ""
    dp = mesh.dp if options.chunks is None else shards
    return Layout(f"titan{dp}{tp}", dcp.CONTAINER, shards, tuple(slots))


def _stores_head(options: Options) -> bool:
    """Whether a tied output has a tensor of its own: in new directories, as TorchTitan asks for."""
    return options.chunks is None or any(key in options.chunks for key in KEYS["output"])


def _slot(parameter: Parameter, role: str, model: ModelConfig, options: Options) -> Slot:
    """Where a parameter lies, under the name of `role`."""
    interleaved = parameter.head if parameter.rotary and options.rope != "half" else 0
    prefix = "" if parameter.layer is None or role == "output" else f"layers.{parameter.layer}."
    if options.chunks is not None:
        return _existing_slot(parameter, role, prefix, model, options.chunks, interleaved)
    key = prefix + KEYS[role][GENERATIONS[options.keys or "current"]]
    placement, spread = tiled(parameter, options.axes)
    return Slot(
        parameter.name,
        replace(placement, interleaved=interleaved),
        dcp.FILE,
        key,
        parameter.dtype,
        boxed=True,
        spread=spread,
    )


def _existing_slot(
    parameter: Parameter,
    role: str,
    prefix: str,
    model: ModelConfig,
    chunks: Mapping[str, Chunks],
    interleaved: int,
) -> Slot:
    """Where a directory holds a parameter: in a tensor of its own, or in a fused one."""
    for name in (*KEYS[role], *FUSED.get(role, ())):
        if (held := chunks.get(prefix + name)) is None:
            continue
        placement = Placement(parameter.shape, held.cut, interleaved=interleaved)
        if name in QKV:
            placement = _in_groups(placement, role, model)
        elif name in GATE_UP:
            lead = 0 if role == "mlp.gate" else 1
            placement = replace(placement, lead=lead, whole=(2, *parameter.shape))
        return dcp.existing(held, parameter, placement)
    raise LayoutError(
        f"tensor `{prefix}{KEYS[role][0]}` is missing, under this and all older names"
    )


def _in_groups(placement: Placement, role: str, model: ModelConfig) -> Placement:
    """One of q, k, v in a tensor that holds the queries, key and value of each key-value head."""
    head, queries = model.head_dim, model.heads // model.kv_heads
    first = {"attention.q": 0, "attention.k": queries, "attention.v": queries + 1}[role]
    rows = queries * head if role == "attention.q" else head
    stride = (queries + 2) * head
    whole = (model.kv_heads * stride, placement.shape[1])
    return replace(placement, groups=Groups(rows, stride, first * head), whole=whole)


def purpose(options: Options) -> str:
    """What a target is for."""
    mesh = options.axes
    return f"TorchTitan dp={mesh.dp} tp={mesh.tp}, to start training from step 0"


def notes(model: ModelConfig, options: Options) -> tuple[str, ...]:
    """What the plan says of a target."""
    keys = options.keys or "current"
    return (
        f"{purpose(options)}; names as TorchTitan {'0.3' if keys == 'current' else '0.2'} has them "
        "(dst.keys=current|older)",
        _rope_note(options, "dst"),
    )


def declared(options: Options) -> dict[str, str]:
    """The order of rotary rows, which no file of a step says."""
    return {"rope": options.rope or "interleaved"}


def _rope(root: Path, folders: Sequence[Path], options: Options) -> str | None:
    """The order of rotary rows as asked for, which must be what we noted when we wrote them."""
    noted = common.declared(folders, "rope")
    if noted not in ("interleaved", "half") or noted == options.rope:
        return options.rope
    if options.rope is not None:
        raise CheckpointError(
            f"`{root}`: {common.MANIFEST} says that its rotary rows are {noted}, "
            f"but src.rope={options.rope}"
        )
    return str(noted)


def _rope_note(options: Options, side: str) -> str:
    rope = options.rope or "interleaved"
    other = "as Hugging Face has them" if rope == "half" else "as TorchTitan has them"
    return f"rotary rows {rope}, {other} ({side}.rope=interleaved|half)"


def check_place(folder: Path) -> None:
    """Refuse a run's folder in which TorchTitan would resume from another step than the new one."""
    if re.fullmatch(r"step-\d+", folder.name):
        raise ConfigError(
            f"dst.path: `{folder}` looks like a step; name the run's folder, {FOLDER} is made in it"
        )
    for found in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = re.search(r"step-(\d+)", found.name)
        resumable = (dcp.METADATA, "model.safetensors.index.json")
        if match and found.name != FOLDER and any((found / name).exists() for name in resumable):
            raise ConfigError(
                f"`{found}`: TorchTitan would resume from this step and not from {FOLDER}; "
                "give dst.path a folder without steps"
            )


def detect(path: Path) -> bool:
    """Whether `path` is a step, or leads to one, with TorchTitan's names."""
    return dcp.is_titan(path) is True


def complete(path: Path) -> bool:
    """Whether `.metadata` is there, which is written last."""
    return bool(dcp.opened(path, ABSENT).keys)


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a step from its `.metadata`; the model from a config."""
    found_at, mesh = dcp.opened(path, ABSENT), options.mesh
    root = found_at.root
    chunks, left = _stored(found_at)
    folders = tuple(dict.fromkeys((*dcp.surroundings(path, root), root.parent / FOLDER)))
    model, origin = _model(root, folders, options)
    options = replace(options, rope=_rope(root, folders, options))
    assumed = [*dcp.led_to(path, root), f"model config from {origin}", _rope_note(options, "src")]
    if dcp.MARK in chunks and (rows := chunks[dcp.MARK].shape[0]) != model.vocab:
        assumed.append(f"vocab_size is {rows} by the tensors, where the config has {model.vocab}")
        model = replace(model, vocab=rows)
    expected = families.parameters(model)
    options = replace(options, chunks=chunks)
    laid_out = layout(expected, model, options)
    used = {slot.key for slot in laid_out.slots}
    if extra := sorted(held.key for held in chunks.values() if held.key not in used):
        raise CheckpointError(
            f"`{root}`: {len(extra)} tensors are not part of this model, first `{extra[0]}`"
        )
    dtypes = {slot.parameter: slot.dtype for slot in laid_out.slots}
    older = any(key.endswith(names[-1]) for key in used for names in KEYS.values() if names[1:])
    shards = laid_out.coordinates
    return Scan(
        NAME,
        replace(model, dtype=common.dominant_dtype(dtypes.values())),
        common.with_stored_dtypes(expected, dtypes),
        laid_out,
        root,
        replace(options, mesh=Mesh(dp=shards), keys="older" if older else "current"),
        (*assumed, *dcp.mesh_note(mesh, shards)),
        left,
        folders=folders,
        ignored=dcp.foreign_to(used),
    )


def _stored(found: dcp.Opened) -> tuple[dict[str, Chunks], tuple[str, ...]]:
    """What a step holds of each tensor of a model, by its bare name; and what else there is."""
    keys: dict[str, str] = {}
    for name, key in found.keys.items():
        if (bare := dcp.bare(name)) in keys:
            raise CheckpointError(f"`{found.root}`: `{keys[bare]}` and `{key}` are both `{bare}`")
        keys[bare] = key
    used = {name: key for name, key in keys.items() if name.rpartition(".")[2] != UNUSED}
    dropped = () if len(used) == len(keys) else (UNUSED,)
    return dcp.chunks_of(found.directory, used), (*found.left, *dropped)


def _model(root: Path, folders: Sequence[Path], options: Options) -> tuple[ModelConfig, str]:
    """The model by the config that was named or lies beside, config.json or params.json."""
    model, origin = common.config_beside(folders, options)
    for folder in folders if model is None else ():
        if (folder / meta_params.PARAMS).is_file():
            model, origin = meta_params.imagine(folder / meta_params.PARAMS), meta_params.PARAMS
            break
    if model is None:
        raise CheckpointError(
            f"`{root}`: the number of heads and the rotary base are not in the files; give "
            "src.model=NAME|config.json|params.json, or src.assets=DIR with a config.json"
        )
    if not isinstance(model, ModelConfig) or model.model_type not in FAMILIES:
        raise CheckpointError(
            f"`{root}`: {origin}: the model type {model.model_type} is not known to titan"
        )
    return (model if options.tied is None else replace(model, tied=options.tied)), origin


def side_files(model: ModelConfig, layout: Layout, options: Options) -> dict[str, bytes]:
    """config.json, which TorchTitan leaves alone: the way back from later steps finds it here."""
    return {common.CONFIG: common.config_files(model)[common.CONFIG]}


def closing_files(
    layout: Layout, options: Options, skeleton: Callable[[str], Skeleton]
) -> Mapping[str, Iterator[bytes]]:
    """`.metadata`, which makes the directory a checkpoint."""
    return dcp.metadata(layout, skeleton, None)
