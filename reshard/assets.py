"""The small files around the weights: which are carried, which are there, and which are missing."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import CheckpointError
from reshard.formats import common
from reshard.storage import explained

MAX_ASSET_BYTES = 64 << 20
PIECE_BYTES, ENTRY_BYTES = 1 << 20, 1 << 10
ADDED_TOKEN = re.compile(rb'"id"\s*:\s*(\d{1,9})')
TOKEN = re.compile(rb'"\s*:\s*(\d{1,9})\s*[,}]')
ID = re.compile(r"\d{1,9}", re.ASCII)
MERGES = re.compile(rb'"merges"\s*:\s*\[')
ORIGINAL = "original"
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
    meaning; `kept_at_root` those that mean the same in the target. Hugging Face's releases of Llama
    keep the tokenizer that Meta's code reads in a folder `original`.
    """
    found: dict[str, Path] = {}
    places = [(part, known) for own in folders for part in (own, own / common.ASSETS)]
    places += [(own / ORIGINAL, (common.TOKENIZER_MODEL,)) for own in folders]
    for folder, names in places:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            legal = names is known and path.name.upper().startswith(LEGAL_TEXTS)
            if (
                not (path.name in names or legal)
                or not path.is_file()
                or path.stat().st_size > MAX_ASSET_BYTES
            ):
                continue
            root = path.name in kept_at_root or legal
            found.setdefault(path.name if root else f"{common.ASSETS}/{path.name}", path)
    return found


def pieces_of(path: Path) -> Iterator[bytes]:
    """The bytes of a small file, which is not that small: 20 MB are usual for a tokenizer.json."""
    with explained("read", path), path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def tokens_in(folders: Sequence[Path]) -> int | None:
    """How many tokens the first tokenizer.json in `folders`, or in the assets of one, knows."""
    places = [part for own in folders for part in (own, own / common.ASSETS)]
    counts = (tokens_of(place) for place in places)
    return next((count for count in counts if count is not None), None)


def tokens_of(folder: Path) -> int | None:
    """How many tokens a directory's tokenizer.json, and the tokens added beside it, are.

    None where tokenizer.json does not say it. It is scanned and not parsed, which would take ten
    times its size: before the vocabulary for the ids of added tokens, and in it for all others.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() or path.stat().st_size > MAX_ASSET_BYTES:
        return None
    largest, inside, rest = -1, False, b""
    for piece in pieces_of(path):
        text = rest + piece
        start = 0 if inside else text.find(b'"vocab"')
        if not inside:
            head = text if start < 0 else text[:start]
            largest = max([largest, *map(int, ADDED_TOKEN.findall(head))])
            inside = start >= 0
        if inside:
            end = MERGES.search(text, start)
            numbers = TOKEN.findall(text, start, end.start() if end else len(text))
            largest = max([largest, *map(int, numbers)])
            if end:
                break
        # An entry may go on in the next piece; to meet one twice does no harm.
        rest = text[-ENTRY_BYTES:]
    return max(largest, *_added_beside(folder)) + 1 if inside and largest >= 0 else None


def _added_beside(folder: Path) -> Iterator[int]:
    """The ids of tokens that other files add to those of tokenizer.json; at least -1."""
    yield -1
    ids = [
        *_record(_record(folder / "tokenizer_config.json").get("added_tokens_decoder")),
        *map(str, _record(folder / "added_tokens.json").values()),
    ]
    yield from (int(number) for number in ids if ID.fullmatch(number))


def _record(found: object) -> Mapping[str, object]:
    """A JSON object, or the one in a file; anything else is an empty one."""
    if isinstance(found, Path):
        try:
            return common.read_json(found) if found.is_file() else {}
        except CheckpointError:
            return {}
    return found if isinstance(found, dict) else {}
