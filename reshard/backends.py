"""Which backend carries bytes: what a machine's GPUs and torch allow, and what all ranks agree on.

Ranks agree through the rendezvous store, before there is a process group: with two backends they
would wait for each other until the time is over.
"""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # not in the stubs

from reshard.errors import ConfigError, PeerError, first_line

DRIVER = Path("/proc/driver/nvidia/gpus")
Rendezvous = dict[str, object]
PARTING_SECONDS, POLL_SECONDS = 5.0, 0.01


@dataclass(frozen=True, slots=True)
class Build:
    """What torch was built with; `starts`: CUDA comes up on the GPUs of this machine."""

    version: str = "torch"
    cuda: bool = True
    nccl: bool = True
    gloo: bool = True
    starts: bool = True


WHOLE = Build()


def _built_for_gpus() -> bool:
    """Whether torch is a build for CUDA, or for ROCm, which it calls CUDA too."""
    return bool(torch.version.cuda or torch.version.hip)


def build_here() -> Build:
    """What the torch of this process is."""
    with warnings.catch_warnings():  # of a driver that is too old, which is said in one line
        warnings.simplefilter("ignore")
        starts = torch.cuda.is_available()
    return Build(
        f"torch {torch.__version__}",
        _built_for_gpus(),
        dist.is_nccl_available(),
        dist.is_gloo_available(),
        starts,
    )


def gpus_here() -> int:
    """GPUs that this process may use; those of the machine where torch cannot see any."""
    if not _built_for_gpus():
        return len(list(DRIVER.glob("*")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.device_count()


def choose_backend(
    asked: str, local_ranks: int, devices: int, build: Build = WHOLE
) -> tuple[str, str | None]:
    """The backend for `local_ranks` on a machine with `devices` GPUs.

    The second value is a remark where there are GPUs, and they are not used though nobody said so.
    """
    lack = _lack(local_ranks, devices, build)
    if asked == "nccl" and lack is not None:
        what, remedy = lack
        raise ConfigError(f"engine.backend=nccl: {what}; {remedy}, or use engine.backend=gloo")
    chosen = "gloo" if asked == "gloo" or lack is not None else "nccl"
    if not build.gloo:
        raise ConfigError(
            f"engine.backend={chosen}: {build.version} was built without Gloo, over which ranks "
            "agree; install a build with Gloo, or start one rank"
        )
    remarkable = asked == "auto" and lack is not None and devices > 0
    return chosen, f"{lack[0]}: using Gloo on CPU" if remarkable and lack else None


def _lack(local_ranks: int, devices: int, build: Build) -> tuple[str, str] | None:
    """What NCCL lacks here, and what to do about it."""
    gpus = f"{devices} GPU{'s' * (devices != 1)}"
    there = f"{gpus}, but "
    if not build.cuda:
        found = there if devices else "no CUDA device, and "
        return f"{found}{build.version} was built without CUDA", "install a build with CUDA"
    if devices == 0:
        return "no CUDA device was found", "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    if not build.starts:
        return (
            f"{there}CUDA does not start on them",
            f"look at `nvidia-smi` whether the driver is new enough for {build.version}",
        )
    if not build.nccl:
        return f"{there}{build.version} was built without NCCL", "install a build with NCCL"
    if local_ranks > devices:
        return (
            f"{local_ranks} ranks on {gpus}",
            f"NCCL wants a GPU for each, so start --nproc-per-node {devices}",
        )
    return None


@dataclass(frozen=True, slots=True)
class Word:
    """What one rank was asked for, and what it chose or why it refuses; or what holds for all."""

    asked: str
    chosen: str = ""
    remark: str | None = None
    refusal: str = ""


def own_word(asked: str, local_ranks: int, *, alone: bool) -> Word:
    """What this machine has to say of a backend; a rank that is `alone` can do without Gloo."""
    build = build_here()
    try:
        choice = choose_backend(
            asked, local_ranks, gpus_here(), replace(build, gloo=build.gloo or alone)
        )
    except ConfigError as error:
        return Word(asked, refusal=str(error))
    return Word(asked, *choice)


def common(words: Sequence[Word]) -> Word:
    """What holds for all ranks, whose words these are.

    Where some machines have GPUs and some not, `auto` is Gloo for all; anything else is refused.
    """
    refused = [rank for rank, word in enumerate(words) if word.refusal]
    if refused:
        where = "" if len(refused) == len(words) else f" (rank {refused[0]})"
        return Word("", refusal=words[refused[0]].refusal + where)
    other = next((r for r, word in enumerate(words) if word.chosen != words[0].chosen), None)
    if other is None:
        return next((word for word in words if word.remark), words[0])
    if {word.asked for word in words} == {"auto"}:
        rank = next(rank for rank, word in enumerate(words) if word.chosen == "gloo")
        why = words[rank].remark or f"rank {rank} has no GPU, others have: using Gloo on CPU"
        return Word("auto", "gloo", why)
    told = " and ".join(
        f"{words[rank].chosen} (engine.backend={words[rank].asked}) on rank {rank}"
        for rank in (0, other)
    )
    return Word("", refusal=f"engine.backend: {told}; give the same one on all machines")


def agreed(
    word: Word, rank: int, world: int, meet: Callable[[], Rendezvous]
) -> tuple[Word, Rendezvous]:
    """What holds for all ranks, and where they `meet`; a refusal is raised on all alike."""
    try:
        place = meet()
        if isinstance(store := place.get("store"), Store):
            word = exchanged(PrefixStore("backend", store), rank, world, word)
    except (PeerError, RuntimeError, ValueError) as error:
        if word.refusal:  # there is nobody to tell
            raise ConfigError(word.refusal) from None
        if isinstance(error, PeerError):
            raise
        raise PeerError(f"the ranks could not meet: {first_line(error)}") from None
    if word.refusal:
        raise ConfigError(word.refusal)
    return word, place


def exchanged(store: Store, rank: int, world: int, word: Word) -> Word:
    """What holds for all ranks, each of which calls this with its own word.

    The first rank may keep the store: where it will not live on, it waits until all have read why.
    """
    store.set(str(rank), json.dumps(asdict(word)))
    if rank == 0:
        words = store.multi_get([str(other) for other in range(world)])
        store.set("all", json.dumps(asdict(common([Word(**json.loads(word)) for word in words]))))
    found = Word(**json.loads(store.get("all")))
    if found.refusal and rank > 0:
        store.add("seen", 1)
    until = time.monotonic() + PARTING_SECONDS
    while found.refusal and rank == 0 and time.monotonic() < until:
        if store.add("seen", 0) == world - 1:
            break
        time.sleep(POLL_SECONDS)
    return found
