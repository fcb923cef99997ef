"""Objectives of the training steps: functions (model, inputs, labels) -> (loss, sums over the batch to be logged).

The model maps inputs, float (B, 3, H, W), to logits (B, K); labels are int64 (B,), losses scalars in nats, but L_intra's.
"""

import torch
import torch.nn.functional as F


def cross_entropy(model, inputs, labels):
    """Cross-entropy, with ``correct``: how many of the batch are classified as their (given) label."""
    logits = model(inputs).float()
    return F.cross_entropy(logits, labels), {"correct": (logits.argmax(1) == labels).sum()}


ASCENT_BOUND = 100.0  # nats; a network that has forgotten a sample gives it no less than e^-100


def negative_cross_entropy(model, inputs, labels, bound=ASCENT_BOUND):
    """Gradient ascent on the cross-entropy, as a loss to be minimised (paper section 4.3, unlearning).

    A guard that is not in the paper: a sample whose cross-entropy is above ``bound`` pushes no further, for ascent has
    no end of its own; ``at_bound`` counts them. With the paper's settings there are none.
    """
    logits = model(inputs).float()
    each = F.cross_entropy(logits, labels, reduction="none")
    sums = {"correct": (logits.argmax(1) == labels).sum(), "at_bound": (each > bound).sum()}
    return -each.clamp(max=bound).mean(), sums


def intra_class_loss(features, labels, classes):
    """L_intra (paper section 4.1): how alike the mean features of different classes are.

    Args:
        features: float (B, D); labels: int64 (B,), below ``classes``.

    Returns:
        Scalar: the cosines of all ordered pairs of different class means, summed, over K'^2 with K' classes present; of a single
        class zero.

    Computed in the dtype of ``features`` under autocast too, which would take its products in bfloat16: the cosines are near one.
    """
    members = (torch.arange(classes, device=labels.device)[:, None] == labels).to(features.dtype)
    counts = members.sum(1, keepdim=True)
    with torch.autocast(features.device.type, enabled=False):
        means = F.normalize(members @ features / counts.clamp(min=1), dim=1)  # of a class that is absent zero
        cosines = means @ means.T
    return (cosines.sum() - cosines.diagonal().sum()) / (counts > 0).sum() ** 2


def intra_class(model, inputs, labels):
    """L_intra alone, with the accuracy and the sum of feature norms, which tells of a collapse."""
    features = model.features(inputs).float()
    with torch.no_grad():
        correct = (model.fc(features).argmax(1) == labels).sum()
    loss = intra_class_loss(features, labels, model.fc.out_features)
    return loss, {"correct": correct, "feature_norm": features.detach().norm(dim=1).sum()}
