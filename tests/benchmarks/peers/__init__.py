"""What other tools need to be run: each module is a command of its own, in a fresh process.

Their last argument is a file for their own times: `{"seconds": {stage: seconds}}`, counted from
when imports and the process group are there, as in our own report.
"""
