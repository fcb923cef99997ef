"""From the FCT of all samples to D_c, D_u and D_p: thresholds, ties, and ratios found in the values (paper section 4.1)."""

import math

import numpy as np

from utils.errors import UserError
from utils.seeding import generator

CLEAN, UNCERTAIN, POISON = 0, 1, 2  # D_c, D_u, D_p


def share_of(ratio, count):
    """floor(ratio * count) of a decimal ``ratio``: 0.29 * 100 is 28.999... in floating point."""
    return int(ratio * count + 1e-9)


def set_sizes(count, clean_ratio, poison_ratio):
    """(floor(alpha_c N), floor(alpha_p N)); a `UserError` where one of the sets would be empty."""
    sizes = tuple(share_of(ratio, count) for ratio in (clean_ratio, poison_ratio))
    for name, ratio, size in zip(("clean", "poison"), (clean_ratio, poison_ratio), sizes, strict=True):
        if size == 0:
            raise UserError(f"--{name}_ratio {ratio} of {count} samples is less than one sample; give a larger ratio")
    return sizes


def ratio_of(count, whole):
    """The smallest ratio of at most five decimals (folders are named by it) whose `share_of` the ``whole`` is ``count`` or more; of
    up to 100 000 samples it is ``count``."""
    return math.ceil(1e5 * count / whole) / 1e5


def gammas_of_ratios(fct, clean_ratio, poison_ratio):
    """(gamma_c, gamma_p): the value at rank floor(alpha_c N) of FCT sorted ascending, counted from 1, and the one at
    rank N - floor(alpha_p N), counted from 0, so that with no ties the sets have exactly these sizes."""
    n_clean, n_poison = set_sizes(len(fct), clean_ratio, poison_ratio)
    ordered = np.sort(fct)
    return float(ordered[n_clean - 1]), float(ordered[len(fct) - n_poison])


def separate(fct, gamma_low, gamma_high, clean_ratio, poison_ratio, seed, labels=None, even=False):
    """Split the samples: FCT <= gamma_low -> D_c, FCT >= gamma_high -> D_p, the rest -> D_u.

    Ties: where values equal to a gamma would make a set larger than its ratio gives, it keeps the ratio's size, and a
    seeded draw decides which of the equal values it takes. Values beyond a gamma are always taken; where these alone
    are as many as the ratio gives, the gamma was chosen by hand, and all values equal to it are taken as well. A sample
    that fits both sets goes to D_p.

    Args:
        fct: float (N,); gamma_low, gamma_high: thresholds; clean_ratio, poison_ratio: alpha_c and alpha_p; seed: of
        the draw among equal values; labels: int64 (N,), the labels as the victim has them, to take into D_c
        floor(alpha_c N_k) samples of every label k, those of lowest FCT, in place of those up to gamma_low (not in
        the paper), less those that are in D_p. None: the paper's rule. even: with labels, of no label more than of the
        median one (alpha_c times the median of N_k), as an attack swells its target's label.

    Returns:
        int64 (N,): `CLEAN` for D_c, `UNCERTAIN` for D_u, `POISON` for D_p.

    Raises:
        UserError: where gamma_low, which counts without labels alone, is above gamma_high, or D_c or D_p is empty.
    """
    if labels is None and gamma_low > gamma_high:
        raise UserError(f"--gamma_low {gamma_low} is above --gamma_high {gamma_high}")
    n_clean, n_poison = set_sizes(len(fct), clean_ratio, poison_ratio)
    n_clean = _with_ties((fct < gamma_low).sum(), (fct == gamma_low).sum(), n_clean)
    n_poison = _with_ties((fct > gamma_high).sum(), (fct == gamma_high).sum(), n_poison)
    span = f"(FCT goes from {fct.min():g} to {fct.max():g})"
    if n_poison == 0:
        raise UserError(f"D_p is empty: no FCT lies beyond --gamma_high {gamma_high} {span}")

    # One order for both ends: equal values stand in a drawn order, and the sets cannot share a sample.
    order = ascending(fct, seed)
    flags = np.full(len(fct), UNCERTAIN)
    flags[order[len(fct) - n_poison :]] = POISON
    if labels is None:
        n_clean = min(n_clean, len(fct) - n_poison)
        if n_clean == 0:
            raise UserError(
                f"D_c is empty: no FCT lies below --gamma_low {gamma_low} {span}; without --gamma_low and --gamma_high "
                f"they follow from the ratios"
            )
        flags[order[:n_clean]] = CLEAN
        return flags
    return clean_of_labels(flags, fct, labels, clean_ratio, seed, even)


def ascending(values, seed):
    """Sample numbers, int64 (N,), by their ``values``, float (N,); equal ones in an order that is drawn by ``seed``."""
    return np.lexsort((generator(seed, "ties").random(len(values)), values))


def clean_of_labels(flags, fct, labels, clean_ratio, seed, even=False):
    """D_c of every label (not in the paper), beside the D_p of ``flags``, int64 (N,), whose D_c does not count. Arguments, returns and
    raises otherwise as of `separate`."""
    flags = np.where(flags == POISON, POISON, UNCERTAIN)
    order = ascending(fct, seed)
    present, sizes = np.unique(labels, return_counts=True)
    most = np.median(sizes) if even else sizes.max()
    for label, size in zip(present, sizes, strict=True):
        own = order[labels[order] == label]
        lowest = own[: share_of(clean_ratio, min(size, most))]
        flags[lowest[flags[lowest] != POISON]] = CLEAN
    if not (flags == CLEAN).any():
        some = share_of(clean_ratio, min(sizes.max(), most))
        why = (
            "lies in D_p; give a larger --gamma_high or a smaller --poison_ratio" if some else "is less than one sample"
        )
        raise UserError(f"D_c is empty: --clean_ratio {clean_ratio} of each label {why}")
    return flags


def confine(flags, values, among, poison_ratio, seed):
    """D_p from some samples alone (not in the paper): the floor(alpha_p N) of them with the highest values.

    Args:
        flags: int64 (N,), what `separate` gave; values: float (N,), FCT or another order; among: bool (N,), the samples
        that D_p may have, no fewer than that; poison_ratio: alpha_p; seed: of the draw among equal values.

    Returns:
        int64 (N,): what was in D_p before is uncertain unless it still is.

    Raises:
        UserError: where none of D_c is left.
    """
    count, order = share_of(poison_ratio, len(values)), ascending(values, seed)
    order = order[among[order]]
    flags = np.where(flags == POISON, UNCERTAIN, flags)
    flags[order[len(order) - count :]] = POISON
    if not (flags == CLEAN).any():
        raise UserError("D_c is empty: D_p has taken all of it; give a smaller --poison_ratio")
    return flags


def of_classes(labels, classes, poison_ratio):
    """The samples of some classes, bool (N,), for `confine`. Raises `UserError` where D_p would need more.

    Args:
        labels: int64 (N,), as the victim has them; classes: labels; poison_ratio: alpha_p.
    """
    among = np.isin(labels, classes)
    if among.sum() < share_of(poison_ratio, len(labels)):
        raise UserError(
            f"the classes {' '.join(map(str, classes))} have {among.sum()} samples, less than --poison_ratio {poison_ratio} of all "
            f"{len(labels)}; give a smaller ratio"
        )
    return among


def with_alike(flags, fct, alike, poison_ratio, seed):
    """D_p from the samples that are like those which show a backdoor, and by FCT what these are short of alpha_p N (not in the
    paper).

    Args:
        flags, poison_ratio, seed: as of `confine`; fct: float (N,); alike: bool (N,), all of which D_p takes.

    Returns, raises: as `confine`.
    """
    ratio = max(poison_ratio, ratio_of(int(alike.sum()), len(fct)))
    return confine(flags, np.where(alike, np.inf, fct), np.ones(len(fct), dtype=bool), ratio, seed)


DEEPEST = 0.7  # how far the density must fall between two groups, as a share of that at the lower of their means
CERTAIN = 0.9  # how certainly a value belongs to the upper group


def gammas_of_distribution(fct):
    """gamma_c and gamma_p found in the values (not in the paper): two normal distributions fitted to log FCT.

    gamma_p is the smallest value above the lower mean that belongs to the upper one with a certainty of `CERTAIN`, gamma_c the
    mean of the lower one, below which half of it lies. The density must fall to `DEEPEST` or below between the two means.

    Args:
        fct: float (N,), not negative; zeros, which have no logarithm, count as the smallest positive value.

    Returns:
        dict: gamma_low, gamma_high, clean_ratio and poison_ratio (the shares that they give), valley (how far it falls), or None
        where the values have no two groups, or none is beyond gamma_p.
    """
    positive = fct[fct > 0]
    if len(positive) < 20 or positive.min() == positive.max():
        return None
    lower, upper, depth = two_groups(np.log(np.maximum(fct, positive.min()).astype(np.float64)))
    if depth > DEEPEST or upper is None:
        return None
    low, high = float(np.exp(lower)), float(np.exp(upper))
    shares = float((fct <= low).mean()), float((fct >= high).mean())
    if not all(shares) or sum(shares) > 1:
        return None
    return {"gamma_low": low, "gamma_high": high, "clean_ratio": shares[0], "poison_ratio": shares[1], "valley": depth}


def two_groups(values):
    """Two normal distributions fitted to ``values``, float64 (N,), not all of them equal.

    Returns:
        (the lower mean; the smallest value above it that belongs to the upper one with a certainty of `CERTAIN`, or None; how low the
        density falls between the means, as a share of that at the lower one of them, infinite where so many values are equal that
        no two were fitted).
    """
    fitted = _two_normals(values)
    if fitted is None:
        return float(values.mean()), None, np.inf
    share, mean, deviation = fitted
    total = _densities(np.linspace(*mean, 400), share, mean, deviation).sum(1)
    line = np.linspace(mean[0], values.max(), 800)
    density = _densities(line, share, mean, deviation)
    upper = density[:, 1] >= CERTAIN * density.sum(1)
    return mean[0], line[upper.argmax()] if upper.any() else None, float(total.min() / min(total[0], total[-1]))


def _densities(values, share, mean, deviation):
    return share * np.exp(-0.5 * ((values[:, None] - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))


def _two_normals(values, rounds=200):
    """Expectation maximisation from four starts, which split at quantiles; the likeliest end. Shares, means (ascending) and
    deviations, float (2,) each; a deviation is at least a tenth of that of all values, so that none falls onto a point. None where
    fewer than five values lie above each of the quantiles, for the others are equal."""
    least = 0.1 * values.std()
    best = (-np.inf, None)
    for quantile in (0.5, 0.8, 0.93, 0.98):
        high = values > np.quantile(values, quantile)
        if high.sum() < 5:
            continue
        member = np.stack([~high, high], 1).astype(float)
        for _ in range(rounds):
            weight = member.sum(0) + 1e-12
            share, mean = weight / len(values), (member * values[:, None]).sum(0) / weight
            deviation = np.sqrt((member * (values[:, None] - mean) ** 2).sum(0) / weight).clip(least)
            density = _densities(values, share, mean, deviation)
            member = density / density.sum(1, keepdims=True).clip(1e-300)
        likelihood = np.log(density.sum(1).clip(1e-300)).sum()
        if likelihood > best[0]:
            order = np.argsort(mean)
            best = (likelihood, (share[order], mean[order], deviation[order]))
    return best[1]


def _with_ties(beyond, at, wanted):
    """Size of a set with ``beyond`` values past its gamma and ``at`` values equal to it, whose ratio gives ``wanted``."""
    return wanted if beyond < wanted < beyond + at else beyond + at
