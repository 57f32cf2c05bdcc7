"""Which ranks share a stored tensor, in few words and few stripes of colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reshard.dealing import rank_text

MAX_STRIPES = 16
MAX_TEXT = 60


@dataclass(frozen=True, slots=True)
class Share:
    """Ranks that hold something together.

    `text` names them. `stripes` are some of them, or all, in the order of colours, each with its
    part of the whole in thousandths.
    """

    text: str
    stripes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares by number, each distinct one once; `order` is the place of each rank's colour."""

    order: Sequence[int]
    stripes: int = MAX_STRIPES
    _numbers: dict[Share, int] = field(default_factory=dict)

    def number(self, held: Mapping[int, int]) -> int:
        """The number of the share of ranks that hold so many bytes each."""
        ranks = sorted((rank for rank in held if held[rank]), key=self.order.__getitem__)
        share = Share(ranks_text(ranks), _stripes(ranks, held, self.stripes))
        return self._numbers.setdefault(share, len(self._numbers))

    def all(self) -> tuple[Share, ...]:
        """Every share, in the order of their numbers."""
        return tuple(self._numbers)


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in words: all of them where that is short, else how many they are."""
    if not ranks:
        return "no rank"
    ranks = sorted(ranks)
    text = rank_text(ranks)
    if len(text) <= MAX_TEXT:
        return text
    return f"{len(ranks)} ranks: {', '.join(map(str, ranks[:3]))}, ... {ranks[-1]}"


def _stripes(
    ranks: Sequence[int], held: Mapping[int, int], most: int
) -> tuple[tuple[int, int], ...]:
    total = sum(held[rank] for rank in ranks)
    if len(ranks) > most:
        sampled = [ranks[(2 * part + 1) * len(ranks) // (2 * most)] for part in range(most)]
        return tuple((rank, 1000 // most) for rank in sampled)
    return tuple((rank, round(1000 * held[rank] / total)) for rank in ranks)
