"""Is a data set of your own poisoned? Sample distinguishment on it, a verdict, and a report to look at.

Trains a small network without augmentation (SD step 1), takes FCT of every image, tests whether what the most sensitive
images of a class share acts as a trigger, and separates the samples: where it does, D_p is what of the class the network's
features put beside these, else the images of highest FCT. Writes report.html (one page that holds all), its
pictures as PNG, suspects.csv and verdict.json to --out. Exit code 0 whatever the verdict.
"""

import sys

from utils import forked

if __name__ == "__main__":
    forked.begin(sys.argv)  # what the steps need is imported there while this script imports its own


import io
import os
import shlex
import shutil
import time
from pathlib import Path

import numpy as np

from models import MODELS
from utils import args
from utils.audit import (
    INTO_EACH,
    LEAST,
    NOTHING_BELOW,
    SURE_FROM,
    TAUS,
    PutBack,
    likeness_of,
    poisoned_from,
    suspicion,
    targets_of,
)
from utils.audit_report import REPORT, SETS, write_report
from utils.datasets import SPLITS
from utils.errors import UserError, refuse_several_processes, run_script
from utils.fct import fct_path, fct_runtime, load_fct, sd_network
from utils.files import (
    array_writer,
    bytes_writer,
    csv_writer,
    hold_lock,
    make_folder,
    new_folder,
    read_record,
    refuse_users_own,
    sha256,
    write_together,
)
from utils.manifest import of_this_data, plain_options
from utils.metrics import auroc
from utils.paths import ROOT, backdoored_folder, real, separated_folder, shown, typed
from utils.poisoning import poison_training_set
from utils.samples import sample_files
from utils.separation import CLEAN, POISON, UNCERTAIN, ratio_of, share_of
from utils.steps import Step, run, say_where

EPOCHS = 6  # what the thresholds of `utils.audit` were found with, on resnet10
SMALL = 20_000  # images; in fewer, batches of 128 are too few steps to plant a backdoor of 1 %
BATCH_AND_LR = {True: (64, 0.03), False: (128, 0.05)}  # by whether there are fewer
# The sets of tools/calibrate_audit.py.
CALIBRATED = {"side": 32, "classes": range(3, 11), "images": range(2900, 10_001)}
TAU, CLEAN_RATIO = "flip", "0.2"  # of the first FCT, and of D_c
ENOUGH = 1000  # images; fewer teach the network too little
WORDS = {
    "poisoned": "Poisoned, likely target class {name}",
    f"poisoned, {INTO_EACH}": "Poisoned, images of each class are led to one of its own; the targets are {name}",
    "no evidence": "No evidence of poisoned samples",
    "cannot tell": "Cannot tell: {reason}",
}


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument(
        "--data_root",
        type=args.path,
        required=True,
        metavar="DIR",
        help="your data: DIR with train/<class>/*, or an .npz file of x_train and y_train",
    )
    parser.add_argument(
        "--dataset", choices=("folder", "npz"), help="form of the data; default: npz where data_root is a file"
    )
    parser.add_argument(
        "--image_size", type=args.number(int, 8, 1024), help="side in pixels; default: by the median side"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse images that cannot be read, instead of skipping them"
    )
    parser.add_argument("--out", type=args.path, default=Path("report"), help="folder of the report")
    parser.add_argument("--model", choices=tuple(MODELS), default="resnet10", help="network")
    parser.add_argument("--epochs", type=args.positive_int, default=EPOCHS, help="epochs of training")
    parser.add_argument(
        "--batch_size",
        type=args.number(int, 2),
        help=f"of training; default: {BATCH_AND_LR[False][0]}, and {BATCH_AND_LR[True][0]} below {SMALL} images",
    )
    parser.add_argument(
        "--lr",
        type=args.positive,
        help=f"learning rate, a cosine to 0 over the epochs; default: {BATCH_AND_LR[False][1]} and {BATCH_AND_LR[True][1]}",
    )
    parser.add_argument("--seed", type=args.natural, default=0, help="decides every random draw")
    parser.add_argument("--output_root", type=args.path, default=ROOT, help="folder under which saved/ is kept")
    parser.add_argument(
        "--write_clean", type=args.path, metavar="NEW", help="write a copy of the folder without D_p here, as links"
    )
    parser.add_argument(
        "--copy", action="store_true", help="with --write_clean: copy the files instead of linking them"
    )
    args.add_device_options(parser)
    args.add_overwrite_option(parser)
    return parser


def resolve(opt):
    """The options as the steps see them, and the words that say so."""
    kind = opt.dataset or ("npz" if os.path.isfile(opt.data_root) else "folder")
    words = ["--dataset", kind, "--data_root", typed(opt.data_root.absolute()), "--model", opt.model]
    for name in ("image_size", "seed"):
        if getattr(opt, name):
            words += [f"--{name}", str(getattr(opt, name))]
    if opt.strict:
        words.append("--strict")
    if opt.output_root != ROOT:
        words += ["--output_root", typed(opt.output_root.absolute())]
    where = []
    for name in ("device", "precision", "workers"):
        if getattr(opt, name) not in (None, "auto"):
            where += [f"--{name}", str(getattr(opt, name))]
    if opt.deterministic:
        where.append("--deterministic")
    parser = args.Parser("")
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_ratio_options(parser)
    args.add_device_options(parser)
    return args.parse(parser, [*words, *where], ROOT), words, where


def tau_words(name):
    """The options of a tau of `TAUS`."""
    trans1, trans2 = TAUS[name]
    return ["--trans1", trans1, "--trans2", trans2]


def batch_and_lr(opt, count):
    """Batch size and learning rate: the options, else what suits ``count`` images."""
    batch_size, lr = BATCH_AND_LR[count < SMALL]
    return opt.batch_size or batch_size, opt.lr or lr


def plan(opt, resolved, words, where, poisoned):
    """The steps before the test: training without augmentation, and FCT."""
    folder, digest = backdoored_folder(resolved, "noTrans"), poisoned.digest
    batch_size, lr = batch_and_lr(opt, len(poisoned.labels))
    train = ["--epochs", opt.epochs, "--cosine_epochs", opt.epochs, "--batch_size", batch_size, "--lr", lr]
    train = [*map(str, train), "--eval_freq", "0"]
    model, record = folder / f"{opt.epochs - 1}.tar", folder / "options.json"

    def of_this_set(made):
        return made.get("poisoned_digest", digest) == digest

    steps = {"train": Step("train_attack_noTrans.py", [*words, *train, *where], model, record, [], of_this_set)}
    fct = fct_path(model, "fct.json")
    load = [*tau_words(TAU), "--checkpoint_load", typed(model)]
    steps["fct"] = Step("calculate_consistency.py", [*words, *load, *where], fct, fct, [steps["train"]])
    return steps


def has_learnt_too_little(labels, train_acc):
    """Whether a network's training accuracy (per cent) is little above that of always naming the commonest class."""
    return train_acc < min(90, 100 * np.bincount(labels).max() / len(labels) + 15)


def threshold_of(dataset, labels, train_acc):
    """The score from which on the data is poisoned: higher where little is known of what clean data gives."""
    unsure = len(labels) < ENOUGH or has_learnt_too_little(labels, train_acc)
    return SURE_FROM if unsure else poisoned_from(len(dataset.classes))


def decide(scores, dataset, labels, train_acc):
    """(verdict, the row of the highest score or None, why nothing can be told or None)."""
    best = max(scores, key=lambda row: row["score"], default=None)
    if len(scores) >= 2 and best["score"] >= threshold_of(dataset, labels, train_acc):
        return "poisoned", best, None
    if len(labels) < ENOUGH:
        reason = f"{len(labels)} images are too few, {ENOUGH} are needed"
    elif len(scores) < 2:
        reason = f"{len(scores)} of the {len(dataset.classes)} classes have the {LEAST} images that a class needs"
    elif has_learnt_too_little(labels, train_acc):
        reason = f"the network has learnt too little ({train_acc:.1f} % of its own training images); try more --epochs"
    elif best["score"] >= NOTHING_BELOW:
        reason = f"the score of the class {dataset.classes[best['label']]!r} lies between the thresholds"
    else:
        return "no evidence", best, None
    return "cannot tell", best, reason


def tau_that_sees(suspicious, values, own):
    """The name of the tau of `TAUS` under whose FCT the suspicious samples of a class stand out most. suspicious: bool (N,);
    values: what `audit.suspicion` gave; own: bool (N,), the samples of the class."""
    return max(TAUS, key=lambda name: auroc(values[name][own], suspicious[own]))


def separation(resolved, words, where, steps, targets, tau, poison_ratio, order):
    """The step that separates: on poisoned data D_p comes from the target classes alone, by the file ``order``."""
    model = steps["train"].output
    more = ["--clean_ratio", CLEAN_RATIO, "--poison_ratio", str(poison_ratio), "--clean_per_class", "--overwrite"]
    if targets:
        more += ["--poison_classes", *map(str, targets), "--poison_order", typed(order)]
    record = separated_folder(resolved) / "options.json"
    load = [*tau_words(tau), "--checkpoint_load", typed(model)]
    needs = [steps["fct"], *([Step("audit_dataset.py", [], order, order, [])] if targets else [])]
    return Step(
        "separate_samples.py", [*words, *load, *more, *where], record, record, needs, steps["train"].of_this_set
    )


def defences(words, where, poison_ratio, dataset):
    """The commands of D-BR and D-ST on this data, as a user would paste them."""
    batch = min(128, share_of(poison_ratio, len(dataset.train_labels)))  # no larger than D_p
    ratios = ["--clean_ratio", CLEAN_RATIO, "--poison_ratio", str(poison_ratio)]
    lines = {
        "D-BR": [
            ["train_attack_withTrans.py", *words, "--epochs", "200", *where],
            ["unlearn_relearn.py", *words, *ratios, "--epochs", "20", "--batch_size", str(batch), *where],
        ],
        "D-ST": [
            ["ST/train_extractor.py", *words, *ratios, "--epochs", "200", "--cosine", *where],
            ["ST/train_classifier.py", *words, *ratios, "--epochs", "10", *where],
        ],
    }
    if len(dataset.test_labels):
        lines["D-ST"].append(["ST/test.py", *words, *ratios, *where])
    return {name: [shlex.join(["python", *line]) for line in commands] for name, commands in lines.items()}


def write_clean(opt, dataset, flags):
    """Write a copy of the folder without D_p to --write_clean, whole or not at all; the original is only read."""
    target, source = opt.write_clean.absolute(), opt.data_root.absolute()
    left_out = set(dataset.train_images.files[flags == POISON].tolist())
    emptied = np.setdiff1d(dataset.train_labels, dataset.train_labels[flags != POISON])
    of_emptied = np.isin(dataset.test_labels, emptied)
    for label in emptied:
        print(
            f"Warning: D_p holds all images of class {dataset.classes[label]!r}, so the copy has no such class, nor its test images"
        )
    kept = 0
    with new_folder(target, "--write_clean") as staging:
        # No others: nobody looked at them.
        for name in (*dataset.train_images.files, *dataset.test_images.files[~of_emptied]):
            if name in left_out:
                continue
            file = Path(name)
            place = staging / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if opt.copy:
                shutil.copy2(file, place)
            else:
                try:
                    place.symlink_to(file.resolve())
                except OSError as error:  # some file systems have none, and Windows asks for a right
                    raise UserError(
                        f"no link can be made in {shown(target.parent)} ({error.strerror}); give --copy too"
                    ) from None
            kept += 1
        rows = [{"file": os.path.relpath(file, source)} for file in sorted(left_out)]
        write_together({staging / "left_out.csv": csv_writer(rows)})
    print(
        f"{shown(target)} holds {kept} files, without {len(left_out)} of D_p, which {shown(target / 'left_out.csv')} names"
    )


def check_clean(opt):
    """Refuse a place for the cleaned copy that is taken, or lies in the original."""
    if not opt.write_clean:
        if opt.copy:
            raise UserError("--copy has no use without --write_clean")
        return
    target = opt.write_clean.absolute()
    if opt.dataset == "npz" or os.path.isfile(opt.data_root):
        raise UserError(
            "--write_clean is for a folder; of an .npz file, take the rows that suspects.csv puts outside D_p"
        )
    if target.exists() or target.is_symlink():
        raise UserError(f"{shown(target)} is there already; give --write_clean a new name")
    for name in ("out", "output_root"):
        if real(getattr(opt, name)).is_relative_to(real(target)):
            raise UserError(f"--{name} would lie in the copy that is --write_clean {shown(target)}; give another place")
    # A split may be a link to another place.
    folders = [opt.data_root, *(opt.data_root / split for split in SPLITS)]
    if any(real(target).is_relative_to(real(folder)) for folder in folders):
        raise UserError(f"{shown(target)} lies in the folder that is audited; give --write_clean a place outside it")
    make_folder(target.parent, "--write_clean")


def refuse_what_no_audit_wrote(out, opt):
    """Refuse to replace files of the folder ``out`` that are named as the report's and are of no report, unless --overwrite is
    given."""
    if not opt.overwrite and "verdict" not in (read_record(out / "verdict.json") or {}):
        refuse_users_own([out / name for name in REPORT], "report", "--out")


def refuse_report_of_other_data(path, dataset, opt):
    """Refuse to replace the verdict in ``path`` where it is on other data, unless --overwrite is given."""
    record = read_record(path) or {}
    source = record["data"].get("source") if isinstance(record.get("data"), dict) else None
    other = source not in (None, dataset.source) and not of_this_data(record, dataset.record)  # it may have been moved
    if other and not opt.overwrite:
        raise UserError(f"{shown(path)} is on {source}; give another --out, or --overwrite to replace that report")


def refuse_samples_of_others(separate, verdict, opt):
    """Refuse to replace separated samples of this very data that are not those of the last audit, which ``verdict`` (path of the JSON)
    tells of, unless --overwrite is given. ``separate``: the step that would."""
    held = read_record(separate.record) or {}
    same_data = separate.of_this_set(held)
    own = separate.record.is_file() and (read_record(verdict) or {}).get("samples") == sha256(separate.record)
    if held and same_data and not own and not opt.overwrite and not separate.is_done():
        raise UserError(
            f"{shown(separate.record.parent)} holds samples that this audit did not separate; give --overwrite to replace them, or another "
            f"--output_root"
        )


def main(argv=None):
    opt = get_parser().parse_args(argv)
    refuse_several_processes()
    opt.data_root, opt.output_root = opt.data_root.absolute(), opt.output_root.absolute()
    check_clean(opt)
    args.refuse_places_in_the_data(opt, ["out", "output_root"])
    resolved, words, where = resolve(opt)
    runtime = fct_runtime(resolved, args.runtime_of(resolved))
    started = time.perf_counter()
    dataset = args.load_data(resolved)
    poisoned = poison_training_set(dataset, resolved)
    labels, classes = poisoned.labels, dataset.classes
    print(f"{len(labels)} images of {len(classes)} classes, {dataset.spec.size}x{dataset.spec.size}")
    if np.bincount(labels).max() < 5 or len(labels) < 20:  # of which clean_ratio and poison_ratio are one image
        raise UserError(
            f"{len(labels)} images of {len(classes)} classes are too few: of some class five are needed, twenty in all"
        )
    out = make_folder(opt.out.absolute(), "--out")
    hold_lock(out / "verdict.json", "--out")
    refuse_what_no_audit_wrote(out, opt)
    refuse_report_of_other_data(out / "verdict.json", dataset, opt)

    steps = plan(opt, resolved, words, where, poisoned)
    say_where()
    seconds = backdoored_folder(resolved, "noTrans") / "audit_seconds.json"
    run(steps, opt, seconds)
    model_path = steps["train"].output
    known = {TAU: load_fct(model_path, steps["fct"].command)}
    checkpoint, model = sd_network(model_path, steps["train"].command, dataset, poisoned, resolved, runtime)
    values = suspicion(model, poisoned.images, labels, dataset.spec, runtime, opt.seed, known)
    put_back = PutBack(model, poisoned.images, labels, values, dataset.spec, runtime, opt.seed)
    scores = put_back.test()
    train_acc = checkpoint["history"][-1].get("train_acc", 0.0)
    verdict, best, reason = decide(scores, dataset, labels, train_acc)

    tau, poison_ratio, order = TAU, 0.05, fct_path(model_path, "audit_order.npy")
    targets, like = [], None
    if verdict == "poisoned":
        found = targets_of(scores)
        targets = [row["label"] for row in found]
        groups = [(row["label"], np.isin(np.arange(len(labels)), put_back.group_of(row))) for row in found]
        like = likeness_of(groups, model, poisoned.images, labels, dataset.spec, runtime)
        tau = tau_that_sees(like >= 0, values, labels == targets[0])
        poison_ratio = min(ratio_of((like >= 0).sum(), len(labels)), 1 - float(CLEAN_RATIO))
        buffer = io.BytesIO()
        array_writer(like)(buffer)
        # Left alone where it is the same: a step whose input is newer than its output runs anew.
        if not order.is_file() or order.read_bytes() != buffer.getvalue():
            write_together({order: bytes_writer(buffer.getvalue())})
    fct, resolved.poison_ratio = values[tau], poison_ratio
    separate = separation(resolved, words, where, steps, targets, tau, poison_ratio, order)
    refuse_samples_of_others(separate, out / "verdict.json", opt)
    run({"separate": separate}, opt, seconds)
    flags = np.full(len(labels), UNCERTAIN)
    for flag in (CLEAN, POISON):
        (file,) = sample_files(resolved, [flag])
        flags[np.load(file, allow_pickle=False, mmap_mode="r")["index"]] = flag

    commands = defences(words, where, poison_ratio, dataset) if verdict == "poisoned" else {}
    content = summary(opt, dataset, labels, flags, scores, verdict, targets, reason, tau, train_acc, commands)
    content["samples"] = sha256(separate.record)
    write_report(out, opt, dataset, labels, flags, fct, like, content, best, put_back)
    print(f"\n{content['headline']}")
    if best:
        limits = f"(poisoned from {content['threshold']}, no evidence below {NOTHING_BELOW})"
        print(f"Score {best['score']:.2f} of the class {classes[best['label']]} {limits}")
    if opt.write_clean:
        if verdict != "poisoned":
            print("Note: D_p is then the most sensitive 5 % of the images, most likely clean ones")
        write_clean(opt, dataset, flags)
    print(f"The report is {shown(out / 'report.html')} ({(time.perf_counter() - started) / 60:.1f} min)")


def summary(opt, dataset, labels, flags, scores, verdict, targets, reason, tau, train_acc, commands):
    """What verdict.json holds."""
    names = [dataset.classes[label] for label in targets]
    options, scores = plain_options(opt), sorted(scores, key=lambda row: -row["score"])
    batch_size, lr = batch_and_lr(opt, len(flags))
    into_each = verdict == "poisoned" and scores[0]["into"] == INTO_EACH
    kind = f"poisoned, {INTO_EACH}" if into_each else verdict
    return {
        "verdict": verdict,
        "headline": WORDS[kind].format(name=", ".join(names), reason=reason),
        "target_class": names[0] if names else None,
        "target_label": targets[0] if targets else None,
        "target_classes": names,
        "statistic": scores[0]["score"] if scores else None,
        "threshold": threshold_of(dataset, labels, train_acc),
        "no_evidence_below": NOTHING_BELOW,
        "thresholds_calibrated_for_these_settings": opt.model == "resnet10"
        and opt.epochs == EPOCHS
        and (batch_size, lr) == BATCH_AND_LR[True]
        and dataset.spec.size == CALIBRATED["side"]
        and len(dataset.classes) in CALIBRATED["classes"]
        and len(flags) in CALIBRATED["images"],
        "counts": {
            "images": len(flags),
            "classes": len(dataset.classes),
            "skipped": len(dataset.skipped),
            **{name: int((flags == flag).sum()) for flag, name in SETS.items()},
        },
        "classes": [{"class": dataset.classes[row["label"]], **row} for row in scores],
        "settings": {
            **{name: options[name] for name in ("model", "epochs", "seed")},
            "batch_size": batch_size,
            "lr": lr,
            "image_size": dataset.spec.size,
            "tau": " + ".join(TAUS[tau]),
            "train_acc": train_acc,
        },
        "data": dataset.record,
        "commands": commands,
        "write_clean": again(opt, "--write_clean", "NEW") if commands and dataset.name == "folder" else None,
    }


def again(opt, *more):
    """The command of this audit, with ``more``."""
    parser, words = get_parser(), ["--data_root", typed(opt.data_root)]
    for name in ("image_size", "model", "epochs", "batch_size", "lr", "seed", "precision", "output_root", "out"):
        value, usual = getattr(opt, name), parser.get_default(name)
        if isinstance(value, Path):  # the usual ones are in the folder of this project, where the command is given
            value, usual = value.absolute(), ROOT / usual
        if value != usual:
            words += [f"--{name}", typed(value) if isinstance(value, Path) else str(value)]
    if opt.strict:
        words.append("--strict")
    return shlex.join(["python", "audit_dataset.py", *words, *more])


if __name__ == "__main__":
    run_script(main)
