"""The answer's parts: rows of what fits, and what falls out and why."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from reshard.fitting.gpus import GIB

Figure = None | bool | int | str | list["Figure"] | dict[str, "Figure"]
Command = tuple[str, ...]
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One way to use a model: `target` is the --dst of it, `gpus` how many GPUs it takes.

    `commands` are lists of words as a shell wants them, and `figures` are for programs; sizes are
    in bytes.
    """

    name: str
    target: str
    gpus: int
    fits: bool
    said: tuple[str, ...]
    commands: tuple[Command, ...] = ()
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


def wrapped(words: Command, lead: str, indent: int) -> list[str]:
    """A command in lines of a terminal's width, broken as a shell has it; `lead` begins them."""
    lines, line = [], lead
    for number, word in enumerate(words):
        room = WIDTH - (2 if number < len(words) - 1 else 0)
        if line.strip() and line != lead and len(line) + 1 + len(word) > room:
            lines.append(f"{line} \\")
            line = " " * (indent + 4)
        line += word if line.endswith(" ") else f" {word}"
    return [*lines, line]


def folded(text: str, lead: str, indent: int) -> list[str]:
    """Text in lines of a terminal's width, as far as its words allow."""
    lines, line = [], lead
    for word in text.split(" "):
        if line != lead and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = " " * indent + word
        else:
            line += word if line.endswith(" ") else f" {word}"
    return [*lines, line]
