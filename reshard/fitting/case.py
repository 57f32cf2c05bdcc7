"""A question: which model on which GPUs, and how much of it is to be served."""

from dataclasses import dataclass

from reshard.families.model import ModelConfig
from reshard.fitting.gpus import Gpus
from reshard.fitting.subject import Subject

KV_BLOCK = 16  # tokens; vLLM's cache is cut into blocks of as many
LEAST_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Wish:
    """The context and the batch to be served; `given` is whether the context was asked for."""

    context: int
    batch: int
    given: bool
    why: str

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


@dataclass(frozen=True, slots=True)
class Case:
    """A model of a known family, to be served on GPUs."""

    subject: Subject
    model: ModelConfig
    gpus: Gpus
    wish: Wish
