"""Data sets as plain uint8 arrays; nothing here knows of attacks or options."""

import hashlib
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError, nearest_existing
from utils.files import atomic_write
from utils.paths import ROOT

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Spec:
    """What a data set looks like: class count, image side in pixels, channel means and standard deviations in [0, 1],
    horizontal flip and rotation (degrees) of its usual augmentation(paper appendix, authors' loaders)."""

    num_classes: int
    size: int
    mean: tuple
    std: tuple
    flip_relearn: bool  # whether unlearning and relearning flip images, as the authors do for CIFAR-10 alone
    rotation: float = 0


DATASETS = {
    "cifar10": Spec(10, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), True),
    "cifar100": Spec(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), False, rotation=15),
    # Mean and standard deviation of the 10 000 bundled training images after padding.
    "fashion": Spec(10, 32, (0.2195, 0.2195, 0.2195), (0.3327, 0.3327, 0.3327), False),
}


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, H, W, 3), labels int64 (N,), training and test; ``classes`` are the names in label order."""

    name: str
    spec: Spec
    classes: list
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str


def load_dataset(name, data_root):
    """Load a data set by its name in `DATASETS`.

    CIFAR is looked for as torchvision's files, then as an image folder ``<data_root>/<name>/{train,test}/<class>/*``,
    and is downloaded by torchvision where there is neither. ``fashion`` comes with the repository.

    Returns:
        A `Dataset`.

    Raises:
        UserError: where the files are missing, broken, or not those of this data set.
    """
    folder = Path(data_root) / name
    spec = DATASETS[name]
    if name == "fashion":
        return _load_fashion(folder, spec)
    if (folder / "train").is_dir():
        return _load_image_folder(name, folder, spec)
    return _load_torchvision(name, folder, spec)


def _load_fashion(folder, spec):
    path = folder / "fashion.npz"
    if not path.is_file():
        path = ROOT / "dataset/fashion/fashion.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read the bundled data {path} ({error}); make it with: python tools/build_fashion.py"
        ) from None
    for split in ("train", "test"):
        grey = np.pad(arrays[f"{split}_images"], ((0, 0), (2, 2), (2, 2)))
        arrays[f"{split}_images"] = np.repeat(grey[..., None], 3, axis=3)
        arrays[f"{split}_labels"] = arrays[f"{split}_labels"].astype(np.int64)
    classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
    return Dataset("fashion", spec, classes, source="bundled", **arrays)


def _load_torchvision(name, folder, spec):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    advice = (
        f"{name} is not under {folder} and could not be downloaded; put an image folder "
        f"{folder}/{{train,test}}/<class>/*.png there, or the files of torchvision.datasets.{kind.__name__}, "
        f"or choose another --data_root. Nearest existing path: {nearest_existing(folder)}"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of an alignment that old torchvision files carry
            train, test = (kind(folder, train=split, download=True) for split in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{advice} ({error})") from None
    labels = [np.asarray(part.targets, dtype=np.int64) for part in (train, test)]
    return Dataset(name, spec, train.classes, train.data, labels[0], test.data, labels[1], "torchvision")


def _load_image_folder(name, folder, spec):
    classes = None
    arrays = {}
    for split in ("train", "test"):
        files, labels, names = _list_images(folder / split)
        if classes not in (None, names):
            raise UserError(f"{folder}: the classes under train and test differ: {classes} and {names}")
        classes = names
        arrays[f"{split}_images"] = _decode_cached(folder, split, files, spec.size)
        arrays[f"{split}_labels"] = labels
    if len(classes) != spec.num_classes:
        raise UserError(
            f"{folder}/train holds {len(classes)} classes, {name} has {spec.num_classes}; wrong folder or --dataset?"
        )
    return Dataset(name, spec, classes, source="image folder", **arrays)


def _list_images(folder):
    """Files of ``folder/<class>/*`` sorted by class and name, their labels (int64) and the class names."""
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder} with one folder of images a class. Nearest existing path: {nearest_existing(folder)}"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"the class folder {folder / name} holds no .png or .jpg file")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{folder} holds no class folders with images")
    return files, np.asarray(labels, dtype=np.int64), names


def _decode_cached(folder, split, files, size):
    """Decode ``files`` to uint8 (N, size, size, 3), once: the array is kept beside the folder until a file changes."""
    listing = "\n".join(
        f"{path.relative_to(folder)} {(stat := path.stat()).st_size} {stat.st_mtime_ns}" for path in files
    )
    digest = hashlib.sha256(listing.encode()).hexdigest()
    cache = folder / f".decoded_{split}_{size}.npz"
    try:
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["digest"]) == digest:
                return stored["images"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # no cache, or not one of ours: decode again

    def decode(path):
        try:
            with Image.open(path) as image:
                if image.size != (size, size):
                    raise UserError(
                        f"{path} is {image.size[0]}x{image.size[1]} pixels; this data set has {size}x{size}"
                    )
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {path} ({error}); remove or replace it") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(decode, files), f"decoding {split}", len(files), unit=" images", disable=None)
        images = np.stack(list(progress))
    try:
        with atomic_write(cache) as file:
            np.savez(file, images=images, digest=digest)
    except UserError as error:
        print(f"The decoded images are not cached: {error}")
    return images
