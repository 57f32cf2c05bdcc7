"""Which tensor and pipeline parallel sizes vLLM takes for a model, and what each GPU then holds.

Its rules, from its source (read at v0.8 to the main branch of 2026):

* `tp` divides the attention heads (config/model.py, verify_with_parallel_config), and the
  key-value heads, or is a multiple of them: then each GPU holds a copy of one head
  (model_executor/models/llama.py, LlamaAttention; layers/linear.py, QKVParallelLinear).
* `tp` divides the feed-forward width (layers/linear.py, divide).
* The vocabulary is padded to a multiple of 64, and `tp` divides that
  (layers/vocab_parallel_embedding.py, pad_vocab_size). Norms are on every GPU.
* Layers need not be a multiple of `pp`: those that are left over go to the stages before the last,
  backwards (distributed/utils.py, get_pp_indices). The first stage has the embedding, the last one
  norm and output; tied, both have the table.
* `--gpu-memory-utilization` is 0.92 by default (config/cache.py), 0.9 until 2025; the smaller one
  is counted. Advice on several nodes: tp is the GPUs of a node, pp the nodes (docs, distributed
  serving).
* `--data-parallel-size` replicas of a dense model share nothing, each on tp x pp GPUs of its own;
  Ray places those of several nodes, some on each (docs, data parallel deployment).
"""

import math
from dataclasses import dataclass, replace

from reshard.families.model import ModelConfig
from reshard.fitting.case import Case, positions
from reshard.fitting.gpus import Gpus
from reshard.fitting.memory import ALLOWANCE, kv_bytes, kv_bytes_of_all
from reshard.fitting.meshes import gpus_of, name_of, with_fewer
from reshard.fitting.moving import checked, moved, where
from reshard.fitting.rows import Command, FallenOut, Row, about, command, gib
from reshard.fitting.subject import Subject, laid_out
from reshard.formats.options import Mesh, Options
from reshard.layout import Parameter

UTILIZATION = 0.9
VOCAB_UNIT = 64
KV_ROLES = ("attention.k", "attention.v", "attention.k.bias", "attention.v.bias")


@dataclass(frozen=True, slots=True)
class Load:
    """What the GPUs of a replica hold: `weights` of the fullest stage, and `tokens` of KV cache."""

    weights: int
    room: int
    tokens: int


def refused(model: ModelConfig, split: Mesh) -> str | None:
    """Why vLLM does not take a split, None where it does."""
    tp, kv_heads = split.tp, model.kv_heads
    wrong = []
    if model.heads % tp:
        wrong.append(f"{model.heads} heads")
    if kv_heads % tp and tp % kv_heads:
        wrong.append(f"{kv_heads} kv heads (nor is it a multiple of these)")
    if model.intermediate % tp:
        wrong.append(f"feed-forward width {model.intermediate}")
    if padded_vocabulary(model) % tp:
        wrong.append(f"padded vocabulary {padded_vocabulary(model)}")
    if wrong:
        return f"vLLM: tp {tp} does not divide {', '.join(wrong)}"
    if split.pp > model.layers:
        return f"vLLM: {model.layers} layers have no work for {split.pp} stages"
    return None


def padded_vocabulary(model: ModelConfig) -> int:
    """Rows of the embedding as vLLM has them."""
    return -(-model.vocab // VOCAB_UNIT) * VOCAB_UNIT


def layers_of(layers: int, pp: int) -> list[int]:
    """How many layers each pipeline stage has."""
    found = [layers // pp] * pp
    for number in range(2, layers % pp + 2):
        found[-number] += 1
    return found


def weights_of(subject: Subject, model: ModelConfig, split: Mesh) -> list[int]:
    """Bytes of weights on each GPU of each stage."""
    layer = sum(_cut_bytes(item, model, split.tp) for item in subject.parameters if item.layer == 0)
    outside = {
        item.role: _cut_bytes(item, model, split.tp)
        for item in subject.parameters
        if item.layer is None
    }
    stages = [count * layer for count in layers_of(model.layers, split.pp)]
    stages[0] += outside["embedding"]
    stages[-1] += outside["norm"]
    if not model.tied:
        stages[-1] += outside["output"]
    elif split.pp > 1:
        stages[-1] += outside["embedding"]
    return stages


def _cut_bytes(item: Parameter, model: ModelConfig, tp: int) -> int:
    """Bytes of a parameter on one of `tp` GPUs."""
    elements = math.prod(item.shape)
    if item.role in ("embedding", "output"):
        elements = padded_vocabulary(model) // tp * item.shape[1]
    elif item.role in KV_ROLES:
        elements = elements // model.kv_heads * max(1, model.kv_heads // tp)
    elif item.dim is not None:
        elements //= tp
    return elements * item.dtype.itemsize


def load_of(case: Case, split: Mesh) -> Load:
    """What the GPUs hold, and how many tokens the tightest stage has room for."""
    model = case.model
    usable = int(case.gpus.memory * UTILIZATION) - ALLOWANCE
    weights = weights_of(case.subject, model, split)
    token = [count * kv_bytes(model, split.tp) for count in layers_of(model.layers, split.pp)]
    rooms = [usable - held for held in weights]
    tokens = min(room // each for room, each in zip(rooms, token, strict=True))
    return Load(max(weights), min(rooms), max(0, tokens))


def splits(case: Case) -> list[Mesh]:
    """All GPUs, the larger tp first; then the largest tp there is, on as many as it leaves."""
    count = case.gpus.count
    every = [Mesh(tp, count // tp) for tp in range(count, 0, -1) if count % tp == 0]
    return with_fewer(
        every, case.gpus, case.model.layers, lambda tp: refused(case.model, Mesh(tp)) is None
    )


def replicas(case: Case) -> Mesh | None:
    """Replicas on all GPUs of the smallest group that serves all that is wanted with ease.

    With ease is: as much room for KV cache as for weights. A group is at most half of a node, which
    it divides; one GPU is a group in every node.
    """
    gpus = case.gpus
    for size in range(1, max(1, gpus.per_node // 2) + 1):
        if gpus.per_node % size or size == gpus.count:
            continue
        for tp in range(size, 0, -1):
            split = Mesh(tp, size // tp, gpus.count // size)
            if size % tp or refused(case.model, split) is not None:
                continue
            load = load_of(case, split)
            if load.tokens >= case.wish.tokens and load.room >= load.weights:
                return split
    return None


def rule(case: Case) -> str:
    """When a model is replicated, and whether this one is."""
    ease, found = "as much room for KV cache as for weights", replicas(case)
    if found is not None:
        group = f"{found.tp * found.pp} of a node's {case.gpus.per_node}"
        return f"replicas first, of the fewest GPUs ({group}) with {ease}"
    part = "equal part of a node" if case.gpus.per_node > 1 else "GPU"
    return f"no replicas: no {part} serves this with {ease}"


def choices(case: Case) -> tuple[list[Row], list[FallenOut]]:
    """The splits that serve the model, best first, and why the others do not."""
    rows, fallen = [], []
    copied = replicas(case)
    for split in [*([copied] if copied is not None else ()), *splits(case)]:
        why = _unfit(case, split)
        if why is None:
            rows.append(_row(case, split))
        else:
            fallen.append(FallenOut(name_of(split), why))
    return rows, fallen


def _unfit(case: Case, split: Mesh) -> str | None:
    """Why a split does not serve the model, None where it does."""
    if (why := refused(case.model, split)) is not None:
        return why
    gpus, wish = case.gpus, case.wish
    if gpus.per_node % split.tp and gpus_of(split) == gpus.count:
        return f"vLLM: tp {split.tp} would cross nodes of {gpus.per_node} GPUs, which is slow"
    load = load_of(case, split)
    if wish.served(load.tokens) is not None:
        return None
    if load.room <= 0:
        usable = gib(gpus.memory * UTILIZATION - ALLOWANCE)
        return f"{gib(load.weights)} of weights per GPU, but {usable} are left for them"
    return (
        f"KV cache for {about(load.tokens)} tokens beside {gib(load.weights)} of weights per GPU, "
        f"but context {wish.context:,} x batch {wish.batch:,} is {wish.tokens:,}"
    )


def _row(case: Case, split: Mesh) -> Row:
    """A split that serves the model."""
    model, load, batch = case.model, load_of(case, split), case.wish.batch
    context = case.wish.served(load.tokens) or 0
    most = positions(model)
    longest, largest = min(load.tokens // batch, most), load.tokens // context
    limit = " (all the model has)" if longest == most else ""
    whole = split.dp == 1
    made = laid_out(case.subject, "hf", Options())
    said = (
        f"{gib(load.weights)} of weights and {gib(load.room)} for KV cache per GPU: "
        f"{about(load.tokens)} tokens{'' if whole else ' in each replica'}",
        f"longest context at batch {batch:,}: {longest:,}{limit}; largest batch at "
        f"{context:,}: {'' if whole else f'{split.dp:,} x '}{largest:,}",
        *(("Ray must run on all nodes: ray start",) if gpus_of(split) > case.gpus.per_node else ()),
    )
    return Row(
        name=f"hf, vLLM {_flags(split)} {case.gpus.on(gpus_of(split))}",
        target="hf",
        gpus=gpus_of(split),
        fits=True,
        said=said,
        commands=(
            *moved(case.subject, case.gpus, made, "hf"),
            serve(case, split, where(case.subject, made, "hf"), context),
        ),
        check=checked(case.subject, made, "hf"),
        context=context,
        figures={
            "data_parallel": split.dp,
            "tensor_parallel": split.tp,
            "pipeline_parallel": split.pp,
            "layers": list(layers_of(model.layers, split.pp)),
            "weights_bytes": load.weights,
            "kv_room_bytes": load.room,
            "kv_tokens": load.tokens,
            "kv_bytes_per_token": kv_bytes_of_all(model),
            "context": context,
            "longest_context": longest,
            "largest_batch": largest * split.dp,
        },
    )


def _flags(split: Mesh) -> str:
    """A split as vLLM's short flags have it."""
    sizes = {"tp": split.tp, "pp": split.pp, "dp": split.dp}
    return " ".join(f"-{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "tp")


def serve(case: Case, split: Mesh, folder: str, context: int) -> Command:
    """The command that serves a Hugging Face directory; Ray joins several nodes beforehand."""
    sizes = {"tensor": split.tp, "pipeline": split.pp, "data": split.dp}
    ray: tuple[str | int, ...] = ()
    if gpus_of(split) > case.gpus.per_node:
        here = ("--data-parallel-size-local", split.dp // case.gpus.nodes)
        replicated = (*here, "--data-parallel-backend", "ray")
        ray = replicated if split.dp > 1 else ("--distributed-executor-backend", "ray")
    return command(
        *("vllm", "serve", folder),
        *(word for axis, size in sizes.items() if size > 1 for word in _flag(axis, size)),
        *("--max-model-len", context),
        *ray,
    )


def _flag(axis: str, size: int) -> tuple[str, int]:
    return f"--{axis}-parallel-size", size


def enough(case: Case) -> Gpus | None:
    """The fewest GPUs of this kind that serve the model, in nodes of at most 8."""
    sizes = [(1, count) for count in range(1, 9)] + [(nodes, 8) for nodes in range(2, 65)]
    for nodes, per_node in sizes:
        more = replace(case, gpus=replace(case.gpus, nodes=nodes, per_node=per_node))
        if any(_unfit(more, split) is None for split in splits(more)):
            return more.gpus
    return None
