"""Make dataset/sub-imagenet-200/{train,val} from your copy of ImageNet (ILSVRC 2012) and a list of 200 class ids.

DIR must hold train/<class id>/*.JPEG and val/<class id>/*.JPEG. Files are linked, or copied with --copy. It can be run
again: what is there already stays, but for links that lead nowhere, and with --copy all links, which become copies.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from utils import args
from utils.errors import UserError, nearest_existing, run_script
from utils.files import atomic_write, make_folder, read_text
from utils.images import IMAGE_SUFFIXES
from utils.paths import ROOT, shown

CLASSES = Path(__file__).with_name("imagenet_subset_classes.txt")


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--imagenet", type=args.path, required=True, metavar="DIR", help="your copy of ImageNet")
    parser.add_argument("--out", type=args.path, default=ROOT / "dataset/sub-imagenet-200", help="the subset")
    parser.add_argument("--classes", type=args.path, default=CLASSES, help="file with one class id a line")
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking them")
    return parser


def read_classes(path):
    """The class ids (list of str) of a file, one a line; lines that begin with # say something."""
    lines = read_text(path, "git checkout tools/imagenet_subset_classes.txt").splitlines()
    ids = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not ids or len(set(ids)) != len(ids) or any("/" in name or name.startswith(".") for name in ids):
        raise UserError(f"{path} must name each class folder once, one a line")
    return ids


def images_in(folder):
    """What the steps take for images of a folder, by the names (list of `Path`): folders and lost links are among them."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def refuse_others(out, ids, imagenet):
    """Raise a `UserError` where ``out`` has class folders beside ``ids`` (list of str), on which every step would train too, or one
    that is a folder of ``imagenet`` itself."""
    for split in ("train", "val"):
        place = out / split
        found = [entry for entry in place.iterdir() if entry.is_dir()] if place.is_dir() else []
        others = sorted(entry.name for entry in found if entry.name not in ids and not entry.name.startswith("."))
        if others:
            raise UserError(
                f"{shown(place)} holds class folders that are not in --classes: {', '.join(others[:6])}"
                f"{', ...' if len(others) > 6 else ''}; remove them, or give another --out"
            )
        for entry in found:
            if os.path.realpath(entry) == os.path.realpath(imagenet / split / entry.name):
                raise UserError(f"{shown(entry)} is a folder of --imagenet itself; give another --out")


def remove_lost_links(folder):
    """Remove the links of a class folder whose files are gone; return how many. Raises `UserError` for what is no file."""
    lost = [file for file in images_in(folder) if not file.is_file()]
    for file in lost:
        if os.path.exists(file):
            raise UserError(f"{shown(file)} has an image's name and is no file; remove it, or give another --out")
        file.unlink()
    return len(lost)


def place(source, target, copy):
    """Link or copy one file, whole or not at all; leave one that is there, but copy what is linked. Returns whether it was new."""
    if target.is_file() and not (copy and target.is_symlink()):
        return False
    if copy:
        with open(source, "rb") as original:
            target.unlink(missing_ok=True)  # a link, through which would be written else
            with atomic_write(target) as file:
                shutil.copyfileobj(original, file)
    else:
        os.symlink(source.resolve(), target)
    return True


def main(argv=None):
    opt = get_parser().parse_args(argv)
    ids = read_classes(opt.classes)
    folders = [(split, name, opt.imagenet / split / name) for split in ("train", "val") for name in ids]
    missing = [str(folder) for _, _, folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(folders)} class folders are missing, the first is {missing[0]}; --imagenet must hold "
            f"train/<class id> and val/<class id>. Nearest existing path: {nearest_existing(missing[0])}"
        )
    refuse_others(opt.out, ids, opt.imagenet)
    new = count = lost = 0
    for split, name, folder in tqdm(folders, "classes", disable=None):
        target = make_folder(opt.out.absolute() / split / name, "--out")
        lost += remove_lost_links(target)
        new += sum(place(file, target / file.name, opt.copy) for file in images_in(folder) if file.is_file())
        count += len(images_in(target))
    gone = f"; {lost} links that led nowhere are gone" if lost else ""
    print(f"{shown(opt.out)} holds {count} images of {len(ids)} classes, {new} of them new{gone}")


if __name__ == "__main__":
    run_script(main)
