"""Checkpoints that say what they were made with, and the record of a training run."""

import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import torchvision

from utils.errors import UserError, require_file
from utils.files import atomic_write, load_tensors, make_folder, read_json, write_json, write_rows
from utils.paths import shown

# The options that decide which data set a step sees; a checkpoint of others does not fit.
CLEAN_IDENTITY = ("dataset", "model")
IDENTITY = (*CLEAN_IDENTITY, "trigger_type", "target_type", "target_label", "poison_rate", "seed")
SECURE_IDENTITY = (*IDENTITY, "clean_ratio", "poison_ratio")  # of a step of ST, which sees the separated samples

KEYS = {"step", "epoch", "model", "optimizer", "schedule", "options", "poisoned_digest", "history"}


def identity(opt, names=IDENTITY):
    """The options ``names`` as a dict."""
    return {name: getattr(opt, name) for name in names}


def plain_options(opt):
    """All options of a script as a dict that JSON and a weights-only checkpoint can hold."""
    simple = (int, float, str, bool, list, type(None))
    return {name: value if isinstance(value, simple) else str(value) for name, value in sorted(vars(opt).items())}


def refuse_other(found, opt, what, names=IDENTITY):
    """Raise a `UserError` that names both values where ``found`` (dict) differs from the options."""
    for name in names:
        if name in found and found[name] != getattr(opt, name):
            raise UserError(
                f"{what} was made with --{name} {found[name]}, but this step was asked for --{name} {getattr(opt, name)}; "
                f"give the same options to every step"
            )


def refuse_other_data(checkpoint, digest, path):
    """Raise a `UserError` where a checkpoint was made with other samples poisoned than the data at hand has."""
    if checkpoint["poisoned_digest"] != digest:
        raise UserError(
            f"{path} was made on data in which other samples are poisoned, although the options agree: "
            f"its training set is not the one under --data_root. Run the steps from the first on this data"
        )


def save_checkpoint(path, content):
    """Write a checkpoint (dict of plain values and tensors) whole or not at all."""
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path, opt, command, steps, names=IDENTITY):
    """Read a checkpoint that one of ``steps`` wrote for the same data set, model and attack.

    Args:
        path: the file; opt: the options it must fit; command: what makes the file where it is missing;
        steps: names of the scripts that may have written it; names: the options that must agree.

    Returns:
        dict with step, epoch, model, optimizer, schedule, options, poisoned_digest, history; tensors on the CPU.

    Raises:
        UserError: for a file that is missing, damaged, from elsewhere, or of other options.
    """
    checkpoint = load_tensors(path, command, "checkpoint of this project")
    try:
        step, options = checkpoint["step"], dict(checkpoint["options"])
        missing = KEYS - checkpoint.keys()
        if missing:
            raise KeyError(sorted(missing))
    except (TypeError, KeyError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is no checkpoint of this project ({type(error).__name__}). Make it with: {command}"
        ) from None
    if step not in steps:
        raise UserError(f"{path} was written by {step}, this step needs a checkpoint of {' or '.join(steps)}")
    refuse_other(options, opt, str(path), names)
    return checkpoint


def load_weights(module, state, path):
    """Load a state dict into ``module``; a `UserError` names the first difference where it does not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()
        raise UserError(f"the weights in {path} do not fit this network: {' '.join(lines[:2])[:300]}") from None


def load_optimizer(optimizer, state, path):
    """Load an optimizer's state; a `UserError` where it is of another network."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the optimizer's state in {path} does not fit this network: {error}") from None


def latest_checkpoint(folder, epochs, command):
    """The last epoch's checkpoint in ``folder``, as a step's own record tells it; ``epochs`` where there is none."""
    record = read_json(folder / "options.json") or {}
    epochs = record.get("options", {}).get("epochs", epochs)
    path = require_file(folder / f"{epochs - 1}.tar", command)
    print(f"Using {shown(path)}")
    return path


def latest_file(folder, pattern, command):
    """The newest file of ``pattern`` below ``folder``; a `UserError` names the ``command`` that makes one."""
    found = sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path))
    path = found[-1] if found else require_file(folder / pattern, command)
    print(f"Using {shown(path)}")
    return path


def claim_folder(folder, opt, names=IDENTITY):
    """Create an output folder; refuse one that holds the work of other settings, unless ``--overwrite`` is given."""
    folder = make_folder(folder)
    record = read_json(folder / "options.json")
    if record and not opt.overwrite:
        for name, value in identity(opt, names).items():
            other = record.get("options", {}).get(name, value)
            if other != value:
                raise UserError(
                    f"{shown(folder)} holds the result of --{name} {other}, which --{name} {value} would replace; "
                    f"give --overwrite to replace it, or another --output_root"
                )
    return folder


def write_options(path, opt, **more):
    """Record a step's resolved options, its command and the versions as JSON in ``path``."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    write_json(path, {"command": command, "options": plain_options(opt), "versions": versions, **more})


class Run:
    """The record of one training step: a checkpoint and a CSV row an epoch, the options as JSON.

    Args:
        opt: the options; step: the script's name without ``.py``; folder: a claimed output folder; digest: of the
        poisoned indices, or None; log, record: paths of the CSV and the JSON, by default log.csv and options.json there.
    """

    def __init__(self, opt, step, folder, digest, log=None, record=None):
        self.opt, self.step, self.digest = opt, step, digest
        self.log = log or folder / "log.csv"
        self.record = record or folder / "options.json"
        self.history = []
        self.started, self.finished = time.perf_counter(), 0

    def resume(self, checkpoint, path, model, optimizer, scheduler=None):
        """Load weights, optimizer and schedule of a checkpoint; return the epoch to go on with.

        That is the next epoch for a checkpoint of this same step, and 0 for one of the step before.
        """
        refuse_other_data(checkpoint, self.digest, path)
        load_weights(model, checkpoint["model"], path)
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        if scheduler is not None:
            scheduler.load_state_dict(checkpoint["schedule"])
        if checkpoint["step"] != self.step:
            return 0
        return self.take_history(checkpoint)

    def take_history(self, checkpoint):
        """Go on with the rows that ``checkpoint`` has; return the next epoch."""
        self.history = list(checkpoint["history"])
        print(f"Continuing after epoch {checkpoint['epoch']}")
        if checkpoint["epoch"] + 1 >= self.opt.epochs:
            print(f"All {self.opt.epochs} epochs are done; a larger --epochs continues")
        return checkpoint["epoch"] + 1

    def finish_epoch(self, epoch, row, paths, model, optimizer, scheduler=None):
        """Write the checkpoint to each of ``paths``, then the CSV and the options, and print the row (dict of floats)."""
        row = {"epoch": epoch, **{name: float(f"{value:.6g}") for name, value in row.items()}}
        self.history.append(row)
        content = {
            "step": self.step,
            "epoch": epoch,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": scheduler.state_dict() if scheduler is not None else {},
            "options": plain_options(self.opt),
            "poisoned_digest": self.digest,
            "history": self.history,
        }
        for path in paths:
            save_checkpoint(path, content)
        write_rows(self.log, self.history)
        write_options(self.record, self.opt, step=self.step, poisoned_digest=self.digest, epochs_done=epoch + 1)
        self.finished += 1
        left = (time.perf_counter() - self.started) / self.finished * (self.opt.epochs - epoch - 1)
        numbers = "  ".join(f"{name} {value:g}" for name, value in row.items() if name != "epoch")
        print(f"epoch {epoch + 1}/{self.opt.epochs}  {numbers}  about {left / 60:.1f} min left", flush=True)
