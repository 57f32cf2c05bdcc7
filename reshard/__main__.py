"""`python -m reshard`."""

from reshard.cli import entry

entry()
