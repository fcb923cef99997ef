"""What serves comparison: drawn samples, one pass alone, held-out samples, fewer training images."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load_script, run_cli
from test_bad_input import refused
from test_pipeline import CLASSIFIER, EXTRACTOR, SAMPLES, WITH_TRANS, same_weights, weights

from models import build_model
from utils import run as life
from utils.dataloader_bd import Normalize
from utils.datasets import DATASETS
from utils.errors import UserError
from utils.files import sha256
from utils.loading import load_dataset
from utils.paths import python
from utils.poisoning import poison_training_set
from utils.removal import summarise
from utils.validation import HeldOut, best_epoch, is_best, say_choice


def do(*commands):
    """Run commands, each a script and its words, that must succeed."""
    for command in commands:
        assert run_cli(*command) == 0


def sets_of(folder):
    return {name: np.load(folder / f"{name}_samples.npy") for name in ("clean", "suspicious", "poison")}


@pytest.mark.parametrize("kind", ["random", "random_clean", "oracle"])
def test_drawn_samples_have_the_sizes_of_the_ratios_and_are_what_their_name_says(kind, copy, words, cli, data_root):
    said = cli("tools/ablation_samples.py", *words(copy), "--kind", kind, "--out", copy / kind)
    assert said.code == 0, said.err
    found, separated = sets_of(copy / kind), sets_of(copy / SAMPLES)
    assert len(found["clean"]) == 80 and len(found["poison"]) == 20
    everything = np.concatenate(list(found.values()))
    assert sorted(everything["index"]) == list(range(400))
    truth = load_dataset("cifar10", data_root)
    is_poisoned = everything["label"] != truth.train_labels[everything["index"]]
    poisoned = set(everything["index"][is_poisoned])
    shares = {name: np.mean([index in poisoned for index in part["index"]]) for name, part in found.items()}
    if kind == "oracle":
        assert shares["clean"] == 0 and shares["poison"] == 1
    else:
        assert 0 < shares["clean"] < 0.5
    same = set(found["poison"]["index"]) == set(separated["poison"]["index"])
    assert same == (kind == "random_clean")
    quality = json.loads((copy / kind / "detection.json").read_text())
    assert quality["Dp_precision"] == pytest.approx(100 * shares["poison"]) and "AUROC" not in quality
    again = cli("tools/ablation_samples.py", *words(copy), "--kind", kind, "--out", copy / "again")
    assert again.code == 0
    for name in ("clean", "poison"):
        assert (sets_of(copy / "again")[name] == found[name]).all()
    other = cli("tools/ablation_samples.py", *words(copy), "--kind", "random", "--seed", "1", "--out", copy / kind)
    assert other.code == 2 and other.err.strip().endswith("or another --out")


def test_an_oracles_set_that_would_be_empty_is_refused(cli, words, tmp_path):
    rate = ["--poison_rate", 1, "--target_type", "all2all"]
    said = cli("tools/ablation_samples.py", *words(tmp_path), *rate, "--kind", "oracle", "--out", tmp_path / "none")
    refused(said, "D_c would have no sample")
    assert not (tmp_path / "none").exists()


def test_what_makes_the_samples_that_are_missing_is_a_whole_command(cli, words, tmp_path):
    own = [*words(tmp_path), "--clean_ratio", 0.4, "--kind", "likeness", "--out", tmp_path / "like"]
    said = cli("tools/ablation_samples.py", *own)
    refused(said, f"{python('separate_samples.py')} --dataset cifar10", "--clean_ratio 0.4")


def test_d_p_by_what_step_3_proposes_is_taken_out_of_d_c(copy, words, cli):
    run = lambda: cli("tools/ablation_samples.py", *words(copy), "--kind", "likeness", "--out", copy / "like")  # noqa: E731
    said = run()
    assert said.code == 2 and "calculate_consistency.py" in said.err and len(said.err.splitlines()) == 1
    separated = sets_of(copy / SAMPLES)
    order = np.full(400, -3.0, dtype=np.float32)
    chosen = [*separated["clean"]["index"][:5], *separated["suspicious"]["index"][:30]]
    order[chosen] = np.linspace(0, 2, 35)
    record = json.loads((copy / SAMPLES / "options.json").read_text())
    checkpoint = copy / SAMPLES / record["checkpoint_load"]
    np.save(checkpoint.with_name(f"{checkpoint.stem}_order.npy"), order)
    said = run()
    assert said.code == 0, said.err
    found = sets_of(copy / "like")
    assert set(found["poison"]["index"]) == set(chosen)
    assert set(found["clean"]["index"]) == set(separated["clean"]["index"]) - set(chosen)


def test_the_defences_take_drawn_samples(copy, words, tmp_path):
    do(("tools/ablation_samples.py", *words(copy), "--kind", "random", "--out", copy / "drawn"))
    before = (copy / WITH_TRANS / "1_unlearn_purify.tar").read_bytes()
    do(("unlearn_relearn.py", *words(copy), "--epochs", 1, "--batch_size", 16, "--samples", copy / "drawn",
             "--checkpoint_save", copy / "own.tar", "--log", copy / "own.csv"))  # fmt: skip
    record = json.loads((copy / "own.json").read_text())
    assert "drawn/poison_samples.npy" in record["inputs"]
    assert (copy / WITH_TRANS / "1_unlearn_purify.tar").read_bytes() == before
    root = words(tmp_path / "secure")
    do(("ST/train_extractor.py", *root, "--epochs", 1, "--batch_size", 128, "--samples", copy / "drawn"))
    extractor = next((tmp_path / "secure").rglob("last.pth"))
    do(("ST/train_classifier.py", *root, "--epochs", 1, "--batch_size", 64, "--samples", copy / "drawn",
             "--ckpt", extractor))  # fmt: skip
    assert "ASR" in next((tmp_path / "secure").rglob("Linear_*/log.csv")).read_text()


def test_the_authors_mask_trains_another_extractor(copy, words, tmp_path):
    for kind in ("paper", "authors"):
        do(("ST/train_extractor.py", *words(tmp_path / kind), "--epochs", 1, "--batch_size", 128, "--samples",
                 copy / SAMPLES, "--positives", kind))  # fmt: skip
    one, other = (next((tmp_path / kind).rglob("last.pth")) for kind in ("paper", "authors"))
    assert not same_weights(one, other)


def test_unsuspected_takes_d_u_for_d_c_and_d_p_for_neither(copy, words, tmp_path):
    joined = copy / "joined"  # what the paper's mask does where all of D_u is in D_c
    joined.mkdir()
    sets, record = sets_of(copy / SAMPLES), json.loads((copy / SAMPLES / "options.json").read_text())
    both = np.concatenate([sets["clean"], sets["suspicious"]])
    both["flag"] = 0
    for name, rows in (("clean", both), ("suspicious", both[:0]), ("poison", sets["poison"])):
        np.save(joined / f"{name}_samples.npy", rows)
    (joined / "options.json").write_text(json.dumps(record | {"outputs": {}}))
    extractors = []
    for name, samples, kind in (
        ("own", SAMPLES, "unsuspected"), ("joined", "joined", "paper"), ("paper", SAMPLES, "paper")
    ):  # fmt: skip
        do(("ST/train_extractor.py", *words(tmp_path / name), "--epochs", 1, "--batch_size", 128, "--samples",
                 copy / samples, "--positives", kind))  # fmt: skip
        extractors.append(next((tmp_path / name).rglob("last.pth")))
    assert same_weights(*extractors[:2]) and not same_weights(extractors[0], extractors[2])


def test_without_d_p_the_extractor_trains_on_the_other_two_sets_and_the_classifier_takes_it(
    copy, words, tmp_path, capsys
):
    fewer = copy / "fewer"
    fewer.mkdir()
    sets, record = sets_of(copy / SAMPLES), json.loads((copy / SAMPLES / "options.json").read_text())
    for name, rows in sets.items():
        np.save(fewer / f"{name}_samples.npy", rows[:0] if name == "poison" else rows)
    (fewer / "options.json").write_text(json.dumps(record | {"outputs": {}}))
    extractors = []
    for name, samples, more in (("own", SAMPLES, ["--drop_poison"]), ("fewer", "fewer", []), ("all", SAMPLES, [])):
        do(("ST/train_extractor.py", *words(tmp_path / name), "--epochs", 1, "--batch_size", 128, "--samples",
            copy / samples, *more))  # fmt: skip
        assert ("that D_p lacks can plant the backdoor" in capsys.readouterr().out) == ("--drop_poison" in more)
        extractors.append(next((tmp_path / name).rglob("last.pth")))
    assert same_weights(*extractors[:2]) and not same_weights(extractors[0], extractors[2])
    do(("ST/train_classifier.py", *words(tmp_path / "own"), "--epochs", 1, "--learning_rate", 0.5, "--samples",
        copy / SAMPLES))  # fmt: skip


@pytest.mark.parametrize(
    ("script", "last", "more", "longer"),
    [
        ("train_attack_withTrans.py", f"{WITH_TRANS}/1.tar", ["--schedule", 1], True),
        ("ST/train_extractor.py", f"{EXTRACTOR}/last.pth", ["--cosine", "--save_freq", 1], False),
    ],
)
def test_a_finished_run_names_more_epochs_only_where_they_continue_it(script, last, more, longer, copy, words, cli):
    said = cli(script, *words(copy), "--epochs", 2, "--batch_size", 64, *more, "--checkpoint_load", copy / last)
    assert said.code == 0 and "All 2 epochs are done" in said.out
    assert ("a larger --epochs continues" in said.out) == longer


@pytest.mark.parametrize("alone", ["unlearn", "relearn"])
def test_one_pass_alone_leaves_the_other_out(alone, copy, words):
    do(("unlearn_relearn.py", *words(copy), "--epochs", 2, "--batch_size", 16, "--passes", alone, "--lr", 0.01,
             "--checkpoint_save", copy / "own.tar", "--log", copy / "own.csv"))  # fmt: skip
    log = pd.read_csv(copy / "own.csv")
    assert ("loss_Dp" in log, "loss_Dc" in log) == (alone == "unlearn", alone == "relearn")
    rises = log["loss_Dp_after"].iloc[-1] > log["loss_Dp_after"].iloc[0]
    assert rises or alone == "relearn"


def test_d_p_has_a_batch_size_of_its_own(copy, words, cli):
    def unlearnt(name, *more):
        do(("unlearn_relearn.py", *words(copy), "--epochs", 1, "--lr", 0.01, *more,
                 "--checkpoint_save", copy / f"{name}.tar", "--log", copy / f"{name}.csv"))  # fmt: skip
        return weights(copy / f"{name}.tar")

    alone = unlearnt("alone", "--passes", "unlearn", "--batch_size", 7)
    apart = unlearnt("apart", "--passes", "unlearn", "--batch_size", 16, "--unlearn_batch_size", 7)
    assert all(torch.equal(value, apart[name]) for name, value in alone.items())
    only = [
        unlearnt(f"only{size}", "--passes", "relearn", "--batch_size", 16, "--unlearn_batch_size", size)
        for size in (7, 9)
    ]
    assert all(torch.equal(value, only[1][name]) for name, value in only[0].items())  # D_c has --batch_size
    said = cli("unlearn_relearn.py", *words(copy), "--unlearn_batch_size", 21, "--batch_size", 16, "--overwrite")
    assert said.code == 2 and "a batch of 21 is larger than D_p, 20 samples; give --unlearn_batch_size 20" in said.err


# Held-out samples


def test_held_out_samples_are_drawn_by_seed_and_name_and_kept_from_training():
    labels = np.arange(50) % 7
    one = HeldOut(labels, 0.3, 0, "step")
    assert len(one) == 15 and sorted([*one.rows, *one.kept]) == list(range(50))
    assert (one.rest(labels) == labels[one.kept]).all() and one.rest(labels).shape == (35,)
    assert (HeldOut(labels, 0.3, 0, "step").rows == one.rows).all()
    assert set(HeldOut(labels, 0.3, 1, "step").rows) != set(one.rows) != set(HeldOut(labels, 0.3, 0, "other").rows)
    among = np.flatnonzero(labels == 2)
    assert set(HeldOut(labels, 0.5, 0, "step", among).rows) <= set(among)
    none = HeldOut(labels, 0.0, 0, "step")
    assert not none and none.rest(labels) is labels
    for ratio in (0.001, 0.99):
        with pytest.raises(UserError, match="--val_ratio"):
            HeldOut(labels, ratio, 0, "step")
    assert best_epoch([{"epoch": -1}, {"epoch": 0, "a": 1.0}, {"epoch": 1, "a": 3.0}, {"epoch": 2, "a": 3.0}], "a") == 1


def test_the_accuracy_on_held_out_samples_is_that_of_a_loop(copy, words, data_root):
    do(("unlearn_relearn.py", *words(copy), "--epochs", 3, "--batch_size", 8, "--val_ratio", 0.25, "--lr", 0.01,
             "--checkpoint_save", copy / "own.tar", "--log", copy / "own.csv"))  # fmt: skip
    log = pd.read_csv(copy / "own.csv")
    samples = sets_of(copy / SAMPLES)
    model = build_model("resnet10", "cifar10", 10)
    normalize = Normalize(DATASETS["cifar10"], "cpu")

    def right(held_out, part):
        hits = []
        for row in held_out.rows:
            image = torch.from_numpy(part["image"][row]).permute(2, 0, 1)[None]
            with torch.no_grad():
                hits.append(model(normalize(image)).argmax().item() == part["label"][row])
        return 100 * np.mean(hits)

    model.load_state_dict(weights(copy / "own.tar"))
    model.eval()
    for flag, name in ((0, "clean"), (2, "poison")):
        held_out = HeldOut(samples[name]["label"], 0.25, 0, f"unlearn_relearn {flag}")
        column = "val_acc_Dc" if name == "clean" else "val_acc_Dp"
        assert log[column].iloc[-1] == pytest.approx(right(held_out, samples[name]), abs=1e-3)
    chosen = torch.load(copy / "own_val.tar", weights_only=True)["epoch"]
    scores = (log["val_acc_Dc"] - log["val_acc_Dp"]).iloc[1:].tolist()
    assert chosen == scores.index(max(scores))


@pytest.fixture
def epochs_are_worth(monkeypatch):
    """``epochs_are_worth(*scores)``: the next epochs of BR step 2 have these by the held-out samples, whatever the network has learnt."""

    def be(*scores):
        values = (value for score in scores for value in (score, 0.0))  # of D_c, and of D_p
        monkeypatch.setattr(HeldOut, "accuracy", lambda *_: next(values))

    return be


def test_a_run_that_goes_on_ends_with_the_same_chosen_epoch(copy, words, cli, epochs_are_worth):
    more = [*words(copy), "--batch_size", 8, "--lr", 0.01, "--val_ratio", 0.25, "--eval_freq", 0]
    epochs_are_worth(1, 4, 3, 2)
    do(("unlearn_relearn.py", *more, "--checkpoint_save", copy / "own.tar", "--log", copy / "own.csv", "--epochs", 4))
    assert torch.load(copy / "own_val.tar", weights_only=True)["epoch"] == 1
    again = [*more, "--checkpoint_save", copy / "b.tar", "--log", copy / "b.csv"]
    epochs_are_worth(1, 4, 3, 2)
    do(("unlearn_relearn.py", *again, "--epochs", 2))
    again += ["--checkpoint_load", copy / "b.tar"]
    do(("unlearn_relearn.py", *again, "--epochs", 4))
    assert same_weights(copy / "b_val.tar", copy / "own_val.tar")
    for name, score, chosen in (("c", 0, 2), ("d", 9, 5)):
        epochs_are_worth(score)
        place = copy / f"other/{name}_val.tar"
        elsewhere = ["--checkpoint_save", copy / f"other/{name}.tar", "--log", copy / f"other/{name}.csv"]
        said = cli("unlearn_relearn.py", *more, *elsewhere, "--checkpoint_load", copy / "b.tar", "--epochs", 5)
        assert f"choose epoch {chosen} (most right of D_c less D_p): {place}\n" in said.out, said.err
        assert torch.load(place, weights_only=True)["epoch"] == chosen - 1
        assert place.name in json.loads((copy / f"other/{name}.json").read_text())["outputs"]
    assert same_weights(copy / "other/c_val.tar", copy / "own_val.tar")
    (copy / "b_val.tar").unlink()
    lost = cli("unlearn_relearn.py", *again, "--epochs", 5)
    assert lost.code == 2 and "b_val.tar, the model of epoch" in lost.err and "--overwrite" in lost.err


def test_held_out_samples_in_the_other_trainings(copy, words, cli, tmp_path):
    said = cli("train_attack_withTrans.py", *words(tmp_path), "--epochs", 2, "--val_ratio", 0.2, "--batch_size", 64)
    log = pd.read_csv(next(tmp_path.rglob("withTrans/**/log.csv")))
    chosen = log["val_acc"].idxmax()
    assert (
        said.code == 0 and f"held-out samples choose epoch {chosen + 1}: " in said.out and f"/{chosen}.tar" in said.out
    )
    assert log["val_acc"].between(0, 100).all() and len(log) == 2
    said = cli("ST/train_classifier.py", *words(copy), "--epochs", 2, "--val_ratio", 0.3, "--batch_size", 32,
               "--learning_rate", 0.5, "--overwrite")  # fmt: skip
    chosen = pd.read_csv(copy / CLASSIFIER / "log.csv")["val_acc_Dc"].idxmax()
    assert said.code == 0 and f"The held-out samples choose epoch {chosen + 1}: " in said.out
    assert f"/ckpt_epoch_{chosen}.pth" in said.out
    refused = cli("train_attack_withTrans.py", *words(tmp_path), "--epochs", 2, "--val_ratio", 0.95)
    assert refused.code == 2 and "0.95" in refused.err


def test_the_chosen_epoch_is_named_where_its_checkpoint_is(tmp_path, capsys):
    history = [{"epoch": 0, "a": 1.0}, {"epoch": 1, "a": 3.0}, {"epoch": 2, "a": 2.0}]
    here, before = tmp_path / "here", tmp_path / "before"

    def said(loaded):
        say_choice(history, "a", lambda epoch: here / f"{epoch}.tar", loaded)
        return capsys.readouterr().out

    for folder in (here, before):
        folder.mkdir()
    assert "choose epoch 2: its checkpoint is not kept here" in said(None)
    assert "choose epoch 2: its checkpoint is not kept here" in said(before / "2.tar")
    (before / "1.tar").touch()
    assert f"choose epoch 2: {before / '1.tar'}" in said(before / "2.tar")
    (here / "1.tar").touch()
    assert f"choose epoch 2: {here / '1.tar'}" in said(before / "2.tar")


def test_a_run_that_goes_on_keeps_the_log_it_was_begun_with(copy, words, cli):
    own = [*words(copy), "--batch_size", 8, "--eval_freq", 0]
    do(
        (
            "unlearn_relearn.py",
            *own,
            "--checkpoint_save",
            copy / "d.tar",
            "--log",
            copy / "logs/mine.csv",
            "--epochs",
            1,
        )
    )
    before = {*copy.rglob("*.csv")}
    do(("unlearn_relearn.py", *own, "--checkpoint_load", copy / "d.tar", "--epochs", 2))
    assert pd.read_csv(copy / "logs/mine.csv")["epoch"].tolist() == [-1, 0, 1]
    assert {*copy.rglob("*.csv")} == before


def test_what_the_ascent_takes_is_said_to_have_no_use_without_it(copy, words, cli):
    alone = ["unlearn_relearn.py", *words(copy), "--passes", "relearn", "--epochs", 1, "--checkpoint_save", copy / "e.tar",
             "--log", copy / "e.csv"]  # fmt: skip
    assert (
        "Note: --unlearn_batch_size, --ascent_bound says"
        in cli(*alone, "--unlearn_batch_size", 8, "--ascent_bound", 15).out
    )
    assert "Note: --" not in cli(*alone, "--overwrite").out


# Fewer training images


def test_fewer_training_images_go_through_the_steps_with_folders_of_their_own(words, cli, tmp_path):
    root = [*words(tmp_path), "--train_images", 200]
    do(
        ("train_attack_noTrans.py", *root, "--epochs", 1),
        ("finetune_attack_noTrans.py", *root, "--epochs", 1),
        ("separate_samples.py", *root),
    )
    folder = tmp_path / "saved/separated_samples/cifar10_200/resnet10/gridTrigger_0.2_0.05"
    assert sum(len(part) for part in sets_of(folder).values()) == 200
    record = json.loads((folder / "options.json").read_text())
    assert record["data"]["train"]["samples"] == 200 and record["data"]["test"]["samples"] == 100
    assert "200 of 400" in record["data"]["source"]
    checkpoint = next(tmp_path.rglob("noTrans/cifar10_200/**/0.tar"))
    other = cli("train_attack_noTrans.py", *words(tmp_path), "--epochs", 2, "--checkpoint_load", checkpoint)
    assert other.code == 2 and "--train_images 200" in other.err
    for count, part in ((5, "at least one"), (401, "smallest class")):
        refused = cli("train_attack_noTrans.py", *words(tmp_path / "new"), "--train_images", count)
        assert refused.code == 2 and part in refused.err and not (tmp_path / "new").exists()
    own = cli("train_attack_noTrans.py", "--dataset", "npz", "--data_root", "x.npz", "--train_images", 20)
    assert own.code == 2 and "--train_images has no use" in own.err


def test_of_equal_epochs_the_first_is_kept_as_it_is_chosen():
    history = [{"epoch": -1, "a": 9.0}]
    kept = []
    for epoch, value in enumerate((1.0, 3.0, 3.0, 2.0)):
        row = {"epoch": epoch, "a": value}
        if is_best(row, "a", history):
            kept.append(epoch)
        history.append(row)
    assert kept == [0, 1] and kept[-1] == best_epoch(history, "a") == 1


def test_a_run_that_is_killed_while_it_keeps_the_chosen_epoch_goes_on_to_the_same(
    copy, words, monkeypatch, epochs_are_worth
):
    more = [*words(copy), "--batch_size", 8, "--lr", 0.01, "--val_ratio", 0.25, "--epochs", 2]

    def places(name):
        return ["--checkpoint_save", copy / f"{name}.tar", "--log", copy / f"{name}.csv"]

    epochs_are_worth(1, 2)  # so that the second epoch replaces the first one's
    do(("unlearn_relearn.py", *more, *places("whole")))
    kept, write, written = torch.load(copy / "whole_val.tar", weights_only=True), life.write_together, []
    assert kept["epoch"] == 1

    def stopped(files):
        written.extend(path.name for path in files if path.suffix == ".tar")
        if len(written) == 4:  # of two checkpoints an epoch
            raise KeyboardInterrupt
        return write(files)

    monkeypatch.setattr(life, "write_together", stopped)
    epochs_are_worth(1, 2)
    assert run_cli("unlearn_relearn.py", *more, *places("own")) == 130
    monkeypatch.undo()
    epochs_are_worth(2)
    do(("unlearn_relearn.py", *more, *places("own"), "--checkpoint_load", copy / "own.tar"))
    for kind in ("", "_val"):
        assert same_weights(copy / f"own{kind}.tar", copy / f"whole{kind}.tar"), kind
    record = json.loads((copy / "own.json").read_text())
    assert all(sha256(copy / name) == digest for name, digest in record["outputs"].items())


def test_an_epoch_that_is_better_by_rounding_alone_is_not_chosen():
    history, later = [{"epoch": 0, "a": 83.3334}], {"epoch": 1, "a": 91.6667 - 8.3333}
    assert later["a"] > history[0]["a"] and not is_best(later, "a", history)


def test_held_out_samples_are_looked_at_in_evaluation_mode_in_every_epoch(words, tmp_path, data_root):
    common = [*words(tmp_path), "--epochs", 2, "--batch_size", 64, "--eval_freq", 0, "--val_ratio", 0.25, "--lr", 0.03]
    common += ["--target_type", "cleanLabel"]
    assert run_cli("train_attack_withTrans.py", *common) == 0
    opt = load_script("train_attack_withTrans.py").get_parser().parse_args(list(map(str, common)))
    poisoned = poison_training_set(load_dataset("cifar10", data_root), opt)
    rows = HeldOut(poisoned.labels, 0.25, 0, "train_attack_withTrans").rows
    inputs = Normalize(DATASETS["cifar10"], "cpu")(torch.from_numpy(poisoned.images[rows]).permute(0, 3, 1, 2))
    for epoch, logged in enumerate(pd.read_csv(tmp_path / WITH_TRANS / "log.csv")["val_acc"]):
        model = build_model("resnet10", "cifar10", 10)
        model.load_state_dict(weights(tmp_path / WITH_TRANS / f"{epoch}.tar"))
        with torch.no_grad():
            found = model.eval()(inputs).argmax(1).numpy()
        assert logged == pytest.approx(100 * (found == poisoned.labels[rows]).mean(), abs=1.01)  # one sample


def test_the_end_of_unlearning_tells_the_papers_selection(capsys):
    figures = [(-1, 99, 99, 0), (0, 95, 60, 5), (1, 70, 80, 5), (2, 50, 50, 5)]
    summarise([dict(zip(("epoch", "ACC", "ACC_paper", "ASR"), row, strict=True), R_ACC=1.0) for row in figures])
    assert "selection, by ACC_paper - ASR on the test set (2): ACC 70.00" in capsys.readouterr().out
