"""Two agents of torchrun, as on two machines: each sees its half of the source, both the target."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import done, model, move, read, write
from tests.launched import ROOT, alive, children, environment, ours
from tests.oracles import meta, models
from tests.oracles.compare import assert_same, assert_same_files
from tests.sabotage import EVERY_RANK, WRITE
from tests.two_nodes import Pair, part

pytestmark = pytest.mark.fault

Agents = list["subprocess.Popen[str]"]
SOON = 10.0
TRIES, TAKEN = 3, "torchrun could not start"


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def agents(pair: Pair, program: list[str]) -> Iterator[Agents]:
    """An agent of one rank on each node, in its directory; all are gone in the end."""
    port, scratch = free_port(), pair.root / "scratch"
    scratch.mkdir(exist_ok=True)
    started: Agents = []
    for number in range(2):
        launcher = [sys.executable, str(ROOT / "launch" / "torchrun"), "--nproc", "1"]
        launcher += ["--nnodes", "2", "--rdzv-id", "pair", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
        launcher += ["--rdzv-conf", f"is_host={1 - number}"]
        started.append(
            subprocess.Popen(
                [*launcher, *program, *pair.words()],
                cwd=pair.root / f"node{number}",
                env=environment(TMPDIR=str(scratch)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    members: list[int] = []
    try:
        yield started
    finally:
        for agent in started:
            members += children(agent.pid) if agent.poll() is None else []
            agent.kill()
            agent.wait()
        for member in alive(members):
            os.kill(member, 9)


def ended(pair: Pair) -> tuple[list[int], list[str]]:
    """How both agents of a command end, and the lines of ours."""
    for _ in range(TRIES):
        with agents(pair, ["-m", "reshard"]) as both:
            said = [both[0].communicate(timeout=100)]
            if TAKEN in said[0][1]:
                continue
            said.append(both[1].communicate(timeout=100))
            lines = [line for _, err in said for line in ours(err)]
            return [agent.returncode for agent in both], lines
    raise AssertionError(said)


def test_two_agents_of_which_each_sees_half_the_source_make_what_one_would(
    tmp_path: Path,
) -> None:
    part(write("meta8", tmp_path / "whole"), tmp_path)
    pair = Pair(tmp_path, "meta8", "tp4", ("engine.writers=owner",))
    assert ended(pair) == ([0, 0], [])
    done(*move("meta8", tmp_path / "whole", "tp4", tmp_path / "plain"))
    assert_same_files(tmp_path / "dst", tmp_path / "plain")
    assert_same(read("tp4", tmp_path / "dst"), model())
    found = json.loads((tmp_path / "report.json").read_text())
    stored = [torch.load(file) for file in sorted((tmp_path / "whole").glob("*.pth"))]
    weights = sum(t.numel() * t.itemsize for held in stored for t in held.values())
    assert (found["world"], found["bytes"]["read"]) == (2, weights)
    assert 0 < found["bytes"]["exchanged"] == found["bytes"]["exchanged_bound"]
    assert not list((tmp_path / "scratch").glob("reshard-*"))


def test_where_one_agent_is_killed_the_other_ends_soon_with_one_line(tmp_path: Path) -> None:
    meta.write(models.wide_model(4 << 20), tmp_path / "whole", 4)
    part(tmp_path / "whole", tmp_path)
    pair = Pair(tmp_path, "meta4", "tp2", ("engine.memory=14MiB",))
    reached = tmp_path / "reached"
    dawdling = ["-m", "tests.sabotage", WRITE, str(EVERY_RANK), "3", "dawdle", str(reached)]
    with agents(pair, dawdling) as both:
        until = time.monotonic() + 60
        while not reached.exists():
            assert time.monotonic() < until, "nothing is moved"
            assert [agent.poll() for agent in both] == [None, None], both[0].communicate()
            time.sleep(0.02)
        lost = children(both[1].pid)
        both[1].kill()
        began = time.monotonic()
        said = both[0].communicate(timeout=60)[1]
        assert time.monotonic() - began < SOON
        assert both[0].returncode != 0
        assert len(ours(said)) == 1, said
        while alive(lost):
            assert time.monotonic() - began < SOON, "a rank outlives its agent"
            time.sleep(0.05)
    assert not (tmp_path / "dst").exists()
