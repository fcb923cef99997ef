"""Draw the gallery of triggers: for each a clean image, the triggered one, and ten times their difference.

The last row is the image as the attack changes it at test time, when some triggers are stronger. The adversarial
perturbation of CL is left out, for it needs a benign model (see samples.png of its training step).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from utils import args
from utils.datasets import DATASETS
from utils.errors import UserError, run_script
from utils.figures import image_table, save_figure, tenfold_difference
from utils.files import check_outputs, make_folder
from utils.loading import load_dataset
from utils.paths import ROOT, real, shown
from utils.triggers import TRIGGERS, apply_trigger


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument(
        "--dataset",
        choices=[name for name, spec in DATASETS.items() if not spec.own],
        default="fashion",
        help="data set",
    )
    parser.add_argument("--data_root", type=args.path, default=ROOT / "dataset", help="folder that holds the data sets")
    parser.add_argument("--seed", type=args.natural, default=0, help="of the triggers that draw something at random")
    parser.add_argument("--index", type=args.natural, default=0, help="which training image")
    parser.add_argument("--out", type=args.file, default=ROOT / "results/triggers.png", help="the picture")
    args.add_overwrite_option(parser, "a file that is there; the default --out is replaced without")
    return parser


def main(argv=None):
    opt = get_parser().parse_args(argv)
    check_outputs([opt.out], opt.overwrite or real(opt.out) == real(opt.defaults["out"]))
    bundled = opt.dataset == "fashion" and not (opt.data_root / "fashion/fashion.npz").is_file()
    if bundled and opt.data_root != opt.defaults["data_root"]:
        raise UserError(
            f"{shown(opt.data_root)} holds no fashion/fashion.npz; leave out --data_root for the bundled images"
        )
    dataset = load_dataset(opt.dataset, opt.data_root)
    if opt.index >= len(dataset.train_images):
        raise UserError(
            f"--index {opt.index}: {opt.dataset} has the training images 0 to {len(dataset.train_images) - 1}"
        )
    clean = dataset.train_images[opt.index : opt.index + 1]  # no more, for a streamed data set would decode the rest
    train, test = (
        np.concatenate([apply_trigger(name, clean, train=kind, seed=opt.seed) for name in TRIGGERS])
        for kind in (True, False)
    )
    names = [name.replace("Trigger", "") for name in TRIGGERS]
    difference = tenfold_difference(train, clean)
    lines = [
        ("clean", np.repeat(clean, len(TRIGGERS), axis=0), names),
        ("training", train, ()),
        ("difference x 10", difference, ()),
        ("test", test, ()),
    ]
    make_folder(opt.out.absolute().parent, "--out")
    save_figure(image_table(lines), opt.out)
    print(f"The picture is {shown(opt.out)}")


if __name__ == "__main__":
    run_script(main)
