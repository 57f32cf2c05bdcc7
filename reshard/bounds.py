"""How fast a plan could be at best, given what disks and networks carry. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from reshard.errors import ConfigError
from reshard.moves import Load
from reshard.plan import Plan
from reshard.schedule import Patterns
from reshard.units import size_text

RATES = 1e-9, 1e9  # GB/s


@dataclass(frozen=True, slots=True)
class Nodes:
    """What the nodes of a job can do: `ranks` on each, GB per second of `disk` and `net`.

    A disk's rate is that of reading and writing together, a network's that of each direction; one
    of the two may be None.
    """

    ranks: int
    disk: float | None
    net: float | None

    def __post_init__(self) -> None:
        for flag, rate in (("--disk", self.disk), ("--net", self.net)):
            if rate is not None and not RATES[0] <= rate <= RATES[1]:
                raise ConfigError(f"{flag}: {rate:g} is no rate; give GB/s per node, such as 5")


def loads_by_node(plan: Plan, loads: Sequence[Load], ranks: int) -> tuple[Load, ...]:
    """Bytes of each node of `ranks` ranks: what crosses inside one is neither sent nor received.

    `loads` are those by rank.
    """
    nodes = tuple(Load() for _ in range(-(-plan.world // ranks)))
    for rank, load in enumerate(loads):
        nodes[rank // ranks].add(Load(read=load.read, written=load.written))
    patterns = Patterns(plan)
    for name in plan.names:
        for _, crew, pattern in patterns.of(name):
            for reader, writer, nbytes in pattern.crossing:
                here, there = crew[reader] // ranks, crew[writer] // ranks
                if here != there:
                    nodes[here].sent += nbytes
                    nodes[there].received += nbytes
    return nodes


def bound_line(plan: Plan, loads: Sequence[Load], nodes: Nodes) -> str:
    """The least time that a plan needs, which the busiest disk or network decides."""
    found = loads_by_node(plan, loads, nodes.ranks)
    disk = max(load.read + load.written for load in found)
    net = max(max(load.sent, load.received) for load in found)
    parts = [
        (nbytes / rate / 1e9, f"{what} {nbytes / rate / 1e9:.3g} s ({size_text(nbytes)})")
        for what, nbytes, rate in (("disk", disk, nodes.disk), ("network", net, nodes.net))
        if rate is not None
    ]
    seconds = max(second for second, _ in parts)
    count = f"{len(found)} node{'s' if len(found) > 1 else ''} of {min(nodes.ranks, plan.world)}"
    return (
        f"no faster than {seconds:.3g} s on {count} ranks: "
        f"{', '.join(text for _, text in parts)} for the busiest node"
    )
