"""What a run read and wrote, with SHA-256, so that a figure in a table can be traced to its bytes; and the check of it."""

import os
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from functools import lru_cache
from pathlib import Path

import torch
import torchvision

from utils.distributed import leads
from utils.errors import UserError, require_folder
from utils.files import read_json, read_record, sha256, write_json
from utils.paths import ROOT, python, quoted, real, relative, shown, typed


def plain_options(opt):
    """All options of a script as a dict that JSON and a weights-only checkpoint can hold."""

    def plain(value):
        if isinstance(value, Path):  # those of the repository stay the same when it is moved
            return typed(value)
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    return {name: plain(value) for name, value in sorted(vars(opt).items())}


def made_with(record, opt):
    """The options that a ``record`` (dict) tells of, as `plain_options` gives them; those it lacks, for it is older than they
    are, have the default that the parser of ``opt`` gives them."""
    return plain_options(Namespace(**getattr(opt, "defaults", {}))) | record.get("options", {})


def conflict(found, wanted, names):
    """Where two settings (dicts) differ in one of ``names``: both of them as a user would type them, at most three options each; else
    None. What ``found`` does not tell of agrees."""

    def spelt(name, value):
        if value is None or isinstance(value, bool):
            return f"--{name}" if value else f"no --{name}"
        return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"

    differ = [name for name in names if found.get(name, wanted[name]) != wanted[name]][:3]
    if not differ:
        return None
    return tuple(" ".join(spelt(name, values[name]) for name in differ) for values in (found, wanted))


@lru_cache
def _commit():
    """The commit of the code, with a + where files were changed since, or None outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def manifest(record, opt, inputs=None, outputs=None, **more):
    """The record of a run: its command, resolved options, versions, and what it read and wrote.

    Args:
        record: path that the record will have; opt: the options; inputs, outputs: dicts path -> SHA-256, or paths alone,
        whose files are then hashed; more: what else the step wants to keep.

    Returns:
        dict for JSON; its ``inputs`` and ``outputs`` are relative to the folder of ``record``.
    """
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    ran_in = {"ran_in": opt.ran_in} if hasattr(opt, "ran_in") else {}  # a step that computes nothing has none
    named = []
    for files in (inputs, outputs):
        files = files if isinstance(files, dict) else {path: sha256(path) for path in files or ()}
        named.append({relative(path, record.parent): digest for path, digest in files.items()})
    return {
        "command": command,
        "folder": typed(Path.cwd()),  # in which the command was given
        "options": plain_options(opt),
        **ran_in,
        "versions": versions,
        "commit": _commit(),
        **more,
        "inputs": named[0],
        "outputs": named[1],
    }


def write_options(record, opt, **more):
    """Write the `manifest` of a run as JSON to ``record``."""
    if not leads():  # what the first process writes may not be there yet
        return
    write_json(record, manifest(record, opt, **more))


def anew(record, script, command):
    """The command that makes anew what a ``record`` (dict) of a ``script`` (path in the repository) tells of: as it was typed then, in
    the folder it was typed in, or ``command`` where the record does not say."""
    given, folder = record.get("command"), record.get("folder", ".")
    try:
        told = all(text.isprintable() for text in (given, folder))
        name, *words = shlex.split(given)
    except (AttributeError, TypeError, ValueError):  # no text, or not a command
        told = False
    if told and name == Path(script).name:
        folder = real(ROOT / folder)
        command = f"{python(script, folder)} {shlex.join(words)}".rstrip()
        if folder != Path.cwd():
            command = f"cd {quoted(folder)} && {command}"
    return command if "--overwrite" in command else f"{command} --overwrite"


def of_other_data(record, data):
    """Whether a ``record`` (dict) was made from another training set than the one that ``data``, a `datasets.Dataset.record`, tells of;
    False where it does not say."""
    held = record.get("data")
    return isinstance(held, dict) and held.get("train", data["train"]) != data["train"]


def of_this_data(record, data):
    """Whether a ``record`` (dict) says that it was made from the training set that ``data``, a `datasets.Dataset.record`, tells of."""
    held = record.get("data")
    return isinstance(held, dict) and held.get("train") == data["train"]


def is_other(record, kind, path):
    """Whether the file ``path`` is another than the one that a record (dict) names among its ``kind``, inputs or outputs,
    of its own folder; False where the record does not name it."""
    digest = record.get(kind, {}).get(Path(path).name)
    return digest is not None and digest != sha256(path)


def as_written(record, path):
    """Whether the file ``path`` is there as the run wrote it whose record (dict) lies beside it; False where that does not name it."""
    named = record.get("outputs", {}).get(path.name) is not None
    return named and path.is_file() and not is_other(record, "outputs", path)


def verify(folder):
    """Hold every file that the manifests in and below ``folder`` name, and the manifests that these build on, against its
    SHA-256.

    Returns:
        dict: ``whole`` and ``absent``, sorted lists of paths: as written, and named as an input but not here.

    Raises:
        UserError: where there is no folder or no manifest, or a JSON file that cannot be read, which may have been one, or a file is
        not what was written, or an output is missing.
    """
    folder = require_folder(folder, "reproduce.py and every step write their results with a manifest")
    pending = [path for path in sorted(folder.rglob("*.json")) if _is_manifest(path)]
    if not pending:
        raise UserError(f"no manifest lies in or below {shown(folder)}; reproduce.py and every step write one")
    seen, whole, absent, wrong = set(), set(), set(), []
    while pending:
        record = pending.pop()
        if record.resolve() in seen:
            continue
        seen.add(record.resolve())
        content = read_record(record)
        for kind in ("inputs", "outputs"):
            for name, digest in content[kind].items():
                path = record.parent / name
                there = os.path.isfile(path)  # not in a folder that may not be entered either
                if there and sha256(path) == digest:
                    whole.add(os.path.normpath(path))
                    pending += [path] if path.suffix == ".json" and _is_manifest(path) else []
                elif there:
                    wrong.append(f"{shown(path)} is not what {shown(record)} tells of")
                elif kind == "outputs":
                    wrong.append(f"{shown(path)}, an output in {shown(record)}, is missing")
                else:
                    absent.add(os.path.normpath(path))
    if wrong:
        raise UserError(f"{len(wrong)} of {len(whole) + len(wrong)} files do not fit: {'; '.join(wrong[:3])}")
    return {"whole": sorted(whole), "absent": sorted(absent)}


def _is_manifest(path):
    content = read_json(path, of_others=True) or {}
    return all(isinstance(content.get(kind), dict) for kind in ("inputs", "outputs"))
