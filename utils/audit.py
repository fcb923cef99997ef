"""Is a data set poisoned? A test on the samples of highest FCT that needs neither the poison rate nor any ground truth.

Not in the paper. FCT says which samples of a class are sensitive; in a poisoned class these are the ones that carry the
trigger, in a clean one they are odd images of the class. What such samples have in common is put on images of other
classes. A trigger turns these into the class although it changes them little, and no longer does so once they are
mirrored; what a class naturally looks like does not get through so small a change, or does so mirrored as well.

A trigger that is its own mirror image escapes both FCT under a mirror and that comparison. So the samples of which the
network is surest, which carry the trigger in a poisoned class too (Li et al., Anti-Backdoor Learning, NeurIPS 2021), are
tried as well, without the comparison, and count only from a higher share on.
"""

import numpy as np
import torch
import torch.nn.functional as F

from utils.dataloader_bd import Normalize, evaluation_splits, fetch, hold, to_device
from utils.engine import progress
from utils.fct import compute_fct, gammas_of_distribution
from utils.seeding import generator

TAUS = {"flip": ("flip", "none"), "rotate": ("rotate", "affine")}  # a mirror, and the paper's
SUREST = "surest"
WITHOUT_MIRROR = 0.25  # what a score that is not compared with mirrored images is lowered by
GROUPS = (20, 60)  # how many of a class's first samples are looked at together
BLOCK = 40  # and how many at a time, to see how far down the order they carry the trigger
OTHERS = 40  # images of other classes on which it is tried
CHANGE = 30.0  # grey levels, root mean square, that putting something on may change an image by
LEAST = 2 * GROUPS[0]  # samples that a class must have to be looked at
POISONED = 0.40  # the score from which on a class is poisoned (README, "The test, and how often it errs")
NOTHING_BELOW = 0.25  # and below which there is no evidence


class Common:
    """What a group of samples has in common, as a map on images: every pixel and channel gets the group's mean, and what
    of the image's own deviation the group leaves there.

    A patch replaces, a blend mixes, a sum adds: all three are such maps.

    Args:
        group: uint8 (n, H, W, 3); mean, deviation: float (H, W, 3) of images at large.
    """

    def __init__(self, group, mean, deviation):
        group = group.astype(np.float32)
        self.target, self.mean = group.mean(0), mean
        self.keep = (group.std(0) / np.maximum(deviation, 8)).clip(0, 1.5)

    def put_on(self, images):
        """uint8 (n, H, W, 3) -> float32 (n, H, W, 3) in 0-255, no image changed by more than `CHANGE`."""
        images = images.astype(np.float32)
        change = (self.target + self.keep * (images - self.mean)).clip(0, 255) - images
        size = np.sqrt(np.square(change).mean((1, 2, 3), keepdims=True))
        return images + change * np.minimum(1, CHANGE / np.maximum(size, 1e-6))


@torch.inference_mode()
def predict(model, images, spec, runtime, batch_size=500):
    """Predicted classes, int64 (n,), of images (n, H, W, 3) in 0-255, uint8 or float."""
    normalize = Normalize(spec, runtime.device)
    found = []
    for start in range(0, len(images), batch_size):
        batch = to_device(np.ascontiguousarray(images[start : start + batch_size], dtype=np.float32), runtime) / 255
        with runtime.autocast():
            found.append(model(normalize(batch)).argmax(1))
    return torch.cat(found).cpu().numpy()


@torch.inference_mode()
def orders(model, images, labels, spec, runtime, seed, known=None):
    """What puts the samples of a class in order, the suspicious ones high.

    Args:
        model: the network of SD; images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,); spec: a
        `datasets.Spec`; runtime: a `device.Runtime`; seed: of tau; known: values by name that need not be computed.

    Returns:
        dict name -> float32 (N,): FCT under each of `TAUS`, and `SUREST`, the log-probability of the label.
    """
    found = dict(known or {})
    for name, (first, second) in TAUS.items():
        if name not in found:
            found[name], _ = compute_fct(model, images, spec, runtime, trans1=first, trans2=second, seed=seed)
    model.eval()
    held, normalize, parts = hold(images, runtime), Normalize(spec, runtime.device), []
    splits = evaluation_splits(held)
    for rows, batch in zip(progress(splits, "loss", len(splits)), fetch(held, splits, runtime), strict=True):
        with runtime.autocast():
            logits = model(normalize(batch)).float()
        parts.append(
            -F.cross_entropy(logits, torch.from_numpy(labels[rows.numpy()]).to(runtime.device), reduction="none")
        )
    return {**found, SUREST: torch.cat(parts).cpu().numpy()}


class PutBack:
    """The put-back test on one data set: for each class, how far what some of its samples share acts as a trigger.

    The score of a group of samples is the share of other classes' images that it turns into the class, less the share
    that it does so after they are mirrored; less, where that is positive, the same of samples from the middle of the order.
    For `SUREST` the mirrored share is not taken off, but `WITHOUT_MIRROR` is. A class's score is the largest over orders
    and groups of `GROUPS` samples.

    Args:
        model: the network of SD; images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,); values: what `orders`
        gave; spec: a `datasets.Spec`; runtime: a `device.Runtime`; seed: of the images that are drawn.
    """

    def __init__(self, model, images, labels, values, spec, runtime, seed):
        self.model, self.images, self.labels, self.values = model.eval(), images, labels, values
        self.spec, self.runtime, self.seed = spec, runtime, seed
        self.mean, self.deviation = at_large(images, seed)
        self.drawn = None, None

    def order(self, label, name):
        """The samples of a class, int64, by the order ``name``."""
        own = np.flatnonzero(self.labels == label)
        return own[np.argsort(-self.values[name][own], kind="stable")]

    def others(self, label):
        """The images of other classes on which it is tried, uint8 (n, H, W, 3); read once for a class."""
        if self.drawn[0] != label:
            rows = generator(self.seed, "audit", "others", label).permutation(np.flatnonzero(self.labels != label))
            self.drawn = label, self.images[np.sort(rows[:OTHERS])]
        return self.drawn[1]

    def shares(self, rows, label):
        """What the samples ``rows`` share, put on images of other classes: the shares of these, (2,), that become ``label``,
        as they are and mirrored."""
        others = self.others(label)
        changed = Common(self.images[np.sort(rows)], self.mean, self.deviation).put_on(others)
        answers = predict(self.model, np.concatenate([changed, changed[:, :, ::-1]]), self.spec, self.runtime)
        return (answers == label).reshape(2, -1).mean(1)

    def score(self, shares, usual, name):
        """The score of a group, by its shares and what is usual in its class."""
        return float(shares @ _weights(name) - usual - (WITHOUT_MIRROR if name == SUREST else 0))

    def usual(self, label, name):
        """The largest of the same of samples from the middle of the order, at least 0."""
        order = self.order(label, name)
        half = len(order) - len(order) // 2
        return max(
            0.0, *(float(self.shares(order[half : half + count], label) @ _weights(name)) for count in _groups(order))
        )

    def of_class(self, label):
        """The highest score of a class: dict of label, score, order, size, and the shares (0-1) turned, turned_mirrored and
        usual."""
        rows = []
        for name in self.values:
            order, usual = self.order(label, name), self.usual(label, name)
            for count in _groups(order):
                shares = self.shares(order[:count], label)
                rows.append({"label": label, "score": self.score(shares, usual, name), "order": name, "size": count,
                             "turned": float(shares[0]), "turned_mirrored": float(shares[1]), "usual": usual})  # fmt: skip
        return max(rows, key=lambda row: row["score"])

    def test(self):
        """`of_class` of every class of `LEAST` samples or more: list of dicts."""
        labels = [label for label in range(self.spec.num_classes) if (self.labels == label).sum() >= LEAST]
        return [self.of_class(label) for label in progress(labels, "put-back test", len(labels))]

    def extent(self, label, name):
        """How many of the first samples of a class act as a trigger, `BLOCK` by `BLOCK`, until one block does not."""
        order, usual = self.order(label, name), self.usual(label, name)
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            if len(block) < BLOCK or self.score(self.shares(block, label), usual, name) < POISONED:
                return start
        return len(order)

    def suspects(self, labels):
        """Which samples of the poisoned classes ``labels`` to take as poisoned: (name of the tau of `TAUS` by whose FCT, how
        many in all). The first class decides the tau: that which has most to say of it, see `_count`."""
        counts = {name: self._count(labels[0], name) for name in TAUS}
        name = max(counts, key=lambda name: counts[name])
        return name, counts[name][1] + sum(self._count(label, name)[1] for label in labels[1:])

    def _count(self, label, name):
        """(how deep the valley is between the two groups that the values of a class fall into, 0 where there are none; how
        many samples to take: the upper group, else as far as `extent` goes, and `GROUPS`[0] at least)."""
        values = self.values[name][self.labels == label]
        found = gammas_of_distribution(values)
        if found:
            return 1 - found["valley"], int((values >= found["gamma_high"]).sum())
        return 0.0, max(self.extent(label, name), GROUPS[0])


def _weights(name):
    """What of (turned, turned_mirrored) counts."""
    return np.array([1, 0 if name == SUREST else -1])


def _groups(order):
    return [count for count in GROUPS if len(order) >= 2 * count]


def at_large(images, seed, most=2000):
    """Mean and deviation, float (H, W, 3) each, of ``most`` images drawn by ``seed``."""
    some = np.sort(generator(seed, "audit", "images at large").permutation(len(images))[:most])
    some = images[some].astype(np.float32)
    return some.mean(0), some.std(0)
