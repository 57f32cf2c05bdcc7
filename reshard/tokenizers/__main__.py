"""The process of a conversion: a task as JSON on standard input, its outcome on standard output."""

import importlib
import json
import sys
from pathlib import Path

from reshard.errors import CheckpointError
from reshard.tokenizers import TASKS


def main() -> None:
    """Do one task; what is missing or wrong is told in the outcome, anything else ends badly."""
    # transformers would load torch, which no conversion needs: a second, and 180 MB.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: as if not installed
    job = json.load(sys.stdin)
    outcome: dict[str, object]
    try:
        task = importlib.import_module(f"reshard.tokenizers.{TASKS[job['task']].module}")
        task.run(job["arguments"], Path(job["folder"]))
        outcome = {"done": True}
    except ImportError as error:
        outcome = {"missing": str(error)}
    except CheckpointError as error:
        outcome = {"wrong": str(error)}
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
