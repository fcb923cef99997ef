"""BR step 2: remove the backdoor by unlearning D_p and relearning D_c (paper section 4.3).

Each epoch is one pass of gradient ascent on the cross-entropy over D_p, then one of descent over D_c. Writes the model
(--checkpoint_save) and, a row an epoch, the log (--log), whose first row, epoch -1, is the model before.

--checkpoint_load may also be a plain state dict of any classifier of torchvision, which --model names. The cleaned one is
then such a file too; a checkpoint to continue from is beside it.
"""

import math
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch

from models import MODELS, build_model
from models.foreign import NAMES, PRECISIONS, build_foreign, is_state_dict, plain_state, precision_of
from utils import args
from utils.checkpoints import Run, fitting, latest_checkpoint, load_optimizer
from utils.dataloader_bd import Batches, make_test_sets
from utils.distributed import leads
from utils.engine import prepare, train_epoch
from utils.errors import UserError, run_script
from utils.files import load_tensors, read_record, tensor_writer, write_together
from utils.losses import ASCENT_BOUND, cross_entropy, doubtful, negative_cross_entropy
from utils.metrics import cross_entropies, evaluate
from utils.paths import backdoored_folder, shown
from utils.samples import images_of, load_samples, refuse_samples_of_other_data, sample_files
from utils.seeding import generator
from utils.separation import CLEAN, POISON
from utils.transforms import CropFlip
from utils.validation import HeldOut, best_epoch, is_best
from utils.weights import load_weights

STEP = "unlearn_relearn"
HELD = 0.1  # share of D_p from which on the bound is what stops the ascent
BEFORE = ("train_attack_withTrans", "train_attack_withTrans_imagenet")


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser, (*MODELS, *(name for name in NAMES if name not in MODELS)))
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_ratio_options(parser)
    args.add_training_options(parser, epochs=20, batch_size=128, lr=1e-4)
    parser.add_argument(
        "--checkpoint_load",
        type=args.path,
        help="the backdoored model, a model of this step to continue, or a plain state dict; default: BR step 1's last",
    )
    parser.add_argument(
        "--checkpoint_save",
        type=args.path,
        help="the cleaned model; default: <checkpoint_load>_unlearn_purify.tar, of a plain state dict .pth",
    )
    args.add_samples_option(parser)
    args.add_validation_option(parser, "D_c and of D_p")
    parser.add_argument(
        "--passes", choices=("unlearn", "relearn"), nargs="+", default=["unlearn", "relearn"],
        help="which of the two passes an epoch has; fewer than both are for comparison",
    )  # fmt: skip
    parser.add_argument(
        "--unlearn_batch_size", type=args.positive_int,
        help="samples of D_p a step; default: --batch_size, as in the paper. The few steps of a small D_p are undone by those of D_c",
    )  # fmt: skip
    parser.add_argument(
        "--ascent_bound", type=args.positive, default=ASCENT_BOUND, metavar="NATS",
        help="a sample of D_p whose cross-entropy is above this pushes no further; the default stops none in the paper's setting",
    )  # fmt: skip
    parser.add_argument(
        "--bound_growth", type=args.number(float, 1), default=1.0, metavar="FACTOR",
        help="the ascent_bound grows so after an epoch in which it held a tenth of D_p back and D_p stayed known; 1: it stays",
    )  # fmt: skip
    parser.add_argument(
        "--drop_doubtful", action="store_true",
        help="not in the paper: an epoch's descent leaves out the samples of D_c that its ascent took along with D_p",
    )  # fmt: skip
    parser.add_argument(
        "--choose", choices=("last", "forgotten"), default="last",
        help="which epoch's model is the result; forgotten: of that after which the network knows D_p least, "
        "<checkpoint_save>_forgotten.tar. Neither test set nor ground truth is asked. Not in the paper",
    )  # fmt: skip
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=args.positive, nargs=3, metavar=("R", "G", "B"),
            help="plain state dict: what its images are normalised with, in 0-1; default: the data set's",
        )  # fmt: skip
    parser.add_argument(
        "--log", type=args.path, help="CSV of the epochs; default: unlearn_purify.csv beside checkpoint_save"
    )
    return parser


def known(model, batches, runtime):
    """How well the network knows each sample of D_p or D_c, see `metrics.cross_entropies`."""
    return cross_entropies(model, batches.images, batches.labels, batches.normalize, runtime)


def without_doubtful(model, to_relearn, to_unlearn, classes, runtime):
    """(the batches of D_c without the samples that `losses.doubtful` finds, how many these are); the network is left in training mode."""
    model.eval()
    both = to_relearn, to_unlearn
    values = [known(model, batches, runtime) for batches in both]
    drop = doubtful(*values, *(batches.labels for batches in both), classes)
    model.train()
    return to_relearn.only(torch.where(~drop)[0]), int(drop.sum())


def bound_of(opt, history, classes):
    """The ascent's bound in the epoch after ``history`` (the rows of the log), in nats.

    One bound does not suit every trigger: where the descent on D_c brings the backdoor back, the ascent has to go further. It grows
    after an epoch in which it held `HELD` of D_p and which left D_p's cross-entropy below ln(``classes``), where a guess would do worse.
    Not in the paper.
    """
    bound, end = opt.ascent_bound, max(opt.ascent_bound, ASCENT_BOUND)
    for row in history:
        if row["epoch"] >= 0 and row.get("at_bound", 0) >= HELD and row["loss_Dp_after"] < math.log(classes):
            bound = min(bound * opt.bound_growth, end)
    return bound


def places_of(opt, path, resumed, plain):
    """Where the results go. path: what is loaded; resumed: a checkpoint of this step; plain: of a plain state dict.

    Returns:
        A namespace of paths: save (the checkpoint), log, record, of_validation (the checkpoint that held-out samples choose),
        forgotten (that of --choose forgotten) and result (the state dict, for a plain one).

    Raises:
        UserError: where two of them are the same file, or one is a folder.
    """
    own = path.parent.parent / path.name if path.parent.name.endswith("_unfinished") else path
    save = opt.checkpoint_save or (own if resumed else path.with_name(f"{path.stem}_unlearn_purify.tar"))
    result = save.with_suffix(".pth") if save.suffix == ".tar" else save
    save = save.with_suffix(".tar") if plain else save
    log, record = opt.log or save.with_name("unlearn_purify.csv"), save.with_suffix(".json")
    of_validation, forgotten = (save.with_name(f"{save.stem}_{name}.tar") for name in ("val", "forgotten"))
    files = [
        save,
        log,
        record,
        *([result] * plain),
        *([of_validation] * bool(opt.val_ratio)),
        *([forgotten] * (opt.choose == "forgotten")),
        *([path] * (not resumed)),
    ]
    if len({file.absolute() for file in files}) < len(files):
        raise UserError(
            f"the model {save}, its record {record.name}, the log {log} and what is loaded must be different files"
        )
    for file in (save, log, record, result):
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is a folder or a device; name a file, by --checkpoint_save or --log")
    return SimpleNamespace(
        save=save, log=log, record=record, of_validation=of_validation, forgotten=forgotten, result=result
    )


def refuse_log_of_another(log, record, overwrite):
    """Refuse to replace the ``log`` where another run's record beside it than this one's tells of it, unless --overwrite is given."""

    def tells_of_it(other):
        try:
            return log.name in (read_record(other) or {}).get("outputs", {})
        except UserError:  # some other file
            return False

    others = [path for path in sorted(log.parent.glob("*.json")) if path.absolute() != record.absolute()]
    owner = next(filter(tells_of_it, others), None)
    if owner and log.is_file() and not overwrite:
        raise UserError(
            f"{shown(log)} is the log of the run that {shown(owner)} tells of; name another with --log, or give --overwrite"
        )


def refuse_lost_choice(choices, history, path):
    """Refuse to go on after the checkpoint ``path`` where the best epoch so far was not kept beside it. choices: {column of the
    log: file of the epoch in which it is highest}; history: the rows so far."""
    for name, file in choices.items():
        if any(name in row for row in history if row["epoch"] >= 0) and not path.with_name(file.name).exists():
            raise UserError(
                f"{path.with_name(file.name)}, the model of epoch {best_epoch(history, name) + 1}, is not there, so the epochs "
                f"before cannot be chosen from; begin anew from the backdoored model with --overwrite"
            )


def summarise(history, choose):
    """Print the last epoch, the paper's selection and what --choose names, or what there is without a trigger. history: the
    rows of the log."""
    measured = [row for row in history if row["epoch"] >= 0 and "ACC" in row]
    if "ASR" in history[-1]:
        best = max(measured, key=lambda row: row["ACC_paper"] - row["ASR"])
        shown_rows = [("Last epoch", history[-1]), ("The paper's selection, by ACC - ASR on the test set", best)]
        if choose == "forgotten":
            forgotten = max(measured, key=lambda row: row["loss_Dp_after"])
            shown_rows.append(("The result, where D_p is known least", forgotten))
        for name, row in shown_rows:
            figures = ", ".join(f"{key} {row[key]:.2f}" for key in ("ACC", "ACC_paper", "ASR", "R_ACC"))
            print(f"{name} ({row['epoch'] + 1}): {figures}")
    elif measured:
        print(f"ACC {history[0].get('ACC', float('nan')):.2f} before, {measured[-1]['ACC']:.2f} after")


def load_start(opt):
    """What is cleaned, or gone on with. Puts into ``opt.foreign`` in which precision a network from elsewhere is kept, or None.

    Returns:
        (path; checkpoint, a dict as of `checkpoints.load_checkpoint`, of a plain state dict with step, model and poisoned_digest
        alone; whether the network is from elsewhere: that state dict, or a checkpoint of this step that began with one).

    Raises:
        UserError: where it is missing, damaged or of other options, or an option does not go with it.
    """
    step_before, epochs = (BEFORE[1], 25) if opt.dataset == "imagenet" else (BEFORE[0], 200)
    command = f"python {step_before}.py {args.attack_arguments(opt)} --epochs {epochs}"
    path = opt.checkpoint_load or latest_checkpoint(backdoored_folder(opt, "withTrans"), epochs, command)
    content = load_tensors(path, command, "checkpoint of this project or plain state dict")
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


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    if opt.drop_doubtful and set(opt.passes) != {"unlearn", "relearn"}:
        raise UserError(
            "--drop_doubtful says what the descent leaves out after an ascent; give both --passes, or leave it out"
        )
    if opt.bound_growth > 1 and opt.ascent_bound >= ASCENT_BOUND:
        raise UserError(f"--bound_growth has no use without an --ascent_bound below {ASCENT_BOUND:g}, where it ends")
    path, checkpoint, plain = load_start(opt)
    resumed = checkpoint["step"] == STEP
    places = places_of(opt, path, resumed, plain)
    refuse_log_of_another(places.log, places.record, opt.overwrite)
    choices = {"val_score": places.of_validation} if opt.val_ratio else {}  # what is highest in the epoch that is kept
    if opt.choose == "forgotten":
        choices["loss_Dp_after"] = places.forgotten

    dataset = args.load_data(opt)
    spec = replace(dataset.spec, mean=tuple(opt.mean or dataset.spec.mean), std=tuple(opt.std or dataset.spec.std))
    tests = make_test_sets(dataset, opt, runtime)
    unlearn_batch_size = opt.unlearn_batch_size or opt.batch_size
    augmentation = CropFlip(spec.size, flip=spec.flip_relearn)  # 4 pixels of crop on every data set

    refuse_samples_of_other_data(opt, checkpoint["poisoned_digest"], path)

    def batches_of(flag):
        samples = load_samples(opt, spec, [flag])
        size = unlearn_batch_size if flag == POISON else opt.batch_size
        settings = (spec, runtime, size, opt.seed, f"{STEP} {flag}")
        images = images_of(samples, dataset, opt)
        held_out = HeldOut(samples["label"], opt.val_ratio, opt.seed, settings[-1])
        kept = held_out.rest(images), held_out.rest(samples["label"])
        return Batches(*kept, *settings, augmentation=augmentation), held_out, images

    (to_unlearn, *held_out_of_Dp), (to_relearn, *held_out_of_Dc) = batches_of(POISON), batches_of(CLEAN)
    if unlearn_batch_size > len(to_unlearn.labels):
        raise UserError(
            f"a batch of {unlearn_batch_size} is larger than D_p, {len(to_unlearn.labels)} samples; give --unlearn_batch_size "
            f"{len(to_unlearn.labels)}, or less for more steps an epoch"
        )

    if plain:
        state = {name.removeprefix("network."): value for name, value in checkpoint["model"].items()}
        model = build_foreign(opt.model, state, path, opt.dataset, spec)
    else:
        model = build_model(opt.model, opt.dataset, spec.num_classes, spec.size)
        load_weights(model, checkpoint["model"], path)
    model = prepare(runtime.place(model), opt, runtime, to_relearn)
    optimizer = runtime.sgd(model.parameters(), lr=opt.lr, weight_decay=5e-4)
    inputs = [*([] if resumed else [path]), *sample_files(opt, [POISON, CLEAN])]
    source = os.path.relpath(path, places.save.parent)
    run = Run(
        opt,
        STEP,
        places.record,
        checkpoint["poisoned_digest"],
        inputs,
        dataset.record,
        places.log,
        checkpoint_load=source,
    )
    dataset = None  # its training images: those of the separated samples are all that is needed
    model.eval()
    if resumed:
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        refuse_lost_choice(choices, checkpoint["history"], path)
        first = run.take_history(checkpoint, path)
    else:
        first = run.start()
        measures = {
            "loss_Dp_after": known(model, to_unlearn, runtime).mean().item(),
            **evaluate(model, tests, to_relearn.normalize, runtime),
        }
        run.history.append({"epoch": -1, **measures})
        print("before  " + "  ".join(f"{name} {value:g}" for name, value in measures.items()))
    del checkpoint  # the model has its weights

    for epoch in range(first, opt.epochs):
        # Networks from elsewhere may have dropout.
        torch.manual_seed(int(generator(opt.seed, STEP, epoch).integers(2**63)))
        model.train()
        row = {"seconds": 0}
        if "unlearn" in opt.passes:
            bound = bound_of(opt, run.history, spec.num_classes)
            ascent = partial(negative_cross_entropy, bound=bound)
            up = train_epoch(model, to_unlearn, epoch, ascent, optimizer, runtime, f"unlearn epoch {epoch + 1}")
            row["loss_Dp"] = -up["loss"]  # during the ascent
            row["at_bound"] = up["at_bound"]  # share of D_p that the guard of the ascent held
            row |= {"bound": bound} if opt.bound_growth > 1 else {}
            row["seconds"] += up["seconds"]
        if "relearn" in opt.passes:
            taken = to_relearn
            if opt.drop_doubtful:
                taken, row["dropped"] = without_doubtful(model, to_relearn, to_unlearn, spec.num_classes, runtime)
            down = train_epoch(model, taken, epoch, cross_entropy, optimizer, runtime, f"relearn epoch {epoch + 1}")
            row["loss_Dc"] = down["loss"]  # during the descent
            row["seconds"] += down["seconds"]
        model.eval()
        if opt.val_ratio:
            for name, (held_out, images) in (("val_acc_Dc", held_out_of_Dc), ("val_acc_Dp", held_out_of_Dp)):
                row[name] = held_out.accuracy(model, images, to_relearn.normalize, runtime)
            row["val_score"] = row["val_acc_Dc"] - row["val_acc_Dp"]
        # What of the ascent outlives the descent.
        row["loss_Dp_after"] = known(model, to_unlearn, runtime).mean().item()
        chosen = [file for name, file in choices.items() if is_best(row, name, run.history)]
        if args.due(opt, epoch) or places.forgotten in chosen:
            row.update(evaluate(model, tests, to_relearn.normalize, runtime))
        run.finish_epoch(epoch, row, [places.save, *chosen], model, optimizer)

    run.complete()
    summarise(run.history, opt.choose)
    if opt.val_ratio:
        epoch = best_epoch(run.history, "val_score")
        print(
            f"The held-out samples choose epoch {epoch + 1} (most right of D_c less D_p): {shown(places.of_validation)}"
        )
    if opt.choose == "forgotten":
        epoch = best_epoch(run.history, "loss_Dp_after")
        print(f"D_p is known least after epoch {epoch + 1}, whose model is the result: {shown(places.forgotten)}")
        if plain and leads():
            chosen = load_tensors(places.forgotten, f"python {STEP}.py", "checkpoint of this step")["model"]
            load_weights(model, chosen, places.forgotten)
    if plain:
        write_together({places.result: tensor_writer(plain_state(model, opt.foreign))})
        print(f"The cleaned state dict is {shown(places.result)}; to continue, give {shown(places.save)}")
    print(f"The model is {shown(places.save)}, the log {shown(places.log)}")


if __name__ == "__main__":
    run_script(main)
