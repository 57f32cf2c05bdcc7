"""What a directory holds, whether it is whole, and what is missing to use it."""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from reshard import assets, containers, damage, formats
from reshard.assets import Readiness
from reshard.errors import (
    CheckpointError,
    ConfigError,
    LayoutError,
    UndescribedError,
    printable,
)
from reshard.families.carried import CarriedConfig
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.units import size_text
from reshard.verify import has_manifest

STEP_BYTES = 4 << 20
MAX_CHECKLIST_BYTES = 1 << 20
UNKNOWN, UNFINISHED = "unknown", "unfinished"
PROBLEMS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Findings:
    """What a directory holds; `scan` is None where it cannot be told.

    `beside` are lines on what jobs have left around it, which are no faults of its own.
    """

    path: Path
    format: str
    scan: Scan | None
    problems: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """All facts, for programs."""
        return {
            "path": str(self.path),
            "format": self.format,
            **(_facts(self.scan) if self.scan is not None else {}),
            "problems": list(self.problems),
            "beside": list(self.beside),
            "healthy": not self.problems,
        }

    def lines(self) -> list[str]:
        """The same for a person."""
        name = self.scan.layout.name if self.scan is not None else self.format
        more = len(self.problems) - PROBLEMS_SHOWN
        lines = [
            f"{self.path}: {name}",
            *(_lines(self.scan) if self.scan is not None else ()),
            f"  manifest    {'yes: verify checks every byte' if has_manifest(self.path) else 'no'}",
            *(f"  PROBLEM     {line}" for line in self.problems[:PROBLEMS_SHOWN]),
            *([f"  ... and {more} more problems (--json has all)"] if more > 0 else ()),
            *(f"  beside      {line}" for line in self.beside),
            f"  health      {self._health()}",
        ]
        return [printable(line) for line in lines]

    def _health(self) -> str:
        """In a word, whether it can be used."""
        if not self.problems:
            return "good"
        if self.format == UNFINISHED:
            return UNFINISHED
        undescribed = self.scan is not None and self.scan.model.model_type == UNKNOWN
        return "good, but its model is not known" if undescribed else "damaged"


def inspect(path: Path, options: Options, *, checksums: bool = False) -> Findings:
    """Look at a checkpoint; whatever of it is damaged is a problem, be it ever so much."""
    beside = tuple(damage.left_beside(path))
    if (unfinished := damage.unfinished(path)) is not None:
        return Findings(path, UNFINISHED, None, (unfinished,), beside)
    problems: list[str] = []
    found, scan = UNKNOWN, None
    try:
        known = formats.detect(path)
        found = known.NAME
        scan = _scan(known, path, options, problems)
    except (CheckpointError, LayoutError, ConfigError) as error:
        problems.append(str(error))
    damaged = damage.found_in(path, scan)
    if found == UNKNOWN and not damaged:
        raise CheckpointError("; beside it: ".join([*problems, *beside[:1]]))
    problems += damaged
    if checksums:
        try:
            problems += _checklist(path)
        except CheckpointError as error:
            problems.append(str(error))
    return Findings(path, found, scan, tuple(dict.fromkeys(problems)), beside)


def _scan(known: formats.Format, path: Path, options: Options, problems: list[str]) -> Scan:
    """The checkpoint; that no config describes its model is a problem, but not the end."""
    try:
        return known.scan(path, options)
    except UndescribedError as error:
        problems.append(str(error))
        by_name = replace(options, model=CarriedConfig(UNKNOWN, {}))
        return replace(known.scan(path, by_name), assumed=())


def _facts(scan: Scan) -> dict[str, object]:
    """What a scan tells."""
    return {
        "layout": scan.layout.name,
        "mesh": _mesh(scan),
        "family": scan.model.model_type,
        "model": scan.model.to_json(),
        "files": len(scan.layout.files),
        "bytes": scan.layout.total_bytes(),
        "parameters": _parameters(scan),
        "dtypes": _dtypes(scan),
        "tied": scan.model.tied,
        "rope": _rope(scan),
        "assumed": list(scan.assumed),
        "left_behind": list(scan.left_behind),
        "ready": list(_readiness(scan).ready),
        "missing": list(_readiness(scan).missing),
        "manifest": has_manifest(scan.root),
    }


def _lines(scan: Scan) -> list[str]:
    """The same in sentences."""
    return [
        f"  family      {scan.model.describe()}",
        f"  mesh        {_mesh(scan)}",
        f"  weights     {_parameters(scan):,} parameters, {size_text(scan.layout.total_bytes())} "
        f"in {len(scan.layout.files)} files, {', '.join(_dtypes(scan))}, "
        f"{'tied' if scan.model.tied else 'untied'}",
        f"  rotary      {_rope(scan)}",
        f"  ready       {', '.join(_readiness(scan).ready) or 'no small files'}",
        f"  missing     {', '.join(_readiness(scan).missing) or 'nothing'}",
        *(f"  assumed     {line}" for line in scan.assumed),
        *(f"  left alone  {line}" for line in scan.left_behind),
    ]


def _mesh(scan: Scan) -> dict[str, int]:
    mesh = scan.options.axes
    return {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp}


def _parameters(scan: Scan) -> int:
    return sum(math.prod(parameter.shape) for parameter in scan.parameters)


def _dtypes(scan: Scan) -> list[str]:
    return sorted({common.stored_text(slot.dtype, slot.encoding) for slot in scan.layout.slots})


def _rope(scan: Scan) -> str:
    interleaved = any(slot.placement.interleaved for slot in scan.layout.slots)
    return "interleaved rows" if interleaved else "half rows"


def _readiness(scan: Scan) -> Readiness:
    """The small files that lie around the weights, and what is missing."""
    names = [
        name
        for folder in dict.fromkeys((scan.root, *scan.folders, *_asked(scan)))
        for name in assets.present(folder, {*formats.asset_names(), *damage.CONFIGS})
    ]
    names += scan.inside
    record = scan.model.to_json().get("config")
    needed = formats.named(scan.format).NEEDED
    return assets.readiness(names, needed, record if isinstance(record, dict) else {})


def _asked(scan: Scan) -> tuple[Path, ...]:
    return () if scan.options.assets is None else (scan.options.assets,)


def _checklist(path: Path) -> list[str]:
    """Run checklist.chk, which has lines of an md5 and a file name."""
    name = path / "checklist.chk"
    if not name.is_file():
        return [f"`{name}` is missing"]
    problems = []
    for line in common.read_text(name, MAX_CHECKLIST_BYTES).splitlines():
        expected, _, file = line.strip().partition(" ")
        file = file.strip().lstrip("*")
        if not file:
            continue
        target = path / common.confined(file.removeprefix("./"), str(name))
        if not target.exists():
            problems.append(f"`{target}` is missing")
            continue
        try:
            found = _md5(target)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if found != expected:
            problems.append(f"`{target}`: md5 {found}, expected {expected}")
    return problems


def _md5(path: Path) -> str:
    """The checksum of a plain file; a CheckpointError for anything else."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with containers.opened(path) as file:
            while data := file.read(STEP_BYTES):
                digest.update(data)
    except OSError as error:
        raise CheckpointError(f"`{path}`: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"`{path}`: {error}") from None
    return digest.hexdigest()
