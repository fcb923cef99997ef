"""Numbers that go bad stop a step with epoch, batch and advice; what was good before stays, and no row pretends."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SameBatches
from test_bad_input import refused, snapshot
from test_pipeline import NO_TRANS, TUNED, WITH_TRANS, same_weights
from torch import nn

from utils import losses, unlearning
from utils.device import choose_runtime
from utils.engine import train_epoch
from utils.errors import UserError
from utils.run import Run


@pytest.mark.parametrize("bad", [0, 2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "feature_norm"])
def test_the_batch_in_which_a_number_went_bad_is_named(bad, value, where):
    model = nn.Linear(1, 1)

    def objective(model, inputs, labels):
        wrong = torch.where(inputs[0, 0] == bad, value, 0.0)
        loss = model(inputs).mean() + (wrong if where == "loss" else 0)
        return loss, {"feature_norm": wrong if where != "loss" else torch.tensor(1.0)}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runtime = choose_runtime("cpu", "float32")
    with pytest.raises(
        UserError, match=f"^{where} is not finite in step epoch 7, batch {bad + 1} of 4; .* smaller learning"
    ):
        train_epoch(model, SameBatches(4, 2), 6, objective, optimizer, runtime, "step epoch 7")


def test_sums_that_stay_finite_pass():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def objective(model, inputs, labels):
        return model(inputs).mean(), {"correct": (labels == 0).sum()}

    found = train_epoch(model, SameBatches(4, 2), 0, objective, optimizer, choose_runtime("cpu", "float32"), "x")
    assert found["train_acc"] == 100


DIVERGE = [
    ("train_attack_noTrans.py", ["--lr", "1e30"]),
    ("train_attack_withTrans.py", ["--lr", "1e30", "--schedule", 1]),
    ("train_clean_withTrans.py", ["--lr", "1e30", "--schedule", 1]),
    ("unlearn_relearn.py", ["--lr", "1e30"]),
    ("ST/train_extractor.py", ["--learning_rate", "1e30", "--cosine"]),
    ("ST/train_classifier.py", ["--learning_rate", "1e38"]),
]


@pytest.mark.parametrize("script, more", DIVERGE, ids=lambda value: value if str(value).endswith(".py") else "")
def test_a_training_that_diverges_stops_with_epoch_batch_and_advice(cli, words, pipeline, tmp_path, script, more):
    import os
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(pipeline, root, copy_function=os.link)
    if script.startswith("train"):  # nothing there yet
        shutil.rmtree(root / "saved")
    before = snapshot(root)
    batch = ["--batch_size", 16]
    result = cli(script, *words(root), *more, *batch, "--epochs", 9, "--overwrite")
    refused(result, "not finite", "epoch ", "batch ", "smaller learning rate")
    left = {path: state for path, state in snapshot(root).items() if path.name != "samples.png"}
    assert left == {path: state for path, state in before.items() if path.name != "samples.png"}


def test_a_run_that_goes_bad_keeps_its_last_good_checkpoint_and_its_log(cli, words, pipeline, tmp_path):
    common = [*words(tmp_path), "--batch_size", 64]
    assert cli("train_attack_noTrans.py", *common, "--epochs", 1).code == 0
    folder = tmp_path / NO_TRANS
    good, rows = torch.load(folder / "0.tar", weights_only=True), (folder / "log.csv").read_bytes()
    good["optimizer"]["param_groups"][0]["lr"] = 1e30
    torch.save(good, tmp_path / "bad.tar")
    refused(
        cli("train_attack_noTrans.py", *common, "--epochs", 3, "--checkpoint_load", tmp_path / "bad.tar"),
        "epoch 2, batch",
    )
    assert (folder / "log.csv").read_bytes() == rows
    assert [path.name for path in folder.glob("*.tar")] == ["0.tar"] and len(pd.read_csv(folder / "log.csv")) == 1


def test_l_intra_whose_features_run_away_stops(cli, words, pipeline, tmp_path):
    good = torch.load(pipeline / NO_TRANS / "1.tar", weights_only=True)
    good["model"]["bn1.weight"] = torch.full_like(good["model"]["bn1.weight"], 3e38)
    torch.save(good, tmp_path / "runaway.tar")
    words = [*words(tmp_path), "--batch_size", 64, "--checkpoint_load", tmp_path / "runaway.tar"]
    refused(cli("finetune_attack_noTrans.py", *words), "not finite in finetune_attack_noTrans epoch 1, batch 1 of")
    assert not list(tmp_path.rglob("*.csv")) and not list((tmp_path / "saved").rglob("*.tar"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = nn.Linear(2, 2)
    opt = SimpleNamespace(epochs=1, overwrite=False, dataset="d", model="m", trigger_type="t", target_type="a",
                          target_label=0, poison_rate=0.1, seed=0, ran_in={})  # fmt: skip
    run = Run(opt, "train_attack_noTrans", tmp_path / "options.json", None)
    run.start()
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"after epoch 1 the weights are not finite \(weight\)"):
        run.finish_epoch(0, {"loss": 1.0}, [tmp_path / "0.tar"], model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def unlearn(cli, words, pipeline, target, *more):
    words = [*words(pipeline), "--batch_size", 8, "--checkpoint_save", target, "--log", target.with_suffix(".csv")]
    assert cli("unlearn_relearn.py", *words, *more).code == 0
    return pd.read_csv(target.with_suffix(".csv"))


def test_the_guard_of_the_ascent_does_nothing_in_the_papers_settings(cli, words, pipeline, tmp_path, monkeypatch):
    guarded = unlearn(cli, words, pipeline, tmp_path / "guarded.tar", "--epochs", 3)
    assert (guarded["at_bound"].dropna() == 0).all() and len(guarded) == 4
    monkeypatch.setattr(losses, "ASCENT_BOUND", float("inf"))
    unlearn(cli, words, pipeline, tmp_path / "free.tar", "--epochs", 3)
    assert same_weights(tmp_path / "guarded.tar", tmp_path / "free.tar")


def test_the_guard_bounds_an_ascent_that_would_blow_up(cli, words, pipeline, tmp_path, monkeypatch):
    rate = ["--epochs", 2, "--lr", 3.0]
    guarded = unlearn(cli, words, pipeline, tmp_path / "guarded.tar", *rate)
    assert guarded["at_bound"].max() > 0 and guarded["loss_Dp"].max() <= losses.ASCENT_BOUND
    monkeypatch.setattr(losses, "ASCENT_BOUND", float("inf"))
    free = unlearn(cli, words, pipeline, tmp_path / "free.tar", *rate)
    assert free["loss_Dp"].max() > 3 * 100


def test_a_bound_grows_after_each_epoch_that_it_held_back_and_that_left_the_backdoor():
    bound_of, history = unlearning.bound_of, [{"epoch": -1, "loss_Dp_after": 0.0}]
    found = []
    for held, after in ((0.0, 0.1), (0.1, 2.29), (0.5, 2.31), (0.9, 9.0), (0.2, 2.0), (0.09, 0.0), (1, 0.0), (1, 0.0)):
        history.append({"epoch": len(history) - 1, "at_bound": held, "loss_Dp_after": after})
        found.append(bound_of(SimpleNamespace(ascent_bound=10.0, bound_growth=2.0), history, 10))
    assert found == [10, 20, 20, 20, 40, 40, 80, 100]  # ln 10 is 2.303
    assert bound_of(SimpleNamespace(ascent_bound=7.0, bound_growth=1.0), history, 10) == 7
    assert bound_of(SimpleNamespace(ascent_bound=700.0, bound_growth=1.0), history, 10) == 700
    assert bound_of(SimpleNamespace(ascent_bound=9.0, bound_growth=1e300), history, 10) == 100


def test_the_log_tells_the_bound_and_an_interrupted_run_goes_on_with_it(cli, words, pipeline, tmp_path):
    more = ["--ascent_bound", 2, "--bound_growth", 2, "--lr", 0.0003]
    log = unlearn(cli, words, pipeline, tmp_path / "six.tar", "--epochs", 6, *more)
    assert np.isnan(log["bound"][0])
    wanted, bound = [], 2.0
    for row in log[log["epoch"] >= 0].to_dict("records"):
        wanted.append(bound)
        grows = row["at_bound"] >= 0.1 and row["loss_Dp_after"] < np.log(10)
        bound = min(100, bound * 2) if grows else bound
    assert log["bound"][1:].tolist() == wanted and len(set(wanted)) > 1, log
    unlearn(cli, words, pipeline, tmp_path / "part.tar", "--epochs", 3, *more)
    on = ["--checkpoint_load", tmp_path / "part.tar", "--overwrite"]
    rest = unlearn(cli, words, pipeline, tmp_path / "part.tar", "--epochs", 6, *more, *on)
    assert rest["bound"][1:].tolist() == wanted and same_weights(tmp_path / "six.tar", tmp_path / "part.tar")


def test_a_bound_that_cannot_grow_is_refused(cli, words, pipeline, tmp_path):
    said = cli("unlearn_relearn.py", *words(pipeline), "--bound_growth", 2, "--checkpoint_save", tmp_path / "x.tar")
    refused(said, "--bound_growth has no use without an --ascent_bound below 100")
    assert not list(tmp_path.iterdir())


def test_samples_of_d_c_that_go_with_d_p_are_doubtful():
    rng = np.random.default_rng(0)
    poisoned_labels = np.array(
        [3] * 14 + [7] * 13 + [label for label in range(10) if label not in (3, 7)] * 4
    )  # 59, a fifth is 12
    labels = np.repeat(np.arange(10), 40)
    for mean in (20.0, 2.0):  # half of it counts, then 2 ln 10
        poisoned = rng.normal(mean, 1, len(poisoned_labels))
        threshold = max(sum(poisoned) / len(poisoned) / 2, 2 * np.log(10))
        clean = rng.uniform(0, threshold, len(labels))
        clean[[0, 41, 120, 121, 159, 285, 399]] = threshold + 0.01  # 120 to 159 are of label 3, 280 to 319 of label 7
        found = unlearning.doubtful(*map(torch.from_numpy, (clean, poisoned, labels, poisoned_labels)), 10)
        assert torch.where(found)[0].tolist() == [120, 121, 159, 285]
        clean[122:127] = threshold + 0.01  # 9 of these 80, too many to be poisoned
        assert unlearning.doubtful(*map(torch.from_numpy, (clean, poisoned, labels, poisoned_labels)), 10) is None


@pytest.mark.parametrize(("count", "kept"), [(10, True), (11, False)])
def test_more_than_a_tenth_is_not_doubtful(count, kept):
    clean, labels = np.where(np.arange(100) < count, 15.0, 1.0), np.zeros(100, dtype=np.int64)
    poisoned, poisoned_labels = np.full(10, 20.0), np.zeros(10, dtype=np.int64)
    found = unlearning.doubtful(*map(torch.from_numpy, (clean, poisoned, labels, poisoned_labels)), 10)
    assert (found is not None) == kept and (not kept or found.sum() == count)


def test_the_descent_leaves_out_what_the_ascent_took_along(cli, words, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(unlearning, "DOUBTFUL", 1.0)  # the sets are small

    def of(name, *more):
        return unlearn(cli, words, pipeline, tmp_path / f"{name}.tar", *more)

    mild = ["--epochs", 1, "--lr", 1e-6]
    assert of("kept", *mild, "--drop_doubtful")["dropped"].iloc[-1] == 0
    of("plain", *mild)
    assert same_weights(tmp_path / "kept.tar", tmp_path / "plain.tar")
    strong = ["--lr", 0.001, "--drop_doubtful"]
    log = of("three", "--epochs", 3, *strong)
    assert log["dropped"].max() > 0, log
    of("part", "--epochs", 1, *strong)
    on = ["--checkpoint_load", tmp_path / "part.tar", "--overwrite"]
    rest = of("part", "--epochs", 3, *strong, *on)
    assert rest["dropped"].tolist()[1:] == log["dropped"].tolist()[1:]
    assert same_weights(tmp_path / "three.tar", tmp_path / "part.tar")
    words = [*words(pipeline), "--passes", "relearn", "--drop_doubtful", "--checkpoint_save", tmp_path / "x.tar"]
    refused(cli("unlearn_relearn.py", *words), "--drop_doubtful", "both --passes")


def test_what_was_last_dropped_stays_so_where_too_many_would_be(cli, words, pipeline, tmp_path, monkeypatch):
    """Four samples are doubtful after the first ascent, too many after the second and third, none after the fourth; as a whole
    and in two parts."""
    many, calls = 4, []

    def in_turn(clean, *_):
        calls.append(None)
        return None if len(calls) in (2, 3) else torch.arange(len(clean)) < many * (len(calls) == 1)

    def of(name, *more):
        more = ["--drop_doubtful", *more]
        return unlearn(cli, words, pipeline, tmp_path / f"{name}.tar", *more)["dropped"].tolist()[1:]

    monkeypatch.setattr(unlearning, "doubtful", in_turn)
    assert of("none", "--epochs", 4) == [many, 0, 0, 0]
    stay = ["--epochs", 4, "--stay_dropped"]
    calls.clear()
    assert of("four", *stay) == [many, many, many, 0]
    assert not same_weights(tmp_path / "four.tar", tmp_path / "none.tar")
    calls.clear()
    of("part", *stay, "--epochs", 2)
    on = ["--checkpoint_load", tmp_path / "part.tar", "--overwrite"]
    content = torch.load(tmp_path / "part.tar", weights_only=True)
    assert len(content["schedule"]["dropped"]) == many
    for wrong in ([10**6], [0.5], "all"):
        torch.save(content | {"schedule": {"dropped": wrong}}, tmp_path / "wrong.tar")
        other = ["--checkpoint_load", tmp_path / "wrong.tar", "--checkpoint_save", tmp_path / "x.tar"]
        said = cli("unlearn_relearn.py", *words(pipeline), "--batch_size", 8, "--drop_doubtful", *stay, *other)
        refused(said, "wrong.tar", "samples of D_c")
    assert of("part", *stay, *on) == [many, many, many, 0]
    assert same_weights(tmp_path / "four.tar", tmp_path / "part.tar")
    refused(cli("unlearn_relearn.py", *words(pipeline), "--stay_dropped"), "--drop_doubtful", "both")


def test_out_of_memory_is_one_line(cli, words, tmp_path, monkeypatch):
    from utils import engine

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "progress", no_memory)
    refused(cli("train_attack_noTrans.py", *words(tmp_path), "--epochs", 1), "out of memory", "--batch_size")


def test_deterministic_runs_give_the_same_bits(cli, words, tmp_path):
    for number in (1, 2):
        common = [*words(tmp_path / str(number)), "--deterministic", "--epochs", 1, "--batch_size", 64]
        said = cli("train_attack_noTrans.py", *common)
        assert said.code == 0 and "Deterministic: equal bits on this processor" in said.out
        assert cli("finetune_attack_noTrans.py", *common).code == 0
        assert not torch.are_deterministic_algorithms_enabled()  # given back at the end
    for folder in (NO_TRANS, TUNED):
        assert same_weights(tmp_path / "1" / folder / "0.tar", tmp_path / "2" / folder / "0.tar")


@pytest.mark.gpu
def test_deterministic_runs_give_the_same_bits_on_a_gpu(cli, words, tmp_path):
    for number in (1, 2):
        common = [
            *words(tmp_path / str(number)),
            "--deterministic",
            "--device",
            "cuda",
            "--epochs",
            2,
            "--batch_size",
            64,
        ]
        said = cli("train_attack_withTrans.py", *common, "--schedule", 1)
        assert said.code == 0 and "on CUDA" in said.out
    assert same_weights(tmp_path / "1" / WITH_TRANS / "1.tar", tmp_path / "2" / WITH_TRANS / "1.tar")
