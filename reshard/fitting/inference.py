"""Inference: vLLM on the Hugging Face directory, Meta's own runner, llama.cpp on GGUF files."""

from collections.abc import Mapping

from reshard.fitting import runners, vllm
from reshard.fitting.case import Case, Wish
from reshard.fitting.gpus import Gpus
from reshard.fitting.memory import ALLOWANCE, DEFAULT_CONTEXT, kv_bytes_of_all
from reshard.fitting.moving import already
from reshard.fitting.rows import FallenOut, Row, Section, gib
from reshard.fitting.subject import Subject, laid_out
from reshard.formats.options import Options

TITLE = "INFERENCE"
# What becomes of a context that is longer than the model's: vLLM raises a ValueError, the runner of
# Llama 3 asserts at most 8,192 (llama/generation.py), and llama-server caps each slot and warns.
BEYOND: Mapping[str, str] = {
    "vLLM": "vLLM refuses more",
    "meta": "Meta's runner refuses more",
    "gguf": "llama-server cuts the context down to these",
}
UNKNOWN = (
    "the model type {kind} is not known here: heads and layers are not, so that neither tensor "
    "parallel sizes nor the KV cache can be told; vLLM says itself what it takes"
)


def section(subject: Subject, gpus: Gpus, wish: Wish) -> Section:
    """The ways to serve a model, best first: replicas, then all GPUs, the larger tp within a node.

    What serves the wanted context, or a usual one, goes before what has to shorten it further.
    """
    if subject.known is None:
        unknown = UNKNOWN.format(kind=subject.model.model_type)
        return Section("inference", TITLE, (unknown,), ())
    case = Case(subject, subject.known, gpus, wish)
    if (why := wish.beyond(case.model)) is not None:
        outside = tuple(FallenOut(name, f"{why}; {what}") for name, what in BEYOND.items())
        return Section("inference", TITLE, (f"{why}: nothing serves that",), (), outside)
    rows: list[Row] = []
    fallen: list[FallenOut] = []
    for ways in (vllm.choices, runners.meta, runners.gguf):
        found, others = ways(case)
        rows += found
        fallen += others
    usual = min(wish.context, DEFAULT_CONTEXT)
    rows.sort(key=lambda row: row.context is not None and row.context < usual)
    return Section("inference", TITLE, tuple(_said(case)), tuple(rows), tuple(fallen))


def _said(case: Case) -> list[str]:
    """What holds for all rows, and whether vLLM has too few GPUs, or makes replicas of them."""
    wish, token, gpus = case.wish, kv_bytes_of_all(case.model), case.gpus
    found = [
        f"context {wish.context:,} ({wish.why}), batch {wish.batch:,}: KV cache "
        f"{token / 1024:,.4g} KiB per token, {gib(token * wish.tokens)}",
        f"counted: vLLM takes {vllm.UTILIZATION:g} of each GPU (newer ones 0.92), and of that "
        f"{gib(ALLOWANCE)} are kept for CUDA, NCCL and activations",
    ]
    if not vllm.choices(case)[0]:
        enough = vllm.enough(case)
        more = "" if enough is None else f"; {enough} would do"
        short = f"{case.subject.dtype} does not fit vLLM on {gpus} ({gib(gpus.total)}){more}"
        return [short, *found]
    if gpus.count > 1:
        found.append(vllm.rule(case))
    return [*found, *already(case.subject, laid_out(case.subject, "hf", Options()))]
