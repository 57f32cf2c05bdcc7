"""What lies in a Meta directory: its numbered files, and releases that are not read here."""

import re
from collections.abc import Mapping
from pathlib import Path

from reshard.containers import Entry
from reshard.errors import CheckpointError
from reshard.families.model import Json
from reshard.formats.common import TOKENIZER_MODEL

FILE = "consolidated.{shard:02d}.pth"
# A file of its own, and a folder that holds one file; a release of one file may have no number.
NUMBERED = re.compile(r"consolidated\.(\d{2,4})(\.pth)?")
SINGLE = "consolidated.pth"

_WHOLE = "take the same model's bfloat16 files"
_HUB = "Hugging Face's repository of that model is read as `hf`"
FP8 = ("an FP8 release", _WHOLE)
QUANTISED = ("a quantised release (int4, QLoRA or SpinQuant)", _WHOLE)
VISION = ("a vision model in Meta's layout", _HUB)
LLAMA_4 = ("Llama 4 in Meta's layout", _HUB)
# Files, keys of params.json and parts of tensor names by which a release is known.
BY_FILE = {"fp8_scales_*.pt": FP8, "int4_scales_*.pt": QUANTISED}
BY_PARAM = {
    "quantization_args": QUANTISED,
    "lora_args": QUANTISED,
    "moe_args": LLAMA_4,
    "vision_args": VISION,
    "vision_chunk_size": VISION,
}
BY_KEY = (
    (re.compile(r"(text|vision)_model\."), VISION),
    (re.compile(r".*(\.experts\.|\.wqkv\.|\.router_DE)"), LLAMA_4),
    (re.compile(r".*(\.scales|\.zeros|\.adaptor\.[AB]\b.*)$"), QUANTISED),
)


def numbered(path: Path, expected: int | None) -> list[str]:
    """The files of a directory in the order of their numbers, which begin at 0 without a gap."""
    found = dict(_files(path))
    if not found:
        raise CheckpointError(f"`{path}`: no consolidated.NN.pth in this directory")
    count = max(max(found) + 1, expected or 0)
    missing = [FILE.format(shard=shard) for shard in range(count) if shard not in found]
    if missing:
        raise CheckpointError(
            f"`{path / missing[0]}` is missing: found {len(found)} of {count} consolidated "
            "files; complete the download, or name the topology that this directory really has"
        )
    if expected not in (None, count):
        raise CheckpointError(
            f"`{path}`: holds {count} consolidated files, but the source is meta{expected}"
        )
    return [found[shard] for shard in range(count)]


def _files(path: Path) -> list[tuple[int, str]]:
    """Number and name of each file; a folder of a rank must hold one and no more."""
    found = []
    for entry in sorted(path.glob("consolidated.*")):
        match = NUMBERED.fullmatch(entry.name)
        if match and match[2]:
            found.append((int(match[1]), entry.name))
        elif match and entry.is_dir():
            inside = sorted(entry.glob("*.pth"))
            if len(inside) != 1:
                raise CheckpointError(
                    f"`{entry}`: a rank's folder with {len(inside)} .pth files, expected one"
                )
            found.append((int(match[1]), f"{entry.name}/{inside[0].name}"))
    if not found and (path / SINGLE).is_file():
        return [(0, SINGLE)]
    if len({number for number, _ in found}) != len(found):
        raise CheckpointError(
            f"`{path}`: a rank has both a file and a folder, found {len(found)} for "
            f"{len({number for number, _ in found})} ranks; keep one of the two"
        )
    return found


def is_here(path: Path) -> bool:
    """Whether a directory holds files of this format."""
    return any(path.glob("consolidated*.pth")) or any(path.glob("consolidated.*/*.pth"))


def folders(path: Path) -> tuple[Path, ...]:
    """Where the tokenizer lies, if not beside the weights: Llama 1 and 2 have it one level up."""
    above = path.absolute().parent
    apart = not (path / TOKENIZER_MODEL).is_file() and (above / TOKENIZER_MODEL).is_file()
    return (above,) if apart else ()


def refuse_release(path: Path, params: Mapping[str, Json]) -> None:
    """Refuse releases that are not read here, by params.json (`path`) and the files beside it."""
    for pattern, (what, remedy) in BY_FILE.items():
        if (file := next(iter(sorted(path.parent.glob(pattern))), None)) is not None:
            raise CheckpointError(f"`{file}`: {what}, which is not read here; {remedy}")
    for key, (what, remedy) in BY_PARAM.items():
        if params.get(key) not in (None, -1):
            raise CheckpointError(f"`{path}`: {key}: {what}, which is not read here; {remedy}")


def refuse_tensors(file: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse releases that are not read here, by the tensors of their first file."""
    for key, entry in entries.items():
        known = next((said for pattern, said in BY_KEY if pattern.match(key)), None)
        if known is None and entry.dtype.itemsize == 1:
            known = FP8 if entry.dtype.is_floating_point else QUANTISED
        if known is not None:
            found = str(entry.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"`{file}`: tensor `{key}` ({found}): {known[0]}, which is not read here; "
                f"{known[1]}"
            )
