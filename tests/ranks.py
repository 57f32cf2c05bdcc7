"""Call a function on several Gloo ranks of this machine, from inside one test.

Ranks are forked from a server that has imported torch already; they meet through a file, never a
port, so that parallel test processes cannot collide.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# imported once by the server; third-party only, so that a broken `reshard` fails its own tests
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "numpy",
    "safetensors.torch",
    "pytest",
    "yaml",
    "omegaconf",
    "accelerate.state",
    "tqdm",
    "isal.isal_zlib",
]
GRACE_SECONDS = 5.0

Outcome = tuple[bool, Any, float]  # whether all is well, the result or what went wrong, when


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds what each failed rank said."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(*args)` on `world` Gloo ranks and return the results by rank.

    `fn` is a function of a module; results are plain data. A rank that raises fails the test with
    its traceback, one that dies with the name of the signal; its peers get a short grace, then all
    are killed, as they are at the timeout. The environment and the working directory are the
    caller's. Starting ranks costs more than most conversions: let `fn` do many.
    """
    context = multiprocessing.get_context("forkserver")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        ranks: dict[Connection, tuple[int, BaseProcess]] = {}
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            place = (rank, world, str(Path(scratch) / "rendezvous"), timeout)
            process = context.Process(
                target=_enter, args=(sender, place, dict(os.environ), fn, args), name=f"rank {rank}"
            )
            process.start()
            sender.close()
            ranks[receiver] = rank, process
        try:
            outcomes = _collect(ranks, deadline)
            for rank, process in ranks.values():
                if outcomes[rank][0]:
                    outcomes[rank] = _ended(process) or outcomes[rank]
        finally:
            for _, process in ranks.values():
                process.kill()
                process.join()
    failures = [(when, rank, text) for rank, (fine, text, when) in outcomes.items() if not fine]
    if failures:
        raise RankError("\n".join(f"rank {rank}: {text}" for _, rank, text in sorted(failures)))
    return [outcomes[rank][1] for rank in range(world)]


def _collect(
    ranks: dict[Connection, tuple[int, BaseProcess]], deadline: float
) -> dict[int, Outcome]:
    """What each rank sent; silence is a failure."""
    outcomes: dict[int, Outcome] = {}
    waiting, reason = dict(ranks), "still running at the timeout"
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            return outcomes | {rank: _failure(reason) for rank, _ in waiting.values()}
        for receiver in ready:
            rank, process = waiting.pop(receiver)  # type: ignore[index]
            outcomes[rank] = _receive(receiver, process)  # type: ignore[arg-type]
            if not outcomes[rank][0] and time.monotonic() + GRACE_SECONDS < deadline:
                deadline = time.monotonic() + GRACE_SECONDS
                reason = f"still running {GRACE_SECONDS:g} s after another rank failed"
    return outcomes


def _receive(receiver: Connection, process: BaseProcess) -> Outcome:
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        process.join(GRACE_SECONDS)
        return _failure(f"said nothing and {_end(process.exitcode)}")
    return outcome


def _failure(text: str) -> Outcome:
    return False, text, time.monotonic()


def _end(exitcode: int | None) -> str:
    if exitcode is None:
        return "lives on"
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"exited with {exitcode}"


def _ended(process: BaseProcess) -> Outcome | None:
    """A failure where a rank that has spoken does not end as it should."""
    process.join(GRACE_SECONDS)
    return None if process.exitcode == 0 else _failure(f"returned but {_end(process.exitcode)}")


def _enter(
    sender: Connection,
    place: tuple[int, int, str, float],
    environ: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of one rank."""
    os.environ.clear()
    os.environ.update(environ)
    try:
        _join_group(*place)
        sender.send((True, fn(*args), time.monotonic()))
    except BaseException:  # said before the group is destroyed, which makes the peers fail too
        sender.send(_failure(traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_group(rank: int, world: int, rendezvous: str, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
