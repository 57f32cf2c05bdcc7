"""Weights under Hugging Face's names, whatever holds them: which stored key is which parameter."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reshard import families
from reshard.errors import CheckpointError, UndescribedError
from reshard.families import Model
from reshard.families.carried import HEAD, STACKS, CarriedConfig, head_of, published
from reshard.families.model import ModelConfig
from reshard.formats import common
from reshard.formats.options import Options
from reshard.layout import Parameter
from reshard.placement import Placement, uncut

# What wrappers of modules put into the names of what they wrap, anywhere or in front.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
LEADING = ("module.", "_forward_module.")
REFUSED = {
    "_flat_param": "flat parameters of LOCAL_STATE_DICT, which do not say what is in them; save "
    "again with SHARDED_STATE_DICT or FULL_STATE_DICT",
    "flat_param_": "flat parameters of LOCAL_STATE_DICT, which do not say what is in them; save "
    "again with SHARDED_STATE_DICT or FULL_STATE_DICT",
    "lora_A": "LoRA adapters; merge them into the model first (PEFT: merge_and_unload)",
    "lora_embedding_A": "LoRA adapters; merge them into the model first (PEFT: merge_and_unload)",
    "base_model.model.": "PEFT; merge the adapters into the model first (merge_and_unload)",
    "modules_to_save.": "PEFT; merge the adapters into the model first (merge_and_unload)",
    ".base_layer.": "LoRA adapters; merge them into the model first (PEFT: merge_and_unload)",
}
EMBEDDING = "embed_tokens.weight"
# A buffer that old transformers saved with the weights; it follows from the config.
UNUSED_SUFFIX = ".rotary_emb.inv_freq"
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Kept:
    """One stored tensor of a model: its key as stored, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """A model found in stored tensors: `kept` by parameter, and under `head` a tied output.

    `assumed` are lines on what the tensors decided.
    """

    model: Model
    parameters: tuple[Parameter, ...]
    kept: Mapping[str, Kept]
    assumed: tuple[str, ...] = ()


def plain_name(key: str) -> str:
    """A key without what wrappers of modules put into it."""
    for word in WRAPPERS:
        key = key.replace(word, "")
    while key.startswith(LEADING):
        key = key.partition(".")[2]
    return key


def refuse_foreign(keys: Iterable[str], where: str) -> None:
    """Refuse keys of what is not the plain weights of a model."""
    for key in keys:
        for mark, what in REFUSED.items():
            if mark in key:
                raise CheckpointError(f"`{where}`: tensor `{key}` is of {what}")


def whole_tensor(parameter: Parameter) -> Placement:
    """A parameter in one piece."""
    if not parameter.shape:
        return Placement((1,), uncut(1), stored=())
    return Placement(parameter.shape, uncut(parameter.shape[0]))


def embedding_of(parameters: Iterable[Parameter]) -> Parameter | None:
    """The embedding that a tied output is."""
    return next((item for item in parameters if item.role == "embedding"), None)


def described(
    stored: Iterable[Kept], folders: Sequence[Path], options: Options, where: str, advice: str
) -> Weights:
    """The model of stored tensors, by the config that was named or lies in `folders`.

    Without one the checkpoint is refused, with `advice`.
    """
    model, origin = common.config_beside(folders, options)
    if model is None:
        asked = "" if options.assets is None else f", nor in src.assets `{options.assets}`"
        raise UndescribedError(f"`{where}`: no config.json beside the weights{asked}; {advice}")
    if options.tied is not None:
        model = replace(model, tied=options.tied)
    found = identify(stored, model, where)
    if isinstance(found.model, CarriedConfig) and options.assets is not None:
        _require_names_of(options.assets, found, where)
    return replace(found, assumed=(f"model config from {origin}", *found.assumed))


def identify(stored: Iterable[Kept], model: Model, where: str) -> Weights:
    """Find the parameters of `model` in stored tensors; what is missing or too many is refused.

    The vocabulary is that of the tensors. A family that is not known has the parameters that are
    stored, under their released names.
    """
    stored = list(stored)
    refuse_foreign((kept.key for kept in stored), where)
    kept: dict[str, Kept] = {}
    for item in stored:
        name = published(model.model_type, plain_name(item.key))
        if name.endswith(UNUSED_SUFFIX) and isinstance(model, ModelConfig):
            continue
        if name in kept:
            raise CheckpointError(
                f"`{where}`: `{kept[name].key}` and `{item.key}` are both the tensor `{name}`"
            )
        kept[name] = item
    if isinstance(model, CarriedConfig):
        if not kept:
            raise CheckpointError(f"`{where}`: holds no tensors")
        return as_stored(kept, model, where)
    return _of_family(kept, model, where)


def as_stored(kept: Mapping[str, Kept], model: CarriedConfig, where: str) -> Weights:
    """The parameters of an unknown family; a stored output that is tied is the embedding again.

    What every family's config says is held against the tensors: layers and vocabulary.
    """
    _require_layers(kept, model, where)
    embeddings = [name for name in kept if name.endswith(EMBEDDING)]
    embedding, head = embeddings[0] if len(embeddings) == 1 else None, head_of(model.model_type)
    tied = (
        model.tied
        and embedding is not None
        and (head not in kept or kept[head].shape == kept[embedding].shape)
    )
    parameters = tuple(
        Parameter(
            name,
            item.shape,
            "embedding" if name == embedding else "output" if name == head else "other",
            None,
            item.dtype,
        )
        for name, item in kept.items()
        if not (tied and name == head)
    )
    found = replace(model, tied=tied, dtype=_dtype(item.dtype for item in kept.values()))
    said = [f"{model.model_type}: tensors are moved by name, in the order in which they are stored"]
    output = kept.get(head) or (kept[embedding] if tied and embedding is not None else None)
    if output is not None and output.shape and model.vocab not in (None, output.shape[0]):
        rows = output.shape[0]
        said.append(f"vocab_size is {rows} by the tensors, where the config has {model.vocab}")
        found = found.with_vocab(rows)
    return Weights(found, parameters, kept, tuple(said))


def _require_layers(kept: Mapping[str, Kept], model: CarriedConfig, where: str) -> None:
    """Refuse stacks of layers with a gap, or none as deep as the config says."""
    stacks: dict[str, set[int]] = {}
    for name in kept:
        for match in re.finditer(r"\.(\d{1,5})\.", name):
            stack = name[: match.start()]
            if stack.rpartition(".")[2] in STACKS:
                stacks.setdefault(stack, set()).add(int(match[1]))
    for stack, numbers in stacks.items():
        if missing := sorted(set(range(max(numbers))) - numbers):
            raise CheckpointError(f"`{where}`: tensors of `{stack}.{missing[0]}` are missing")
    depths = {max(numbers) + 1 for numbers in stacks.values()}
    if model.layers and depths and not depths & {model.layers, model.layers + model.extra_layers}:
        raise CheckpointError(
            f"`{where}`: the config says {model.layers} layers, but the tensors have "
            f"{' or '.join(map(str, sorted(depths)))}; is it the config of this model?"
        )


def _require_names_of(folder: Path, found: Weights, where: str) -> None:
    """Refuse tensors of other names than the weights in `folder` have, where it has weights."""
    head = head_of(found.model.model_type)
    names = {published(found.model.model_type, name) for name in common.names_in(folder)}
    if not names:
        return
    unused = {name for name in {*names, *found.kept} if name.endswith(UNUSED_SUFFIX)} | {head}
    if missing := sorted(names - set(found.kept) - unused):
        raise CheckpointError(
            f"`{where}`: {len(missing)} tensors are missing that the weights in src.assets "
            f"`{folder}` have, first `{missing[0]}`"
        )
    if extra := sorted(set(found.kept) - names - unused):
        raise CheckpointError(
            f"`{where}`: {len(extra)} tensors are not in the weights in src.assets `{folder}`, "
            f"first `{extra[0]}`; is it the directory of this model?"
        )


def _of_family(kept: Mapping[str, Kept], model: ModelConfig, where: str) -> Weights:
    """The parameters of a known family, all of which must be there."""
    assumed: tuple[str, ...] = ()
    rows = next((kept[name].shape[:1] for name in kept if name.endswith(EMBEDDING)), ())
    if rows and rows[0] != model.vocab:
        assumed = (f"vocab_size is {rows[0]} by the tensors, where the config has {model.vocab}",)
        model = replace(model, vocab=rows[0])
    expected = families.parameters(model)
    names = {parameter.name for parameter in expected}
    if kept and not names & set(kept):
        raise CheckpointError(
            f"`{where}`: no tensor has a name of this {model.model_type}, found `{min(kept)}`; "
            "if the weights are inside another dict, save that one alone"
        )
    if missing := [name for name in names if name not in kept]:
        hint = "; if the output is tied, say src.tied=true" if missing == [HEAD] else ""
        raise CheckpointError(
            f"`{where}`: {len(missing)} tensors are missing, first `{min(missing)}`{hint}"
        )
    known = names | ({HEAD} if model.tied else set())
    if extra := [name for name in kept if name not in known]:
        raise CheckpointError(
            f"`{where}`: {len(extra)} tensors are not part of this {model.model_type}, "
            f"first {', '.join(f'`{name}`' for name in sorted(extra)[:NAMES_SHOWN])}"
        )
    for parameter in expected:
        if kept[parameter.name].shape != parameter.shape:
            raise CheckpointError(
                f"`{where}`: tensor `{kept[parameter.name].key}` is "
                f"{list(kept[parameter.name].shape)}, but the config makes it "
                f"{list(parameter.shape)}"
            )
    dtypes = {name: item.dtype for name, item in kept.items()}
    model = replace(model, dtype=_dtype(dtypes.values()))
    return Weights(model, common.with_stored_dtypes(expected, dtypes), kept, assumed)


def _dtype(dtypes: Iterable[torch.dtype]) -> str:
    """The dtype of most tensors that hold weights."""
    return common.dominant_dtype(dtype for dtype in dtypes if dtype.is_floating_point)
