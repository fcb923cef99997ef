"""Image files: found, decoded, checked once, and read when they are needed."""

import hashlib
import os
import stat
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.device import cores
from utils.errors import UserError, nearest_existing
from utils.files import read_json, write_json

# A small file can claim to be an image of any size: above Image.MAX_IMAGE_PIXELS (89 million) it is not opened.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# What Pillow's readers raise of a broken file, whatever its name says it is.
UNREADABLE = (
    OSError, MemoryError, SyntaxError, ValueError, RuntimeError, ArithmeticError, AttributeError, LookupError, TypeError, EOFError,
    struct.error, Image.DecompressionBombWarning, Image.DecompressionBombError,
)  # fmt: skip
# Bytes; a JPEG of 64x64 pixels has some 2 000. Two threads take 1.3 to 2 times the processor time of one for images of 32x32
# pixels, and 16 of them, on 16 cores, took 50 s for CIFAR-10's 60 000; from 256x256 on threads cost nothing.
SMALL = 4096
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
# Whatever a suffix says: of an EPS Pillow would start Ghostscript. JPEG includes MPO, which cameras write.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP", "TIFF", "GIF")


class StreamedImages:
    """Image files that stand where an array uint8 (N, H, W, 3) stands: indexing decodes, and resizes to H = W.

    Args:
        files: paths of the images; size: side in pixels.
    """

    decodes = True  # reading them is work for many processes

    def __init__(self, files, size):
        self.files, self.size = np.asarray([os.fspath(file) for file in files]), size

    @property
    def shape(self):
        return (len(self.files), self.size, self.size, 3)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        """uint8 (n, H, W, 3) of the chosen rows (a slice, indices or a mask)."""
        files = self.files[rows]
        images = np.empty((len(files), self.size, self.size, 3), dtype=np.uint8)
        for place, file in enumerate(files):
            images[place] = decode(file, self.size, resize=True)
        return images

    def subset(self, rows):
        """The chosen rows, not decoded yet."""
        return StreamedImages(self.files[rows], self.size)

    def names(self):
        """The folder it lies in, name and size in bytes of every file, a line each, as bytes."""
        lines = ("{1}/{2} {0}".format(os.path.getsize(file), *file.split(os.sep)[-2:]) for file in self.files)
        return "\n".join(lines).encode(errors="surrogateescape")


def rows_of(images, rows):
    """The chosen rows (int64) of images, an array or streamed ones, which are not decoded by this."""
    return images[rows] if isinstance(images, np.ndarray) else images.subset(rows)


def list_images(folder):
    """Files of ``folder/<class>/*`` (or ``folder/<class>/images/*``) sorted by class and name, their labels (int64) and
    the class names. The files are paths as text: 60 000 of class Path take seconds, in every step (Python 3.12)."""
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder} with one folder of images a class. Nearest existing path: {nearest_existing(folder)}"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files, labels = [], []
    for label, name in enumerate(names):
        inner = folder / name / "images"
        found = (_images_in(inner) if os.path.isdir(inner) else []) or _images_in(folder / name)
        if not found:
            raise UserError(f"the class folder {folder / name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{folder} holds no class folders with images")
    return files, np.asarray(labels, dtype=np.int64), names


def _images_in(folder):
    inside = sorted(file for file in os.listdir(folder) if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES)
    return [os.path.join(folder, file) for file in inside]


def open_image(path):
    """An image file (path), opened by Pillow and not read yet. Raises one of `UNREADABLE` where it is none."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")  # a pipe would be waited for
    path = os.fspath(path)  # a Path is resolved by older Pillows, which links in a circle stop
    return Image.open(path, formats=FORMATS)


def decode(path, size, resize):
    """Decode an image file to uint8 (size, size, 3); grey, palette and transparent images become RGB, of grey of 16 bits the
    upper eight are taken.

    Args:
        path: the file; size: side in pixels; resize: whether another size is resized (bilinear) or refused.

    Raises:
        UserError: for a file that is no image, damaged, or of another size.
    """
    try:
        with open_image(path) as image:
            image = eight_bits(image)
            if image.size == (size, size):
                return np.asarray(image.convert("RGB"))
            if not resize:
                raise UserError(f"{path} is {image.size[0]}x{image.size[1]} pixels; this data set has {size}x{size}")
            image.draft("RGB", (size, size))  # a JPEG is then decoded at a fraction of its size
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except UNREADABLE as error:
        raise UserError(f"cannot read the image {path} ({error}); remove or replace it") from None


def eight_bits(image):
    """An opened image that Pillow converts to RGB as it is meant: one of 16 bits in 8, for Pillow takes all above 255 for white."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # of the direct way Pillow warns
    if not image.mode.startswith(("I", "F")):
        return image
    # Pillow makes numbers of 32 bits of a PGM's, which it scales to 0 to 65535, and before 10.3 of a PNG's.
    if not image.mode.startswith("I;16") and (image.mode, image.format) not in {("I", "PPM"), ("I", "PNG")}:
        raise ValueError(f"its pixels are numbers of 32 bits (mode {image.mode}), of which nobody knows what is white")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def in_threads(function, files, title):
    """``function`` of every file, in order, with a progress bar where there is a ``title``. Small files are read one
    after the other: decoding them is mostly Python, for which threads wait for each other."""
    with ThreadPoolExecutor(cores()) as pool:
        results = (map if _small(files) else pool.map)(function, files)
        return list(tqdm(results, title, len(files), unit=" images", disable=None if title else True))


def _small(files):
    """Whether the first of ``files`` have less than `SMALL` bytes on average."""
    sizes = [os.path.getsize(file) for file in files[:100] if os.path.isfile(file)]
    return sum(sizes) < SMALL * len(sizes)


def broken_files(folder, files, cache, title):
    """Names (relative to ``folder``) of the ``files`` that cannot be decoded; all are tried once, with the result in
    ``cache`` (path of a JSON file), and again when one changes, or one that could not be decoded can."""

    def fails(file):
        try:
            decode(file, 32, resize=True)
        except UserError:
            return name_below(folder, file)

    digest = listing_digest(folder, files)
    known = known_of(cache, digest)
    remembered = known is not None and isinstance(known.get("broken"), list)
    # Such a file may be readable by now, or the disk be well again, of which the listing tells nothing.
    if remembered and all(fails(os.path.join(folder, name)) for name in known["broken"]):
        return known["broken"]

    broken = [file for file in in_threads(fails, files, title) if file]
    try:
        write_json(cache, {"digest": digest, "broken": broken})
    except UserError as error:
        print(f"The check is not remembered: {error}")
    return broken


def whole_rows(folder, files, broken):
    """int64: the places of the ``files`` that are not named in ``broken``."""
    broken = set(broken)
    return np.asarray([row for row, file in enumerate(files) if name_below(folder, file) not in broken], dtype=np.int64)


def tell_broken(broken, count, place, strict):
    """Say which of the ``count`` images in the folder ``place`` cannot be read; with ``strict`` as a `UserError`."""
    if not broken:
        return
    shown = ", ".join(sorted(broken)[:5]) + (" and more" if len(broken) > 5 else "")
    if strict:
        raise UserError(f"{len(broken)} of the images in {place} cannot be read: {shown}; remove or replace them")
    print(f"Warning: {len(broken)} of {count} images in {place} cannot be read and are skipped: {shown}")


def known_of(cache, digest):
    """What the JSON file ``cache`` holds of the listing ``digest``, or None."""
    try:
        known = read_json(cache) or {}
    except UserError:
        return None  # damaged: look again
    return known if known.get("digest") == digest else None


def name_below(folder, file):
    """The path ``file`` (text), as seen from the ``folder`` it was found in: what `os.path.relpath` gives, without its asking for
    the current folder twice a file, of which there are many."""
    return file.removeprefix(os.path.join(folder, ""))


def listing_digest(folder, files):
    """Tells whether a file was added, removed or changed since the last time."""

    def state(path):
        try:
            found = os.stat(path)
        except OSError:
            return "missing"  # such as a link whose file has moved; decoding it will say so
        return f"{found.st_size} {found.st_mtime_ns}"

    listing = "\n".join(f"{name_below(folder, file)} {state(file)}" for file in files)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
