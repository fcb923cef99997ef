"""What the paper fixes of each step: its samples, augmentation, optimizer, schedule and seed, against constants and plain loops."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, run_cli
from test_bad_input import refused
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS, weights
from torch import nn

import ST.losses
from models import SupConResNet, build_model
from utils import dataloader_bd, fct
from utils.dataloader_bd import Batches, Normalize
from utils.datasets import DATASETS
from utils.device import Runtime
from utils.loading import load_dataset
from utils.transforms import ContrastiveView, CropFlip

CPU = Runtime(torch.device("cpu"), torch.float32)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUTHORS = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)


@pytest.mark.parametrize(
    ("name", "classes", "size", "mean", "std", "rotation", "padding", "flip", "flip_relearn"),
    [
        ("cifar10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 0, 4, True, True),
        ("cifar100", 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 15, 4, True, False),
        ("gtsrb", 43, 32, (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669), 0, 4, False, False),
        ("tiny", 200, 64, *AUTHORS, 0, 8, True, False),
        ("imagenet", 200, 224, *AUTHORS, 20, 0, True, False),
        ("folder", 0, 0, *IMAGENET, 0, 4, True, True),
        ("npz", 0, 0, *IMAGENET, 0, 4, True, True),
    ],
)
def test_a_data_set_is_normalised_and_augmented_as_the_authors_do(
    name, classes, size, mean, std, rotation, padding, flip, flip_relearn
):
    spec = DATASETS[name]
    assert (spec.num_classes, spec.size, spec.mean, spec.std) == (classes, size, mean, std)
    view = CropFlip.of(spec)
    assert (view.rotation, view.padding, view.flip) == (rotation, padding, flip)
    assert spec.flip_relearn == flip_relearn


def test_the_imagenet_subset_is_trained_with_the_papers_settings():
    script, given = load_script("train_attack_withTrans_imagenet.py"), {}
    script.train = lambda opt, runtime, step, weight_decay, start_from, inputs: given.update(
        vars(opt), weight_decay=weight_decay
    )
    script.main(["--device", "cpu"])
    expected = {"epochs": 25, "lr": 0.001, "schedule": [15, 20], "gamma": 0.1, "batch_size": 128, "weight_decay": 1e-4}
    assert expected.items() <= given.items()


@pytest.mark.parametrize("epochs", [200, 30])
def test_the_extractors_learning_rate_is_the_published_schedule(epochs):
    module = load_script("ST/train_extractor.py")
    words = ["--learning_rate", "0.5", "--epochs", str(epochs)]
    warm, cold = (module.get_parser().parse_args([*words, "--cosine", "--batch_size", size]) for size in ("512", "256"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0.5 * 0.1**3)
    cosine = []  # after so many epochs
    for _ in range(epochs + 1):
        cosine.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for epoch in range(epochs):
        for batch in (
            0,
            50,
            97,
        ):  # of 98; a straight line from 0.01 to the cosine's value after ten epochs, over 980 batches
            ramp = np.interp(98 * epoch + batch, [0, 980], [0.01, cosine[10]])
            wanted = ramp if epoch < 10 else cosine[epoch + 1]
            assert module.learning_rate(warm, epoch, batch, 98) == pytest.approx(wanted, rel=1e-6)
            assert module.learning_rate(cold, epoch, batch, 98) == pytest.approx(cosine[epoch + 1], rel=1e-6)
    steps = module.get_parser().parse_args([*words, "--batch_size", "64", "--lr_decay_epochs", "3", "5"])
    found = [module.learning_rate(steps, epoch, 0, 98) for epoch in range(6)]
    assert found == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005])  # the fourth epoch is the first beyond three


@pytest.mark.parametrize("batch, noted", [(257, True), (256, False)])
def test_a_warm_up_that_is_not_over_by_the_last_epoch_is_said(copy, words, cli, batch, noted):
    said = cli("ST/train_extractor.py", *words(copy), "--epochs", 1, "--batch_size", batch, "--trial", 1)
    assert said.code == 0 and ("Note: with a batch above 256" in said.out) == noted
    (trained,) = copy.rglob(f"SupCon_*_bsz_{batch}_temp_0.1_trial_1*/last.pth")
    (group,) = torch.load(trained, weights_only=True)["optimizer"]["param_groups"]
    second_of_two = 0.01 + (0.5 - 0.01) / 20  # of ten epochs of two batches
    assert group["lr"] == pytest.approx(second_of_two if noted else 0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "lr", "decay"),
    [
        (f"{NO_TRANS}/0.tar", 0.01, 5e-4),
        (f"{TUNED}/0.tar", 0.01, 5e-4),
        (f"{WITH_TRANS}/0.tar", 0.01, 5e-4),
        (f"{WITH_TRANS}/1_unlearn_purify.tar", 1e-4, 5e-4),
        (f"{EXTRACTOR}/last.pth", None, 1e-4),  # set batch by batch
        (f"{CLASSIFIER}/ckpt_epoch_0.pth", 0.5, 0),
    ],
)
def test_every_step_trains_with_the_papers_optimizer(pipeline, name, lr, decay):
    (group,) = torch.load(pipeline / name, weights_only=True)["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["nesterov"]) == (0.9, decay, 0, False)
    assert lr is None or group.get("initial_lr", group["lr"]) == lr


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        (f"{NO_TRANS}/0.tar", 0.01 * (1 + np.cos(np.pi / 100)) / 2),
        (f"{NO_TRANS}/1.tar", 0.01 * (1 + np.cos(2 * np.pi / 100)) / 2),
        (f"{TUNED}/1.tar", 0.01 * (1 + np.cos(4 * np.pi / 100)) / 2),
        (f"{WITH_TRANS}/0.tar", 0.001),  # --schedule 1
        (f"{WITH_TRANS}/1.tar", 0.001),
        (f"{CLASSIFIER}/ckpt_epoch_1.pth", 0.5),
    ],
)
def test_the_learning_rate_after_an_epoch_is_that_of_the_schedule(pipeline, name, rate):
    (group,) = torch.load(pipeline / name, weights_only=True)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(rate, rel=1e-9)


def test_the_measures_in_the_logs_are_those_of_the_checkpoints_in_evaluation_mode(pipeline, data_root):
    dataset = load_dataset("cifar10", data_root)
    normalize, images = Normalize(dataset.spec, "cpu"), torch.from_numpy(dataset.test_images).permute(0, 3, 1, 2)
    for folder in (NO_TRANS, TUNED, WITH_TRANS):
        log = pd.read_csv(pipeline / folder / "log.csv")
        for epoch in (0, 1):
            model = build_model("resnet10", "cifar10", 10)
            model.load_state_dict(weights(pipeline / folder / f"{epoch}.tar"))
            with torch.no_grad():
                found = [model.eval()(normalize(image[None])).argmax().item() for image in images]
            assert log["ACC"][epoch] == pytest.approx(100 * np.mean(np.array(found) == dataset.test_labels), abs=1.01)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("script", "folder"),
    [
        ("train_attack_noTrans.py", NO_TRANS),
        ("train_attack_withTrans.py", WITH_TRANS),
        ("train_clean_withTrans.py", "saved/benign_model/cifar10/resnet10"),
    ],
)
def test_the_seed_decides_the_first_weights(script, folder, seed, words, tmp_path):
    still = ["--epochs", 1, "--batch_size", 200, "--lr", 1e-30, "--seed", seed, "--eval_freq", 0]
    assert run_cli(script, *words(tmp_path), *still) == 0
    torch.manual_seed(seed)
    first = build_model("resnet10", "cifar10", 10).state_dict()
    after = weights(tmp_path / folder / "0.tar")
    for name in ("conv1.weight", "layer3.0.conv2.weight", "fc.weight"):
        torch.testing.assert_close(after[name], first[name], rtol=0, atol=1e-12)


def slow_unlearning(start, parts, lr):
    """One epoch of BR by a plain loop; parts: (sign, images, labels, name) of D_p and then D_c."""
    model = CPU.place(build_model("resnet10", "cifar10", 10))
    model.load_state_dict(start)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for sign, samples, name in parts:
        settings = (DATASETS["cifar10"], CPU, 16, 0, name)
        batches = Batches(samples["image"], samples["label"], *settings, augmentation=CropFlip(padding=4, flip=True))
        for inputs, labels, _ in batches.epoch(0):
            optimizer.zero_grad()
            (sign * F.cross_entropy(model(inputs), labels)).backward()
            optimizer.step()
    return model.state_dict()


def test_an_epoch_of_unlearning_is_an_ascent_on_d_p_and_then_a_descent_on_d_c(copy, words):
    more = ["--epochs", 1, "--batch_size", 16, "--lr", 0.001, "--precision", "float32"]
    places = ["--checkpoint_save", copy / "own.tar", "--log", copy / "own.csv"]
    assert run_cli("unlearn_relearn.py", *words(copy), *more, *places) == 0
    of_poison, of_clean = (np.load(copy / SAMPLES / f"{kind}_samples.npy") for kind in ("poison", "clean"))
    parts = [(-1, of_poison, "unlearn_relearn 2"), (1, of_clean, "unlearn_relearn 0")]
    start, found = weights(copy / WITH_TRANS / "1.tar"), weights(copy / "own.tar")
    for name, value in slow_unlearning(start, parts, 0.001).items():
        if value.is_floating_point():  # rounding alone grows to some hundredths of the way that a weight has gone
            assert (found[name] - value).norm() < 0.1 * (value - start[name]).norm(), name


def test_each_step_of_the_defences_is_given_its_own_samples_and_augmentation(copy, words, monkeypatch):
    made = {}

    class Spy(Batches):
        def __init__(
            self, images, labels, spec, runtime, batch_size, seed, name, augmentation=None, views=1, extra=None
        ):
            made[name] = SimpleNamespace(images=np.array(images), extra=extra, augmentation=augmentation, views=views)
            super().__init__(images, labels, spec, runtime, batch_size, seed, name, augmentation, views, extra)

    monkeypatch.setattr(dataloader_bd, "Batches", Spy)
    odd = replace(
        DATASETS["cifar10"], rotation=15, padding=8, flip_relearn=False
    )  # as cifar100 and tiny differ from it
    monkeypatch.setitem(DATASETS, "cifar10", odd)
    common = [*words(copy), "--epochs", 1, "--overwrite"]
    assert run_cli("unlearn_relearn.py", *common, "--batch_size", 16) == 0
    assert run_cli("ST/train_extractor.py", *common, "--batch_size", 64, "--cosine") == 0
    assert run_cli("ST/train_classifier.py", *common, "--batch_size", 32, "--learning_rate", 0.5) == 0
    clean, poison = (np.load(copy / SAMPLES / f"{kind}_samples.npy")["image"] for kind in ("clean", "poison"))

    for name, images in (("unlearn_relearn 0", clean), ("unlearn_relearn 2", poison)):
        assert (made[name].images == images).all() and made[name].views == 1
        view = made[name].augmentation
        assert isinstance(view, CropFlip) and (view.padding, view.flip, view.rotation) == (4, False, 0)
    extractor, classifier = made["train_extractor"], made["train_classifier"]
    assert (extractor.views, classifier.views) == (2, 1)
    assert (len(extractor.images), len(classifier.images)) == (400, 100)  # D_u trains the extractor alone
    for one in (extractor, classifier):
        assert isinstance(one.augmentation, ContrastiveView)
        assert (one.images[np.flatnonzero(one.extra)] == clean).all()  # D_c alone is trusted, no sample of D_u or D_p


def test_the_seed_decides_tau_and_the_draw_among_ties(copy, words, cli, monkeypatch):
    given = {}
    monkeypatch.setattr(fct, "compute_fct", lambda *_, **more: given.update(more) or (np.ones(4), np.ones(4)))
    opt = SimpleNamespace(trans1="crop", trans2="none", draws=3, batch_size=7, seed=5)
    poisoned, dataset = SimpleNamespace(images=None), SimpleNamespace(spec=None)
    fct.fct_of_network("x", None, CPU, dataset, poisoned, opt)
    assert given == {"trans1": "crop", "trans2": "none", "draws": 3, "batch_size": 7, "seed": 5}

    monkeypatch.setattr(fct, "saved_or_new_fct", lambda *_: (np.zeros(400, dtype=np.float32), {}))
    taken = []
    for seed in (0, 0, 1):
        assert cli("separate_samples.py", *words(copy), "--seed", seed, "--overwrite").code == 0
        taken.append(np.load(copy / SAMPLES / "clean_samples.npy")["index"].tolist())
    assert taken[0] == taken[1] != taken[2] and len(taken[2]) == 80


def test_the_classifier_is_that_of_a_plain_loop(copy, words):
    more = ["--epochs", 2, "--batch_size", 32, "--learning_rate", 0.05, "--lr_decay_epochs", 1, "--lr_decay_rate", 0.3,
            "--poison_weight", 0.5, "--ascent_bound", 2.5, "--weight_decay", 0.01, "--precision", "float32", "--eval_freq", 0]  # fmt: skip
    assert run_cli("ST/train_classifier.py", *words(copy), *more) == 0
    folder = CLASSIFIER.replace("lr_0.5_decay_0_", "lr_0.05_decay_0.01_")
    extractor = CPU.place(SupConResNet("resnet10"))
    extractor.load_state_dict(weights(copy / EXTRACTOR / "last.pth"))
    extractor.eval()
    torch.manual_seed(0)
    classifier = nn.Linear(256, 10)
    samples = np.concatenate([np.load(copy / SAMPLES / f"{kind}_samples.npy") for kind in ("clean", "poison")])
    settings = (DATASETS["cifar10"], CPU, 32, 0, "train_classifier")
    batches = Batches(
        samples["image"], samples["label"], *settings, augmentation=ContrastiveView(32), extra=samples["flag"]
    )
    momenta, held = [torch.zeros_like(value) for value in classifier.parameters()], []
    for epoch, rate in enumerate((0.05, 0.015)):
        for inputs, labels, flags in batches.epoch(epoch):
            with torch.no_grad():
                features = extractor.features(inputs)
            each = F.cross_entropy(classifier(features), labels, reduction="none")
            of_clean, of_poison = each[flags == 0], each[flags == 2]
            held += (of_poison > 2.5).tolist()
            pushing = of_poison[of_poison <= 2.5].sum() / max(1, len(of_poison))
            loss = of_clean.mean() - 0.5 * pushing
            with torch.no_grad():
                for value, momentum, slope in zip(
                    classifier.parameters(),
                    momenta,
                    torch.autograd.grad(loss, list(classifier.parameters())),
                    strict=True,
                ):
                    momentum.mul_(0.9).add_(slope + 0.01 * value)
                    value.sub_(rate * momentum)
    found = weights(copy / folder / "ckpt_epoch_1.pth")
    torch.testing.assert_close(found["weight"], classifier.weight.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["bias"], classifier.bias.detach(), rtol=1e-3, atol=1e-4)
    assert any(held) and not all(held)


def test_the_temperature_reaches_the_loss_and_the_base_stays(copy, words, monkeypatch):
    made, kind = [], ST.losses.SupConLoss
    monkeypatch.setattr(ST.losses, "SupConLoss", lambda *given, **named: made.append(kind(*given, **named)) or made[-1])
    assert run_cli("ST/train_extractor.py", *words(copy), "--epochs", 1, "--batch_size", 200, "--temp", 0.5) == 0
    assert [(one.temperature, one.base_temperature) for one in made] == [(0.5, 0.07)]


def test_of_d_p_the_classifier_holds_nothing_out(copy, words, monkeypatch):
    made = []

    class Spy(Batches):
        def __init__(self, *given, **named):
            made.append(SimpleNamespace(labels=given[1], in_clean=np.array(named["extra"])))
            super().__init__(*given, **named)

    monkeypatch.setattr(dataloader_bd, "Batches", Spy)
    more = ["--epochs", 1, "--batch_size", 32, "--learning_rate", 0.5, "--val_ratio", 0.25, "--overwrite"]
    assert run_cli("ST/train_classifier.py", *words(copy), *more) == 0
    (one,) = made
    assert (one.in_clean.sum(), (~one.in_clean).sum()) == (60, 20)  # a quarter of the 80 of D_c, none of the 20 of D_p


def test_an_extractors_rate_follows_its_schedule_to_the_end(pipeline):
    (group,) = torch.load(pipeline / EXTRACTOR / "last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.5 * 0.1**3)


def test_an_extractor_keeps_every_second_epoch(copy, words):
    more = ["--epochs", 2, "--batch_size", 128, "--save_freq", 2, "--trial", 4]
    assert run_cli("ST/train_extractor.py", *words(copy), *more) == 0
    (last,) = copy.rglob("*trial_4*/last.pth")
    assert {path.name for path in last.parent.glob("*.pth")} == {"ckpt_epoch_1.pth", "last.pth"}


def test_cosine_epochs_is_where_the_rate_of_sd_is_zero(words, tmp_path):
    more = ["--epochs", 1, "--batch_size", 200, "--cosine_epochs", 2, "--eval_freq", 0]
    assert run_cli("train_attack_noTrans.py", *words(tmp_path), *more) == 0
    (group,) = torch.load(tmp_path / NO_TRANS / "0.tar", weights_only=True)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.005)


def test_the_rate_of_sd_never_rises_again(words, cli, tmp_path):
    more = [*words(tmp_path), "--batch_size", 200, "--eval_freq", 0]
    refused(
        cli("train_attack_noTrans.py", *more, "--epochs", 3, "--cosine_epochs", 2), "--cosine_epochs 2", "3 to train"
    )
    assert not (tmp_path / NO_TRANS).exists()
    assert cli("train_attack_noTrans.py", *more, "--epochs", 1, "--cosine_epochs", 2).code == 0
    refused(cli("finetune_attack_noTrans.py", *more, "--epochs", 2), "0.tar", "in 1 epochs", "larger --cosine_epochs")
    assert not (tmp_path / TUNED).exists()
    assert cli("finetune_attack_noTrans.py", *more, "--epochs", 1).code == 0
    before = weights(tmp_path / TUNED / "0.tar")
    go_on = ["--epochs", 2, "--checkpoint_load", tmp_path / TUNED / "0.tar"]
    refused(cli("finetune_attack_noTrans.py", *more, *go_on), "in 0 epochs", "1 to train")
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / TUNED / "0.tar").items())


def test_a_classifier_that_goes_on_has_its_place_in_the_schedule(copy, words):
    common = [*words(copy), "--batch_size", 32, "--learning_rate", 0.25, "--lr_decay_epochs", 2, "--epochs", 3]
    folder = copy / CLASSIFIER.replace("lr_0.5", "lr_0.25")
    assert run_cli("ST/train_classifier.py", *common, "--eval_freq", 0) == 0
    whole = weights(folder / "ckpt_epoch_2.pth")
    (folder / "ckpt_epoch_2.pth").unlink()
    go_on = ["--checkpoint_load", folder / "ckpt_epoch_0.pth"]
    assert run_cli("ST/train_classifier.py", *common, "--eval_freq", 0, *go_on) == 0
    found = weights(folder / "ckpt_epoch_2.pth")
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_fct_is_in_float32_where_the_hardware_computes_in_bfloat16(copy, words, cli, monkeypatch):
    given, plain = [], fct.compute_fct
    monkeypatch.setattr("utils.device._computes_bfloat16", lambda device: True)
    monkeypatch.setattr(fct, "compute_fct", lambda *a, **more: given.append(a[3].dtype) or plain(*a, **more))
    said = cli("calculate_consistency.py", *words(copy), "--overwrite")
    assert said.code == 0 and "Running on cpu, float32\n" in said.out
    assert given == [torch.float32]
