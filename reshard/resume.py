"""Going on with a job that was interrupted: what earlier attempts wrote is read back first."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from reshard.distributed import Ranks
from reshard.errors import CheckpointError, StorageError
from reshard.journal import Record, Table
from reshard.plan import Plan
from reshard.storage import crc32_of, forget
from reshard.workspace import Workspace


def intact_runs(plan: Plan, ranks: Ranks, workspace: Workspace, own_files: Iterable[str]) -> Table:
    """The runs of earlier attempts that still have their checksum, read by all ranks together."""
    ranks.phase("resume")
    for file in own_files:
        # What a sync failed to bring to the disk may still be in memory, where it looks right.
        with contextlib.suppress(StorageError):  # what is lost is written again
            forget(workspace.data / file)
    table = ranks.together(lambda: Table.read(workspace.journals, ranks.step))
    ranks.agree("state of the journals", table.digest())
    paths = [workspace.data / file for file in plan.target.files]

    def looked_at(record: Record) -> bool:
        ranks.step()
        return _intact(paths, record)

    own = ranks.together(lambda: table.check(looked_at, ranks.rank, ranks.world))
    return table.kept(ranks.gather(own))


def _intact(paths: Sequence[Path], record: Record) -> bool:
    """Whether a journalled run still has its checksum; one that cannot be read has not."""
    if record.file >= len(paths):
        return False
    try:
        return crc32_of(paths[record.file], record.offset, record.length) == record.crc
    except (CheckpointError, StorageError):
        return False
