"""Adversarial perturbation of the CL attack (Turner et al. 2019; paper appendix)."""

import numpy as np
import torch
import torch.nn.functional as F

from models import MODELS, build_model
from utils.checkpoints import load_checkpoint
from utils.errors import UserError
from utils.paths import shown
from utils.progress import progress
from utils.seeding import generator
from utils.weights import load_weights

EPSILON, STEP_SIZE, STEPS = 8, 2, 4  # grey levels, of 255
BATCH = 50


def load_benign_model(path, opt, spec, command):
    """The network of a checkpoint of train_clean_withTrans.py, in evaluation mode on the CPU.

    Raises:
        UserError: where ``path`` is missing (``command`` makes it), damaged, or of another data set.
    """
    checkpoint = load_checkpoint(path, opt, command, ["train_clean_withTrans"], ["dataset"])
    name = checkpoint["options"].get("model")
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"{shown(path)} does not say which of {', '.join(MODELS)} it is of; make one with: {command}")
    model = build_model(name, opt.dataset, spec.num_classes, spec.size)
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def perturb(model, images, labels, index, spec, seed):
    """Projected gradient ascent on the cross-entropy: L-infinity, epsilon 8/255, 4 steps of 2/255, random start.

    Computed in float64 on the CPU, so that batch size and machine do not decide the sign of a gradient.

    Args:
        model: a network in evaluation mode, on the CPU; images: uint8 (N, H, W, 3); labels: int64 (N,), true;
        index: int64 (N,), the samples' places in the data set, on which their random start depends;
        spec: the data set's `datasets.Spec`, with whose mean and deviation the model was trained; seed: of the start.

    Returns:
        uint8 (N, H, W, 3), nowhere further than 8 grey levels from ``images``.
    """
    model = model.double().requires_grad_(False)
    mean, std = (255 * torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (spec.mean, spec.std))
    result = np.empty_like(images)
    splits = np.array_split(np.arange(len(images)), -(-len(images) // BATCH))
    for rows in progress(splits, "PGD", len(splits)):
        start = np.stack([generator(seed, "PGD", i).uniform(-EPSILON, EPSILON, images.shape[1:]) for i in index[rows]])
        original = torch.from_numpy(images[rows]).double()
        target = torch.from_numpy(labels[rows])
        current = (original + torch.from_numpy(start)).clamp(0, 255)
        for _ in range(STEPS):
            current.requires_grad_(True)
            loss = F.cross_entropy(model((current.permute(0, 3, 1, 2) - mean) / std), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, current)
            current = current.detach() + STEP_SIZE * gradient.sign()
            current = torch.clamp(current, original - EPSILON, original + EPSILON).clamp(0, 255)
        result[rows] = current.round().to(torch.uint8).numpy()
    return result
