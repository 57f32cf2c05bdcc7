"""The small files of a target: carried along from the source, or converted from its tokenizer.

The first rank alone gathers them, for a conversion takes seconds and a process of its own. The
others learn what they must know for the plan: names, sizes, and a digest.
"""

import hashlib
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from reshard import assets, conversions, formats, tokenizers
from reshard.containers import Blob
from reshard.errors import CheckpointError
from reshard.families import Model
from reshard.families.model import ModelConfig
from reshard.formats import common
from reshard.formats.options import Scan

# Beside any of these transformers reads tokenizer.model as it is, and a tokenizer.json made of that
# alone would lack what they add.
AS_IT_IS = (*tokenizers.HUGGINGFACE, "vocab.json", "added_tokens.json")
T = TypeVar("T")

_scratch: "weakref.WeakSet[tempfile.TemporaryDirectory[str]]" = weakref.WeakSet()


def discard_scratch() -> None:
    """Remove what was converted; for those who end this process at once, which then nobody does."""
    for folder in list(_scratch):
        folder.cleanup()


class Meeting(Protocol):
    """Ranks that work out something together."""

    rank: int

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part; an error of any rank is raised on all."""

    def gather(self, value: T) -> list[T]:
        """What every rank gave, by rank."""

    def phase(self, name: str) -> None:
        """Say what this rank does from here on."""

    def step(self) -> None:
        """Say that this rank has got on."""


class Alone:
    """A single process, which meets nobody."""

    rank = 0

    def together(self, work: Callable[[], T]) -> T:
        """Just do it."""
        return work()

    def gather(self, value: T) -> list[T]:
        """What the only rank gave."""
        return [value]

    def phase(self, name: str) -> None:
        """Nobody asks."""

    def step(self) -> None:
        """Nobody asks."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What every rank knows of the small files.

    `tokenizer` are the number and the bytes of the key-values that a header holds of a tokenizer,
    and `inside` what else than files the target has of small content: such key-values.
    """

    names: tuple[str, ...] = ()
    digest: str = ""
    tokenizer: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


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
        if self.scratch is None:
            self.scratch = tempfile.TemporaryDirectory(
                prefix="reshard-", ignore_cleanup_errors=True
            )
            _scratch.add(self.scratch)
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
        return _gathered(found, scan, target, model, meeting) if meeting.rank == 0 else Facts()

    meeting.phase("tokenizer")
    found.facts = meeting.gather(meeting.together(work))[0]
    meeting.phase("plan")
    return found


def _gathered(
    found: SmallFiles, scan: Scan, target: formats.Format, model: Model, meeting: Meeting
) -> Facts:
    """Gather on the first rank; a tokenizer whose own fault it is that it is lost is warned of."""
    asked = (scan.options.assets,) if scan.options.assets is not None else ()
    folders = tuple(dict.fromkeys((*asked, scan.root, *scan.folders)))
    paths = assets.carried(folders, formats.asset_names(), target.ASSETS)
    held = {name.removeprefix(f"{common.ASSETS}/"): path for name, path in paths.items()}
    header: tuple[int, int] | None = None
    notes = _lacking(held, scan, target)
    if isinstance(model, ModelConfig):
        try:
            if target.EMBEDS_TOKENIZER and _has_tokenizer(held):
                folder = found.folder()
                header, notes = conversions.to_header(held, model, folder, meeting.step)
            elif common.TOKENIZER_JSON in target.ASSETS:
                paths |= _converted(held, model, found.folder, meeting.step)
        except tokenizers.Unavailable as error:
            notes = (f"target: {error}",)
        except CheckpointError as error:
            notes = (f"warning: no tokenizer is made: {error}",)
    found.paths = paths = _out_of_the_way(paths, target)
    written = [] if header is None else [("header", found.folder() / tokenizers.HEADER)]
    return Facts(
        tuple(sorted(paths)),
        _digest(header, [*sorted(paths.items()), *written]),
        header,
        notes,
        () if header is None else (tokenizers.KEYS,),
    )


def _has_tokenizer(held: Mapping[str, Path]) -> bool:
    return any(name in held for name in common.TOKENIZERS)


def _lacking(held: Mapping[str, Path], scan: Scan, target: formats.Format) -> tuple[str, ...]:
    """What is to be said where there are no tokenizer files."""
    if _has_tokenizer(held):
        return ()
    if scan.inside:
        return (
            "target: the tokenizer in the header of the source is not converted; src.assets=DIR "
            "takes one from there",
        )
    if target.EMBEDS_TOKENIZER:
        return ("target: the source has no tokenizer, so the header has no tokenizer.* keys",)
    return ()


def _out_of_the_way(paths: Mapping[str, Path], target: formats.Format) -> dict[str, Path]:
    """Put a tiktoken file where transformers does not take it for a sentencepiece model."""
    found, name = dict(paths), common.TOKENIZER_MODEL
    plain = common.TOKENIZER_JSON in target.ASSETS
    if plain and name in found and conversions.is_tiktoken(found[name]):
        found[f"{common.ASSETS}/{name}"] = found.pop(name)
    return found


def _digest(header: object, files: Sequence[tuple[str, Path]]) -> str:
    """A digest of the names and the bytes of files."""
    record = hashlib.sha256(repr(header).encode())
    for name, path in files:
        record.update(repr(name).encode())
        for piece in assets.pieces_of(path):
            record.update(piece)
    return record.hexdigest()


def _converted(
    held: Mapping[str, Path],
    model: ModelConfig,
    room: Callable[[], Path],
    on_step: Callable[[], None],
) -> dict[str, Path]:
    """Tokenizer files as transformers reads them, of a source that has only the trained model."""
    if common.TOKENIZER_MODEL not in held or any(name in held for name in AS_IT_IS):
        return {}
    folder = room()
    names = conversions.to_huggingface(held[common.TOKENIZER_MODEL], model, folder, on_step)
    return {name: folder / name for name in names}
