"""Is a data set poisoned? A test on the samples of highest FCT that needs neither the poison rate nor any ground truth.

Not in the paper. FCT says which samples of a class are sensitive; in a poisoned class these are the ones that carry the
trigger, in a clean one they are odd images of the class. What such samples have in common is put on images of other
classes. A trigger turns these into the class although it changes them little, and no longer does so once they are
mirrored; what a class naturally looks like does not get through so small a change, or does so mirrored as well.
Where that is so, the rest of the poisoned samples of the class are those that the network's features put beside the group.

A trigger that is its own mirror image escapes both FCT under a mirror and that comparison. So the samples that are most
sensitive to being made smaller are tried as well, and compared with images made smaller. What a class looks like may not
survive that either, so here only the few pixels count in which the samples differ most from their class. And the samples of
which the network is surest, which carry the trigger in a poisoned class too (Li et al., Anti-Backdoor Learning, NeurIPS 2021), are
tried without any comparison, but with a smaller change, with which little that is natural for a class gets through,
and count only from a higher share on. So are many samples at either end of the direction in which the class's features vary
most (Tran et al., Spectral Signatures, NeurIPS 2018): what two hundred images of all sorts share is next to nothing but the
trigger, also where that is another one for each image.

Where the attack moves every label on (all2all), no class draws all images to itself. So it counts too whether those of each
class are led to one and the same other class, a different one for each. Then all classes hold poisoned samples, and the first
samples of all of them together share the trigger and nothing else.
"""

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from utils.dataloader_bd import Normalize, hold, to_device
from utils.device import send
from utils.fct import compute_fct
from utils.images import rows_of
from utils.metrics import cross_entropies, outputs, predict
from utils.progress import progress
from utils.seeding import generator
from utils.separation import two_groups
from utils.transforms import PARTS

SHRINK, SUREST = "shrink", "surest"
# A mirror, the paper's, and one that leaves left and right what they are.
TAUS = {"flip": ("flip", "none"), "rotate": ("rotate", "affine"), SHRINK: (SHRINK, "none")}
FCT_SMALLER = "FCT, compared with smaller images"  # in `sign_of_backdoor`, under any tau
APART = ("apart", "apart, the other end")  # both ends of the first principal component of a class's features
INTO_CLASS, INTO_EACH = INTO = ("the class", "one class for each")  # what a trigger may do with images of other classes
AMONG = 100  # of how many of the first samples the most alike are taken, for where not all of them are poisoned
NOT_COMPARED = 0.20  # what a score is lowered by where no images are compared
USUAL = 0.7  # how far down the order there is no poisoned sample, where fewer than this share of a class are poisoned
OWN = 500  # samples of a class by which its mean and deviation are taken
OTHERS = 120  # images of other classes on which it is tried
DRAWN, LIKELY, FEWER_OTHERS = 10_000, 3, 40  # samples, classes and images of others of `sign_of_backdoor`, to be quick
POISONED_FROM = 0.22  # the score from which on a class is poisoned (README, "The test, and how often it errs")
NOTHING_BELOW = 0.15  # and below which there is no evidence
# Of two classes each is all that the other's images can become, and a change of any sort leads many there: clean sets reach 0.37.
FEWEST_CLASSES, SURE_FROM = 3, 0.5
EACH_FROM = 0.15  # the score of `PutBack.of_all` from which on each class is led to one of its own
# There: what stands in the place of a label, of how many classes at most, and on how many images of each it is tried.
NO_CLASS, MOST_CLASSES, FOR_EACH = -1, 10, 20
CERTAIN, PART = 3, 0.06  # standard errors, and share of the pixels, see `SharedPattern`
FURTHER = 0.5  # share of the highest score from which on a further class is a target, for POISONED_FROM can be reached by chance


@dataclass(frozen=True)
class Rule:
    """How the samples of an order are tried: how many of the first are looked at together, whether the ``groups[0]`` most alike
    of the first `AMONG` are too, by how many grey levels (root mean square) what they share may change an image, whether only what
    they share beyond their class is put on it, and the transform (of `transforms.PARTS`) under which images are
    compared, None where they are not."""

    groups: tuple = (20, 60)
    alike: bool = True
    change: float = 30.0
    beyond_class: bool = False
    compared: str | None = "flip"

    def sizes(self, count):
        """Of ``groups``, those that a class of ``count`` samples has."""
        return [size for size in self.groups if count >= 2 * size]

    def counted(self, shares):
        """What counts of shares of images as they are, and transformed: float (2, 2) -> (2,)."""
        return shares[:, 0] - shares[:, 1] * bool(self.compared)


FIRST = Rule()  # by FCT under any tau but `SHRINK`
RULES = {
    **dict.fromkeys((SHRINK, FCT_SMALLER), Rule(alike=False, beyond_class=True, compared="shrink")),
    SUREST: Rule(change=20.0, compared=None),
    **dict.fromkeys(APART, Rule(groups=(60, 200), alike=False, change=20.0, compared=None)),
}
LEAST = 2 * FIRST.groups[0]  # samples that a class must have to be looked at


class SharedPattern:
    """What a group of samples has in common, as a map on images: every pixel and channel gets the group's mean, and what
    of the image's own deviation the group leaves there.

    A patch replaces, a blend mixes, a sum adds: all three are such maps.

    Args:
        group: uint8 (n, H, W, 3); mean, deviation: float (H, W, 3) of images at large; own: the same of the group's class, where
        the map leaves out what the group shares with it, and what parts of a class share: only those pixels change whose mean
        differs from the class's, in some channel, by more than `CERTAIN` standard errors, wholly from twice as many on, and of
        these the most certain, `PART` of all pixels.
    """

    def __init__(self, group, mean, deviation, own=None):
        group = group.astype(np.float32)
        self.target, self.mean, self.weight = group.mean(0), mean, np.float32(1)
        self.keep = (group.std(0) / np.maximum(deviation, 8)).clip(0, 1.5)
        if own is not None:
            error = np.maximum(own[1].mean(2), 8) / np.sqrt(len(group))
            certain = np.abs(self.target - own[0]).max(2) / error
            few = certain >= np.quantile(certain, 1 - PART)
            self.weight = (few * (certain / CERTAIN - 1).clip(0, 1))[..., None]

    def put_on(self, images, most):
        """uint8 (n, H, W, 3) -> float32 (n, H, W, 3) in 0-255, no image changed by more than ``most`` grey levels (root mean
        square)."""
        images = images.astype(np.float32)
        change = self.weight * ((self.target + self.keep * (images - self.mean)).clip(0, 255) - images)
        size = np.sqrt(np.square(change).mean((1, 2, 3), keepdims=True))
        return images + change * np.minimum(1, most / np.maximum(size, 1e-6))


def classes_of(model, images, spec, runtime):
    """Predicted classes, int64 (n,), of images (n, H, W, 3) in 0-255, uint8 or float."""
    images = to_device(np.ascontiguousarray(images, dtype=np.float32), runtime) / 255
    return predict(model, images, Normalize(spec, runtime.device), runtime).cpu().numpy()


def sureness(model, images, labels, spec, runtime):
    """How sure the network is of each label, its log-probability: float32 (N,). Arguments as of `suspicion`."""
    model.eval()
    held, normalize = hold(images, runtime), Normalize(spec, runtime.device)
    labels = send(torch.from_numpy(labels), runtime.device)
    return -cross_entropies(model, held, labels, normalize, runtime).cpu().numpy()


def suspicion(model, images, labels, spec, runtime, seed, known=None):
    """What puts the samples of a class in order, the suspicious ones high.

    Args:
        model: the network of SD; images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,); spec: a
        `datasets.Spec`; runtime: a `device.Runtime`; seed: of tau; known: values by name that need not be computed.

    Returns:
        dict name -> float32 (N,): FCT under each of `TAUS`, `SUREST`, see `sureness`, and both of `APART`, see `apart`.
    """
    found = dict(known or {})
    for name, (first, second) in TAUS.items():
        if name not in found:
            found[name], _ = compute_fct(model, images, spec, runtime, trans1=first, trans2=second, seed=seed)
    found[SUREST] = sureness(model, images, labels, spec, runtime)
    place = apart(model, images, labels, spec, runtime)
    return {**found, **dict(zip(APART, (place, -place), strict=True))}


def apart(model, images, labels, spec, runtime):
    """Where a sample lies on the first principal component of its class's features: float32 (N,). Arguments as of `suspicion`."""
    place = np.zeros(len(labels), dtype=np.float32)
    present = np.unique(labels)
    for label in progress(present, "features", len(present)):
        own = np.flatnonzero(labels == label)
        if len(own) >= LEAST:
            features = features_of(model, rows_of(images, own), spec, runtime).astype(np.float64)
            features -= features.mean(0)
            _, axes = np.linalg.eigh(features.T @ features)  # ascending; which of the two directions is chance
            axis = axes[:, -1] * np.sign(axes[np.abs(axes[:, -1]).argmax(), -1])
            place[own] = features @ axis
    return place


class PutBack:
    """The put-back test on one data set: for each class, how far what some of its samples share acts as a trigger.

    The score of a group of samples is the share of other classes' images that it turns into the class, less the share
    that it does so after they are mirrored, or made smaller (see `RULES`); less, where that is positive, the same of samples from
    `USUAL` of the way down the order. Images that the network takes for the class anyway do not count. Where nothing is
    compared, `NOT_COMPARED` is taken off in its place. Or, of the same, what it turns into one class for each, see
    `share_turned_into_each`. A class's score is the largest over orders and `groups`.

    Args:
        model: the network of SD; images: uint8 (N, H, W, 3), an array or streamed; labels: int64 (N,); values: what `suspicion`
        gave; spec: a `datasets.Spec`; runtime: a `device.Runtime`; seed: of the images that are drawn; others: how many images of
        other classes are taken.
    """

    def __init__(self, model, images, labels, values, spec, runtime, seed, others=OTHERS):
        self.model, self.images, self.labels, self.values = model.eval(), images, labels, values
        self.spec, self.runtime, self.seed, self.count = spec, runtime, seed, others
        drawn = generator(seed, "audit", "images at large").permutation(len(images))[:2000]
        self.mean, self.deviation = self.mean_and_deviation(drawn)
        self._tried = self._look = None, None  # what `others` and `look` have read, of the class that was last

    def ranked(self, label, name):
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
        order, rule = self.ranked(label, name), rule_of(name)
        found = {f"first {size}": order[:size] for size in rule.sizes(len(order))}
        if rule.alike and len(order) >= LEAST:
            found["alike"] = self.most_alike(order[: among(len(order))], label)
        return found

    def most_alike(self, rows, label):
        """The ``FIRST.groups[0]`` of ``rows`` that differ from the class in the most similar way, by the cosine to their mean
        difference in units of the class's deviation, which a trigger on a quiet background dominates."""
        mean, deviation = self.look(label)
        rows = np.sort(rows)
        unlike = ((self.images[rows] - mean) / np.maximum(deviation, 8)).reshape(len(rows), -1)
        unlike /= np.maximum(np.linalg.norm(unlike, axis=1, keepdims=True), 1e-6)
        common = unlike.mean(0)
        for _ in range(3):
            keep = np.argsort(-(unlike @ common), kind="stable")[: FIRST.groups[0]]
            common = unlike[keep].mean(0)
        return rows[keep]

    def look(self, label):
        """Mean and deviation of a class's images, see `mean_and_deviation`; they are read once for a class."""
        if self._look[0] != label:
            own = np.flatnonzero(self.labels == label)
            drawn = generator(self.seed, "audit", "class", label).permutation(own)
            self._look = label, self.mean_and_deviation(drawn[:OWN])
        return self._look[1]

    def others(self, label):
        """The images of other classes on which it is tried, uint8 (n, H, W, 3), their labels, int64 (n,), and a function that says
        what `answers` gives for them; read once for a class. `NO_CLASS`: of those that are `together`."""
        if self._tried[0] != label:
            from_, count = self.labels != label, self.count
            if label == NO_CLASS:
                from_, count = np.isin(self.labels, self.together()), FOR_EACH * len(self.together())
            rows = generator(self.seed, "audit", "others", label).permutation(np.flatnonzero(from_))
            rows = np.sort(rows[:count])
            images = self.images[rows]
            self._tried = label, images, self.labels[rows], cache(partial(self.answers, images))
        return self._tried[1:]

    def answers(self, images, compared):
        """Predicted classes of images, as they are and under the transform ``compared`` (of `transforms.PARTS`): int64 (2, n)."""
        _, transform = PARTS[compared]
        changed = transform(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        both = np.concatenate([images, changed.numpy()])
        return classes_of(self.model, both, self.spec, self.runtime).reshape(2, -1)

    def pattern(self, rows, label, name):
        """What the samples ``rows`` of the order ``name`` share, a `SharedPattern`."""
        own = self.look(label) if rule_of(name).beyond_class else None
        return SharedPattern(self.images[np.sort(rows)], self.mean, self.deviation, own)

    def shares(self, rows, label, name):
        """What the samples ``rows`` of the order ``name`` share, put on images of other classes: for each of `INTO` the share
        of these that it turns, and of them transformed, float (2, 2)."""
        (images, sources, answers), rule = self.others(label), rule_of(name)
        compared = rule.compared or "flip"  # which is then reported, and does not count
        after = self.answers(self.pattern(rows, label, name).put_on(images, rule.change), compared)
        before = answers(compared)
        return np.stack([share_turned(after, before, label), share_turned_into_each(after, before, sources)])

    def usual(self, label, name):
        """For each of `INTO`, the largest of the same of samples from `USUAL` of the way down the order, at least 0: float (2,)."""
        order, rule, found = self.ranked(label, name), rule_of(name), [np.zeros(len(INTO))]
        for size in rule.sizes(len(order)):
            found.append(rule.counted(self.shares(far_down(order, size), label, name)))
        return np.max(found, 0)

    def of_class(self, label, into=INTO):
        """The highest score of a class: dict of label, score, into (of ``into``), order, group, size, and the shares (0-1) turned,
        turned_compared (of them transformed, see `RULES`) and usual."""
        found = []
        for name in self.values:
            rule = rule_of(name)
            # Where nothing is compared `share_turned_into_each` has nothing to be held against.
            counted = [kind for kind in into if kind == INTO_CLASS or rule.compared]
            if not counted:
                continue
            usual = self.usual(label, name)
            for group, rows in self.groups(label, name).items():
                shares = self.shares(rows, label, name)
                scores = rule.counted(shares) - usual - (0 if rule.compared else NOT_COMPARED)
                for place in map(INTO.index, counted):
                    found.append(
                        as_row(label, scores[place], INTO[place], name, group, rows, shares[place], usual[place])
                    )
        return max(found, key=lambda row: row["score"])

    def of_all(self, name):
        """The score of the first samples of all classes `together`, by the order ``name``, for turning images into one class for each:
        a dict as of `of_class`, whose label is None. Where all classes hold the trigger, it is what these share."""
        size, rule, each = FIRST.groups[0], rule_of(name), INTO.index(INTO_EACH)
        orders = [self.ranked(label, name) for label in self.together()]
        first = np.concatenate([order[:size] for order in orders])
        far = np.concatenate([far_down(order, size) for order in orders])
        shares = self.shares(first, NO_CLASS, name)
        usual = max(0.0, rule.counted(self.shares(far, NO_CLASS, name))[each])
        score = rule.counted(shares)[each] - usual
        return as_row(None, score, INTO_EACH, name, f"first {size} of each class", first, shares[each], usual)

    def tested(self):
        """The classes that have `LEAST` samples or more."""
        return [label for label in range(self.spec.num_classes) if (self.labels == label).sum() >= LEAST]

    def together(self):
        """Of the classes that are `tested` at most `MOST_CLASSES`, which are enough, by the seed."""
        return sorted(generator(self.seed, "audit", "together").permutation(self.tested())[:MOST_CLASSES].tolist())

    def test(self):
        """`of_class` of every class that is `tested`: list of dicts. Where all classes together say, by the first order, that each is
        led to one of its own, and one of them does, no class counts as the target of all others."""
        labels = self.tested()
        if labels and self.of_all(next(iter(self.values)))["score"] >= EACH_FROM:
            each = [self.of_class(label, (INTO_EACH,)) for label in progress(labels, "one class for each", len(labels))]
            if max(row["score"] for row in each) >= POISONED_FROM:
                return each
        return [self.of_class(label) for label in progress(labels, "put-back test", len(labels))]

    def group_of(self, row):
        """The samples, int64, that a row of `of_class` is about."""
        return self.groups(row["label"], row["order"])[row["group"]]


def as_row(label, score, into, order, group, rows, shares, usual):
    """What `PutBack.of_class` and `PutBack.of_all` return, of the samples ``rows`` and their ``shares``, float (2,)."""
    return {"label": label, "score": float(score), "into": into, "order": order, "group": group, "size": len(rows),
            "turned": float(shares[0]), "turned_compared": float(shares[1]), "usual": float(usual)}  # fmt: skip


def far_down(order, size):
    """``size`` samples of an ``order`` (int64) from `USUAL` of the way down."""
    start = min(int(USUAL * len(order)), len(order) - size)
    return order[start : start + size]


def share_turned(after, before, wanted, counted=True):
    """Of the images that were not taken for ``wanted`` before, the share that is now: float (2,).

    Args:
        after, before: predicted classes, int64 (2, n), of images as they are and mirrored; wanted: a class, or one for each image;
        counted: bool (n,), whether an image that is taken for it now counts as such.
    """
    new = before != wanted
    return ((after == wanted) & new & counted).sum(1) / np.maximum(new.sum(1), 1)


def share_turned_into_each(after, before, sources):
    """Of images that are led to one class for each class of theirs, as all2all does it, the share that goes where most of the
    others of its class go, other than where most of all go, for that is what a single target does.

    Args:
        after, before: as of `share_turned`; sources: the images' own classes, int64 (n,).

    Returns:
        float (2,): the same for the images as they are and, to the same classes, mirrored.
    """
    present, source = np.unique(sources, return_inverse=True)
    counts = np.zeros((len(present), 1 + max(after.max(), sources.max())), dtype=np.int64)
    np.add.at(counts, (source, after[0]), 1)
    counts[np.arange(len(present)), present] = 0  # staying is not being led
    of_others = counts[source]
    of_others[np.arange(len(sources)), after[0]] -= after[0] != sources  # an image does not choose for itself
    wanted = np.where(of_others.max(1) > 0, of_others.argmax(1), -1)
    return share_turned(after, before, wanted, wanted != counts.sum(0).argmax())


def features_of(model, images, spec, runtime):
    """Features of images (n, H, W, 3), uint8, an array or streamed: float32 (n, D)."""
    found = outputs(
        lambda inputs: model.features(inputs).float(), hold(images, runtime), Normalize(spec, runtime.device), runtime
    )
    return found.cpu().numpy()


def likeness(features, group):
    """How like a group each sample of its class is, in the eyes of the network that has learnt the trigger.

    A network sees in the poisoned samples of a class the trigger and in the others the class, so the two lie apart in its
    features (Tran et al., Spectral Signatures, NeurIPS 2018; Chen et al., Activation Clustering, 2018). Here a group that gave
    the class away says in which direction, where these have to guess.

    Args:
        features: float (n, D) of the samples of one class; group: bool (n,), whether a sample is of the group.

    Returns:
        float32 (n,): the place of each on the line from the mean of the others to that of the group, in standard deviations,
        from 0 on where it belongs to the upper of two normal distributions with a certainty of 0.9 (`separation.two_groups`), or is
        one of the ``FIRST.groups[0]`` most alike.
    """
    features = features.astype(np.float64)
    place = features @ (features[group].mean(0) - features[~group].mean(0))
    place = (place - place.mean()) / max(place.std(), 1e-12)
    last = np.sort(place)[-min(FIRST.groups[0], len(place))]
    upper = two_groups(place)[1] if place.std() else None
    return (place - (last if upper is None else min(last, upper))).astype(np.float32)


def likeness_of(found, model, images, labels, spec, runtime):
    """What puts the samples of poisoned classes in order, for ``separate_samples.py --poison_order``.

    Args:
        found: pairs of a class and its group, bool (N,); the others as of `suspicion`.

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


def poisoned_from(classes):
    """The score from which on a class is poisoned, of data of so many ``classes``."""
    return POISONED_FROM if classes >= FEWEST_CLASSES else SURE_FROM


def targets_of(scores):
    """The rows of the target classes among those of `PutBack.test`, highest score first; empty where no class is poisoned. Where the
    highest leads each class to one of its own, all are targets."""
    ordered = sorted(scores, key=lambda row: -row["score"])
    if ordered and ordered[0]["score"] >= POISONED_FROM and ordered[0]["into"] == INTO_EACH:
        return ordered
    return [row for row in ordered if row["score"] >= max(POISONED_FROM, FURTHER * ordered[0]["score"])]


def sign_of_backdoor(model, images, labels, fct, classes, spec, runtime, seed):
    """The put-back test on the classes in which the samples of highest FCT pile up, as a check that SD's network has a
    backdoor at all, without which FCT tells nothing; and on all classes together, for one with a target for each.

    Args:
        fct: float32 (N,), under any tau; classes: their names; the others as of `PutBack`. `DRAWN` samples are drawn by ``seed``.

    Returns:
        (the row of `PutBack.of_class` with the highest score, or of `PutBack.of_all` where that shows a backdoor, None where no class
        has enough samples; what that says; where there is a backdoor how like its group each sample of the target classes is, see
        `likeness_of`, else None).
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
    if len(np.unique(labels)) < 2:
        return None, "All samples have one label, so nothing can be led to it", None
    own = np.flatnonzero(np.isin(labels, likely))
    sure = np.zeros(len(labels), dtype=np.float32)
    sure[own] = sureness(model, rows_of(images, own), labels[own], spec, runtime)
    values = {"FCT": fct, FCT_SMALLER: fct, SUREST: sure}
    put_back = PutBack(model, images, labels, values, spec, runtime, seed, others=FEWER_OTHERS)
    best = put_back.of_all("FCT")
    if best["score"] >= EACH_FROM:  # of clean data, and of a backdoor with one target, it is next to nothing
        score = f"(score {best['score']:.2f}; {EACH_FROM:.2f} and more shows one)"
        words = f"The network has a backdoor that leads each class to one of its own, as all2all does {score}"
        found = [put_back.of_class(label, (INTO_EACH,)) for label in put_back.tested()]
    else:
        best = max((put_back.of_class(label, (INTO_CLASS,)) for label in likely), key=lambda row: row["score"])
        least = poisoned_from(len(np.unique(labels)))
        score = f"(score {best['score']:.2f}; {least} and more shows one, below {NOTHING_BELOW} there is no sign)"
        words = f"The network has a backdoor whose target is class {best['label']} ({classes[best['label']]}) {score}"
        found = [best] if best["score"] >= least else []
    if found:
        groups = [(row["label"], np.isin(np.arange(len(whole[1])), rows[put_back.group_of(row)])) for row in found]
        return best, words, likeness_of(groups, model, *whole, spec, runtime)
    words = "no sign" if best["score"] < NOTHING_BELOW else "no clear sign"
    warning = (
        f"Warning: {words} of a backdoor with one target class {score}. If the data is poisoned, more epochs of step 1 may "
        "plant it; all2all can escape this check"
    )
    return best, warning, None


def among(size):
    """Of how many of a class's first samples the most alike are looked for, in a class of ``size``."""
    return min(AMONG, size // 2)


def rule_of(name):
    """The `Rule` of an order."""
    return RULES.get(name, FIRST)
