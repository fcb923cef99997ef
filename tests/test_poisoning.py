"""Which samples the attacker changes and how, the test sets, and the batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from utils import dataloader_bd as bd
from utils import poisoning
from utils.datasets import DATASETS, Dataset
from utils.device import Runtime
from utils.engine import train_epoch
from utils.errors import UserError
from utils.transforms import ContrastiveView, CropFlip
from utils.triggers import apply_trigger

CPU = Runtime(torch.device("cpu"), torch.float32)
SPEC = DATASETS["cifar10"]
TYPES = ("all2one", "all2all", "cleanLabel")
TRIGGERS = (
    "gridTrigger",
    "squareTrigger",
    "signalTrigger",
    "sigTrigger",
    "trojanTrigger",
    "kittyTrigger",
    "warpTrigger",
)


def options(**changes):
    attack = {"trigger_type": "gridTrigger", "target_type": "all2one", "target_label": 0, "poison_rate": 0.1, "seed": 0}
    return SimpleNamespace(**{"image_size": None, **attack, **changes})


def make_dataset(train=400, test=120):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (train + test, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, train + test)
    classes = [str(label) for label in range(10)]
    return Dataset("cifar10", SPEC, classes, images[:train], labels[:train], images[train:], labels[train:], "test")


def poison(**changes):
    return poisoning.poison_training_set(make_dataset(), options(**changes))


# The poisoned training set


@pytest.mark.parametrize(("target_type", "count"), [("all2one", 4500), ("all2all", 5000), ("cleanLabel", 500)])
def test_rate_is_a_share_of_the_eligible_samples(target_type, count):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 5000))
    chosen = poisoning.poisoned_indices(labels, target_type, 3, 0.1, seed=0)
    assert len(chosen) == count == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    found = set(labels[chosen].tolist())
    assert found == {"all2one": set(range(10)) - {3}, "all2all": set(range(10)), "cleanLabel": {3}}[target_type]


@pytest.mark.parametrize(("rate", "count"), [(0.29, 29), (0.57, 57), (0.07, 7), (0.999, 99), (1.0, 100), (0.01, 1)])
def test_count_is_exact_where_floating_point_is_not(rate, count):
    assert len(poisoning.poisoned_indices(np.zeros(100, dtype=np.int64), "cleanLabel", 0, rate, seed=0)) == count


def test_poisoned_samples_are_spread_over_the_set():
    labels = np.repeat(np.arange(10), 1000)
    per_class = np.bincount(labels[poisoning.poisoned_indices(labels, "all2all", 0, 0.1, seed=0)])
    assert (abs(per_class - 100) < 40).all()


def test_a_rate_that_poisons_nothing_is_refused():
    with pytest.raises(UserError, match="poison_rate"):
        poisoning.poisoned_indices(np.arange(10), "cleanLabel", 0, 0.5, seed=0)


@pytest.mark.parametrize("target_type", TYPES)
def test_labels_change_as_the_attack_wants_and_only_on_poisoned_samples(target_type):
    dataset = make_dataset()
    poisoned = poisoning.poison_training_set(dataset, options(target_type=target_type, target_label=4, poison_rate=0.5))
    assert 0 < (~poisoned.is_clean).sum() < len(dataset.train_labels)
    for new, true, is_clean in zip(poisoned.labels, dataset.train_labels, poisoned.is_clean, strict=True):
        assert new == (true if is_clean else (true + 1) % 10 if target_type == "all2all" else 4)
        assert is_clean or target_type == "all2all" or (true == 4) == (target_type == "cleanLabel")
    np.testing.assert_array_equal(poisoned.true_labels, dataset.train_labels)
    np.testing.assert_array_equal(poisoned.index, np.arange(len(dataset.train_labels)))


def test_the_last_class_of_all2all_becomes_the_first():
    assert poisoning.attack_label(np.array([0, 8, 9]), "all2all", 5, 10).tolist() == [1, 9, 0]


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("target_type", TYPES)
def test_exactly_the_samples_flagged_poisoned_carry_the_training_trigger(target_type, trigger):
    dataset = make_dataset()
    before = dataset.train_images.copy(), dataset.train_labels.copy()
    poisoned = poisoning.poison_training_set(dataset, options(target_type=target_type, trigger_type=trigger))
    np.testing.assert_array_equal((poisoned.images != before[0]).any((1, 2, 3)), ~poisoned.is_clean)
    triggered = apply_trigger(trigger, before[0], train=True)
    np.testing.assert_array_equal(poisoned.images[~poisoned.is_clean], triggered[~poisoned.is_clean])
    np.testing.assert_array_equal(dataset.train_images, before[0])  # the data set itself is untouched
    np.testing.assert_array_equal(dataset.train_labels, before[1])


def test_poisoning_depends_on_the_seed_and_on_no_global_generator():
    first = poison()
    np.random.seed(99)
    torch.manual_seed(99)
    np.random.default_rng(0).random(10)
    again = poison()
    assert first.digest == again.digest
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    other = poison(seed=1)
    assert other.digest != first.digest
    assert (other.is_clean != first.is_clean).any()


def test_digest_tells_poisoned_sets_apart():
    assert len({poison(**change).digest for change in ({}, {"poison_rate": 0.2}, {"target_type": "all2all"})}) == 3


def test_which_samples_are_poisoned_does_not_depend_on_the_trigger_but_the_digest_does():
    np.testing.assert_array_equal(poison(trigger_type="sigTrigger").is_clean, poison().is_clean)
    assert poison(trigger_type="sigTrigger").digest != poison().digest


# The test sets


@pytest.mark.parametrize("trigger", ["gridTrigger", "sigTrigger"])
@pytest.mark.parametrize("target_type", TYPES)
def test_triggered_test_set_is_the_one_of_the_table(target_type, trigger):
    dataset = make_dataset()
    opt = options(target_type=target_type, trigger_type=trigger, target_label=2)
    tests = bd.make_test_sets(dataset, opt, CPU)
    np.testing.assert_array_equal(tests.clean_images.permute(0, 2, 3, 1), dataset.test_images)
    np.testing.assert_array_equal(tests.clean_labels, dataset.test_labels)
    attacked = [row for row, label in enumerate(dataset.test_labels) if target_type == "all2all" or label != 2]
    np.testing.assert_array_equal(tests.in_paper, attacked)
    expected = apply_trigger(trigger, dataset.test_images, train=False)[attacked]
    np.testing.assert_array_equal(tests.triggered_images.permute(0, 2, 3, 1), expected)
    assert tests.triggered_images.dtype == tests.clean_images.dtype == torch.uint8
    true = dataset.test_labels[attacked]
    np.testing.assert_array_equal(tests.true_labels, true)
    wanted = [(label + 1) % 10 if target_type == "all2all" else 2 for label in true]
    assert tests.attack_labels.tolist() == wanted
    assert tests.attack_labels.dtype == tests.true_labels.dtype == tests.clean_labels.dtype == torch.int64


def test_without_an_attack_there_is_the_clean_test_set_alone():
    tests = bd.make_test_sets(make_dataset(), None, CPU, attack=False)
    assert tests.triggered_images is tests.attack_labels is tests.true_labels is None
    assert tests.in_paper is None and len(tests.clean_images) == len(tests.clean_labels) == 120


# Normalisation and batches


def test_normalize_equals_torchvision_on_bytes_and_floats():
    images = torch.from_numpy(make_dataset(8, 0).train_images).permute(0, 3, 1, 2)
    floats = TF.convert_image_dtype(images, torch.float32)
    expected = TF.normalize(floats, SPEC.mean, SPEC.std)
    normalize = bd.Normalize(SPEC, CPU.device)
    for given in (images, floats):
        result = normalize(given)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def make_batches(count=37, batch_size=8, **changes):
    dataset = make_dataset(count, 0)
    given = {"seed": 0, "name": "test", "extra": np.arange(count), "augmentation": CropFlip(), **changes}
    return bd.Batches(dataset.train_images, dataset.train_labels, SPEC, CPU, batch_size, **given)


def by_sample(batches, epoch):
    """{sample: its input} over an epoch; asserts that no sample comes twice."""
    found = {}
    for inputs, _, extra in batches.epoch(epoch):
        for index, picture in zip(extra.tolist(), inputs, strict=True):
            assert index not in found
            found[index] = picture
    return found


@pytest.mark.parametrize(("count", "batch_size"), [(37, 8), (40, 8), (5, 64), (34, 8)])
def test_every_sample_comes_once_an_epoch_with_its_own_image_and_label(count, batch_size):
    dataset = make_dataset(count, 0)
    batches = make_batches(count, batch_size, augmentation=None)
    normalize = bd.Normalize(SPEC, CPU.device)
    seen, sizes = [], []
    for inputs, labels, extra in batches.epoch(0):
        expected = torch.from_numpy(dataset.train_images[extra.numpy()]).permute(0, 3, 1, 2)
        torch.testing.assert_close(inputs, normalize(expected), rtol=0, atol=0)
        np.testing.assert_array_equal(labels, dataset.train_labels[extra.numpy()])
        seen += extra.tolist()
        sizes.append(len(labels))
    assert sorted(seen) == list(range(count)) != seen
    assert len(batches) == len(sizes)
    assert set(sizes[:-1]) <= {batch_size}


@pytest.mark.parametrize(("count", "batch_size", "number"), [(33, 8, 4), (1, 8, 0), (9, 8, 1), (10, 8, 2)])
def test_a_last_batch_of_one_is_left_out(count, batch_size, number):
    sizes = [len(labels) for _, labels, _ in make_batches(count, batch_size).epoch(0)]
    assert len(sizes) == len(make_batches(count, batch_size)) == number
    assert 1 not in sizes


def test_equal_seed_name_and_epoch_give_equal_batches_whatever_was_drawn_before():
    batches = make_batches()
    for _ in batches.epoch(0), batches.epoch(1):
        pass
    torch.manual_seed(3)
    for one, two in zip(batches.epoch(2), make_batches().epoch(2), strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("changes", "epoch"), [({}, 1), ({"seed": 1}, 0), ({"name": "other"}, 0)], ids=["epoch", "seed", "name"]
)
def test_order_and_augmentation_change_with_the_epoch_the_seed_and_the_name(changes, epoch):
    def order(batches, epoch):
        return [index for _, _, extra in batches.epoch(epoch) for index in extra.tolist()]

    assert order(make_batches(), 0) != order(make_batches(**changes), epoch)
    one, two = by_sample(make_batches(), 0), by_sample(make_batches(**changes), epoch)
    assert sum(torch.equal(one[index], two[index]) for index in one) < len(one) / 4


def test_what_is_left_of_the_samples_keeps_what_was_drawn_for_it():
    batches, kept = make_batches(38, 8), torch.tensor([30, 2, 17, 5, 9, 33, 21, 0, 1, 12])
    fewer = batches.only(kept)
    expected, found = by_sample(batches, 3), by_sample(fewer, 3)
    assert set(found) == set(kept.tolist()) and len(fewer) == 2
    assert all(torch.equal(picture, expected[index]) for index, picture in found.items())
    assert len(batches) == 5 and len(by_sample(batches, 4)) == 38  # these are as they were
    with pytest.raises(UserError, match=r"^1 samples make no batch"):
        train_epoch(None, batches.only(torch.tensor([3])), 0, None, None, None, "")


@pytest.mark.parametrize("augmentation", [CropFlip(), CropFlip(rotation=15), ContrastiveView(32)])
def test_a_samples_augmented_picture_does_not_depend_on_the_batch_size(augmentation):
    expected = by_sample(make_batches(38, 38, augmentation=augmentation), 3)
    for batch_size in (2, 5, 16):
        found = by_sample(make_batches(38, batch_size, augmentation=augmentation), 3)
        assert found.keys() == expected.keys()
        for index, picture in found.items():
            torch.testing.assert_close(picture, expected[index], rtol=0, atol=1e-5)


class _Marker:
    """Paints the number of the draw into channel 0 and the sample's row into channel 1."""

    def __init__(self):
        self.draws = 0

    def draw(self, rng, count):
        self.draws += 1
        return {"view": torch.full((count,), self.draws - 1), "row": torch.arange(count)}

    def apply(self, images, parameters):
        images = images.clone()
        for channel, name in enumerate(("view", "row")):
            images[:, channel] = parameters[name][:, None, None].to(torch.uint8)
        return images


def test_two_views_come_as_all_first_views_and_then_all_second():
    dataset = make_dataset(37, 0)
    batches = make_batches(37, 8, augmentation=_Marker(), views=2)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (SPEC.mean, SPEC.std))
    for inputs, labels, extra in batches.epoch(0):
        size = len(labels)
        painted = ((inputs * std + mean) * 255).round()
        assert len(inputs) == 2 * size
        assert painted[:, 0, 0, 0].tolist() == [0] * size + [1] * size
        assert painted[:, 1, 0, 0].tolist() == extra.tolist() * 2
        blue = torch.from_numpy(dataset.train_images[extra.numpy(), ..., 2]).float()
        assert torch.equal(painted[:, 2], torch.cat([blue, blue]))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("count", "batch_size", "at_once"), [(41, 4, 3), (40, 8, 100), (38, 8, 2)])
def test_batches_that_are_made_together_are_those_made_one_by_one(count, batch_size, at_once, views, monkeypatch):
    one_by_one = list(make_batches(count, batch_size, views=views).epoch(1))
    made, plain = [], bd.Views.__call__
    monkeypatch.setattr(bd.Batches, "at_once", at_once)
    monkeypatch.setattr(
        bd.Views, "__call__", lambda self, images, rows: made.append(len(rows)) or plain(self, images, rows)
    )
    together = list(make_batches(count, batch_size, views=views).epoch(1))
    assert len(made) == -(-len(together) // at_once) and max(made) > batch_size
    assert len(together) == len(one_by_one)
    for found, expected in zip(together, one_by_one, strict=True):
        assert len(found[0]) == views * len(found[1])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_two_views_of_a_sample_differ():
    inputs, labels, _ = next(make_batches(16, 16, views=2).epoch(0))
    first, second = inputs.split(len(labels))
    assert sum(torch.equal(one, two) for one, two in zip(first, second, strict=True)) < 4
