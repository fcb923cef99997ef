"""Measures: ACC, ACC_paper, ASR, R-ACC and ASR_clean of a classifier; how well FCT and the separation detect."""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from utils.dataloader_bd import evaluation_splits, fetch
from utils.distributed import gather
from utils.errors import UserError
from utils.separation import CLEAN, POISON

MEASURES = ("ACC", "ACC_paper", "ASR", "R_ACC")  # of every table and record


@torch.no_grad()
def outputs(function, images, normalize, runtime):
    """What a ``function`` of normalised float batches (B, 3, H, W) gives for all ``images`` (what `dataloader_bd.hold` gave), in
    order, on the device: (N, ...)."""
    parts = []
    for batch in fetch(images, evaluation_splits(images), runtime):
        with runtime.autocast():
            parts.append(function(normalize(batch)))
    return gather(torch.cat(parts), len(images))


def predict(classify, images, normalize, runtime):
    """Classes int64 (N,), on the device, that a classifier sees in ``images`` (what `dataloader_bd.hold` gave). Raises `UserError`
    where its outputs are not finite, of which `argmax` would make class 0."""

    def classes(inputs):
        logits = classify(inputs)
        return logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1)

    found = outputs(classes, images, normalize, runtime)
    _refuse_no_answer(found >= 0)
    return found


def _refuse_no_answer(finite):
    """Raise a `UserError` where not all outputs are finite; of which images they are says ``finite``, bool (N,)."""
    lost = len(finite) - finite.sum().item()
    if lost > 0:
        raise UserError(
            f"the network's outputs are not finite for {lost} of {len(finite)} images: it has diverged, and nothing of this epoch is kept. "
            f"Use a smaller learning rate, or the checkpoint of an earlier epoch"
        )


def cross_entropies(model, images, labels, normalize, runtime):
    """How well a network in evaluation mode knows each sample, without augmentation: cross-entropies, float32 (N,), on the
    device.

    Args:
        model: maps normalised float images (B, 3, H, W) to logits (B, K); images: what `dataloader_bd.hold` gave; labels:
        int64 (N,), on the device; normalize: a `dataloader_bd.Normalize`; runtime: a `device.Runtime`.

    Raises:
        UserError: where the logits are not finite.
    """
    logits = outputs(model, images, normalize, runtime)
    _refuse_no_answer(logits.isfinite().all(1))
    return F.cross_entropy(logits.float(), labels, reduction="none")


def percent(hits):
    """The share of True in ``hits``, bool (N,), in per cent."""
    return round(100 * hits.float().mean().item(), 4)


def evaluate(classify, tests, normalize, runtime):
    """Accuracies of a classifier on both test sets (README: measures).

    Args:
        classify: maps normalised float images (B, 3, H, W) to logits (B, K); its network is in evaluation mode.
        tests: a `dataloader_bd.TestSets`, or None.
        normalize: a `dataloader_bd.Normalize`.
        runtime: a `device.Runtime`.

    Returns:
        dict of percentages: ACC (whole test set), and where there is an attack ACC_paper (without the target class, as the
        authors count), ASR (triggered images classified as the attack wants), R_ACC (as their true label) and ASR_clean
        (the same images without their trigger, classified as the attack wants all the same). Empty without test images.

    Raises:
        UserError: where the network's outputs are not finite.
    """
    if tests is None:
        return {}

    of_clean = predict(classify, tests.clean_images, normalize, runtime)
    right = of_clean == tests.clean_labels
    result = {"ACC": percent(right)}
    if tests.triggered_images is not None:
        result["ACC_paper"] = percent(right[tests.in_paper])
        predicted = predict(classify, tests.triggered_images, normalize, runtime)
        result["ASR"] = percent(predicted == tests.attack_labels)
        result["R_ACC"] = percent(predicted == tests.true_labels)
        result["ASR_clean"] = percent(of_clean[tests.in_paper] == tests.attack_labels)
    return result


# By what the authors choose the epoch: in words, and of a row of a log or of a whole one. The highest is chosen.
SELECTED_BY = {
    "D-BR": ("ACC_paper - ASR", lambda log: log["ACC_paper"] - log["ASR"]),
    "D-ST": ("ACC", lambda log: log["ACC"]),
}


def say_selection(history, defence):
    """Print the last epoch and the one that the authors would keep, which they choose on the test set (README: measures).

    Args:
        history: the rows of a log (list of dicts); defence: D-BR or D-ST.

    Returns:
        bool: whether there was something to print: rows with all measures, so an attack and test images.
    """
    rows = [row for row in history if row["epoch"] >= 0 and "ACC" in row]
    if not rows or not all(row.keys() >= {*MEASURES} for row in (*rows, history[-1])):
        return False
    words, score = SELECTED_BY[defence]
    kinds = {"Last epoch": history[-1], f"The paper's selection, by {words} on the test set": max(rows, key=score)}
    for name, row in kinds.items():
        print(f"{name} ({row['epoch'] + 1}): {', '.join(f'{key} {row[key]:.2f}' for key in MEASURES)}")
    return True


def auroc(scores, positive):
    """Area under the ROC curve of ``scores`` (float (N,)) for ``positive`` (bool (N,)); ties count one half."""
    ranks = pd.Series(scores).rank().to_numpy()  # of equal values their mean
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def detection_quality(fct, flags, is_clean, labels, num_classes):
    """How well a separation detects (README: measures). Reads the ground truth: for evaluation only.

    Args:
        fct: float (N,); flags: int64 (N,), the set of each sample as `separation.separate` gives it; is_clean: bool (N,) ground
        truth; labels: int64 (N,), as the victim gets them; num_classes: K.

    Returns:
        dict: AUROC in [0, 1]; Dp_precision, Dp_recall, Dc_contamination in per cent; sizes; Dc_per_class, a list.
    """
    poisoned, in_clean, in_poison = ~is_clean, flags == CLEAN, flags == POISON
    return {
        "AUROC": auroc(fct, poisoned),
        "Dp_precision": 100 * float(poisoned[in_poison].mean()),
        "Dp_recall": 100 * float(poisoned[in_poison].sum() / poisoned.sum()),
        "Dc_contamination": 100 * float(poisoned[in_clean].mean()),
        "Dc_size": int(in_clean.sum()),
        "Dp_size": int(in_poison.sum()),
        "Dc_per_class": np.bincount(labels[in_clean], minlength=num_classes).tolist(),
    }
