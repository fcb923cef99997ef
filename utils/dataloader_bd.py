"""The poisoned data set, and batches of it on the device."""

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from utils.errors import UserError
from utils.seeding import generator
from utils.triggers import apply_trigger

TARGET_TYPES = ("all2one", "all2all", "cleanLabel")


@dataclass(frozen=True)
class PoisonedSet:
    """A training set as the victim gets it, and what only an evaluation may look at.

    ``images`` uint8 (N, H, W, 3), ``labels`` int64 (N,), ``index`` int64 (N,): the sample's place in the data set.
    ``true_labels`` int64 (N,) and ``is_clean`` bool (N,) are the ground truth: no defence step reads them.
    """

    images: np.ndarray
    labels: np.ndarray
    true_labels: np.ndarray
    is_clean: np.ndarray
    index: np.ndarray
    digest: str


def attack_label(labels, target_type, target_label, num_classes):
    """The labels (int64 (N,)) that the attacker wants for triggered images whose true labels are ``labels``."""
    return (labels + 1) % num_classes if target_type == "all2all" else np.full_like(labels, target_label)


def poisoned_indices(labels, target_type, target_label, poison_rate, seed):
    """Which training samples are poisoned (paper section 5.1; the table of target types in the README).

    all2one: floor(rate * samples not of the target class); all2all: floor(rate * N); cleanLabel: floor(rate * samples
    of the target class); drawn by ``seed``.

    Returns:
        Sorted int64 array of indices.

    Raises:
        UserError: where that leaves no sample.
    """
    of_target = labels == target_label
    eligible = {"all2one": ~of_target, "all2all": np.ones_like(of_target), "cleanLabel": of_target}[target_type]
    candidates = np.flatnonzero(eligible)
    count = int(Fraction(str(poison_rate)) * len(candidates))  # exact: 0.29 * 100 is 28.999... in floating point
    if count == 0:
        raise UserError(f"--poison_rate {poison_rate} of {len(candidates)} eligible samples poisons none; raise it")
    return np.sort(generator(seed, "poisoned indices").permutation(candidates)[:count])


def poison_training_set(dataset, opt):
    """Poison a `Dataset`'s training images as the options say (trigger_type, target_type, target_label, poison_rate,
    seed). Equal options give the same `PoisonedSet` in every step."""
    labels = dataset.train_labels
    chosen = poisoned_indices(labels, opt.target_type, opt.target_label, opt.poison_rate, opt.seed)
    images, new_labels = dataset.train_images.copy(), labels.copy()
    images[chosen] = apply_trigger(opt.trigger_type, images[chosen], train=True, seed=opt.seed)
    new_labels[chosen] = attack_label(labels[chosen], opt.target_type, opt.target_label, dataset.spec.num_classes)
    is_clean = np.ones(len(labels), dtype=bool)
    is_clean[chosen] = False
    digest = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    return PoisonedSet(images, new_labels, labels, is_clean, np.arange(len(labels)), digest)


@dataclass(frozen=True)
class TestSets:
    """The two test sets on the device: images uint8 (N, 3, H, W), labels int64 (N,).

    ``triggered`` leaves out the target class for all2one and cleanLabel, whose images the attack has no use for.
    """

    clean_images: torch.Tensor
    clean_labels: torch.Tensor
    in_paper: torch.Tensor  # bool (N,): whether the authors count this clean test image (not of the target class)
    triggered_images: torch.Tensor | None
    attack_labels: torch.Tensor | None
    true_labels: torch.Tensor | None


def make_test_sets(dataset, opt, runtime, attack=True):
    """The `TestSets` of a `Dataset` under the options' attack; without ``attack`` the clean one alone."""
    labels = dataset.test_labels
    everything = not attack or opt.target_type == "all2all"
    in_paper = np.ones_like(labels, dtype=bool) if everything else labels != opt.target_label
    clean = [to_device(dataset.test_images, runtime), torch.from_numpy(labels).to(runtime.device)]
    clean.append(torch.from_numpy(in_paper).to(runtime.device))
    if not attack:
        return TestSets(*clean, None, None, None)
    triggered = apply_trigger(opt.trigger_type, dataset.test_images[in_paper], train=False, seed=opt.seed)
    wanted = attack_label(labels[in_paper], opt.target_type, opt.target_label, dataset.spec.num_classes)
    return TestSets(
        *clean,
        to_device(triggered, runtime),
        torch.from_numpy(wanted).to(runtime.device),
        torch.from_numpy(labels[in_paper]).to(runtime.device),
    )


def to_device(images, runtime):
    """Images uint8 (N, H, W, 3) in memory -> uint8 tensor (N, 3, H, W) on the device."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(runtime.device)


class Normalize:
    """uint8 (0-255) or float (0-1) images (B, 3, H, W) -> float32, minus mean, over standard deviation."""

    def __init__(self, spec, device):
        self.mean, self.std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (spec.mean, spec.std))

    def __call__(self, images):
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images - self.mean) / self.std


class Batches:
    """Shuffled, augmented, normalised batches from images that live on the device as uint8.

    Order and augmentation are functions of (seed, name, epoch, sample) alone, so an interrupted run continues with the
    same batches and no generator's state needs to be kept.

    Args:
        images: uint8 (N, H, W, 3); labels: int64 (N,).
        spec: the data set's `datasets.Spec`.
        runtime: a `device.Runtime`.
        batch_size: samples a batch; a last batch of one sample is left out, for batch statistics need two.
        seed, name: what the order and the augmentation are drawn from.
        augmentation: an object of `transforms` with ``draw`` and ``apply``, or None.
        views: how many augmented views of every sample a batch holds; without augmentation there is one.
        extra: further int64 (N,) array handed out with each batch, or None.
    """

    def __init__(self, images, labels, spec, runtime, batch_size, seed, name, augmentation=None, views=1, extra=None):
        self.images = to_device(images, runtime)
        self.labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)).to(runtime.device)
        self.extra = (
            None if extra is None else torch.from_numpy(np.ascontiguousarray(extra, dtype=np.int64)).to(runtime.device)
        )
        self.normalize = Normalize(spec, runtime.device)
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.augmentation, self.views = augmentation, views

    def __len__(self):
        """Batches an epoch."""
        count = len(self.labels)
        return count // self.batch_size + (count % self.batch_size > 1)

    def epoch(self, number):
        """Yield ``(inputs, labels, extra)`` of epoch ``number``: float32 (views * B, 3, H, W), the first view of all
        samples before the second of all; int64 (B,); int64 (B,) or None."""
        count = len(self.labels)
        order = torch.from_numpy(generator(self.seed, "order", self.name, number).permutation(count))
        drawn = []
        if self.augmentation:
            for view in range(self.views):
                rng = generator(self.seed, "augmentation", self.name, number, view)
                drawn.append(self.augmentation.draw(rng, count))
        for batch in range(len(self)):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            on_device = rows.to(self.images.device)
            images = self.images[on_device]
            if self.augmentation:
                views = [self.augmentation.apply(images, {k: v[rows] for k, v in table.items()}) for table in drawn]
                images = torch.cat(views) if self.views > 1 else views[0]
            extra = None if self.extra is None else self.extra[on_device]
            yield self.normalize(images), self.labels[on_device], extra
