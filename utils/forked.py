"""Processes forked from one that has torch and the rest imported, which takes seconds. This module itself imports nothing that
does, so that a script can let that process begin before its own imports."""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver

# macOS and Windows cannot safely fork after these imports.
context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
context.set_forkserver_preload(["torch", "pandas", "matplotlib.pyplot", "utils.args"])

LONGEST = 75  # bytes of the folder for temporary files that leave room for a socket's name in it: 107 in all on Linux
ONLY_PRINT = {"-h", "--help", "--dry_run", "--verify"}


def keep_socket_names_short():
    """Let temporary files lie in /tmp where TMPDIR names a folder so deep that the sockets of worker processes cannot be made
    there: the workers would wait for ever."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        if ONLY_PRINT.intersection(sys.argv):
            return
        print(
            "error: there is no folder for temporary files that can be written to; set TMPDIR to one", file=sys.stderr
        )
        raise SystemExit(2) from None
    if sys.platform == "linux" and len(os.fsencode(folder)) > LONGEST and os.access("/tmp", os.W_OK):
        tempfile.tempdir = os.environ["TMPDIR"] = "/tmp"


def begin(words):
    """Let the process that others are forked from begin, on Linux, unless the ``words`` of a command run no step."""
    if sys.platform == "linux" and not ONLY_PRINT.intersection(words):
        keep_socket_names_short()
        forkserver.ensure_running()
