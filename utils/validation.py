"""Training samples held out to choose an epoch by."""

import numpy as np
import torch

from utils.dataloader_bd import hold
from utils.errors import UserError
from utils.files import as_logged
from utils.images import rows_of
from utils.metrics import percent, predict
from utils.paths import shown
from utils.seeding import generator
from utils.separation import share_of


class HeldOut:
    """A part of the training samples that is kept from training, to choose an epoch by without looking at the test set
    (--val_ratio). Its labels are those the victim has, poisoned ones among them.

    Args:
        labels: int64 (N,); ratio: share that is held out, 0 for none; seed, name: what the draw depends on; among: int64,
        the samples of which that share is taken, by default all.

    Raises:
        UserError: where that leaves fewer than two samples to train on, or is less than one.
    """

    def __init__(self, labels, ratio, seed, name, among=None):
        among = np.arange(len(labels)) if among is None else among
        count = share_of(ratio, len(among))
        if ratio and not 0 < count < len(among) - 1:
            raise UserError(f"--val_ratio {ratio} of {len(among)} samples leaves none to look at, or to train on")
        self.rows = np.sort(generator(seed, "held out", name).permutation(among)[:count])
        self.kept, self.labels = np.setdiff1d(np.arange(len(labels)), self.rows), labels

    def __len__(self):
        return len(self.rows)

    def rest(self, values):
        """What is trained on: ``values`` of all samples (an array, or streamed images) without those held out."""
        return rows_of(values, self.kept) if len(self) else values

    def accuracy(self, classify, images, normalize, runtime):
        """Per cent of the held-out samples that ``classify`` (see `metrics.evaluate`) sees as their label says; ``images``: of
        all samples."""
        found = predict(classify, hold(rows_of(images, self.rows), runtime), normalize, runtime)
        return percent(found == torch.from_numpy(self.labels[self.rows]).to(found.device))


def best_epoch(history, name):
    """Number, from 0, of the first epoch of a log (list of dicts) with the highest ``name``."""
    rows = [row for row in history if row["epoch"] >= 0 and name in row]
    return int(max(rows, key=lambda row: row[name])["epoch"])


def say_choice(history, name, place_of, loaded=None, by=""):
    """Print which epoch the held-out samples choose, and where its checkpoint is, if it is kept.

    Args:
        history, name: see `best_epoch`; place_of: gives the path of an epoch's (its number) checkpoint; loaded: path of that which was
        gone on with, beside which those before it are; by: what is highest then, in words.
    """
    epoch = best_epoch(history, name)
    place = place_of(epoch)
    kept = [path for path in (place, *([loaded.with_name(place.name)] if loaded else [])) if path.is_file()]
    where = shown(kept[0]) if kept else "its checkpoint is not kept here"
    print(f"The held-out samples choose epoch {epoch + 1}{by and f' ({by})'}: {where}")


def is_best(row, name, history):
    """Whether a ``row`` (dict) that is not in the log yet has a higher ``name`` than every epoch in ``history``."""
    earlier = [old[name] for old in history if old["epoch"] >= 0 and name in old]
    return all(as_logged(row[name]) > value for value in earlier)
