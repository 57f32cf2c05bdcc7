"""What is noted besides what is said: a log file for each rank, and details on the terminal.

INFO is what is said in any case, on the terminal by whoever says it; DEBUG are the details.
"""

import logging
import sys
import time
from pathlib import Path

from reshard.errors import ConfigError

LOG = logging.getLogger("reshard")
# What is said once must not come again from the handlers that other libraries install.
LOG.propagate = False
LOG.addHandler(logging.NullHandler())
PROGRESS = LOG.getChild("progress")


class _File(logging.FileHandler):
    """A log file; where it cannot be written, the job goes on without."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def keep(folder: Path, rank: int) -> None:
    """Keep the log of this rank in `folder`, behind what an earlier attempt left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _File(folder / f"rank-{rank}.log", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--log-dir: `{folder}`: {error.strerror}; name a directory") from None
    form = logging.Formatter("%(asctime)sZ %(message)s")
    form.converter = time.gmtime
    handler.setFormatter(form)
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)


def show_details() -> None:
    """Show details on the terminal too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.levelno == logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)


def hide_progress() -> None:
    """Leave progress out."""
    PROGRESS.setLevel(logging.WARNING)


def hides_progress() -> bool:
    """Whether progress is left out."""
    return PROGRESS.level > logging.INFO


def close() -> None:
    """Close what was opened."""
    for handler in LOG.handlers[1:]:
        LOG.removeHandler(handler)
        handler.close()
    LOG.setLevel(logging.WARNING)
    PROGRESS.setLevel(logging.NOTSET)
