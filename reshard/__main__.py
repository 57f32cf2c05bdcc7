"""`python -m reshard`, and the console script."""

import os
import sys

import reshard.parent  # noqa: F401  # first of all: by the time that torch is there, it may be gone

# One line says what went wrong; torch's own warnings about peers that are gone do not.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

try:
    from reshard.cli import entry
except KeyboardInterrupt:
    # Importing torch takes seconds, in which nothing has begun.
    sys.exit(130)

if __name__ == "__main__":
    entry()
