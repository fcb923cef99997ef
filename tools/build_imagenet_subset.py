"""Make dataset/sub-imagenet-200/{train,val} from your copy of ImageNet (ILSVRC 2012) and a list of 200 class ids.

DIR must hold train/<class id>/*.JPEG and val/<class id>/*.JPEG. Files are linked, or copied with --copy. It can be run
again: what is there already stays.
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


def place(source, target, copy):
    """Link or copy one file, whole or not at all; leave one that is there. Returns whether it was new."""
    if target.is_file():
        return False
    if copy:
        with atomic_write(target) as file, open(source, "rb") as original:
            shutil.copyfileobj(original, file)
    else:
        target.unlink(missing_ok=True)  # a link whose file has moved
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
    new = count = 0
    for split, name, folder in tqdm(folders, "classes", disable=None):
        target = make_folder(opt.out.absolute() / split / name, "--out")
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
                new += place(file, target / file.name, opt.copy)
                count += 1
    print(f"{shown(opt.out)} holds {count} images of {len(ids)} classes, {new} of them new")


if __name__ == "__main__":
    run_script(main)
