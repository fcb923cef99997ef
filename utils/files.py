"""Writing results so that a file on disk is always the old or the new whole one, and never half of either; reading what
a stranger may have written as data only; locks."""

import hashlib
import io
import json
import lzma
import math
import os
import pickle
import shutil
import socket
import stat
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from utils.distributed import leads
from utils.errors import UserError, at_exit, require_file
from utils.paths import shown

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None

# What a bad npy or npz can raise.
BROKEN = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    tokenize.TokenError,
)  # fmt: skip


def make_folder(folder, option="--output_root"):
    """Create ``folder`` with its parents and make sure that it can be written to. Raises `UserError` if not, which names the
    ``option`` that chooses it. Like all writing here, the leader's work alone where several processes run."""
    folder = Path(folder)
    if not leads():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # on Linux without a name, which a killed step would leave there
            pass
    except OSError as error:
        reason = "a file, or a link to nothing, has this name" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"cannot write to the folder {folder}: {reason}; choose another with {option}") from None
    return folder


def check_outputs(paths, overwrite):
    """Look at the places of files that a tool is to write, before it works for them.

    Args:
        paths: which --out chooses; overwrite: whether files that are there may be replaced.

    Raises:
        UserError: where one is there and may not, or no file can be.
    """
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # a name that is too long, a link to itself
            raise UserError(f"cannot write {shown(path):.200}: {error.strerror}; give another --out") from None
        if not stat.S_ISREG(mode):
            raise UserError(f"{shown(path)} is a folder or a device; name a file with --out")
        if not overwrite:
            raise UserError(f"{shown(path)} is there already; give --overwrite to replace it, or another --out")


def refuse_users_own(paths, what, instead):
    """Refuse to replace files that have the names of a script's own and that no record tells of.

    Args:
        paths: of the files; what: the script makes of them, such as a report; instead: the options that choose another place.

    Raises:
        UserError: where one is there.
    """
    there = next((path for path in paths if os.path.lexists(path)), None)
    if there:
        raise UserError(
            f"{shown(there)} is of no {what} of this script; give another {instead}, or --overwrite to replace it"
        )


def check_place(picture, known, overwrite):
    """Before any step of a tool: a `UserError` where its ``picture`` is there and no table of it (``known``) beside it, unless
    ``overwrite``, or where the folder is there and cannot be written."""
    if not (known or overwrite):
        refuse_users_own([picture], "table", "--out")
    if os.path.lexists(picture.parent):
        make_folder(picture.parent, "--out")


@contextmanager
def atomic_write(path):
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends without an error."""
    if not leads():
        yield io.BytesIO()
        return
    with _temporary(path) as (file, finish):
        yield file
        finish()


@contextmanager
def new_folder(target, option):
    """Yield a folder to fill, which becomes ``target`` when the block ends without an error, and is gone otherwise. ``option``: the
    one that chooses it.

    Raises:
        UserError: where something is there already, or cannot be written.
    """
    target = Path(target).absolute()
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} is there already; give a new name")
    make_folder(target.parent, option)
    sweep(target.parent)
    staging = Path(tempfile.mkdtemp(dir=target.parent, **_temporary_name(target)))
    try:
        yield staging
        os.chmod(staging, 0o777 & ~_umask())
        os.rename(staging, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; nothing is left of it") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_together(writers):
    """Write several files that belong together: all are complete on disk before the first takes its name.

    Args:
        writers: dict of paths, in the order in which they take their names, and functions that write to an open file.

    Returns:
        dict: name of each file -> its SHA-256.
    """
    if not leads():
        return dict.fromkeys((Path(path).name for path in writers), "")
    digests = {}
    with ExitStack() as stack:
        finishes = []
        for path, write in writers.items():
            file, finish = stack.enter_context(_temporary(path))
            with _told(path):
                write(file)
                file.flush()
            digests[Path(path).name] = sha256(file.name)
            finishes.append(finish)
        for finish in finishes:
            finish()
    return digests


@contextmanager
def _temporary(path):
    """(an open temporary file beside ``path``, the function that gives it the name ``path``); of a link beside the file it
    leads to. Raises `UserError` for a folder or a device, and where the file system refuses."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no plain file, so nothing is written there; name another")
    name = None

    def finish():
        with _told(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.chmod(name, 0o666 & ~_umask())  # a temporary file is made readable by its owner alone
            os.replace(name, path)

    try:
        with _told(path):
            sweep(path.parent)
            file = tempfile.NamedTemporaryFile(  # noqa: SIM115, closed below
                dir=path.parent, delete=False, **_temporary_name(path)
            )
            name = file.name
        with _told(path), file:  # closing it writes what is left, and can find the disk full too
            yield file, finish
    finally:
        if name and os.path.exists(name):
            os.unlink(name)


@contextmanager
def _told(path):
    """An error of the file system, such as a full disk, as a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing of it was changed") from None


_HERE = "".join(letter for letter in socket.gethostname() if letter.isalnum())[:20]


def _temporary_name(path):
    """What the name of a temporary file for ``path`` begins and ends with, for `tempfile`; shorter than any that a file can have."""
    return {"prefix": f".{path.name[:40]}.{_HERE}-{os.getpid()}-", "suffix": ".tmp"}


def sweep(folder):
    """Remove the temporary files and folders in ``folder`` that killed processes of this machine left."""
    for left in Path(folder).glob(f".*.{_HERE}-*.tmp"):
        pid = left.name.split(f".{_HERE}-")[-1].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _alive(pid):
    if fcntl is None:  # Windows, where signal 0 is Ctrl-C to every process of the console
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


_locks = []


def hold_lock(path, option="--output_root"):
    """Keep other runs from writing the file ``path``, which ``option`` chooses, until this script ends; the lock is a file
    beside it, which the system gives free when the process ends, however it ends.

    Raises:
        UserError: where another run holds it.
    """
    if fcntl is None or not leads():
        return
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    while True:
        with _told(lock):
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 100).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise UserError(
                f"another run ({owner}) is writing {path}; wait until it ends, or give another {option}"
            ) from None
        except OSError as error:
            print(f"Note: no lock can be had on {lock} ({error.strerror}); start no second run of this step")
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == os.stat(lock).st_ino:
                break
        os.close(handle)  # its last owner has just removed it
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _locks.append(handle)

    def free():
        _locks.remove(handle)
        lock.unlink(missing_ok=True)
        os.close(handle)

    at_exit.callback(free)


# A worker process must not keep the lock of a script that was killed.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [os.close(handle) for handle in _locks])


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def bytes_writer(content):
    """A function that writes ``content`` (bytes) to an open binary file, for `write_together`."""
    return lambda file: file.write(content)


def text_writer(text):
    """A function that writes ``text`` (str) to an open binary file, for `write_together`. Names of files may hold bytes that
    are no text; they are written as they are."""
    return bytes_writer(text.encode(errors="surrogateescape"))


def json_writer(content):
    """A function that writes ``content`` (dict) as indented JSON to an open binary file, for `write_together`. A float that is
    no number becomes null, for JSON has none."""
    return text_writer(json.dumps(_without_nan(content), indent=2, default=str, allow_nan=False) + "\n")


def _without_nan(content):
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def as_logged(value):
    """A float with the six digits that a log keeps of it."""
    return float(f"{value:.6g}")


def csv_writer(rows):
    """A function that writes ``rows`` (dicts) as CSV with a header to an open binary file, for `write_together`. The columns are
    those of the longest row, then what others have besides."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    return text_writer(pd.DataFrame(rows, columns=list(columns)).to_csv(index=False))


def array_writer(values):
    """A function that writes ``values`` (a NumPy array) as .npy to an open binary file, for `write_together`."""
    return lambda file: np.save(file, values, allow_pickle=False)


def tensor_writer(content):
    """A function that writes ``content`` (tensors and plain values) to an open binary file, for `write_together`."""

    def write(file):
        buffer = io.BytesIO()  # torch.save itself does not tell a full disk from other trouble
        torch.save(content, buffer)
        # No copy; a view of the buffer in the traceback of a full disk crashes Python 3.12.
        file.write(buffer.getvalue())

    return write


def write_json(path, content):
    """Write ``content`` (dict) to ``path`` as indented JSON."""
    write_together({path: json_writer(content)})


def write_rows(path, rows):
    """Write ``rows`` to ``path`` as CSV, see `csv_writer`."""
    write_together({path: csv_writer(rows)})


def read_text(path, command):
    """The text of a file. Raises `UserError` where there is none, and names the ``command`` that makes it, or no text in it."""
    try:
        return require_file(path, command).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable text ({error}). Make it with: {command}") from None


def read_table(path, columns, command, **options):
    """A CSV file as a DataFrame; ``options`` of `pandas.read_csv`.

    Raises:
        UserError: where there is no such file, or it is no table with these ``columns``; names the ``command`` that makes it.
    """
    try:
        table = pd.read_csv(require_file(path, command), **options)
    except (OSError, ValueError) as error:  # not text, or no table, are ValueErrors
        raise UserError(f"{path} is not readable as a table ({error}). Make it with: {command}") from None
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{path} is another table: it has no column {', '.join(missing)}. Make it with: {command}")
    return table


def read_json(path, of_others=False):
    """The dict in ``path``, or None where there is no such file, or with ``of_others`` JSON that is no dict, as we write none. Raises
    `UserError` for another file."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            if of_others:
                return None
            raise ValueError("not an object")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; ask for access to it") from None
    except (OSError, ValueError, RecursionError) as error:  # bad bytes and malformed JSON are ValueErrors too
        raise UserError(
            f"{path} is not readable JSON ({error}); remove it and run the step that writes it again"
        ) from None


def read_record(path):
    """The record of a step in ``path``, see `manifest.write_options`, or None where there is no such file.

    Raises:
        UserError: for a file that is no such record.
    """
    record = read_json(path)
    if record is not None:
        kinds = {"options": dict, "outputs": dict, "inputs": dict, "epochs_done": int}
        if not all(isinstance(record.get(name, kind()), kind) for name, kind in kinds.items()):
            raise UserError(f"{path} is not the record of a step; remove it and run the step that writes it again")
    return record


def load_npz(path, names, limit):
    """The arrays ``names`` of an ``.npz`` file, as data only.

    Args:
        path: the file; names: of the arrays; limit: bytes that one of them may take when unpacked, so that a small file
        cannot fill the memory.

    Raises:
        One of `BROKEN`: where the file is missing or not such an archive.
    """
    with zipfile.ZipFile(path) as archive:
        for name in names:
            if archive.getinfo(f"{name}.npy").file_size > limit:
                raise ValueError(f"{name} is larger than it can be")
            with archive.open(f"{name}.npy") as stored:  # memory is taken by what is said here, whatever follows
                version = np.lib.format.read_magic(stored)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stored)
            if math.prod(shape) * dtype.itemsize > limit:
                raise ValueError(f"{name} says that it is larger than it can be")
    with np.load(path, allow_pickle=False) as stored:
        return [stored[name] for name in names]


def load_tensors(path, command, what):
    """What torch.save wrote to ``path``, on the CPU: data only, never code.

    Args:
        path: the file; command: what makes it where it is missing; what: what it should be, for the message.

    Raises:
        UserError: for a file that is missing, damaged, or holds more than tensors and plain values.
    """
    path = require_file(path, command)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle torch warns before it refuses it
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise _not_allowed(path) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain tensors and values, or is damaged; it was not opened. Of a network of your own, save the "
            f"weights alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # a damaged file can fail in the reader in any way
        raise UserError(f"{path} is no {what}, or damaged ({type(error).__name__}). Make it with: {command}") from None


def sha256(path):
    """Hexadecimal SHA-256 of the file at ``path``. Raises `UserError` where it may not be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except PermissionError:
        raise _not_allowed(path) from None
    return digest.hexdigest()


def _not_allowed(path):
    return UserError(f"no permission to read {path}; ask its owner for it, or give another file")
