"""`python -m reshard`."""

import sys

try:
    from reshard.cli import entry
except KeyboardInterrupt:
    # Importing torch takes seconds, in which nothing has begun.
    sys.exit(130)

entry()
