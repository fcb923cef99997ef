"""SD step 5: separate the training samples by FCT into clean, poisoned and uncertain ones (paper section 4.1).

Writes clean_samples.npy, poison_samples.npy, suspicious_samples.npy (structured arrays: image, label, flag, index),
options.json and, by the ground truth where it is known and for evaluation only, detection.json to
saved/separated_samples/<dataset>/<model>/<trigger>_<clean_ratio>_<poison_ratio>/.
"""

import numpy as np

from utils import args
from utils.errors import UserError, require_file, run_script
from utils.fct import fct_path, fct_runtime, saved_or_new_fct, sd_checkpoint, settle_fct_precision, step_3_record
from utils.files import json_writer, read_record, sha256, write_together
from utils.manifest import as_written, write_options
from utils.metrics import detection_quality
from utils.paths import python, quoted, relative, separated_folder, shown
from utils.poisoning import poison_training_set
from utils.run import claim
from utils.samples import load_order, sample_writers
from utils.separation import (
    CLEAN,
    POISON,
    UNCERTAIN,
    clean_of_labels,
    confine,
    gammas_of_ratios,
    of_classes,
    separate,
    with_alike,
)


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_fct_options(parser)
    args.add_ratio_options(parser)
    args.add_overwrite_option(parser)
    parser.add_argument(
        "--gamma_low", type=args.number(float, 0), help="gamma_c: FCT up to this is clean; default: from clean_ratio"
    )
    parser.add_argument(
        "--gamma_high",
        type=args.number(float, 0),
        help="gamma_p: FCT from this on is poisoned; default: from poison_ratio",
    )
    parser.add_argument(
        "--clean_per_class",
        action="store_true",
        help="not in the paper: D_c takes clean_ratio of every label, so that no class is left out",
    )
    parser.add_argument(
        "--clean_even",
        action="store_true",
        help="not in the paper: with --clean_per_class, no label gives more than the median label does; an all2one attack "
        "swells its target's, and what of it is clean runs out first",
    )
    parser.add_argument(
        "--poison_classes",
        type=args.natural,
        nargs="+",
        metavar="LABEL",
        help="not in the paper: D_p takes poison_ratio of all samples from those with these labels alone, numbers from 0 in the order of "
        "the classes' names",
    )
    parser.add_argument(
        "--poison_order", type=args.file, metavar="FILE",
        help="not in the paper: D_p takes the samples of the highest values in this .npy, float32, one a training sample, in "
        "place of FCT; audit_dataset.py writes one",
    )  # fmt: skip
    parser.add_argument(
        "--poison_alike",
        action="store_true",
        help="not in the paper: D_p takes all samples that step 3 found to be like those that show the backdoor, and by FCT what these "
        "are short of poison_ratio",
    )
    return parser


def refuse_contradictions(opt):
    """Raise a `UserError` where two options choose the same set in different ways."""
    if opt.clean_per_class and opt.gamma_low is not None:
        raise UserError("--clean_per_class takes a share of every label and has no use for --gamma_low; leave one out")
    if opt.clean_even and not opt.clean_per_class:
        raise UserError("--clean_even says how many of each label --clean_per_class takes; give both")
    for name in ("poison_classes", "poison_order", "poison_alike"):
        if getattr(opt, name) and opt.gamma_high is not None:
            raise UserError(
                f"--{name} takes poison_ratio of all samples and has no use for --gamma_high; leave one out"
            )
    if opt.poison_alike and (opt.poison_classes or opt.poison_order):
        raise UserError(
            "--poison_alike is another way to choose D_p than --poison_classes and --poison_order; leave one out"
        )


def found_alike(path, opt, dataset):
    """The training samples of ``dataset`` that step 3 put beside those which show the backdoor, bool (N,); None where it saw none.

    Raises:
        UserError: where step 3 was not run on this checkpoint with these options, or its files were changed.
    """
    options = f"{args.attack_arguments(opt)}{args.fct_arguments(vars(opt))}"
    command = f"{python('calculate_consistency.py')} {options} --checkpoint_load {quoted(path)}"
    source, order = require_file(fct_path(path, "fct.json"), command), fct_path(path, "order.npy")
    record = step_3_record(path, opt, dataset.record)
    if record and order.name not in record.get("outputs", {}):
        print("Step 3 saw no backdoor here, so nothing is like one; D_p is by FCT alone")
        return None
    if not record or not as_written(record, order):
        raise UserError(
            f"{shown(source)} is not of this network, these options and {order.name}. Make it anew with: {command} --overwrite"
        )
    return load_order(order, len(dataset.train_labels), command) >= 0


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv, fct_runtime)
    refuse_contradictions(opt)
    path, command = sd_checkpoint(opt)
    inputs = {path: sha256(path)}  # now: a later run may replace it

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    known = dataset.spec.num_classes
    if max(opt.poison_classes or [0]) >= known:
        raise UserError(f"--poison_classes {max(opt.poison_classes)}: {opt.dataset} has the classes 0 to {known - 1}")
    own_order = None
    if opt.poison_order:
        own_order = load_order(opt.poison_order, len(poisoned.labels), "python audit_dataset.py --data_root DIR")
    fct, sources = saved_or_new_fct(path, command, dataset, poisoned, opt, runtime)
    inputs |= sources

    low, high = gammas_of_ratios(fct, opt.clean_ratio, opt.poison_ratio)
    low = low if opt.gamma_low is None else opt.gamma_low
    high = high if opt.gamma_high is None else opt.gamma_high
    labels = poisoned.labels if opt.clean_per_class else None
    flags = separate(fct, low, high, opt.clean_ratio, opt.poison_ratio, opt.seed, labels, opt.clean_even)
    poison_rule = f"FCT >= {high:g}"
    if opt.poison_classes or opt.poison_order:
        among = of_classes(poisoned.labels, opt.poison_classes or range(known), opt.poison_ratio)
        order, by = (own_order, shown(opt.poison_order)) if opt.poison_order else (fct, "FCT")
        flags = confine(flags, order, among, opt.poison_ratio, opt.seed)
        poison_rule = f"{by} >= {order[flags == POISON].min():g}"
        if opt.poison_classes:
            poison_rule += f", of {', '.join(f'{label} ({dataset.classes[label]})' for label in opt.poison_classes)}"
    alike = found_alike(path, opt, dataset) if opt.poison_alike else None
    if alike is not None:
        flags = with_alike(flags, fct, alike, opt.poison_ratio, opt.seed)
        rest = fct[(flags == POISON) & ~alike]
        poison_rule = f"{alike.sum()} alike" + (f", {len(rest)} of FCT >= {rest.min():g}" if len(rest) else "")
    if opt.clean_per_class:  # of what this D_p leaves
        flags = clean_of_labels(flags, fct, poisoned.labels, opt.clean_ratio, opt.seed, opt.clean_even)
    per_class = np.bincount(poisoned.labels[flags == CLEAN], minlength=dataset.spec.num_classes)
    clean_rule = "lowest FCT of each label" if opt.clean_per_class else f"FCT <= {low:g}"
    sizes = [int((flags == flag).sum()) for flag in (CLEAN, POISON, UNCERTAIN)]
    print(f"D_c {sizes[0]} ({clean_rule}), D_p {sizes[1]} ({poison_rule}), D_u {sizes[2]}")
    print(f"D_c per class: {' '.join(map(str, per_class))}")
    if not per_class.all():
        per_label = "" if opt.clean_per_class else "--clean_per_class (not in the paper), or "
        print(
            f"Warning: D_c holds no sample of some class; ST and BR cannot teach it. Give {per_label}a larger --clean_ratio"
        )

    folder = separated_folder(opt)
    thresholds = {  # None where no threshold for all decided
        "gamma_low": None if opt.clean_per_class else low,
        "gamma_high": None if opt.poison_classes or opt.poison_order or alike is not None else high,
    }
    record, settings = folder / "options.json", {"checkpoint_load": relative(path, folder)}
    before = (read_record(record) or {}).get("options", {})
    typed = [name for name in thresholds if getattr(opt, name) is not None or before.get(name) is not None]
    # Others follow from the ratios, and vary in the last bits with batch size and device.
    compared = settings | {name: thresholds[name] for name in typed}
    ignored = ["batch_size", *thresholds]
    claim(record, opt, ignored=ignored, settle=settle_fct_precision, data=dataset.record, **compared)
    settings |= thresholds
    writers = sample_writers(folder, poisoned, flags)
    if poisoned.is_clean is not None:
        quality = detection_quality(fct, flags, poisoned.is_clean, poisoned.labels, dataset.spec.num_classes)
        writers[folder / "detection.json"] = json_writer(quality)
    outputs = {folder / name: digest for name, digest in write_together(writers).items()}
    settings |= {"step": "separate_samples", "poisoned_digest": poisoned.digest, "data": dataset.record}
    if opt.poison_order:
        inputs[opt.poison_order] = sha256(opt.poison_order)
    if alike is not None:
        inputs[fct_path(path, "order.npy")] = sha256(fct_path(path, "order.npy"))
    write_options(record, opt, inputs=inputs, outputs=outputs, **settings)
    if poisoned.is_clean is not None:
        found = ", ".join(f"{k} {v:.6g}" for k, v in quality.items() if isinstance(v, float))
        print(f"By the ground truth (evaluation only): {found}")
    print(f"The samples are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
