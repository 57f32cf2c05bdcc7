"""Meta's checkpoints: `consolidated.NN.pth`, one per tensor-parallel rank, and `params.json`.

Rotary rows are interleaved. Replicated tensors stand in every file. With more files than key-value
heads, each head is stored on consecutive ranks and params.json counts the copies (as the 405B in 16
files does). Llama 1 and 2 cut the embedding on dim 1, later generations on dim 0; shapes tell
which.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reshard import containers
from reshard.errors import CheckpointError, LayoutError
from reshard.families import parameters as parameters_of
from reshard.families.model import Json, ModelConfig
from reshard.formats import common, meta_files, meta_params
from reshard.formats.meta_files import FILE
from reshard.formats.meta_params import PARAMS
from reshard.formats.options import Mesh, Options, Scan
from reshard.formats.sampling import equal_head_groups, rows_agree
from reshard.layout import Constant, Content, Layout, Parameter, Slot
from reshard.placement import Cut, Placement, uncut

NAME = "meta"
FAMILIES = ("llama",)
ASSETS = (common.TOKENIZER_MODEL,)
NEEDED = {PARAMS: (PARAMS,), "tokenizer": ASSETS}
SOURCE_KEYS = ("tied", "rope_factor", "version", "instruct")
TARGET_KEYS = ("embedding_dim",)
CONTAINER = "torchfile"
KEYS = {
    "embedding": "tok_embeddings.weight",
    "attention.q": "layers.{layer}.attention.wq.weight",
    "attention.k": "layers.{layer}.attention.wk.weight",
    "attention.v": "layers.{layer}.attention.wv.weight",
    "attention.o": "layers.{layer}.attention.wo.weight",
    "mlp.gate": "layers.{layer}.feed_forward.w1.weight",
    "mlp.up": "layers.{layer}.feed_forward.w3.weight",
    "mlp.down": "layers.{layer}.feed_forward.w2.weight",
    "attention.norm": "layers.{layer}.attention_norm.weight",
    "mlp.norm": "layers.{layer}.ffn_norm.weight",
    "norm": "norm.weight",
    "output": "output.weight",
}
# Of these roles, the shapes in the first layer are read.
SIZED = ("embedding", "attention.q", "attention.k", "mlp.gate", "output")
ROPE_FREQUENCIES = "rope.freqs"


def layout(parameters: Sequence[Parameter], model: ModelConfig, options: Options) -> Layout:
    """One file per tensor-parallel coordinate, every parameter in each."""
    mp = _check(model, options)
    dim = embedding_dim(model, options)
    slots = []
    for parameter in parameters:
        slots.append(
            _slot(parameter, model, mp, dim if parameter.role == "embedding" else parameter.dim)
        )
        if parameter.role == "embedding" and model.tied:
            output = _slot(parameter, model, mp, parameter.dim)
            slots.append(replace(output, key=KEYS["output"]))
    constants = _rope_frequencies(model, slots[0].dtype, mp) if dim == 1 else ()
    return Layout(f"meta{mp}", CONTAINER, mp, tuple(slots), constants)


def _slot(parameter: Parameter, model: ModelConfig, mp: int, dim: int | None) -> Slot:
    """Where one parameter lies in each file."""
    if dim is None:
        cut = uncut(parameter.shape[0], copies=mp)
    elif parameter.role in ("attention.k", "attention.v"):
        step = parameter.shape[0] // min(mp, model.kv_heads)
        cut = Cut(0, parameter.shape[0], step, parts=mp, copies=max(1, mp // model.kv_heads))
    else:
        cut = Cut(dim, parameter.shape[dim], parameter.shape[dim] // mp, parts=mp)
    placement = Placement(
        parameter.shape, cut, interleaved=parameter.head if parameter.rotary else 0
    )
    key = KEYS[parameter.role].format(layer=parameter.layer)
    # Norms of released checkpoints differ between files in the last bits; copied heads never may.
    return Slot(parameter.name, placement, FILE, key, parameter.dtype, strict=dim is not None)


def embedding_dim(model: ModelConfig, options: Options) -> int:
    """The dim on which `tok_embeddings` is cut: as asked, else 1 for Llama 1, 2 and Code Llama."""
    if options.embedding_dim is not None:
        return options.embedding_dim
    return 1 if model.rope_theta in (10000.0, 1000000.0) and model.rope_scaling is None else 0


def notes(model: ModelConfig, options: Options) -> tuple[str, ...]:
    """What the plan says about a target of this format."""
    found = []
    if options.axes.tp > 1:
        dim, asked = embedding_dim(model, options), options.embedding_dim is not None
        why = (
            "as asked for"
            if asked
            else f"by rope_theta {model.rope_theta:g}: Llama {'1/2' if dim else '3'} style"
        )
        found.append(
            f"tok_embeddings cut on dim {dim} ({why}; dst.embedding_dim=0|1 says otherwise)"
        )
    if options.axes.tp > model.kv_heads:
        found.append(
            f"{model.kv_heads} key-value heads on {options.axes.tp} files: "
            f"each stored {options.axes.tp // model.kv_heads} times, params.json says "
            f"n_kv_heads {options.axes.tp}"
        )
    return tuple(found)


def _check(model: ModelConfig, options: Options) -> int:
    """The number of files, which must be one that the model can be cut into."""
    mp = options.axes.tp
    name = f"meta{mp}"
    if (options.axes.pp, options.axes.dp) != (1, 1):
        raise LayoutError(f"{name}: Meta checkpoints have a tp axis only, found {options.axes}")
    common.require_no_bias(model, name)
    common.require_plain_heads(model, name)
    common.require_even_heads(model, name)
    meta_params.require_said(model, name)
    sizes = [model.heads, model.intermediate, model.vocab]
    if embedding_dim(model, options) == 1:
        sizes.append(model.hidden)
    legal = [
        n for n in common.divisors(*sizes) if model.kv_heads % n == 0 or n % model.kv_heads == 0
    ]
    if mp not in legal:
        raise LayoutError(
            f"{name}: {mp} files do not divide {model.heads} heads, {model.kv_heads} key-value "
            f"heads, feed-forward width {model.intermediate} and vocabulary {model.vocab}; "
            f"use one of {legal}"
        )
    return mp


def _rope_frequencies(model: ModelConfig, dtype: torch.dtype, mp: int) -> tuple[Constant, ...]:
    """`rope.freqs`, which Llama 1 and 2 files carry: 1 / theta^(2i/d), in the model's dtype."""
    steps = torch.arange(0, model.head_dim, 2)[: model.head_dim // 2].float() / model.head_dim
    data = bytes((1.0 / model.rope_theta**steps).to(dtype).view(torch.uint8).tolist())
    content = Content(ROPE_FREQUENCIES, dtype, (model.head_dim // 2,))
    return tuple(Constant(FILE.format(shard=shard), content, data) for shard in range(mp))


def detect(path: Path) -> bool:
    """Whether `path` is a directory of this format."""
    return meta_files.is_here(path)


def ignored(key: str) -> bool:
    """Stored tensors that follow from the config."""
    return key == ROPE_FREQUENCIES


def model_of(record: Mapping[str, Json], path: Path) -> ModelConfig | None:
    """The model that a params.json describes, or None for another file."""
    known = "n_heads" in record or "model" in record
    return meta_params.imagine(path) if known else None


def scan(path: Path, options: Options) -> Scan:
    """Read the layout of a directory from its params.json and the header of its first file."""
    params = meta_params.read(path / PARAMS)
    meta_files.refuse_release(path / PARAMS, params)
    files = meta_files.numbered(path, options.mesh.tp if options.mesh else None)
    mp = len(files)
    entries = containers.index(CONTAINER, path, files[0]).entries
    meta_files.refuse_tensors(path / files[0], entries)
    sizes = _sizes(path, files[0], params, mp)
    meta_params.check(path / PARAMS, params, sizes)
    said = meta_params.said(path / PARAMS, options)
    known, noted = common.config_for(path, options, (sizes.hidden, sizes.layers, sizes.heads))
    if known is not None and said.anything:
        known, noted = None, ["what src says of the release goes before a config that is known"]
    model, assumed = meta_params.to_model(path / PARAMS, params, sizes, known=known, said=said)
    assumed = [*noted, *assumed]
    for decide in (_drop_copied_heads, _tie):
        model, lines = decide([path / file for file in files], model, options, known)
        assumed += lines
    common.require_no_bias(model, NAME)
    expected = parameters_of(model)
    dtypes = {
        parameter.name: entries[key].dtype
        for parameter in expected
        if (key := KEYS[parameter.role].format(layer=parameter.layer)) in entries
    }
    model = replace(model, dtype=common.dominant_dtype(dtypes.values()))
    stored = common.with_stored_dtypes(expected, dtypes)
    cut_on_columns = entries[KEYS["embedding"]].shape == (model.vocab, model.hidden // mp)
    options = replace(
        options, mesh=Mesh(tp=mp), embedding_dim=1 if mp > 1 and cut_on_columns else 0
    )
    return Scan(
        NAME,
        model,
        stored,
        _laid_out(layout(stored, model, options), files),
        path,
        options,
        tuple(assumed),
        folders=meta_files.folders(path),
        ignored=ignored,
    )


def _laid_out(made: Layout, files: Sequence[str]) -> Layout:
    """A layout in the files that there are, which may stand in folders of their own."""
    if all(file == FILE.format(shard=shard) for shard, file in enumerate(files)):
        return replace(made, constants=())
    spread = tuple((file, shard) for shard, file in enumerate(files))
    slots = tuple(replace(slot, spread=spread) for slot in made.slots)
    return replace(made, slots=slots, constants=())


def _sizes(path: Path, file: str, params: Mapping[str, Json], mp: int) -> meta_params.Sizes:
    """All sizes, by the shapes in the first of `mp` files; only the head count is params.json's."""
    first, entries = path / file, containers.index(CONTAINER, path, file).entries

    def shape(role: str) -> tuple[int, ...]:
        key = KEYS[role].format(layer=0)
        if key not in entries:
            raise CheckpointError(
                f"`{first}`: tensor `{key}` is missing; this is not a Llama text checkpoint"
            )
        if len(entries[key].shape) != (1 if role == "norm" else 2):
            raise CheckpointError(f"`{first}`: tensor `{key}` has {len(entries[key].shape)} dims")
        return entries[key].shape

    hidden, heads = shape("norm")[0], params["n_heads"]
    if not isinstance(heads, int) or not hidden or hidden % heads:
        raise CheckpointError(
            f"`{path / PARAMS}`: n_heads {heads} does not divide the width {hidden} of norm.weight"
        )
    rows = {role: shape(role)[0] * mp for role in SIZED}
    numbers = (re.fullmatch(r"layers\.(\d{1,5})\..*", key) for key in entries)
    return meta_params.Sizes(
        hidden=hidden,
        layers=1 + max(int(match[1]) for match in numbers if match),
        heads=rows["attention.q"] // (hidden // heads),
        kv_heads=rows["attention.k"] // (hidden // heads),
        head_dim=hidden // heads,
        intermediate=rows["mlp.gate"],
        vocab=rows["output"],
    )


def _drop_copied_heads(
    files: Sequence[Path], model: ModelConfig, options: Options, known: ModelConfig | None
) -> tuple[ModelConfig, list[str]]:
    """Find how often each key-value head is stored: more than once only where each file has one."""
    mp = len(files)
    if mp == 1 or model.kv_heads != mp:
        return model, []
    if known is not None and model.kv_heads % known.kv_heads == 0:
        heads = known.kv_heads
    else:
        keys = [KEYS[role].format(layer=0) for role in ("attention.k", "attention.v")]
        heads = mp // equal_head_groups(files, keys)
    if heads == mp:
        return model, []
    note = (
        f"{heads} key-value heads, each stored {mp // heads} times (layer 0 compared; "
        "the rest while moving)"
    )
    return replace(model, kv_heads=heads), [note]


def _tie(
    files: Sequence[Path], model: ModelConfig, options: Options, known: ModelConfig | None
) -> tuple[ModelConfig, list[str]]:
    """Decide whether the embedding and the output are one parameter; the moving run proves it."""
    if options.tied is not None:
        return replace(model, tied=options.tied), [f"tied={options.tied} as asked for"]
    if known is not None:
        return replace(model, tied=known.tied), []
    first = files[0]
    entries = containers.index(CONTAINER, first.parent, first.name).entries
    embedding, output = entries.get(KEYS["embedding"]), entries.get(KEYS["output"])
    same = (
        embedding is not None
        and output is not None
        and embedding.shape == output.shape
        and rows_agree(first, embedding, output)
    )
    note = (
        "tied embeddings: output.weight equals tok_embeddings.weight where sampled "
        "(src.tied=false says otherwise)"
    )
    return replace(model, tied=same), [note] if same else []


def side_files(model: ModelConfig, layout: Layout, options: Options) -> dict[str, bytes]:
    """params.json; checklist.chk is not written, for an old one would be wrong."""
    return {PARAMS: common.dump_json(meta_params.write(model, options.axes.tp))}
