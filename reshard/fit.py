"""Which layouts of a model fit given GPUs, for which use, and the commands that make and use them.

Nothing of the weights is read: sizes follow from a checkpoint's headers, or a model's config.
"""

from dataclasses import dataclass

from reshard.config import Side
from reshard.errors import ConfigError, printable
from reshard.fitting import huggingface, inference, training
from reshard.fitting.case import Wish
from reshard.fitting.gpus import Gpus, parse
from reshard.fitting.memory import DEFAULT_CONTEXT
from reshard.fitting.rows import Figure, Row, Section, folded, gib, wrapped
from reshard.fitting.subject import Subject, subject_of

MAX_CONTEXT, MAX_BATCH = 1 << 27, 1 << 20
FALLEN_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: GPUs such as `10xL40`, and what is to be served in tokens and sequences.

    `words` are those of the command line that name the source; the commands repeat them.
    """

    gpus: str
    context: int | None = None
    batch: int = 1
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What fits, by use, best first."""

    subject: Subject
    gpus: Gpus
    wish: Wish
    sections: tuple[Section, ...]

    @property
    def best(self) -> Row | None:
        """What to do if nothing else is known: serve it; what cannot be served may be trained."""
        return next((part.best for part in self.sections if part.best is not None), None)

    def to_json(self) -> dict[str, Figure]:
        """All facts, for programs; sizes in bytes."""
        subject, gpus, best = self.subject, self.gpus, self.best
        return {
            "best": best.to_json() if best is not None else None,
            "model": subject.model.describe(),
            "family": subject.model.model_type,
            "parameters": subject.elements,
            "dtype": subject.dtype,
            "bytes": subject.nbytes,
            "notes": list(subject.notes),
            "gpus": {
                "spec": str(gpus),
                "count": gpus.count,
                "nodes": gpus.nodes,
                "memory_bytes": gpus.memory,
                "known": gpus.known,
            },
            "uses": {part.use: part.to_json() for part in self.sections},
        }

    def lines(self) -> list[str]:
        """The same for a person: what to type, then what it is the best of."""
        subject, gpus = self.subject, self.gpus
        whose = "as CUDA gives it" if gpus.known else "as given"
        found = [
            *_first(self.best, gpus, self.wish),
            "",
            *folded(subject.model.describe(), "model ", 6),
            f"      {subject.elements:,} parameters, {gib(subject.nbytes)} in {subject.dtype}"
            f"{', tied' if subject.model.tied else ''}",
            f"GPUs  {gpus}: {gib(gpus.memory)} each {whose}, {gib(gpus.total)} together",
        ]
        for note in subject.notes:
            found += folded(note, "note  ", 6)
        for part in self.sections:
            found += ["", *_section_lines(part)]
        return [printable(line) for line in found]


def fit(source: Side, request: Request) -> Answer:
    """What of a source's model fits the GPUs that are asked for."""
    gpus = parse(request.gpus)
    _require("--context", request.context, MAX_CONTEXT)
    _require("--batch", request.batch, MAX_BATCH)
    subject = subject_of(source, request.words)
    wish = _wish(subject, request)
    sections = (
        inference.section(subject, gpus, wish),
        huggingface.section(subject, gpus, wish),
        training.section(subject, gpus, request.context),
    )
    return Answer(subject, gpus, wish, sections)


def _require(flag: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"{flag}: {value}, expected 1 to {most:,}")


def _wish(subject: Subject, request: Request) -> Wish:
    """The context to serve: as asked for, else all that the model has, else a usual one."""
    if request.context is not None:
        return Wish(request.context, request.batch, True, "--context")
    if subject.known is not None:
        longest = subject.known.max_positions
        return Wish(longest, request.batch, False, "the model's max_position_embeddings")
    return Wish(DEFAULT_CONTEXT, request.batch, False, "no config says the model's")


def _first(best: Row | None, gpus: Gpus, wish: Wish) -> list[str]:
    """The lines to be read if no others are."""
    if best is None:
        return [f"nothing fits {gpus}: why, and what would, is said below"]
    leads = ["type: ", *["then: "] * (len(best.commands) - 1)]
    lines: list[str] = []
    for lead, words in zip(leads, best.commands, strict=True):
        lines += wrapped(words, lead, 6)
    if best.check:
        lines += wrapped(best.check, "check:", 6)
    lines.append(f"      = {best.name}")
    if best.context is not None and best.context < wish.context:
        short = f"context {best.context:,}, shortened to what fits: {wish.context:,} is {wish.why}"
        lines += folded(short, "      ", 6)
    return lines


def _section_lines(part: Section) -> list[str]:
    """One use: what is said of all, the rows, and what falls out."""
    lines = [part.title]
    for text in part.said:
        lines += folded(text, "  ", 2)
    for number, row in enumerate(part.rows, 1):
        lines.append(f"  {number}. {row.name}")
        for text in row.said:
            lines += folded(text, "     ", 7)
        for words in row.commands:
            lines += wrapped(words, "     ", 5)
    for item in part.fallen_out[:FALLEN_SHOWN]:
        lines += folded(item.reason, f"  not {item.name}: ", 6)
    more = len(part.fallen_out) - FALLEN_SHOWN
    return [
        *lines,
        *([f"  ... and {more} more that fall out (--json has all)"] if more > 0 else ()),
    ]
