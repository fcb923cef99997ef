"""User mistakes end in one line and exit code 2, never in a traceback; Ctrl-C and SIGTERM in one line and 130."""

import errno
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from utils.forked import keep_socket_names_short

# Seconds that processes which end together leave each other: torchrun ends all when one has ended, and the first is to say what
# is wrong; a step that Ctrl-C has reached is to finish what it writes.
GRACE = 3

# What torch says, by Gloo and by NCCL, of a process that waits for one which is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket")

# What torch says where a device has no memory left, in exceptions that are of no class for that: the processor's, CUDA's, cuBLAS'
# and cuDNN's.
NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "_ALLOC_FAILED")

# Of a disk that is full, over its quota or broken.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# What a script gives back when it ends, however it ends: its locks.
at_exit = ExitStack()


class UserError(Exception):
    """A mistake that the user can mend; its text says what is wrong and what to do."""


def processes_wanted():
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def refuse_several_processes():
    """Raise a `UserError` under torchrun, for a script that starts the steps in processes of their own."""
    if processes_wanted() > 1:
        raise UserError("this script runs in one process, without torchrun; torchrun is for the numbered steps")


def _print_no_more():
    """What standard output still holds would raise once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _heed_interruptions(over):
    """Let SIGTERM, a scheduler's polite end, be that of Ctrl-C, and neither be lost: what comes up while an object is deleted, such as
    a loader whose workers end, Python cannot raise; it is raised again a little later. ``over``: a `threading.Event`, set when there is
    nothing left to interrupt. Without an interruption that ends with `at_exit`."""
    before, interrupted = sys.unraisablehook, threading.Event()

    def interrupt(number, frame):
        interrupted.set()
        raise KeyboardInterrupt

    def again():
        if not over.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # ends what it waits for, too

    def unraisable(lost):
        if issubclass(lost.exc_type, KeyboardInterrupt) and not over.is_set() and hasattr(signal, "pthread_kill"):
            timer = threading.Timer(0.1, again)
            timer.daemon = True
            timer.start()
        elif not interrupted.is_set():  # objects that end with an interrupted process have nothing to say
            before(lost)

    def settle():
        if not interrupted.is_set():
            sys.unraisablehook = before

    signal.signal(signal.SIGTERM, interrupt)
    sys.unraisablehook = unraisable
    at_exit.callback(settle)


def _was_interrupted(error):
    """Whether an exception came up while an interruption was dealt with."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def run_script(main):
    """Run a script's ``main()``; exit 2 on a `UserError` or for lack of memory, 130 on Ctrl-C and SIGTERM. Of several
    processes that torchrun started, the first alone prints."""
    name = Path(sys.argv[0]).name
    several = processes_wanted() > 1
    if sys.stderr is None:  # closed by what started this; tqdm would write to it
        sys.stderr = at_exit.enter_context(open(os.devnull, "w"))  # noqa: SIM115, as below
    follows, aloud = several and int(os.environ.get("RANK", "0")) > 0, sys.stderr
    if follows:
        silence = open(os.devnull, "w")  # noqa: SIM115, till the process ends
        at_exit.enter_context(redirect_stdout(silence))
        at_exit.enter_context(redirect_stderr(silence))
    over = threading.Event()
    if threading.current_thread() is threading.main_thread():  # which alone hears signals
        _heed_interruptions(over)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
    keep_socket_names_short()

    def say(text):
        """Print a mistake; of another process than the first only where that does not meet it too, with its number."""
        print(f"{name}: error: {text}", file=sys.stderr)
        if follows:
            # Where the first has met the same mistake, it ends and torchrun stops the others, which have nothing to say. Else
            # the mistake is this process's own.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2 * GRACE)  # one for what the first says, one for its end
            print(f"{name}: error: process {os.environ['RANK']}: {text}", file=aloud)

    try:
        try:
            main()
        except Exception as error:
            if _was_interrupted(error):
                raise KeyboardInterrupt from None
            raise
        finally:
            over.set()
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        say(" ".join(str(error).split()))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if is_lack_of_memory(error):
            say("out of memory; what was saved is whole. Use a smaller --batch_size")
            sys.exit(2)
        if not (several and any(word in str(error) for word in LOST)):
            raise
        print(f"{name}: error: another process has ended, see what it said; what was saved is whole", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        _print_no_more()
        sys.exit(141)
    except OSError as error:
        if isinstance(error, PermissionError) and error.filename:
            print(
                f"{name}: error: cannot use {error.filename}: {error.strerror}; ask for access to it", file=sys.stderr
            )
            sys.exit(2)
        if error.errno not in FULL or error.filename:
            raise
        _print_no_more()
        print(
            f"{name}: error: cannot write what it prints ({error.strerror}); what was saved is whole", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what earlier epochs saved is whole and can be resumed from", file=sys.stderr)
        sys.exit(130)
    finally:
        at_exit.close()


def is_lack_of_memory(error):
    """Whether an exception says that this machine or its GPU has no memory left."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return said or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def first_line(error):
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest_existing(path):
    """The longest leading part of ``path`` that exists (a `Path`), with what it holds, as text for a message."""
    path = Path(path).absolute()
    while not os.path.exists(path):  # false too for what lies in a folder we may not enter
        path = path.parent
    if path.is_dir() and os.access(path, os.R_OK):
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return f"{path} ({'holds ' + shown if names else 'empty'})"
    return f"{path} (a file)"


def require_folder(path, then):
    """Return ``path`` as a `Path`, or raise a `UserError` that says what to do ``then``."""
    path = Path(path)
    if not os.path.isdir(path):
        raise UserError(f"no such folder: {path}; {then}. Nearest existing path: {nearest_existing(path)}")
    return path


def require_file(path, command):
    """Return ``path`` as a `Path`, or raise a `UserError` that names the command which makes the file."""
    path = Path(path)
    try:
        there = path.is_file()
    except PermissionError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; ask for access to it, or make your own with: {command}"
        ) from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise UserError(f"{str(path)[:100]!r} is no file name ({error}). The file is made with: {command}") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a file. Such a file is made with: {command}")
    if not there:
        raise UserError(
            f"no such file: {path}. Make it with: {command}. Nearest existing path: {nearest_existing(path)}"
        )
    return path
