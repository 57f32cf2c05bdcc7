"""Progress as a person sees it."""

import contextlib
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from reshard.logs import PROGRESS, hides_progress
from reshard.units import size_text

LINE_SECONDS = 10.0


class Progress:
    """A bar on a terminal, a line every 10 s elsewhere, nothing on ranks that are not shown.

    `total` is in bytes; `what` is done with them. `on_step` is called at every step, to say that
    this rank gets on.
    """

    def __init__(
        self, total: int, shown: bool, on_step: Callable[[], None], what: str = "moving"
    ) -> None:
        shown = shown and not hides_progress()
        self._total, self._shown, self._on_step, self._what = total, shown, on_step, what
        self._done, self._begun = 0, time.monotonic()
        self._next = self._begun + LINE_SECONDS
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what) if terminal else None

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self._on_step()
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif self._shown and time.monotonic() >= self._next:
            self._next += LINE_SECONDS
            passed = time.monotonic() - self._begun
            left = passed * (self._total - self._done) / max(self._done, 1)
            speed = size_text(self._done / passed)
            share = 100 * self._done // max(self._total, 1)
            line = (
                f"{self._what}: {share}% of {size_text(self._total)}, {speed}/s, {left:.0f} s left"
            )
            PROGRESS.info(line)
            with contextlib.suppress(OSError):  # nobody may be listening any more
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
