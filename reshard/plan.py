"""Who reads, sends and writes what: a pure function of two layouts and the number of ranks.

A block is whole rows of one parameter (whole heads where rows belong to rotary heads): the unit of
work. A piece is the part of a block that one target tensor holds: the unit that is written,
journalled and checksummed. Every rank computes the same plan; none is sent anywhere, and blocks are
expanded as they are needed.
"""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from reshard.dealing import Ranks, deal, local_readers, rank_text
from reshard.encodings import stored_bytes
from reshard.errors import ConfigError
from reshard.geometry import Region, whole
from reshard.layout import Layout, Slot, StoredTensor
from reshard.moves import Block, Load, Move, loads_of, messages

MAX_BLOCK_BYTES = 4 << 20
MIN_BLOCK_BYTES = 4 << 10
BLOCKS_AIMED_AT = 1024
TIE_PERIOD = 8
EXCHANGES = ("collective", "direct")
WRITERS = ("nearest", "owner")


@lru_cache(maxsize=256)
def row_bounds(
    rows: int, rows_per_block: int, grain: int, cuts: frozenset[Sequence[int]]
) -> tuple[int, ...]:
    """Where the blocks of a parameter begin, and where it ends.

    A block has at most `rows_per_block` rows, a multiple of `grain`. It ends where a shard of
    either layout ends (`cuts`: the rows at which shards begin), so that its rows have one home,
    unless that would cut a head.
    """
    edges = {edge for cut in cuts for edge in cut if edge < rows and edge % grain == 0}
    ordered = sorted(edges | {0, rows})
    bounds = [0]
    for start, stop in pairwise(ordered):
        units = -(-(stop - start) // grain)
        count = -(-units * grain // max(rows_per_block, grain))
        bounds += [min(stop, start + units * part // count * grain) for part in range(1, count + 1)]
    return tuple(bounds)


def _block_bytes(total: int) -> int:
    """The block size for a model of `total` bytes: 4 MiB, or less for a small model."""
    return min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, 1 << (total // BLOCKS_AIMED_AT).bit_length()))


@dataclass(frozen=True)
class Plan:
    """The whole job for `world` ranks.

    `readers` and `owners` list the ranks of each mesh coordinate. `local` names the source files
    that not all ranks see, with the ranks that do, in order: only these read them.
    """

    source: Layout
    target: Layout
    world: int
    exchange: str = "collective"
    writers: str = "nearest"
    readers: tuple[Ranks, ...] = field(default=())
    owners: tuple[Ranks, ...] = field(default=())
    local: Mapping[str, Ranks] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES or self.writers not in WRITERS:
            raise ConfigError(
                f"engine: unknown exchange `{self.exchange}` or writers `{self.writers}`"
            )
        if self.exchange == "direct" and self.writers == "owner":
            raise ConfigError(
                "engine.writers=owner needs engine.exchange=collective: in direct mode the rank "
                "that reads a block writes it"
            )
        if self.exchange == "direct" and self.local:
            file, ranks = next(iter(self.local.items()))
            raise ConfigError(
                f"engine.exchange=direct: needs every file visible to every rank, but `{file}` is "
                f"seen by {rank_text(ranks)} alone; use engine.exchange=collective"
            )
        object.__setattr__(
            self, "readers", self.readers or deal(self.source.coordinates, self.world)
        )
        object.__setattr__(self, "owners", self.owners or deal(self.target.coordinates, self.world))

    # Block table: depends on the two layouts only.

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters, in the source's order."""
        return tuple(self.source.places)

    @cached_property
    def _number(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def block_bytes(self) -> int:
        """The size that blocks are cut to, in bytes of the wider of the two dtypes."""
        return _block_bytes(sum(sum(pair) for pair in self._volumes))

    @cached_property
    def _volumes(self) -> tuple[tuple[int, int], ...]:
        """For each parameter, the bytes read and the bytes written for it, copies counted."""
        return tuple(
            (_volume(self.source.places[name]), _volume(self.target.places[name]))
            for name in self.names
        )

    def row_bounds(self, parameter: str) -> tuple[int, ...]:
        """The rows at which the blocks of `parameter` begin, and its end."""
        slots = self.source.places[parameter] + self.target.places[parameter]
        shape = slots[0].placement.shape
        row_numel = whole(shape[1:]).numel
        if not shape[0] * row_numel:
            return (0,)
        itemsize = max(slot.dtype.itemsize for slot in slots)
        grain = max(1, *(slot.placement.interleaved for slot in slots))
        rows = max(1, self.block_bytes // (row_numel * itemsize) // grain) * grain
        cuts = frozenset(slot.placement.edges() for slot in slots)
        return row_bounds(shape[0], rows, grain, cuts)

    def blocks(self, parameter: str) -> Iterator[Block]:
        """The blocks of `parameter`, in row order."""
        tail = self.source.places[parameter][0].placement.shape[1:]
        origin, first = (0,) * len(tail), self._ordinals[self._number[parameter]]
        bounds = self.row_bounds(parameter)
        for index, (start, stop) in enumerate(pairwise(bounds)):
            yield Block(parameter, Region((start, *origin), (stop, *tail)), first + index)

    @cached_property
    def _ordinals(self) -> tuple[int, ...]:
        """The ordinal of each parameter's first block, and the number of all blocks."""
        return tuple(accumulate((len(self.row_bounds(name)) - 1 for name in self.names), initial=0))

    def block_count(self) -> int:
        """How many blocks the whole job has."""
        return self._ordinals[-1]

    # Who does what.

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Direct mode deals contiguous bytes: where each parameter begins, and the end."""
        return tuple(accumulate((sum(pair) for pair in self._volumes), initial=0))

    def _dealt(self, block: Block) -> int:
        """The rank that a block is dealt to in direct mode."""
        number = self._number[block.parameter]
        rows = self.source.places[block.parameter][0].placement.shape[0]
        weight = sum(self._volumes[number])
        middle = self._starts[number] * 2 * rows + weight * (
            block.region.start[0] + block.region.stop[0]
        )
        return min(self.world - 1, middle * self.world // (self._starts[-1] * 2 * rows))

    def reader(self, block: Block, stored: StoredTensor) -> int:
        """The rank that reads `stored` for `block`."""
        if self.exchange == "direct":
            return self._dealt(block)
        seen_by = self.local.get(stored.file) if self.local else None
        ranks = (
            self.readers[stored.coordinate]
            if seen_by is None
            else self._local_readers[seen_by, stored.coordinate]
        )
        return ranks[block.ordinal % len(ranks)]

    @cached_property
    def _local_readers(self) -> Mapping[tuple[Ranks, int], Ranks]:
        return local_readers(self.source, self.local)

    def _seen_by(self, name: str) -> tuple[Ranks, ...]:
        """The ranks that see each shard of a parameter, () where all do; () where all see all."""
        if not self.local:
            return ()
        return tuple(
            self.local.get(slot.file_of(shard), ())
            for slot in self.source.places[name]
            for shard in range(slot.placement.cut.parts)
        )

    def _writer(
        self, block: Block, piece: StoredTensor, reads: Sequence[tuple[int, StoredTensor]]
    ) -> int:
        """The rank to write `piece`: the block's, the coordinate's, or the one that holds most."""
        if self.exchange == "direct":
            return self._dealt(block)
        if self.writers == "owner":
            ranks = self.owners[piece.coordinate]
            return ranks[block.ordinal % len(ranks)]
        held: dict[int, int] = {}
        for rank, stored in reads:
            common = stored.region & piece.region if stored.copy == 0 else None
            if common is not None:
                held[rank] = held.get(rank, 0) + common.numel
        most = max(held.values())
        best = [rank for rank, numel in held.items() if numel == most]
        return best[(block.ordinal % TIE_PERIOD + piece.shard) % len(best)]

    def move(self, block: Block) -> Move:
        """Expand one block."""
        reads = tuple(
            (self.reader(block, stored), stored)
            for stored in self.source.tensors_on(block.parameter, block.region)
        )
        pieces = tuple(
            (self._writer(block, piece, reads), piece)
            for piece in self.target.tensors_on(block.parameter, block.region)
        )
        return Move(block, reads, pieces, tuple(messages(reads, pieces)))

    # The order of work.

    def moves(self, rank: int) -> Iterator[Move]:
        """What `rank` has to go through: in collective mode all moves, in direct mode its own."""
        if self.exchange == "direct":
            first = max(0, bisect_right(self._starts, self._starts[-1] * rank // self.world) - 1)
            last = bisect_left(self._starts, -(-self._starts[-1] * (rank + 1) // self.world))
            names: Iterable[str] = self.names[first:last]
            return (
                self.move(block)
                for name in names
                for block in self.blocks(name)
                if self._dealt(block) == rank
            )
        return (
            self.move(block) for name in self._interleaved() for block in self._shards_in_turn(name)
        )

    def _interleaved(self) -> list[str]:
        """Parameters with the pipeline stages mixed evenly, and those of each stage in order.

        What different ranks see is mixed in the same way.
        """
        stages: dict[object, list[tuple[int, str]]] = {}
        totals: dict[object, int] = {}
        for name, (read, _) in zip(self.names, self._volumes, strict=True):
            stage = self._seen_by(name)[:1], self.source.places[name][0].coordinate_of(0)
            totals[stage] = totals.get(stage, 0) + read
            stages.setdefault(stage, []).append((totals[stage], name))
        keyed = [
            (done / totals[stage], stage, place, name)
            for stage, members in stages.items()
            for place, (done, name) in enumerate(members)
        ]
        return [name for *_, name in sorted(keyed)]

    def _shards_in_turn(self, parameter: str) -> list[Block]:
        """The blocks of a parameter, one of each source shard in turn, to keep all readers busy."""
        placement = self.source.places[parameter][0].placement
        if len(placement.edges()) == 1:
            return list(self.blocks(parameter))
        seen: dict[int, int] = {}
        keyed = []
        for block in self.blocks(parameter):
            shard = next(iter(placement.shards(block.region)))
            seen[shard] = seen.get(shard, 0) + 1
            keyed.append((seen[shard], shard, block))
        return [block for *_, block in sorted(keyed, key=lambda item: item[:2])]

    def rounds(self, rank: int, capacity: int, align: int) -> Iterator[list[Move]]:
        """Moves in groups for which no rank reads, sends, receives or writes over `capacity` bytes.

        Each part is counted rounded up to `align` bytes. All ranks get the same rounds in
        collective mode.
        """
        group: list[Move] = []
        loads: dict[int, Load] = {}
        for move in self.moves(rank):
            added = loads_of(move, align)
            for member, load in added.items():
                total = Load()
                total.add(load)
                total.add(loads.get(member, Load()))
                if group and total.largest() > capacity:
                    yield group
                    group, loads = [], {}
                    break
            group.append(move)
            for member, load in added.items():
                loads.setdefault(member, Load()).add(load)
        if group:
            yield group

    # What it comes to.

    def signature(self, name: str) -> object:
        """What a parameter's loads depend on besides its name; None where it is like no other."""
        number = self._number[name]
        slots = self.source.places[name], self.target.places[name]
        if self.exchange == "direct":
            first, last = self._starts[number], self._starts[number + 1] - 1
            rank = first * self.world // self._starts[-1]
            alone = rank == last * self.world // self._starts[-1]
            return (rank, _geometry(slots[0]), _geometry(slots[1])) if alone else None
        return (
            self._turn(name),
            self._seen_by(name),
            slots[0][0].coordinate_of(0),
            _geometry(slots[0]),
            _geometry(slots[1]),
        )

    def _turn(self, name: str) -> object:
        """Where a parameter's blocks begin in the turns of ranks, and where its owners begin."""
        shared = (*self.readers, *self.owners, *self._local_readers.values())
        period = math.lcm(TIE_PERIOD, *(len(ranks) for ranks in shared))
        home = self.target.places[name][0].coordinate_of(0) if self.writers == "owner" else None
        return self._ordinals[self._number[name]] % period, home

    def least_capacity(self, align: int) -> int:
        """The largest load that any single block puts on a rank: no round can be smaller."""
        alike = {}
        for name in self.names:
            slots = self.source.places[name], self.target.places[name]
            # Nearest writers turn with the ranks, so only ties tell blocks of one shape apart.
            turn: object = self._ordinals[self._number[name]] % TIE_PERIOD
            if self.writers == "owner" or self.local:
                turn = self._turn(name), self._seen_by(name), slots[0][0].coordinate_of(0)
            alike[turn, _geometry(slots[0]), _geometry(slots[1])] = name
        loads = (
            load.largest()
            for name in alike.values()
            for block in self.blocks(name)
            for load in loads_of(self.move(block), align).values()
        )
        return max(loads, default=0)

    def digest(self, job: str) -> str:
        """What all ranks must agree on before a byte moves; `job` is the digest of the job."""
        parts: tuple[object, ...] = (
            *(job, self.world, self.exchange, self.writers, self.readers, self.owners),
            *((sorted(self.local.items()),) if self.local else ()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def table_digest(self) -> str:
        """A digest of the two layouts and the block table, independent of ranks and mode."""
        record = hashlib.sha256()
        for layout in (self.source, self.target):
            record.update(repr((layout.container, layout.constants)).encode())
            for slot in layout.slots:
                record.update(repr(slot).encode())
        record.update(repr([self.row_bounds(name) for name in self.names]).encode())
        return record.hexdigest()


def _geometry(slots: Sequence[Slot]) -> object:
    """The places of a parameter without their names."""
    home = slots[0].coordinate_of(0)
    return tuple(
        (
            slot.placement,
            slot.dtype,
            slot.encoding,
            tuple(place - home for _, place in slot.spread) or slot.coordinate - home,
        )
        for slot in slots
    )


def _volume(slots: Sequence[Slot]) -> int:
    """Bytes of all places of one parameter."""
    return sum(
        stored_bytes(slot.placement.shape, slot.dtype, slot.encoding) * slot.placement.cut.copies
        for slot in slots
    )
