"""The command line of the benchmarks.

python -m tests.benchmarks [--dir DIR] [--pairs N] [--only TEXT ...] [--all] [--list]

A run of all usual rows writes results.md and results.json, one of some rows some.md and some.json.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from tests.benchmarks import machine, results, running, seeded
from tests.benchmarks.place import Place
from tests.benchmarks.results import Found
from tests.benchmarks.rows import Row, all_rows, chosen

WHOLE, PART = "results", "some"


def main(argv: Sequence[str]) -> int:
    """Measure what is asked for; 0 where every row ran, 1 where one did not, 130 stopped."""
    options = parse(argv)
    rows = chosen(all_rows(), options.only, options.all)
    place = Place(options.dir.resolve(), models(), sys.executable, str(options.peers.absolute()))
    if options.pairs is not None and options.pairs < 1:
        tell(f"--pairs: {options.pairs} is not a number of pairs")
        return 2
    if options.list:
        return listed(rows, place, options.pairs)
    if not rows:
        tell(f"no row has any of {', '.join(options.only)} in its name; --list --all shows them")
        return 2
    try:
        needed, free = place.needed_bytes(rows), place.free_bytes()
    except OSError as error:
        tell(f"--dir: `{place.root}`: {error.strerror}; choose a directory that can be written")
        return 2
    tell(f"{len(rows)} rows; {needed / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} GB free")
    if needed > free:
        tell(f"too little disk in {place.root}: --dir names another, --only takes fewer rows")
        return 2
    minutes = running.expected_seconds(rows, place, options.pairs) / 60
    name = PART if options.only else WHOLE
    tell(f"roughly {minutes:.0f} minutes; results in {place.root}/{name}.md and {name}.json")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return measured(rows, place, options.pairs, name)


def measured(rows: Sequence[Row], place: Place, pairs: int | None, name: str) -> int:
    """Run all rows; what there is, is in both files after every pair."""
    facts = machine.facts(place.root)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

    def keep(found: list[Found]) -> None:
        record = results.record_of(found, facts, date)
        results.write(place.root, name, found, record)

    keep([])
    try:
        found = running.Run(rows, place, pairs, tell, keep).all()
    except KeyboardInterrupt:
        tell(f"stopped; {place.root}/{name}.md has what was measured")
        return 130
    print((place.root / f"{name}.md").read_text(), end="")
    return int(any(one.problem for one in found))


def models() -> dict[str, seeded.Model]:
    """Shapes of Llama 3.2, with an output of their own: 3.0 and 7.2 GB."""
    return {size: seeded.untied(size, f"llama3.2-{size}") for size in ("1b", "3b")}


def listed(rows: Sequence[Row], place: Place, pairs: int | None) -> int:
    """Print the names of rows, how often they are measured, and their bounds."""
    for row in rows:
        bounds = "; ".join(map(str, row.bounds))
        print(f"{row.name:<32} {running.pairs_of(row, pairs)} pairs  {bounds}".rstrip())
    minutes = running.expected_seconds(rows, place, pairs) / 60
    print(f"roughly {minutes:.0f} minutes, {place.needed_bytes(rows) / 1e9:.0f} GB more of disk")
    return 0


def tell(text: str) -> None:
    """A line of progress."""
    print(f"{datetime.now().strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    flag = parser.add_argument
    flag("--dir", type=Path, default=Path("bench"), help="where to work: sources, results (bench)")
    flag("--pairs", type=int, metavar="N", help="how often each row is measured (5, peers 3)")
    flag("--only", nargs="+", default=[], metavar="TEXT", help="rows with a text in their names")
    flag("--all", action="store_true", help="all rows, also those that are not usual")
    flag("--list", action="store_true", help="name the rows, and measure nothing")
    peers = Path(".venv-peers/bin/python")
    flag("--peers", type=Path, default=peers, help=f"Python with transformers 4.45 ({peers})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
