"""Numbered steps as commands: which of them are done, and running those that are not."""

import importlib.util
import os
import re
import runpy
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils import args, forked
from utils.checkpoints import NEUTRAL, precision_of_run
from utils.errors import GRACE, UserError
from utils.fct import settle_fct_precision
from utils.files import load_tensors, read_json, read_record, read_table, write_json
from utils.manifest import made_with, plain_options
from utils.paths import ROOT, shown, typed
from utils.run import unfinished_folder


@dataclass
class Step:
    """One command: the script, its options, the file that shows it is done, the JSON with the options it was made with, the steps
    it builds on, and a function that says of a record (dict) whether it is of the training set at hand, where another one may
    have taken its place."""

    script: str
    words: list
    output: Path
    record: Path
    needs: list
    of_this_set: Callable[[dict], bool] | None = None

    @property
    def command(self):
        """The command as a user would type it, in the folder of the repository."""
        return shlex.join(["python", self.script, *self.words])

    def is_done(self):
        """Whether the output is there, made from its inputs as they are and with these options."""
        record, options = read_record(self.record) or {}, self.options()
        epochs = getattr(options, "epochs", None)
        if epochs is None and not all((self.record.parent / name).is_file() for name in record.get("outputs", {})):
            return False  # of a training the checkpoints before the last may have been removed
        return record.get("epochs_done", epochs) == epochs and self._follows(self.output, record, options)

    def interrupted_at(self):
        """Where an interrupted run of this step, made with these options from its inputs as they are, can be continued: the
        path of its last checkpoint and the seconds that its epochs took; or None."""
        options = self.options()
        epochs = getattr(options, "epochs", 0)
        for record in (unfinished_folder(self.record) / self.record.name, self.record):
            held = read_record(record) or {}
            done = held.get("epochs_done")
            # A run that was complete but for the replacement of an earlier result is continued too, which replaces it.
            most = epochs if record != self.record else epochs - 1
            if not isinstance(done, int) or not 0 < done <= most:
                continue
            # 11.tar and ckpt_epoch_11.pth are the last epoch's own files; last.pth and 11_unlearn_purify.tar every epoch's.
            name = re.sub(rf"(?<!\d){epochs - 1}(?=\.\w+$)", str(done - 1), self.output.name)
            checkpoint = record.with_name(name)
            asked = getattr(options, "precision", None)  # where one was named before and none is now, it may be another
            if asked not in (made_with(held, options).get("precision"), precision_of_run(held)):
                continue
            if self._follows(checkpoint, held, options):
                try:
                    history = load_tensors(checkpoint, self.command, "checkpoint of this project")["history"]
                    return checkpoint, sum(row.get("seconds", 0) for row in history)
                except (UserError, KeyError, TypeError, AttributeError):
                    print(f"{shown(checkpoint)} is damaged; the step begins anew", flush=True)
        return None

    def _follows(self, path, record, options):
        """Whether the file is there, made from its inputs as they are, and its ``record`` (dict) tells of these options."""
        if not path.is_file() or any(self._outdated_by(need, path, record) for need in self.needs):
            return False
        found, wanted = made_with(record, options), plain_options(options)
        neutral = NEUTRAL
        if "trans1" in wanted:
            settle_fct_precision(found, wanted)
        else:  # a network is taken as it was trained, unless a precision is asked for by name
            neutral = NEUTRAL | {"precision"}
            ran_in = precision_of_run(record)
            if ran_in and wanted.get("precision", "auto") not in ("auto", ran_in):
                return False
        compared = (found.keys() & wanted.keys()) - neutral
        agrees = bool(record.get("options")) and all(found[name] == wanted[name] for name in compared)
        return agrees and (self.of_this_set is None or self.of_this_set(record))

    def _outdated_by(self, need, path, record):
        """Whether ``path``, of which ``record`` (dict) tells, lacks or is older than what the step ``need`` made: by the digests of what
        it read of it, where both records tell of these, for a copy can have any time; else by the times."""
        if not need.output.is_file():  # removed to save space
            return True
        made = (read_record(need.record) or {}) if need.record.suffix == ".json" else {}
        wrote, read = (
            {os.path.normpath(place.parent / name): digest for name, digest in files.items()}
            for place, files in ((need.record, made.get("outputs", {})), (self.record, record.get("inputs", {})))
        )
        both = wrote.keys() & read.keys()
        if both:
            return any(wrote[file] != read[file] for file in both)
        return need.output.stat().st_mtime > path.stat().st_mtime

    def module(self):
        """The script as a module, so that its own parser and names count."""
        spec = importlib.util.spec_from_file_location(Path(self.script).stem, ROOT / self.script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def words_now(self, overwrite):
        """Its options, with --overwrite where that is asked for and the script has it."""
        return [*self.words, *(["--overwrite"] if overwrite and hasattr(self.options(), "overwrite") else [])]

    def options(self):
        """The options that the script takes from the command."""
        return args.parse(self.module().get_parser(), self.words, ROOT)  # where it runs


def list_commands(steps, numbers, overwrite):
    """Print the commands of steps as lines for a shell or a scheduler: each ends in a comment with its number and the numbers
    of those it must wait for, or says that it is done, and begins with the way to the repository where that is another folder.

    Args:
        steps: dict of `Step` in their order; numbers: dict command -> (number, whether it is to be run) of those printed before,
        which are left out; it grows; overwrite: whether those that are to be run may replace other results.
    """
    for step in steps.values():
        if step.command in numbers:
            continue
        with redirect_stdout(sys.stderr):  # what reading the data says is no command
            waits = not step.is_done() or any(numbers[need.command][1] for need in step.needs)
        numbers[step.command] = len(numbers) + 1, waits
        after = " ".join(str(numbers[need.command][0]) for need in step.needs)
        note = "already there" if not waits else f"after {after}" if after else "first"
        there = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "
        command = shlex.join(["python", step.script, *step.words_now(overwrite and waits)])
        print(f"{there}{command}  # {numbers[step.command][0]}: {note}", flush=True)


class StepError(UserError):
    """A step that ended with another code than 0; ``command``: its."""

    def __init__(self, text, command):
        super().__init__(text)
        self.command = command


_running = set()  # the processes of steps
_starting = threading.Lock()


def run_apart(script, words, log=None, stop=None):
    """Run a script of this repository in a process of its own, in the repository's folder; return its exit code. On Linux it is
    forked from one that has torch and the rest imported, which is half of a short step's time. ``log``, ``stop``: see `run`."""
    process = forked.context.Process(target=_as_script, args=(ROOT / script, list(map(str, words)), log))
    with _starting:
        if stop and stop.is_set():
            raise KeyboardInterrupt
        process.start()
        _running.add(process)
    try:
        process.join()
    except BaseException:  # Ctrl-C, SIGTERM
        _let_end(process.is_alive)
        process.terminate()
        process.join()
        raise
    finally:
        _running.discard(process)
    return process.exitcode


def end_steps(stop):
    """End the steps that other threads run, each as Ctrl-C would, and let none begin; ``stop``: the event given to their `run`."""
    with _starting:
        stop.set()
    _let_end(lambda: _running)
    for process in list(_running):
        process.terminate()


def _let_end(going):
    """Wait a little while ``going()``: a terminal's Ctrl-C has gone to the steps too, and a second signal would disturb what they
    still write."""
    end = time.monotonic() + GRACE
    while going() and time.monotonic() < end:
        time.sleep(0.05)


def _as_script(script, words, log):
    """What `run_apart` does in the new process: as ``python script words``."""
    if log:
        with open(log, "ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    sys.argv = [str(script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def say_where():
    """Print where the steps run, if that is not the current folder."""
    if Path.cwd() != ROOT:
        print(f"The steps run in {ROOT}; so do the commands below, and what they name is there", flush=True)


def run(steps, opt, ledger_path, log=None, stop=None):
    """Run the steps that are not done, an interrupted training from its last checkpoint; return the seconds that each took,
    when it last ran (of a training that was interrupted, those of its finished epochs too), but for steps of which neither
    ``ledger_path`` nor their own log tells. ``log``: path of a file to which they print, if not here; ``stop``: a
    `threading.Event` after which no step begins."""
    ledger = read_json(ledger_path) or {}
    for number, (name, step) in enumerate(steps.items(), 1):
        done = step.is_done()
        begun = None if done else step.interrupted_at()
        checkpoint, before = begun or (None, 0)
        words = step.words_now(opt.overwrite and not done)
        words += ["--checkpoint_load", typed(checkpoint)] if begun else []
        command = shlex.join(["python", step.script, *words])
        print(f"[{number}/{len(steps)}] {command}{'   (already there)' if done else ''}", flush=True)
        if done:
            continue
        started = time.perf_counter() - before
        code = run_apart(step.script, words, log, stop)
        if code:
            said = f" (what it said is in {shown(log)})" if log else ""
            then = "; mend what it named first" if code == 2 else ""
            raise StepError(
                f"{step.script} ended with code {code}{said}; the steps before it are kept, and running this again goes on there{then}",
                step.command,
            )
        ledger[name] = round(time.perf_counter() - started, 1)
        write_json(ledger_path, ledger)
    known = {name: ledger[name] if name in ledger else _logged_seconds(step) for name, step in steps.items()}
    return {name: seconds for name, seconds in known.items() if isinstance(seconds, (int, float))}


def _logged_seconds(step):
    """What the epochs of a training took by its log, or None where it has none that can be read."""
    if "log.csv" not in (read_record(step.record) or {}).get("outputs", {}):  # of another step in the same folder
        return None
    try:
        log = read_table(step.record.with_name("log.csv"), ["seconds"], step.command)
    except UserError:
        return None
    return round(float(pd.to_numeric(log["seconds"], errors="coerce").sum()), 1)
