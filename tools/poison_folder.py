"""Make a folder of images, some of them poisoned, for audit_dataset.py to find: OUT/{train,test}/<class>/*.png from a data set
with one of this project's attacks.

Which files carry the trigger goes to OUT_poisoned.csv beside the folder, which no step reads. With --clean and --jpeg it is what a
lossy copy costs: train on the folder, and on what it was made from.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import args
from utils.datasets import DATASETS
from utils.errors import UserError, run_script
from utils.files import csv_writer, new_folder, text_writer, write_together
from utils.paths import shown
from utils.poisoning import poison_training_set
from utils.seeding import generator


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    parser.set_defaults(dataset="fashion", target_label=8)
    parser.add_argument("--images", type=args.positive_int, help="training images, drawn by the seed; default: all")
    parser.add_argument("--clean", action="store_true", help="poison none; no option of the attack goes with it")
    parser.add_argument(
        "--jpeg",
        type=args.number(int, 1, 95),
        metavar="QUALITY",
        help="take every image through a JPEG file of this quality",
    )
    parser.add_argument("--out", type=args.path, required=True, help="folder to make")
    return parser


def through_jpeg(image, quality):
    """uint8 (H, W, 3) -> the same after a JPEG file of ``quality`` (1 to 95, Pillow's). Pixels of edge come first, so that its blocks are
    not those of an earlier file: through these a second one of the same quality would cost next to nothing."""
    edge, file = 5, BytesIO()  # odd, for colours are halved too
    Image.fromarray(np.pad(image, ((edge, edge), (edge, edge), (0, 0)), "edge")).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))[edge:-edge, edge:-edge]


def write_split(folder, images, labels, classes, title, quality=None):
    """Write images uint8 (N, H, W, 3) as <folder>/<class>/<row>.png, `through_jpeg` where a ``quality`` is given; return their names
    below ``folder``."""
    for name in classes:
        (folder / name).mkdir(parents=True)
    names = [f"{classes[label]}/{row:06d}.png" for row, label in enumerate(labels)]
    for name, image in zip(tqdm(names, title, disable=None), images, strict=True):
        Image.fromarray(image if quality is None else through_jpeg(image, quality)).save(folder / name)
    return names


def main(argv=None):
    opt = get_parser().parse_args(argv)
    attack = (*args.ATTACK_DEFAULTS, *args.TRIGGER_OPTIONS)
    given = [name for name in attack if getattr(opt, name) != opt.defaults[name]]
    if opt.clean and given:
        raise UserError(f"--{given[0]} has no use with --clean, which poisons none; leave one out")
    if opt.images and opt.train_images:
        raise UserError("--images and --train_images both say how many training images; leave one out")
    args.check(opt)
    spec = DATASETS[opt.dataset]
    if spec.streamed or spec.own:
        raise UserError(
            f"--dataset {opt.dataset} is not held in memory, or your own; take cifar10, cifar100 or fashion"
        )
    out = opt.out.absolute()
    listed = Path(f"{out}_poisoned.csv")
    for path in (out, listed):
        if os.path.lexists(path):
            raise UserError(f"{shown(path)} is there already; give --out a new name")
    dataset = args.load_data(opt)
    if opt.images:
        if opt.images > len(dataset.train_labels):
            raise UserError(f"--images {opt.images}: {opt.dataset} has {len(dataset.train_labels)} training images")
        rows = np.sort(generator(opt.seed, "images of a folder").permutation(len(dataset.train_labels))[: opt.images])
        dataset = replace(dataset, train_images=dataset.train_images[rows], train_labels=dataset.train_labels[rows])
    images, labels = dataset.train_images, dataset.train_labels
    is_clean = np.ones(len(labels), dtype=bool)
    if not opt.clean:
        poisoned = poison_training_set(dataset, opt)
        images, labels, is_clean = poisoned.images, poisoned.labels, poisoned.is_clean
    classes = [name.replace("/", " or ") for name in dataset.classes]
    emptied = np.setdiff1d(np.arange(len(classes)), labels)
    if len(emptied):
        raise UserError(
            f"no training image of class {classes[emptied[0]]!r} is left; give more --images, or a smaller --poison_rate"
        )
    try:
        with new_folder(out, "--out") as staging:
            names = write_split(staging / "train", images, labels, classes, "train", opt.jpeg)
            write_split(staging / "test", dataset.test_images, dataset.test_labels, classes, "test", opt.jpeg)
            rows = [{"file": f"train/{names[row]}"} for row in np.flatnonzero(~is_clean)]
            write_together({listed: csv_writer(rows) if rows else text_writer("file\n")})
    except BaseException:  # the two come together, or not at all
        listed.unlink(missing_ok=True)
        raise
    print(
        f"{shown(out)} holds {len(labels)} training images, {(~is_clean).sum()} of them poisoned, and {len(dataset.test_labels)} for tests"
    )


if __name__ == "__main__":
    run_script(main)
