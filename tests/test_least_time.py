"""The least time of a plan, by hand."""

import pytest
import torch

from reshard.bounds import Nodes, bound_line, loads_by_node
from reshard.errors import ConfigError
from reshard.layout import Layout, Slot
from reshard.moves import Load
from reshard.placement import Cut, Placement, uncut
from reshard.plan import Plan
from reshard.traffic import loads_by_rank


def halves_to_whole() -> Plan:
    """Two files of columns become one, on four ranks: two on each machine read one file each."""
    shape, f32 = (4, 2), torch.float32
    source = Slot("p", Placement(shape, Cut(1, 2, 1, 2)), "s{shard}", "k", f32)
    target = Slot("p", Placement(shape, uncut(4)), "t", "k", f32)
    layouts = Layout("x", "safetensors", 2, (source,)), Layout("y", "safetensors", 1, (target,))
    return Plan(*layouts, 4, "collective", "owner")


def test_what_crosses_inside_a_machine_does_not_count() -> None:
    plan = halves_to_whole()
    loads = loads_by_rank(plan)
    # One block of 4 rows: ranks 0 and 1 read 16 bytes each, rank 0 writes 32 and gets 16.
    assert loads == (Load(16, 0, 16, 32), Load(16, 16, 0, 0), Load(), Load())
    assert loads_by_node(plan, loads, 2) == (Load(32, 0, 0, 32), Load())
    assert loads_by_node(plan, loads, 1)[:2] == (Load(16, 0, 16, 32), Load(16, 16, 0, 0))


def test_the_busiest_disk_or_network_decides() -> None:
    plan = halves_to_whole()
    loads = loads_by_rank(plan)
    line = bound_line(plan, loads, Nodes(1, 1e-9, 1e-9))  # a byte each second
    assert line.startswith(
        "no faster than 48 s on 4 nodes of 1 ranks: disk 48 s (48 B), network 16"
    )
    assert bound_line(plan, loads, Nodes(1, None, 1e-9)).count("16 s (16 B)") == 1
    assert "on 2 nodes of 2 ranks: disk 64 s (64 B), network 0 s" in bound_line(
        plan, loads, Nodes(2, 1e-9, 1.0)
    )


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_are_checked(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"--disk: .* is no rate"):
        Nodes(8, rate, None)
    with pytest.raises(ConfigError, match=r"--net: .* is no rate"):
        Nodes(8, None, rate)
