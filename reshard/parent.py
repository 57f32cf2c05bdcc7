"""Who started this process, asked before the libraries are imported, which takes seconds."""

import os

PARENT = os.getppid()
