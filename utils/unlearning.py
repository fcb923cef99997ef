"""Rules of unlearn_relearn.py that are not in the paper, all off by default: a bound of the ascent that grows, and a descent that
leaves out doubtful samples of D_c. None looks at the ground truth or a test set."""

import math

import torch

from utils.errors import UserError
from utils.losses import ASCENT_BOUND
from utils.metrics import cross_entropies

HELD = 0.1  # share of D_p from which on the bound is what stops the ascent
DOUBTFUL = 0.1  # share of the samples of a label in D_c that can be poisoned


def sample_losses(model, batches, runtime):
    """Cross-entropy of each sample of D_p or D_c, see `metrics.cross_entropies`."""
    return cross_entropies(model, batches.images, batches.labels, batches.normalize, runtime)


class Dropped:
    """Which samples of D_c the descents leave out: the `doubtful` ones.

    Args:
        stay: whether those last left out stay so where more than `DOUBTFUL` would be doubtful; else none is left out then.
    """

    def __init__(self, stay):
        self.stay, self.rows = stay, torch.empty(0, dtype=torch.int64)

    def rest(self, model, to_relearn, to_unlearn, classes, runtime):
        """(the batches of D_c without those samples, how many they are); the network is left in training mode."""
        model.eval()
        both = to_relearn, to_unlearn
        values = [sample_losses(model, batches, runtime) for batches in both]
        drop = doubtful(*values, *(batches.labels for batches in both), classes)
        model.train()
        if drop is not None:
            self.rows = torch.where(drop)[0].cpu()
        elif not self.stay:
            self.rows = self.rows[:0]
        taken = torch.ones(len(to_relearn.labels), dtype=torch.bool)
        taken[self.rows] = False
        return to_relearn.only(torch.where(taken)[0]), len(self.rows)

    def state_dict(self):
        """What a run that goes on has to know, for its checkpoint."""
        return {"dropped": self.rows.tolist()}

    def load(self, state, count, path):
        """Take over the ``state`` that the checkpoint in ``path`` holds, of a D_c of ``count`` samples. Raises `UserError` for
        any other."""
        rows = state.get("dropped", [])
        if not (isinstance(rows, list) and all(type(row) is int and 0 <= row < count for row in rows)):
            raise UserError(
                f"{path} does not hold which of the {count} samples of D_c were left out; begin anew without it"
            )
        self.rows = torch.tensor(rows, dtype=torch.int64)


def bound_of(opt, history, classes):
    """The ascent's bound in the epoch after ``history`` (the rows of the log), in nats.

    One bound does not suit every trigger: where the descent on D_c brings the backdoor back, the ascent has to go further. It grows
    after an epoch in which it held `HELD` of D_p and which left D_p's cross-entropy below ln(``classes``), where a guess would do worse.
    Not in the paper.
    """
    bound, end = opt.ascent_bound, max(opt.ascent_bound, ASCENT_BOUND)
    for row in history:
        if row.get("at_bound", 0) >= HELD and row.get("loss_Dp_after", math.inf) < math.log(classes):
            bound = min(bound * opt.bound_growth, end)
    return bound


def doubtful(clean, poisoned, labels, poisoned_labels, classes):
    """Samples of D_c that the ascent on D_p has taken along, as it does those that carry the trigger: not in the paper.

    Args:
        clean, poisoned: float (N,), (M,), cross-entropy of D_c and of D_p after the ascent, in nats; labels, poisoned_labels: int64 (N,),
        (M,), theirs; classes: how many there are.

    Returns:
        bool (N,): True for a sample of D_c where D_p has its label at least twice as often as chance would give, and its cross-entropy
        is above half of D_p's mean and above 2 ln(classes), that of two guesses in a row. None where these are more than
        `DOUBTFUL` of the samples with such labels: D_p then holds clean samples too, or the ascent has gone on for long, and what it
        took along has to be relearnt.
    """
    often = torch.bincount(poisoned_labels, minlength=classes) * classes >= 2 * len(poisoned_labels)
    found = often[labels] & (clean > max(poisoned.mean().item() / 2, 2 * math.log(classes)))
    return found if found.sum() <= DOUBTFUL * often[labels].sum() else None
