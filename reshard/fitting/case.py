"""A question: which model on which GPUs, and how much of it is to be served."""

from dataclasses import dataclass

from reshard.families.model import ModelConfig, scaling_type
from reshard.fitting.gpus import Gpus
from reshard.fitting.subject import Subject

KV_BLOCK = 16  # tokens; vLLM's cache is cut into blocks of as many
LEAST_TOKENS = 1024
# Kinds of rotary scaling whose factor comes on top of max_position_embeddings.
STRETCHED = ("linear", "dynamic", "yarn")


@dataclass(frozen=True, slots=True)
class Wish:
    """The context and the batch to be served; `given` is whether the context was asked for."""

    context: int
    batch: int
    given: bool
    why: str

    def beyond(self, model: ModelConfig) -> str | None:
        """Why a model cannot be asked for so long a context, None where it can."""
        most = positions(model)
        if self.context <= most:
            return None
        return f"the model has {most:,} positions, asked for {self.context:,}"

    @property
    def tokens(self) -> int:
        """Tokens in the KV cache at once."""
        return self.context * self.batch

    def served(self, tokens: int) -> int | None:
        """The context for which `tokens` of KV cache suffice; None where that is too short.

        A context that was asked for is not shortened.
        """
        if tokens >= self.tokens:
            return self.context
        longest = tokens // self.batch // KV_BLOCK * KV_BLOCK
        return None if self.given or longest < LEAST_TOKENS else longest


def positions(model: ModelConfig) -> int:
    """Positions that a model has with its rotary scaling.

    Those that vLLM derives (config/model.py, _get_and_verify_max_len), but for yarn with a factor
    that is counted in max_position_embeddings as well.
    """
    most, scaling = model.max_positions, model.rope_scaling or {}
    factor = scaling.get("factor")
    if scaling_type(model) not in STRETCHED or not isinstance(factor, int | float):
        return most
    base = scaling.get("original_max_position_embeddings")
    begun = base if scaling_type(model) == "yarn" and isinstance(base, int) else most
    return max(most, int(begun * factor))


@dataclass(frozen=True, slots=True)
class Case:
    """A model of a known family, to be served on GPUs."""

    subject: Subject
    model: ModelConfig
    gpus: Gpus
    wish: Wish
