"""The command line: parse, call, print."""

import argparse
import gc
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from reshard import logs
from reshard.arguments import VERBS, check_flags, parser, verb_of
from reshard.distributed import Ranks, end_with_launcher
from reshard.errors import ConfigError, PeerError, told
from reshard.lastwords import report_failure
from reshard.logs import LOG
from reshard.meeting import launched_rank, launcher_lives, refused_before, remember_refusal
from reshard.smallfiles import discard_scratch
from reshard.topologies import near
from reshard.verbs import VERBS as WORK
from reshard.verbs import Command

ELSEWHERE_SECONDS = 4.5
TURN_SECONDS, MAX_TURN = 0.5, 10


def entry() -> None:
    """The console script."""
    # Copies of microseconds share the interpreter with reading and planning; they must not wait
    # 5 ms for it.
    sys.setswitchinterval(1e-4)
    # The half a million objects of the imports stay: no use to look for rubbish among them.
    gc.freeze()
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    ranks: list[Ranks] = []
    end_with_launcher(lambda: bool(ranks))
    try:
        if refused_before():
            return 2
        return _dispatch(argv, ranks)
    except (Exception, KeyboardInterrupt) as error:
        LOG.info("ended by an error", exc_info=error)
        if "--debug" in argv:
            traceback.print_exc()
        message, code = told(error)
        return _failed(message, code, ranks, secondary=isinstance(error, PeerError))
    finally:
        discard_scratch()
        logs.close()


def _failed(message: str, code: int, ranks: Sequence[Ranks], *, secondary: bool) -> int:
    """Say what went wrong, once for all ranks."""
    if ranks:
        ranks[0].fail(message, code, secondary=secondary)
        return code
    if launched_rank() != 0:
        # Before the ranks have met, all fail alike as a rule: rank 0 speaks, and its launcher ends
        # this process. Leaving before would have rank 0 killed; who is left after failed alone.
        time.sleep(ELSEWHERE_SECONDS + TURN_SECONDS * min(launched_rank(), MAX_TURN))
        if not launcher_lives():
            return code
    if code == 2:
        remember_refusal()
    report_failure(message)
    return code


def _dispatch(argv: Sequence[str], ranks: list[Ranks]) -> int:
    """Sort words into a verb, paths and KEY=VALUE items, and call the verb."""
    flags = parser(verb_of(argv)).parse_intermixed_args(argv)
    words = list(flags.words)
    verb = words.pop(0) if words and words[0] in VERBS else "run"
    check_flags(flags, verb)
    paths = [word for word in words if "=" not in word]
    if verb not in ("inspect", "verify") and paths:
        raise ConfigError(f"`{paths[0]}` is neither a verb nor KEY=VALUE: {near(paths[0], VERBS)}")
    _set_up_logs(flags)
    terminal = _Terminal(flags, ranks)
    overrides = [word for word in words if "=" in word]
    typed = shlex.join(["python", "-m", "reshard", *argv])
    return WORK[verb](
        Command(flags, paths, overrides, typed, terminal.meet, terminal.say, terminal.tell)
    )


def _set_up_logs(flags: argparse.Namespace) -> None:
    """Begin what the flags ask for."""
    if flags.log_dir is not None:
        logs.keep(Path(flags.log_dir), launched_rank())
    if flags.verbose and launched_rank() == 0:
        logs.show_details()
    if flags.quiet:
        logs.hide_progress()


class _Terminal:
    """What is printed, by the first rank alone."""

    def __init__(self, flags: argparse.Namespace, ranks: list[Ranks]) -> None:
        self._flags, self._ranks = flags, ranks

    def meet(self, backend: str, timeout: float) -> Ranks:
        """Meet the other ranks; how errors end depends on it."""
        met = Ranks(backend, timeout)
        self._ranks.append(met)
        met.at_exit(discard_scratch)
        if met.remark:
            self.tell(met.remark)
        return met

    def say(self, lines: Sequence[str]) -> None:
        """Print at once; a reader that is gone (`| head`), or a full disk below it, ends no job."""
        for line in lines:
            LOG.info(line)
        if launched_rank() != 0:
            return
        try:
            print("\n".join(lines), flush=True)
        except OSError:
            # What is buffered would fail once more when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def tell(self, line: str) -> None:
        """Print a line that a quiet command leaves out, if it is no warning."""
        if not self._flags.quiet or line.startswith("warning:"):
            self.say([line])
