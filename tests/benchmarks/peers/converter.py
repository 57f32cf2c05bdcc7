"""transformers' own converter, from Meta's files to Hugging Face's, without a tokenizer.

python -m tests.benchmarks.peers.converter META TARGET REPORT

Runs with transformers 4.45.2 alone, the last whose wheel has convert_llama_weights_to_hf.py. Its
`main` takes the size of the vocabulary from a tokenizer; ours has none to convert either.
"""

import json
import sys
from pathlib import Path

from transformers.models.llama import convert_llama_weights_to_hf as converter

from tests.benchmarks.peers.clock import Clock


def main(meta: Path, target: Path, report: Path) -> None:
    """Convert a directory of Meta's."""
    clock = Clock()
    converter.write_model(
        model_path=str(target),
        input_base_path=str(meta),
        num_shards=len(list(meta.glob("consolidated.*.pth"))),
        llama_version="3.1",
        vocab_size=json.loads((meta / "params.json").read_text())["vocab_size"],
    )
    clock.lap("convert")
    clock.write(report)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
