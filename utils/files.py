"""Writing results so that a file on disk is always the old or the new whole one, and never half of either; reading what
a stranger may have written as data only."""

import hashlib
import json
import os
import pickle
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from utils.errors import UserError, require_file


def make_folder(folder):
    """Create ``folder`` with its parents and make sure that it can be written to. Raises `UserError` if not."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {folder}: {error.strerror}; choose another with --output_root"
        ) from None
    return folder


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends without an error."""
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            mode, dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is made readable by its owner alone
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing of it was changed") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path, text):
    """Write ``text`` (str) to ``path`` whole or not at all."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path, content):
    """Write ``content`` (dict) to ``path`` as indented JSON."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def read_json(path):
    """The dict in ``path``, or None where there is no such file. Raises `UserError` for a file that is not JSON."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # undecodable bytes and malformed JSON are ValueErrors too
        raise UserError(
            f"{path} is not readable JSON ({error}); remove it and run the step that writes it again"
        ) from None


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
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than plain tensors and values, or is damaged; it was not opened") from None
    except Exception as error:  # a damaged file can fail in the reader in any way
        raise UserError(f"{path} is no {what}, or damaged ({type(error).__name__}). Make it with: {command}") from None


def write_rows(path, rows):
    """Write ``rows`` (dicts; the longest has all keys, in the order of the columns) to ``path`` as CSV with a header."""
    write_text(path, pd.DataFrame(rows, columns=list(max(rows, key=len))).to_csv(index=False))


def sha256(path):
    """Hexadecimal SHA-256 of the file at ``path``."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
