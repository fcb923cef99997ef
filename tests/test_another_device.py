"""The whole pipeline on a pretended device: nothing is left on the CPU that a GPU would miss, and the results are the same."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_all
from pretend import brought_back, pretended
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS, weights

from models.resnet import WideConv
from utils import checkpoints, files

pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # here it is copied


@pytest.fixture(scope="module")
def roots(words, tmp_path_factory):
    """The output roots of every step, run on the CPU and on the pretended device."""
    found = {device: tmp_path_factory.mktemp(device) for device in ("cpu", "meta")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WideConv, "LEAST", 10**6)  # on a CPU alone
        writer = files.tensor_writer
        patch.setattr(
            checkpoints, "tensor_writer", lambda content: writer(brought_back(content))
        )  # torch.save brings them itself
        assert run_all([*words(found["cpu"]), "--device", "cpu", "--precision", "float32"]) == [0] * 11
        with pretended(patch):
            assert run_all([*words(found["meta"]), "--device", "meta", "--precision", "float32"]) == [0] * 11
    return found


@pytest.mark.parametrize(
    "name",
    [f"{NO_TRANS}/1.tar", f"{TUNED}/1.tar", f"{WITH_TRANS}/1.tar", f"{WITH_TRANS}/1_unlearn_purify.tar", f"{EXTRACTOR}/last.pth",
     f"{CLASSIFIER}/ckpt_epoch_1.pth"],
)  # fmt: skip
def test_the_weights_are_the_same(name, roots):
    here, there = (weights(root / name) for root in roots.values())
    assert all(torch.equal(here[key], there[key]) for key in here)


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
