"""A source whose files lie on the disks of several machines, looked at as if it were one directory.

Each rank first looks at the source alone. Where that fails for one, or they find different things,
each makes a view in which all files stand. Small files that some format reads must be the same
wherever they are, and are copied. What a scan wants to know of weights that are not here (where
tensors lie, a few rows) is noted; ranks that see them tell all others, and all scan again, until
nothing is wanted. The bytes of weights cross later, as the plan says.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from pathlib import Path

from reshard import assets, containers, formats
from reshard.config import Side
from reshard.errors import ReshardError
from reshard.formats import common
from reshard.sights import compared, look
from reshard.smallfiles import Meeting
from reshard.sources import Source, source_of
from reshard.telling import HeaderOf, Want, answers, piece_bytes, spread
from reshard.view import View, made, through, within

# What formats read beside the weights, other than what is carried to the target.
READ = (
    common.CONFIG,
    common.MANIFEST,
    "params.json",
    "model_config.json",
    "latest.txt",
    "train_params.yaml",
    ".metadata",
)
INDEX = ".index.json"


def look_together(side: Side, meeting: Meeting) -> tuple[Source, View | None]:
    """The source of a job, as all ranks see it together; with a view where that takes one."""
    found = _attempt(side)
    marks = meeting.gather("" if isinstance(found, ReshardError) else _marked(found))
    if len(marks) > 1 and side.path is not None and ("" in marks or len(set(marks)) > 1):
        mine = look(side.path, _around())
        sights = compared(mine, meeting)
        if mine is not None and sights is not None:
            view = made(side.path, mine, sights, whole_everywhere(sights), meeting)
            with through(view):
                return _scan_together(replace(side, path=view.root), view, meeting), view
    return meeting.together(lambda: _required(found)), None


def _attempt(side: Side) -> Source | ReshardError:
    """The source, or what is wrong with it."""
    try:
        return source_of(side)
    except ReshardError as error:
        return error


def _required(found: Source | ReshardError) -> Source:
    if isinstance(found, ReshardError):
        raise found
    return found


def _marked(source: Source) -> str:
    """The mark of a source; "" where this rank may not look at all of it."""
    try:
        return _mark(source)
    except (ReshardError, OSError):
        return ""


def _mark(source: Source) -> str:
    """A digest of what a rank found by itself, which is the same where all see the same files."""
    scan = source.scan
    if scan is None:
        return "imagined"
    states = [(file, containers.version(scan.root / file)) for file in scan.layout.files]
    small = assets.carried((scan.root, *scan.folders), formats.asset_names(), ())
    parts = (
        *(scan.format, scan.layout.name, scan.model.to_json(), scan.assumed, scan.left_behind),
        *(scan.inside, sorted(small), [(file, state and state[:2]) for file, state in states]),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _around() -> list[str]:
    """The small files around a directory of weights that some format looks for."""
    folders = {known.FOLDER for known in formats.formats().values()} | {"", assets.ORIGINAL}
    names = {*formats.asset_names(), common.CONFIG, common.MANIFEST, "params.json"}
    return sorted(
        os.path.normpath(f"../{folder}/{part}/{name}")
        for folder in folders
        for part in ("", common.ASSETS)
        for name in names
    )


def whole_everywhere(names: Iterable[str]) -> set[str]:
    """Those of some files that a format reads or carries as they are."""
    known = {*formats.asset_names(), *READ}
    return {
        name
        for name, last in ((name, os.path.basename(name)) for name in names)
        if last in known or last.endswith(INDEX) or last.upper().startswith(assets.LEGAL_TEXTS)
    }


def _scan_together(side: Side, view: View, meeting: Meeting) -> Source:
    """Scan a view, until all that is wanted of hollow files is known."""
    found = _attempt(side)
    while wants := {want for part in meeting.gather(view.wants) for want in part}:
        _ask(sorted(wants | _alike(wants, view), key=repr), view, meeting)
        view.wants.clear()
        found = _attempt(side)

    def unambiguous() -> Source:
        source = _required(view.cause(found) if isinstance(found, ReshardError) else found)
        if source.scan is not None:
            view.local(source.scan)
        return source

    return meeting.together(within(view, unambiguous))


def _alike(wants: Set[Want], view: View) -> set[Want]:
    """The headers of all files that are called like those whose headers are wanted."""
    headers = (want for want in wants if isinstance(want, HeaderOf))
    kinds = {(Path(want.file).suffix, want.container) for want in headers}
    return {
        HeaderOf(file, container)
        for file, sight in view.sights.items()
        for suffix, container in kinds
        if Path(file).suffix == suffix and len(sight.ranks) < view.world
    }


def _ask(wants: Sequence[Want], view: View, meeting: Meeting) -> None:
    """Have the ranks that see files, in turn, tell all others what they want to know of them."""
    own = []
    for number, want in enumerate(wants):
        ranks = view.sights[want.file].ranks
        if ranks[number % len(ranks)] == view.rank:
            own.append(want)
    spread(answers(own, view.root, piece_bytes(view.world)), meeting, view.told)
