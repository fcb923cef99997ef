"""The test sets, and batches of training images, on the device."""

import copy
import math
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.device import give_freed_memory_back, keep_freed_memory, send
from utils.distributed import part
from utils.errors import UserError
from utils.images import StreamedImages
from utils.poisoning import TriggeredImages, attack_label, paint, painter
from utils.seeding import generator

# Images that a GPU augments at once, for several batches: each operation is a launch, however few images there are.
TOGETHER = 4096


@dataclass(frozen=True)
class TestSets:
    """The two test sets: images uint8 (N, 3, H, W) on the device, or streamed; labels int64 (N,) on the device.

    ``triggered_images`` leaves out the target class for all2one and cleanLabel, whose images the attack has no use for.
    """

    clean_images: "torch.Tensor | StreamedImages"
    clean_labels: torch.Tensor
    in_paper: torch.Tensor | None = None  # int64 (M,): the clean images that the authors count; these are triggered
    triggered_images: "torch.Tensor | TriggeredImages | None" = None
    attack_labels: torch.Tensor | None = None
    true_labels: torch.Tensor | None = None


def make_test_sets(dataset, opt, runtime, attack=True):
    """The `TestSets` of a `Dataset` under the options' attack; without ``attack``, and of data of the user's own, the clean
    one alone. None where there are no test images."""
    labels, attack = dataset.test_labels, attack and not dataset.spec.own
    if not len(labels):
        return None
    clean = [hold(dataset.test_images, runtime), torch.from_numpy(labels).to(runtime.device)]
    if not attack:
        return TestSets(*clean)
    everything = opt.target_type == "all2all"
    rows = np.flatnonzero(everything | (labels != opt.target_label))
    clean.append(torch.from_numpy(rows).to(runtime.device))
    if isinstance(dataset.test_images, StreamedImages):
        everyone = np.ones(len(rows), dtype=bool)
        triggered = TriggeredImages(dataset.test_images.subset(rows), everyone, painter(opt, train=False))
    else:
        triggered = paint(dataset, opt, rows, train=False)
    wanted = attack_label(labels[rows], opt.target_type, opt.target_label, dataset.spec.num_classes)
    return TestSets(
        *clean,
        hold(triggered, runtime),
        torch.from_numpy(wanted).to(runtime.device),
        torch.from_numpy(labels[rows]).to(runtime.device),
    )


def to_device(images, runtime):
    """Images (N, H, W, 3) in memory -> tensor (N, 3, H, W) of their dtype on the device; on a CPU it is the array itself, seen
    another way, unless that cannot be written to."""
    if runtime.device.type == "cpu":
        return torch.from_numpy(np.require(images, requirements="W")).permute(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(runtime.device)


def hold(images, runtime):
    """An array goes to the device whole (see `to_device`); streamed images stay where they are. Where images are decoded as they
    come, that takes the time, and memory is given back instead of kept for the next batch."""
    array = isinstance(images, np.ndarray)
    if runtime.device.type == "cpu":
        (keep_freed_memory if array or not images.decodes else give_freed_memory_back)()
    return to_device(images, runtime) if array else images


def fetch(held, splits, runtime, change=None):
    """Yield the images of each of ``splits`` on the device: uint8 (B, 3, H, W), or what ``change`` makes of them.

    Args:
        held: what `hold` gave; splits: list of int64 tensors (B,), the rows of each batch;
        runtime: a `device.Runtime`, whose ``workers`` processes decode and change streamed images;
        change: ``(images, rows)`` -> images, or None.
    """
    if isinstance(held, torch.Tensor):
        for rows in splits:
            images = held[send(rows, held.device)].contiguous()  # an array on a CPU has its channels last
            yield change(images, rows) if change else images
        return
    loader = DataLoader(
        _Stream(held, splits, change),
        batch_size=None,  # an item is a batch already
        num_workers=workers_that_fit(runtime.workers if held.decodes else 0, held, splits, change),
        pin_memory=runtime.device.type == "cuda",
    )
    try:
        for images in loader:
            if isinstance(images, UserError):
                raise images
            yield images.to(runtime.device, non_blocking=runtime.device.type == "cuda")  # of pinned memory alone
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            "a process that decodes images was ended, most likely for lack of memory; use fewer --workers or a smaller --batch_size"
        ) from None


def workers_that_fit(workers, held, splits, change):
    """How many of ``workers`` processes can hand over their batches; the arguments of `fetch`. They do it in /dev/shm, which in a
    container may be small (64 MB with Docker): full, it would stop them for ever."""
    try:
        place = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # another system than Linux
        return workers
    width = 4 * len(change.tables) if isinstance(change, Views) else 1  # bytes a value, at most
    batch = max(map(len, splits), default=0) * math.prod(held.shape[1:]) * width
    fit = place.f_bavail * place.f_frsize // max(1, 3 * batch)  # two that wait, and one that is made
    if fit < workers:
        _tell_once(
            f"Note: /dev/shm has room for the batches of {fit} processes that decode images, not of {workers}; give the container "
            f"more of it (docker run --shm-size=8g) for speed"
        )
    return min(workers, fit)


_tell_once = lru_cache(print)  # not every epoch


def evaluation_splits(held):
    """Rows of the batches in which all of ``held`` (see `hold`) is only looked at: 250 images, on a GPU 2000, of a side above
    32 pixels as many as take no more memory, but at least 32. A list of int64 tensors; of several processes each has its part."""
    most = 2000 if on_gpu(held) else 250
    return list(part(torch.arange(len(held))).split(max(32, as_many(most, held))))


def as_many(most, held):
    """How many images of ``held`` (see `hold`) take no more memory than ``most`` of a side of 32 pixels; never more than these."""
    return min(most, most * 32**2 // held.shape[2] ** 2)


def on_gpu(held):
    """Whether what `hold` gave is in the memory of another device than the CPU."""
    return isinstance(held, torch.Tensor) and held.device.type != "cpu"


class _Stream(Dataset):
    """Batch number b as item b, for the workers of a DataLoader."""

    def __init__(self, images, splits, change):
        self.images, self.splits, self.change = images, splits, change

    def __len__(self):
        return len(self.splits)

    def __getitem__(self, batch):
        rows = self.splits[batch]
        try:
            images = torch.from_numpy(self.images[rows.numpy()]).permute(0, 3, 1, 2).contiguous()
        except UserError as error:
            return error  # raised in a worker it would come with that one's traceback
        return self.change(images, rows) if self.change else images


class Views:
    """Augmented views of a batch, as a function ``(images, rows)`` that a worker process can be given.

    Args:
        augmentation: an object of `transforms`; tables: what its ``draw`` gave, one for each view.
    """

    def __init__(self, augmentation, tables):
        self.augmentation, self.tables = augmentation, tables

    def __call__(self, images, rows):
        views = [self.augmentation.apply(images, {k: v[rows] for k, v in table.items()}) for table in self.tables]
        return torch.cat(views) if len(views) > 1 else views[0]


class Normalize:
    """uint8 (0-255) or float (0-1) images (B, 3, H, W) -> float32, minus mean, over standard deviation."""

    def __init__(self, spec, device):
        self.mean, self.std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (spec.mean, spec.std))

    def __call__(self, images):
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images - self.mean) / self.std


class Batches:
    """Shuffled, augmented, normalised batches from images that live on the device as uint8, or are streamed.

    Order and augmentation are functions of (seed, name, epoch, sample) and of how many samples there are, so an interrupted run
    continues with the same batches and no generator's state needs to be kept.

    Args:
        images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,).
        spec: the data set's `datasets.Spec`.
        runtime: a `device.Runtime`.
        batch_size: samples a batch; a last batch of one sample is left out, for batch statistics need two.
        seed, name: what the order and the augmentation are drawn from.
        augmentation: an object of `transforms` with ``draw`` and ``apply``, or None.
        views: how many augmented views of every sample a batch holds; without augmentation there is one.
        extra: further int64 (N,) array handed out with each batch, or None.
    """

    def __init__(self, images, labels, spec, runtime, batch_size, seed, name, augmentation=None, views=1, extra=None):
        self.images, self.runtime = hold(images, runtime), runtime
        # A copy: numpy takes a field of a structured array with one row for contiguous, and torch does not.
        self.host_labels = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.labels = self.host_labels.to(runtime.device)
        self.extra = None if extra is None else torch.from_numpy(np.array(extra, dtype=np.int64)).to(runtime.device)
        self.normalize = Normalize(spec, runtime.device)
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.augmentation, self.views = augmentation, views
        self.rows = torch.arange(len(self.labels))

    def only(self, rows):
        """The same without all but the samples ``rows``, int64 (M,); what is drawn for a sample stays the same."""
        fewer = copy.copy(self)
        fewer.rows = rows.cpu()
        return fewer

    def __len__(self):
        """Batches an epoch."""
        count = len(self.rows)
        return count // self.batch_size + (count % self.batch_size > 1)

    @property
    def streamed(self):
        """Whether the images stay on disk and are read when they are needed."""
        return not isinstance(self.images, torch.Tensor)

    @property
    def at_once(self):
        """How many batches are made together, of a side above 32 pixels as many as take no more memory; what is in them does not
        depend on it."""
        if not on_gpu(self.images):
            return 1
        return max(1, as_many(TOGETHER, self.images) // self.batch_size)

    def _splits(self, number):
        """The rows of each batch of epoch ``number``, a list of int64 tensors on the CPU."""
        order = generator(self.seed, "order", self.name, number).permutation(len(self.rows))
        return list(self.rows[torch.from_numpy(order)].split(self.batch_size))[: len(self)]

    def of_one_class(self, number):
        """How many batches of epoch ``number`` hold samples of a single class."""
        labels = self.host_labels
        return sum(bool((labels[rows] == labels[rows[0]]).all()) for rows in self._splits(number))

    def epoch(self, number):
        """Yield ``(inputs, labels, extra)`` of epoch ``number``: float32 (views * B, 3, H, W), the first view of all
        samples before the second of all; int64 (B,); int64 (B,) or None. Of several processes each gets the inputs of its
        part of the batch, and the labels of the whole."""
        count, change = len(self.labels), None
        if self.augmentation:
            names = ("augmentation", self.name, number)
            tables = [self.augmentation.draw(generator(self.seed, *names, view), count) for view in range(self.views)]
            change = Views(self.augmentation, tables)
        splits, at_once = self._splits(number), self.at_once
        groups = [splits[first : first + at_once] for first in range(0, len(splits), at_once)]
        own = [[part(rows) for rows in group] for group in groups]
        fetched = fetch(self.images, [torch.cat(parts) for parts in own], self.runtime, change)
        for group, parts, images in zip(groups, own, fetched, strict=True):
            views = self.views if change else 1
            inputs = self.normalize(images).view(views, len(images) // views, *images.shape[1:])
            on_device = send(torch.cat(group), self.labels.device)
            labels, extra = self.labels[on_device], None if self.extra is None else self.extra[on_device]
            sizes = [len(rows) for rows in group]
            for own_inputs, own_labels, own_extra in zip(
                inputs.split([len(rows) for rows in parts], dim=1),
                labels.split(sizes),
                [None] * len(group) if extra is None else extra.split(sizes),
                strict=True,
            ):
                yield own_inputs.flatten(0, 1), own_labels, own_extra
