"""The commands that make a layout: none where the source already is it."""

from reshard.fitting.gpus import Gpus
from reshard.fitting.rows import Command, command
from reshard.fitting.subject import Subject
from reshard.layout import Layout


def moved(
    subject: Subject, gpus: Gpus, made: Layout, target: str, *extra: str, suffix: str = ""
) -> tuple[Command, ...]:
    """The command that makes `made` on the GPUs of a node; none where the source is it already."""
    if subject.is_already(made):
        return ()
    dtype = (f"dst.dtype={subject.cast}",) if subject.cast is not None else ()
    given = any(item.startswith("dst.dtype=") for item in extra)
    return (
        command(
            *("launch/torchrun", "--nproc", gpus.per_node, "-m", "reshard"),
            *subject.words,
            *("--dst", target, f"dst.path={subject.place(suffix or target)}"),
            *(() if given else dtype),
            *extra,
        ),
    )


def checked(subject: Subject, made: Layout, suffix: str) -> Command:
    """The command that opens what was made; none where nothing is."""
    if subject.is_already(made):
        return ()
    return command("python", "-m", "reshard", "verify", subject.place(suffix), "--load")


def already(subject: Subject, made: Layout) -> tuple[str, ...]:
    """A line where there is nothing to be made."""
    return (f"the source is {made.name} already",) if subject.is_already(made) else ()


def where(subject: Subject, made: Layout, suffix: str) -> str:
    """The directory in which a layout then lies."""
    return subject.origin if subject.is_already(made) else subject.place(suffix)
