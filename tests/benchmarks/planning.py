"""How long planning takes, and what memory: each plan in a process of its own, for one rank.

python -m tests.benchmarks.planning [--times N]

`begin` is all that a rank does before a byte moves: layouts, plan, least memory, digest. `rounds`
is the schedule of the whole job, which a rank finds while it moves; what it expands of its own
blocks is counted, and grows with its share of the model. Seconds of this process on the processor.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from reshard import config
from reshard.buffers import ALIGN
from reshard.prepare import job_digest, prepare
from reshard.report import balance, memory_of
from reshard.room import round_bytes
from reshard.schedule import rounds
from reshard.traffic import loads_by_rank

JOBS = (
    ("llama3.1-405b", "meta16", "tp8pp16"),
    ("llama3.1-405b", "meta16", "hf"),
    ("llama3.3-70b", "meta8", "fsdp64"),
    ("llama3.3-70b", "meta8", "fsdp4096"),
)
WORLDS = (8, 512, 4096)
HEAD = "| plan | ranks | begin, s | MiB | rounds, s | own blocks | balance read, write |"


def planned(model: str, source: str, target: str, world: int) -> dict[str, float]:
    """Plan a job for the first of `world` ranks; seconds, MiB beyond imports, and balance."""
    gc.freeze()  # as the command does
    before, began = memory_of("VmRSS"), time.process_time()
    job = config.load(source, target, [f"src.model={model}"], None)
    prepared = prepare(job)
    plan = prepared.plan(world)
    capacity = round_bytes(job.engine.memory, plan)
    plan.digest(job_digest(prepared, plan))
    begun = time.process_time()
    own = nbytes = 0
    for each in rounds(plan, 0, capacity, ALIGN):
        own, nbytes = own + len(each.moves), nbytes + each.nbytes
    ended = time.process_time()
    peak = memory_of("VmHWM")
    loads = loads_by_rank(plan)
    return {
        "begin": begun - began,
        "rounds": ended - begun,
        "own": own,
        "mib": (peak - before) / (1 << 20),
        "read": balance([load.read for load in loads]),
        "write": balance([load.written for load in loads]),
    }


def measured(job: Sequence[str], world: int, times: int) -> dict[str, float]:
    """The medians of several processes."""
    command = (sys.executable, "-m", "tests.benchmarks.planning", "--one", *job, str(world))
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        for _ in range(times)
    ]
    return {key: median(one[key] for one in found) for key in found[0]}


def main(argv: Sequence[str]) -> int:
    """Print a table of all plans, or the figures of one."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.planning")
    times = "how often each is planned (1; about 2 minutes for each time)"
    parser.add_argument("--times", type=int, default=1, metavar="N", help=times)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.times < 1:
        parser.error(f"--times: {options.times} is not a number of times")
    if options.one:
        print(json.dumps(planned(*options.one[:3], int(options.one[3]))))
        return 0
    print(HEAD)
    print("|---" * HEAD.count(" | ") + "|---|")
    for model, source, target in JOBS:
        for world in WORLDS:
            found = measured((model, source, target), world, options.times)
            print(
                f"| {model} {source} → {target} | {world:,} | {found['begin']:.2f} | "
                f"{found['mib']:.0f} | {found['rounds']:.2f} | {found['own']:,.0f} | "
                f"{found['read']:.3f}, {found['write']:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
