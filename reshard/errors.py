"""What can go wrong, by kind; a message is one line: the thing, found and expected, what to do."""

import signal
from collections.abc import Sequence

MAX_LINE = 300
SHOWN = 3


def printable(text: str) -> str:
    """Text in one line, as a terminal may have it: names in files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, as it may be printed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:MAX_LINE])


def some(texts: Sequence[str], most: int = SHOWN) -> str:
    """The first of many texts in one line, and how many more there are."""
    more = len(texts) - most
    return "; ".join(texts[:most]) + (f" (and {more} more)" if more > 0 else "")


class ReshardError(Exception):
    """Base of all errors that the program reports in one line; `settled`: all ranks raise it."""

    exit_code = 1
    settled = False

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(ReshardError):
    """The command line, a topology or a model config asks for something that cannot be done."""

    exit_code = 2


class LayoutError(ReshardError):
    """A layout cannot hold a model, or two layouts do not describe the same parameters."""

    exit_code = 2


class CheckpointError(ReshardError):
    """A file of a checkpoint is missing, damaged, or not what its layout says."""

    exit_code = 2


class UndescribedError(CheckpointError):
    """Weights are there, but no config says of which model."""


class StorageError(ReshardError):
    """Reading, writing or publishing failed in a way that trying again may mend."""


class IncompleteError(ReshardError):
    """A target would lack small files that the job was told to require."""


class PeerError(ReshardError):
    """Another rank failed, died, or stopped making progress."""


class DisagreementError(ReshardError):
    """Ranks have not come to the same result, where each has to by itself."""


class VerifyError(ReshardError):
    """Two checkpoints differ, or a checkpoint differs from its manifest."""


def told(error: BaseException) -> tuple[str, int]:
    """What to say of an error in one line, and the exit code; a bug still is one line."""
    if isinstance(error, ReshardError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, MemoryError):
        return "out of memory; a smaller engine.memory, or fewer ranks per machine, take less", 1
    if isinstance(error, OSError):
        where = f"`{error.filename}`: " if error.filename else ""
        return printable(f"{where}{error.strerror or error}"), 1
    text = printable(" ".join(str(error).split()))[:200]
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)", 1
