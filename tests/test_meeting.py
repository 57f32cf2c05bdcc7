"""How ranks find each other: those of one attempt, and none of an earlier one."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from reshard import meeting
from reshard.errors import PeerError

WORLD = 3
SOON = timedelta(seconds=20)


@pytest.fixture
def store() -> TCPStore:
    """What torchrun keeps for all attempts."""
    return TCPStore("127.0.0.1", 0, None, True, SOON, wait_for_workers=False)


def attempt(store: TCPStore, ranks: list[int], limit: timedelta = SOON) -> dict[int, str]:
    """What each rank of an attempt agrees to; "" where it gives up."""
    agreed: dict[int, str] = {}

    def come(rank: int) -> None:
        own = TCPStore("127.0.0.1", store.port, None, False, SOON)
        try:
            agreed[rank] = meeting._agree(own, rank, WORLD, limit)
        except PeerError:
            agreed[rank] = ""

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return agreed


def test_ranks_agree_on_a_name_that_no_other_attempt_had(store: TCPStore) -> None:
    """Whatever the earlier attempts left in the store, and in whatever order ranks come."""
    names = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]):
        agreed = attempt(store, order)
        assert len(agreed) == WORLD
        assert len(set(agreed.values())) == 1, agreed
        names |= set(agreed.values())
    assert len(names) == 4


def test_ranks_do_not_agree_with_those_of_an_earlier_attempt(store: TCPStore) -> None:
    assert len(set(attempt(store, [0, 1, 2]).values())) == 1
    brief = timedelta(seconds=1)
    assert attempt(store, [0, 1], brief) == {0: "", 1: ""}
    assert attempt(store, [1, 2], brief) == {1: "", 2: ""}
    assert len(set(attempt(store, [2, 0, 1]).values())) == 1


def test_a_launcher_without_a_store_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert meeting.meeting_place(SOON) == {}
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "no port")
    with pytest.raises(PeerError, match="the store of their launcher is not there"):
        meeting.meeting_place(SOON)
    assert not meeting.refused_before()
    meeting.remember_refusal()
