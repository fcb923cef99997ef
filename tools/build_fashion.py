"""Make the bundled data set: the first 1 000 training and 200 test images of each class of Fashion-MNIST.

    python tools/build_fashion.py --source /usr/share/datasets/fashion-mnist --overwrite

The source is the folder of Debian's package dataset-fashion-mnist, or any folder with the four original
``*-ubyte.gz`` files. Images are kept 28x28 and grey, as they are; ``utils.loading`` pads them.
"""

import gzip
import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import args
from utils.errors import UserError, require_file, run_script
from utils.files import atomic_write, check_outputs, make_folder
from utils.paths import ROOT, shown


def get_parser():
    parser = args.Parser(__doc__)
    source = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--source", type=args.path, default=source, help="folder of the four original files")
    parser.add_argument("--out", type=args.file, default=ROOT / "dataset/fashion/fashion.npz", help="the data set")
    args.add_overwrite_option(parser, "a data set that is there, such as the bundled one")
    return parser


def read_idx(path):
    """Read a gzipped IDX file of bytes: 4-byte magic whose last byte is the number of dimensions, then the sizes."""
    packed = require_file(path, "apt-get install dataset-fashion-mnist").read_bytes()
    try:
        data = gzip.decompress(packed)
        if data[:3] != b"\0\0\x08":
            raise ValueError("its first bytes are others")
        sizes = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path} is not a gzipped IDX file of bytes ({error})") from None


def read_split(source, stem):
    """Images uint8 (N, 28, 28) and labels uint8 (N,) of a split of the original files."""
    images = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
    if images.shape[1:] != (28, 28) or labels.shape != (len(images),) or not len(images):
        raise UserError(
            f"{source} holds for {stem} images {images.shape} and labels {labels.shape}, not (N, 28, 28) and (N,); "
            f"give the folder of the original files with --source"
        )
    return images, labels


def first_of_each_class(images, labels, count):
    """The first ``count`` images of each class, in the order of the original file."""
    keep = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))
    return images[keep], labels[keep]


def main(argv=None):
    opt = get_parser().parse_args(argv)
    check_outputs([opt.out], opt.overwrite)
    arrays = {}
    for split, stem, count in (("train", "train", 1000), ("test", "t10k", 200)):
        images, labels = read_split(opt.source, stem)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = first_of_each_class(images, labels, count)
    make_folder(opt.out.absolute().parent, "--out")
    with atomic_write(opt.out) as file:
        np.savez_compressed(file, **arrays)
    print(f"{shown(opt.out)}: " + ", ".join(f"{name} {array.shape}" for name, array in arrays.items()))


if __name__ == "__main__":
    run_script(main)
