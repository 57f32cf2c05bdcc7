"""The command line: parse, call, print."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from reshard import config as configuration
from reshard import inspect as inspection
from reshard import job, loading, report, verify
from reshard.arguments import VERBS, check_flags, parser
from reshard.buffers import ALIGN
from reshard.compare import against_other
from reshard.demo import Demo
from reshard.distributed import Ranks, end_with_launcher
from reshard.engine import least_memory
from reshard.errors import ConfigError, PeerError, told
from reshard.formats.common import MANIFEST
from reshard.lastwords import report_failure
from reshard.meeting import launched_rank, launcher_lives, refused_before, remember_refusal
from reshard.prepare import prepare
from reshard.smallfiles import discard_scratch
from reshard.storage import explained
from reshard.topologies import near

ELSEWHERE_SECONDS = 4.5
TURN_SECONDS, MAX_TURN = 0.5, 10


def entry() -> None:
    """The console script."""
    # Copies of microseconds share the interpreter with reading and planning; they must not wait
    # 5 ms for it.
    sys.setswitchinterval(1e-4)
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    ranks: list[Ranks] = []
    end_with_launcher(lambda: bool(ranks))
    try:
        if refused_before():
            return 2
        arguments = parser().parse_intermixed_args(argv)
        return _dispatch(arguments, ranks)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in argv:
            traceback.print_exc()
        message, code = told(error)
        return _failed(message, code, ranks, secondary=isinstance(error, PeerError))
    finally:
        discard_scratch()


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


def _dispatch(arguments: argparse.Namespace, ranks: list[Ranks]) -> int:
    """Sort words into a verb, paths and KEY=VALUE items, and call the verb."""
    words = list(arguments.words)
    verb = words.pop(0) if words and words[0] in VERBS else "run"
    check_flags(arguments, verb)
    overrides = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word]
    if verb in ("run", "plan") and paths:
        raise ConfigError(f"`{paths[0]}` is neither a verb nor KEY=VALUE: {near(paths[0], VERBS)}")
    if verb == "inspect":
        return _inspect(arguments, paths, overrides)
    if verb == "verify":
        return _verify(arguments, paths, overrides, ranks)
    config = configuration.load(arguments.src, arguments.dst, overrides, arguments.config)
    return _plan(arguments, config) if verb == "plan" else _run(arguments, config, ranks)


def _say(lines: Sequence[str]) -> None:
    """Print at once; a reader that is gone (`| head`), or a full disk below it, ends no job."""
    try:
        print("\n".join(lines), flush=True)
    except OSError:
        # What is buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _start(config: configuration.JobConfig, ranks: list[Ranks]) -> Ranks:
    """Meet the other ranks."""
    met = Ranks(config.engine.backend, config.engine.timeout)
    ranks.append(met)
    met.at_exit(discard_scratch)
    if met.remark and met.rank == 0:
        _say([met.remark])
    return met


def _run(arguments: argparse.Namespace, config: configuration.JobConfig, ranks: list[Ranks]) -> int:
    """Reshard; without any path, the demo."""
    met = _start(config, ranks)
    report_file = Path(arguments.report) if arguments.report is not None else None
    if report_file is not None:
        met.together(lambda: _check_writable(report_file) if met.rank == 0 else None)

    def say(line: str) -> None:
        if met.rank == 0:
            _say([line])

    if config.source.path is None and config.target.path is None:
        demo = Demo(config, Path("reshard-demo"))
        say(demo.first_line())
        config = demo.make_source(met)
    figures = job.run(config, met, force=arguments.force, say=say)
    if met.rank == 0 and report_file is not None:
        with explained("write", report_file):
            report_file.write_text(figures.to_json(), encoding="utf-8")
    if figures.state != "done":
        say(figures.readiness.line())
    say(figures.last_line())
    met.barrier("done")
    met.close()
    return 0


def _check_writable(file: Path) -> None:
    """Refuse a report that could not be written, before a job of hours; nothing is made."""
    if file.is_dir():
        raise ConfigError(f"--report: `{file}` is a directory; name a file")
    if not file.parent.is_dir():
        raise ConfigError(f"--report: `{file}`: its directory does not exist; make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"--report: `{file}` cannot be written: permission denied")


def _plan(arguments: argparse.Namespace, config: configuration.JobConfig) -> int:
    """Print what would happen."""
    if launched_rank() != 0:
        return 0
    world = arguments.world if arguments.world is not None else 1
    if world < 1:
        raise ConfigError(f"--world: {world} is not a number of ranks")
    prepared = prepare(config)
    plan = prepared.plan(world)
    least = least_memory(plan, plan.least_capacity(ALIGN))
    _say(report.plan_lines(prepared, plan, config.engine.memory, least))
    return 0


def _inspect(arguments: argparse.Namespace, paths: Sequence[str], overrides: Sequence[str]) -> int:
    """Print what a directory holds."""
    options = configuration.load(None, None, overrides, None).source.options
    if len(paths) != 1:
        raise ConfigError("inspect: give one directory")
    if launched_rank() != 0:
        return 0
    found = inspection.inspect(Path(paths[0]), options, checksums=arguments.checksums)
    _say([json.dumps(found.to_json(), indent=2)] if arguments.json else found.lines())
    return 1 if found.problems else 0


def _verify(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    overrides: Sequence[str],
    ranks: list[Ranks],
) -> int:
    """Compare two checkpoints, or one with its manifest, or open one with its target's library."""
    config = configuration.load(None, None, overrides, None)
    if len(paths) not in (1, 2):
        raise ConfigError("verify: give a directory, or two")
    if arguments.cast and len(paths) == 1:
        raise ConfigError("verify --cast: compares two directories; give the other one too")
    if arguments.load and len(paths) == 2:
        raise ConfigError("verify --load: opens one directory; give each to a command of its own")
    met, options = _start(config, ranks), config.source.options
    one, lines = Path(paths[0]), []
    if len(paths) == 2:
        memory = config.engine.memory
        lines = against_other(one, Path(paths[1]), options, memory, met, cast=arguments.cast)
    elif arguments.load and not verify.has_manifest(one):
        lines = [f"no {MANIFEST} in {one}: its bytes are not compared with anything"]
    else:
        lines = verify.against_manifest(one, met)
    if arguments.load:
        lines += loading.load(one, options, met)
    if met.rank == 0:
        _say(lines)
    met.barrier("done")
    met.close()
    return 0
