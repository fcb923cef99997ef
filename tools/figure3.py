"""Figure 3 of the paper: FCT of every row of a table after step 1 and after step 2 of SD, and what step 2 does on the way.

Runs steps 1 to 3 of SD with the paper's tau and ratios, and with --every_epoch step 3 after each epoch of step 2, as commands that are
printed, below <output_root>/<scale>_seed<seed>_figure3/; what is there already is not run again. Writes figure3_<scale>.png
and figure3_<scale>.csv (named too by --model, and by another table or seed than the default), a line a row and epoch, to --out.
Rows that the table has from an earlier run stay in it, and in the figure as long as their files are there; so do the epochs of a row
that --every_epoch had measured, where the row was not trained anew since. The lines' measures are by the ground truth, for evaluation
only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from models import MODELS
from utils import args
from utils.errors import UserError, run_script
from utils.fct import fct_path, load_fct, zeros_of
from utils.figures import draw_histogram, save_figure
from utils.files import check_place, make_folder, read_table, write_rows
from utils.metrics import detection_quality
from utils.paths import shown, typed
from utils.poisoning import poison_training_set
from utils.records import DETECTION, log_of
from utils.rows import PRESETS, ROWS, SCALES, TABLES, one_cell, plan
from utils.separation import gammas_of_ratios, separate
from utils.steps import Step, list_commands, run

STEP_2 = "--epochs 10 --eval_freq 0"


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--table", choices=("cifar10", "cifar100"), default="cifar10", help="whose rows")
    parser.add_argument("--rows", choices=tuple(ROWS), nargs="+", help="these rows; default: the paper's")
    parser.add_argument("--scale", choices=SCALES, default="paper", help="images, network and step 1 of this preset")
    parser.add_argument("--model", choices=tuple(MODELS), help="network; default: the preset's")
    parser.add_argument(
        "--every_epoch",
        choices=tuple(ROWS),
        nargs="+",
        default=[],
        help="rows whose FCT is taken after every epoch of step 2",
    )
    args.add_runner_options(parser)
    return parser


def steps_of(opt, row):
    """SD's steps 1 to 3 of a row, by name, its resolved options, and (epoch, checkpoint) of each that FCT is taken of; the
    epoch 0 is step 1's last."""
    root = opt.output_root.absolute() / f"{opt.scale}_seed{opt.seed}_figure3"
    cell = one_cell(opt.table, row, opt.scale, opt.seed, "D-BR", root, opt.data_root, opt.model)
    planned, resolved = plan(cell, tau="", ratios=PRESETS["paper"]["ratios"], finetune_attack_noTrans=STEP_2)
    names = [
        name for name in ("train_clean_withTrans", "train_attack_noTrans", "finetune_attack_noTrans") if name in planned
    ]
    steps = {name: planned[name] for name in names}
    places = [(0, steps["train_attack_noTrans"].output)]
    tuned = steps["finetune_attack_noTrans"].output
    last = int(tuned.stem) + 1
    places += [
        (epoch, tuned.with_name(f"{epoch - 1}.tar"))
        for epoch in (range(1, last + 1) if row in opt.every_epoch else [last])
    ]
    for epoch, path in places:
        record = fct_path(path, "fct.json")
        words = [*planned["calculate_consistency"].words, "--checkpoint_load", typed(path)]
        made_by = steps["finetune_attack_noTrans" if epoch else "train_attack_noTrans"]
        steps[f"FCT of epoch {epoch}"] = Step("calculate_consistency.py", words, record, record, [made_by])
    return steps, resolved, places


def measures(resolved, places, norms):
    """FCT by epoch, is_clean (bool (N,)) and one dict an epoch: how FCT detects, its zeros, and how D_c spreads.

    Args:
        resolved: the options of SD; places: (epoch, checkpoint) pairs; norms: mean feature norm in training by epoch.
    """
    dataset = args.load_data(resolved)
    poisoned = poison_training_set(dataset, resolved)
    values, lines = {}, []
    for epoch, path in places:
        fct = load_fct(path, "python tools/figure3.py")
        ratios = resolved.clean_ratio, resolved.poison_ratio
        flags = separate(fct, *gammas_of_ratios(fct, *ratios), *ratios, resolved.seed)
        quality = detection_quality(fct, flags, poisoned.is_clean, poisoned.labels, dataset.spec.num_classes)
        per_class = quality["Dc_per_class"]
        lines.append({
            "epoch": epoch, "feature_norm": norms.get(epoch), "zeros": zeros_of(fct),
            "FCT_clean": float(np.median(fct[poisoned.is_clean])), "FCT_poisoned": float(np.median(fct[~poisoned.is_clean])),
            **{name: quality[name] for name in DETECTION[:4]}, "Dc_smallest_class": min(per_class), "Dc_largest_class": max(per_class),
        })  # fmt: skip
        values[epoch] = fct
    return values, poisoned.is_clean, lines


def earlier_lines(table):
    """The lines (dicts of text) by row that the file ``table`` has from an earlier run; a `UserError` where it is another
    table."""
    if not table.is_file():
        return {}
    command, numbers = "python tools/figure3.py --out ANOTHER_FOLDER", ["epoch", "FCT_clean"]
    found = read_table(table, ["row", *numbers], command, dtype=str, keep_default_na=False)
    if found[numbers].apply(pd.to_numeric, errors="coerce").isna().any(axis=None):
        raise UserError(
            f"{shown(table)} is no table of this tool: its epochs and FCT are not all numbers; give another --out"
        )
    strange = set(found["row"]) - set(ROWS)
    if strange:
        raise UserError(f"{shown(table)} is no table of this tool: it has the row {min(strange)}; give another --out")
    return {row: part.to_dict("records") for row, part in found.groupby("row")}


def with_earlier_epochs(lines, earlier):
    """The ``lines`` of a row and, of those that an ``earlier`` run left (dicts of text), the other epochs', in the order of epochs;
    none of them where the two do not agree on an epoch, for the row was trained anew."""
    own = {line["epoch"]: line for line in lines}
    others = {int(float(line["epoch"])): line for line in earlier}
    both = [
        (f"{own[epoch]['FCT_clean']:.5g}", f"{float(others[epoch]['FCT_clean']):.5g}")
        for epoch in own.keys() & others.keys()
    ]
    if any(one != other for one, other in both):
        others = {}
    return [line for _, line in sorted((others | own).items())]


def draw(path, drawn, ratios):
    """Save the figure: a line a row of ``drawn``, row -> (FCT by epoch, is_clean, measures by epoch); ratios: clean, poison."""
    figure, axes = plt.subplots(len(drawn), 2, figsize=(11, 2.3 * len(drawn)), layout="constrained", squeeze=False)
    for (row, (values, is_clean, measured)), pair in zip(drawn.items(), axes, strict=True):
        for axis, epoch, when in zip(
            pair, (0, max(values)), ("step 1", f"{max(values)} epochs of step 2"), strict=True
        ):
            fct = values[epoch]
            draw_histogram(axis, fct, is_clean, gammas_of_ratios(fct, *ratios))
            axis.set_title(f"{row} after {when}: AUROC {measured[epoch]['AUROC']:.4f}", fontsize=9)
            axis.legend(fontsize=6, loc="upper right")
            axis.tick_params(labelsize=7)
        pair[0].set_ylabel("samples", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("FCT (logarithmic)", fontsize=8)
    save_figure(figure, path)


def main(argv=None):
    opt = get_parser().parse_args(argv)
    rows = opt.rows or TABLES[opt.table]
    for row in set(opt.every_epoch) - set(rows):
        raise UserError(f"--every_epoch {row} is none of the --rows {' '.join(rows)}; name it there too")
    name = "_".join(["figure3", opt.scale, *([opt.model] if opt.model else []), *args.table_and_seed(opt)])
    picture, table = (opt.out / f"{name}.{kind}" for kind in ("png", "csv"))
    earlier = earlier_lines(table)
    if not opt.dry_run:
        check_place(picture, earlier, opt.overwrite)
    planned = {row: steps_of(opt, row) for row in ROWS if row in {*rows, *earlier}}
    lines, drawn, numbers = [], {}, {}
    for row, (steps, resolved, places) in planned.items():
        chosen, norms = row in rows, {}
        if chosen:
            print(f"# {row}" if opt.dry_run else f"{row}:", flush=True)
        if opt.dry_run:
            list_commands(steps if chosen else {}, numbers, opt.overwrite)
            continue
        if chosen:
            make_folder(resolved.output_root)
            run(steps, opt, resolved.output_root / f"figure3_{row}_seconds.json")
            log = log_of(steps["finetune_attack_noTrans"], ["feature_norm"])
            norms = dict(zip(log["epoch"] + 1, log["feature_norm"], strict=True))
        elif not all(step.is_done() for step in steps.values()):
            print(f"{row} stays in the table; its files are not here, so it is not drawn", flush=True)
            lines += earlier[row]
            continue
        values, is_clean, of_row = measures(resolved, places, norms)
        drawn[row] = values, is_clean, {line["epoch"]: line for line in of_row}
        of_row = [{"row": row, **line} for line in of_row]
        lines += with_earlier_epochs(of_row, earlier.get(row, [])) if chosen else earlier[row]
    if opt.dry_run:
        return

    make_folder(opt.out, "--out")
    draw(picture, drawn, (resolved.clean_ratio, resolved.poison_ratio))  # the same in every row
    write_rows(table, lines)
    print(pd.read_csv(table).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"The figure is {shown(picture)}, the table {shown(table)}")


if __name__ == "__main__":
    run_script(main)
