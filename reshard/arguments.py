"""The words of the command line: verbs, flags, and what `--help` says of them."""

import argparse
from collections.abc import Sequence

from reshard.errors import ConfigError

LOGS = ("log_dir", "verbose", "quiet", "debug")
FLAGS = {
    "run": ("src", "dst", "config", "report", "html", "force", *LOGS),
    "plan": ("src", "dst", "config", "world", "disk", "net", "per_node", "html", "debug"),
    "inspect": ("json", "checksums", "debug"),
    "verify": ("cast", "load", *LOGS),
    "fit": ("src", "gpus", "context", "batch", "json", "debug"),
    "serve": ("jobs", "watch", "src", "dst", "poll", "once", "force", *LOGS),
}
VERBS = tuple(FLAGS)
DESCRIPTION = """\
Reshards LLM checkpoints between Meta MP, Nanotron TPxPP, Hugging Face, FSDP and TorchTitan (DCP)
and GGUF, bit for bit, in bounded memory.

  torchrun --nproc-per-node 8 -m reshard --src meta8 --dst tp4 src.path=DIR dst.path=DIR
  torchrun --nproc-per-node 2 -m reshard --src dcp --dst hf src.path=DIR src.assets=DIR dst.path=DIR
  python -m reshard fit --src DIR --gpus 10xL40  what to type for these GPUs (fit --help)
  python -m reshard plan --src meta8 --dst tp4 src.model=llama3-70b --world 8 [--html FILE]
  python -m reshard inspect DIR
  python -m reshard verify DIR [--load]          every byte against reshard.json; --load: opened
                                                 with torch, safetensors, transformers or gguf too
  python -m reshard verify A B [--cast]          the same values; --cast: after B's dtype
  torchrun ... -m reshard serve --jobs DIR       job after job from a directory (serve --help)

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
  src.vocab=N|tokenizer      rows beyond the vocabulary are dropped; src.file=NAME  of several gguf
  dst.dtype=keep|bfloat16|float16|float32        gguf: q8_0, q5_0, q5_1, q4_0, q4_1 too
  dst.vocab_multiple=N       pads the vocabulary with rows of zeros
  dst.max_shard_size=5GB     hf            dst.embedding_dim=auto|0|1         meta
  dst.rope_interleaved=true|false dst.like=DIR
  dst.wrapper=model|none     fsdp: whether names stand below a dict `model`
  dst.rope=interleaved|half dst.keys=current|older dst.mesh.tp=N      titan
  engine.memory=256MiB       per rank, a hard bound
  engine.exchange=collective|direct   engine.writers=nearest|owner   engine.backend=auto|nccl|gloo
  engine.timeout=1800        seconds without progress   engine.fsync=true
  engine.shared_files=auto|always|never          several machines may write one file; auto: not NFS
  engine.verify=false        true: reads everything back, from the disk, before it is published
  engine.require_complete=false       true: refuse a target that would lack config or tokenizer
With neither src.path nor dst.path, `run` makes a tiny model below ./reshard-demo and reshards it.

A target is absent or complete, whatever ends a job; TorchTitan's is dst.path/step-0.
  What is under way lies in DST.partial-<digest>. The same command goes on with it, also on another
  number of ranks, with another engine.memory or engine.exchange; --max-restarts of torchrun too.
  A finished DST of this very job is already done (0). An empty DST counts as absent; any other is
  refused, as is the partial result of another job: --force discards that, and replaces a DST that
  this program wrote (between the two renames it is absent; who was stopped there puts it back).
  A symlink or a mount point as DST is refused; DST.lock keeps a second job away meanwhile.

exit codes: 0 done or already done; 1 failed, or a difference was found; 2 refused; 130, 143 stopped
"""
FIT = """\
Says which layouts a model fits on some GPUs, for which use, best first, and the commands to run.

  python -m reshard fit --src /ckpt/Llama-3.3-70B --gpus 10xL40
  python -m reshard fit --src hf src.model=llama3.3-70b --gpus 2x8xH100 --context 32768 --batch 8

--gpus is a number and a name (10xL40), a number and a size (10x48GiB), or nodes before both
(2x8xH100). SPEC is the checkpoint's directory, or a topology with src.model=NAME where there is
none yet. Nothing is read but headers.
"""
SERVE = """\
One process group that does job after job, so that starting is paid once.

  launch/torchrun --nproc 8 --max-restarts 100 -m reshard serve --jobs DIR
  echo '{src: {path: /ckpt/a}, dst: {topology: hf, path: /out/a}}' >a.yaml && mv a.yaml DIR/queued/

  queued/ -> running/ -> done/ or failed/        NAME.yaml goes this way, in the order of names;
                                                 NAME.json beside it is the report, or the error;
                                                 mended and moved back to queued/ it is done again
  status.json                                    what the service does, and when it last said so

A job file is what --config takes. A job that fails ends only itself; --once ends with 0 whatever
became of the jobs. SIGTERM ends the service with 0 within a second or two; the job
under way stays in running/ and the next start goes on with it, as after a kill. Several services
may share a directory. KEY=VALUE below engine is for all jobs; engine.backend and engine.timeout are
the service's own.

  ... serve --jobs DIR --watch RUN --dst hf src.assets=DIR dst.path=OUT

also makes a job of each checkpoint that is complete below the folder of a training run (DCP with
.metadata, Nanotron's steps up to latest.txt, Hugging Face with all its files), once; its target is
OUT/<the checkpoint's name>. DIR/watched.json lists them.
"""
HELP = {"fit": FIT, "serve": SERVE}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn, and so it is
        raise ConfigError(f"{message}; see --help")


def verb_of(words: Sequence[str]) -> str | None:
    """The first of some words that is a verb."""
    return next((word for word in words if word in VERBS), None)


def parser(verb: str | None) -> argparse.ArgumentParser:
    """Flags of all verbs, of which `--help` shows those that belong to what it tells."""
    made = _Parser(
        prog=f"reshard {verb}" if verb in HELP else "reshard",
        description=HELP.get(verb or "", DESCRIPTION),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = (verb,) if verb in HELP else [name for name in VERBS if name not in HELP]
    shown = {flag for name in verbs for flag in FLAGS[name]}

    def flag(name: str, text: str, *short: str, **options: object) -> None:
        place = name.removeprefix("--").replace("-", "_")
        told = text if place in shown else argparse.SUPPRESS
        told = told.rpartition(": ")[2] if verb in HELP else told  # whose flag it is, is plain
        made.add_argument(*short, name, help=told, **options)  # type: ignore[arg-type]

    made.add_argument(
        "words",
        nargs="*",
        metavar="[VERB] [PATH ...] [KEY=VALUE ...]",
        help=f"run (implied), {', '.join(VERBS[1:])}",
    )
    flag("--src", "the source's topology, or its directory", metavar="SPEC")
    flag("--dst", "the target's topology", metavar="SPEC")
    flag("--config", "a YAML file with the keys src, dst and engine", metavar="FILE")
    flag("--world", "plan: for how many ranks (1)", metavar="N", type=int)
    flag("--disk", "plan: GB/s of each node's disk, for the least time", metavar="N", type=float)
    flag("--net", "plan: GB/s of each node's network, likewise", metavar="N", type=float)
    flag("--per-node", "plan: ranks on each node (8)", metavar="N", type=int)
    flag("--report", "run: write the figures as JSON", metavar="FILE")
    flag("--html", "run, plan: write a page with pictures of the plan", metavar="FILE")
    flag("--json", "inspect, fit: as JSON", action="store_true")
    flag("--checksums", "inspect: run the directory's checklist.chk", action="store_true")
    flag("--cast", "verify A B: compare A's values after B's dtype", action="store_true")
    flag("--load", "verify DIR: open it with its format's own library", action="store_true")
    flag("--force", "run, serve: replace or discard what is in the way", action="store_true")
    flag("--gpus", "fit: 4xH100, 10x48GiB or 2x8xH100", metavar="GPUS")
    flag("--context", "fit: tokens of a sequence (the model's)", metavar="N", type=int)
    flag("--batch", "fit: sequences at a time (1)", metavar="N", type=int)
    flag("--jobs", "serve: the directory of the queue", metavar="DIR")
    flag("--watch", "serve: the folder of a training run", metavar="DIR")
    flag("--poll", "serve: seconds between looks (2)", metavar="SECONDS", type=float)
    flag("--once", "serve: end when the queue is empty", action="store_true")
    flag("--log-dir", "a log file for each rank, with tracebacks", metavar="DIR")
    flag("--verbose", "say what is done, and when", "-v", action="store_true")
    flag("--quiet", "only warnings and errors", "-q", action="store_true")
    flag("--debug", "show tracebacks", action="store_true")
    return made


def check_flags(arguments: argparse.Namespace, verb: str) -> None:
    """Refuse flags that the verb would ignore."""
    for flag, value in vars(arguments).items():
        given = value is not None and value is not False and flag != "words"
        if given and flag not in FLAGS[verb]:
            *others, last = [other for other in VERBS if flag in FLAGS[other]]
            known = f"{', '.join(others)} and {last}" if others else last
            raise ConfigError(
                f"`--{flag.replace('_', '-')}` does not apply to `{verb}`; it is for {known}"
            )
    if arguments.quiet and arguments.verbose:
        raise ConfigError("--quiet and --verbose: give one of them")
