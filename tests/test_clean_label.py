"""CL: the adversarial perturbation, the benign model it needs, and what is kept of it."""

import shlex
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, run_cli
from test_pipeline import weights
from test_poisoning import SPEC, make_dataset

from models import build_model
from utils import poisoning
from utils.adversarial import perturb
from utils.loading import load_dataset
from utils.triggers import apply_trigger

CL = ["--trigger_type", "fourCornerTrigger", "--target_type", "cleanLabel", "--poison_rate", 0.5]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("resnet10", "cifar10", 10).eval()


def slow_pgd(model, image, label, start):
    """One image at a time, in grey levels, with the normalisation written out."""
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (SPEC.mean, SPEC.std))
    original = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)
    x = torch.clip(original + torch.from_numpy(start).permute(2, 0, 1), 0, 255)
    for _ in range(4):
        x = x.detach().requires_grad_(True)
        F.cross_entropy(model((((x / 255) - mean) / std)[None]), torch.tensor([label])).backward()
        x = x.detach() + 2 * torch.sign(x.grad)
        x = torch.max(torch.min(x, original + 8), original - 8).clip(0, 255)
    return x.round().permute(1, 2, 0).numpy().astype(np.uint8)


def test_perturbation_equals_a_plain_loop_and_stays_within_epsilon(model):
    from utils.seeding import generator

    dataset = make_dataset(12, 0)
    index = np.arange(100, 112)
    result = perturb(model, dataset.train_images, dataset.train_labels, index, SPEC, seed=3)
    assert abs(result.astype(int) - dataset.train_images).max() == 8
    for row in range(4):
        start = generator(3, "PGD", index[row]).uniform(-8, 8, (32, 32, 3))
        slow = slow_pgd(model, dataset.train_images[row], dataset.train_labels[row], start)
        np.testing.assert_array_equal(result[row], slow)
    np.testing.assert_array_equal(
        perturb(model, dataset.train_images[5:7], dataset.train_labels[5:7], index[5:7], SPEC, seed=3), result[5:7]
    )


def test_the_models_loss_rises(model, fashion):
    images, labels = fashion.train_images[:40], fashion.train_labels[:40]

    def loss(pictures):
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255
        mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (SPEC.mean, SPEC.std))
        with torch.no_grad():
            return F.cross_entropy(model.double()((x - mean) / std), torch.from_numpy(labels), reduction="none")

    perturbed = perturb(model, images, labels, np.arange(40), SPEC, seed=0)
    noise = np.random.default_rng(0).choice([-8, 8], images.shape)
    noisy = np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)
    assert (loss(perturbed) > loss(images)).float().mean() > 0.9
    assert loss(perturbed).mean() > loss(noisy).mean()  # not by noise of the same size


def test_without_a_benign_model_the_attack_names_the_command(cli, words, tmp_path):
    result = cli("train_attack_noTrans.py", *words(tmp_path), *CL, "--epochs", 1)
    assert result.code == 2
    assert "train_clean_withTrans.py --dataset cifar10 --model resnet10" in result.err
    assert not list(tmp_path.rglob("*.tar"))


def test_the_attack_loads_what_train_clean_writes(cli, words, tmp_path, data_root):
    from utils.loading import load_dataset

    assert cli("train_clean_withTrans.py", *words(tmp_path), "--epochs", 1).code == 0
    assert cli("train_attack_noTrans.py", *words(tmp_path), *CL, "--epochs", 1).code == 0
    benign = tmp_path / "saved/benign_model/cifar10/resnet10/0.tar"
    again = cli("train_attack_withTrans.py", *words(tmp_path), *CL, "--epochs", 1, "--benign_checkpoint", benign)
    assert again.code == 0, again.err
    fct = cli("calculate_consistency.py", *words(tmp_path), *CL, "--checkpoint_load",
              tmp_path / "saved/backdoored_model/poison_rate_0.5/noTrans/cifar10/resnet10/fourCornerTrigger/0.tar")  # fmt: skip
    assert fct.code == 0, fct.err

    # what the network was given: 20 of the 40 images of class 0, perturbed and with the corners painted
    parser = cli.module("train_attack_noTrans.py").get_parser()
    opt = parser.parse_args([str(word) for word in (*words(tmp_path), *CL)])
    from utils.poisoning import poison_training_set

    dataset = load_dataset("cifar10", data_root)
    poisoned = poison_training_set(dataset, opt)
    rows = np.flatnonzero(~poisoned.is_clean)
    assert len(rows) == 20 and (dataset.train_labels[rows] == 0).all()
    corners = apply_trigger("fourCornerTrigger", dataset.train_images, train=False)[rows]
    untouched = corners == dataset.train_images[rows]
    difference = poisoned.images[rows].astype(int) - dataset.train_images[rows]
    assert abs(difference[untouched]).max() <= 8 and (difference[untouched] != 0).any()
    painted = ~untouched.all(-1)
    np.testing.assert_array_equal(poisoned.images[rows][painted], corners[painted])


def test_options_of_one_trigger_are_refused_with_another(cli, words, tmp_path):
    for extra in (["--benign_checkpoint", "x.tar"], ["--ssba_images", "x.npy"], ["--ssba_encoder", "x.pt"]):
        result = cli("train_attack_noTrans.py", *words(tmp_path), *extra)
        assert result.code == 2 and "no use with --trigger_type gridTrigger" in result.err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def benign(words, tmp_path_factory):
    """Checkpoints of two benign networks, of seeds 0 and 1."""
    roots = [tmp_path_factory.mktemp(f"benign{seed}") for seed in (0, 1)]
    for seed, root in enumerate(roots):
        more = ["--epochs", 1, "--batch_size", 100, "--seed", seed, "--eval_freq", 0]
        assert run_cli("train_clean_withTrans.py", *words(root), *more) == 0
    return [root / "saved/benign_model/cifar10/resnet10/0.tar" for root in roots]


def test_images_of_cl_are_perturbed_in_evaluation_mode_and_anew_for_another_network(
    benign, words, data_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(poisoning, "WORTH_KEEPING", 1)
    path = tmp_path / "benign.tar"
    common = [*words(tmp_path), *CL, "--benign_checkpoint", path]
    opt = load_script("train_attack_noTrans.py").get_parser().parse_args([str(word) for word in common])
    dataset = load_dataset("cifar10", data_root)
    found = []
    for source in (*benign, benign[1]):  # the third time what was kept
        shutil.copyfile(source, path)
        poisoned = poisoning.poison_training_set(dataset, opt)
        rows = np.flatnonzero(~poisoned.is_clean)
        model = build_model("resnet10", "cifar10", 10)
        model.load_state_dict(weights(source))
        images, labels = dataset.train_images[rows], dataset.train_labels[rows]
        expected = perturb(model.eval(), images, labels, rows, dataset.spec, 0)
        np.testing.assert_array_equal(poisoned.images[rows], apply_trigger("fourCornerTrigger", expected, train=True))
        found.append(poisoned.images[rows])
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("model", [None, "resnet1000", ["resnet10"]], ids=str)
def test_a_benign_checkpoint_that_does_not_say_its_network_is_one_line(model, benign, words, cli, tmp_path):
    content = torch.load(benign[0], weights_only=True)
    content["options"]["model"] = model
    torch.save(content, tmp_path / "benign.tar")
    said = cli("train_attack_noTrans.py", *words(tmp_path), *CL, "--benign_checkpoint", tmp_path / "benign.tar")
    assert said.code == 2 and "does not say which of" in said.err and said.err.count("\n") == 1, said.err


def test_what_makes_a_missing_benign_checkpoint_is_said_with_the_options(cli, words, tmp_path):
    said = cli("train_clean_withTrans.py", *words(tmp_path), "--seed", 3, "--checkpoint_load", tmp_path / "none.tar")
    command = shlex.split(said.err.split("Make it with: ")[1])
    assert said.code == 2 and command[:2] == ["python", "train_clean_withTrans.py"]
    for name in ("--data_root", "--output_root", "--seed"):
        assert name in command
