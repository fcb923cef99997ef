"""How ACC and ASR of D-ST grow with the extractor's epochs.

Trains one extractor of a row, keeps a checkpoint every so many epochs, and trains and tests a classifier on each of these, as
commands that are printed, below <output_root>/<scale>_seed<seed>_curve/; what is there already is not run again. All points
but the last are taken before the learning rate has come down, which a training of so few epochs would have done by then. Writes
secure_curve_<row>_<scale>.png and .csv (with --variant, its name behind), a line a checkpoint, to --out.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import pandas as pd

from utils import args
from utils.errors import UserError, run_script
from utils.figures import save_figure
from utils.files import check_place, make_folder, read_table, write_rows
from utils.paths import separated_folder, shown, typed
from utils.records import MEASURES, log_of, read_figures
from utils.rows import PRESETS, ROWS, SCALES, VARIANTS, changed, one_cell, plan
from utils.steps import Step, list_commands, run

SHOWN = (*MEASURES, "ASR_clean")  # the last: what the network errs by without any trigger


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--table", choices=("cifar10", "cifar100"), default="cifar10", help="the row's data set")
    parser.add_argument(
        "--row", choices=tuple(ROWS), default="BadNets-all2one", help="attack, by its name in the paper"
    )
    parser.add_argument("--scale", choices=SCALES, default="paper", help="all but the epochs is of this preset")
    parser.add_argument(
        "--variant", choices=tuple(VARIANTS["D-ST"]), help="a variant of D-ST, as reproduce.py --ablations has them"
    )
    parser.add_argument("--epochs", type=args.positive_int, default=200, help="of the extractor")
    parser.add_argument("--every", type=args.positive_int, default=20, help="epochs between two points of the curve")
    args.add_runner_options(parser)
    return parser


def steps_of(opt, root):
    """The steps below ``root`` by name, and of every epoch on the curve (counted from 1) the JSON that its test writes."""
    cell = one_cell(opt.table, opt.row, opt.scale, opt.seed, "D-ST", root, opt.data_root)
    cell.variant = opt.variant
    epochs = f"--epochs {opt.epochs} --save_freq {opt.every}"
    preset = shlex.split(PRESETS[opt.scale]["train_extractor"])
    planned, resolved = plan(cell, train_extractor=shlex.join(changed(preset, epochs)))
    apart = ("train_attack_withTrans", "train_classifier", "test")
    steps = {name: step for name, step in planned.items() if name not in apart}
    extractor, results = steps["train_extractor"], {}
    trained_below = planned["train_classifier"].options().output_root
    samples = extractor.options().samples or separated_folder(resolved)
    for epoch in range(opt.every, opt.epochs + 1, opt.every):
        # A classifier's own folder names neither its extractor's epoch nor, where its words are those of the scale, the variant.
        own = root / "_".join(["classifier", *([opt.variant] if opt.variant else []), str(epoch)])
        checkpoint = typed(extractor.output.with_name(f"ckpt_epoch_{epoch - 1}.pth"))
        paths = ["--output_root", typed(own), "--ckpt", checkpoint, "--samples", typed(samples)]
        classifier = planned["train_classifier"]
        output, record = (own / path.relative_to(trained_below) for path in (classifier.output, classifier.record))
        words = changed(classifier.words, shlex.join(paths))
        steps[f"classifier of epoch {epoch}"] = trained = Step(classifier.script, words, output, record, [extractor])
        result = output.with_name(f"{output.stem}_test.json")
        paths = ["--output_root", typed(own), "--model_ckpt", checkpoint, "--classifier_ckpt", typed(output)]
        words = changed(planned["test"].words, shlex.join(paths))
        steps[f"test of epoch {epoch}"] = Step(planned["test"].script, words, result, result, [trained])
        results[epoch] = result
    return steps, results


def refuse_what_cannot_be_shown(extractor, epochs, table, overwrite):
    """Raise a `UserError` where the `Step` ``extractor`` is done and kept no checkpoint of one of the ``epochs`` (from 1), or
    ``table`` (path of the CSV) holds a curve of other epochs, which is to be replaced with ``overwrite`` alone."""
    kept = {epoch: extractor.output.with_name(f"ckpt_epoch_{epoch - 1}.pth") for epoch in epochs}
    lost = [epoch for epoch, path in kept.items() if not path.is_file()]
    if lost and extractor.is_done():
        raise UserError(
            f"the extractor {shown(extractor.output)} is trained, and no checkpoint of epoch {lost[0]} was kept; give a multiple of its "
            f"--every, or another --output_root to train it anew"
        )
    if table.exists() and not overwrite:
        held = read_table(table, {"epoch": int}, "this command again, with --overwrite")["epoch"].tolist()
        if held != list(epochs):
            raise UserError(
                f"{shown(table)} is of {len(held)} other epochs; give another --out, or --overwrite to replace it"
            )


def main(argv=None):
    opt = get_parser().parse_args(argv)
    if opt.epochs % opt.every:
        raise UserError(f"--epochs {opt.epochs} is no multiple of --every {opt.every}, so its end would not be shown")
    root = opt.output_root.absolute() / f"{opt.scale}_seed{opt.seed}_curve"
    steps, results = steps_of(opt, root)
    if opt.dry_run:
        list_commands(steps, {}, opt.overwrite)
        return
    variant = [opt.variant] if opt.variant else []
    name = "_".join(["secure_curve", opt.row, opt.scale, *variant, *args.table_and_seed(opt)])
    picture, table = (opt.out / f"{name}.{kind}" for kind in ("png", "csv"))
    refuse_what_cannot_be_shown(steps["train_extractor"], results, table, opt.overwrite)
    check_place(picture, table.exists(), opt.overwrite)
    make_folder(root)
    run(steps, opt, root / f"{opt.row}_seconds.json")
    log, extractor = log_of(steps["train_extractor"], ["loss", "seconds"]), steps["train_extractor"].output
    lines = []
    for epoch, path in results.items():
        result = read_figures(steps[f"test of epoch {epoch}"], path, SHOWN)
        part = log[log["epoch"] < epoch]
        if part.empty:
            raise UserError(
                f"the log beside {shown(extractor)} has no epoch below {epoch}; remove both and run this again"
            )
        measures = {measure: round(result[measure], 2) for measure in SHOWN}
        seconds = round(part["seconds"].sum())
        lines.append({"epoch": epoch, "loss": round(part["loss"].iloc[-1], 3), "seconds": seconds, **measures})

    curve = pd.DataFrame(lines)
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for measure, color in (("ACC", "#3b6fb6"), ("ASR", "#c4453c")):
        axis.plot(curve["epoch"], curve[measure], "o-", color=color, label=measure)
        for epoch, value in zip(curve["epoch"], curve[measure], strict=True):
            axis.annotate(f"{value:.1f}", (epoch, value), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axis.set(
        xlabel="epochs of the extractor",
        ylabel="%",
        ylim=(-3, 105),
        title=", ".join([f"D-ST on {opt.row}", f"scale {opt.scale}", *variant]),
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    make_folder(opt.out, "--out")
    save_figure(figure, picture)
    write_rows(table, lines)
    print(curve.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"The curve is {shown(picture)}, the table {shown(table)}")


if __name__ == "__main__":
    run_script(main)
