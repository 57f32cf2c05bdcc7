"""The times that a peer reports."""

import json
import time
from pathlib import Path


class Clock:
    """Seconds by stage, from one `lap` to the next."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.monotonic()
        self.seconds[stage], self._last = now - self._last, now

    def write(self, report: Path) -> None:
        """Write the report."""
        report.write_text(json.dumps({"seconds": self.seconds}))
