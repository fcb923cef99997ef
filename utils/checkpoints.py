"""Checkpoints that say what they were made with: read, and refused where they do not fit."""

import math
from pathlib import Path

import torch

from utils.errors import UserError, require_file
from utils.files import load_tensors, read_record, sha256
from utils.manifest import anew, conflict, made_with, plain_options
from utils.paths import shown

# The options that decide which data set a step sees; a checkpoint of others does not fit.
CLEAN_IDENTITY = ("dataset", "train_images", "model")
IDENTITY = (*CLEAN_IDENTITY, "trigger_type", "target_type", "target_label", "poison_rate", "seed")
SECURE_IDENTITY = (*IDENTITY, "clean_ratio", "poison_ratio")  # of a step of ST, which sees the separated samples

# Options that name places, or how often something is looked at or kept, and change no result.
NEUTRAL = {
    "data_root", "output_root", "device", "compile", "workers", "strict", "deterministic", "overwrite", "eval_freq", "save_freq",
    "checkpoint_load", "checkpoint_save", "log", "ckpt", "model_ckpt", "classifier_ckpt",
}  # fmt: skip

# Options that name files which a step reads; what is in them is compared by its digest.
READ = ("samples", "benign_checkpoint", "ssba_encoder", "ssba_images")

KEYS = {"step": str, "epoch": int, "model": dict, "optimizer": dict, "schedule": dict, "options": dict,
        "poisoned_digest": (str, type(None)), "history": list}  # fmt: skip


def refuse_other(found, opt, what, names=IDENTITY):
    """Raise a `UserError` that names both values where ``found`` (dict) differs from the options."""
    differ = conflict(found, vars(opt), names)
    if differ:
        held, asked = differ
        raise UserError(
            f"{what} was made with {held}, but this step was asked for {asked}; give the same options to every step"
        )


def refuse_other_data(made, digest, path, opt):
    """Raise a `UserError` where ``path``, a checkpoint or a record that holds ``made`` (dict), is of another poisoned set than
    that of the ``digest``, which the options give; an older one may not say of which."""
    if made.get("poisoned_digest") not in (None, digest):
        refuse_other(made.get("options", {}), opt, path, ["image_size"])
        raise UserError(
            f"{path} was made on data in which other samples are poisoned or carry another trigger, although the options agree: "
            f"its training set is not the one under --data_root, or a file behind the trigger (a picture, an encoder, a benign "
            f"model) is another. Name that file, or run the steps from the first on this data"
        )


def may_train_longer(opt):
    """Whether a run of these options may go on to more epochs than it was begun with. ``--cosine`` falls over all of them, and would
    start over. (That of SD has a length of its own, see `refuse_rising_rate`.)"""
    return not getattr(opt, "cosine", False)


def precision_of_run(record):
    """The precision in which the run of a record or checkpoint (dict) computed, or None where it does not say."""
    ran_in = record.get("ran_in")
    return ran_in.get("precision") if isinstance(ran_in, dict) else None


def refuse_other_settings(checkpoint, opt, path):
    """Raise a `UserError` where a run that goes on after a checkpoint of its own was asked for other settings than it has:
    the optimizer and the schedule come from there, so that such a record would be false. Of how long it trains see
    `may_train_longer`."""
    wanted, found = plain_options(opt), made_with(checkpoint, opt)
    if (
        "auto" in (wanted.get("precision"), found.get("precision"))
        and precision_of_run(checkpoint) == opt.ran_in["precision"]
    ):
        found["precision"] = wanted["precision"]  # one of them by name
    compared = wanted.keys() - NEUTRAL - {*READ} - ({"epochs"} if may_train_longer(opt) else set())
    differ = conflict(found, wanted, sorted(compared))
    if differ:
        held, asked = differ
        raise UserError(
            f"{shown(path)} is of a run with {held}, which goes on with that and not with {asked}; give the same options, or "
            f"begin anew without --checkpoint_load"
        )


def refuse_other_inputs(checkpoint, path, inputs, command):
    """Raise a `UserError` where one of the files ``inputs`` (paths) is not among those that the checkpoint in ``path`` was
    trained with; ``command`` trains it anew."""
    known = checkpoint.get("inputs")  # one from before these were kept has none
    other = [file for file in inputs if isinstance(known, list) and sha256(file) not in known]
    if other:
        raise UserError(
            f"{shown(path)} was trained with another {shown(other[0])} than is there now. Train it anew: {command}"
        )


def load_checkpoint(path, opt, command, steps, names=IDENTITY):
    """Read a checkpoint that one of ``steps`` wrote for the same data set, model and attack.

    Args:
        path: the file; opt: the options it must fit; command: what makes the file where it is missing;
        steps: names of the scripts that may have written it; names: the options that must agree.

    Returns:
        dict with step, epoch, model, optimizer, schedule, options, poisoned_digest, history, and since they are kept inputs
        (the SHA-256 of the files it was trained with); tensors on the CPU.

    Raises:
        UserError: for a file that is missing, damaged, from elsewhere, or of other options.
    """
    return fitting(load_tensors(path, command, "checkpoint of this project"), path, opt, command, steps, names)


def fitting(checkpoint, path, opt, command, steps, names=IDENTITY):
    """``checkpoint``, what the file ``path`` holds, if it is as `load_checkpoint` says; its arguments and errors."""
    wrong = _not_a_checkpoint(checkpoint)
    if wrong:
        raise UserError(f"{path} is no checkpoint of this project ({wrong}). Make it with: {command}")
    if checkpoint["step"] not in steps:
        step = str(checkpoint["step"])[:60]
        raise UserError(f"{path} was written by {step}, this step needs a checkpoint of {' or '.join(steps)}")
    refuse_other(checkpoint["options"], opt, str(path), names)
    return checkpoint


def _not_a_checkpoint(content):
    """What a file lacks to be a checkpoint, as text, or None."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    missing = [name for name in KEYS if name not in content]
    if missing:
        held = ", ".join(str(name)[:30] for name in list(content)[:3])
        return f"it lacks {', '.join(missing[:3])}; it holds {held or 'nothing'}"
    for name, kind in KEYS.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            return f"its {name} is a {type(content[name]).__name__}"
    if content["epoch"] < 0:
        return f"its epoch is {content['epoch']}"
    rows = content["history"]
    if not all(isinstance(row, dict) and all(isinstance(v, (int, float)) for v in row.values()) for row in rows):
        return "its history is not a list of rows of numbers"
    if any("epoch" not in row for row in rows):
        return "a row of its history has no epoch"
    if not rows or rows[-1]["epoch"] != content["epoch"]:
        return "its history does not end with its epoch"
    return None


def load_optimizer(optimizer, state, path):
    """Load an optimizer's state. Raises `UserError` where it is of another network or not such a state."""
    fault = f"the optimizer's state in {path} does not fit this network"
    try:
        own = optimizer.state_dict()["param_groups"]
        for group, expected in zip(state["param_groups"], own, strict=True):
            for name, value in expected.items():
                if not _alike(group.get(name, value), value):
                    raise ValueError(f"its {name} is {group[name]!r:.40}")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, held in state["state"].items():
            for value in held.values():
                if isinstance(value, torch.Tensor) and value.shape not in (parameters[number].shape, ()):
                    raise ValueError(f"a tensor of parameter {number} has the shape {tuple(value.shape)}")
                if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
                    raise ValueError(f"a tensor of parameter {number} is not finite")
        optimizer.load_state_dict(state)
        for group, before in zip(optimizer.param_groups, own, strict=True):
            group["fused"] = before["fused"]  # it goes with the device, not with the checkpoint
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"{fault}: {error}") from None


def load_schedule(scheduler, state, path):
    """Load a schedule's state; what only other versions of torch keep in one is left out. Raises `UserError` where it is not that of
    such a schedule."""
    own = scheduler.state_dict()
    kept = {name: value for name, value in state.items() if name in own}
    for name in sorted(own.keys() & {"last_epoch", "base_lrs", "T_max", "milestones", "gamma", *kept}):
        if name not in kept or not _alike(kept[name], own[name]) or (name == "T_max" and kept[name] < 1):
            raise UserError(f"the schedule in {path} is not that of this step: its {name} does not fit")
    scheduler.load_state_dict(kept)


def refuse_rising_rate(scheduler, epochs, path=None):
    """Raise a `UserError` where SD's cosine would be at 0 before ``epochs`` more are trained: torch's rises again from there.
    ``path``: the checkpoint that the schedule came with."""
    left = scheduler.T_max - scheduler.last_epoch
    if epochs > left:
        where = f" after {shown(path)}" if path else ""
        raise UserError(
            f"the cosine of --cosine_epochs {scheduler.T_max} takes the learning rate to 0 in {max(0, left)} epochs{where}, fewer than the "
            f"{epochs} to train; give fewer --epochs, or train step 1 with a larger --cosine_epochs"
        )


def _alike(value, expected):
    """Whether a value read from a file can stand where ``expected`` stands: of its kind, and finite."""
    if isinstance(expected, bool) or expected is None:
        return value is None or isinstance(value, bool)
    if isinstance(expected, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(expected, (list, tuple)):
        kind = expected[0] if expected else 0
        return isinstance(value, (list, tuple)) and all(_alike(part, kind) for part in value)
    if isinstance(expected, dict):  # a Counter of epochs, in a schedule of steps
        return isinstance(value, dict) and all(_alike(part, 0) for item in value.items() for part in item)
    return isinstance(value, type(expected))


def anew_of(path, script, command):
    """What `manifest.anew` gives of the run of a ``script`` that wrote the checkpoint ``path``, whose record lies beside it."""
    return anew(read_record(path.with_name("options.json")) or {}, script, command)


def refuse_unfinished(record, path, option):
    """Raise a `UserError` where the run of a ``record`` (dict) whose last checkpoint is ``path`` has not come to its end; ``option``
    names such a file by hand."""
    done, epochs = record.get("epochs_done"), record.get("options", {}).get("epochs")
    if isinstance(done, int) and isinstance(epochs, int) and done < epochs:
        raise UserError(
            f"{shown(path.parent)} has {done} of {epochs} epochs; train it to its end, with the same options and --checkpoint_load "
            f"{shown(path)}, or name that file by {option}"
        )


def latest_checkpoint(folder, epochs, command, option="--checkpoint_load"):
    """The last epoch's checkpoint in ``folder``, as a step's own record tells it; ``epochs`` where there is none. ``command`` makes one,
    ``option`` names one by hand. Raises `UserError` where there is none, or its run has not come to its end."""
    record = read_record(folder / "options.json") or {}
    epochs = record.get("options", {}).get("epochs", epochs)
    if record:
        command = anew(record, f"{record.get('step')}.py", command)
    if not isinstance(epochs, int):
        raise UserError(f"{folder / 'options.json'} is not the record of a step. Make it with: {command}")
    done = record.get("epochs_done")
    done = done if isinstance(done, int) else 0
    kept = [path for path in folder.glob("*.tar") if path.stem.isdigit() and epoch_of(path) < done]
    if kept:
        refuse_unfinished(record, max(kept, key=epoch_of), option)
    path = require_file(folder / f"{epochs - 1}.tar", command)
    print(f"Using {shown(path)}")
    return path


def epoch_of(path):
    """The epoch that a checkpoint's name ends in, as of 11.tar and ckpt_epoch_11.pth, or None."""
    last = Path(path).stem.split("_")[-1]
    return int(last) if last.isdigit() else None


def latest_of_runs(folder, pattern, command, option):
    """The last epoch's checkpoint of the newest run of a step of ST.

    Args:
        folder: of the runs; pattern: of their checkpoints below it; command: makes one; option: names one by hand.

    Raises:
        UserError: where there is none, or that run has not come to its end.
    """
    found = list(folder.glob(pattern))
    if not found:
        require_file(folder / pattern, command)

    def begun(path):  # by the record: copies of the checkpoints can have any time
        record = path.with_name("options.json")
        return (record if record.is_file() else path).stat().st_mtime_ns

    path = max(found, key=lambda path: (begun(path), path.parent, epoch_of(path) or 0))
    record = read_record(path.with_name("options.json")) or {}
    refuse_unfinished(record, path, option)
    print(f"Using {shown(path)}")
    return path
