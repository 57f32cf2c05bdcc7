"""The process of a conversion: a task as JSON on standard input, its outcome on standard output."""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

from reshard.errors import CheckpointError
from reshard.tokenizers import TASKS, first_line


def main() -> None:
    """Do one task; what is missing, wrong or failed is told in the outcome, a line of JSON."""
    # Whatever a library prints goes to standard error, so that the outcome stands alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # transformers would load torch, which no conversion needs: a second, and 180 MB.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: as if not installed
    outcome = _outcome(json.load(sys.stdin))
    with answer:
        answer.write(json.dumps(outcome) + "\n")


def _end_with(parent: int) -> None:
    """End when the caller has ended, which may have had no time to end this process."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _outcome(job: dict[str, object]) -> dict[str, object]:
    try:
        task = importlib.import_module(f"reshard.tokenizers.{TASKS[str(job['task'])].module}")
        task.run(job["arguments"], Path(str(job["folder"])))
    except ImportError as error:
        return {"missing": first_line(error).partition(" (")[0]}
    except CheckpointError as error:
        return {"wrong": str(error)}
    except OSError as error:
        return {"failed": error.strerror or first_line(error)}
    return {"done": True}


if __name__ == "__main__":
    main()
