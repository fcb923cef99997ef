"""Data of the user's own: a folder of images, or arrays in an ``.npz`` file. Nobody knows what in it is poisoned."""

import hashlib
import os
import zipfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from utils.datasets import Dataset
from utils.errors import UserError, nearest_existing
from utils.files import BROKEN, atomic_write, load_npz, make_folder, sha256, write_json
from utils.images import (
    UNREADABLE,
    StreamedImages,
    broken_files,
    decode,
    in_threads,
    known_of,
    list_images,
    listing_digest,
    name_below,
    open_image,
    tell_broken,
    whole_rows,
)

STORED = 64  # images up to this side are decoded once, into a file; larger ones whenever they are needed
ARRAY_LIMIT = 1 << 34  # bytes that an array of an .npz file may unpack to


class StoredImages(StreamedImages):
    """`StreamedImages` that were decoded into one file; reading rows of it takes no memory that grows with the folder.

    Args:
        files, size: as there; store: the file, open: uint8 (n, size, size, 3) without a header; rows: int64, the place
        of each image in it; digest: of the file.
    """

    decodes = False

    def __init__(self, files, size, store, rows, digest):
        super().__init__(files, size)
        self.store, self.rows, self.digest = store, rows, digest

    def __getitem__(self, rows):
        """uint8 (n, H, W, 3) of the chosen rows (a slice, indices or a mask)."""
        try:  # mapped for this one time, so that what was read does not stay in memory
            stored = np.memmap(self.store, np.uint8, "r").reshape(-1, self.size, self.size, 3)
            return stored[self.rows[rows]]
        except (OSError, ValueError, IndexError):
            raise UserError(f"{self.store.name} has been cut short; run this again, it is made anew") from None

    def subset(self, rows):
        """The chosen rows, not read yet."""
        return StoredImages(self.files[rows], self.size, self.store, self.rows[rows], self.digest)

    def names(self):
        """As of streamed images, and what the files decode to."""
        return super().names() + self.digest.encode()


def load(name, root, spec, strict, image_size, cache):
    """The user's data as a `datasets.Dataset`.

    Args:
        name: ``folder``, where ``root`` is DIR with DIR/train/<class>/* and, if there are test images, DIR/test/<class>/*
        or DIR/val/<class>/*; or ``npz``, where it is a file with x_train, y_train and, if there are any, x_test, y_test:
        uint8 (N, H, W, 3) or (N, H, W), and integers (N,) from 0.
        spec: of `datasets.DATASETS`; strict: refuse broken files, not skip them; image_size: side in pixels to which
        every image is made, or None: 32 where the median side is below 48, 64 below 100, else 224.
        cache: folder for the decoded images; the user's own is not written to.

    Returns:
        A `Dataset`; of a folder with `StreamedImages`.

    Raises:
        UserError: where the data is missing or not such data.
    """
    if name == "npz":
        return _load_npz(root, spec, image_size)
    return _load_folder(root, spec, strict, image_size, cache)


def usual_size(median):
    """The side in pixels that images of a median side are made to."""
    return 32 if median < 48 else 64 if median < 100 else 224


def _finish(spec, size, classes):
    if len(classes) < 2:
        raise UserError(f"there is one class, {classes[0]!r}; to tell clean from poisoned samples takes two or more")
    return replace(spec, num_classes=len(classes), size=size, padding=size // 8)


# A folder


def tell_left_out(root, places, parts):
    """Say how many files below ``places`` (folders) no class takes: of other kinds, or deeper than images are looked for. parts:
    {split: (files, ...)}, those that are taken."""
    taken = {os.fspath(file) for files, *_ in parts.values() for file in files}
    others = [
        os.path.join(folder, name)
        for place in places
        for folder, inner, names in os.walk(place)
        for name in names
        if not name.startswith(".") and os.path.join(folder, name) not in taken
    ]
    if others:
        named = ", ".join(os.path.relpath(file, root) for file in sorted(others)[:3])
        named += ", ..." if len(others) > 3 else ""
        print(f"Note: {len(others)} files are left out, for they are no images by their names, lie in a hidden folder (.name), or "
              f"not in <class>/ or <class>/images/ as the others of their class do: {named}")  # fmt: skip


def _load_folder(root, spec, strict, image_size, cache):
    if not (root / "train").is_dir():
        raise UserError(
            f"no folder {root / 'train'}; --data_root must hold train/<class>/* and may hold test/<class>/*. Nearest existing "
            f"path: {nearest_existing(root / 'train')}"
        )
    try:
        parts = {"train": list_images(root / "train")}
        classes = parts["train"][2]
        place = next((root / split for split in ("test", "val") if _has_something(root / split)), None)
        if place:
            parts["test"] = _in_classes(list_images(place), classes, place)
    except OSError as error:
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from None

    tell_left_out(root, [place for place in (root / "train", place) if place], parts)
    cache = make_folder(cache / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16])
    size = image_size or _median_size(root, parts["train"][0], cache)
    arrays, skipped, places = {}, [], {"train": root / "train", "test": place}
    for split, (files, labels, _) in parts.items():
        images, kept, broken = (_stored if size <= STORED else _streamed)(root, split, files, size, cache)
        tell_broken(broken, len(files), places[split], strict)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[kept]}
        skipped += broken
    count = np.bincount(arrays["train_labels"], minlength=len(classes))
    if not count.all():
        raise UserError(f"no image of the class {classes[count.argmin()]!r} under {root / 'train'} can be read")
    if "test" not in parts:
        arrays |= {"test_images": StreamedImages([], size), "test_labels": np.empty(0, dtype=np.int64)}
    spec = _finish(spec, size, classes)
    return Dataset("folder", spec, classes, source=os.fspath(root), skipped=tuple(skipped), **arrays)


def _has_something(folder):
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def _in_classes(part, classes, place):
    """The test part with the numbers that the training classes have."""
    files, labels, names = part
    foreign = sorted(set(names) - set(classes))
    if foreign:
        raise UserError(f"{place} has the class {foreign[0]!r}, which is not under train")
    return files, np.asarray([classes.index(name) for name in names], dtype=np.int64)[labels], classes


def _median_size(root, files, cache):
    """The side for these files, by the median of their shorter sides; looked up once, until a file changes."""
    digest, record = listing_digest(root, files), cache / "sizes.json"
    known = known_of(record, digest)
    if known is None or not isinstance(known.get("median"), (int, float)):

        def side(file):
            try:
                with open_image(file) as image:
                    return min(image.size)
            except UNREADABLE:
                return None  # skipped, when it is decoded

        sides = [found for found in in_threads(side, files, "measuring") if found]
        if not sides:
            raise UserError(f"none of the {len(files)} images under {root / 'train'} can be read")
        known = {"digest": digest, "median": float(np.median(sides)), "images": len(sides)}
        write_json(record, known)
    size = usual_size(known["median"])
    print(
        f"Images are made {size}x{size}, for their median side is {known['median']:g} pixels (--image_size changes it)"
    )
    return size


def _stored(root, split, files, size, cache):
    """(`StoredImages`, the places of the files that can be read, the names of the others). Decodes them where that has not
    been done, and removes what was decoded of the folder as it was before."""
    digest, length = listing_digest(root, files), size * size * 3
    store, record = (cache / f"{split}_{size}_{digest[:16]}.{kind}" for kind in ("bin", "json"))
    known = known_of(record, digest)

    def attempt(file):
        try:
            return decode(file, size, resize=True)
        except UserError:
            return None

    if (
        not known
        or not isinstance(known.get("broken"), list)
        or not store.is_file()
        or store.stat().st_size != len(files) * length
        or any(attempt(os.path.join(root, name)) is not None for name in known["broken"])
    ):
        broken = []
        with atomic_write(store) as target:
            bar = tqdm(total=len(files), desc=f"decoding {split}", unit=" images", disable=None, leave=False)
            for start in range(0, len(files), 1024):  # a part at a time, so that memory does not grow
                some = files[start : start + 1024]
                for file, image in zip(some, in_threads(attempt, some, None), strict=True):
                    broken += [name_below(root, file)] if image is None else []
                    target.write(bytes(length) if image is None else image.tobytes())
                bar.update(len(some))
            bar.close()
        known = {"digest": digest, "broken": broken, "sha256": sha256(store)}
        write_json(record, known)
        for left in set(cache.glob(f"{split}_{size}[_.]*")) - {store, record}:
            with suppress(OSError):  # a run that reads it has it open, so it loses nothing
                left.unlink()
    kept = whole_rows(root, files, known["broken"])
    try:
        file = open(store, "rb")  # noqa: SIM115, as long as the images are there
    except OSError as error:
        raise UserError(f"cannot read {store}: {error.strerror}; run this again, it is made anew") from None
    return StoredImages([files[row] for row in kept], size, file, kept, known["sha256"]), kept, known["broken"]


def _streamed(root, split, files, size, cache):
    """As `_stored`, for images that are decoded whenever they are needed; each is tried once."""
    broken = broken_files(root, files, cache / f"{split}_checked.json", f"checking {split}")
    kept = whole_rows(root, files, broken)
    return StreamedImages([files[row] for row in kept], size), kept, broken


# Arrays


def _load_npz(path, spec, image_size):
    if not path.is_file():
        raise UserError(
            f"no file {path}; with --dataset npz, --data_root is a file that numpy.savez wrote with x_train, y_train and, if "
            f"there are any, x_test, y_test. Nearest existing path: {nearest_existing(path)}"
        )
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
        splits = ["train", "test"] if {"x_test", "y_test"} & set(held) else ["train"]
        missing = [f"{kind}_{split}" for split in splits for kind in "xy" if f"{kind}_{split}" not in held]
        if missing:
            raise ValueError(f"it has no {missing[0]}, but {', '.join(held[:6]) or 'nothing'}")
        for split in splits:
            arrays[split] = load_npz(path, (f"x_{split}", f"y_{split}"), ARRAY_LIMIT)
            _check(split, *arrays[split])
    except BROKEN as error:
        raise UserError(f"{path} is no .npz file of x_train and y_train that can be read: {error}") from None
    labels = [np.asarray(arrays[split][1], dtype=np.int64).reshape(-1) for split in splits]
    count = np.bincount(labels[0])
    if not count.all() or (len(labels) > 1 and labels[1].size and labels[1].max() >= len(count)):
        raise UserError(f"{path}: the labels must be 0, 1, 2, ... and every class must be among y_train")
    size = image_size or usual_size(min(arrays["train"][0].shape[1:3]))
    if not image_size:
        print(f"Images are {size}x{size} (--image_size changes it)")
    parts = {}
    for split in ("train", "test"):
        x = arrays[split][0] if split in arrays else np.empty((0, size, size, 3), dtype=np.uint8)
        parts[f"{split}_images"] = _to_size(x, size)
    parts["train_labels"] = labels[0]
    parts["test_labels"] = labels[1] if len(labels) > 1 else np.empty(0, dtype=np.int64)
    classes = [str(label) for label in range(len(count))]
    return Dataset("npz", _finish(spec, size, classes), classes, source=os.fspath(path), **parts)


def _check(split, images, labels):
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"x_{split} is {images.dtype} {images.shape}, not uint8 (N, H, W, 3) or (N, H, W)")
    if 0 in images.shape[1:3] or (split == "train" and not len(images)):
        raise ValueError(f"x_{split} is {images.shape}, which holds no image")
    if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
        raise ValueError(f"y_{split} is {labels.dtype} {labels.shape}, not {len(images)} integers")
    if len(labels) and (labels.min() < 0 or labels.max() >= 1 << 20):
        raise ValueError(f"y_{split} goes from {labels.min()} to {labels.max()}; classes are numbered from 0")


def _to_size(images, size):
    """Images uint8 (N, H, W, 3) or (N, H, W) as uint8 (N, size, size, 3), bilinear."""
    images = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)
    if images.shape[1:3] == (size, size) or not len(images):
        return np.ascontiguousarray(images.reshape(len(images), size, size, 3))
    result = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for start in range(0, len(images), 512):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + 512])).permute(0, 3, 1, 2)
        result[start : start + 512] = resize(part, [size, size], antialias=True).permute(0, 2, 3, 1).numpy()
    return result
