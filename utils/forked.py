"""Processes forked from one that has torch and the rest imported, which takes seconds. This module itself imports nothing that
does, so that a script can let that process begin before its own imports."""

import multiprocessing
import sys
from multiprocessing import forkserver

# macOS and Windows cannot safely fork after these imports.
context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
context.set_forkserver_preload(["torch", "pandas", "matplotlib.pyplot", "utils.args"])

ONLY_PRINT = {"-h", "--help", "--dry_run", "--verify"}


def begin(words):
    """Let the process that others are forked from begin, on Linux, unless the ``words`` of a command run no step."""
    if sys.platform == "linux" and not ONLY_PRINT.intersection(words):
        forkserver.ensure_running()
