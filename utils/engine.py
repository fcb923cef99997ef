"""The one training loop that the steps share."""

import time

import torch

from utils.compiling import compiled, step_of
from utils.distributed import Parallel, parallel, world
from utils.errors import UserError
from utils.progress import progress


def train_epoch(model, batches, epoch, objective, optimizer, runtime, title, before_batch=None):
    """Train for one epoch.

    Args:
        model: the network; the caller puts it into training mode.
        batches: a `dataloader_bd.Batches`; epoch: its number from 0, which decides order and augmentation.
        objective: ``(model, inputs, labels)`` -> ``(loss, sums)``; with ``batches.extra``, that too.
        optimizer: of the weights to train; runtime: a `device.Runtime`.
        title: what the progress bar says.
        before_batch: called with the number of the batch, e.g. to set the learning rate.

    Returns:
        dict: ``loss`` (mean over samples), each of the objective's sums over the samples seen, and ``seconds``; the sum
        ``correct`` as ``train_acc``, in per cent.

    Raises:
        UserError: where there is no batch, or the loss or one of the sums is not finite.
    """
    if len(batches) == 0:
        raise UserError(f"{len(batches.rows)} samples make no batch of two or more; there is nothing to train on")
    started = time.perf_counter()
    seen, step = 0, step_of(model, objective, optimizer, runtime, batches.batch_size)
    step.begin()
    for number, (inputs, labels, extra) in enumerate(progress(batches.epoch(epoch), title, len(batches))):
        if before_batch:
            before_batch(number)
        if isinstance(model, Parallel):
            model.batch(len(labels), batches.views)
        step(inputs, labels, *([] if extra is None else [extra]))
        seen += len(labels)
        _refuse_bad_numbers(step, number + 1, title, batches)
    if isinstance(model, Parallel):
        model.batch(None, 1)
    means = {name: total.item() / seen for name, total in step.totals.items()}
    right = {"train_acc": 100 * means.pop("correct")} if "correct" in means else {}
    return {**means, "seconds": round(time.perf_counter() - started, 2), **right}


def prepare(network, opt, runtime, batches, unused=False):
    """A network, on its device, as it is trained: compiled, and its step a CUDA graph, where ``opt.compile`` says so, and shared
    by the processes of torchrun. ``batches``: the `dataloader_bd.Batches` it is trained on; unused: whether the loss leaves
    some weights without a gradient."""
    if world() == 1:
        whole, total = batches.batch_size * batches.views, opt.epochs * len(batches.labels) * batches.views
        network = compiled(network, opt.compile, runtime, whole, batches.images.shape[2], total)
        if runtime.device.type == "cuda" and opt.compile != "off":
            network.graphs = {}
    return parallel(network, runtime, unused)


WATCH_EVERY = 50  # batches


def _refuse_bad_numbers(step, done, title, batches):
    """Stop a training whose sums have gone bad, after ``done`` of an epoch's ``batches``. The device is waited for: the CPU after
    every batch, others at the end of the epoch, and where images are streamed now and then, or else those of many batches
    would lie ready in pinned memory."""
    every = 1 if step.finite.device.type == "cpu" else WATCH_EVERY if batches.streamed else len(batches)
    if done % every and done < len(batches):
        return
    finite = step.finite.item()
    if finite < done:
        names = [name for name, value in step.totals.items() if not torch.isfinite(value)]
        raise UserError(
            f"{', '.join(names)} is not finite in {title}, batch {finite + 1} of {len(batches)}; nothing "
            f"of this epoch is kept, the earlier checkpoints are. Use a smaller learning rate"
        )
