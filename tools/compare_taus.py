"""Compare transforms tau on one checkpoint of SD: how well FCT separates under each, by the ground truth.

Writes, a row a tau and pair of ratios, AUROC, the share of poisoned samples in the highest poison_ratio (Dp_precision) and what part of all
of them that is (Dp_recall), and the share of poisoned samples in the lowest clean_ratio (Dc_contamination) to
<out>/<dataset>_<model>_<trigger>_<target_type>_<poison_rate>_<step>_<epoch>.csv, and what it was made from to a JSON beside it. With
--within_labels every tau has a second row: log FCT measured from the median of the sample's label. For evaluation only: no defence step
reads this.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from utils import args
from utils.errors import UserError, run_script
from utils.fct import AUTO, combine, compute_fct, fct_runtime, sd_checkpoint, sd_network
from utils.files import make_folder, read_record, sha256, write_rows
from utils.images import rows_of
from utils.manifest import write_options
from utils.metrics import detection_quality
from utils.paths import ROOT, data_name, shown
from utils.poisoning import poison_training_set
from utils.records import DETECTION
from utils.separation import gammas_of_distribution, gammas_of_ratios, separate

TAUS = (
    ("rotate", "affine"),
    *((name, "none") for name in ("rotate", "affine", "flip", "crop", "blur", "erase", "shrink")),
)


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_ratio_options(parser)
    parser.add_argument(
        "--poison_ratios", type=args.share, nargs="+", help="several alpha_p in the place of poison_ratio, a row each"
    )
    parser.add_argument("--auto", action="store_true", help="also the ratios that calculate_gamma.py --auto finds")
    parser.add_argument("--within_labels", action="store_true", help="also FCT standardised within each label")
    parser.add_argument(
        "--per_class", action="store_true",
        help="also D_c as separate_samples.py takes it with --clean_per_class, and with --clean_even",
    )  # fmt: skip
    parser.add_argument("--draws", type=args.positive_int, default=1, help="draws of each transform that are averaged")
    parser.add_argument(
        "--every",
        type=args.positive_int,
        default=1,
        metavar="N",
        help="use only every N-th sample, with the tau it has among all, to save time",
    )
    parser.add_argument("--batch_size", type=args.positive_int, default=256, help="images a forward pass")
    parser.add_argument("--checkpoint_load", type=args.file, help="checkpoint of step 1 or 2; default: step 2's last")
    parser.add_argument("--out", type=args.path, default=ROOT / "results/taus", help="folder of the table")
    args.add_overwrite_option(parser)
    return parser


def refuse_other_table(table, checkpoint, opt):
    """Refuse to replace the ``table`` (path) where it is of another checkpoint than the file ``checkpoint``, or does not say of
    which, unless --overwrite is given."""
    held = read_record(table.with_suffix(".json")) or {}
    if table.exists() and not opt.overwrite and sha256(checkpoint) not in held.get("inputs", {}).values():
        raise UserError(
            f"{shown(table)} is of another checkpoint, or does not say of which; give another --out, or --overwrite to replace it"
        )


def within_labels(fct, labels):
    """FCT, float32 (N,), standardised within each label as `fct.combine` does over all samples; labels: int64 (N,)."""
    found = np.empty_like(fct)
    for label in np.unique(labels):
        own = labels == label
        found[own] = combine(fct[own][None])
    return found


def separations(fct, labels, opt):
    """(kind of ratios, flags int64 (N,) as `separation.separate` gives them) for each pair of ratios asked for; for those found in
    the values None where there are no two groups. labels: int64 (N,)."""
    for poison_ratio in opt.poison_ratios or [opt.poison_ratio]:
        ratios = opt.clean_ratio, poison_ratio
        kind, common = f"{opt.clean_ratio} {poison_ratio}", (*gammas_of_ratios(fct, *ratios), *ratios, opt.seed)
        yield kind, separate(fct, *common)
        if opt.per_class:
            yield f"{kind} per class", separate(fct, *common, labels)
            yield f"{kind} even", separate(fct, *common, labels, even=True)
    if opt.auto:
        found = gammas_of_distribution(fct)
        names = ("gamma_low", "gamma_high", "clean_ratio", "poison_ratio")
        yield "auto", None if found is None else separate(fct, *(found[name] for name in names), opt.seed)


def how(opt):
    """What the table's name says of the options, other than of attack and network, that are not the default."""
    words = []
    for name in ("every", "draws", *args.RATIOS, "poison_ratios", "auto", "within_labels", "per_class"):
        value = getattr(opt, name)
        if value != opt.defaults[name]:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words.append("_".join([name, *map(str, values)]))
    return "".join(f"_{word}" for word in words)


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv, fct_runtime)
    if opt.poison_ratios and opt.poison_ratio != opt.defaults["poison_ratio"]:
        raise UserError("--poison_ratios stands in the place of --poison_ratio; give one of them")
    path, command = sd_checkpoint(opt)
    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    if poisoned.is_clean is None:
        raise UserError("this compares tau by the ground truth, which nobody has of your own data")
    checkpoint, model = sd_network(path, command, dataset, poisoned, opt, runtime)
    attack = f"{data_name(opt)}_{opt.model}_{opt.trigger_type}_{opt.target_type}_{opt.poison_rate}"
    seed = f"_seed{opt.seed}" if opt.seed else ""
    name = f"{attack}{seed}_{checkpoint['step']}_{checkpoint['epoch']}{how(opt)}.csv"
    out = make_folder(opt.out.absolute(), "--out") / name
    refuse_other_table(out, path, opt)
    rows = np.arange(0, len(poisoned.labels), opt.every)
    images = rows_of(poisoned.images, rows)
    labels, is_clean = poisoned.labels[rows], poisoned.is_clean[rows]

    values = {}
    for names in TAUS:
        options = {"trans1": names[0], "trans2": names[1], "draws": opt.draws, "batch_size": opt.batch_size}
        values[names], _ = compute_fct(model, images, dataset.spec, runtime, seed=opt.seed, indices=rows, **options)
    values["auto", ""] = combine(np.stack([values[names] for names in AUTO]))
    values = {" + ".join(name for name in names if name not in ("", "none")): fct for names, fct in values.items()}
    if opt.within_labels:
        values |= {f"{tau}, within labels": within_labels(fct, labels) for tau, fct in values.items()}

    table = []
    for tau, fct in values.items():
        for kind, flags in separations(fct, labels, opt):
            line = {"tau": tau, "ratios": kind}
            if flags is not None:
                quality = detection_quality(fct, flags, is_clean, labels, dataset.spec.num_classes)
                line |= {name: round(quality[name], 4) for name in DETECTION}
            table.append(line)
    write_rows(out, table)
    write_options(out.with_suffix(".json"), opt, inputs=[path], outputs=[out])
    print(f"{len(rows)} samples, {(~is_clean).sum()} of them poisoned")
    print(pd.DataFrame(table).to_string(index=False))
    print(f"The table is {shown(out)}")


if __name__ == "__main__":
    run_script(main)
