"""SD step 3, the picture: the histogram of FCT, saved as <epoch>.jpg beside the checkpoint (paper figure 3).

Uses the values that calculate_consistency.py saved where they fit the options, else computes them.
"""

from utils import args
from utils.errors import run_script
from utils.fct import beside_checkpoint, fct_path, fct_runtime, saved_or_new_fct, sd_checkpoint
from utils.figures import fct_histogram, save_figure
from utils.files import make_folder, sha256
from utils.manifest import write_options
from utils.metrics import auroc
from utils.paths import shown
from utils.poisoning import poison_training_set
from utils.separation import gammas_of_ratios


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_fct_options(parser)
    args.add_ratio_options(parser)
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv, fct_runtime)
    path, command = sd_checkpoint(opt)
    make_folder(path.parent, beside_checkpoint(opt))
    inputs = {path: sha256(path)}  # now: a later run may replace it

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    fct, sources = saved_or_new_fct(path, command, dataset, poisoned, opt, runtime)
    inputs |= sources

    gammas = gammas_of_ratios(fct, opt.clean_ratio, opt.poison_ratio)
    tau = opt.trans1 if opt.trans1 == "auto" else f"{opt.trans1} + {opt.trans2}"
    title = f"{opt.dataset}, {opt.model}, checkpoint {path.name}, tau {tau}"
    if poisoned.is_clean is not None:
        title += f", {opt.trigger_type} {opt.target_type}: AUROC {auroc(fct, ~poisoned.is_clean):.4f}"
    picture, record = path.with_suffix(".jpg"), fct_path(path, "histogram.json")
    save_figure(fct_histogram(fct, poisoned.is_clean, title, gammas), picture)
    write_options(record, opt, step="visualize_consistency", data=dataset.record, inputs=inputs, outputs=[picture])
    print(f"The histogram is {shown(picture)}")


if __name__ == "__main__":
    run_script(main)
