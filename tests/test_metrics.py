"""The measures against counts by hand."""

import math

import numpy as np
import pytest
import torch

from utils import dataloader_bd as bd
from utils.datasets import DATASETS
from utils.device import Runtime
from utils.errors import UserError
from utils.metrics import auroc, cross_entropies, detection_quality, evaluate

CPU = Runtime(torch.device("cpu"), torch.float32)
SPEC = DATASETS["cifar10"]


@pytest.mark.parametrize("levels", [3, 10, 10**6])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_auroc_equals_the_count_of_pairs_with_ties_as_one_half(levels, share):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 120).astype(np.float32)
    positive = rng.random(120) < share
    pairs = [(high > low) + 0.5 * (high == low) for high in scores[positive] for low in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auroc_of_perfect_reversed_and_constant_scores():
    positive = np.array([False, False, True, True])
    assert auroc(np.array([1.0, 2, 3, 4]), positive) == 1
    assert auroc(np.array([4.0, 3, 2, 1]), positive) == 0
    assert auroc(np.zeros(4), positive) == 0.5


@pytest.mark.parametrize("value", [True, False])
def test_auroc_of_a_single_kind_is_not_a_number(value):
    assert math.isnan(auroc(np.arange(4.0), np.full(4, value)))


def make_tests(triggered=True, clean_count=1203):
    rng = np.random.default_rng(2)

    def images(count):
        return torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))

    def labels(count):
        return torch.from_numpy(rng.integers(0, 4, count))

    in_paper = torch.from_numpy(np.flatnonzero(rng.random(clean_count) < 0.6))
    attacked = len(in_paper)  # a triggered image of each that counts
    more = (images(attacked), labels(attacked), labels(attacked)) if triggered else (None,) * 3
    return bd.TestSets(images(clean_count), labels(clean_count), in_paper, *more)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_class(bad):
    def broken(inputs):  # on white images
        return classify(inputs).masked_fill(inputs.mean((1, 2, 3))[:, None] > 2, bad)

    def partly(inputs):  # one logit of those
        white = inputs.mean((1, 2, 3))[:, None] > 2
        return classify(inputs).masked_fill(white & (torch.arange(4) == 3), bad)

    tests, normalize = make_tests(), bd.Normalize(SPEC, CPU.device)
    evaluate(broken, tests, normalize, CPU)
    tests.clean_images[[3, 700]] = 255
    for network in (broken, partly):
        with pytest.raises(UserError, match=r"not finite for 2 of 1203 images.*smaller learning rate"):
            evaluate(network, tests, normalize, CPU)
    with pytest.raises(UserError, match="1 of 5 images"):
        cross_entropies(broken, tests.clean_images[:5], tests.clean_labels[:5], normalize, CPU)


def classify(inputs):
    """A fake network with four classes and a taste for some of them."""
    weights = torch.randn(inputs[0].numel(), 4, generator=torch.Generator().manual_seed(1))
    return inputs.flatten(1) @ weights


def test_evaluate_equals_a_loop_over_single_images():
    tests, normalize = make_tests(), bd.Normalize(SPEC, CPU.device)

    def percent(images, labels, keep=None):
        hits = [
            int(classify(normalize(image[None]))[0].argmax()) == int(label)
            for row, (image, label) in enumerate(zip(images, labels, strict=True))
            if keep is None or row in keep
        ]
        return 100 * sum(hits) / len(hits)

    result = evaluate(classify, tests, normalize, CPU)
    expected = {
        "ACC": percent(tests.clean_images, tests.clean_labels),
        "ACC_paper": percent(tests.clean_images, tests.clean_labels, set(tests.in_paper.tolist())),
        "ASR": percent(tests.triggered_images, tests.attack_labels),
        "R_ACC": percent(tests.triggered_images, tests.true_labels),
        "ASR_clean": percent(
            [tests.clean_images[row] for row in tests.in_paper],
            tests.attack_labels,
        ),
    }
    swapped = percent([tests.clean_images[row] for row in tests.in_paper], tests.true_labels)
    assert len({*expected.values(), swapped}) == 6  # so that none can stand for another
    assert result == pytest.approx(expected, abs=1e-4)


def test_evaluate_without_a_triggered_set_gives_the_accuracies_alone():
    assert evaluate(classify, make_tests(False), bd.Normalize(SPEC, CPU.device), CPU).keys() == {"ACC"}


def test_detection_quality_of_a_case_counted_by_hand():
    fct = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=np.float32)
    is_clean = np.array([1, 1, 0, 1, 1, 1, 0, 1, 0, 0]).astype(bool)
    labels = np.array([0, 1, 0, 2, 2, 1, 0, 1, 0, 0])
    result = detection_quality(fct, np.repeat([0, 1, 2], [4, 3, 3]), is_clean, labels, 4)
    # Of the 24 pairs, the poisoned samples of ranks 3, 7, 9 and 10 stand above 2, 5, 6 and 6 clean ones.
    assert result == {
        "AUROC": pytest.approx(19 / 24),
        "Dp_precision": pytest.approx(200 / 3),
        "Dp_recall": 50,
        "Dc_contamination": 25,
        "Dc_size": 4,
        "Dp_size": 3,
        "Dc_per_class": [2, 1, 1, 0],
    }
