"""Numbered steps as commands: which of them are done, and running those that are not."""

import importlib.util
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from utils import args
from utils.checkpoints import NEUTRAL
from utils.errors import UserError
from utils.files import read_json, read_record, write_json
from utils.manifest import plain_options
from utils.paths import ROOT


@dataclass
class Step:
    """One command: the script, its options, the file that shows it is done, the JSON with the options it was made with,
    the steps it builds on, and the digest of the training set where another one may have taken its place."""

    script: str
    words: list
    output: Path
    record: Path
    needs: list
    digest: str | None = None

    @property
    def command(self):
        """The command as a user would type it, in the folder of the repository."""
        return shlex.join(["python", self.script, *self.words])

    def is_done(self):
        """Whether the output is there, newer than its inputs and made with these options."""
        if not self.output.is_file() or any(
            step.output.stat().st_mtime > self.output.stat().st_mtime for step in self.needs
        ):
            return False
        record = read_record(self.record) or {}
        made_with, wanted = record.get("options", {}), plain_options(self.options())
        if record.get("epochs_done", wanted.get("epochs")) != wanted.get("epochs"):
            return False  # interrupted
        if self.digest and record.get("poisoned_digest", self.digest) != self.digest:
            return False
        compared = (made_with.keys() & wanted.keys()) - NEUTRAL - {"precision"}
        return bool(compared) and all(made_with[name] == wanted[name] for name in compared)

    def module(self):
        """The script as a module, so that its own parser and names count."""
        spec = importlib.util.spec_from_file_location(Path(self.script).stem, ROOT / self.script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def options(self):
        """The options that the script takes from the command."""
        return args.parse(self.module().get_parser(), self.words)


def run(steps, opt, ledger_path):
    """Run the steps that are not done; return the seconds that each took, when it last ran."""
    ledger = read_json(ledger_path) or {}
    for number, (name, step) in enumerate(steps.items(), 1):
        done = step.is_done()
        if opt.overwrite and not done and "overwrite" in vars(step.options()):
            step.words.append("--overwrite")
        print(f"[{number}/{len(steps)}] {step.command}{'   (already there)' if done else ''}", flush=True)
        if opt.dry_run or done:
            continue
        started = time.perf_counter()
        code = subprocess.run([sys.executable, ROOT / step.script, *step.words], cwd=ROOT).returncode
        if code:
            raise UserError(
                f"{step.script} ended with code {code}; the steps before it are kept, and running this again goes on there"
            )
        ledger[name] = round(time.perf_counter() - started, 1)
        write_json(ledger_path, ledger)
    return {name: ledger[name] for name in steps if isinstance(ledger.get(name), (int, float))}
