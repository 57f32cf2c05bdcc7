"""Runs rows pair by pair, says how far it is, and keeps what it has after every pair."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.benchmarks import machine, measure
from tests.benchmarks.measure import Sample, StepError
from tests.benchmarks.place import Place, Say
from tests.benchmarks.results import Found
from tests.benchmarks.rows import LAUNCH, Row, Step

VERIFY = (*LAUNCH, "2", "-m", "reshard", "verify", "{source}", "{out}")
# Seconds per GB to check an output, and to clear up after a step.
CHECKING, CLEARING = 2.5, 0.3
TELLING = 0.1  # of all that is expected has to be done before its pace is believed


@dataclass(slots=True)
class Run:
    """Rows under way: `done` are the seconds that were expected of what is behind.

    `keep` is called with the results so far.
    """

    rows: Sequence[Row]
    place: Place
    asked: int | None
    say: Say
    keep: Callable[[list[Found]], None]
    results: list[Found] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    expected: float = 0.0
    done: float = 0.0

    def all(self) -> list[Found]:
        """Measure all rows. A row that cannot run says why, and the others run."""
        self.expected = expected_seconds(self.rows, self.place, self.asked)
        try:
            for row in self.rows:
                found = Found(row, self.place.models[row.model].total_bytes)
                self.results.append(found)
                try:
                    self.done += self.place.make(row, self.say)
                    self._row(found)
                except StepError as error:
                    self._problem(found, str(error))
                self.keep(self.results)
        finally:
            self.place.clear()
        return self.results

    def _row(self, found: Found) -> None:
        row, steps = found.row, list(found.row.steps)
        source = self.place.source(row.model, row.source)
        for number in range(pairs_of(row, self.asked)):
            pair: dict[str, Sample] = {}
            for step in tuple(steps):
                if not row.cold:
                    measure.warm(source)
                try:
                    pair[step.name] = self._step(found, step, check=number == 0)
                    self._tell(found, number, step, pair)
                except StepError as error:
                    if step is not row.peer:
                        raise
                    self._problem(found, f"{step.name}: {error}")
                    steps.remove(step)  # the copy and ours are still measured
            found.pairs.append(pair)
            self.keep(self.results)

    def _step(self, found: Found, step: Step, check: bool) -> Sample:
        place, row = self.place, found.row
        self._require_memory(step, row)
        source = place.source(row.model, row.source)
        place.clear()
        os.sync()
        if row.cold:
            measure.drop(source)
        words = place.words(step.words, source, place.out)
        taken = measure.sample(words, place.report, step.counted, place.said)
        if check and step.checked:
            measure.run(place.words(VERIFY, source, place.out), place.said)
            found.checked.append(step.name)
        place.clear()
        return taken

    def _require_memory(self, step: Step, row: Row) -> None:
        wanted = int(step.memory * self.place.models[row.model].total_bytes)
        free = machine.memory("MemAvailable")
        if wanted > free:
            raise StepError(
                f"needs about {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            )

    def _tell(self, found: Found, number: int, step: Step, pair: dict[str, Sample]) -> None:
        taken = pair[step.name]
        self.done += expected(step, _gigabytes(self.place, found.row.model))
        ratio = ""
        if step.name != "copy" and "copy" in pair:
            ratio = f", {taken.seconds / pair['copy'].seconds:.2f} x copy"
        pair_of = f"pair {number + 1} of {pairs_of(found.row, self.asked)}"
        self.say(
            f"[{len(self.results)}/{len(self.rows)}] {found.row.name}, {pair_of}: {step.name} "
            f"{taken.seconds:.2f} s{ratio} (command {taken.wall:.1f} s); "
            f"about {self.left() / 60:.0f} min left"
        )

    def _problem(self, found: Found, why: str) -> None:
        found.problem = why
        self.say(f"{found.row.name}: {why}")

    def left(self) -> float:
        """Roughly how many seconds more, by the costs of steps and how true those were so far."""
        elapsed = time.monotonic() - self.began
        pace = elapsed / self.done if self.done > TELLING * self.expected else 1.0
        return max(0.0, self.expected - self.done) * pace


def pairs_of(row: Row, asked: int | None) -> int:
    """How often a row is measured: as `asked`, else as usual for it."""
    return row.pairs if asked is None else asked


def expected(step: Step, gigabytes: float) -> float:
    """Roughly how many seconds a step takes, with clearing up."""
    start, per_gigabyte = step.cost
    return start + (per_gigabyte + CLEARING) * gigabytes


def expected_seconds(rows: Sequence[Row], place: Place, asked: int | None) -> float:
    """Roughly how many seconds all takes."""
    seconds = sum(place.making_seconds(model) for model, _ in place.missing(rows))
    for row in rows:
        size = _gigabytes(place, row.model)
        seconds += pairs_of(row, asked) * sum(expected(step, size) for step in row.steps)
        seconds += CHECKING * size * sum(step.checked for step in row.steps)
    return seconds


def _gigabytes(place: Place, model: str) -> float:
    return place.models[model].total_bytes / 1e9
