"""Inference: vLLM on the Hugging Face directory, Meta's own runner, llama.cpp on GGUF files."""

from reshard.fitting import runners, vllm
from reshard.fitting.case import Case, Wish
from reshard.fitting.gpus import Gpus
from reshard.fitting.memory import ALLOWANCE, kv_bytes_of_all
from reshard.fitting.rows import FallenOut, Row, Section, gib
from reshard.fitting.subject import Subject

TITLE = "INFERENCE"
UNKNOWN = (
    "the model type {kind} is not known here: heads and layers are not, so that neither tensor "
    "parallel sizes nor the KV cache can be told; vLLM says itself what it takes"
)


def section(subject: Subject, gpus: Gpus, wish: Wish) -> Section:
    """The ways to serve a model, best first: all GPUs, the larger tp within a node."""
    if subject.known is None:
        unknown = UNKNOWN.format(kind=subject.model.model_type)
        return Section("inference", TITLE, (unknown,), ())
    case = Case(subject, subject.known, gpus, wish)
    rows: list[Row] = []
    fallen: list[FallenOut] = []
    for ways in (vllm.choices, runners.meta, runners.gguf):
        found, others = ways(case)
        rows += found
        fallen += others
    return Section("inference", TITLE, tuple(_said(case)), tuple(rows), tuple(fallen))


def _said(case: Case) -> list[str]:
    """What holds for all rows, and whether vLLM has too few GPUs, or more than it needs."""
    wish, token, gpus = case.wish, kv_bytes_of_all(case.model), case.gpus
    enough = vllm.enough(case)
    found = [
        f"context {wish.context:,} ({wish.why}), batch {wish.batch:,}: KV cache "
        f"{token / 1024:,.4g} KiB per token, {gib(token * wish.tokens)}",
        f"counted: vLLM takes {vllm.UTILIZATION:g} of each GPU (newer ones 0.92), and of that "
        f"{gib(ALLOWANCE)} are kept for CUDA, NCCL and activations",
    ]
    if wish.context > case.model.max_positions:
        found.append(f"the model has {case.model.max_positions:,} positions; vLLM refuses more")
    if not vllm.choices(case)[0]:
        more = "" if enough is None else f"; {enough} would do"
        short = f"{case.subject.dtype} does not fit vLLM on {gpus} ({gib(gpus.total)}){more}"
        return [short, *found]
    if enough is not None and enough.count == 1 < gpus.count:
        how = f"vllm serve --data-parallel-size {gpus.count}"
        found.append(f"it fits 1 GPU: {gpus.count} copies ({how}) need nothing of each other")
    return found
