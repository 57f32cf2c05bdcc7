"""How engine.memory is shared out: what a plan needs of it, and how large its buffers are. Pure."""

from reshard.buffers import ALIGN
from reshard.errors import ConfigError
from reshard.plan import Plan
from reshard.schedule import ample_capacity, least_capacity

RESERVED_BYTES = 12 << 20
MAX_ROUND_BYTES = 16 << 20


def buffers_of(plan: Plan) -> int:
    """How many buffers a plan needs: three to read, two to write, one per direction of exchange.

    What needs no change is written from where it was read, while two more rounds are read.
    """
    return 5 if plan.exchange == "direct" or plan.world == 1 else 7


def least_memory(plan: Plan, least_capacity: int) -> int:
    """The least engine.memory that a plan can do with, in bytes, rounded up to MiB."""
    return -(-(RESERVED_BYTES + buffers_of(plan) * least_capacity) >> 20) << 20


def planned_memory(memory: int, plan: Plan) -> int:
    """What of `memory` a rank takes, in bytes."""
    return RESERVED_BYTES + buffers_of(plan) * round_bytes(memory, plan)


def round_bytes(memory: int, plan: Plan) -> int:
    """Bytes of `memory` that each buffer gets; too little is refused with the least that works."""
    share = (memory - RESERVED_BYTES) // buffers_of(plan) // ALIGN * ALIGN
    if min(share, MAX_ROUND_BYTES) >= ample_capacity(plan, ALIGN):
        return min(share, MAX_ROUND_BYTES)
    least = least_capacity(plan, ALIGN)
    needed = least_memory(plan, least)
    if memory < needed:
        raise ConfigError(
            f"engine.memory: {memory / (1 << 20):g}MiB is too little for this plan; "
            f"the least that works is {needed >> 20}MiB"
        )
    return max(least, min(MAX_ROUND_BYTES, share))
