"""What a directory holds, whether it is whole, and what is missing to use it."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

from reshard import formats
from reshard.errors import CheckpointError, ConfigError, LayoutError
from reshard.formats import common
from reshard.formats.options import Options, Scan
from reshard.report import size_text

STEP_BYTES = 4 << 20
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def inspect(path: Path, *, checksums: bool = False) -> dict[str, object]:
    """Facts of a checkpoint; `healthy` is False where a header or a checksum is wrong."""
    known = formats.detect(path)
    problems: list[str] = []
    found: dict[str, object] = {"path": str(path), "format": known.NAME}
    try:
        scan = known.scan(path, Options())
        found |= _facts(scan.model.to_json(), scan)
        common.check_headers(scan, scan.layout.files)
    except (CheckpointError, LayoutError, ConfigError) as error:
        problems.append(str(error))
    if checksums:
        problems += _checklist(path)
    found["problems"] = problems
    found["healthy"] = not problems
    return found


def _facts(model: Mapping[str, object], scan: Scan) -> dict[str, object]:
    """What a scan tells."""
    mesh = scan.options.axes
    interleaved = any(slot.placement.interleaved for slot in scan.layout.slots)
    dtypes = sorted({str(slot.dtype).removeprefix("torch.") for slot in scan.layout.slots})
    missing = [] if any((scan.root / name).exists() for name in TOKENIZERS) else ["tokenizer"]
    return {
        "layout": scan.layout.name,
        "mesh": {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp},
        "family": scan.model.model_type,
        "model": model,
        "files": len(scan.layout.files),
        "bytes": scan.layout.total_bytes(),
        "parameters": sum(math.prod(parameter.shape) for parameter in scan.parameters),
        "dtypes": dtypes,
        "tied": scan.model.tied,
        "rope": "interleaved rows" if interleaved else "half rows",
        "assumed": list(scan.assumed),
        "left_behind": list(scan.left_behind),
        "missing": missing,
        "manifest": (scan.root / common.MANIFEST).is_file(),
    }


def _checklist(path: Path) -> list[str]:
    """Run checklist.chk, which has lines of an md5 and a file name."""
    name = path / "checklist.chk"
    if not name.is_file():
        return [f"`{name}` is missing"]
    problems = []
    for line in common.read_text(name).splitlines():
        expected, _, file = line.strip().partition(" ")
        file = file.strip().lstrip("*")
        if not file:
            continue
        target = path / common.confined(file.removeprefix("./"), str(name))
        if not target.is_file():
            problems.append(f"`{target}` is missing")
        elif (found := _md5(target)) != expected:
            problems.append(f"`{target}`: md5 {found}, expected {expected}")
    return problems


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while data := file.read(STEP_BYTES):
            digest.update(data)
    return digest.hexdigest()


def lines(found: dict[str, object]) -> list[str]:
    """The same for a person."""
    said = [f"{found['path']}: {found.get('layout', found['format'])}"]
    if "model" in found:
        model = found["model"]
        assert isinstance(model, dict)
        sizes = (
            f"{model['layers']} layers, width {model['hidden']}, {model['heads']} heads, "
            f"{model['kv_heads']} key-value heads, feed-forward {model['intermediate']}, "
            f"vocabulary {model['vocab']}"
        )
        weights = (
            f"{found['parameters']:,} parameters, {size_text(_number(found['bytes']))} "
            f"in {found['files']} files, {', '.join(_strings(found['dtypes']))}, "
            f"{'tied' if found['tied'] else 'untied'}"
        )
        said += [
            f"  family      {found['family']}: {sizes}",
            f"  mesh        {found['mesh']}",
            f"  weights     {weights}",
            f"  rotary      {found['rope']}",
            f"  missing     {', '.join(_strings(found['missing'])) or 'nothing'}",
            f"  manifest    {'yes: verify checks every byte' if found['manifest'] else 'no'}",
        ]
        said += [f"  assumed     {line}" for line in _strings(found["assumed"])]
        said += [f"  left alone  {line}" for line in _strings(found["left_behind"])]
    problems = _strings(found["problems"])
    return [
        *said,
        *(f"  PROBLEM     {line}" for line in problems),
        f"  health      {'good' if not problems else 'damaged'}",
    ]


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []
