"""The end of a job: files are proven and finished, small ones written, and all is published."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from reshard import commit, manifest
from reshard.dealing import files_of
from reshard.distributed import Ranks
from reshard.errors import StorageError
from reshard.formats import common
from reshard.formats.options import Scan
from reshard.journal import Table
from reshard.plan import Plan
from reshard.prepare import Prepared, small_files
from reshard.readback import differing
from reshard.storage import forget, sync_all
from reshard.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Finish:
    """What one rank does of it, once every piece is written and journalled."""

    prepared: Prepared
    scan: Scan
    plan: Plan
    ranks: Ranks
    workspace: Workspace
    force: bool

    def run(self, places: commit.TargetPlaces) -> int:
        """Finish the files of this rank; rank 0 adds the small ones and publishes.

        Returns the bytes of the small files, which rank 0 has written.
        """
        ranks, engine = self.ranks, self.prepared.config.engine
        ranks.phase("commit")
        parts = ranks.gather(ranks.together(lambda: self._finish_files(places, engine.fsync)))
        records = {name: record for part in parts for name, record in part.items()}
        small: dict[str, dict[str, object]] = {}
        if ranks.rank == 0:
            small = self._write_small_files(places, records, engine.fsync)
        if engine.verify:
            self._read_back({**records, **ranks.gather(small)[0]})
        ranks.phase("publish")
        if ranks.rank == 0:
            self.workspace.publish(force=self.force, fsync=engine.fsync)
        ranks.barrier("published")
        if ranks.rank == 0:
            self.workspace.discard()
        return sum(int(str(record["size"])) for record in small.values())

    def _read_back(self, records: Mapping[str, Mapping[str, object]]) -> None:
        """Compare every byte of the result with what was to be written; from the disk if synced."""
        data, ranks = self.workspace.data, self.ranks
        for file in records if ranks.first_here else ():  # each machine remembers for itself
            forget(data / file)
        ranks.barrier("verify")
        if wrong := differing(data, manifest.spans_of(records), ranks):
            raise StorageError(
                f"{wrong[0].difference('what was written')}; a disk or a memory is at fault: "
                "the result is not published"
            )

    def _finish_files(
        self, places: commit.TargetPlaces, fsync: bool
    ) -> dict[str, dict[str, object]]:
        """Prove, patch and sync the files of this rank; their records for the manifest."""
        ranks, target = self.ranks, self.plan.target
        own = files_of(ranks.rank, ranks.world, target.files, self.plan.file_writers)
        numbers = {file: number for number, file in enumerate(target.files)}
        table = Table.read(self.workspace.journals, ranks.step, [numbers[file] for file in own])
        records = {}
        for file in own:
            ranks.step()
            extents = commit.finish_file(
                self.workspace.data,
                target,
                file,
                places.skeleton(file),
                table.of_file(numbers[file]),
            )
            records[file] = commit.file_record(extents)
        if fsync:
            sync_all((self.workspace.data / file for file in records), ranks.step)
        return records

    def _write_small_files(
        self,
        places: commit.TargetPlaces,
        records: Mapping[str, Mapping[str, object]],
        fsync: bool,
    ) -> dict[str, dict[str, object]]:
        """Write what is not weights, the manifest of all files last; the records of these."""
        prepared, data = self.prepared, self.workspace.data
        closing = prepared.target_format.closing_files(
            prepared.target, prepared.target_options, places.skeleton
        )
        small = {
            name: commit.write_pieces(data / name, pieces, what, fsync=fsync)
            for what, group in (("text", small_files(prepared)), ("header", closing))
            for name, pieces in group.items()
        }
        body = {
            "job": self.workspace.digest,
            "source": {
                "layout": prepared.source.name,
                "files": len(prepared.source.files),
                "bytes": prepared.source.total_bytes(),
            },
            "target": {
                "layout": prepared.target.name,
                "format": prepared.target_format.NAME,
                "declared": prepared.target_format.declared(prepared.target_options),
            },
            "model": prepared.target_model.to_json(),
            "notes": list(prepared.notes),
            "left_behind": list(self.scan.left_behind),
            "libraries": library_versions(self.plan),
            "files": {**records, **small},
        }
        listed = manifest.written(body)
        path = data / common.MANIFEST
        small[common.MANIFEST] = commit.write_pieces(path, (listed,), "text", fsync=fsync)
        if fsync:
            commit.sync_directories(data, self.ranks.step)
        return small


def library_versions(plan: Plan) -> dict[str, str]:
    """The versions of the program and of the libraries that shape its output."""
    found = {}
    slots = (*plan.source.slots, *plan.target.slots)
    codecs = ("gguf", "numpy") if any(slot.encoding is not None for slot in slots) else ()
    for name in ("reshard", "torch", "safetensors", *codecs):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
