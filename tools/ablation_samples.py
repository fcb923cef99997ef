"""Samples that were chosen otherwise, for comparison: what do the defences owe to the separation? For --samples of
unlearn_relearn.py, ST/train_extractor.py and ST/train_classifier.py.

random: D_c and D_p are drawn at random; random_clean: D_c is, and D_p stays as separate_samples.py made it; oracle: D_c is
drawn from the samples that are clean and D_p from those that are poisoned, by the ground truth, which no defence has. Sizes are
those of the ratios, of the oracle's D_p at most all that is poisoned. likeness: D_p is what <epoch>_order.npy of step 3 puts
beside the samples that show the backdoor, as many as that gives, and D_c as separate_samples.py made it, less these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from utils import args
from utils.errors import UserError, require_file, run_script
from utils.fct import fct_path
from utils.files import json_writer, read_record, write_together
from utils.manifest import write_options
from utils.metrics import detection_quality
from utils.paths import python, separated_folder, shown
from utils.poisoning import poison_training_set
from utils.run import claim
from utils.samples import load_order, load_samples, sample_files, sample_writers
from utils.seeding import generator
from utils.separation import CLEAN, POISON, UNCERTAIN, set_sizes

BY_STEP_3 = f"{python('calculate_consistency.py')}, which writes it where it sees a backdoor"
KINDS = ("random", "random_clean", "oracle", "likeness")


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_ratio_options(parser)
    args.add_overwrite_option(parser)
    parser.add_argument("--kind", choices=KINDS, required=True, help="how D_c and D_p are chosen")
    parser.add_argument("--out", type=args.path, required=True, help="folder of the three files")
    return parser


def draw_flags(kind, is_clean, kept, sizes, seed):
    """The set of every sample.

    Args:
        kind: one of `KINDS` that draws; is_clean: bool (N,), the ground truth, which ``oracle`` alone reads; kept: int64, the indices
        that D_p keeps with ``random_clean``; sizes: of D_c and D_p; seed: of the draw.

    Returns:
        int64 (N,): `separation.CLEAN`, `UNCERTAIN` or `POISON`.
    """
    order = generator(seed, "ablation", kind).permutation(len(is_clean))
    flags = np.full(len(is_clean), UNCERTAIN)
    if kind == "random_clean":
        flags[kept] = POISON
        flags[order[flags[order] != POISON][: sizes[0]]] = CLEAN
        return flags
    can_be_clean, can_be_poisoned = (is_clean, ~is_clean) if kind == "oracle" else [np.ones(len(is_clean), bool)] * 2
    flags[order[can_be_poisoned[order]][: sizes[1]]] = POISON
    flags[order[(flags[order] == UNCERTAIN) & can_be_clean[order]][: sizes[0]]] = CLEAN
    return flags


def checkpoint_of_samples(opt):
    """The checkpoint by which the samples of these options were separated; what step 3 wrote lies beside it."""
    folder = separated_folder(opt)
    command = f"{python('separate_samples.py')} {args.secure_arguments(opt)}"
    record = read_record(require_file(folder / "options.json", command))
    return (folder / str(record.get("checkpoint_load"))).resolve()


def main(argv=None):
    opt = args.parse(get_parser(), argv)
    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    if poisoned.is_clean is None:
        raise UserError("this compares with the ground truth, which nobody has of your own data")
    kept, inputs, count = None, [], len(poisoned.labels)
    if opt.kind == "random_clean":
        kept = load_samples(opt, dataset.spec, [POISON])["index"]
        inputs = sample_files(opt, [POISON])
    if opt.kind == "likeness":
        path, record = (fct_path(checkpoint_of_samples(opt), kind) for kind in ("order.npy", "fct.json"))
        by_step_3 = read_record(record) or {}
        if by_step_3 and not path.is_file() and path.name not in by_step_3.get("outputs", {}):
            raise UserError(
                "calculate_consistency.py (step 3) saw no backdoor in this network, so no sample is like one; choose "
                "another --kind"
            )
        order, inputs = load_order(path, count, BY_STEP_3), [path, *sample_files(opt, [CLEAN])]
        flags = np.full(count, UNCERTAIN)
        flags[load_samples(opt, dataset.spec, [CLEAN])["index"]] = CLEAN
        flags[order >= 0] = POISON
    else:
        sizes = set_sizes(count, opt.clean_ratio, opt.poison_ratio)
        flags = draw_flags(opt.kind, poisoned.is_clean, kept, sizes, opt.seed)
    for flag, name in ((CLEAN, "D_c"), (POISON, "D_p")):
        if not (flags == flag).any():
            raise UserError(f"{name} would have no sample; choose another --kind, or other ratios or --poison_rate")

    folder = opt.out.absolute()
    claim(folder / "options.json", opt, option="--out")
    classes = dataset.spec.num_classes
    quality = detection_quality(flags.astype(float), flags, poisoned.is_clean, poisoned.labels, classes)
    quality.pop("AUROC")  # of FCT, which was not looked at
    writers = sample_writers(folder, poisoned, flags) | {folder / "detection.json": json_writer(quality)}
    outputs = {folder / name: digest for name, digest in write_together(writers).items()}
    settings = {"step": "ablation_samples", "poisoned_digest": poisoned.digest, "data": dataset.record}
    write_options(folder / "options.json", opt, inputs=inputs, outputs=outputs, **settings)
    print(f"D_c {quality['Dc_size']}, D_p {quality['Dp_size']}: {opt.kind}. The samples are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
