"""Who reads, sends and writes what: a pure function of two layouts and the number of ranks.

The ranks that have the parts of a block are its crew. A piece is the part of a block that one
target tensor holds: the unit that is written, journalled and checksummed. Every rank computes the
same plan; none is sent anywhere, and blocks are expanded as they are needed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise

from reshard.blocks import block_bytes, bounds_of, rows_of, volume
from reshard.crews import Crews, teams_of
from reshard.dealing import Dealing, Ranks, deal, deal_apart, rank_text, writers_by_file
from reshard.errors import ConfigError
from reshard.layout import Layout, StoredTensor
from reshard.moves import Block, Move, messages

EXCHANGES = ("collective", "direct")
WRITERS = ("nearest", "owner")


@dataclass(frozen=True)
class Plan:
    """The whole job for `world` ranks.

    `readers` and `owners` list the ranks of each mesh coordinate. `local` names the source files
    that not all ranks see, with the ranks that do, in order: only these read them. `machines` has
    the number of each rank's machine where no two machines may write one file.
    """

    source: Layout
    target: Layout
    world: int
    exchange: str = "collective"
    writers: str = "nearest"
    readers: tuple[Ranks, ...] = field(default=())
    owners: tuple[Ranks, ...] = field(default=())
    local: Mapping[str, Ranks] = field(default_factory=dict, hash=False)
    machines: Ranks = ()

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
        if self.exchange == "direct" and self.machines:
            raise ConfigError(
                "engine.exchange=direct: several machines would write one page of a file at a "
                "time, which its file system may not keep apart; use engine.exchange=collective, "
                "or engine.shared_files=always if it does"
            )
        for name, layout in (("readers", self.source), ("owners", self.target)):
            object.__setattr__(self, name, getattr(self, name) or self._sharing(layout))

    def _sharing(self, layout: Layout) -> tuple[Ranks, ...]:
        """The ranks of each mesh coordinate of a layout."""
        if self.machines:
            return deal_apart(layout.coordinates, self.machines)
        return deal(layout.coordinates, self.world)

    # Block table: depends on the two layouts only.

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All parameters, in the source's order."""
        return tuple(self.source.places)

    @cached_property
    def _volumes(self) -> Mapping[str, tuple[int, int]]:
        """For each parameter, the bytes read and the bytes written for it, copies counted."""
        sides = self.source.places, self.target.places
        return {name: (volume(sides[0][name]), volume(sides[1][name])) for name in self.names}

    @cached_property
    def block_bytes(self) -> int:
        """The size that blocks are cut to, in bytes of the wider of the two dtypes."""
        return block_bytes(sum(map(sum, self._volumes.values())))

    def row_bounds(self, parameter: str) -> tuple[int, ...]:
        """The rows at which the blocks of `parameter` begin, and its end."""
        slots = self.source.places[parameter] + self.target.places[parameter]
        return bounds_of(slots, self.block_bytes)

    def block(self, parameter: str, index: int) -> Block:
        """One of the blocks of `parameter`, which are counted in row order."""
        start, stop = self.row_bounds(parameter)[index : index + 2]
        return Block(parameter, rows_of(self.source.places[parameter], start, stop), index)

    def blocks(self, parameter: str) -> Iterator[Block]:
        """The blocks of `parameter`, in row order."""
        slots = self.source.places[parameter]
        for index, (start, stop) in enumerate(pairwise(self.row_bounds(parameter))):
            yield Block(parameter, rows_of(slots, start, stop), index)

    def blocks_in(self, parameter: str) -> int:
        """How many blocks a parameter has."""
        return len(self.row_bounds(parameter)) - 1

    def block_count(self) -> int:
        """How many blocks the whole job has."""
        return sum(map(self.blocks_in, self.names))

    # Who does what.

    @cached_property
    def _lines(self) -> Mapping[str, tuple[int, int]]:
        """In direct mode: where the bytes of each parameter begin in its line, and the line's end.

        A line has the parameters of which as many bytes are written for each that is read. Ranks
        share each line out evenly, in contiguous parts, and so both what is read and written.
        """
        lines: dict[Fraction, list[str]] = {}
        for name, (read, written) in self._volumes.items():
            lines.setdefault(Fraction(written, max(read, 1)), []).append(name)
        found: dict[str, tuple[int, int]] = {}
        for names in lines.values():
            *starts, end = accumulate((self._volumes[name][0] for name in names), initial=0)
            found |= {name: (start, end) for name, start in zip(names, starts, strict=True)}
        return found

    def dealt(self, block: Block) -> int:
        """The rank that a block is dealt to in direct mode."""
        start, end = self._lines[block.parameter]
        rows = self.source.places[block.parameter][0].placement.shape[0]
        middle = self._volumes[block.parameter][0] * (block.region.start[0] + block.region.stop[0])
        return min(self.world - 1, (start * 2 * rows + middle) * self.world // (end * 2 * rows))

    @cached_property
    def file_writers(self) -> Mapping[str, Ranks]:
        """The ranks of the one machine that writes a file, where that matters."""
        if not self.machines:
            return {}
        reading = Dealing(self.source, self.readers, self.local)
        return writers_by_file((self.source, self.target), reading, self.owners, self.machines)

    @cached_property
    def crews(self) -> Crews:
        """The crew of every block: the reader of each part, then who might keep each piece.

        In direct mode nobody takes turns, and crews are empty.
        """
        reading = writing = None
        if self.exchange == "collective":
            reading = Dealing(self.source, self.readers, self.local)
            if self.writers == "owner" or self.machines:
                writing = Dealing(self.target, self.owners, self.file_writers)
        sides = self.source, self.target
        teams = teams_of(sides, (reading, writing), self.row_bounds)
        return Crews(self.order, teams, ties=self.writers == "nearest")

    def _seen_by(self, name: str) -> tuple[Ranks, ...]:
        """The ranks that see each shard of a parameter, () where all do; () where all see all."""
        if not self.local:
            return ()
        return tuple(
            self.local.get(slot.file_of(shard), ())
            for slot in self.source.places[name]
            for shard in range(slot.placement.cut.parts)
        )

    def crew_of(self, parameter: str) -> Callable[[int], Ranks]:
        """The crew of each block of a parameter; in direct mode, the one rank that does it all."""
        if self.exchange == "direct":
            return lambda index: (self.dealt(self.block(parameter, index)),)
        return self.crews.of(parameter)

    def move(self, block: Block) -> Move:
        """Expand one block."""
        held = tuple(self.source.tensors_on(block.parameter, block.region))
        wanted = tuple(self.target.tensors_on(block.parameter, block.region))
        if self.exchange == "direct":
            rank = self.dealt(block)
            reads, pieces = (tuple((rank, stored) for stored in side) for side in (held, wanted))
            return Move(block, reads, pieces, ())
        crew = self.crew_of(block.parameter)(block.index)
        tie = self.crews.tie(block.parameter, block.index)
        reads = tuple(zip(crew, held, strict=False))
        keepers = crew[len(held) :] or (None,) * len(wanted)
        choices = [
            self._writers(piece, keeper, reads)
            for piece, keeper in zip(wanted, keepers, strict=True)
        ]
        pieces = tuple(
            (ranks[(tie + place) % len(ranks)], piece)
            for place, (ranks, piece) in enumerate(zip(choices, wanted, strict=True))
        )
        ties = math.lcm(*map(len, choices))
        return Move(block, reads, pieces, tuple(messages(reads, pieces)), ties)

    def _writers(
        self,
        piece: StoredTensor,
        keeper: int | None,
        reads: Sequence[tuple[int, StoredTensor]],
    ) -> Sequence[int]:
        """Who may write `piece`: its owner, or those that hold most of it."""
        if keeper is not None and self.writers == "owner":
            return (keeper,)
        may = self.file_writers.get(piece.file)
        held: dict[int, int] = {}
        for rank, stored in reads:
            common = stored.region & piece.region if stored.copy == 0 else None
            if common is not None and (may is None or rank in may):
                held[rank] = held.get(rank, 0) + common.numel
        if keeper is not None and not held:
            return (keeper,)
        most = max(held.values())
        return [rank for rank, numel in held.items() if numel == most]

    # The order of work.

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Parameters with the pipeline stages mixed evenly, and those of each stage in order.

        What different ranks see is mixed in the same way.
        """
        stages: dict[object, list[tuple[int, str]]] = {}
        totals: dict[object, int] = {}
        for name, (read, _) in self._volumes.items():
            stage = self._seen_by(name)[:1], self.source.places[name][0].coordinate_of(0)
            totals[stage] = totals.get(stage, 0) + read
            stages.setdefault(stage, []).append((totals[stage], name))
        keyed = [
            (done / max(totals[stage], 1), stage, place, name)
            for stage, members in stages.items()
            for place, (done, name) in enumerate(members)
        ]
        return tuple(name for *_, name in sorted(keyed))

    def own_blocks(self, rank: int) -> Iterator[Block]:
        """What is dealt to a rank in direct mode."""
        for name, (start, end) in self._lines.items():
            stop = start + self._volumes[name][0]
            if start * self.world < end * (rank + 1) and stop * self.world > end * rank:
                yield from (block for block in self.blocks(name) if self.dealt(block) == rank)

    # What all must agree on.

    def digest(self, job: str) -> str:
        """What all ranks must agree on before a byte moves; `job` is the digest of the job."""
        parts: tuple[object, ...] = (
            *(job, self.world, self.exchange, self.writers, self.readers, self.owners),
            *((sorted(self.local.items()),) if self.local else ()),
            *((self.machines,) if self.machines else ()),
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
