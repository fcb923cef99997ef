"""The seed of a step decides its batches, first weights, held-out samples and drawn triggers; each training has its own augmentation."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_cli
from test_pipeline import EXTRACTOR, SAMPLES, WITH_TRANS, weights
from test_poisoning import make_dataset, options

from models import SupConResNet
from utils import dataloader_bd, poisoning, validation
from utils.dataloader_bd import Batches
from utils.datasets import DATASETS
from utils.device import Runtime
from utils.transforms import CropFlip
from utils.triggers import apply_trigger
from utils.validation import HeldOut

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture
def batches(monkeypatch):
    """Of each `Batches` that a step makes: its name, seed and augmentation."""
    made = []

    class Spy(Batches):
        def __init__(self, images, labels, spec, runtime, batch_size, seed, name, **more):
            made.append((name, seed, more.get("augmentation")))
            super().__init__(images, labels, spec, runtime, batch_size, seed, name, **more)

    monkeypatch.setattr(dataloader_bd, "Batches", Spy)
    return made


def claim_seed(root, *names):
    """Let the files ``names`` below ``root`` say that they were made with seed 3, of a poisoned set that nobody knows."""
    for path in (root / name for name in names):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            del content["poisoned_digest"]
        else:
            content = torch.load(path, weights_only=True)
        content["options"]["seed"] = 3
        path.unlink()  # a link
        path.write_text(json.dumps(content)) if path.suffix == ".json" else torch.save(content, path)


@pytest.mark.parametrize(
    ("script", "augmentation"),
    [
        ("train_attack_noTrans.py", None),
        ("finetune_attack_noTrans.py", None),
        ("train_attack_withTrans.py", CropFlip),
        ("train_clean_withTrans.py", CropFlip),
    ],
)
def test_a_training_on_all_samples(script, augmentation, batches, words, tmp_path):
    common = [*words(tmp_path), "--epochs", 1, "--batch_size", 200, "--seed", 3, "--eval_freq", 0]
    if script.startswith("finetune"):
        assert run_cli("train_attack_noTrans.py", *common) == 0
        batches.clear()
    assert run_cli(script, *common) == 0
    ((_, seed, found),) = batches
    assert seed == 3 and (found is None if augmentation is None else isinstance(found, augmentation))


def test_the_trainings_of_the_defences(batches, copy, words, monkeypatch):
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], flip=False, flip_relearn=False))
    claim_seed(copy, f"{SAMPLES}/options.json", f"{WITH_TRANS}/1.tar")
    common = [*words(copy), "--epochs", 1, "--overwrite", "--seed", 3]
    as_it_begins = ["--learning_rate", 1e-30]
    assert run_cli("ST/train_extractor.py", *common, "--batch_size", 256, *as_it_begins) == 0
    (extractor,) = copy.rglob("*lr_1e-30*/last.pth")
    torch.manual_seed(3)
    first = SupConResNet("resnet10").state_dict()["encoder.conv1.weight"]
    torch.testing.assert_close(weights(extractor)["encoder.conv1.weight"], first, rtol=0, atol=1e-12)

    more = ["--batch_size", 128, *as_it_begins, "--ckpt", extractor, "--eval_freq", 0]
    assert run_cli("ST/train_classifier.py", *common, *more) == 0
    (classifier,) = copy.rglob("Linear*lr_1e-30*/ckpt_epoch_0.pth")
    torch.manual_seed(3)
    first = torch.nn.Linear(*reversed(weights(classifier)["weight"].shape)).weight.detach()
    torch.testing.assert_close(weights(classifier)["weight"], first, rtol=0, atol=1e-12)

    more = ["--batch_size", 8, "--checkpoint_load", copy / WITH_TRANS / "1.tar", "--eval_freq", 0]
    assert run_cli("unlearn_relearn.py", *common, *more) == 0
    assert [name.split()[0] for name, *_ in batches] == [
        "train_extractor",
        "train_classifier",
        *["unlearn_relearn"] * 2,
    ]
    assert all(seed == 3 and not augmentation.flip for _, seed, augmentation in batches)


@pytest.mark.parametrize(
    ("script", "option", "load"),
    [
        ("train_attack_withTrans.py", None, None),
        ("unlearn_relearn.py", "--checkpoint_load", f"{WITH_TRANS}/1.tar"),
        ("ST/train_classifier.py", "--ckpt", f"{EXTRACTOR}/last.pth"),
    ],
)
def test_what_is_held_out(script, option, load, copy, words, monkeypatch):
    seeds = []

    class Spy(HeldOut):
        def __init__(self, labels, ratio, seed, name, among=None):
            seeds.append(seed)
            super().__init__(labels, ratio, seed, name, among)

    monkeypatch.setattr(validation, "HeldOut", Spy)
    claim_seed(copy, f"{SAMPLES}/options.json", *([load] if load else []))
    more = [option, copy / load, "--batch_size", 8] if load else ["--batch_size", 200]
    common = [*words(copy), "--seed", 3, "--epochs", 1, "--val_ratio", 0.25, "--overwrite", "--eval_freq", 0]
    assert run_cli(script, *common, *more) == 0
    assert seeds and set(seeds) == {3}


def test_every_epoch_of_unlearning_draws_anew_what_dropout_leaves_out(copy, words, monkeypatch):
    seeds, plain = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or plain(seed))
    more = ["--epochs", 2, "--batch_size", 8, "--overwrite", "--eval_freq", 0]
    assert run_cli("unlearn_relearn.py", *words(copy), *more) == 0
    assert len(set(seeds[-2:])) == 2


@pytest.mark.parametrize("trigger", ["randomPixelTrigger", "warpTrigger"])
def test_a_drawn_trigger_is_the_same_in_training_and_test_images(trigger):
    dataset, opt = make_dataset(60, 60), options(trigger_type=trigger, seed=3)
    poisoned = poisoning.poison_training_set(dataset, opt)
    rows = np.flatnonzero(~poisoned.is_clean)
    wanted = apply_trigger(trigger, dataset.train_images[rows], train=True, seed=3)
    np.testing.assert_array_equal(poisoned.images[rows], wanted)
    tests = dataloader_bd.make_test_sets(dataset, opt, CPU)
    wanted = apply_trigger(trigger, dataset.test_images[dataset.test_labels != 0], train=False, seed=3)
    np.testing.assert_array_equal(tests.triggered_images.permute(0, 2, 3, 1), wanted)


def test_where_pgd_starts(monkeypatch, tmp_path):
    given = []
    (tmp_path / "x.tar").write_text("x")
    monkeypatch.setattr(poisoning, "load_benign_model", lambda *_: None)
    monkeypatch.setattr(poisoning, "perturb", lambda model, images, *_: given.append(_[-1]) or images)
    more = {"benign_checkpoint": tmp_path / "x.tar", "dataset": "cifar10", "model": "resnet10", "output_root": tmp_path}
    opt = options(
        trigger_type="fourCornerTrigger", target_type="cleanLabel", seed=3, data_root=None, train_images=None, **more
    )
    poisoning.poison_training_set(make_dataset(), opt)
    assert given == [3]
