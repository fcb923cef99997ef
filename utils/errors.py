"""User mistakes end in one line and exit code 2, never in a traceback."""

import os
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; its text says what is wrong and what to do."""


def run_script(main):
    """Run a script's ``main()``; exit 2 on a `UserError`, 130 on Ctrl-C."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what earlier epochs saved is whole and can be resumed from", file=sys.stderr)
        sys.exit(130)


def nearest_existing(path):
    """The longest leading part of ``path`` that exists (a `Path`), with what it holds, as text for a message."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return f"{path} ({'holds ' + shown if names else 'empty'})"
    return f"{path} (a file)"


def require_file(path, command):
    """Return ``path`` as a `Path`, or raise a `UserError` that names the command which makes the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no such file: {path}. Make it with: {command}. Nearest existing path: {nearest_existing(path)}"
        )
    return path
