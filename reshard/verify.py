"""Proof by reading: a directory against its own manifest, every byte of it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from reshard import formats
from reshard.distributed import Ranks
from reshard.errors import VerifyError, some
from reshard.formats import common
from reshard.manifest import Manifest, read
from reshard.readback import differing
from reshard.units import size_text


def against_manifest(path: Path, ranks: Ranks) -> list[str]:
    """Compare every byte with reshard.json; a VerifyError names file, tensor and byte range."""
    root = published_in(path)
    held = ranks.together(lambda: read(root))
    wrong = ranks.gather(wrong_files(root, held) if ranks.rank == 0 else {})[0]
    intact = [span for span in held.spans if span.file not in wrong]
    found = [span.difference("the manifest") for span in differing(root, intact, ranks)]
    raise_on(f"`{root}`", [*wrong.values(), *found])
    total = size_text(sum(held.sizes.values()))
    files = len(held.sizes)
    return [f"verified: {files} files, {total} agree with {common.MANIFEST} in {root}"]


def raise_on(what: str, problems: Sequence[str]) -> None:
    """A VerifyError that has the first problems and the number of all, if there are any."""
    if not problems:
        return
    count = f" {len(problems)} problems:" if len(problems) > 1 else ""
    raise VerifyError(f"{what}:{count} {some(problems)}")


def published_in(path: Path) -> Path:
    """`path`, or the folder below it that a target was published in, by where our manifest is."""
    below = (path / known.FOLDER for known in formats.formats().values() if known.FOLDER)
    places = (path, *below)
    return next((place for place in places if (place / common.MANIFEST).is_file()), path)


def has_manifest(path: Path) -> bool:
    """Whether `path` is, or was published with, a directory of ours."""
    return (published_in(path) / common.MANIFEST).is_file()


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
