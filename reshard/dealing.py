"""Which ranks read what: mesh coordinates are dealt out, over all ranks or over some. Pure."""

from collections.abc import Mapping, Sequence

from reshard.layout import Layout

Ranks = tuple[int, ...]


def deal(coordinates: int, world: int) -> tuple[Ranks, ...]:
    """For each coordinate, the ranks that its blocks are dealt out over."""
    if coordinates >= world:
        return tuple((coordinate % world,) for coordinate in range(coordinates))
    return tuple(tuple(range(coordinate, world, coordinates)) for coordinate in range(coordinates))


def local_readers(source: Layout, local: Mapping[str, Ranks]) -> Mapping[tuple[Ranks, int], Ranks]:
    """The readers of the files that only some ranks see, by these ranks and by coordinate.

    They share the coordinates of what they alone see as all ranks share those of all files.
    """
    seen: dict[Ranks, set[int]] = {}
    for slot in source.slots if local else ():
        for shard in range(slot.placement.cut.parts):
            if (ranks := local.get(slot.file_of(shard))) is not None:
                seen.setdefault(ranks, set()).add(slot.coordinate_of(shard))
    found = {}
    for ranks, coordinates in seen.items():
        dealt = deal(len(coordinates), len(ranks))
        for coordinate, places in zip(sorted(coordinates), dealt, strict=True):
            found[ranks, coordinate] = tuple(ranks[place] for place in places)
    return found


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
