"""Which rank has which part of a block: by arithmetic, without a look at other blocks. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from reshard.blocks import Form, form_of, geometry
from reshard.dealing import Dealing, Ranks
from reshard.layout import Layout

# The groups of one size that a team has, their rows in the table of that size, and what each rank
# in turn gets of a parameter.
_Turns = tuple[list[int], npt.NDArray[np.intp], npt.NDArray[np.int64]]

# What of a number in a table is a rank's place in its group.
_PLACE_BITS = 16
_PLACE = (1 << _PLACE_BITS) - 1
# How finely ties are told apart: most small numbers of ranks that may tie divide it.
TIES = 48


class Team:
    """A form, and the ranks of each of its groups; `numbers` tell the groups of a plan apart."""

    def __init__(self, form: Form, numbers: Sequence[int], ranks: Sequence[Ranks]) -> None:
        self.form = form
        self.numbers = tuple(numbers)
        self.ranks = tuple(ranks)
        self.alone = all(len(group) == 1 for group in ranks)

    @cached_property
    def tied(self) -> frozenset[int]:
        """The groups of first readers, where more than one may read of a block."""
        reading = {group for group, (side, _) in enumerate(self.form.groups) if side == 0}
        readers = [[group for group, _ in seats if group in reading] for seats in self.form.seats]
        if max(map(len, readers), default=0) < 2:
            return frozenset()
        return frozenset(groups[0] for groups in readers)

    @cached_property
    def fixed(self) -> bool:
        """Whether seats have the same ranks in common, whoever's turn it is."""
        return self.alone or len({rank for group in self.ranks for rank in group}) == sum(
            map(len, self.ranks)
        )

    @cached_property
    def crews(self) -> tuple[Ranks, ...]:
        """The crew of each block where every group has one rank."""
        ranks = [group[0] for group in self.ranks]
        return tuple(tuple([ranks[group] for group, _ in seats]) for seats in self.form.seats)


def teams_of(
    sides: tuple[Layout, Layout],
    dealings: tuple[Dealing | None, Dealing | None],
    bounds_of: Callable[[str], tuple[int, ...]],
) -> Mapping[str, Team]:
    """The team of each parameter, which those share that are alike.

    A side that is not dealt out has no seats.
    """
    forms: dict[object, Form] = {}
    teams: dict[object, Team] = {}
    found = {}
    tables = [dealing.groups if dealing else () for dealing in dealings]
    everything = [group for table in tables for group in table]
    for name in sides[0].places:
        places = [side.places[name] for side in sides]
        dealt = [
            dealing.of(slots) if dealing else (0, ())
            for slots, dealing in zip(places, dealings, strict=True)
        ]
        key = (*map(geometry, places), *(groups for _, groups in dealt))
        if key not in forms:
            forms[key] = form_of(places, [groups for _, groups in dealt], bounds_of(name))
        homes = dealt[0][0], len(tables[0]) + dealt[1][0]
        if (key, homes) not in teams:
            numbers = [homes[side] + group for side, group in forms[key].groups]
            ranks = [everything[number] for number in numbers]
            teams[key, homes] = Team(forms[key], numbers, ranks)
        found[name] = teams[key, homes]
    return found


class _Tables:
    """The bytes that each rank of each group has had: a table for the groups of each size.

    A row has a number for each rank of a group, in any order: the bytes above, below its place in
    the group, which decides between equals. So sorting any way gives all ranks the same.
    """

    def __init__(self, teams: Iterable[Team]) -> None:
        rows: dict[int, dict[int, int]] = {}
        self._parts: dict[Team, list[tuple[int, _Turns]]] = {}
        shares: dict[tuple[Form, int, int], npt.NDArray[np.int64]] = {}
        for team in teams:
            of_size: dict[int, list[int]] = {}
            for group, ranks in enumerate(team.ranks):
                if len(ranks) > 1:
                    of_size.setdefault(len(ranks), []).append(group)
            for size, groups in of_size.items():
                table = rows.setdefault(size, {})
                for group in groups:
                    table.setdefault(team.numbers[group], len(table))
                    key = team.form, group, size
                    if key not in shares:
                        shares[key] = _shares(team.form.taken[group], size)
                places = np.array([table[team.numbers[group]] for group in groups])
                nbytes = np.array([shares[team.form, group, size] for group in groups])
                self._parts.setdefault(team, []).append((size, (groups, places, nbytes)))
        self._had = {
            size: np.tile(np.arange(size, dtype=np.int64), (len(found), 1))
            for size, found in rows.items()
        }

    def next(self, team: Team) -> list[tuple[list[int], npt.NDArray[np.uint16]]]:
        """The turns of a team's groups for its next parameter, the emptiest ranks first."""
        found = []
        for size, (groups, places, nbytes) in self._parts.get(team, ()):
            had = self._had[size][places]
            had.sort(axis=1)
            found.append((groups, (had & _PLACE).astype(np.uint16)))
            self._had[size][places] = had + (nbytes << _PLACE_BITS)
        return found


def _shares(taken: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """Bytes that the first, second ... rank in turn gets."""
    rounds = -(-len(taken) // size)
    padded = np.zeros(rounds * size, np.int64)
    padded[: len(taken)] = taken
    found: npt.NDArray[np.int64] = padded.reshape(rounds, size).sum(axis=0)
    return found


class Crews:
    """The crews of all blocks: a rank for each seat.

    Parameter by parameter along `order`, in which they are moved, the ranks of a group take turns,
    those first that have had the fewest bytes: so they are even up to a block at any time. `ties`
    says whether it matters how ties are decided.

    Two files of four rows each, read by ranks 0 and 2, and by 1 and 3; blocks of two rows:

        block          rows 0-1   rows 2-3   rows 4-5   rows 6-7
        seat (group)   0          0          1          1
        turn           0          1          0          1
        crew           0          2          1          3
    """

    def __init__(self, order: Iterable[str], teams: Mapping[str, Team], *, ties: bool) -> None:
        self.teams = teams
        self._turns: dict[str, list[tuple[list[int], npt.NDArray[np.uint16]]]] = {}
        self._before: dict[str, dict[int, npt.NDArray[np.uint32]]] = {}
        tables = _Tables(dict.fromkeys(teams.values()))
        visits: dict[tuple[Team, int], npt.NDArray[np.uint32]] = {}
        for name in order:
            team = teams[name]
            if not team.alone:
                self._turns[name] = tables.next(team)
            for group in sorted(team.tied) if ties else ():
                size, blocks = len(team.ranks[group]), len(team.form.taken[group])
                had = visits.setdefault((team, group), np.zeros(size, np.uint32))
                turns = self._order(name, group)
                self._before.setdefault(name, {})[group] = had[turns]
                had[turns] += np.uint32(blocks // size)
                had[turns[: blocks % size]] += np.uint32(1)

    def _order(self, name: str, group: int) -> npt.NDArray[np.uint16]:
        """The places of a group's ranks in the order of their turns."""
        for groups, turns in self._turns.get(name, ()):
            if group in groups:
                found: npt.NDArray[np.uint16] = turns[groups.index(group)]
                return found
        return np.zeros(1, np.uint16)

    def of(self, name: str) -> Callable[[int], Ranks]:
        """The crew of each block of a parameter."""
        team = self.teams[name]
        if team.alone:
            return team.crews.__getitem__
        ranks: list[Sequence[int]] = list(team.ranks)
        for groups, turns in self._turns[name]:
            for group, places in zip(groups, turns.tolist(), strict=True):
                ranks[group] = [team.ranks[group][place] for place in places]
        seats = team.form.seats
        return lambda block: tuple(
            [ranks[group][turn % len(ranks[group])] for group, turn in seats[block]]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, which grow with parameters times ranks."""
        turns = sum(table.nbytes for parts in self._turns.values() for _, table in parts)
        before = sum(sum(table.nbytes for table in one.values()) for one in self._before.values())
        return turns + before

    def tie(self, name: str, block: int) -> int:
        """What decides between ranks that could write a piece equally well, below `TIES`.

        It counts how often the first reader has had a part in a block of such parameters before.
        """
        before = self._before.get(name)
        if before is None:
            return 0
        team = self.teams[name]
        group, turn = team.form.seats[block][0]
        rounds, place = divmod(turn, len(team.ranks[group]))
        return (int(before[group][place]) + rounds) % TIES
