"""What data handling costs: the training loop of the scripts beside the bare network."""

import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import build_model
from models.resnet import with_plain_convolutions
from utils.dataloader_bd import Batches
from utils.device import choose_runtime
from utils.engine import train_epoch
from utils.losses import cross_entropy
from utils.transforms import CropFlip
from utils.triggers import TRIGGERS, apply_trigger

BATCH, COUNT, ROUNDS = 128, 6, 5


def seconds_of(runs):
    """Median seconds of each of ``runs`` (functions by name), turn about, so that a machine that slows down slows all."""
    times = {name: [] for name in runs}
    for run in runs.values():  # not counted
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def bare(model, inputs, wanted, runtime):
    """Training of the network alone: the same batch, `COUNT` times."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def run():
        for _ in range(COUNT):
            with runtime.autocast():
                loss = F.cross_entropy(model(inputs).float(), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


def said(runtime, seconds):
    rates = ", ".join(f"{name} {BATCH * COUNT / value:.0f} images/s" for name, value in seconds.items())
    print(f"{runtime}: {rates}")


@pytest.fixture
def images_and_labels(fashion):
    rows = slice(0, BATCH * COUNT)
    return fashion.train_images[rows], fashion.train_labels[rows]


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [None, CropFlip()], ids=["noTrans", "withTrans"])
def test_training_costs_at_most_a_tenth_more_than_the_bare_network(fashion, images_and_labels, augmentation):
    runtime = choose_runtime("auto", "auto")
    model = runtime.place(build_model("resnet18", "cifar10", 10)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = Batches(*images_and_labels, fashion.spec, runtime, BATCH, 0, "speed", augmentation=augmentation)
    inputs, wanted, _ = next(batches.epoch(0))

    def ours():
        train_epoch(model, batches, 0, cross_entropy, optimizer, runtime, "speed")

    seconds = seconds_of({"bare network": bare(model, inputs, wanted, runtime), "ours": ours})
    said(runtime, seconds)
    assert seconds["ours"] <= 1.1 * seconds["bare network"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("name", ["resnet18", "resnet10"])
def test_small_maps_train_no_slower_than_with_plain_convolutions(fashion, images_and_labels, name, precision):
    runtime = choose_runtime("cpu", precision)
    inputs, wanted, _ = next(Batches(*images_and_labels, fashion.spec, runtime, BATCH, 0, "speed").epoch(0))
    networks = {kind: build_model(name, "cifar10", 10) for kind in ("plain convolutions", "small maps")}
    with_plain_convolutions(networks["plain convolutions"])
    seconds = seconds_of(
        {kind: bare(runtime.place(model).train(), inputs, wanted, runtime) for kind, model in networks.items()}
    )
    said(runtime, seconds)
    assert seconds["small maps"] <= 1.05 * seconds["plain convolutions"]


@pytest.mark.parametrize("trigger_type", [name for name in TRIGGERS if name != "SSBA"])
def test_poisoning_fifty_thousand_images_takes_less_than_a_second(fashion, trigger_type):
    images = np.tile(fashion.train_images, (5, 1, 1, 1))

    def seconds():  # of the processor, for others may use it too; a loop over images takes minutes
        started = time.process_time()
        apply_trigger(trigger_type, images, train=True)
        return time.process_time() - started

    assert min(seconds(), seconds()) < (3 if trigger_type == "warpTrigger" else 1)  # which interpolates
