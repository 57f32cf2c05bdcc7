"""Which ranks read and write what: mesh coordinates are dealt out, over all or some. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from reshard.encodings import stored_bytes
from reshard.geometry import whole
from reshard.layout import Layout, Slot

Ranks = tuple[int, ...]


def deal(coordinates: int, world: int) -> tuple[Ranks, ...]:
    """For each coordinate, the ranks that its blocks are dealt out over."""
    if coordinates >= world:
        return tuple((coordinate % world,) for coordinate in range(coordinates))
    return tuple(tuple(range(coordinate, world, coordinates)) for coordinate in range(coordinates))


def deal_apart(coordinates: int, machines: Sequence[int]) -> tuple[Ranks, ...]:
    """The same where machines keep apart what they write: neighbours go to one machine.

    `machines` has the number of each rank's. Of two layouts that are cut alike a machine then has
    the same part, and what it reads is what it writes.
    """
    world = len(machines)
    ranks = sorted(range(world), key=lambda rank: machines[rank])
    if coordinates >= world:
        return tuple((ranks[place * world // coordinates],) for place in range(coordinates))
    edges = [place * world // coordinates for place in range(coordinates + 1)]
    return tuple(tuple(sorted(ranks[low:high])) for low, high in pairwise(edges))


def local_readers(source: Layout, local: Mapping[str, Ranks]) -> Mapping[tuple[Ranks, int], Ranks]:
    """The readers of the files that only some ranks see, by these ranks and by coordinate.

    They share the coordinates of what they alone see as all ranks share those of all files.
    """
    seen: dict[Ranks, set[int]] = {}
    alike = {_home(slot): slot for slot in source.slots} if local else {}
    for slot in alike.values():
        for shard in range(slot.placement.cut.parts):
            if (ranks := local.get(slot.file_of(shard))) is not None:
                seen.setdefault(ranks, set()).add(slot.coordinate_of(shard))
    found = {}
    for ranks, coordinates in seen.items():
        dealt = deal(len(coordinates), len(ranks))
        for coordinate, places in zip(sorted(coordinates), dealt, strict=True):
            found[ranks, coordinate] = tuple(ranks[place] for place in places)
    return found


def _home(slot: Slot) -> object:
    """What the files and the coordinates of a place's shards follow from."""
    return slot.file, slot.coordinate, slot.spread, slot.placement.cut.parts


class Dealing:
    """The groups of ranks that the shards of a layout are dealt out over.

    `ranks` has those of each mesh coordinate, and `local` those of the files that only some ranks
    deal with, who share these files' coordinates among themselves.
    """

    def __init__(
        self, layout: Layout, ranks: Sequence[Ranks], local: Mapping[str, Ranks] | None = None
    ) -> None:
        self._local = local or {}
        among = local_readers(layout, self._local)
        self._numbers = {key: len(ranks) + place for place, key in enumerate(among)}
        self.groups = (*ranks, *among.values())
        self._known: dict[object, Sequence[int]] = {}

    def group(self, slot: Slot, shard: int) -> int:
        """The number of the group that a shard is dealt to."""
        only = self._local.get(slot.file_of(shard)) if self._local else None
        coordinate = slot.coordinate_of(shard)
        return coordinate if only is None else self._numbers[only, coordinate]

    def ranks_of(self, slot: Slot, shard: int) -> Ranks:
        """The ranks that a shard is dealt to."""
        return self.groups[self.group(slot, shard)]

    def of(self, slots: Sequence[Slot]) -> tuple[int, tuple[Sequence[int], ...]]:
        """The groups of a parameter's shards by place, less the first one, which is given too."""
        first = self.group(slots[0], 0)
        return first, tuple(self._by_shard(slot, first) for slot in slots)

    def _by_shard(self, slot: Slot, first: int) -> Sequence[int]:
        parts = slot.placement.cut.parts
        if not self._local and not slot.spread:
            return range(slot.coordinate - first, slot.coordinate - first + parts)
        key = _home(slot), first
        if key not in self._known:
            self._known[key] = tuple(self.group(slot, shard) - first for shard in range(parts))
        return self._known[key]


def writers_by_file(
    sides: tuple[Layout, Layout], reading: Dealing, owners: Sequence[Ranks], machines: Sequence[int]
) -> Mapping[str, Ranks]:
    """The ranks of the one machine that writes each target file.

    Of its owners' machines it is the one that reads most of what is in it, unless that has its
    share already. Two that write one page of a file at a time may undo each other's bytes where the
    file system does not keep their caches the same (NFS).
    """
    members: dict[int, list[int]] = {}
    for rank, machine in enumerate(machines):
        members.setdefault(machine, []).append(rank)
    homes, sizes = _files(sides[1])
    may = {file: {machines[rank] for rank in owners[home]} for file, home in homes.items()}
    near = _near(sides, reading, machines, may)
    written, share = dict.fromkeys(members, 0), sum(sizes.values()) // len(members)
    found = {}
    for file in sorted(sizes, key=lambda name: (-sizes[name], name)):
        most = max(share, sizes[file] + min(written[machine] for machine in may[file]))
        able = [machine for machine in may[file] if written[machine] + sizes[file] <= most]
        chosen = max(able, key=lambda one: (near[file, one], -written[one], -one))
        written[chosen] += sizes[file]
        found[file] = tuple(members[chosen])
    return found


def _near(
    sides: tuple[Layout, Layout],
    reading: Dealing,
    machines: Sequence[int],
    may: Mapping[str, Collection[int]],
) -> Counter[tuple[str, int]]:
    """Roughly how much of a target file each machine reads that may write it.

    As if of each parameter a file had as much of one source shard as of any other.
    """
    shares: dict[object, Counter[int]] = {}
    undecided: dict[object, list[tuple[int, str]]] = {}
    near: Counter[tuple[str, int]] = Counter()
    for slot in sides[1].slots:
        source = sides[0].places[slot.parameter][0]
        key = _home(source), source.placement
        if key not in shares:
            shares[key] = _shares(source, reading, machines)
        if _home(slot) not in undecided:
            files = enumerate(map(slot.file_of, range(slot.placement.cut.parts)))
            undecided[_home(slot)] = [(shard, file) for shard, file in files if len(may[file]) > 1]
        for shard, file in undecided[_home(slot)]:
            size = _bytes_of(slot, shard)
            for machine in may[file]:
                near[file, machine] += size * shares[key][machine]
    return near


def _shares(slot: Slot, reading: Dealing, machines: Sequence[int]) -> Counter[int]:
    """Which part of a parameter each machine reads, in 65,536ths."""
    found: Counter[int] = Counter()
    cut, numel = slot.placement.cut, whole(slot.placement.shape).numel
    for shard in range(0, cut.parts, cut.copies):
        ranks = reading.ranks_of(slot, shard)
        for rank in ranks:
            part = slot.placement.box(shard).numel << 16
            found[machines[rank]] += part // (len(ranks) * max(numel, 1))
    return found


def _bytes_of(slot: Slot, shard: int) -> int:
    """Bytes of a shard in its file."""
    return stored_bytes(slot.placement.box(shard).shape, slot.dtype, slot.encoding)


def _files(target: Layout) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """The mesh coordinate of each file, and the bytes of its stored tensors."""
    homes: dict[str, int] = {}
    sizes: dict[str, int] = {}
    alike: dict[object, list[Slot]] = {}
    for slot in target.slots:
        kind = _home(slot), slot.placement, slot.dtype, slot.encoding
        alike.setdefault(kind, []).append(slot)
    for slot, *others in alike.values():
        for shard in range(slot.placement.cut.parts):
            file = slot.file_of(shard)
            homes.setdefault(file, slot.coordinate_of(shard))
            sizes[file] = sizes.get(file, 0) + _bytes_of(slot, shard) * (1 + len(others))
    return homes, sizes


def files_of(rank: int, world: int, files: Sequence[str], local: Mapping[str, Ranks]) -> list[str]:
    """The share of one rank of files that some rank has to look at, all of which it sees."""
    everyone = tuple(range(world))
    seen_by = (local.get(file, everyone) for file in files)
    dealt = (ranks[number % len(ranks)] for number, ranks in enumerate(seen_by))
    return [file for file, dealt_to in zip(files, dealt, strict=True) if dealt_to == rank]


def rank_text(ranks: Sequence[int]) -> str:
    """Some ranks as a message names them: `rank 3`, or `ranks 0-3, 8`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join("-".join(map(str, r)) for r in runs)
