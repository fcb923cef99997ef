"""What SD says of a network whose features collapse."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from utils import fct

WARNING = "the network has collapsed. "


def test_step_3_warns_of_a_network_that_gives_all_images_the_same_features(cli, words, copy):
    common = words(copy)
    assert WARNING not in cli("calculate_consistency.py", *common).out
    path = max((copy / "saved/backdoored_model").rglob("noTrans_ftsimi/**/1.tar"))
    content = torch.load(path, weights_only=True)
    for name, value in content["model"].items():
        if not name.startswith("fc.") and value.is_floating_point() and "running" not in name:
            value.zero_()
    torch.save(content, path.with_name("flat.tar"))
    said = cli("calculate_consistency.py", *common, "--checkpoint_load", path.with_name("flat.tar"))
    assert said.code == 0 and WARNING in said.out and "100.0 % of the samples" in said.out


def test_step_2_tells_each_epoch_how_many_samples_of_step_3_do_not_move_and_warns(cli, words, copy):
    """Under a weight decay that outweighs all else, which the optimizer of step 1's checkpoint brings along."""
    common = [*words(copy), "--batch_size", 64, "--overwrite"]
    said = cli("finetune_attack_noTrans.py", *common, "--epochs", 2)
    assert "collapsing" not in said.out and "zeros 0 " in said.out
    path = max((copy / "saved/backdoored_model").rglob("noTrans/**/1.tar"))
    content = torch.load(path, weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        group |= {"weight_decay": 20.0, "momentum": 0.0}
    torch.save(content, path.with_name("heavy.tar"))
    said = cli("finetune_attack_noTrans.py", *common, "--epochs", 4, "--checkpoint_load", path.with_name("heavy.tar"))
    assert said.code == 0 and "The features are collapsing" in said.out and "calculate_consistency.py" in said.out
    (folder,) = (path.parent for path in (copy / "saved/backdoored_model").rglob("noTrans_ftsimi/**/log.csv"))
    log = pd.read_csv(folder / "log.csv")
    for epoch in (2, 3):
        assert (
            cli(
                "calculate_consistency.py", *words(copy), "--checkpoint_load", folder / f"{epoch}.tar", "--overwrite"
            ).code
            == 0
        )
        record = json.loads((folder / f"{epoch}_fct.json").read_text())
        zeros = 100 * (np.loadtxt(folder / f"{epoch}_all.txt") == 0).mean()
        assert log["zeros"][epoch] == pytest.approx(zeros) == record["zeros"]  # fewer than 512 samples: all are watched
        assert record["feature_norm"] >= 0
    assert log["zeros"].max() > 0


@pytest.mark.parametrize(("zeros", "warned"), [(4, True), (1, False)])
def test_step_3_warns_from_one_per_cent_on(zeros, warned, monkeypatch, capsys):
    values = np.r_[np.zeros(zeros), np.ones(100 - zeros)].astype(np.float32)
    monkeypatch.setattr(fct, "compute_fct", lambda *_, **__: (values, np.ones(100)))
    opt = SimpleNamespace(trans1="crop", trans2="none", draws=1, batch_size=7, seed=5)
    _, found = fct.fct_of_network("x", None, None, SimpleNamespace(spec=None), SimpleNamespace(images=None), opt)
    assert found == {"zeros": zeros, "feature_norm": 1}
    said = capsys.readouterr().out
    assert ("Warning: 4.0 % of the samples" in said) == (WARNING in said) == warned
