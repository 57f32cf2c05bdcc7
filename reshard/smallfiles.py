"""The small files of a target: carried along from the source, or converted from its tokenizer.

The first rank alone gathers them, for a conversion takes seconds and a process of its own. The
others learn what they must know for the plan: names, sizes, and a digest.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from reshard import assets, formats, tokenizers
from reshard.containers import Blob
from reshard.errors import CheckpointError
from reshard.families import Model
from reshard.families.model import ModelConfig
from reshard.formats import common
from reshard.formats.options import Scan

# What transformers can make a tokenizer of without converting anything.
CONVERTED = (common.TOKENIZER_JSON, "vocab.json")
T = TypeVar("T")


class Meeting(Protocol):
    """Ranks that work out something together."""

    rank: int

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part; an error of any rank is raised on all."""

    def gather(self, value: T) -> list[T]:
        """What every rank gave, by rank."""


class Alone:
    """A single process, which meets nobody."""

    rank = 0

    def together(self, work: Callable[[], T]) -> T:
        """Just do it."""
        return work()

    def gather(self, value: T) -> list[T]:
        """What the only rank gave."""
        return [value]


@dataclass(frozen=True, slots=True)
class Facts:
    """What every rank knows of the small files.

    `tokenizer` are the number and the bytes of the key-values that a header holds of a tokenizer.
    """

    names: tuple[str, ...] = ()
    digest: str = ""
    tokenizer: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class SmallFiles:
    """The small files of a target, but those that its format makes from the model's config.

    `paths`, by name in the target, are there on the first rank alone; `scratch` holds what was
    converted, for as long as this object is there.
    """

    facts: Facts = field(default_factory=Facts)
    paths: Mapping[str, Path] = field(default_factory=dict)
    scratch: "tempfile.TemporaryDirectory[str] | None" = None

    def folder(self) -> Path:
        """Where the first rank keeps what is converted; made when it is first asked for."""
        self.scratch = self.scratch or tempfile.TemporaryDirectory(prefix="reshard-")
        return Path(self.scratch.name)

    def header(self) -> tuple[int, Blob] | None:
        """The tokenizer's key-values, for a format that holds them in a header."""
        if self.facts.tokenizer is None:
            return None
        count, size = self.facts.tokenizer
        folder = Path() if self.scratch is None else self.folder()
        return count, Blob(folder / tokenizers.HEADER, size)


def gather(scan: Scan, target: formats.Format, model: Model, meeting: Meeting) -> SmallFiles:
    """Find and convert the small files of `scan` that `target` has a place for."""
    found = SmallFiles()

    def work() -> Facts:
        return _gathered(found, scan, target, model) if meeting.rank == 0 else Facts()

    found.facts = meeting.gather(meeting.together(work))[0]
    return found


def _gathered(found: SmallFiles, scan: Scan, target: formats.Format, model: Model) -> Facts:
    """Gather on the first rank."""
    asked = (scan.options.assets,) if scan.options.assets is not None else ()
    folders = tuple(dict.fromkeys((*asked, scan.root, *scan.folders)))
    paths = assets.carried(folders, formats.asset_names(), target.ASSETS)
    header: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    if isinstance(model, ModelConfig):
        held = {name.removeprefix(f"{common.ASSETS}/"): path for name, path in paths.items()}
        try:
            if target.EMBEDS_TOKENIZER:
                header, notes = _embedded(held, model, found.folder)
            elif common.TOKENIZER_JSON in target.ASSETS:
                paths |= _converted(held, model, found.folder)
        except tokenizers.Unavailable as error:
            notes = (f"target: {error}",)
        except CheckpointError as error:
            notes = (f"warning: no tokenizer is made: {error}",)
    found.paths = paths = _out_of_the_way(paths, target)
    facts = Facts(tuple(sorted(paths)), "", header, notes)
    inside = [] if header is None else [("header", found.folder() / tokenizers.HEADER)]
    return replace(facts, digest=_digest(header, [*sorted(paths.items()), *inside]))


def _out_of_the_way(paths: Mapping[str, Path], target: formats.Format) -> dict[str, Path]:
    """Put a tiktoken file where transformers does not take it for a sentencepiece model."""
    found, name = dict(paths), common.TOKENIZER_MODEL
    if name in found and common.TOKENIZER_JSON in target.ASSETS and _is_tiktoken(found[name]):
        found[f"{common.ASSETS}/{name}"] = found.pop(name)
    return found


def _is_tiktoken(path: Path) -> bool:
    try:
        return tokenizers.kind_of(path) == tokenizers.TIKTOKEN
    except CheckpointError:
        return False


def _digest(header: object, files: Sequence[tuple[str, Path]]) -> str:
    """A digest of the names and the bytes of files."""
    record = hashlib.sha256(repr(header).encode())
    for name, path in files:
        record.update(repr(name).encode())
        for piece in assets.pieces_of(path):
            record.update(piece)
    return record.hexdigest()


def _converted(
    held: Mapping[str, Path], model: ModelConfig, room: Callable[[], Path]
) -> dict[str, Path]:
    """Tokenizer files as transformers reads them, of a source that has only the trained model."""
    if common.TOKENIZER_MODEL not in held or any(name in held for name in CONVERTED):
        return {}
    folder = room()
    names = tokenizers.to_huggingface(held[common.TOKENIZER_MODEL], model, folder)
    return {name: folder / name for name in names if name not in held}


def _embedded(
    held: Mapping[str, Path], model: ModelConfig, room: Callable[[], Path]
) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """The key-values of a tokenizer, written to `folder`; and what is to be said of them."""
    if not any(name in held for name in common.TOKENIZERS):
        return None, ("target: the source has no tokenizer, so the header has no tokenizer.* keys",)
    folder = room()
    staged = folder / "staged"
    staged.mkdir()
    for name, path in held.items():
        (staged / name).symlink_to(path.resolve())
    trained = staged / common.TOKENIZER_MODEL
    if not any(name in held for name in CONVERTED) and _is_tiktoken(trained):
        tokenizers.to_huggingface(trained, model, staged)
        trained.unlink()
    return tokenizers.to_header(staged, model.vocab, folder)
