"""What data sets look like: their specifications, and the one in memory as plain uint8 arrays, or as images decoded when they
are asked for. Nothing here knows of attacks or options; `loading` reads them."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from utils.errors import UserError
from utils.images import StreamedImages, rows_of
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
SPLITS = ("train", "test", "val")  # folders that a folder of the user's own may have
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
