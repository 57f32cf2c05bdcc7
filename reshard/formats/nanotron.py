"""Nanotron checkpoints: a tree of safetensors files, one per parameter and tensor-parallel rank.

q, k, v and gate, up are fused and cut inside each part. Norms have no rank in their name. The
pipeline stage of a module is in its files' names; stages follow Nanotron's own walk over costs.
Every sharded file says in its header which slices of the whole tensor it holds, and that is checked
against the layout.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from reshard import vocabulary
from reshard.errors import CheckpointError, LayoutError
from reshard.families import from_hf
from reshard.families import parameters as parameters_of
from reshard.families.model import Json, ModelConfig
from reshard.formats import common
from reshard.formats.nanotron_files import (
    Sharded,
    checkpoint_metadata,
    model_config,
    shard_metadata,
    training_config,
    wrong_slices,
)
from reshard.formats.nanotron_tree import (
    FILE,
    KEY,
    SUFFIX,
    check_files,
    is_saved,
    only_entry,
    place_of,
    step,
    topology,
)
from reshard.formats.options import Mesh, Options, Scan
from reshard.layout import Layout, Parameter, Slot
from reshard.placement import Cut, Placement, uncut

NAME = "nanotron"
FAMILIES = ("llama", "qwen2")
ASSETS: tuple[str, ...] = ()
SOURCE_KEYS = ("tied", "rope_interleaved")
TARGET_KEYS = ("rope_interleaved",)
FUSED = (
    ("attention.q", "attention.k", "attention.v"),
    ("attention.q.bias", "attention.k.bias", "attention.v.bias"),
    ("mlp.gate", "mlp.up"),
)
LEFT_BEHIND = {
    "optimizer": "optimizer states and fp32 master weights",
    "lr_scheduler": "learning-rate scheduler",
    "random": "random states",
    "checkpoint_metadata.json": "training counters",
}


def layout(parameters: Sequence[Parameter], model: ModelConfig, options: Options) -> Layout:
    """A file per parameter and tensor-parallel coordinate; data parallelism leaves no trace."""
    _check(model, options)
    mesh = options.axes
    stages = options.stages or assign_stages(model, mesh.pp)
    by_role = {(parameter.layer, parameter.role): parameter for parameter in parameters}
    slots, sharded = [], {}
    for parameter in parameters:
        fused = next((roles for roles in FUSED if parameter.role in roles), (parameter.role,))
        parts = [by_role[parameter.layer, role] for role in fused]
        _require_one_dtype(parts)
        slot = _slot(parameter, parts, mesh, stages[_block(parameter)])
        if options.rope_interleaved and parameter.rotary:
            slot = replace(slot, placement=replace(slot.placement, interleaved=parameter.head))
        slots.append(slot)
        if (dim := parameter.dim) is not None:
            chunks = tuple(part.shape[dim] for part in parts)
            shape = (*parameter.shape[:dim], sum(chunks), *parameter.shape[dim + 1 :])
            sharded[slot.file] = Sharded(chunks, dim, shape)
    name = (
        f"tp{mesh.tp}"
        + (f"pp{mesh.pp}" if mesh.pp > 1 else "")
        + (f"dp{mesh.dp}" if mesh.dp > 1 else "")
    )
    metadata = partial(shard_metadata, sharded, mesh.tp)
    return Layout(name, "safetensors", mesh.tp * mesh.pp, tuple(slots), metadata=metadata)


def _require_one_dtype(parts: Sequence[Parameter]) -> None:
    """Refuse to fuse parameters of different dtypes into one stored tensor."""
    first = parts[0]
    other = next((part for part in parts if part.dtype != first.dtype), None)
    if other is not None:
        raise LayoutError(
            f"Nanotron: `{first.name}` is {first.dtype} and `{other.name}` is {other.dtype}, but "
            "they are one stored tensor; give them one dtype: dst.dtype=bfloat16|float16|float32"
        )


def _slot(parameter: Parameter, parts: Sequence[Parameter], mesh: Mesh, stage: int) -> Slot:
    """Where one parameter lies; `parts` are those fused into its stored tensor, itself included."""
    shape, dim, coordinate = parameter.shape, parameter.dim, stage * mesh.tp
    if dim is None:
        placement, suffix = Placement(shape, uncut(shape[0])), ""
    else:
        cut = Cut(dim, shape[dim], shape[dim] // mesh.tp, parts=mesh.tp)
        local, row = [part.shape[0] // mesh.tp for part in parts], math.prod(shape[1:])
        stored = (sum(local), *shape[1:]) if len(parts) > 1 else None
        placement = Placement(shape, cut, stored, sum(local[: parts.index(parameter)]) * row)
        suffix = SUFFIX.format(stage=stage, pp=mesh.pp, tp=mesh.tp)
    file = FILE.format(**place_of(parameter.role, parameter.layer), suffix=suffix)
    return Slot(parameter.name, placement, file, KEY, parameter.dtype, coordinate)


def _block(parameter: Parameter) -> str:
    """The pipeline block of a parameter: a layer's number, or the role of what is outside."""
    return parameter.role if parameter.layer is None else str(parameter.layer)


def assign_stages(model: ModelConfig, pp: int) -> dict[str, int]:
    """The stage of each pipeline block, by Nanotron's walk (models/base.py, build_model).

    Blocks are placed in order; a block whose cumulative cost passes the stage's share still belongs
    to that stage, and the next one goes on. Only layers and the output, padding included, have a
    cost.
    """
    layer = 4 * model.hidden * model.hidden + 3 * model.intermediate * model.hidden
    costs = {"embedding": 0, **{str(number): layer for number in range(model.layers)}, "norm": 0}
    costs["output"] = model.vocab * model.hidden
    done = list(accumulate(costs.values()))
    stages, stage = {}, 0
    for block, cost in zip(costs, done, strict=True):
        stages[block] = stage
        if cost > done[-1] * (stage + 1) / pp:
            stage += 1
    return stages


def _check(model: ModelConfig, options: Options) -> None:
    """Refuse a mesh that the model cannot be cut into."""
    mesh = options.axes
    name = f"Nanotron tp={mesh.tp} pp={mesh.pp}"
    if model.model_type == "llama":
        common.require_no_bias(model, name)
    common.require_plain_heads(model, name)
    if options.rope_interleaved:
        common.require_even_heads(model, name)
    legal = common.divisors(model.heads, model.kv_heads, model.intermediate)
    if mesh.tp not in legal:
        raise LayoutError(
            f"{name}: tp must divide {model.heads} heads, {model.kv_heads} key-value heads "
            f"and feed-forward width {model.intermediate} (Nanotron does not repeat heads); "
            f"the largest that does is {legal[-1]}"
        )
    if mesh.pp > model.layers + 2:
        raise LayoutError(
            f"{name}: {model.layers} layers have work for {model.layers + 2} stages at most"
        )
    if model.vocab % mesh.tp:
        raise LayoutError(
            f"{name}: tp does not divide the vocabulary of {model.vocab}; "
            f"pad it with dst.vocab_multiple=1 (to {-(-model.vocab // mesh.tp) * mesh.tp} rows), "
            f"or use tp in {common.divisors(model.vocab, legal[-1])}"
        )


def purpose(options: Options) -> str:
    """What a target of this format is for."""
    mesh = options.axes
    return f"Nanotron TP={mesh.tp} PP={mesh.pp}, for training; for inference use --dst hf"


def notes(model: ModelConfig, options: Options) -> tuple[str, ...]:
    """What the plan says about a target of this format."""
    found = [purpose(options)]
    if model.rope_scaling is not None:
        found.append(
            "rope_scaling is stored, but Nanotron does not apply it: "
            "positions beyond the base context differ"
        )
    if model.extras.get("use_sliding_window"):
        found.append("use_sliding_window is left out: Nanotron's attention has no such window")
    if options.rope_interleaved:
        found.append("rotary rows interleaved (rope_interleaved=true)")
    return tuple(found)


def vocab_unit(options: Options) -> int:
    """Nanotron pads to a multiple for each tensor-parallel rank, so that all have as many rows."""
    return (options.vocab_multiple or 1) * options.axes.tp


def detect(path: Path) -> bool:
    """Whether `path` is a step directory, or a run's folder with latest.txt."""
    return (path / "latest.txt").is_file() or (
        (path / "model_config.json").is_file() and (path / "model").is_dir()
    )


def complete(path: Path) -> bool:
    """Whether the run's latest.txt, which is written last, has come to this step."""
    return is_saved(path)


def model_of(record: Mapping[str, Json], path: Path) -> ModelConfig | None:
    """The model that a model_config.json describes, or None for another file."""
    marked = "is_llama_config" in record or "is_qwen2_config" in record
    return _model_of(record, path) if marked else None


def scan(path: Path, options: Options) -> Scan:
    """Read a step directory's layout from model_config.json and its files' names and headers."""
    root = step(path)
    mesh, stages = topology(root, options)
    suffix = SUFFIX.format(stage=stages["embedding"], pp=mesh.pp, tp=mesh.tp)
    entries = root / FILE.format(**place_of("embedding", None), suffix=suffix)
    rows = only_entry(Path(str(entries).format(shard=0))).shape[0] * mesh.tp
    model, interleaved, assumed = _model(root, options, rows)
    stages = {**dict.fromkeys(assign_stages(model, 1), mesh.pp - 1), **stages}
    options = replace(options, mesh=mesh, stages=stages, rope_interleaved=interleaved)
    padded = replace(model, vocab=rows)
    named = layout(parameters_of(padded), padded, options)
    check_files(root, named, mesh)
    dtypes = {
        slot.parameter: only_entry(root / slot.file.format(shard=0)).dtype for slot in named.slots
    }
    model = replace(model, dtype=common.dominant_dtype(dtypes.values()))
    stored = common.with_stored_dtypes(parameters_of(model), dtypes)
    tables = common.with_stored_dtypes(parameters_of(padded), dtypes)
    found = vocabulary.trimmed(layout(tables, padded, options), stored)
    left = tuple(what for name, what in LEFT_BEHIND.items() if (root / name).exists())
    return Scan(
        NAME,
        model,
        stored,
        found,
        root,
        options,
        tuple(assumed),
        left,
        wrong_metadata=partial(wrong_slices, found),
    )


def _model_of(config: Mapping[str, Json], path: Path) -> ModelConfig:
    """A model_config.json as a model; Qwen2 without biases has a Llama's tensors."""
    if config.get("moe_config"):
        raise CheckpointError(f"`{path}`: a Qwen2 model with experts, which is not supported")
    family = {"model_type": "llama", "head_dim": None}
    if config.get("is_qwen2_config") and config.get("attention_bias"):
        family = {"model_type": "qwen2", "head_dim": None, "attention_bias": None}
    model = from_hf({**config, **family}, str(path))
    carried = ("initializer_range", "hidden_act")
    return replace(model, extras={key: config[key] for key in carried if key in config})


def _model(root: Path, options: Options, rows: int) -> tuple[ModelConfig, bool, list[str]]:
    """The model config, whether rotary rows are interleaved, and what was assumed."""
    name = root / "model_config.json"
    config = common.read_json(name)
    interleaved = config.get("rope_interleaved", options.rope_interleaved)
    if interleaved is None:
        raise CheckpointError(
            f"`{name}`: says nothing of rope_interleaved, whose default has changed in Nanotron; "
            "give src.rope_interleaved=true (older) or false"
        )
    if not isinstance(interleaved, bool):
        raise CheckpointError(
            f"`{name}`: rope_interleaved is {reprlib.repr(interleaved)}, expected true or false"
        )
    if options.rope_interleaved is not None and interleaved != options.rope_interleaved:
        raise CheckpointError(
            f"`{name}`: rope_interleaved is {interleaved}, "
            f"but src.rope_interleaved={options.rope_interleaved}"
        )
    model = _model_of(config, name)
    sizes = (model.hidden, model.layers, model.heads)
    known, assumed = common.config_for(root, options, sizes, (model.model_type,))
    if known is not None:
        model = replace(
            known, rope_theta=model.rope_theta, norm_eps=model.norm_eps, tied=model.tied
        )
    if options.vocab is not None:
        model = replace(model, vocab=rows)
    if model.vocab > rows or (known is None and model.vocab != rows):
        raise CheckpointError(
            f"`{name}`: vocab_size {model.vocab}, but the embedding's files hold {rows} rows"
        )
    if model.vocab < rows:
        assumed.append(f"{rows - model.vocab} rows of vocabulary padding dropped")
    if options.tied is not None:
        model = replace(model, tied=options.tied)
    return model, interleaved, assumed


def side_files(model: ModelConfig, layout: Layout, options: Options) -> dict[str, bytes]:
    """What Nanotron starts from: weights only, with optimizer and scheduler loading turned off."""
    config = model_config(model, bool(options.rope_interleaved))
    return {
        "model_config.json": common.dump_json(config),
        "config.yaml": training_config(model, config, options.axes),
        "checkpoint_metadata.json": common.dump_json(checkpoint_metadata(options.axes)),
    }
