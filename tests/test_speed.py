"""What data handling costs: the training loop of the scripts beside the bare network."""

import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import build_model
from utils.dataloader_bd import Batches
from utils.device import choose_runtime
from utils.engine import train_epoch
from utils.losses import cross_entropy
from utils.transforms import CropFlip
from utils.triggers import apply_trigger

BATCH, COUNT = 128, 6


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [None, CropFlip(32)], ids=["noTrans", "withTrans"])
def test_training_costs_at_most_a_tenth_more_than_the_bare_network(fashion, augmentation):
    runtime = choose_runtime("auto", "auto")
    model = runtime.place(build_model("resnet18", "cifar10", 10)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    rows = slice(0, BATCH * COUNT)
    images, labels = fashion.train_images[rows], fashion.train_labels[rows]
    batches = Batches(images, labels, fashion.spec, runtime, BATCH, 0, "speed", augmentation=augmentation)
    inputs, wanted, _ = next(batches.epoch(0))

    def ours():
        train_epoch(model, batches, 0, cross_entropy, optimizer, runtime, "speed")

    def bare():
        for _ in range(COUNT):
            with runtime.autocast():
                loss = F.cross_entropy(model(inputs).float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    times = SimpleNamespace(ours=[], bare=[])
    bare()
    for _ in range(5):  # turn about, so that a machine that slows down slows both
        for name, run in (("bare", bare), ("ours", ours)):
            started = time.perf_counter()
            run()
            getattr(times, name).append(time.perf_counter() - started)
    ratio = statistics.median(times.ours) / statistics.median(times.bare)
    rates = {name: BATCH * COUNT / statistics.median(values) for name, values in vars(times).items()}
    print(f"{runtime}: ours {rates['ours']:.0f} images/s, bare network {rates['bare']:.0f}, ratio of times {ratio:.3f}")
    assert ratio <= 1.1


def test_poisoning_fifty_thousand_images_takes_about_a_second(fashion):
    images = np.tile(fashion.train_images, (5, 1, 1, 1))
    for trigger_type in ("gridTrigger", "squareTrigger", "signalTrigger", "sigTrigger"):
        started = time.perf_counter()
        apply_trigger(trigger_type, images, train=True)
        assert time.perf_counter() - started < 5, trigger_type  # a loop over images takes minutes
