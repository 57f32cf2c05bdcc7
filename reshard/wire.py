"""How messages between ranks lie in flat buffers, one after another for each peer. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from reshard.moves import Message, Move


class Exchange(Protocol):
    """What carries one flat message per peer and round, once all ranks are ready for it."""

    def settle(self) -> None:
        """Wait for all ranks; raise on all of them an error that one has met."""

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_bytes: Sequence[int],
        sent_bytes: Sequence[int],
    ) -> None:
        """Send `sent`, cut by rank into `sent_bytes`; fill `received` with what ranks sent here."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A message of the move at `place` of a round, which begins at byte `base` of the buffer."""

    place: int
    message: Message
    base: int


def line_up(
    moves: Sequence[Move], rank: int, world: int, unit: int, *, incoming: bool
) -> tuple[list[Letter], list[int]]:
    """The messages from (or to) `rank`, in order, and the bytes per peer, a multiple of `unit`.

    Both ends walk the same moves, so both find the same order. Where dtypes are mixed, wide
    elements come first and a peer's bytes are rounded up, so that every message is aligned.
    """
    by_peer: dict[int, list[tuple[int, Message]]] = {}
    for place, move in enumerate(moves):
        for message in move.messages:
            ends = (message.reader, message.writer)
            here, peer = ends[::-1] if incoming else ends
            if here == rank:
                by_peer.setdefault(peer, []).append((place, message))
    letters, per_peer, position = [], [], 0
    for peer in range(world):
        start = position
        widest_first = sorted(by_peer.get(peer, ()), key=lambda item: -item[1].dtype.itemsize)
        for place, message in widest_first:
            letters.append(Letter(place, message, position))
            position += message.nbytes
        position = start + -(-(position - start) // unit) * unit
        per_peer.append(position - start)
    return letters, per_peer
