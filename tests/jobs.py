"""Starts commands on several ranks that may fail, be killed or hang, and tells how they ended.

Ranks are forked from the server of `tests.ranks`, and meet in a store that the test holds, as
torchrun's agent does: a rank that dies takes no store with it.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Before = Callable[..., None]
NO_LIMIT = 300
# Within how many seconds all ranks of a job end after a fault of one.
SOON = 5.0


@dataclass
class Job:
    """A command under way on several ranks."""

    ranks: list[BaseProcess]
    said: Path
    store: dist.TCPStore
    began: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float) -> list[int]:
        """The exit codes by rank, negative for a signal; a rank that lives on fails the test."""
        until = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, until - time.monotonic()))
        alive = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        assert not alive, f"ranks {alive} live on after {seconds:g} s; said: {self.err}"
        return [int(rank.exitcode or 0) for rank in self.ranks]

    def until(self, ready: Callable[[], Any], seconds: float = 30) -> None:
        """Wait for something that the job is to do."""
        limit = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < limit, f"nothing happened in {seconds:g} s; said: {self.err}"
            assert any(rank.is_alive() for rank in self.ranks) or ready(), f"over; said: {self.err}"
            time.sleep(0.01)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self.ranks[rank].pid or 0, number)

    def kill(self, *ranks: int) -> None:
        """Kill some ranks, or all of them at once."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].kill()
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].join()

    @property
    def out(self) -> str:
        """What all ranks have said on standard output."""
        return self.said.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        """What all ranks have said on standard error."""
        return self.said.with_suffix(".err").read_text()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()


def start(
    world: int, argv: Sequence[str], said: Path, before: Before | None = None, *args: Any
) -> Job:
    """Start `reshard` with `argv` on `world` ranks; each calls `before(rank, *args)` first."""
    context = multiprocessing.get_context("forkserver")
    for suffix in (".out", ".err"):
        said.with_suffix(suffix).write_text("")
    store = dist.TCPStore(
        "127.0.0.1", 0, None, True, timedelta(seconds=NO_LIMIT), wait_for_workers=False
    )
    ranks: list[BaseProcess] = []
    for rank in range(world):
        place = (rank, world, store.port, str(said))
        arguments = (place, dict(os.environ), list(argv), before, args)
        ranks.append(context.Process(target=_enter, args=arguments, name=f"rank {rank}"))
        ranks[-1].start()
    return Job(ranks, said, store)


def finished(
    world: int, argv: Sequence[str], said: Path, before: Before | None = None, *args: Any
) -> Job:
    """Run a job that has to end by itself within a minute."""
    with start(world, argv, said, before, *args) as job:
        job.wait(60)
    return job


def _enter(
    place: tuple[int, int, int, str],
    environ: dict[str, str],
    argv: list[str],
    before: Before | None,
    args: tuple[Any, ...],
) -> None:
    """The life of one rank."""
    rank, world, port, said = place
    os.environ.clear()
    os.environ.update(environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(said).with_suffix(suffix), os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world)}
        limit = timedelta(seconds=NO_LIMIT)
        store = dist.TCPStore("127.0.0.1", port, None, False, limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    from reshard.cli import (
        main,  # only here: the server and the test may have another version of it
    )

    if before is not None:
        before(rank, *args)
    sys.exit(main(argv))
