"""Reading data sets from disk: the bundled one, image folders, torchvision's files, streamed ones, and the user's own."""

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torchvision

from utils import own_data
from utils.datasets import DATASETS, Dataset
from utils.errors import UserError, nearest_existing, require_folder
from utils.files import BROKEN, atomic_write, load_npz
from utils.images import (
    StreamedImages,
    broken_files,
    decode,
    in_threads,
    list_images,
    listing_digest,
    tell_broken,
    whole_rows,
)
from utils.paths import ROOT, python, quoted


def load_dataset(name, data_root, strict=False, image_size=None, cache=None):
    """Load a data set by its name in `DATASETS`; data of the user's own by `own_data`.

    An image folder ``<data_root>/<name>/{train,test}/<class>/*`` comes first; CIFAR and GTSRB are else taken from
    torchvision's files there, and downloaded by torchvision where there are none. Tiny-ImageNet may have the layout in
    which it is handed out. ``imagenet`` is ``<data_root>/sub-imagenet-200/{train,val}`` and is not held in memory; any
    number of classes is taken there. ``fashion`` comes with the repository.

    Args:
        name, data_root: which data set, where; strict: refuse a broken file of a streamed data set, not skip it;
        image_size, cache: side in pixels and folder for decoded images, for data of the user's own.

    Returns:
        A `Dataset`.

    Raises:
        UserError: where the files are missing, broken, cannot be read, or are not those of this data set.
    """
    try:
        return _load(name, data_root, strict, image_size, cache)
    except OSError as error:
        place = error.filename or data_root
        raise UserError(
            f"cannot read {place}: {error.strerror or error}; see --data_root and the access to it"
        ) from None


def _load(name, data_root, strict, image_size, cache):
    spec = DATASETS[name]
    if spec.own:
        return own_data.load(name, Path(data_root), spec, strict, image_size, cache)
    folder = Path(data_root) / (spec.folder or name)
    if name == "fashion":
        return _load_fashion(folder, spec)
    if spec.streamed:
        return _load_streamed(name, folder, spec, strict)
    if (folder / "train").is_dir():
        return _load_image_folder(name, folder, spec)
    if name in TORCHVISION:
        return _load_torchvision(name, folder, spec)
    raise UserError(
        f"{name} is not under {folder}: unpack it there, as {folder}/train/<class>/* and {folder}/{spec.test}/<class>/*, "
        f"or choose another --data_root. Nearest existing path: {nearest_existing(folder)}"
    )


def _load_fashion(folder, spec):
    path = folder / "fashion.npz"
    if not path.is_file():
        require_folder(folder.parent, "fashion is bundled, so leave --data_root out")
        path = ROOT / "dataset/fashion/fashion.npz"
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        arrays = dict(zip(keys, load_npz(path, keys, 1 << 30), strict=True))
        for split in ("train", "test"):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.shape != (len(images),):
                raise ValueError(f"its {split} set is {images.dtype} {images.shape} with labels {labels.shape}")
            if not np.isin(labels, range(spec.num_classes)).all():
                raise ValueError(f"its {split} labels are not 0 to {spec.num_classes - 1}")
    except BROKEN as error:
        raise UserError(
            f"cannot read the bundled data {path} ({error}); make it with: "
            f"{python('tools/build_fashion.py')} --overwrite --out {quoted(path)}"
        ) from None
    for split in ("train", "test"):
        grey = np.pad(arrays[f"{split}_images"], ((0, 0), (2, 2), (2, 2)))
        arrays[f"{split}_images"] = np.repeat(grey[..., None], 3, axis=3)
        arrays[f"{split}_labels"] = arrays[f"{split}_labels"].astype(np.int64)
    classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    return Dataset("fashion", spec, classes, source="bundled", **arrays)


TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "gtsrb": "GTSRB"}


def _load_torchvision(name, folder, spec):
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    made = []
    try:
        made += [place for place in (folder / name, folder, *folder.parents) if not place.exists()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an alignment that old torchvision files carry
            if name == "gtsrb":
                parts = [kind(folder, split=split, download=True) for split in ("train", "test")]
                # torchvision has no public name for its list of files, which spares decoding them at each start
                pairs = [[(os.fspath(file), label) for file, label in part._samples] for part in parts]
            else:
                parts = [kind(folder, train=split, download=True) for split in (True, False)]
    except (OSError, RuntimeError) as error:
        for place in made:  # torchvision makes them before it downloads
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        raise UserError(
            f"{name} is not under {folder} and could not be downloaded; put an image folder "
            f"{folder}/{{train,test}}/<class>/*.png there, or the files of torchvision.datasets.{TORCHVISION[name]}, "
            f"or choose another --data_root. Nearest existing path: {nearest_existing(folder)} ({error})"
        ) from None
    if name == "gtsrb":
        classes = [str(label) for label in range(spec.num_classes)]
        images = [
            _decode_cached(folder, split, [file for file, _ in part], spec)
            for split, part in zip(("train", "test"), pairs, strict=True)
        ]
        labels = [np.asarray([label for _, label in part], dtype=np.int64) for part in pairs]
    else:
        classes, images = parts[0].classes, [part.data for part in parts]
        labels = [np.asarray(part.targets, dtype=np.int64) for part in parts]
    return Dataset(name, spec, classes, images[0], labels[0], images[1], labels[1], "torchvision")


def _load_image_folder(name, folder, spec):
    classes, arrays = None, {}
    for split, place in (("train", folder / "train"), ("test", _test_folder(folder, spec))):
        files, labels, names = _list_split(place, classes)
        classes = _same_classes(place, names, classes)
        arrays[f"{split}_images"] = _decode_cached(folder, split, files, spec)
        arrays[f"{split}_labels"] = labels
    if len(classes) != spec.num_classes:
        raise UserError(
            f"{folder}/train holds {len(classes)} classes, {name} has {spec.num_classes}; wrong folder or --dataset?"
        )
    return Dataset(name, spec, classes, source="image folder", **arrays)


def _same_classes(place, names, classes):
    """The class folders ``names`` of a split ``place``; a `UserError` where they are not ``classes``, those under train, if that is
    not None."""
    odd = sorted({*names} ^ {*(classes or names)})
    if odd:
        raise UserError(
            f"{place} must have the same class folders as train; {len(odd)} are in one of them alone, the first is {odd[0]!r}"
        )
    return names


def _test_folder(folder, spec):
    """The folder of the test images: under the name the data set usually has, else ``test`` or ``val``."""
    for name in (spec.test, "test", "val"):
        if (folder / name / "val_annotations.txt").is_file() or (folder / name).is_dir():
            return folder / name
    return folder / spec.test


def _list_split(folder, classes):
    """`list_images`, or Tiny-ImageNet's own layout: ``images/`` with ``val_annotations.txt`` beside it."""
    listing = folder / "val_annotations.txt"
    if not listing.is_file():
        return list_images(folder)
    number = {name: label for label, name in enumerate(classes)}
    try:
        rows = [line.split("\t")[:2] for line in listing.read_text().splitlines() if line.strip()]
        labels = [number[name] for _, name in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{listing} does not name a file and one of the classes under train a line ({error})") from None
    return [os.path.join(folder, "images", file) for file, _ in rows], np.asarray(labels, dtype=np.int64), classes


def _load_streamed(name, folder, spec, strict):
    if not (folder / "train").is_dir():
        builder = f"{python('tools/build_imagenet_subset.py')} --imagenet DIR --out {quoted(folder)}"
        raise UserError(
            f"no folder {folder / 'train'}; make it from your copy of ImageNet with: {builder}. "
            f"Nearest existing path: {nearest_existing(folder)}"
        )
    parts, classes = [], None
    for split, place in (("train", folder / "train"), ("test", _test_folder(folder, spec))):
        files, labels, names = list_images(place)
        classes = _same_classes(place, names, classes)
        broken = broken_files(folder, files, folder / f".checked_{split}.json", f"checking {split}")
        tell_broken(broken, len(files), place, strict)
        whole = whole_rows(folder, files, broken)
        empty = np.flatnonzero(np.bincount(labels[whole], minlength=len(classes)) == 0)
        if len(empty):
            raise UserError(
                f"{place}: the class {classes[empty[0]]!r} has no image that can be read; mend it or take it out"
            )
        parts += [StreamedImages([files[row] for row in whole], spec.size), labels[whole]]
    if len(classes) < 2:
        raise UserError(f"{folder} holds one class; an attack, and telling clean from poisoned, need two or more")
    if len(classes) != spec.num_classes:
        print(f"{folder} holds {len(classes)} classes (the paper's subset has {spec.num_classes})")
        spec = replace(spec, num_classes=len(classes))
    return Dataset(name, spec, classes, *parts, "image folder, streamed")


def _decode_cached(folder, split, files, spec):
    """Decode ``files`` to uint8 (N, size, size, 3), once: the array is kept beside the folder until a file changes."""
    digest = listing_digest(folder, files)
    cache = folder / f".decoded_{split}_{spec.size}.npz"
    shape = (len(files), spec.size, spec.size, 3)
    try:
        images, kept = load_npz(cache, ("images", "digest"), math.prod(shape) + 4096)
        if str(kept) == digest and (images.dtype, images.shape) == (np.uint8, shape):
            return images
    except BROKEN:
        pass  # no cache, or not one of ours: decode again
    images = np.stack(in_threads(lambda file: decode(file, spec.size, spec.resize), files, f"decoding {split}"))
    try:
        with atomic_write(cache) as file:
            np.savez(file, images=images, digest=digest)
    except UserError as error:
        print(f"The decoded images are not cached: {error}")
    return images
