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
from reshard import job, report, verify
from reshard.buffers import ALIGN
from reshard.demo import Demo
from reshard.distributed import Ranks, launched_rank
from reshard.engine import least_memory
from reshard.errors import ConfigError, PeerError, ReshardError
from reshard.prepare import prepare
from reshard.smallfiles import discard_scratch
from reshard.storage import explained
from reshard.topologies import near
from reshard.watcher import report_failure

FLAGS = {
    "run": ("src", "dst", "config", "report", "force", "debug"),
    "plan": ("src", "dst", "config", "world", "debug"),
    "inspect": ("json", "checksums", "debug"),
    "verify": ("debug",),
}
VERBS = tuple(FLAGS)
ELSEWHERE_SECONDS = 5.0
DESCRIPTION = """\
Reshards LLM checkpoints between Meta MP, Nanotron TPxPP, Hugging Face, FSDP and TorchTitan (DCP)
and GGUF, bit for bit, in bounded memory.

  torchrun --nproc-per-node 8 -m reshard --src meta8 --dst tp4 src.path=DIR dst.path=DIR
  torchrun --nproc-per-node 2 -m reshard --src dcp --dst hf src.path=DIR src.assets=DIR dst.path=DIR
  python -m reshard plan --src meta8 --dst tp4 src.model=llama3-70b --world 8
  python -m reshard inspect DIR
  python -m reshard verify DIR [OTHER]

SPEC is a topology (meta8, tp4, tp4pp2, hf, fsdp8, titan8, gguf, or one of the kind with other
numbers; dcp for a source that is fsdp or titan), a YAML file, or a source's directory.
KEY=VALUE sets any key of the configuration:
  src.path dst.path          directories of the checkpoints
  src.model                  a name in configs/models, or a config.json, where the source has none
  src.assets                 a directory with the config, tokenizer, ... that the source lacks
  src.replicas=first|strict  what to do when replicated tensors differ
  src.tied src.rope_factor src.rope_interleaved src.rope    what the files of a source do not say;
                             these, src.model, src.assets also for inspect and verify (both sides)
  src.version=1|2|code|3|3.1|3.2|3.3 src.instruct=true|false    which Llama a Meta directory is
  src.vocab=N|tokenizer      rows beyond the vocabulary of N (or of tokenizer.json) are dropped
  src.file=NAME              gguf: which of several files
  dst.dtype=keep|bfloat16|float16|float32        gguf: q8_0, q5_0, q5_1, q4_0, q4_1 too
  dst.vocab_multiple=N       pads the vocabulary with rows of zeros
  dst.max_shard_size=5GB     hf
  dst.embedding_dim=auto|0|1 meta
  dst.rope_interleaved=true|false dst.like=DIR
  dst.wrapper=model|none     fsdp: whether names stand below a dict `model`
  dst.rope=interleaved|half dst.keys=current|older dst.mesh.tp=N      titan
  engine.memory=256MiB       per rank, a hard bound
  engine.exchange=collective|direct   engine.writers=nearest|owner   engine.backend=auto|nccl|gloo
  engine.timeout=1800        seconds without progress   engine.fsync=true
  engine.require_complete=false       true: refuse a target that would lack config or tokenizer
With neither src.path nor dst.path, `run` makes a tiny model below ./reshard-demo and reshards it.

A target is absent or complete; TorchTitan's is dst.path/step-0. What is under way lies in
DST.partial-<digest>; the same command goes on with it. --force discards the partial result of
another job, and replaces a DST that this program wrote (between the two renames it is absent).

exit codes: 0 done or already done; 1 failed, or a difference was found; 2 refused
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn, and so it is
        raise ConfigError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    """Flags of all verbs; FLAGS says which belong to which."""
    made = _Parser(
        prog="reshard",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "words",
        nargs="*",
        metavar="[VERB] [PATH ...] [KEY=VALUE ...]",
        help="run (implied), plan, inspect, verify",
    )
    made.add_argument("--src", metavar="SPEC", help="the source's topology, or its directory")
    made.add_argument("--dst", metavar="SPEC", help="the target's topology")
    made.add_argument(
        "--config", metavar="FILE", help="a YAML file with the keys src, dst and engine"
    )
    made.add_argument("--world", metavar="N", type=int, help="plan: for how many ranks (1)")
    made.add_argument("--report", metavar="FILE", help="run: write the figures as JSON")
    made.add_argument("--json", action="store_true", help="inspect: as JSON")
    made.add_argument(
        "--checksums", action="store_true", help="inspect: run the directory's checklist.chk"
    )
    made.add_argument(
        "--force", action="store_true", help="run: replace or discard what is in the way"
    )
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def entry() -> None:
    """The console script."""
    # Copies of microseconds share the interpreter with reading and planning; they must not wait
    # 5 ms for it.
    sys.setswitchinterval(1e-4)
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    ranks: list[Ranks] = []
    try:
        arguments = parser().parse_intermixed_args(argv)
        return _dispatch(arguments, ranks)
    except ReshardError as error:
        if "--debug" in argv:
            traceback.print_exc()
        return _failed(str(error), error.exit_code, ranks, secondary=isinstance(error, PeerError))
    except KeyboardInterrupt:
        return _failed(
            "interrupted; the same command goes on where this one stopped",
            1,
            ranks,
            secondary=False,
        )
    except OSError as error:
        if "--debug" in argv:
            traceback.print_exc()
        where = f"`{error.filename}`: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", 1, ranks, secondary=False)
    except Exception as error:  # the last resort: a bug still is one line
        if "--debug" in argv:
            traceback.print_exc()
        text = " ".join(str(error).split())[:200]
        return _failed(
            f"unexpected {type(error).__name__}: {text} (--debug shows where)",
            1,
            ranks,
            secondary=False,
        )
    finally:
        discard_scratch()


def _failed(message: str, code: int, ranks: Sequence[Ranks], *, secondary: bool) -> int:
    """Say what went wrong, once for all ranks."""
    discard_scratch()  # a rank among several ends without coming back
    if ranks:
        ranks[0].fail(message, code, secondary=secondary)
    elif launched_rank() == 0:
        report_failure(message)
    else:
        # Before the ranks have met, all fail alike as a rule: rank 0 speaks, and its launcher ends
        # this process. Leaving before would have rank 0 killed; who is left after failed alone.
        time.sleep(ELSEWHERE_SECONDS)
        report_failure(message)
    return code


def _dispatch(arguments: argparse.Namespace, ranks: list[Ranks]) -> int:
    """Sort words into a verb, paths and KEY=VALUE items, and call the verb."""
    words = list(arguments.words)
    verb = words.pop(0) if words and words[0] in VERBS else "run"
    _check_flags(arguments, verb)
    overrides = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word]
    if verb in ("run", "plan") and paths:
        raise ConfigError(f"`{paths[0]}` is neither a verb nor KEY=VALUE: {near(paths[0], VERBS)}")
    if verb == "inspect":
        return _inspect(arguments, paths, overrides)
    if verb == "verify":
        return _verify(paths, overrides, ranks)
    config = configuration.load(arguments.src, arguments.dst, overrides, arguments.config)
    return _plan(arguments, config) if verb == "plan" else _run(arguments, config, ranks)


def _check_flags(arguments: argparse.Namespace, verb: str) -> None:
    """Refuse flags that the verb would ignore."""
    for flag, value in vars(arguments).items():
        given = value is not None and value is not False and flag != "words"
        if given and flag not in FLAGS[verb]:
            known = [other for other in VERBS if flag in FLAGS[other]]
            raise ConfigError(
                f"`--{flag}` does not apply to `{verb}`; it is for {' and '.join(known)}"
            )


def _say(lines: Sequence[str]) -> None:
    """Print at once; a reader that is gone (`| head`) has seen enough, and ends no job."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # What is buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _start(config: configuration.JobConfig, ranks: list[Ranks]) -> Ranks:
    """Meet the other ranks."""
    met = Ranks(config.engine.backend, config.engine.timeout)
    ranks.append(met)
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


def _verify(paths: Sequence[str], overrides: Sequence[str], ranks: list[Ranks]) -> int:
    """Compare two checkpoints, or one with its manifest."""
    config = configuration.load(None, None, overrides, None)
    if len(paths) not in (1, 2):
        raise ConfigError("verify: give a directory, or two")
    met = _start(config, ranks)
    if len(paths) == 1:
        lines = verify.against_manifest(Path(paths[0]), met)
    else:
        one, other = map(Path, paths)
        options, memory = config.source.options, config.engine.memory
        lines = verify.against_other(one, other, options, memory, met)
    if met.rank == 0:
        _say(lines)
    met.barrier("done")
    met.close()
    return 0
