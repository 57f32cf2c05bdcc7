"""How engine.memory is shared out: what a plan needs of it, and how large its buffers are. Pure."""

from reshard.buffers import ALIGN, CROSSING, READING, WRITING
from reshard.errors import ConfigError
from reshard.plan import Plan
from reshard.schedule import ample_capacity, least_capacity

RESERVED_BYTES = 12 << 20
MAX_ROUND_BYTES = 16 << 20


def buffers_of(plan: Plan) -> int:
    """How many buffers a plan needs: to read, to write, and one per direction of exchange."""
    crossing = plan.exchange == "collective" and plan.world > 1
    return READING + WRITING + (CROSSING if crossing else 0)


def reserved_bytes(plan: Plan) -> int:
    """What the plan takes, and all that is no buffer."""
    return RESERVED_BYTES + plan.crews.nbytes


def least_memory(plan: Plan, least_capacity: int) -> int:
    """The least engine.memory that a plan can do with, in bytes, rounded up to MiB."""
    return -(-(reserved_bytes(plan) + buffers_of(plan) * least_capacity) >> 20) << 20


def planned_memory(memory: int, plan: Plan) -> int:
    """What of `memory` a rank takes, in bytes."""
    return reserved_bytes(plan) + buffers_of(plan) * round_bytes(memory, plan)


def round_bytes(memory: int, plan: Plan) -> int:
    """Bytes of `memory` that each buffer gets; too little is refused with the least that works."""
    share = (memory - reserved_bytes(plan)) // buffers_of(plan) // ALIGN * ALIGN
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
