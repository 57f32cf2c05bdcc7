"""How long resharding takes, beside a copy of the bytes and beside other tools: `make bench`."""
