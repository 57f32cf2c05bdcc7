"""The words of the command line: verbs, flags, and what `--help` says of them."""

import argparse

from reshard.errors import ConfigError

FLAGS = {
    "run": ("src", "dst", "config", "report", "force", "debug"),
    "plan": ("src", "dst", "config", "world", "debug"),
    "inspect": ("json", "checksums", "debug"),
    "verify": ("cast", "load", "debug"),
}
VERBS = tuple(FLAGS)
DESCRIPTION = """\
Reshards LLM checkpoints between Meta MP, Nanotron TPxPP, Hugging Face, FSDP and TorchTitan (DCP)
and GGUF, bit for bit, in bounded memory.

  torchrun --nproc-per-node 8 -m reshard --src meta8 --dst tp4 src.path=DIR dst.path=DIR
  torchrun --nproc-per-node 2 -m reshard --src dcp --dst hf src.path=DIR src.assets=DIR dst.path=DIR
  python -m reshard plan --src meta8 --dst tp4 src.model=llama3-70b --world 8
  python -m reshard inspect DIR
  python -m reshard verify DIR [--load]          every byte against reshard.json; --load: opened
                                                 with torch, safetensors, transformers or gguf too
  python -m reshard verify A B [--cast]          the same values; --cast: after B's dtype

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
  engine.verify=false        true: reads everything back, from the disk, before it is published
  engine.require_complete=false       true: refuse a target that would lack config or tokenizer
With neither src.path nor dst.path, `run` makes a tiny model below ./reshard-demo and reshards it.

A target is absent or complete, whatever ends a job; TorchTitan's is dst.path/step-0.
  What is under way lies in DST.partial-<digest>. The same command goes on with it, also on another
  number of ranks, with another engine.memory or engine.exchange; --max-restarts of torchrun too.
  A finished DST of this very job is already done (0). An empty DST counts as absent; any other is
  refused, as is the partial result of another job: --force discards that, and replaces a DST that
  this program wrote (between the two renames it is absent; who was stopped there puts it back).
  A symlink or a mount point as DST is refused: name a directory below it. DST.lock keeps a second
  job away for as long as the first lives.

exit codes: 0 done or already done; 1 failed, or a difference was found; 2 refused; 130, 143 stopped
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
        "--cast", action="store_true", help="verify A B: compare A's values after B's dtype"
    )
    made.add_argument(
        "--load", action="store_true", help="verify DIR: open it with its format's own library too"
    )
    made.add_argument(
        "--force", action="store_true", help="run: replace or discard what is in the way"
    )
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def check_flags(arguments: argparse.Namespace, verb: str) -> None:
    """Refuse flags that the verb would ignore."""
    for flag, value in vars(arguments).items():
        given = value is not None and value is not False and flag != "words"
        if given and flag not in FLAGS[verb]:
            known = [other for other in VERBS if flag in FLAGS[other]]
            raise ConfigError(
                f"`--{flag}` does not apply to `{verb}`; it is for {' and '.join(known)}"
            )
