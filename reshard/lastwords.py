"""How a process ends: what it says, and to whom it listens before others look after it."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable

from reshard.logs import LOG

BEAT_SECONDS = 0.5


def report_failure(message: str) -> None:
    """The one line that says what went wrong."""
    LOG.info(message)
    within_a_second(lambda: print(f"reshard: {message}", file=sys.stderr, flush=True))


def within_a_second(work: Callable[[], object]) -> None:
    """Print, flush or write, unless nobody listens any more, or somebody who does not read."""

    def try_it() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=try_it, name="last words", daemon=True)
    thread.start()
    thread.join(1.0)


def end_with(launcher: int, over: Callable[[], bool], *, speaks: bool) -> None:
    """End this process soon after its launcher, until `over`: then a watcher looks after it."""

    def look() -> None:
        while not over():
            if os.getppid() != launcher:
                if speaks:
                    report_failure("the launcher is gone, so the job ends")
                os._exit(1)
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=look, name="launcher", daemon=True).start()
