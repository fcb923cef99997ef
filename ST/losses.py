"""The losses of secure training, usable alone."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SupConLoss(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020, equation 2; paper section 4.2).

    Args:
        temperature: what similarities are divided by; base_temperature: the loss is scaled by their ratio.
    """

    def __init__(self, temperature=0.1, base_temperature=0.07):
        super().__init__()
        self.temperature, self.base_temperature = temperature, base_temperature

    def forward(self, features, mask=None):
        """
        Args:
            features: float (B, V, D), V views of each sample, each of length one.
            mask: bool (B, B), whether samples i and j are of one kind; its diagonal must be True. None: every sample
                is of its own kind, which makes this the loss of SimCLR.

        Returns:
            Scalar loss, the mean over all views of all samples. The positives of a view are all other views of its
            sample and all views of samples of its kind. Computed in the dtype of ``features``, under autocast too.

        Raises:
            ValueError: for features or a mask of another shape, or fewer than two views.
        """
        if features.ndim != 3 or features.shape[1] < 2:
            raise ValueError(f"features must be (B, V, D) with V at least 2, not {tuple(features.shape)}")
        count, views = features.shape[:2]
        if mask is None:
            mask = torch.eye(count, dtype=torch.bool, device=features.device)
        elif mask.shape != (count, count):
            raise ValueError(f"mask must be ({count}, {count}), not {tuple(mask.shape)}")
        flat = features.transpose(0, 1).flatten(0, 1)  # (V * B, D), all first views before all second ones
        itself = torch.eye(views * count, dtype=torch.bool, device=features.device)
        positive = mask.bool().repeat(views, views) & ~itself
        with torch.autocast(features.device.type, enabled=False):
            similarity = (flat @ flat.T / self.temperature).masked_fill(itself, float("-inf"))
        log_probability = F.log_softmax(similarity, dim=1).masked_fill(itself, 0)
        each = -(log_probability * positive).sum(1) / positive.sum(1)
        return self.temperature / self.base_temperature * each.mean()


def trusted_mask(labels, trusted):
    """Which samples may be positives of each other besides themselves: trusted ones with one label (paper section 4.2).

    Args:
        labels: int64 (B,); trusted: bool (B,), whether a sample's label counts, in the paper those of D_c.

    Returns:
        bool (B, B). Any other sample has no positive but itself, and is none of another's: neither its row nor
        its column is set, which the authors' code does for the row alone.
    """
    same = (labels[:, None] == labels) & trusted[:, None] & trusted
    return same | torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def authors_mask(labels, trusted):
    """As the authors' code builds the mask, for comparison: a sample of D_p or D_u has no positive but itself, yet is one of
    the samples of D_c with its label, so that a poisoned sample pulls its target class.

    Args and return value as in `trusted_mask`.
    """
    same = (labels[:, None] == labels) & trusted[:, None]
    return same | torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def contrastive(model, inputs, labels, trusted, loss_of, mask=trusted_mask):
    """What the extractor is trained on, as an objective of `engine.train_epoch`.

    Args:
        model: maps inputs to float (2B, D) of length one; inputs: float (2B, 3, H, W), the first view of all samples before the
        second of all; labels: int64 (B,); trusted: int64 (B,), 1 where a label counts; loss_of: a `SupConLoss`; mask: `trusted_mask`
        or `authors_mask`.
    """
    first, second = model(inputs).float().chunk(2)
    return loss_of(torch.stack([first, second], 1), mask(labels, trusted.bool())), {}


def classify(model, inputs, labels, in_clean, extractor, poison_weight=0.001, bound=math.inf):
    """What the classifier is trained on, as an objective of `engine.train_epoch`; the extractor stays as it is.

    Args:
        model: maps features float (B, D) to logits (B, K); inputs: float (B, 3, H, W); labels: int64 (B,); in_clean: int64 (B,), 1 for
        D_c, 0 for D_p; extractor: a `SupConResNet` in evaluation mode; poison_weight, bound: see `mixed_cross_entropy`.
    """
    with torch.no_grad():
        features = extractor.features(inputs).float()
    logits = model(features).float()
    loss = mixed_cross_entropy(logits, labels, in_clean.bool(), poison_weight, bound)
    return loss, {"correct": (logits.argmax(1) == labels).sum()}


def mixed_cross_entropy(logits, labels, in_clean, poison_weight=0.001, bound=math.inf):
    """CE over D_c minus ``poison_weight`` times CE over D_p (paper section 4.2, the classifier's loss).

    Args:
        logits: float (B, K); labels: int64 (B,); in_clean: bool (B,), True for D_c, False for D_p; bound: in nats, not in the paper:
        a sample of D_p whose cross-entropy is above it pushes no further.

    Returns:
        Scalar; a set with no sample in the batch adds nothing.
    """
    each = F.cross_entropy(logits, labels, reduction="none")

    def mean(values, members):
        # Not a product: infinity times zero, of a sample of the other set, is no number.
        return torch.where(members, values, 0).sum() / members.sum().clamp(min=1)

    return mean(each, in_clean) - poison_weight * mean(each.clamp(max=bound), ~in_clean)
