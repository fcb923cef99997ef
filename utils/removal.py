"""What unlearn_relearn.py reads and writes: the model it cleans, where the results go, and what it says of them at the end."""

import os
import re
from types import SimpleNamespace

from models import MODELS
from models.foreign import PRECISIONS, is_state_dict, precision_of
from utils import args
from utils.checkpoints import fitting, latest_checkpoint
from utils.distributed import leads
from utils.errors import UserError, nearest_existing
from utils.files import bytes_writer, load_tensors, read_record, write_together
from utils.metrics import say_selection
from utils.paths import backdoored_folder, python, relative, shown
from utils.validation import best_epoch

STEP = "unlearn_relearn"
CLEANED = "_unlearn_purify"  # ends the name of what this step writes
BEFORE = ("train_attack_withTrans", "train_attack_withTrans_imagenet")


def load_start(opt):
    """What is cleaned, or gone on with. Puts into ``opt.foreign`` in which precision a network from elsewhere is kept, or None.

    Returns:
        (path; checkpoint, a dict as of `checkpoints.load_checkpoint`, of a plain state dict with step, model and poisoned_digest
        alone; whether the network is from elsewhere: that state dict, or a checkpoint of this step that began with one).

    Raises:
        UserError: where it is missing, damaged or of other options, or an option does not go with it.
    """
    step_before, epochs = (BEFORE[1], 25) if opt.dataset == "imagenet" else (BEFORE[0], 200)
    command = f"{python(f'{step_before}.py')} {args.attack_arguments(opt)} --epochs {epochs}"
    path = opt.checkpoint_load or latest_checkpoint(backdoored_folder(opt, "withTrans"), epochs, command)
    if opt.model not in MODELS:
        if not os.path.exists(path):
            raise UserError(
                f"no such file: {path}; --checkpoint_load names the state dict that is to be cleaned. Nearest existing path: "
                f"{nearest_existing(path)}"
            )
        command = "torch.save(model.state_dict(), FILE), where the network is at hand"
    if opt.checkpoint_load and CLEANED in path.stem:  # of this step itself
        command = f"{python(f'{STEP}.py')} {args.secure_arguments(opt)}"
    content = within(load_tensors(path, command, "checkpoint of this project or plain state dict"), path)
    if is_state_dict(content):
        opt.foreign = precision_of(content)
        if opt.foreign not in PRECISIONS:
            raise UserError(
                f"the weights in {shown(path)} are {opt.foreign}; convert them to one of {', '.join(PRECISIONS)} first"
            )
        return path, {"step": "", "model": content, "poisoned_digest": None}, True
    checkpoint = fitting(content, path, opt, command, [*BEFORE, STEP])
    opt.foreign = checkpoint["options"].get("foreign")
    if opt.foreign in PRECISIONS:
        return path, checkpoint, True
    if opt.mean or opt.std:
        raise UserError(
            "--mean and --std are for a plain state dict; this project's networks have those of the data set"
        )
    if opt.model not in MODELS:
        raise UserError(f"--model {opt.model} is for a plain state dict, and {path} is a checkpoint of this project")
    return path, checkpoint, False


def within(content, path):
    """The plain state dict in what a training script of elsewhere saved, without what torch puts before its names where a network
    was trained on several GPUs or compiled; everything else as it is. ``content``: what the file ``path`` holds."""
    of_this_project = isinstance(content, dict) and isinstance(content.get("step"), str)
    if isinstance(content, dict) and not of_this_project and not is_state_dict(content):
        found = [name for name, value in content.items() if is_state_dict(value)]
        if len(found) > 1:
            raise UserError(
                f"{shown(path)} holds {len(found)} state dicts, {', '.join(map(repr, found))}; save the one that is meant by itself"
            )
        if found:
            print(f"{shown(path)} holds a state dict as {found[0]!r}, which is taken")
            content = content[found[0]]
    wrapper = r"(module\.|_orig_mod\.)+"
    if is_state_dict(content) and all(re.match(wrapper, name) for name in content):
        first = re.match(wrapper, next(iter(content)))[0]
        print(
            f"The names in {shown(path)} begin with {first!r}, as DataParallel and torch.compile write them; they are taken without"
        )
        content = {re.sub(f"^{wrapper}", "", name): value for name, value in content.items()}
    return content


def places_of(opt, path, resumed, plain):
    """Where the results go. path: what is loaded; resumed: a checkpoint of this step; plain: of a plain state dict.

    Returns:
        A namespace of paths: save (the checkpoint), log, record, results (of a plain state dict that of the last epoch, else empty),
        choices (what of the epoch that held-out samples choose is written: its checkpoint and, of a plain state dict, its state dict),
        and written (all that is written but the record).

    Raises:
        UserError: where two of them have the same name, under which a run keeps them until it is complete, one is what is loaded, or
        one is a folder.
    """
    own = path.parent.parent / path.name if path.parent.name.endswith("_unfinished") else path
    save = opt.checkpoint_save or (own if resumed else path.with_name(f"{path.stem}{CLEANED}.tar"))
    result = save.with_suffix(".pth") if save.suffix == ".tar" else save
    save = save.with_suffix(".tar") if plain else save
    record = save.with_suffix(".json")
    log = opt.log or (save == own and log_beside(path, save.parent)) or save.with_name("unlearn_purify.csv")
    chosen = save.with_name(f"{save.stem}_val.tar")
    choices = [chosen, *([chosen.with_suffix(".pth")] if plain else [])] if opt.val_ratio else []
    results = [result] if plain else []
    written = [save, log, *results, *choices]
    files = [record, *written]
    onto_itself = not resumed and path.absolute() in {file.absolute() for file in files}
    if onto_itself or len({file.name for file in files}) < len(files):
        raise UserError(
            f"the model {save}, its record {record.name} and the log {log} must have different names, and not be what is loaded"
        )
    for file in files:
        try:
            odd = file.exists() and not file.is_file()
        except OSError as error:  # of what is loaded and what is written the names differ in length
            raise UserError(
                f"{file.name[:100]!r} is no file name here ({error.strerror}); name another by --checkpoint_save or --log"
            ) from None
        if odd:
            raise UserError(f"{file} is a folder or a device; name a file, by --checkpoint_save or --log")
    return SimpleNamespace(save=save, log=log, record=record, choices=choices, results=results, written=written)


def log_beside(path, folder):
    """The CSV of the run that wrote the checkpoint ``path``, as its record says from ``folder``, or None."""
    outputs = (read_record(path.with_suffix(".json")) or {}).get("outputs", {})
    return next((folder / name for name in outputs if name.endswith(".csv")), None)


def refuse_to_replace(places, loaded):
    """Raise a `UserError` where a file of ``places`` is there already and is not this step's: another run's record beside it tells of
    it, or none does and it is no log, or no checkpoint, of this step. ``loaded``: path of what is gone on with."""
    own = (read_record(places.record) or {}).get("outputs", {})

    def tells_of(other, file):
        try:
            return file.name in (read_record(other) or {}).get("outputs", {})
        except UserError:  # some other file
            return False

    for file in places.written:
        if not file.is_file() or file.absolute() == loaded.absolute():
            continue
        option = "--log" if file == places.log else "--checkpoint_save"
        others = [other for other in sorted(file.parent.glob("*.json")) if other.absolute() != places.record.absolute()]
        owner = next((other for other in others if tells_of(other, file)), None)
        if owner:
            raise UserError(
                f"{shown(file)} is of the run that {shown(owner)} tells of; name another with {option}, or give --overwrite"
            )
        if relative(file, places.record.parent) not in own and not _is_ours(file, places):
            raise UserError(
                f"{shown(file)} is there already and is not of this step; name another with {option}, or give --overwrite"
            )


def _is_ours(file, places):
    """Whether a file that no record tells of looks like what a run of this step left which was killed in its first epoch."""
    if file == places.log:
        with open(file, "rb") as held:
            return held.read(6) == b"epoch,"
    if file in (*places.results, *places.choices[1:]):
        return places.save.is_file()
    try:
        content = load_tensors(file, "", "checkpoint of this project")
    except UserError:
        return False
    return isinstance(content, dict) and content.get("step") == STEP


def choice_beside(path, file):
    """Where the run of the checkpoint ``path`` kept what ``file`` is of this run: of the epoch that held-out samples choose."""
    return path.with_name(f"{path.stem}_val{file.suffix}")


def refuse_lost_choice(places, name, history, path):
    """Refuse to go on after the checkpoint ``path`` where the best epoch so far, in which the column ``name`` of the log is highest,
    was not kept beside it; history: the rows so far."""
    lost = [kept for kept in (choice_beside(path, file) for file in places.choices) if not kept.is_file()]
    if lost and any(name in row for row in history if row["epoch"] >= 0):
        raise UserError(
            f"{shown(lost[0])}, the model of epoch {best_epoch(history, name) + 1}, is not there, so the epochs before cannot be chosen "
            f"from; begin anew from the backdoored model with --overwrite"
        )


def take_choice(run, places, path):
    """The ``run``, which goes on after the checkpoint ``path``, takes over the best epoch so far where its own files lie elsewhere."""
    for file in places.choices:
        kept, own = choice_beside(path, file), run.at(file)
        if leads() and kept.is_file() and kept.resolve() != own.resolve():
            write_together({own: bytes_writer(kept.read_bytes())})
            run.add(file)


def summarise(history):
    """Print the last epoch and the paper's selection, or what there is without a trigger. history: the rows of the log."""
    measured = [row for row in history if row["epoch"] >= 0 and "ACC" in row]
    if not say_selection(history, "D-BR") and measured:
        print(f"ACC {history[0].get('ACC', float('nan')):.2f} before, {measured[-1]['ACC']:.2f} after")
