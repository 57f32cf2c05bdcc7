"""All that is wrong with a checkpoint's files, and what unfinished jobs have left around it.

Headers, sizes and small files are looked at; `verify` reads every byte.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from reshard import containers, formats, journal, manifest
from reshard.errors import CheckpointError, ReshardError
from reshard.families.model import Json
from reshard.formats import common
from reshard.formats.options import Scan
from reshard.units import size_text
from reshard.verify import has_manifest, published_in, wrong_sizes

CONFIGS = (common.CONFIG, "params.json", "model_config.json")
# Files whose container their names tell, and folders of a checkpoint in which no weights lie.
CONTAINERS = {
    ".safetensors": "safetensors",
    ".pth": "torchfile",
    ".distcp": "dcpfile",
    ".gguf": "gguffile",
}
NO_WEIGHTS = ("optimizer", "lr_scheduler", "random")
PARTIAL, LOCK = ".partial-", ".lock"
GOES_ON = "the same command goes on with it"


def found_in(path: Path, scan: Scan | None) -> list[str]:
    """Every file that is missing, cut, unreadable or not what it should be, a line for each fault.

    `scan` None: the checkpoint could not be scanned, so that all its files are suspected.
    """
    around = () if scan is None else (scan.root, *scan.folders)
    sizes = _sizes(path)
    problems = list(sizes.values())
    if scan is not None:
        for file in scan.layout.files:
            problems += [] if file in sizes else _of_file(scan, file)
    else:
        problems += _suspected(path, set(sizes))
    indexes = _indexes(path, scan)
    for folder in dict.fromkeys((path, path / common.ASSETS, *around)):
        problems += _small_files(folder, indexes)
    return list(dict.fromkeys(problems))


def _sizes(path: Path) -> dict[str, str]:
    """A line for each file that is not as large as our manifest says, if there is one."""
    if not has_manifest(path):
        return {}
    root = published_in(path)
    try:
        wrong = wrong_sizes(root, manifest.read(root))
    except ReshardError as error:
        return {common.MANIFEST: str(error)}
    return {file: f"{line} ({common.MANIFEST} names it)" for file, line in wrong.items()}


def _of_file(scan: Scan, file: str) -> list[str]:
    """What is wrong with the header of a file, of which the scan knows what it should hold."""
    try:
        return common.header_problems(scan, file)
    except CheckpointError:
        return _unreadable(scan.layout.container, scan.root, file)


def _unreadable(container: str, root: Path, file: str) -> list[str]:
    """What keeps the tensors of a file from being found in it."""
    problems = []
    try:
        entries = containers.index(container, root, file).entries
    except CheckpointError as error:
        return [str(error)]
    for key in entries:
        try:
            entries[key]
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _suspected(path: Path, known: set[str]) -> Iterator[str]:
    """What is wrong with all files below a directory that may hold weights, but for `known`."""
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(n for n in folders if n not in NO_WEIGHTS and PARTIAL not in n)
        for name in sorted(names):
            container = CONTAINERS.get(Path(name).suffix)
            if container and os.path.relpath(os.path.join(folder, name), path) not in known:
                yield from _unreadable(container, Path(folder), name)


def _indexes(path: Path, scan: Scan | None) -> set[str]:
    """The names of the index that belongs to the weights; of any, where these are of no format.

    A download has indexes of weights that were left out of it: of other containers, or variants.
    """
    try:
        known = [formats.detect(path) if scan is None else formats.named(scan.format)]
    except ReshardError:
        known = list(formats.formats().values())
    return {name for name in (getattr(one, "INDEX", None) for one in known) if name is not None}


def _small_files(folder: Path, indexes: set[str]) -> Iterator[str]:
    """What is wrong with configs, indexes and tokenizers, and which files an index lacks."""
    names = {*formats.asset_names(), *CONFIGS, common.MANIFEST}
    for name in sorted(names | indexes):
        path = folder / name
        if not path.is_file():
            continue
        if not path.stat().st_size:
            yield f"`{path}`: is empty"
        elif path.suffix == ".json":
            try:
                record = common.read_json(path)
            except CheckpointError as error:
                yield str(error)
                continue
            table = record.get("weight_map") if name in indexes else None
            yield from _lacking(path, table.values() if isinstance(table, dict) else ())


def _lacking(index: Path, listed: Iterable[Json]) -> Iterator[str]:
    """A line for every file of an index that is not there, or that cannot be."""
    for file in sorted({str(file) for file in listed}):
        try:
            path = index.parent / common.confined(file, str(index))
        except CheckpointError as error:
            yield str(error)
            continue
        if not path.is_file():
            yield f"`{path}`: is missing, but `{index.name}` names it"


# What jobs leave that did not come to their end.


def unfinished(path: Path) -> str | None:
    """What to say of a directory that is a job's unfinished result; None for any other."""
    partial = path.absolute() if PARTIAL in path.absolute().name else path.absolute().parent
    if PARTIAL not in partial.name or not (partial / "data").is_dir():
        return None
    target = partial.name.partition(PARTIAL)[0]
    return f"`{partial}`: the unfinished result `{target}` ({_progress(partial)}); {GOES_ON}"


def left_beside(path: Path) -> Iterator[str]:
    """A line for each unfinished job on this directory, and for a lock."""
    here = path.absolute()
    stems = [(here.parent, here.name)]
    for folder in filter(None, (known.FOLDER for known in formats.formats().values())):
        stems.append((here.parent if here.name == folder else here, "reshard"))
    for parent, stem in dict.fromkeys(stems):
        try:
            names = sorted(os.listdir(parent))
        except OSError:
            continue
        for partial in (parent / name for name in names if name.startswith(f"{stem}{PARTIAL}")):
            if partial != here:
                yield f"`{partial}`: an unfinished job ({_progress(partial)}); {GOES_ON}"
        if f"{stem}{LOCK}" in names:
            yield f"`{parent / stem}{LOCK}`: a job is at work on it, or was killed"


def _progress(partial: Path) -> str:
    """How much of a partial result was written, by its journals."""
    records = journal.read(partial / "journals")
    done = {(record.file, record.offset): record.length for record in records}
    files = [file for file in (partial / "data").rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    return f"{size_text(sum(done.values()))} of {size_text(total)} written"
