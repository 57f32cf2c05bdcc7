"""How the ranks of a launcher find each other, and what its attempts leave for later ones.

torchrun keeps a store for all attempts at a job. In torch 2.13 the ranks of one attempt find there
what those of earlier ones said of themselves, and would try for ever to reach a rank that is gone;
no number that all machines know tells the attempts apart. So every process brings a word of its
own, the first rank proposes the list of these words, and who finds its own word in it agrees.
"""

import json
import os
import time
import uuid
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # not in the stubs
    PrefixStore,
    Store,
    TCPStore,
)

from reshard.errors import PeerError
from reshard.parent import PARENT

STORE_PATIENCE = timedelta(seconds=30)
POLL_SECONDS, MAX_POLL_SECONDS = 0.005, 0.2
# Where torchrun started this process, the job ends with it.
LAUNCHER = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None


def launched_rank() -> int:
    """The rank that the launcher gave this process, before any group exists."""
    return int(os.environ.get("RANK", "0"))


def launched_world() -> int:
    """The number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_here() -> bool:
    """Whether this rank is the first of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _keeps_a_store() -> bool:
    """Whether the launcher keeps the store, and not the first rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def speaks() -> bool:
    """Whether this rank says that the store is gone: one that lives on where its keeper died."""
    return first_here() if _keeps_a_store() or launched_world() == 1 else launched_rank() == 1


def launcher_lives() -> bool:
    """Whether whoever has to live on while this process does so."""
    return LAUNCHER in (None, os.getppid())


def refused_before() -> bool:
    """Whether an earlier attempt of the launcher at this very job was refused, and said so."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    store = _launchers_store()
    try:
        return store is not None and bool(store.check(["refused"]))
    except RuntimeError:
        return False


def remember_refusal() -> None:
    """Have later attempts of the launcher end without a word."""
    store = _launchers_store()
    try:
        if store is not None:
            store.set("refused", "")
    except RuntimeError:
        return  # a launcher that is gone makes no other attempt


def _launchers_store() -> Store | None:
    """The store that outlives an attempt; None where there is none."""
    if not _keeps_a_store():
        return None
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=STORE_PATIENCE)
    except (KeyError, ValueError, RuntimeError):
        return None
    return PrefixStore("reshard", store)


def meeting_place(limit: timedelta) -> dict[str, object]:
    """Where the ranks meet, as init_process_group takes it; {}: where it finds out by itself.

    A PeerError where the ranks do not all come before `limit`.
    """
    if launched_world() == 1 or not _keeps_a_store():
        return {}
    store = _launchers_store()
    if store is None:
        raise PeerError("the ranks could not meet: the store of their launcher is not there")
    rank, world = launched_rank(), launched_world()
    agreed = _agree(store, rank, world, limit)
    store.set_timeout(limit)
    return {"store": PrefixStore(agreed, store), "rank": rank, "world_size": world}


def _agree(store: Store, rank: int, world: int, limit: timedelta) -> str:
    """A name that the ranks of this attempt have in common, and none of another attempt."""
    word, until, pause = uuid.uuid4().hex, time.monotonic() + limit.total_seconds(), POLL_SECONDS
    store.set(f"here/{rank}", word)
    while time.monotonic() < until:
        if rank == 0:
            _propose(store, world)
        words = _words(store, "proposal")
        if len(words) == world and words[rank] == word:
            name = uuid.uuid5(uuid.NAMESPACE_OID, " ".join(words)).hex
            store.set(f"agreed/{name}/{rank}", "")
            if rank == 0 and store.check([f"agreed/{name}/{other}" for other in range(world)]):
                store.set(f"go/{name}", "")
            if store.check([f"go/{name}"]):
                return name
        time.sleep(pause)
        pause = min(2 * pause, MAX_POLL_SECONDS)
    raise PeerError(f"the ranks could not meet: not all of {world} came")


def _propose(store: Store, world: int) -> None:
    """Propose the words that are there now, once every rank, of whatever attempt, has brought one.

    A rank of this attempt that comes later finds that its word is not in the list, until the next.
    """
    places = [f"here/{rank}" for rank in range(world)]
    if store.check(places):
        words = [word.decode() for word in store.multi_get(places)]
        if words != _words(store, "proposal"):
            store.set("proposal", json.dumps(words))


def _words(store: Store, key: str) -> list[str]:
    """A list of words in the store; [] where there is none."""
    if not store.check([key]):
        return []
    words: list[str] = json.loads(store.get(key))
    return words
