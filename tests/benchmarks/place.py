"""The directory that benchmarks work in, and the sources there, which are made once and reused."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import measure, seeded
from tests.benchmarks.measure import ROOT
from tests.benchmarks.rows import LAUNCH, PEER, Row, ours
from tests.benchmarks.seeded import Model

SEED = "hf"  # what all other sources are made of
MADE = "made.json"
SPARE_BYTES = 1 << 30
MAKING = 4.0  # roughly, seconds per GB
FLIPPED = (*LAUNCH, "8", "-m", f"{PEER}flipped", "{source}", "{out}")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A work directory; `python` runs ours, `peers` the interpreter that has transformers 4.45."""

    root: Path
    models: Mapping[str, Model]
    python: str
    peers: str

    @property
    def scratch(self) -> Path:
        """Where outputs are made, which hold nothing between two steps."""
        return self.root / "out"

    @property
    def out(self) -> Path:
        """The output of a step."""
        return self.scratch / "made"

    @property
    def report(self) -> Path:
        """What a command reports of itself."""
        return self.root / "report.json"

    @property
    def said(self) -> Path:
        """What the last command said."""
        return self.root / "said.txt"

    def source(self, model: str, kind: str) -> Path:
        """The directory of a source."""
        return self.root / "models" / model / kind

    def words(self, words: Iterable[str], source: Path, out: Path) -> list[str]:
        """A step's command."""
        known = {
            "source": source,
            "out": out,
            "report": self.report,
            "python": self.python,
            "peers": self.peers,
            "root": ROOT,
        }
        return [word.format_map(known) for word in words]

    def clear(self) -> None:
        """Remove what a step has made."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def missing(self, rows: Iterable[Row]) -> list[tuple[str, str]]:
        """The sources that rows need and that are not there, by model and kind."""
        wanted = {(row.model, row.source) for row in rows}
        lacking = [pair for pair in sorted(wanted) if not self.has(*pair)]
        seeds = {(model, SEED) for model, _ in lacking if not self.has(model, SEED)}
        return sorted(seeds | set(lacking), key=lambda pair: (pair[0], pair[1] != SEED))

    def has(self, model: str, kind: str) -> bool:
        """Whether a source is there, of the very model that is wanted."""
        note = self.source(model, kind) / MADE
        return note.is_file() and json.loads(note.read_text()) == self._identity(model)

    def _identity(self, model: str) -> dict[str, object]:
        held = self.models[model]
        return {"config": dict(held.config), "seed": held.seed}

    def making_seconds(self, model: str) -> float:
        """Roughly how long it takes to make a source of a model."""
        return MAKING * self.models[model].total_bytes / 1e9

    def make(self, row: Row, say: Say) -> float:
        """Make what a row needs and is missing; how many seconds were expected of that."""
        lacking = self.missing([row])
        for model, kind in lacking:
            say(f"making {kind} of {model}, {self.models[model].total_bytes / 1e9:.1f} GB")
            self._make(model, kind)
        return sum(self.making_seconds(model) for model, _ in lacking)

    def _make(self, model: str, kind: str) -> None:
        target = self.source(model, kind)
        shutil.rmtree(target, ignore_errors=True)
        self.clear()
        if kind == SEED:
            seeded.write(self.models[model], self.out)
        else:
            words = FLIPPED if kind.startswith("flipped") else ours(SEED, kind, 2).words
            measure.run(self.words(words, self.source(model, SEED), self.out), self.said)
        (self.out / MADE).write_text(json.dumps(self._identity(model)))
        os.sync()
        target.parent.mkdir(parents=True, exist_ok=True)
        self.out.rename(target)
        self.clear()

    def needed_bytes(self, rows: Iterable[Row]) -> int:
        """How much more disk rows take at the most, with what is made for them."""
        kept = list(rows)
        sizes = {row.model: self.models[row.model].total_bytes for row in kept}
        sources = sum(sizes[model] for model, _ in self.missing(kept))
        outputs = (sizes[row.model] * max(step.disk for step in row.steps) for row in kept)
        return sources + int(max(outputs, default=0)) + SPARE_BYTES

    def free_bytes(self) -> int:
        """How much disk there is."""
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free
