"""Inference without vLLM: Meta's own runner with a file per GPU, and llama.cpp with GGUF files."""

from reshard.errors import ConfigError, LayoutError
from reshard.fitting.case import Case
from reshard.fitting.memory import ALLOWANCE, kv_bytes, kv_bytes_of_all
from reshard.fitting.moving import already, checked, moved, where
from reshard.fitting.rows import FallenOut, Row, about, command, gib
from reshard.fitting.subject import laid_out, refusal
from reshard.formats.options import Mesh, Options
from reshard.layout import Layout

ENCODED = ("q8_0", "q4_0")
ALL_LAYERS = 999


def meta(case: Case) -> tuple[list[Row], list[FallenOut]]:
    """Meta's runner on as many GPUs of a node as its layout can have, else on more nodes."""
    per_node, most = case.gpus.per_node, min(case.gpus.count, case.model.heads)
    within = range(min(per_node, most), 0, -1)
    fallen: list[FallenOut] = []
    small: list[FallenOut] = []
    for size in (*within, *range(per_node + 1, most + 1)):
        options = Options(mesh=Mesh(tp=size))
        if (why := refusal(case.subject, "meta", options)) is not None:
            fallen += [FallenOut(f"meta{size}", why)] if size == per_node else []
            continue
        made = laid_out(case.subject, "meta", options)
        # Its runner loads all that stands in a file: a tied output too.
        weights = sum(content.nbytes for content in made.contents(made.files[0]))
        room = case.gpus.memory - ALLOWANCE - weights
        tokens = max(0, room // (case.model.layers * kv_bytes(case.model, size)))
        context = case.wish.served(tokens)
        if context is not None:
            return [_meta_row(case, made, weights, tokens, context)], [*fallen, *small]
        short = f"KV cache for {about(tokens)} tokens beside them, asked for {case.wish.tokens:,}"
        left = f"but {gib(case.gpus.memory - ALLOWANCE)} are left for them"
        why = f"{gib(weights)} of weights per GPU, {short if room > 0 else left}"
        # Of those that do not fit, the first says enough.
        small = small or [FallenOut(made.name, why)]
    return [], [*fallen, *small]


def _meta_row(case: Case, made: Layout, weights: int, tokens: int, context: int) -> Row:
    """Meta's runner with one of its files per GPU."""
    count, per_node = made.coordinates, case.gpus.per_node
    folder = where(case.subject, made, made.name)
    # The runner of Llama 3.1 and later ones has the tokenizer itself, and no such flag.
    scaled = case.model.rope_scaling is not None
    run = command(
        *("torchrun", "--nproc-per-node", min(count, per_node), "example_chat_completion.py"),
        *("--ckpt_dir", folder),
        *(() if scaled else ("--tokenizer_path", f"{folder}/tokenizer.model")),
        *("--max_seq_len", context, "--max_batch_size", case.wish.batch),
    )
    nodes = -(-count // per_node)
    across = () if nodes == 1 else (f"add --nnodes {nodes} and a rendezvous, on each node",)
    return Row(
        name=f"{made.name}, Meta's runner {case.gpus.on(count)}",
        target=made.name,
        gpus=count,
        fits=True,
        said=(
            f"{gib(weights)} of weights per GPU, KV cache for {about(tokens)} tokens",
            *across,
            *already(case.subject, made),
        ),
        commands=(*moved(case.subject, case.gpus, made, made.name), run),
        check=checked(case.subject, made, made.name),
        context=context,
        figures={"weights_bytes": weights, "kv_tokens": tokens, "context": context},
    )


def gguf(case: Case) -> tuple[list[Row], list[FallenOut]]:
    """GGUF files and whether the GPUs of one node hold them, the widest type first.

    llama.cpp gives each GPU some of the layers (--split-mode layer), so that sums are compared.
    """
    rows, fallen = [], []
    room = case.gpus.per_node * (case.gpus.memory - ALLOWANCE)
    for encoding in (None, *ENCODED):
        name = f"gguf {encoding or case.subject.dtype}"
        try:
            made = laid_out(case.subject, "gguf", Options(encoding=encoding))
        except (LayoutError, ConfigError) as error:
            fallen.append(FallenOut(name, str(error)))
            continue
        size = made.total_bytes()
        tokens = max(0, (room - size) // kv_bytes_of_all(case.model))
        context = case.wish.served(tokens)
        if context is not None:
            rows.append(_gguf_row(case, made, encoding, tokens, context))
            continue
        held = f"but {gib(room)} are left on a node's GPUs"
        short = f"KV cache for {about(tokens)} tokens beside it, asked for {case.wish.tokens:,}"
        why = f"a file of {gib(size)}, {held if size >= room else short}"
        fallen.append(FallenOut(name, why))
    return rows, fallen


def _gguf_row(case: Case, made: Layout, encoding: str | None, tokens: int, context: int) -> Row:
    """A file for llama.cpp; `-c` is shared by all `-np` sequences."""
    size, batch = made.total_bytes(), case.wish.batch
    suffix = "gguf" if encoding is None else f"gguf-{encoding}"
    already_there = case.subject.is_already(made) and case.subject.path is not None
    file = (case.subject if already_there else made).files[0]
    run = command(
        *("llama-server", "-m", f"{where(case.subject, made, suffix)}/{file}"),
        *("-ngl", ALL_LAYERS, "-c", context * batch, "-np", batch),
    )
    extra = () if encoding is None else (f"dst.dtype={encoding}",)
    whose = "the GPUs of one node" if case.gpus.nodes > 1 else "the GPUs"
    return Row(
        name=f"gguf {encoding or case.subject.dtype}, llama.cpp",
        target="gguf",
        gpus=case.gpus.per_node,
        fits=True,
        said=(
            f"a file of {gib(size)}; KV cache for {about(tokens)} tokens on {whose}",
            *already(case.subject, made),
        ),
        commands=(*moved(case.subject, case.gpus, made, "gguf", *extra, suffix=suffix), run),
        check=checked(case.subject, made, suffix),
        context=context,
        figures={"file_bytes": size, "kv_tokens": tokens, "context": context},
    )
