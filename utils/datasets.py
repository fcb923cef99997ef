"""Data sets as plain uint8 arrays, or as images decoded when they are asked for; nothing here knows of attacks or
options."""

import hashlib
import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torchvision

from utils.errors import UserError, nearest_existing
from utils.files import BROKEN, atomic_write, load_npz
from utils.images import (
    StreamedImages,
    broken_files,
    decode,
    in_threads,
    list_images,
    listing_digest,
    rows_of,
    tell_broken,
    whole_rows,
)
from utils.paths import ROOT
from utils.seeding import generator


@dataclass(frozen=True)
class Spec:
    """What a data set looks like and how it is usually augmented (paper appendix, authors' loaders). Of data of the user's own,
    nobody knows what is poisoned, and classes and size are found in the data."""

    num_classes: int
    size: int  # side of an image in pixels
    mean: tuple  # of each channel, in [0, 1]
    std: tuple
    flip_relearn: bool = False  # mirror in unlearning and relearning
    rotation: float = 0  # degrees, in training
    padding: int = 4  # pixels, of the random crop in training
    flip: bool = True  # mirror in training
    resize: bool = False  # images of another size (else they are refused)
    streamed: bool = False  # decode images when they are needed (else they are held in memory)
    folder: str = ""  # name, where it is not the data set's
    test: str = "test"  # name of the split for tests
    own: bool = False  # data of the user's own


# Of data of the user's own: the statistics of ImageNet that torchvision's models take.
OWN = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "flip_relearn": True, "resize": True, "own": True}
TINY = {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2302, 0.2265, 0.2262)}  # the authors' for both of ImageNet's sets

DATASETS = {
    "cifar10": Spec(10, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), flip_relearn=True),
    "cifar100": Spec(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), rotation=15),
    # Mean and standard deviation of the 10 000 bundled training images after padding.
    "fashion": Spec(10, 32, (0.2195, 0.2195, 0.2195), (0.3327, 0.3327, 0.3327)),
    # Traffic signs are not mirrored: a left turn would become a right turn.
    "gtsrb": Spec(43, 32, (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669), flip=False, resize=True),
    "tiny": Spec(200, 64, **TINY, padding=8, test="val"),  # the images under its test/ have no labels
    "imagenet": Spec(
        200, 224, **TINY, rotation=20, padding=0, resize=True, streamed=True, folder="sub-imagenet-200", test="val"
    ),
    "folder": Spec(0, 0, **OWN, streamed=True),
    "npz": Spec(0, 0, **OWN),
}


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, H, W, 3), labels int64 (N,), training and test; ``classes`` are the names in label order.

    The images are arrays, or `StreamedImages` where the spec says ``streamed``. ``skipped``: names of files that cannot be
    read. Data of the user's own may have no test images.
    """

    name: str
    spec: Spec
    classes: list
    train_images: "np.ndarray | StreamedImages"
    train_labels: np.ndarray
    test_images: "np.ndarray | StreamedImages"
    test_labels: np.ndarray
    source: str
    skipped: tuple = ()

    @cached_property
    def record(self):
        """What a manifest says of the data: name, source, and of each split size and SHA-256 of the images and labels
        (of streamed ones: of the files' names and sizes, and the labels)."""
        splits = {}
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            digest = hashlib.sha256(labels.astype("<i8").tobytes())
            digest.update(images.names() if self.spec.streamed else np.ascontiguousarray(images))
            splits[split] = {"samples": len(labels), "sha256": digest.hexdigest()}
        return {"name": self.name, "source": self.source, **splits}


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
        from utils import own_data  # which builds on this module

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


def fewer_images(dataset, count):
    """A `Dataset` with ``count`` of the training images: of each of K classes count / K (the first classes one more where
    that is no whole number), the same draw whatever the seed of the steps.

    Raises:
        UserError: where some class has fewer, or would get none.
    """
    labels, classes = dataset.train_labels, dataset.spec.num_classes
    shares = [count // classes + (label < count % classes) for label in range(classes)]
    held = np.bincount(labels, minlength=classes)
    if min(shares) == 0 or any(share > own for share, own in zip(shares, held, strict=True)):
        raise UserError(
            f"--train_images {count}: {dataset.name} has {len(labels)} training images, {held.min()} of its smallest class, "
            f"and each of its {classes} classes must give the same share, at least one"
        )
    order = generator(0, "fewer images").permutation(len(labels))
    rows = np.sort(np.concatenate([order[labels[order] == label][:share] for label, share in enumerate(shares)]))
    source = f"{dataset.source}, {count} of {len(labels)} training images"
    return replace(dataset, train_images=rows_of(dataset.train_images, rows), train_labels=labels[rows], source=source)


def _load_fashion(folder, spec):
    path = folder / "fashion.npz"
    if not path.is_file():
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
            f"cannot read the bundled data {path} ({error}); make it with: python tools/build_fashion.py"
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
        made += [place for place in (folder, *folder.parents) if not place.exists()]
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
        raise UserError(
            f"no folder {folder / 'train'}; make it from your copy of ImageNet with: "
            f"python tools/build_imagenet_subset.py --imagenet DIR. Nearest existing path: {nearest_existing(folder)}"
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
