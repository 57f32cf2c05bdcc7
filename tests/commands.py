"""Calls the command line inside the test's process, and small checkpoints to call it on."""

import contextlib
import io
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reshard.cli import main
from tests.oracles import hf, meta, models, nanotron
from tests.oracles.models import Model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "vocab_size": 128,
    "head_dim": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of the standard output."""
        return self.out.splitlines()[-1]


def call(*argv: object) -> Outcome:
    """Run one command."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main([str(word) for word in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*argv: object) -> Outcome:
    """Run a command that has to succeed without a word of complaint."""
    found = call(*argv)
    assert (found.code, found.err) == (0, ""), f"{argv}: exit {found.code}\n{found.out}{found.err}"
    return found


def refused(root: Path, pattern: str, *argv: object, code: int = 2) -> str:
    """Run a command that has to be refused in one line, with nothing below `root` touched."""
    before = state_of(root)
    found = call(*argv)
    assert found.code == code, f"exit {found.code}, expected {code}\n{found.out}{found.err}"
    line = one_line(found.err)
    assert re.search(pattern, line), f"`{line}` does not match `{pattern}`"
    assert "unexpected" not in line, line
    assert state_of(root) == before, "files were made, changed or removed"
    return line


def one_line(err: str) -> str:
    """The one line that a failed command leaves on its standard error."""
    lines = err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{err}"
    assert lines[0].startswith("reshard: "), lines[0]
    return lines[0]


def state_of(root: Path) -> dict[str, tuple[int, int]]:
    """Every path below a directory with its size and its time, except for locks."""
    found = {}
    for folder, _, names in os.walk(root):
        found[folder] = (0, 0)
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    return {path: state for path, state in found.items() if not path.endswith(".lock")}


def model(tied: bool = False, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Model:
    """A model of 2 layers, 16 heads and 8 key-value heads, in 109,000 parameters."""
    return _model(tied, dtype, tuple(sorted(overrides.items())))


@cache
def _model(tied: bool, dtype: torch.dtype, overrides: tuple[tuple[str, Any], ...]) -> Model:
    return models.build(SIZES, tied, dtype, dict(overrides))


def write(kind: str, path: Path, held: Model | None = None) -> Path:
    """Write a checkpoint of a kind that the oracles know: `hf`, `hf2`, `meta8`, `tp2pp2`, ..."""
    held = held or model()
    if kind.startswith("hf"):
        hf.write(held, path, int(kind[2:] or 1))
    elif kind.startswith("meta"):
        meta.write(held, path, int(kind[4:]))
    else:
        sizes = re.fullmatch(r"tp(\d+)(?:pp(\d+))?", kind)
        assert sizes, kind
        nanotron.write(held, path, int(sizes[1]), int(sizes[2] or 1))
    return path


def read(kind: str, path: Path, **options: Any) -> Model:
    """Read a checkpoint back through the oracle of its kind."""
    oracle = {"hf": hf, "me": meta, "tp": nanotron}[kind[:2]]
    found: Model = oracle.read(path, **options)  # type: ignore[attr-defined]
    return found


def move(kind: str, source: Path, target_kind: str, target: Path, *more: object) -> list[str]:
    """The words of a command that moves one checkpoint."""
    paths = [f"src.path={source}", f"dst.path={target}"]
    return ["--src", kind, "--dst", target_kind, *paths, *map(str, more)]
