"""The whole pipeline on a pretended device: nothing is left on the CPU that a GPU would miss, and the results are the same."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_all, run_cli
from pretend import pretended
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS, same_weights

from models.resnet import SmallMapConv
from utils import dataloader_bd, engine, transforms
from utils import run as life
from utils.device import Runtime
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # here it is copied


@pytest.fixture(scope="module")
def roots(words, tmp_path_factory):
    """The output roots of every step, run on the CPU and on the pretended device."""
    found = {device: tmp_path_factory.mktemp(device) for device in ("cpu", "meta")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallMapConv, "LEAST", 10**6)  # on a CPU alone
        for device, root in found.items():
            with pretended(patch) if device == "meta" else nullcontext():
                own = ["--device", device, "--precision", "float32"]
                assert run_all(words(root), device=own) == [0] * 11
    return found


@pytest.mark.parametrize(
    "name",
    [f"{NO_TRANS}/1.tar", f"{TUNED}/1.tar", f"{WITH_TRANS}/1.tar", f"{WITH_TRANS}/1_unlearn_purify.tar", f"{EXTRACTOR}/last.pth",
     f"{CLASSIFIER}/ckpt_epoch_1.pth"],
)  # fmt: skip
def test_the_weights_are_the_same(name, roots):
    assert same_weights(*(root / name for root in roots.values()))


@pytest.mark.parametrize("folder", [NO_TRANS, TUNED, WITH_TRANS, EXTRACTOR, CLASSIFIER])
def test_the_measures_are_the_same(folder, roots):
    here, there = (pd.read_csv(root / folder / "log.csv").drop(columns="seconds") for root in roots.values())
    pd.testing.assert_frame_equal(here, there)


def test_fct_and_the_samples_are_the_same(roots):
    here, there = (np.loadtxt(root / TUNED / "1_all.txt") for root in roots.values())
    np.testing.assert_array_equal(here, there)
    for kind in ("clean", "poison", "suspicious"):
        here, there = (np.load(root / SAMPLES / f"{kind}_samples.npy") for root in roots.values())
        np.testing.assert_array_equal(here, there)


def train_there(words, root, epochs):
    common = [*words(root), "--device", "meta", "--precision", "float32", "--batch_size", 64, "--eval_freq", 0]
    return run_cli("train_attack_noTrans.py", *common, "--epochs", epochs)


def test_the_next_epoch_is_trained_while_a_checkpoint_is_written(words, tmp_path, monkeypatch):
    goes_on, begun = threading.Event(), []
    train_epoch, writer = engine.train_epoch, life.tensor_writer

    def begin(*arguments):
        begun.append(arguments)
        if len(begun) == 2:
            goes_on.set()
        return train_epoch(*arguments)

    def wait(content):
        assert goes_on.wait(60)
        return writer(content)

    monkeypatch.setattr(engine, "train_epoch", begin)
    monkeypatch.setattr(life, "tensor_writer", wait)
    with pretended(monkeypatch):
        assert train_there(words, tmp_path, 2) == 0
    first, second = (torch.load(tmp_path / NO_TRANS / f"{epoch}.tar", weights_only=True) for epoch in (0, 1))
    assert [first["epoch"], second["epoch"]] == [0, 1] and len(pd.read_csv(tmp_path / NO_TRANS / "log.csv")) == 2
    assert not torch.equal(first["model"]["fc.weight"], second["model"]["fc.weight"])


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(epochs, words, tmp_path, monkeypatch, capsys):
    """The second, which is the last of the run or not."""
    writer, written = life.tensor_writer, []

    def fails(content):
        written.append(content)
        if len(written) == 2:
            raise UserError("the disk is full")
        return writer(content)

    monkeypatch.setattr(life, "tensor_writer", fails)
    with pretended(monkeypatch):
        assert train_there(words, tmp_path, epochs) == 2
    assert "error: the disk is full" in capsys.readouterr().err and len(written) == 2
    assert [path.name for path in (tmp_path / NO_TRANS).glob("*.tar")] == ["0.tar"]
    assert len(pd.read_csv(tmp_path / NO_TRANS / "log.csv")) == 1


@pytest.mark.parametrize("name", transforms.TAU_NAMES)
def test_tau_asks_a_device_without_float64_for_none(name, monkeypatch):
    """As mps, where what a copy makes float64 on its way to the CPU is lost."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8))
    tau = transforms.Tau(name, "none", 32)
    drawn = tau.draw(np.random.default_rng(1), len(images))
    wanted = tau.apply(images, drawn)
    monkeypatch.setattr(transforms, "exact_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr("pretend.LACKS", {torch.float64})
    with pretended(monkeypatch):
        found = tau.apply(images.to("meta"), drawn)
        assert found.device.type == "meta" and torch.equal(found.to("cpu"), wanted)


def test_what_is_not_pinned_is_waited_for(monkeypatch):
    """The batches of a set that is not held in memory: elsewhere than on CUDA such a copy could outlive its source."""
    asked, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *place, **how: asked.append(how) or to(self, *place, **how))
    held = SimpleNamespace(decodes=False, shape=(2, 8, 8, 3))
    monkeypatch.setattr(dataloader_bd, "_Stream", lambda *_: [torch.zeros(2, 3, 8, 8)])
    list(dataloader_bd.fetch(held, [], Runtime(torch.device("cpu"), torch.float32)))
    assert asked == [{"non_blocking": False}]
