"""What is to be fitted: a model in 16 bits, where it comes from, and how a command names it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reshard import formats
from reshard.config import Side
from reshard.errors import ConfigError, LayoutError
from reshard.families import Model
from reshard.families.model import ModelConfig
from reshard.formats.options import Options
from reshard.layout import Layout, Parameter
from reshard.sources import Source, source_of

HALF = ("bfloat16", "float16")
PLACEHOLDER = "DIR"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model as it would be used; `cast` is the dst.dtype that makes its source so, if any.

    `words` name the source on a command line, `path` is None where it is only imagined, and
    `stored` is the name of the layout that the source has, in `files`.
    """

    model: Model
    parameters: tuple[Parameter, ...]
    words: tuple[str, ...]
    path: Path | None
    stored: str
    files: tuple[str, ...]
    cast: str | None
    notes: tuple[str, ...]

    @property
    def known(self) -> ModelConfig | None:
        """The model, where its family is known."""
        return self.model if isinstance(self.model, ModelConfig) else None

    @property
    def dtype(self) -> str:
        """The dtype of most weights."""
        return self.cast or self.model.dtype

    @property
    def elements(self) -> int:
        """The number of parameters, a tied output counted once."""
        return sum(_numel(parameter) for parameter in self.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(_numel(item) * item.dtype.itemsize for item in self.parameters)

    def place(self, suffix: str) -> str:
        """The directory of a target: beside the source."""
        return f"{self.origin}-{suffix}"

    @property
    def origin(self) -> str:
        """The directory of the source."""
        if self.path is None:
            return PLACEHOLDER
        return str(self.path.resolve() if self.path.name in ("", "..") else self.path)

    def is_already(self, target: Layout) -> bool:
        """Whether the source is this very layout, in the very types."""
        coded = any(slot.encoding is not None for slot in target.slots)
        return target.name == self.stored and (self.cast is None or coded)


def _numel(parameter: Parameter) -> int:
    return torch.Size(parameter.shape).numel()


def subject_of(side: Side, words: Sequence[str]) -> Subject:
    """The model of a source, in 16 bits; `words` are those that named it, if they are known."""
    source = source_of(side)
    cast = _cast(source)
    parameters = source.parameters
    if cast is not None:
        wanted = getattr(torch, cast)
        parameters = tuple(
            replace(item, dtype=wanted) if item.dtype.is_floating_point else item
            for item in parameters
        )
    model = source.model if cast is None else replace(source.model, dtype=cast)
    return Subject(
        model,
        parameters,
        _words(side, source, words),
        side.path,
        source.layout.name,
        source.layout.files,
        cast,
        (*source.notes, *_said(source, cast)),
    )


def _cast(source: Source) -> str | None:
    """The dtype that a source is to be cast to, None where all of it is in 16 bits as it is.

    Codes that a scale makes numbers stay as they are: nothing is known of the scales.
    """
    floats = {item.dtype for item in source.parameters if item.dtype.is_floating_point}
    if any(dtype.itemsize == 1 for dtype in floats):
        return None
    wanted = source.model.dtype if source.model.dtype in HALF else HALF[0]
    return None if floats <= {getattr(torch, wanted)} else wanted


def _said(source: Source, cast: str | None) -> tuple[str, ...]:
    coded = sorted({slot.encoding.name for slot in source.layout.slots if slot.encoding})
    if coded:
        return (f"the source is quantised ({', '.join(coded)}); sizes are de-quantised, as {cast}",)
    return () if cast is None else (f"the source is not all {cast}; sizes are as {cast}",)


def _words(side: Side, source: Source, words: Sequence[str]) -> tuple[str, ...]:
    """How a command names the source: as the user did, if that is known."""
    spec = source.layout.name.split()[0]
    if side.path is None:
        # An imagined model has no directory; the real one says its model itself.
        kept = [word for word in words if not word.startswith("src.model=")]
        return (*(kept or ("--src", spec)), f"src.path={PLACEHOLDER}")
    if words:
        return tuple(words)
    if side.format is None:
        return ("--src", str(side.path))
    return ("--src", spec, f"src.path={side.path}")


def laid_out(subject: Subject, name: str, options: Options) -> Layout:
    """A layout of a format; a LayoutError or ConfigError says why not."""
    known = formats.named(name)
    formats.require_held(known, subject.model)
    return formats.laid_out(known, subject.parameters, subject.model, options)


def refusal(subject: Subject, name: str, options: Options) -> str | None:
    """Why a format cannot hold the model, None where it can."""
    try:
        laid_out(subject, name, options)
    except (LayoutError, ConfigError) as error:
        return str(error)
    return None
