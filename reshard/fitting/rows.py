"""The answer's parts: rows of what fits, and what falls out and why."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reshard.fitting.gpus import GIB

Figure = None | bool | int | str | list["Figure"] | dict[str, "Figure"]
Command = tuple[str, ...]
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One way to use a model: `target` is the --dst of it, `gpus` how many GPUs it takes.

    `commands` are lists of words as a shell wants them, and `figures` are for programs; sizes are
    in bytes. `check` opens what they write, and is empty where they write nothing; `context` is
    that which is served, in tokens, where one is.
    """

    name: str
    target: str
    gpus: int
    fits: bool
    said: tuple[str, ...]
    commands: tuple[Command, ...] = ()
    check: Command = ()
    context: int | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def to_json(self) -> dict[str, Figure]:
        """All facts, for programs."""
        return {
            "name": self.name,
            "target": self.target,
            "gpus": self.gpus,
            "fits": self.fits,
            "said": list(self.said),
            "commands": [" ".join(command) for command in self.commands],
            "check": " ".join(self.check) or None,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True, slots=True)
class FallenOut:
    """What was considered, and why it is not among the rows."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Section:
    """One use of a model: the rows best first, then what falls out."""

    use: str
    title: str
    said: tuple[str, ...]
    rows: tuple[Row, ...]
    fallen_out: tuple[FallenOut, ...] = ()

    @property
    def best(self) -> Row | None:
        """The first row that fits."""
        return next((row for row in self.rows if row.fits), None)

    def to_json(self) -> dict[str, Figure]:
        """All facts, for programs."""
        return {
            "title": self.title,
            "said": list(self.said),
            "rows": [row.to_json() for row in self.rows],
            "fallen_out": {item.name: item.reason for item in self.fallen_out},
        }


def command(*words: str | int) -> Command:
    """A command line's words, quoted for a shell where they must be."""
    return tuple(shlex.quote(str(word)) for word in words)


def gib(nbytes: float) -> str:
    """Bytes as memory of GPUs is told; a debt is none."""
    if 0 < nbytes < GIB // 10:
        return f"{nbytes / (1 << 20):,.3g} MiB"
    return f"{max(nbytes, 0) / GIB:,.1f} GiB"


def about(tokens: int) -> str:
    """A number of tokens to be read: three digits of a long one, the rest rounded down."""
    unit = 10 ** (len(str(tokens)) - 3) if tokens >= 100_000 else 1
    return f"{tokens // unit * unit:,}"


def wrapped(words: Command, lead: str, indent: int) -> list[str]:
    """A command in lines of a terminal's width, broken as a shell has it; `lead` begins them."""
    return _lines(words, lead, indent + 4, " \\")


def folded(text: str, lead: str, indent: int) -> list[str]:
    """Text in lines of a terminal's width, as far as its words allow."""
    return _lines(text.split(" "), lead, indent)


def _lines(words: Sequence[str], lead: str, indent: int, broken: str = "") -> list[str]:
    """Words in lines, the first begun by `lead` and all but the last ended by `broken`."""
    lines, line = [], lead
    for number, word in enumerate(words, 1):
        room = WIDTH - (len(broken) if number < len(words) else 0)
        if line != lead and len(line) + 1 + len(word) > room:
            lines.append(line + broken)
            line = " " * indent
        line += word if line.endswith(" ") else f" {word}"
    return [*lines, line]
