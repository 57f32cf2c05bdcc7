"""Proof by reading: a directory against its own manifest, every byte of it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from reshard import formats
from reshard.distributed import Ranks
from reshard.errors import CheckpointError, ConfigError, VerifyError
from reshard.families.model import Json
from reshard.formats import common
from reshard.readback import Span, differing, spans_of
from reshard.units import size_text

PROBLEMS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says of the files around it: `format` is that of the checkpoint."""

    sizes: Mapping[str, int]
    spans: Sequence[Span]
    format: str


def against_manifest(path: Path, ranks: Ranks) -> list[str]:
    """Compare every byte with reshard.json; a VerifyError names file, tensor and byte range."""
    root = published_in(path)
    manifest = ranks.together(lambda: read_manifest(root))
    wrong = ranks.gather(wrong_files(root, manifest) if ranks.rank == 0 else {})[0]
    intact = [span for span in manifest.spans if span.file not in wrong]
    found = [span.difference("the manifest") for span in differing(root, intact, ranks)]
    raise_on(f"`{root}`", [*wrong.values(), *found])
    total = size_text(sum(manifest.sizes.values()))
    files = len(manifest.sizes)
    return [f"verified: {files} files, {total} agree with {common.MANIFEST} in {root}"]


def raise_on(what: str, problems: Sequence[str]) -> None:
    """A VerifyError that has the first problems and the number of all, if there are any."""
    if not problems:
        return
    shown, more = "; ".join(problems[:PROBLEMS_SHOWN]), len(problems) - PROBLEMS_SHOWN
    count = f" {len(problems)} problems:" if len(problems) > 1 else ""
    raise VerifyError(f"{what}:{count} {shown}" + (f" (and {more} more)" if more > 0 else ""))


def published_in(path: Path) -> Path:
    """`path`, or the folder below it that a target was published in, by where our manifest is."""
    below = (path / known.FOLDER for known in formats.formats().values() if known.FOLDER)
    places = (path, *below)
    return next((place for place in places if (place / common.MANIFEST).is_file()), path)


def has_manifest(path: Path) -> bool:
    """Whether `path` is, or was published with, a directory of ours."""
    return (published_in(path) / common.MANIFEST).is_file()


def read_manifest(root: Path) -> Manifest:
    """The manifest of a directory, whose every byte must be as it was written."""
    name = root / common.MANIFEST
    if not name.is_file():
        raise CheckpointError(
            f"`{root}`: has no {common.MANIFEST}; compare it with another checkpoint: verify A B"
        )
    try:
        record = common.read_json(name)
        held = common.read_bytes(name)
    except CheckpointError as error:
        raise VerifyError(str(error)) from None
    _check_bytes(name, record, held)
    try:
        return _manifest(record)
    except (TypeError, ValueError):
        raise CheckpointError(f"`{name}`: not a manifest of this program") from None


def _check_bytes(name: Path, record: Mapping[str, Json], held: bytes) -> None:
    """Require a manifest's own checksum, and the very bytes in which it was written."""
    try:
        rest = {key: value for key, value in record.items() if key != "crc32"}
        agrees = record.get("crc32") == isal_zlib.crc32(common.dump_json(rest))
        as_written = held == common.dump_json(record)
    except (ConfigError, ValueError, RecursionError):  # values that no JSON of ours holds
        agrees = as_written = False
    if not agrees:
        raise VerifyError(f"`{name}`: differs from its own checksum")
    if not as_written:
        raise VerifyError(f"`{name}`: says what it said, but its bytes are not those written")


def _manifest(record: Mapping[str, Json]) -> Manifest:
    """The parts that are needed here; anything of the wrong kind is a TypeError or ValueError."""
    files, target = record.get("files"), record.get("target")
    if not isinstance(files, dict):
        raise TypeError
    sizes = {}
    for file, entry in files.items():
        size = entry.get("size") if isinstance(entry, dict) else None
        if not isinstance(size, int):
            raise TypeError
        sizes[common.confined(file, common.MANIFEST)] = size
    said = target.get("format") if isinstance(target, dict) else None
    return Manifest(sizes, spans_of(files), said if isinstance(said, str) else "unknown")


def wrong_files(root: Path, manifest: Manifest) -> dict[str, str]:
    """A line for every file that is missing or of another size, or that is not in the manifest."""
    lost = wrong_sizes(root, manifest)
    extra = sorted(_leaves(root) - set(manifest.sizes) - {common.MANIFEST})
    return lost | {
        leaf: f"`{leaf}` is not in the manifest"
        for leaf in extra
        if not any(file.startswith(f"{leaf}/") for file in manifest.sizes)
    }


def wrong_sizes(root: Path, manifest: Manifest) -> dict[str, str]:
    """A line for every file of the manifest that is missing or of another size."""
    problems = {}
    for file, size in manifest.sizes.items():
        path = root / file
        if not path.is_file():
            problems[file] = f"`{file}` is missing"
        elif (found := path.stat().st_size) != size:
            problems[file] = f"`{file}`: {found} bytes, expected {size}"
    return problems


def _leaves(root: Path) -> set[str]:
    """What lies below a directory: files, links to directories, and directories without content."""
    found: set[str] = set()
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found |= set(_below(root, folder, [*names, *links]))
        if not folders and not names and folder != str(root):
            found |= set(_below(root, folder, [""]))
    return found


def _below(root: Path, folder: str, names: Iterable[str]) -> Iterable[str]:
    """Names in a folder, as paths from `root` on."""
    return (os.path.relpath(os.path.join(folder, name), root) for name in names)
