"""Is a data set poisoned? A test on the samples of highest FCT that needs neither the poison rate nor any ground truth.

Not in the paper. FCT says which samples of a class are sensitive; in a poisoned class these are the ones that carry the
trigger, in a clean one they are odd images of the class. What such samples have in common is put on images of other
classes. A trigger turns these into the class although it changes them little, and no longer does so once they are
mirrored; what a class naturally looks like does not get through so small a change, or does so mirrored as well.
Where that is so, the rest of the poisoned samples of the class are those that the network's features put beside the group.

A trigger that is its own mirror image escapes both FCT under a mirror and that comparison. So the samples of which the
network is surest, which carry the trigger in a poisoned class too (Li et al., Anti-Backdoor Learning, NeurIPS 2021), are
tried as well, without the comparison, but with a smaller change, with which little that is natural for a class gets through,
and count only from a higher share on.
"""

import numpy as np
import torch
import torch.nn.functional as F

from utils.dataloader_bd import Normalize, evaluation_splits, fetch, hold, to_device
from utils.datasets import rows_of
from utils.distributed import gather
from utils.engine import progress
from utils.fct import compute_fct, two_groups
from utils.seeding import generator

TAUS = {"flip": ("flip", "none"), "rotate": ("rotate", "affine")}  # a mirror, and the paper's
SUREST = "surest"
GROUPS = (20, 60)  # how many of a class's first samples are looked at together,
AMONG = 100  # and of so many the GROUPS[0] that are most alike, for where not all of the first are poisoned
WITHOUT_MIRROR = 0.20  # what a score that is not compared with mirrored images is lowered by
USUAL = 0.7  # how far down the order there is no poisoned sample, where fewer than this share of a class are poisoned
OWN = 500  # samples of a class by which its mean and deviation are taken
OTHERS = 120  # images of other classes on which it is tried
CHANGE, CHANGE_SUREST = 30.0, 20.0  # grey levels, root mean square, by which it may change an image
DRAWN, LIKELY, FEWER_OTHERS = 10_000, 3, 40  # samples, classes and images of others of `sign_of_backdoor`, to be quick
LEAST = 2 * GROUPS[0]  # samples that a class must have to be looked at
POISONED = 0.22  # the score from which on a class is poisoned (README, "The test, and how often it errs")
NOTHING_BELOW = 0.15  # and below which there is no evidence
FURTHER = 0.5  # share of the highest score from which on a further class is a target: chance alone can reach POISONED


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

    def put_on(self, images, most):
        """uint8 (n, H, W, 3) -> float32 (n, H, W, 3) in 0-255, no image changed by more than ``most`` grey levels (root mean
        square)."""
        images = images.astype(np.float32)
        change = (self.target + self.keep * (images - self.mean)).clip(0, 255) - images
        size = np.sqrt(np.square(change).mean((1, 2, 3), keepdims=True))
        return images + change * np.minimum(1, most / np.maximum(size, 1e-6))


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
def sureness(model, images, labels, spec, runtime):
    """How sure the network is of each label, its log-probability: float32 (N,). Arguments as of `orders`."""
    model.eval()
    held, normalize, parts = hold(images, runtime), Normalize(spec, runtime.device), []
    splits = evaluation_splits(held)
    for rows, batch in zip(progress(splits, "loss", len(splits)), fetch(held, splits, runtime), strict=True):
        with runtime.autocast():
            logits = model(normalize(batch)).float()
        parts.append(
            -F.cross_entropy(logits, torch.from_numpy(labels[rows.numpy()]).to(runtime.device), reduction="none")
        )
    return gather(torch.cat(parts), len(labels)).cpu().numpy()


def orders(model, images, labels, spec, runtime, seed, known=None):
    """What puts the samples of a class in order, the suspicious ones high.

    Args:
        model: the network of SD; images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,); spec: a
        `datasets.Spec`; runtime: a `device.Runtime`; seed: of tau; known: values by name that need not be computed.

    Returns:
        dict name -> float32 (N,): FCT under each of `TAUS`, and `SUREST`, see `sureness`.
    """
    found = dict(known or {})
    for name, (first, second) in TAUS.items():
        if name not in found:
            found[name], _ = compute_fct(model, images, spec, runtime, trans1=first, trans2=second, seed=seed)
    return {**found, SUREST: sureness(model, images, labels, spec, runtime)}


class PutBack:
    """The put-back test on one data set: for each class, how far what some of its samples share acts as a trigger.

    The score of a group of samples is the share of other classes' images that it turns into the class, less the share
    that it does so after they are mirrored; less, where that is positive, the same of samples from `USUAL` of the way down the
    order. For `SUREST` the mirrored share is not taken off, but `WITHOUT_MIRROR` is, and the change is smaller
    (`CHANGE_SUREST`). A class's score is the largest over orders and `groups`.

    Args:
        model: the network of SD; images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,); values: what `orders`
        gave; spec: a `datasets.Spec`; runtime: a `device.Runtime`; seed: of the images that are drawn; others: how many images of
        other classes are taken.
    """

    def __init__(self, model, images, labels, values, spec, runtime, seed, others=OTHERS):
        self.model, self.images, self.labels, self.values = model.eval(), images, labels, values
        self.spec, self.runtime, self.seed, self.count = spec, runtime, seed, others
        drawn = generator(seed, "audit", "images at large").permutation(len(images))[:2000]
        self.mean, self.deviation = self.mean_and_deviation(drawn)
        self.drawn = self.own = None, None

    def order(self, label, name):
        """The samples of a class, int64, by the order ``name``."""
        own = np.flatnonzero(self.labels == label)
        return own[np.argsort(-self.values[name][own], kind="stable")]

    def mean_and_deviation(self, rows):
        """Of the images ``rows``, float32 (H, W, 3) each; of uint8 images the sums are exact, and few are in memory at a time."""
        total = squares = 0.0
        for start in range(0, len(rows), 100):
            some = self.images[np.sort(rows[start : start + 100])].astype(np.float64)
            total, squares = total + some.sum(0), squares + np.square(some).sum(0)
        mean = total / len(rows)
        return mean.astype(np.float32), np.sqrt((squares / len(rows) - mean**2).clip(0)).astype(np.float32)

    def groups(self, label, name):
        """What is looked at together of a class, by the order ``name``: dict of int64 rows."""
        order = self.order(label, name)
        found = {f"first {count}": order[:count] for count in _counts(order)}
        if len(order) >= LEAST:
            found["alike"] = self.most_alike(order[: among(len(order))], label)
        return found

    def most_alike(self, rows, label):
        """The `GROUPS`[0] of ``rows`` that differ from the class in the most similar way, by the cosine to their mean
        difference in units of the class's deviation, which a trigger on a quiet background dominates."""
        if self.own[0] != label:  # its images are read once for a class
            drawn = generator(self.seed, "audit", "class", label).permutation(np.flatnonzero(self.labels == label))[
                :OWN
            ]
            self.own = label, self.mean_and_deviation(drawn)
        mean, deviation = self.own[1]
        rows = np.sort(rows)
        unlike = ((self.images[rows] - mean) / np.maximum(deviation, 8)).reshape(len(rows), -1)
        unlike /= np.maximum(np.linalg.norm(unlike, axis=1, keepdims=True), 1e-6)
        common = unlike.mean(0)
        for _ in range(3):
            keep = np.argsort(-(unlike @ common), kind="stable")[: GROUPS[0]]
            common = unlike[keep].mean(0)
        return rows[keep]

    def others(self, label):
        """The images of other classes on which it is tried, uint8 (n, H, W, 3); read once for a class."""
        if self.drawn[0] != label:
            rows = generator(self.seed, "audit", "others", label).permutation(np.flatnonzero(self.labels != label))
            self.drawn = label, self.images[np.sort(rows[: self.count])]
        return self.drawn[1]

    def shares(self, rows, label, name):
        """What the samples ``rows`` of the order ``name`` share, put on images of other classes: the shares of these, (2,),
        that become ``label``, as they are and mirrored."""
        others = self.others(label)
        changed = Common(self.images[np.sort(rows)], self.mean, self.deviation).put_on(others, most_change(name))
        answers = predict(self.model, np.concatenate([changed, changed[:, :, ::-1]]), self.spec, self.runtime)
        return (answers == label).reshape(2, -1).mean(1)

    def score(self, shares, usual, name):
        """The score of a group, by its shares and what is usual in its class."""
        return float(shares @ _weights(name) - usual - (WITHOUT_MIRROR if name == SUREST else 0))

    def usual(self, label, name):
        """The largest of the same of samples from `USUAL` of the way down the order, at least 0."""
        order, found = self.order(label, name), [0.0]
        for count in _counts(order):
            start = min(int(USUAL * len(order)), len(order) - count)
            found.append(float(self.shares(order[start : start + count], label, name) @ _weights(name)))
        return max(found)

    def of_class(self, label):
        """The highest score of a class: dict of label, score, order, group, size, and the shares (0-1) turned,
        turned_mirrored and usual."""
        found = []
        for name in self.values:
            usual = self.usual(label, name)
            for group, rows in self.groups(label, name).items():
                shares = self.shares(rows, label, name)
                turned, turned_mirrored = map(float, shares)
                score = self.score(shares, usual, name)
                found.append(
                    {"label": label, "score": score, "order": name, "group": group, "size": len(rows), "turned": turned,
                     "turned_mirrored": turned_mirrored, "usual": usual}
                )  # fmt: skip
        return max(found, key=lambda row: row["score"])

    def test(self):
        """`of_class` of every class of `LEAST` samples or more: list of dicts."""
        labels = [label for label in range(self.spec.num_classes) if (self.labels == label).sum() >= LEAST]
        return [self.of_class(label) for label in progress(labels, "put-back test", len(labels))]

    def group_of(self, row):
        """The samples, int64, that a row of `of_class` is about."""
        return self.groups(row["label"], row["order"])[row["group"]]


@torch.inference_mode()
def features_of(model, images, spec, runtime):
    """Features of images (n, H, W, 3), uint8, an array or streamed: float32 (n, D)."""
    held, normalize, parts = hold(images, runtime), Normalize(spec, runtime.device), []
    for batch in fetch(held, evaluation_splits(held), runtime):
        with runtime.autocast():
            parts.append(model.features(normalize(batch)).float())
    return gather(torch.cat(parts), len(images)).cpu().numpy()


def likeness(features, group):
    """How like a group each sample of its class is, in the eyes of the network that has learnt the trigger.

    A network sees in the poisoned samples of a class the trigger and in the others the class, so the two lie apart in its
    features (Tran et al., Spectral Signatures, NeurIPS 2018; Chen et al., Activation Clustering, 2018). Here a group that gave
    the class away says in which direction, where these have to guess.

    Args:
        features: float (n, D) of the samples of one class; group: bool (n,), whether a sample is of the group.

    Returns:
        float32 (n,): the place of each on the line from the mean of the others to that of the group, in standard deviations,
        from 0 on where it belongs to the upper of two normal distributions with a certainty of 0.9 (`fct.two_groups`), or is
        one of the `GROUPS`[0] most alike.
    """
    features = features.astype(np.float64)
    place = features @ (features[group].mean(0) - features[~group].mean(0))
    place = (place - place.mean()) / max(place.std(), 1e-12)
    last = np.sort(place)[-min(GROUPS[0], len(place))]
    upper = two_groups(place)[1] if place.std() else None
    return (place - (last if upper is None else min(last, upper))).astype(np.float32)


def order_of(found, model, images, labels, spec, runtime):
    """What puts the samples of poisoned classes in order, for ``separate_samples.py --poison_order``.

    Args:
        found: pairs of a class and its group, bool (N,); the others as of `orders`.

    Returns:
        float32 (N,): `likeness` of each sample of these classes, of the others less than any of these.
    """
    parts = []
    for label, group in found:
        own = np.flatnonzero(labels == label)
        parts.append((own, likeness(features_of(model, rows_of(images, own), spec, runtime), group[own])))
    order = np.full(len(labels), min(part.min() for _, part in parts) - 1, dtype=np.float32)
    for own, part in parts:
        order[own] = part
    return order


def targets_of(scores):
    """The rows of the target classes among those of `PutBack.test`, highest score first; empty where no class is poisoned."""
    ordered = sorted(scores, key=lambda row: -row["score"])
    return [row for row in ordered if row["score"] >= max(POISONED, FURTHER * ordered[0]["score"])]


def sign_of_backdoor(model, images, labels, fct, classes, spec, runtime, seed):
    """The put-back test on the classes in which the samples of highest FCT pile up, as a check that SD's network has a
    backdoor at all, without which FCT tells nothing. It sees backdoors with a target class of their own, not all2all.

    Args:
        fct: float32 (N,), under any tau; classes: their names; the others as of `PutBack`. `DRAWN` samples are drawn by ``seed``.

    Returns:
        (the row of `PutBack.of_class` with the highest score, or None where no class has enough samples; what that says; where
        there is a backdoor how like its group each sample of the class is, see `order_of`, else None).
    """
    whole = images, labels
    rows = np.sort(generator(seed, "audit", "sign of a backdoor").permutation(len(labels))[:DRAWN])
    images, labels, fct = rows_of(images, rows), labels[rows], fct[rows]
    highest = labels[np.argsort(-fct, kind="stable")[: max(1, len(fct) // 20)]]
    counts = np.bincount(highest, minlength=spec.num_classes)
    likely = np.argsort(-counts, kind="stable")[:LIKELY]
    likely = [int(label) for label in likely if (labels == label).sum() >= LEAST]
    if not likely:
        return None, f"Too few samples of a class to tell whether the network has a backdoor ({LEAST} are needed)", None
    own = np.flatnonzero(np.isin(labels, likely))
    sure = np.zeros(len(labels), dtype=np.float32)
    sure[own] = sureness(model, rows_of(images, own), labels[own], spec, runtime)
    put_back = PutBack(model, images, labels, {"FCT": fct, SUREST: sure}, spec, runtime, seed, FEWER_OTHERS)
    best = max((put_back.of_class(label) for label in likely), key=lambda row: row["score"])
    score = f"(score {best['score']:.2f}; {POISONED} and more shows one, below {NOTHING_BELOW} there is no sign)"
    if best["score"] >= POISONED:
        target = f"class {best['label']} ({classes[best['label']]})"
        group = np.isin(np.arange(len(whole[1])), rows[put_back.group_of(best)])
        order = order_of([(best["label"], group)], model, *whole, spec, runtime)
        return best, f"The network has a backdoor whose target is {target} {score}", order
    words = "no sign" if best["score"] < NOTHING_BELOW else "no clear sign"
    return (
        best,
        (
            f"Warning: {words} of a backdoor with one target class {score}. If the data is poisoned, more epochs of step 1 may "
            "plant it; all2all is not seen by this check"
        ),
        None,
    )


def among(size):
    """Of how many of a class's first samples the most alike are looked for, in a class of ``size``."""
    return min(AMONG, size // 2)


def most_change(name):
    """By how much what a group of the order ``name`` shares may change an image, in grey levels (root mean square)."""
    return CHANGE_SUREST if name == SUREST else CHANGE


def _weights(name):
    """What of (turned, turned_mirrored) counts."""
    return np.array([1, 0 if name == SUREST else -1])


def _counts(order):
    return [count for count in GROUPS if len(order) >= 2 * count]
