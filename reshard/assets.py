"""The small files around the weights: which are carried, which are there, and which are missing."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.formats import common
from reshard.storage import explained

MAX_ASSET_BYTES = 64 << 20
LEGAL_TEXTS = ("LICENSE", "NOTICE", "USE_POLICY", "README")
IMAGES = {"preprocessor": ("preprocessor_config.json", "processor_config.json")}


@dataclass(frozen=True, slots=True)
class Readiness:
    """The small files that a checkpoint has, and the names of what it is of no use without."""

    ready: tuple[str, ...]
    missing: tuple[str, ...]

    def line(self) -> str:
        """For the end of a run."""
        there = f"ready: {', '.join(self.ready) or 'no small files'}"
        if not self.missing:
            return there
        return f"{there}; missing: {', '.join(self.missing)} (src.assets=DIR takes it from there)"


def readiness(
    names: Collection[str], needed: Mapping[str, Sequence[str]], config: Mapping[str, object]
) -> Readiness:
    """What of `names` (relative paths) is needed, by the format and by the model's config."""
    here = {name.removeprefix(f"{common.ASSETS}/") for name in names}
    wanted = {**needed, **(IMAGES if "vision_config" in config else {})}
    missing = (what for what, files in wanted.items() if not here.intersection(files))
    return Readiness(tuple(sorted(set(names))), tuple(missing))


def present(root: Path, known: Iterable[str]) -> list[str]:
    """The known small files of a directory, by their relative paths."""
    places = [name for one in sorted(known) for name in (one, f"{common.ASSETS}/{one}")]
    return [name for name in places if (root / name).is_file()]


def carried(
    folders: Sequence[Path], known: Sequence[str], kept_at_root: Sequence[str]
) -> dict[str, Path]:
    """Small files of the source to carry along, by their name in the target.

    The first of `folders` that has a file is taken. `known` are those that some format gives a
    meaning; `kept_at_root` those that mean the same in the target.
    """
    found: dict[str, Path] = {}
    for folder in [part for own in folders for part in (own, own / common.ASSETS)]:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            legal = path.name.upper().startswith(LEGAL_TEXTS)
            if (
                not (path.name in known or legal)
                or not path.is_file()
                or path.stat().st_size > MAX_ASSET_BYTES
            ):
                continue
            root = path.name in kept_at_root or legal
            found.setdefault(path.name if root else f"{common.ASSETS}/{path.name}", path)
    return found


def tokens_of(folder: Path) -> int | None:
    """How many tokens the tokenizer.json of a directory knows; None where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > MAX_ASSET_BYTES:
        return None
    with explained("read", path):
        text = path.read_bytes()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    model = record.get("model") if isinstance(record, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = record.get("added_tokens") if isinstance(record, dict) else None
    if not isinstance(vocabulary, dict):
        return None
    numbers = [number for number in vocabulary.values() if isinstance(number, int)]
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            numbers.append(token["id"])
    return 1 + max(numbers, default=-1)
