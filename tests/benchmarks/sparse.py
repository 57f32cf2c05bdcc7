"""A job of the size of a 70B, on a disk that does not have it: what is read and written are holes.

python -m tests.benchmarks.sparse DIR [--dst meta8] [--ranks 2] [--memory 64MiB]

All is done that the program does with 141 GB but for the writing of its long runs, which are zeros
and stay holes. What is measured is memory: of each rank, at its peak, beyond what importing takes.
"""

import argparse
import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from reshard import cli, commit, families, formats, native
from reshard.formats.options import Options
from reshard.storage import Files
from reshard.topologies import read_model

LONG = 64 << 10
LAUNCH = Path(__file__).parents[2] / "launch" / "torchrun"


def make_source(path: Path, name: str) -> None:
    """A Hugging Face checkpoint whose headers are real and whose weights are holes."""
    model = read_model(name)
    found, options = formats.named("hf"), Options(max_shard_bytes=5 * 10**9)
    layout = formats.laid_out(found, families.parameters(model), model, options)
    places = commit.TargetPlaces(layout)
    commit.lay_out(path, layout, places, layout.files)
    texts = found.side_files(model, layout, options)
    closing = found.closing_files(layout, options, places.skeleton)
    for file, pieces in {**{key: (text,) for key, text in texts.items()}, **closing}.items():
        (path / file).write_bytes(b"".join(pieces))


def refuse(descriptor: int, size: int) -> None:
    """A file system that cannot promise room."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def without_long_writes() -> None:
    """From here on long runs are counted, and their bytes looked at, but not written."""
    plain = Files.write

    def write(self: Files, file: str, offset: int, buffers: Sequence[memoryview]) -> None:
        if sum(view.nbytes for view in buffers) < LONG:
            plain(self, file, offset, buffers)
            return
        self.nbytes += sum(view.nbytes for view in buffers)

    mock.patch.object(Files, "write", write).start()
    mock.patch.object(native, "fallocate", refuse).start()
    mock.patch("reshard.job.require_space").start()


def main(argv: Sequence[str]) -> int:
    """Make the source where there is none, run the job, and print memory by rank."""
    if argv[:1] == ["job"]:
        without_long_writes()
        return cli.main(list(argv[1:]))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sparse")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--model", default="llama3.3-70b")
    parser.add_argument("--dst", default="meta8")
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--memory", default="64MiB")
    options = parser.parse_args(argv)
    source, report = options.dir / "source", options.dir / "report.json"
    with mock.patch.object(native, "fallocate", refuse):
        if not source.exists():
            make_source(source, options.model)
    job = ("--src", "hf", "--dst", options.dst, f"src.path={source}", f"dst.path={options.dir}/out")
    command = (sys.executable, str(LAUNCH), "--nproc", options.ranks)
    module = ("-m", "tests.benchmarks.sparse", "job", *job, "--report", str(report))
    code = subprocess.call((*command, *module, f"engine.memory={options.memory}"))
    if code == 0:
        found = json.loads(report.read_text())
        for rank, peak in found["peak_rss"].items():
            taken = (peak - found["import_rss"][rank]) / (1 << 20)
            print(f"rank {rank}: {taken:.1f} MiB beyond imports, with {options.memory}")
        print(f"read {found['bytes']['read']:,}, written {found['bytes']['written']:,} bytes")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
