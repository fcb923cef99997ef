"""The life of a training step: its place on disk is claimed, each epoch kept, and an earlier result replaced at the end."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from utils.checkpoints import (
    IDENTITY,
    NEUTRAL,
    epoch_of,
    load_optimizer,
    load_schedule,
    may_train_longer,
    precision_of_run,
    refuse_other_data,
    refuse_other_inputs,
    refuse_other_settings,
)
from utils.datasets import DATASETS
from utils.distributed import leads
from utils.errors import UserError, at_exit
from utils.files import (
    as_logged,
    bytes_writer,
    csv_writer,
    hold_lock,
    make_folder,
    read_record,
    sha256,
    sweep,
    tensor_writer,
    write_json,
    write_together,
)
from utils.manifest import as_written, conflict, made_with, manifest, of_other_data, of_this_data, plain_options
from utils.paths import shown
from utils.weights import load_weights, not_finite


def claim(
    record, opt, continues=False, names=IDENTITY, ignored=(), log=None, option="--output_root", settle=None, data=None, **more
):  # fmt: skip
    """Make the folder of a step's ``record`` (path of a JSON file) this run's own: create it, lock the record, and refuse
    to replace the work of other settings unless ``--overwrite`` is given.

    Args:
        record: where the step keeps its options; opt: the options; continues: whether the run goes on from a checkpoint
        of the same step, so that only ``names`` must agree; ignored: options that change no result of this step;
        log: the step's CSV where it keeps one; option: the one that chooses the folder; settle: called with both settings (dicts), to
        make equal what means the same; data: what `Dataset.record` gives, by which a data set that was moved is known again; more:
        settings that the record keeps beside the options.

    Raises:
        UserError: for a folder that cannot be written, is being written by another run, or holds other work.
    """
    if not leads():
        return
    make_folder(record.parent, option)
    hold_lock(record, option)
    if log:
        make_folder(log.parent, "--log")
        hold_lock(log, "--log")
    sweep(record.parent)
    if _complete(unfinished_folder(record) / record.name):
        print(f"Finishing what an interrupted run had left to do in {shown(record.parent)}")
        _replace(record, log)
    earlier = read_record(record)
    if not earlier or opt.overwrite:
        return
    wanted = plain_options(opt)
    of_another_set = data and of_other_data(earlier, data)
    if DATASETS[opt.dataset].own:  # where it has to be known that it is the same
        of_another_set = not (data and of_this_data(earlier, data))
    if of_another_set:
        names = [*names, "data_root"]  # which then says whose data it is
    found = made_with(earlier, opt) | {name: earlier[name] for name in more if name in earlier}
    if settle:
        settle(found, wanted)
    others = sorted(wanted.keys() - NEUTRAL - set(ignored) - set(names))
    compared = names if continues else [*names, *others, *more]
    wanted |= more
    differ = conflict(found, wanted, compared)
    if differ:
        held, asked = differ
        longer = "epochs_done" in earlier and not continues and not conflict(found, wanted, {*compared} - {"epochs"})
        go_on = "--checkpoint_load CHECKPOINT to go on with it, " if longer else ""
        raise UserError(
            f"{shown(record.parent)} holds the result of {held}, which {asked} would replace; give --overwrite to replace "
            f"it, {go_on}or another {option}"
        )


def unfinished_folder(record):
    """Folder in which a run keeps its files while an earlier result is still in their place."""
    return record.with_name("unfinished" if record.name == "options.json" else f"{record.stem}_unfinished")


def _complete(record):
    content = read_record(record)
    return bool(content) and content.get("epochs_done") == content.get("options", {}).get("epochs")


def _replace(record, log):
    """Put the files of a complete run in the place of the earlier result; done again, it ends the same. Nothing outside
    the record's folder is touched but the log, whatever the records say."""
    staging, earlier = unfinished_folder(record), read_record(record) or {}
    outputs = read_record(staging / record.name)["outputs"]
    for file in sorted(staging.iterdir()):
        if file.name != record.name and not file.name.startswith("."):
            _move(file, log if log and file.name == log.name else record.parent / file.name)
    names = [name for name in earlier.get("outputs", {}) if name not in outputs and Path(name).name == name]
    # Of what the earlier result has and this one has not, only what is as that wrote it: another run may have put its own there.
    stale = [name for name in names if as_written(earlier, record.parent / name)]
    for name in stale:
        (record.parent / name).unlink()
    _move(staging / record.name, record)  # last: until then all this would be done again
    shutil.rmtree(staging)
    more = f", and {', '.join(stale[:4])}{' and more' * (len(stale) > 4)} of it removed" if stale else ""
    print(f"The earlier result in {shown(record.parent)} is replaced{more}")


def _move(source, target):
    try:
        os.replace(source, target)
    except OSError:  # another file system
        write_together({target: bytes_writer(source.read_bytes())})
        source.unlink()


class Run:
    """The record of one training step: a checkpoint and a CSV row an epoch, the options as JSON.

    Where an earlier result stands in the place of its files, they are kept in a folder of their own until the run is
    complete, and replace it then.

    Args:
        opt: the options; step: the script's name without ``.py``; record: path of the claimed JSON, see `claim`;
        digest: `PoisonedSet.digest`, or None; inputs: paths of the files that the step builds on; data: what
        `Dataset.record` gives; log: path of the CSV, by default log.csv beside the record; beside: files besides the checkpoint that
        may be there, such as that of the best epoch so far; names, option, more: see `claim`.
    """

    def __init__(
        self, opt, step, record, digest, *, inputs=(), data=None, log=None, beside=(), names=IDENTITY, option="--output_root", **more
    ):  # fmt: skip
        self.opt, self.step, self.digest, self.data, self.more = opt, step, digest, data, more
        self.inputs = {path: sha256(path) for path in inputs}
        self.record, self.log, self.names = record, log or record.with_name("log.csv"), names
        self.history, self.outputs, self.beside = [], {}, list(beside)
        self.option, self.staging = option, None
        self._writer = self._writing = None
        self.started, self.finished = time.perf_counter(), 0

    def start(self, first=0, path=None):
        """Make the place this run's own, see `claim`, and decide where the files go; return ``first``, the epoch to begin
        with. ``path``: the checkpoint that holds the epochs before it. Nothing is written before this."""
        if not leads():
            return first
        more = {"log": self.log, "option": self.option, "data": self.data, **self.more}
        claim(self.record, self.opt, path is not None, self.names, **more)
        if path and not path.exists():  # what an interrupted run had left to do was to put it in its place
            path = self.record.parent / path.name
        staging, earlier = unfinished_folder(self.record), read_record(self.record) or {}
        if path and path.resolve().parent == staging.resolve():
            self.staging, earlier = staging, read_record(staging / self.record.name) or {}
        elif earlier.get("epochs_done", 0) > first:
            dropped = " (what an interrupted run left there is dropped)" if staging.exists() else ""
            shutil.rmtree(staging, ignore_errors=True)
            self.staging = make_folder(staging)
            place = shown(self.record.parent)
            print(f"{place} holds an earlier result, which stays until this run is complete; its files are in {shown(staging)} "
                  f"till then{dropped}")  # fmt: skip
        if first:  # the files of the epochs before are this run's own, and what it built on then counts
            self.more |= {name: earlier[name] for name in self.more if name in earlier}
            self.inputs |= {self.record.parent / name: digest for name, digest in earlier.get("inputs", {}).items()}
            if path.resolve().parent not in (staging.resolve(), self.record.parent.resolve()):
                self.inputs[path] = sha256(path)
            self.outputs = {
                self.record.parent / name: digest
                for name, digest in earlier.get("outputs", {}).items()
                if epoch_of(name) is None or epoch_of(name) < first
            }
            own = path.resolve().parent == self.at(self.record).parent.resolve()
            if own and earlier.get("epochs_done", 0) < first:
                self._catch_up(path, first)
        return first

    def _catch_up(self, path, first):
        """The run was stopped between the checkpoint ``path`` and its record: count what the epochs before ``first`` left,
        and write the record, so that they are neither taken for another run's files nor for undone."""
        # ST's extractor may have kept a second one, BR step 2 that of the epoch it chooses.
        kept = [*path.parent.glob(f"ckpt_epoch_{first - 1}.pth"), *filter(Path.exists, self.beside)]
        left = self.staging.iterdir() if self.staging else kept
        for file in {path, *left}:
            if file.name not in (self.record.name, self.log.name) and not file.name.startswith("."):
                self.outputs[self.record.parent / file.name] = sha256(file)
        self._keep(first)

    def at(self, path):
        """Where the file that belongs to ``path`` is written now."""
        return self.staging / path.name if self.staging else path

    def resume(self, checkpoint, path, model, optimizer, scheduler=None):
        """Load weights, optimizer and schedule of a checkpoint; return the epoch to go on with.

        That is the next epoch for a checkpoint of this same step, and 0 for one of the step before.
        """
        refuse_other_data(checkpoint, self.digest, path, self.opt)
        load_weights(model, checkpoint["model"], path)
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        if scheduler is not None:
            load_schedule(scheduler, checkpoint["schedule"], path)
        if checkpoint["step"] != self.step:
            self.inputs[path] = sha256(path)
            return self.start()
        return self.take_history(checkpoint, path)

    def take_history(self, checkpoint, path):
        """Go on with the rows that ``checkpoint`` has; return the next epoch. Raises `UserError` where it was made with other
        settings or other files than this run."""
        refuse_other_settings(checkpoint, self.opt, path)
        refuse_other_inputs(checkpoint, path, self.inputs, "leave out --checkpoint_load")
        self._refuse_nothing_to_do(checkpoint["epoch"] + 1, path)
        self.history = list(checkpoint["history"])
        print(f"Continuing after epoch {checkpoint['epoch']}")
        before, now = precision_of_run(checkpoint), self.opt.ran_in["precision"]
        if before not in (None, now):
            print(
                f"Note: the epochs before were trained in {before}, these are in {now}; --precision {before} goes on as it was"
            )
        if checkpoint["epoch"] + 1 >= self.opt.epochs:
            more = "; a larger --epochs continues" if may_train_longer(self.opt) else ""
            print(f"All {self.opt.epochs} epochs are done{more}")
        return self.start(checkpoint["epoch"] + 1, path)

    def _refuse_nothing_to_do(self, done, path):
        """Raise a `UserError` where all epochs are ``done`` in a checkpoint (``path``) that lies elsewhere, so that nothing would be
        written here."""
        place = self.record.parent
        here = path.resolve().parent in (place.resolve(), unfinished_folder(self.record).resolve())
        other = (
            self.record.name != "options.json" and path.stem != self.record.stem
        )  # a record of its own for each model
        held = (read_record(self.record) or {}).get("epochs_done", 0)
        if leads() and done >= self.opt.epochs and (other or (not here and held < done)):
            raise UserError(
                f"all {self.opt.epochs} epochs are done in {shown(path)}, so there is nothing to write to {shown(place)}; copy what lies "
                f"there, or give a larger --epochs"
            )

    def add(self, path):
        """Count the file that belongs to ``path``, written `at` its place, among the outputs."""
        if leads():
            self.outputs[path] = sha256(self.at(path))

    def finish_epoch(self, epoch, row, paths, model, optimizer, scheduler=None, results=None):
        """Write the ``results`` of the epoch (dict path -> function that writes the open file), the checkpoint to each of ``paths``, then
        the CSV and the options, and print the row (dict of floats). On a GPU the files are written while the next epoch trains; the
        next call waits for them. Without ``paths`` the row waits for the next checkpoint: an interrupted run goes on after the last one.

        Raises:
            UserError: where the weights are not finite, nothing is written then; where writing, or that of the epoch before, failed.
        """
        self._settle()
        bad = not_finite(model.state_dict())
        if bad:
            raise UserError(
                f"after epoch {epoch + 1} the weights are not finite ({', '.join(bad[:3])}); nothing of this epoch is "
                f"kept, the earlier checkpoints are. Use a smaller learning rate"
            )
        row = {"epoch": epoch, **{name: as_logged(value) for name, value in row.items()}}
        self.history.append(row)
        if not leads():
            return
        if paths:
            self._save(epoch, paths, model, optimizer, scheduler, results or {})
        self.finished += 1
        left = (time.perf_counter() - self.started) / self.finished * (self.opt.epochs - epoch - 1)
        numbers = "  ".join(f"{name} {value:g}" for name, value in row.items() if name != "epoch")
        print(f"epoch {epoch + 1}/{self.opt.epochs}  {numbers}  about {left / 60:.1f} min left", flush=True)

    def _save(self, epoch, paths, model, optimizer, scheduler, results):
        content = {
            "step": self.step,
            "epoch": epoch,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": scheduler.state_dict() if scheduler is not None else {},
            "options": plain_options(self.opt),
            "ran_in": self.opt.ran_in,
            "poisoned_digest": self.digest,
            "inputs": list(self.inputs.values()),
            "history": self.history,
        }
        if all(value.device.type == "cpu" for value in content["model"].values()):
            self._write(epoch, paths, content, results)  # now, for the next epoch changes these very tensors
        else:
            content["model"].update((name, value.cpu()) for name, value in content["model"].items())
            content["optimizer"] = tree_map_only(torch.Tensor, torch.Tensor.cpu, content["optimizer"])
            if not self._writer:
                self._writer = ThreadPoolExecutor(1)
                at_exit.callback(self._writer.shutdown)  # before the lock is given back
            self._writing = self._writer.submit(self._write, epoch, paths, content, results)

    def _write(self, epoch, paths, content, results):
        """The files of an epoch; ``content``: of the checkpoint."""
        for path, writer in (results | dict.fromkeys(paths, tensor_writer(content))).items():
            (self.outputs[path],) = write_together({self.at(path): writer}).values()
        self._keep(epoch + 1)

    def _keep(self, done):
        """The log and the record of the first ``done`` epochs."""
        (self.outputs[self.log],) = write_together({self.at(self.log): csv_writer(self.history)}).values()
        kept = {"step": self.step, "poisoned_digest": self.digest, "epochs_done": done, "data": self.data}
        record = manifest(self.record, self.opt, self.inputs, self.outputs, **kept, **self.more)
        write_json(self.at(self.record), record)

    def _settle(self):
        """Wait until the files of the epoch before are written; raise what went wrong with them."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def complete(self):
        """All epochs are done: replace the earlier result where there is one."""
        self._settle()
        if leads() and self.staging and _complete(self.staging / self.record.name):
            _replace(self.record, self.log)
