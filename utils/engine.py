"""The one training loop that the steps share."""

import time

import torch
from tqdm import tqdm

from utils.errors import UserError


def train_epoch(model, batches, epoch, objective, optimizer, runtime, title, before_batch=None):
    """Train for one epoch.

    Args:
        model: the network; the caller puts it into training mode.
        batches: a `dataloader_bd.Batches`.
        objective: ``(model, inputs, labels)`` -> ``(loss, sums)``; with ``batches.extra``, that too.
        optimizer: of the weights to train.
        title: what the progress bar says.
        before_batch: called with the number of the batch, e.g. to set the learning rate.

    Returns:
        dict: ``loss`` (mean over samples), each of the objective's sums over the samples seen, and ``seconds``.

    Raises:
        UserError: where there is no batch, or the loss is not finite.
    """
    if len(batches) == 0:
        raise UserError(f"{len(batches.labels)} samples make no batch of two or more; there is nothing to train on")
    started = time.perf_counter()
    totals, seen = {}, 0
    for number, (inputs, labels, extra) in enumerate(progress(batches.epoch(epoch), title, len(batches))):
        if before_batch:
            before_batch(number)
        with runtime.autocast():
            loss, sums = objective(model, inputs, labels) if extra is None else objective(model, inputs, labels, extra)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen += len(labels)
        for name, value in {"loss": loss.detach() * len(labels), **sums}.items():
            totals[name] = totals.get(name, 0) + value  # stays on the device: reading it would wait for the device
    means = {name: torch.as_tensor(value).item() / seen for name, value in totals.items()}
    if not all(torch.isfinite(torch.tensor(list(means.values())))):
        raise UserError(f"the loss is not finite in {title}; earlier epochs are kept. Use a smaller learning rate")
    return {**means, "seconds": round(time.perf_counter() - started, 2)}


def progress(iterable, title, total):
    """A tqdm bar in a terminal, nothing in a pipe or a log."""
    return tqdm(iterable, title, total, leave=False, dynamic_ncols=True, disable=None)
