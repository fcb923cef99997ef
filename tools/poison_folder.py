"""Make a folder of images, some of them poisoned, for audit_dataset.py to find: OUT/{train,test}/<class>/*.png from a data set
with one of this project's attacks.

Which files carry the trigger goes to OUT_poisoned.csv beside the folder, which no step reads.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import args
from utils.dataloader_bd import poison_training_set
from utils.errors import UserError, run_script
from utils.files import csv_writer, new_folder, write_together
from utils.paths import shown
from utils.seeding import generator


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    parser.set_defaults(dataset="fashion", target_label=8)
    parser.add_argument("--images", type=args.positive_int, help="training images, drawn by the seed; default: all")
    parser.add_argument("--clean", action="store_true", help="poison none")
    parser.add_argument("--out", type=args.path, required=True, help="folder to make")
    return parser


def write_split(folder, images, labels, classes, title):
    """Write images uint8 (N, H, W, 3) as <folder>/<class>/<row>.png; return their names below ``folder``."""
    for name in classes:
        (folder / name).mkdir(parents=True)
    names = [f"{classes[label]}/{row:06d}.png" for row, label in enumerate(labels)]
    for name, image in zip(tqdm(names, title, disable=None), images, strict=True):
        Image.fromarray(image).save(folder / name)
    return names


def main(argv=None):
    opt = args.parse(get_parser(), argv)
    dataset = args.load_data(opt)
    if dataset.spec.streamed or dataset.spec.own:
        raise UserError(
            f"--dataset {opt.dataset} is not held in memory, or your own; take cifar10, cifar100 or fashion"
        )
    out = opt.out.absolute()
    if out.exists():
        raise UserError(f"{shown(out)} is there already; give --out a new name")
    if opt.images and opt.images < len(dataset.train_labels):
        rows = np.sort(generator(opt.seed, "images of a folder").permutation(len(dataset.train_labels))[: opt.images])
        dataset = replace(dataset, train_images=dataset.train_images[rows], train_labels=dataset.train_labels[rows])
    images, labels, is_clean = (
        dataset.train_images,
        dataset.train_labels,
        np.ones(len(dataset.train_labels), dtype=bool),
    )
    if not opt.clean:
        poisoned = poison_training_set(dataset, opt)
        images, labels, is_clean = poisoned.images, poisoned.labels, poisoned.is_clean
    classes = [name.replace("/", " or ") for name in dataset.classes]
    with new_folder(out) as staging:
        names = write_split(staging / "train", images, labels, classes, "train")
        write_split(staging / "test", dataset.test_images, dataset.test_labels, classes, "test")
        rows = [{"file": f"train/{names[row]}"} for row in np.flatnonzero(~is_clean)]
        write_together({out.with_name(f"{out.name}_poisoned.csv"): csv_writer(rows or [{"file": ""}])})
    print(
        f"{shown(out)} holds {len(labels)} training images, {(~is_clean).sum()} of them poisoned, and {len(dataset.test_labels)} for tests"
    )


if __name__ == "__main__":
    run_script(main)
