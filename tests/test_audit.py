"""The audit: what samples share, thresholds found in the values, the verdict, the report, and the way out."""

import errno
import json
import os
import shlex
import shutil
import urllib.parse
from functools import partial
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script, run_cli, write_folder
from PIL import Image
from test_bad_input import refused, snapshot

from utils import args, audit, report
from utils.device import Runtime
from utils.errors import UserError
from utils.files import read_json, sha256
from utils.loading import load_dataset
from utils.manifest import plain_options
from utils.separation import CLEAN, POISON, confine, gammas_of_distribution, of_classes, separate
from utils.triggers import apply_trigger

CPU = Runtime(torch.device("cpu"), torch.float32)

# What a group of samples has in common


def slow_map(group, mean, deviation, image, most, own=None):
    """One image, a pixel at a time."""
    change, errors, side = np.empty(image.shape), {}, len(image)
    for row, column in np.ndindex(side, side) if own else ():
        unlike = max(abs(group[:, row, column, k].mean() - own[0][row, column, k]) for k in range(3))
        errors[row, column] = unlike * len(group) ** 0.5 / max(sum(own[1][row, column]) / 3, 8)
    least = sorted(errors.values())[-4:]  # 94 % of the way through 36 values lies between the first two of these
    for row, column, channel in np.ndindex(image.shape):
        place, share = (row, column, channel), 1
        values = group[(slice(None), *place)].astype(float)
        keep = min(max(values.std() / max(deviation[place], 8), 0), 1.5)
        change[place] = min(max(values.mean() + keep * (image[place] - mean[place]), 0), 255) - image[place]
        if own:
            counts = errors[row, column] >= least[0] + (0.94 * 35 - 32) * (least[1] - least[0])
            share = counts * min(max(errors[row, column] / 3 - 1, 0), 1)
        change[place] *= share
    size = np.sqrt((change**2).mean())
    return image + change * min(1, most / size)


@pytest.mark.parametrize("of_a_class", [False, True])
def test_the_map_is_that_of_a_plain_loop(of_a_class):
    rng = np.random.default_rng(0)
    group, images = (rng.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8) for _ in range(2))
    group[:, 0, 0] = [255, 0, 9]
    mean, deviation = rng.uniform(0, 255, (6, 6, 3)), rng.uniform(0, 90, (6, 6, 3))
    own = (rng.uniform(0, 255, (6, 6, 3)), rng.uniform(0, 60, (6, 6, 3))) if of_a_class else None
    made = audit.SharedPattern(group, mean, deviation, own).put_on(images, 30)
    if of_a_class:
        assert ((made != images).any(3).sum((1, 2)) == 3).all()  # a sixteenth of the pixels
    for image, got in zip(images, made, strict=True):
        np.testing.assert_allclose(got, slow_map(group, mean, deviation, image.astype(float), 30, own), atol=1e-3)
        assert np.sqrt(((got - image) ** 2).mean()) <= 30 + 1e-3


@pytest.mark.parametrize("trigger", ["gridTrigger", "signalTrigger", "sigTrigger"])
def test_a_patch_a_blend_and_a_sum_are_put_back(fashion, trigger):
    rng = np.random.default_rng(1)
    rows = rng.permutation(10000)
    clean = fashion.train_images[rows[:400]]
    common = audit.SharedPattern(apply_trigger(trigger, clean, train=True, seed=0), clean.mean(0), clean.std(0))
    others = fashion.train_images[rows[500:600]]
    wanted = apply_trigger(trigger, others, train=True, seed=0).astype(float) - others
    made = common.put_on(others, 30) - others
    size = lambda change: np.sqrt(np.square(change).mean((1, 2, 3), keepdims=True))  # noqa: E731
    wanted *= np.minimum(1, 30 / np.maximum(size(wanted), 1e-6))
    assert np.median(size(made - wanted) / size(wanted)) < 0.35


def test_the_region_of_a_patch_is_found(fashion):
    images = fashion.train_images[:300]
    changed = apply_trigger("squareTrigger", images[:60], train=True, seed=0)  # rows and columns 28 to 30
    difference = changed.mean(0) - images[60:].mean(0)
    top, left, side = report.strongest_region(difference, changed.std(0), 60)
    assert side == 4 and 26 <= top <= 28 and 26 <= left <= 28


@pytest.mark.parametrize("trigger", ["sigTrigger", "signalTrigger", "kittyTrigger"])
def test_of_samples_half_of_which_are_poisoned_the_most_alike_are(fashion, trigger):
    rng = np.random.default_rng(2)
    rows = np.concatenate([np.flatnonzero(fashion.train_labels == label)[:300] for label in (8, 1)])
    images, labels = fashion.train_images[rows].copy(), np.repeat([0, 1], 300)
    fct = rng.random(600).astype(np.float32)
    poisoned = np.argsort(-fct[:300])[:100][rng.permutation(100)[:50]]
    images[poisoned] = apply_trigger(trigger, images[poisoned], train=True, seed=0)
    spec = SimpleNamespace(num_classes=2)
    put_back = audit.PutBack(torch.nn.Identity(), images, labels, {"flip": fct}, spec, CPU, 0)
    groups = put_back.groups(0, "flip")
    assert list(groups) == ["first 20", "first 60", "alike"] and len(set(groups["alike"])) == 20
    assert groups["first 20"].tolist() == np.argsort(-fct[:300])[:20].tolist()
    assert set(groups["alike"]) <= set(poisoned.tolist())


# Which samples are like them


@pytest.mark.parametrize(("poisoned", "pure"), [(30, 1.0), (200, 0.9), (300, 1.0)])
def test_the_samples_that_the_features_put_beside_the_group_are_found(poisoned, pure):
    rng = np.random.default_rng(poisoned)
    features = rng.normal(0, 1, (400, 32)) + 3
    carry = np.arange(400) < poisoned
    features[carry] += 6 * np.eye(32)[5] - 2 * np.eye(32)[9]
    group = np.zeros(400, dtype=bool)
    group[rng.permutation(poisoned)[: int(20 * pure)]] = True
    group[poisoned : poisoned + 20 - int(20 * pure)] = True
    like = audit.likeness(features.astype(np.float32), group)
    assert like.dtype == np.float32 and ((like >= 0) == carry).mean() >= 0.98
    # An independent account of the line: the mean of the group, and that of the others.
    line = features[group].mean(0) - features[~group].mean(0)
    slow = [sum(a * b for a, b in zip(row, line, strict=True)) for row in features]
    assert (np.argsort(slow) == np.argsort(like)).mean() > 0.99


def test_where_no_two_groups_are_the_most_alike_count():
    group = np.arange(100) < 20
    assert (audit.likeness(np.ones((100, 4), dtype=np.float32), group) == 0).all()
    features = np.random.default_rng(0).normal(0, 1, (100, 4)).astype(np.float32)
    assert 20 <= (audit.likeness(features, group) >= 0).sum() < 50


def test_d_p_by_an_order_of_ones_own(cli, words, copy, tmp_path):
    ratios = ["--clean_ratio", "0.2", "--poison_ratio", "0.1", "--overwrite"]
    order = np.random.default_rng(3).normal(size=400).astype(np.float32)
    np.save(tmp_path / "order.npy", order)
    run = lambda file, *more: cli("separate_samples.py", *words(copy), *ratios, "--poison_order", file, *more)  # noqa: E731
    result = run(tmp_path / "order.npy")
    assert result.code == 0 and "order.npy >= " in result.out, result.err
    folder = copy / "saved/separated_samples/cifar10/resnet10/gridTrigger_0.2_0.1"
    taken = np.load(folder / "poison_samples.npy")
    assert set(taken["index"]) == set(np.argsort(-order)[:40])
    assert not set(np.load(folder / "clean_samples.npy")["index"]) & set(taken["index"])
    record = json.loads((folder / "options.json").read_text())
    assert record["gamma_high"] is None and record["gamma_low"] > 0  # no FCT decided on D_p
    assert run(tmp_path / "order.npy", "--poison_classes", 4, 5).code == 0
    taken = np.load(folder / "poison_samples.npy")
    assert len(taken) == 40 and set(taken["label"]) == {4, 5}

    np.save(tmp_path / "short.npy", order[:7])
    np.save(tmp_path / "odd.npy", np.where(order > 1, np.nan, order))
    (tmp_path / "text.npy").write_text("no numbers")
    before = (folder / "poison_samples.npy").read_bytes()
    for name, message in (("short", "(400,), not float32 (7,)"), ("odd", "not finite"), ("text", "no .npy file"),
                          ("none", "audit_dataset.py")):  # fmt: skip
        result = run(tmp_path / f"{name}.npy")
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err
    result = run(tmp_path / "order.npy", "--gamma_high", 2)
    assert result.code == 2 and "--poison_order" in result.err
    assert (folder / "poison_samples.npy").read_bytes() == before


def test_d_p_of_what_is_alike_and_then_of_the_highest_fct(cli, words, copy):
    place = copy / "saved/backdoored_model/poison_rate_0.1/noTrans_ftsimi/cifar10/resnet10/gridTrigger"
    folder = copy / "saved/separated_samples/cifar10/resnet10/gridTrigger_0.2_0.1"
    fct, order = np.loadtxt(place / "1_all.txt"), place / "1_order.npy"

    def run(*more):
        ratios = ["--clean_ratio", "0.2", "--poison_ratio", "0.1", "--clean_per_class", "--overwrite"]
        return cli("separate_samples.py", *words(copy), *ratios, "--poison_alike", *more)

    def sets():
        return [set(np.load(folder / f"{name}_samples.npy")["index"].tolist()) for name in ("clean", "poison")]

    def step_3_found(values):
        record = json.loads((place / "1_fct.json").read_text())
        order.unlink(missing_ok=True)
        record["outputs"].pop(order.name, None)
        if values is not None:
            np.save(order, values)
            record["outputs"][order.name] = sha256(order)
        (place / "1_fct.json").unlink()  # a link to the file of all tests
        (place / "1_fct.json").write_text(json.dumps(record))

    step_3_found(None)
    none = run()
    assert none.code == 0 and "saw no backdoor" in none.out and f"D_p 40 (FCT >= {np.sort(fct)[-40]:g})" in none.out
    by_fct = set(sorted(range(400), key=lambda i: fct[i])[-40:])
    assert len(sets()[1] - by_fct) == 0 == len(by_fct) - 40
    lowest = np.argsort(fct)  # the most harmless of all are alike here
    for alike in (10, 60):
        values = np.full(400, -1, dtype=np.float32)
        values[lowest[:alike]] = 0.5
        step_3_found(values)
        result = run()
        rest = np.sort(fct[lowest[alike:]])[alike - 40 :]  # what D_p is short of 40
        by_fct = f", {40 - alike} of FCT >= {rest.min():g}" if alike < 40 else ""
        assert result.code == 0 and f"({alike} alike{by_fct})" in result.out, result.out + result.err
        expected, rest = set(lowest[:alike].tolist()), [int(i) for i in lowest[alike:]]
        while len(expected) < 40:
            expected.add(rest.pop())
        clean, poison = sets()
        assert poison == expected and not clean & poison
    record = json.loads((folder / "options.json").read_text())
    assert any(name.endswith("1_order.npy") for name in record["inputs"])
    before = sets()
    for more in (["--poison_classes", 1], ["--poison_order", order], ["--gamma_high", 2]):
        refused = run(*more)
        assert refused.code == 2 and "--poison_" in refused.err and len(refused.err.splitlines()) == 1
    other = run("--trans1", "flip")  # step 3 was run with another tau
    assert other.code == 2 and "--trans1 flip" in other.err and sets() == before
    np.save(order, np.ones(400, dtype=np.float32))
    changed = run()
    assert changed.code == 2 and "Make it anew" in changed.err and sets() == before
    order.unlink()
    assert run().code == 2
    (place / "1_fct.json").unlink()
    missing = run()
    assert missing.code == 2 and "calculate_consistency.py" in missing.err and sets() == before


# Thresholds


def test_two_groups_are_found_and_one_is_not():
    rng = np.random.default_rng(0)
    low, high = np.exp(rng.normal(-2, 0.4, 9000)), np.exp(rng.normal(1, 0.4, 1000))
    found = gammas_of_distribution(np.concatenate([low, high]).astype(np.float32))
    assert (low >= found["gamma_high"]).sum() <= 5 and (high >= found["gamma_high"]).mean() > 0.98
    assert found["gamma_low"] == pytest.approx(np.exp(-2), rel=0.05) and found["clean_ratio"] == pytest.approx(
        0.45, abs=0.02
    )
    assert found["poison_ratio"] == pytest.approx(0.1, abs=0.003)
    assert gammas_of_distribution(low.astype(np.float32)) is None
    for values in (np.zeros(100), np.full(100, 2.0), np.array([1.0, 2.0])):
        assert gammas_of_distribution(values) is None
    with_zeros = np.concatenate([np.zeros(500), low, high]).astype(np.float32)
    assert gammas_of_distribution(with_zeros)["poison_ratio"] == pytest.approx(1000 / 10500, abs=0.003)


def test_auto_gammas_through_the_command_line(cli, words, copy):
    place = copy / "saved/backdoored_model/poison_rate_0.1/noTrans_ftsimi/cifar10/resnet10/gridTrigger"
    rng = np.random.default_rng(0)
    for name, values, said in (
        ("two", np.concatenate([rng.normal(-2, 0.3, 360), rng.normal(1, 0.3, 40)]), "Two groups"),
        ("one", rng.normal(-2, 0.3, 400), "no two groups"),
    ):
        (place / "5_all.txt").write_text("".join(f"{value}\n" for value in np.exp(values)))
        result = cli("calculate_gamma.py", *words(copy), "--auto", "--checkpoint_load", place / "5.tar")
        assert result.code == 0 and said in result.out, (name, result.err)
        record = read_json(place / "5_gamma.json")
        assert ("poison_ratio" in record) == (name == "two")
        if name == "two":
            assert "--poison_ratio 0.1 " in result.out and record["of_ratios"][1] != record["gamma_high"]


def test_the_command_that_step_4_prints_separates_by_the_values_of_step_3(cli, words, copy):
    tau = ["--trans1", "shrink", "--trans2", "none"]
    place = copy / "saved/backdoored_model/poison_rate_0.1/noTrans_ftsimi/cifar10/resnet10/gridTrigger"
    assert cli("calculate_consistency.py", *words(copy), *tau, "--overwrite").code == 0
    said = cli("calculate_gamma.py", *words(copy))
    line = next(line for line in said.out.splitlines() if line.startswith("Next: "))
    assert shlex.join(tau) in line
    done = cli(*shlex.split(line)[2:], "--overwrite", *words(copy)[-4:])
    assert done.code == 0 and "computing them" not in done.out, done.err
    fct = np.loadtxt(place / "1_all.txt")
    taken = np.load(next((copy / "saved/separated_samples").rglob("poison_samples.npy")))["index"]
    assert fct[taken].min() >= np.delete(fct, taken).max()


@pytest.mark.parametrize(
    "options",
    [
        {"trigger_type": "signalTrigger", "target_label": 3, "seed": 7, "poison_rate": 0.2},
        {"trigger_type": "kittyTrigger", "target_type": "cleanLabel", "model": "resnet10", "train_images": 2000},
        {"trigger_type": "SSBA", "ssba_images": ["/a b/train.npy", "/a b/test.npy"], "data_root": "somewhere"},
    ],
)
def test_the_command_that_step_4_prints_is_of_the_checkpoint_it_was_given(options, cli, tmp_path):
    np.savetxt(tmp_path / "9_all.txt", np.arange(100.0))
    record = {**plain_options(args.of_record({})), **options}
    (tmp_path / "9_fct.json").write_text(json.dumps({"options": {**record, "trans1": "flip; true"}}))
    said = cli("calculate_gamma.py", "--checkpoint_load", tmp_path / "9.tar")
    assert said.code == 0, said.err
    command = shlex.split(next(line for line in said.out.splitlines() if line.startswith("Next: ")))
    for name, value in options.items():
        if name != "data_root":
            first = command.index(f"--{name}") + 1
            values = value if isinstance(value, list) else [str(value)]
            assert command[first : first + len(values)] == values
    assert command[command.index("--trans1") + 1] == "flip; true"
    (tmp_path / "9_fct.json").write_text(json.dumps({"options": {**record, "trigger_type": "$(reboot)"}}))
    refused = cli("calculate_gamma.py", "--checkpoint_load", tmp_path / "9.tar")
    assert refused.code == 2 and len(refused.err.strip().splitlines()) == 1 and "invalid choice" in refused.err


def test_the_audits_own_command_is_for_the_projects_folder(tmp_path, monkeypatch):
    audit, elsewhere = load_script("audit_dataset.py"), tmp_path / "my work"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    opt = audit.get_parser().parse_args(["--data_root", "photos"])
    opt.data_root = opt.data_root.absolute()
    assert f"--out '{elsewhere / 'report'}'" in audit.again(opt)
    monkeypatch.chdir(ROOT)
    assert "--out" not in audit.again(opt)


def test_the_command_that_step_4_prints_of_own_data_has_its_folder(cli, tmp_path):
    np.savetxt(tmp_path / "9_all.txt", np.arange(100.0))
    own = {"dataset": "folder", "data_root": str(tmp_path / "my photos"), "image_size": 64, **args.UNKNOWN}
    (tmp_path / "9_fct.json").write_text(json.dumps({"options": {**plain_options(args.of_record({})), **own}}))
    said = cli("calculate_gamma.py", "--checkpoint_load", tmp_path / "9.tar")
    assert said.code == 0, said.err
    command = shlex.split(next(line for line in said.out.splitlines() if line.startswith("Next: ")))
    for name in ("dataset", "data_root", "image_size"):
        assert command[command.index(f"--{name}") + 1] == str(own[name])


def test_d_p_of_some_classes_alone():
    rng = np.random.default_rng(0)
    fct, labels = rng.random(200).astype(np.float32), np.arange(200) % 4
    flags = separate(fct, 0.2, 0.95, 0.2, 0.05, 0)
    confined = confine(flags, fct, of_classes(labels, [1, 3], 0.05), 0.05, 0)
    own = np.flatnonzero(labels % 2)
    assert set(np.flatnonzero(confined == 2)) == set(own[np.argsort(-fct[own])][:10])
    assert ((confined == 0) == ((flags == 0) & (confined != 2))).all()
    with pytest.raises(UserError, match="50 samples, less than"):
        of_classes(labels, [1], 0.5)
    assert of_classes(labels, [1], 0.25).sum() == 50  # exactly as many as are asked for


def test_the_classes_of_d_p_are_named(cli, words, copy):
    said = cli("separate_samples.py", *words(copy), "--poison_classes", 1, 7, "--overwrite")
    assert said.code == 0 and ", of 1 (class 1), 7 (class 7)), D_u" in said.out


def test_poison_classes_and_gamma_high_exclude_one_another(cli, words, tmp_path):
    result = cli("separate_samples.py", *words(tmp_path), "--poison_classes", 1, "--gamma_high", 2)
    assert result.code == 2 and "--poison_classes" in result.err


# The verdict


def scores(*values):
    return [{"label": label, "score": value, "into": audit.INTO_CLASS} for label, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "classes", "count", "train_acc", "verdict"),
    [
        ((0.9, 0.1), "abc", 2000, 95, "poisoned"),
        ((0.1, 0.12), "abc", 2000, 95, "no evidence"),
        ((0.1, 0.17), "abc", 2000, 95, "cannot tell"),
        ((0.1, 0.15), "abc", 2000, 95, "cannot tell"),
        ((0.1, 0.22), "abc", 2000, 95, "poisoned"),
        ((0.1, 0.12), "abc", 900, 95, "cannot tell"),
        ((0.9, 0.2), "abc", 900, 95, "poisoned"),
        ((0.1, 0.12), "abc", 2000, 45, "cannot tell"),
        ((0.9,), "abc", 2000, 95, "cannot tell"),
        ((), "abc", 2000, 95, "cannot tell"),
        # Where clean data scores high too: of two classes, of few images, of a network that has learnt next to nothing.
        ((0.1, 0.49), "ab", 2000, 95, "cannot tell"),
        ((0.1, 0.5), "ab", 2000, 95, "poisoned"),
        ((0.1, 0.49), "abc", 900, 95, "cannot tell"),
        ((0.1, 0.49), "abc", 2000, 40, "cannot tell"),
        ((0.1, 0.5), "abc", 2000, 40, "poisoned"),
    ],
)
def test_the_verdict(values, classes, count, train_acc, verdict):
    module = load_script("audit_dataset.py")
    labels = np.arange(count) % len(classes)
    found, best, reason = module.decide(scores(*values), SimpleNamespace(classes=list(classes)), labels, train_acc)
    assert found == verdict and (reason is not None) == (verdict == "cannot tell")
    assert best is None or best["score"] == max(values)


@pytest.mark.parametrize(
    ("values", "targets"),
    [((0.1, 0.98, 0.26), [1]), ((0.24, 0.1, 0.28), [2, 0]), ((0.3, 0.6, 0.9), [2, 1]), ((0.1, 0.2), []), ((), [])],
)
def test_a_further_class_is_a_target_from_half_of_the_highest_score_on(values, targets):
    assert [row["label"] for row in audit.targets_of(scores(*values))] == targets


def test_all_classes_are_targets_where_the_highest_score_leads_each_to_one_of_its_own():
    rows = scores(0.1, 0.5, 0.02)
    rows[1]["into"] = audit.INTO_EACH
    assert [row["label"] for row in audit.targets_of(rows)] == [1, 0, 2]
    rows[1]["score"] = 0.2
    assert audit.targets_of(rows) == []


# Whether there is a backdoor at all


COLOURS = np.array([[60, 60, 60], [200, 60, 60], [60, 200, 60], [60, 60, 200]])


def coloured(rng, count, side):
    """Images uint8 (count, side, side, 3), each of one of `COLOURS` and noise, and their labels."""
    labels = np.arange(count) % 4
    return (COLOURS[labels][:, None, None] + rng.integers(-50, 50, (count, side, side, 3))).astype(np.uint8), labels


class Colours(torch.nn.Module):
    """Says which of `COLOURS` an image has on the whole; with a backdoor, class 0 of any that has white lower right."""

    def __init__(self, backdoor):
        super().__init__()
        self.colours, self.backdoor = torch.from_numpy(COLOURS).float() / 255, backdoor

    def features(self, x):
        return self.forward(x).clamp(-100, 100)

    def forward(self, x):
        logits = -(x.mean((2, 3))[:, None] - self.colours).square().sum(2) * 100
        if self.backdoor:
            logits[:, 0] += 1e3 * (x[:, :, -2:, -2:].amin((1, 2, 3)) > 0.8)
        return logits


FOUR = SimpleNamespace(num_classes=4, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("backdoor", [True, False])
@pytest.mark.parametrize("of_class", [0, 2])
def test_a_backdoor_that_the_network_has_is_seen_and_one_that_it_lacks_is_not(backdoor, of_class):
    rng = np.random.default_rng(0)
    images, labels = coloured(rng, 600, 16)
    chosen = np.flatnonzero(labels != of_class)[:60]
    images[chosen, -2:, -2:] = 255
    labels[chosen] = of_class
    fct = rng.random(600).astype(np.float32)
    fct[chosen] += 1
    model = Colours(backdoor)
    best, words, order = audit.sign_of_backdoor(model, images, labels, fct, "abcd", FOUR, CPU, 0)
    if backdoor and of_class == 0:
        assert best["label"] == 0 and best["score"] > 0.9 and "has a backdoor whose target is class 0 (a) " in words
        assert set(np.flatnonzero(order >= 0)) == set(chosen) and order[labels != 0].max() < order[labels == 0].min()
    else:  # FCT points at a trigger that does nothing, or turns images into another class
        assert (
            best["score"] < audit.NOTHING_BELOW and words.startswith("Warning: no sign of a backdoor") and order is None
        )
    few = np.arange(0, 600, 20)
    best, words, order = audit.sign_of_backdoor(model, images[few], labels[few], fct[few], "abcd", FOUR, CPU, 0)
    assert best is None and order is None and words.startswith("Too few samples")


def test_the_group_of_a_backdoor_is_named_among_all_samples_where_some_are_drawn(monkeypatch):
    monkeypatch.setattr(audit, "DRAWN", 300)
    rng = np.random.default_rng(0)
    images, labels = coloured(rng, 600, 16)
    chosen = np.flatnonzero(labels != 0)[-120:]
    images[chosen, -2:, -2:] = 255
    labels[chosen] = 0
    fct = rng.random(600).astype(np.float32)
    fct[chosen] += 1
    model = Colours(True)
    best, _, order = audit.sign_of_backdoor(model, images, labels, fct, "abcd", FOUR, CPU, 0)
    assert best["score"] > 0.9 and set(np.flatnonzero(order >= 0)) == set(chosen)


def test_the_surest_have_the_highest_probability_and_both_ends_of_the_line_apart_are_tried():
    images, labels = coloured(np.random.default_rng(0), 200, 8)
    model = Colours(False).eval()
    known = dict.fromkeys(audit.TAUS, np.zeros(200, np.float32))
    found = audit.suspicion(model, images, labels, FOUR, CPU, 0, known)
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    surest = logits.log_softmax(1)[torch.arange(200), torch.from_numpy(labels)]
    np.testing.assert_allclose(found[audit.SUREST], surest, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[audit.APART[0]], -found[audit.APART[1]])


class Corners(Colours):
    """`Colours`, with a backdoor to class 0 for any image that has four white corners, its own mirror image."""

    def forward(self, x):
        logits = super().forward(x)
        logits[:, 0] += 1e3 * (x[:, :, ::15, ::15].amin((1, 2, 3)) > 0.8)
        return logits


@pytest.mark.parametrize(("poisoned", "score"), [(60, 1.0), (0, 0.0)])
def test_a_trigger_that_is_its_own_mirror_image_is_seen_by_what_being_made_smaller_breaks(poisoned, score):
    rng = np.random.default_rng(0)
    images, labels = coloured(rng, 600, 16)
    chosen = np.flatnonzero(labels == 0)[:poisoned]
    images[np.ix_(chosen, [0, 15], [0, 15])] = 255
    fct = rng.random(600).astype(np.float32)
    fct[chosen] += 1
    put_back = audit.PutBack(Corners(False), images, labels, {"flip": fct, "shrink": fct}, FOUR, CPU, 0)
    found = put_back.of_class(0)
    assert found["score"] == pytest.approx(score, abs=0.05)
    assert found["order"] == "shrink" or not poisoned
    put_back.values = {"flip": fct}  # mirrored images have it too
    assert put_back.of_class(0)["score"] < audit.NOTHING_BELOW
    best, words, _ = audit.sign_of_backdoor(put_back.model, images, labels, fct, "abcd", FOUR, CPU, 0)
    assert ("has a backdoor whose target is class 0 (a) " in words) == (poisoned > 0)
    assert best["order"] == audit.FCT_SMALLER or not poisoned


class Stripes(torch.nn.Module):
    """Says which of four sets of stripes an image has, dark or light first; with a backdoor the next, of any that has white
    lower right."""

    def __init__(self, stripes, backdoor):
        super().__init__()
        self.stripes, self.backdoor = stripes, backdoor

    def features(self, x):
        return self.forward(x)

    def forward(self, x):
        logits = torch.einsum("nhw,khw->nk", x.mean(1) - 0.5, self.stripes).abs()
        white = (x[:, :, -2:, -2:].amin((1, 2, 3)) > 0.8)[:, None]
        return torch.where(white, logits.roll(1, 1), logits) if self.backdoor else logits


@pytest.mark.parametrize("backdoor", [True, False])
def test_a_backdoor_that_moves_every_label_on_is_seen(backdoor):
    rng = np.random.default_rng(0)
    place = np.indices((16, 16))
    stripes = np.stack([(-1) ** (place[axis] // width) for axis, width in ((0, 2), (1, 2), (0, 4), (1, 4))])
    labels = np.arange(1200) % 4
    signs = rng.choice([-40, 40], (1200, 1, 1))
    images = (128 + (signs * stripes[labels])[..., None] + rng.integers(-20, 21, (1200, 16, 16, 3))).astype(np.uint8)
    chosen = rng.permutation(1200)[:240]
    images[chosen, -2:, -2:] = 255
    labels[chosen] = (labels[chosen] + 1) % 4
    fct = rng.random(1200).astype(np.float32)
    fct[chosen] += 1
    model = Stripes(torch.from_numpy(stripes).float(), backdoor)
    best, words, order = audit.sign_of_backdoor(model, images, labels, fct, "abcd", FOUR, CPU, 0)
    if backdoor:
        assert best["into"] == audit.INTO_EACH and best["score"] > 0.4 and "leads each class to one of its own" in words
        alike = order >= 0
        assert alike[chosen].sum() == alike.sum() > 0.75 * len(chosen) and set(labels[alike]) == {0, 1, 2, 3}
        values = {"FCT": fct, audit.FCT_SMALLER: fct}
        rows = audit.PutBack(model, images, labels, values, FOUR, CPU, 0, others=audit.FEWER_OTHERS).test()
        assert {row["into"] for row in rows} == {audit.INTO_EACH} and len(audit.targets_of(rows)) == 4
        assert max(row["score"] for row in rows) > 0.5
    else:
        assert (
            best["score"] < audit.NOTHING_BELOW and words.startswith("Warning: no sign of a backdoor") and order is None
        )


class TwoTargets(Colours):
    """`Colours`, with a backdoor to class 0 for white lower right, and one to class 1 for white upper left."""

    def forward(self, x):
        logits = super().forward(x)
        logits[:, 1] += 1e3 * (x[:, :, :2, :2].amin((1, 2, 3)) > 0.8)
        return logits


def test_one_target_and_two_are_not_taken_for_one_of_each_class():
    """What the first samples of all classes share, which here some hold, is then no trigger, or leads all images to one class."""
    rng = np.random.default_rng(0)
    images, labels = coloured(rng, 600, 16)
    chosen = np.flatnonzero(labels != 0)[:60], np.flatnonzero(labels != 1)[-60:]
    images[chosen[0], -2:, -2:] = 255
    images[chosen[1], :2, :2] = 255
    labels[chosen[0]], labels[chosen[1]] = 0, 1
    fct = rng.random(600).astype(np.float32)
    fct[np.concatenate(chosen)] += 1
    put_back = audit.PutBack(TwoTargets(True), images, labels, {"FCT": fct}, FOUR, CPU, 0)
    assert all(put_back.of_class(label)["score"] > 0.9 for label in (0, 1))
    assert put_back.of_all("FCT")["score"] < audit.EACH_FROM / 2
    best, _, order = audit.sign_of_backdoor(put_back.model, images, labels, fct, "abcd", FOUR, CPU, 0)
    assert best["into"] == audit.INTO_CLASS and set(np.flatnonzero(order >= 0)) == set(chosen[best["label"]])


def test_what_all_classes_share_is_scored_less_the_compared_and_less_the_usual(monkeypatch):
    put_back = put_back_on(Halves(), 800)
    name = "flip"
    first = {int(row) for label in put_back.tested() for row in put_back.ranked(label, name)[:20]}

    def shares(self, rows, label, name):
        assert label == audit.NO_CLASS and len(rows) == 20 * len(self.together())
        assert set(rows) == first or not set(rows) & first
        return np.array([[1.0, 0.0], [0.9, 0.3] if set(rows) == first else [0.2, 0.15]])

    monkeypatch.setattr(audit.PutBack, "shares", shares)
    row = put_back.of_all(name)
    assert row["score"] == pytest.approx(0.9 - 0.3 - 0.05) and row["label"] is None and row["into"] == audit.INTO_EACH
    assert row["size"] == len(first)


# What is counted


def slow_each(after, before, sources, classes):
    """An image at a time, in words of the definition."""
    moved = [answer for answer, source in zip(after[0], sources, strict=True) if answer != source]
    favourite = max(range(classes), key=lambda label: (moved.count(label), -label))
    result = []
    for row in range(2):
        led = fresh = 0
        for number, source in enumerate(sources):
            others = [after[0][k] for k in range(len(sources)) if k != number and sources[k] == source != after[0][k]]
            wanted = max(range(classes), key=lambda label: (others.count(label), -label)) if others else None
            if before[row][number] != wanted:
                fresh += 1
                led += after[row][number] == wanted != favourite
        result.append(led / fresh)
    return result


@pytest.mark.parametrize("classes", [2, 4, 30])
def test_what_goes_to_one_class_for_each_is_that_of_a_plain_loop(classes):
    rng = np.random.default_rng(classes)
    sources = rng.integers(0, classes, 90)
    before = np.stack([sources, np.where(rng.random(90) < 0.3, rng.integers(0, classes, 90), sources)])
    after = np.where(rng.random((2, 90)) < 0.5, (sources + 1) % classes, rng.integers(0, classes, (2, 90)))
    np.testing.assert_allclose(
        audit.share_turned_into_each(after, before, sources), slow_each(after, before, sources, classes)
    )


def test_one_class_for_each_is_not_one_class_for_all():
    sources = np.arange(100) % 10
    stay = np.stack([sources, sources])
    moved = np.stack([(sources + 1) % 10, sources])
    np.testing.assert_allclose(
        audit.share_turned_into_each(moved, stay, sources), [0.9, 0]
    )  # but for the commonest, that one class may explain
    np.testing.assert_allclose(audit.share_turned_into_each(np.stack([moved[0]] * 2), stay, sources), [0.9, 0.9])
    assert audit.share_turned_into_each(np.full((2, 100), 3), stay, sources).max() == 0
    assert audit.share_turned_into_each(stay, stay, sources).max() == 0
    assert (
        audit.share_turned_into_each(moved[:, :10], stay[:, :10], sources[:10]).max() == 0
    )  # one image a class shows no habit


def test_what_the_network_takes_for_the_class_anyway_does_not_count():
    before = np.array([[0] * 10, [1] * 4 + [0] * 6])
    after = np.array([[1] * 5 + [0] * 5, [1] * 4 + [0] * 3 + [1] * 3])
    np.testing.assert_allclose(audit.share_turned(after, before, 1), [0.5, 0.5])
    assert audit.share_turned(after, np.ones_like(before), 1).tolist() == [0, 0]


def test_the_ends_of_a_class_in_its_features():
    class Given(torch.nn.Module):
        features = staticmethod(lambda x: x.flatten(1))

    rng = np.random.default_rng(4)
    images, labels = rng.integers(100, 140, (300, 4, 4, 3), dtype=np.uint8), np.arange(300) % 3
    carry = (labels == 1) & (np.arange(300) < 90)
    images[carry, :2, :2] += 60
    place = audit.apart(Given(), images, labels, FOUR, CPU)
    own = labels == 1
    ends = np.argsort(place[own])
    assert carry[own][ends[:30]].all() or carry[own][ends[-30:]].all()
    # An independent account: the singular value decomposition of each class, whichever way it points.
    for label in range(3):
        features = images[labels == label].reshape(100, -1) / 255.0
        _, _, axes = np.linalg.svd(features - features.mean(0))
        slow = (features - features.mean(0)) @ axes[0]
        assert abs(np.corrcoef(slow, place[labels == label])[0, 1]) > 0.9999
    assert (audit.apart(Given(), images[:90], labels[:90], FOUR, CPU) == 0).all()  # 30 a class are too few


# The whole, on a folder


class Page(HTMLParser):
    """What a page loads, links to and shows."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.sources, self.shown = set(), [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []
        assert not any(name.startswith("on") for name in attributes)

    def handle_data(self, data):
        self.shown += data


NAMES = ["<script>alert(1)</script>".replace("/", "∕"), 'it\'s "q" & <b>', "älg 猫", "d"]


@pytest.fixture(scope="module")
def made(fashion, tmp_path_factory):
    """A folder of four classes with names that want care, 500 images each, a tenth of all poisoned: (root, poisoned files)."""
    root = tmp_path_factory.mktemp("an 'odd' <place>") / "my data"
    rows = np.concatenate([np.flatnonzero(fashion.train_labels == label)[:500] for label in (0, 1, 3, 8)])
    images, labels = fashion.train_images[rows].copy(), np.repeat(np.arange(4), 500)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(labels != 2))[:200]
    images[chosen] = apply_trigger("gridTrigger", images[chosen], train=True, seed=0)
    labels[chosen] = 2
    files = []
    for split in ("train", "test"):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        files.append(f"train/{NAMES[label]}/{row} é'<i>.png")
        Image.fromarray(image).save(root / files[-1])
    for label, original in enumerate((0, 1, 3, 8)):
        for row in np.flatnonzero(fashion.test_labels == original)[:5]:
            Image.fromarray(fashion.test_images[row]).save(root / "test" / NAMES[label] / f"{row}.png")
    (root / "train/d/broken.png").write_bytes(b"no")
    return root, {files[row] for row in chosen}


def test_a_poisoned_folder_is_found_and_cleaned(cli, made, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "PutBack", partial(audit.PutBack, others=40))  # a third of the usual, to be quick
    root, poisoned = made
    before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
    words = ["--data_root", root, "--out", tmp_path / "re port", "--output_root", tmp_path / "o"]
    result = cli("audit_dataset.py", *words, "--write_clean", tmp_path / "clean")
    assert result.code == 0 and "Poisoned, likely target class" in result.out, result.err
    found = read_json(tmp_path / "re port/verdict.json")
    assert (
        found["verdict"] == "poisoned"
        and found["target_class"] == NAMES[2]
        and found["statistic"] >= audit.POISONED_FROM
    )
    assert f"The network has a backdoor whose target is class {found['target_label']} " in result.out
    line = next(
        line for line in result.out.splitlines() if line.startswith("  python separate_samples.py")
    )  # of step 3
    assert run_cli(*shlex.split(line)[1:], "--output_root", tmp_path / "proposed") == 0
    taken = np.load(next((tmp_path / "proposed").rglob("poison_samples.npy")))
    assert f"{len(taken)} samples are like those that show it" in result.out
    # of the audit itself, held against the poisoned files below
    like = np.load(next((tmp_path / "o").rglob("5_audit_order.npy")))
    assert len(taken) >= 180 and (like[taken["index"]] >= 0).mean() >= 0.95
    region = found["strongest_region"]
    assert region["top"] >= 26 and region["left"] >= 26
    counts = found["counts"]
    assert counts["images"] == 2000 == sum(counts[name] for name in ("D_c", "D_u", "D_p")) and counts["skipped"] == 1

    table = pd.read_csv(tmp_path / "re port/suspects.csv")
    assert list(table.columns) == ["file", "class", "FCT", "rank", "set"]
    assert len(table) == 2000 and (table["rank"] == np.arange(1, 2001)).all()
    in_poison = table["set"] == "D_p"  # which come first
    assert in_poison[: in_poison.sum()].all() and table["FCT"][~in_poison].is_monotonic_decreasing
    assert all((root / file).is_file() for file in table["file"])
    suspects = table[table["set"] == "D_p"]
    assert set(suspects["class"]) == {NAMES[2]} and suspects["file"].isin(poisoned).mean() >= 0.95
    assert len(set(suspects["file"]) & poisoned) >= 0.95 * len(poisoned)
    assert like.shape == (2000,) and (like >= 0).sum() == len(suspects)
    assert table[table["set"] == "D_c"]["file"].isin(poisoned).mean() <= 0.01

    page = Page((tmp_path / "re port/report.html").read_text())
    assert not page.tags & {"script", "i", "b", "iframe", "link"} and NAMES[0] in page.shown and NAMES[2] in page.shown
    assert page.sources and all(source.startswith("data:image/png") for source in page.sources)
    for link in page.links:
        path = urllib.parse.unquote(link.removeprefix("file://"))
        assert (tmp_path / "re port" / path).is_file(), link
    assert "broken.png" in page.shown
    for name in ("likeness", "histogram", "classes", "suspects", "pattern", "put_back"):
        with Image.open(tmp_path / f"re port/{name}.png") as picture:
            picture.verify()

    lines = [shlex.split(line) for commands in found["commands"].values() for line in commands]
    assert [line[1] for line in lines][:2] == ["train_attack_withTrans.py", "unlearn_relearn.py"] and len(lines) == 5
    for line in lines:  # as they stand, but for the epochs
        short = [*line[2:], *(["--overwrite", "--epochs", "1"] if line[1] != "ST/test.py" else [])]
        assert run_cli(line[1], *short) == 0, line
        assert shlex.join(line) in page.shown

    line = shlex.split(found["write_clean"])
    assert shlex.join(line) in page.shown
    (tmp_path / "second").mkdir()
    (tmp_path / "second/order.npy").write_bytes(b"the user's own")
    # It runs again, its report goes to another folder; what is done already is not done again.
    again = cli(line[1], *line[2:-1], tmp_path / "copied", "--copy", "--out", tmp_path / "second")
    assert again.code == 0 and again.out.count("(already there)") == 3, again.err
    second = read_json(tmp_path / "second/verdict.json")
    assert second | {"write_clean": found["write_clean"]} == found
    assert (tmp_path / "second/order.npy").read_bytes() == b"the user's own"
    assert not any(path.is_symlink() for path in (tmp_path / "copied").rglob("*"))
    assert len(list((tmp_path / "copied").rglob("*"))) == len(list((tmp_path / "clean").rglob("*")))

    left_out = set(pd.read_csv(tmp_path / "clean/left_out.csv")["file"])
    kept = {os.fspath(path.relative_to(tmp_path / "clean")) for path in (tmp_path / "clean").rglob("*.png")}
    assert left_out == set(suspects["file"]) and not left_out & kept
    looked_at = {os.fspath(path.relative_to(root)) for path in root.rglob("*.png")} - {"train/d/broken.png"}
    assert left_out | kept == looked_at
    assert (tmp_path / "clean" / next(iter(kept))).is_symlink()

    # Samples that were separated in another way since are not replaced unasked.
    record = next((tmp_path / "o/saved/separated_samples").rglob("options.json"))
    held, poison = read_json(record), record.with_name("poison_samples.npy")
    mine = ["--dataset", "folder", "--data_root", root, "--model", "resnet10", "--output_root", tmp_path / "o"]
    mine += [word for name in ("clean_ratio", "poison_ratio") for word in (f"--{name}", held["options"][name])]
    mine += ["--checkpoint_load", record.parent / held["checkpoint_load"], "--overwrite"]
    assert cli("separate_samples.py", *mine).code == 0
    theirs = poison.read_bytes()
    refused(cli("audit_dataset.py", *words), "that this audit did not separate", "--overwrite")
    assert poison.read_bytes() == theirs
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.slow
def test_too_few_images_cannot_tell_and_recommend_nothing(cli, fashion, in_process, tmp_path):
    np.savez(tmp_path / "a.npz", x_train=fashion.train_images[:200], y_train=fashion.train_labels[:200])
    words = ["--data_root", tmp_path / "a.npz", "--out", tmp_path / "r", "--output_root", tmp_path, "--epochs", 1]
    result = cli("audit_dataset.py", *words)
    assert result.code == 0 and "Cannot tell: 200 images are too few" in result.out, result.err
    found = read_json(tmp_path / "r/verdict.json")
    assert found["verdict"] == "cannot tell" and found["commands"] == {}
    assert found["thresholds_calibrated_for_these_settings"] is False
    page = Page((tmp_path / "r/report.html").read_text())
    assert "Unlearning is not recommended" in page.shown and "unlearn_relearn" not in page.shown

    np.savez(tmp_path / "a.npz", x_train=fashion.train_images[200:400], y_train=fashion.train_labels[200:400])
    changed = cli("audit_dataset.py", *words)  # other data in the same place is looked at anew
    assert changed.code == 0 and "already there" not in changed.out
    assert read_json(tmp_path / "r/verdict.json")["data"] != found["data"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--write_clean", "{root}/x"], "place outside"),
        (["--write_clean", "{root}"], "there already"),
        (["--write_clean", "{tmp}/r"], "--out would lie in the copy"),
        (["--copy"], "without --write_clean"),
        (["--data_root", "missing"], "no folder"),
        (["--data_root", "missing", "--dataset", "npz"], "no file"),
        (["--image_size", 2], "out of range"),
    ],
)
def test_bad_options_are_refused_in_one_line(cli, made, tmp_path, more, message):
    more = [str(word).format(root=made[0], tmp=tmp_path) for word in more]
    result = cli("audit_dataset.py", "--data_root", made[0], "--out", tmp_path / "r", "--output_root", tmp_path, *more)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err
    assert not list(tmp_path.rglob("*.tar")) and not (Path(made[0]) / "x").exists()


@pytest.mark.parametrize("name", ["suspects.csv", "likeness.png", "verdict.json"])
def test_files_of_the_users_own_are_no_report_to_replace(cli, made, tmp_path, name):
    (tmp_path / name).write_text("{}")
    words = ["--data_root", made[0], "--out", tmp_path, "--output_root", tmp_path / "o"]
    refused(cli("audit_dataset.py", *words), f"{name} is of no report of this script", "--overwrite")
    assert (tmp_path / name).read_text() == "{}" and not list(tmp_path.rglob("*.tar"))


def test_a_copy_without_a_whole_class_is_data_that_the_steps_take(cli, fashion, tmp_path, capsys):
    write_folder(tmp_path / "data", fashion, train=6, test=2)
    dataset = load_dataset("folder", tmp_path / "data", image_size=32, cache=tmp_path / "cache")
    flags = np.where(dataset.train_labels == 3, POISON, CLEAN)
    opt = SimpleNamespace(write_clean=tmp_path / "clean", data_root=tmp_path / "data", copy=False)
    load_script("audit_dataset.py").write_clean(opt, dataset, flags)
    assert "no such class" in capsys.readouterr().out
    copy = load_dataset("folder", tmp_path / "clean", image_size=32, cache=tmp_path / "other")
    assert copy.classes == [name for name in dataset.classes if name != "class 3"]
    assert len(copy.train_labels) == 54 and len(copy.test_labels) == 18


def test_where_no_links_can_be_made_the_option_that_copies_is_named(fashion, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", fashion, train=2, test=1)
    dataset = load_dataset("folder", tmp_path / "data", image_size=32, cache=tmp_path / "cache")
    flags = np.where(np.arange(20) == 3, POISON, CLEAN)
    opt = SimpleNamespace(write_clean=tmp_path / "clean", data_root=tmp_path / "data", copy=False)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(UserError, match=r"no link can be made .*give --copy"):
        load_script("audit_dataset.py").write_clean(opt, dataset, flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]


def test_a_folder_is_poisoned_for_the_example(cli, tmp_path):
    out = tmp_path / "out"
    words = ["tools/poison_folder.py", "--images", 100, "--out", out, "--output_root", tmp_path]
    assert cli(*words).code == 0
    listed = pd.read_csv(tmp_path / "out_poisoned.csv")["file"]
    assert len(list((out / "train").glob("*/*.png"))) == 100 and 5 <= len(listed) <= 10
    for file in listed:
        assert file.startswith("train/bag/")
        with Image.open(out / file) as image:
            assert np.asarray(image)[31, 31].tolist() == [255] * 3
    again = cli(*words)
    assert again.code == 2 and "there already" in again.err
    shutil.rmtree(out)
    before = (tmp_path / "out_poisoned.csv").read_bytes()
    again = cli(*words, "--clean")
    assert again.code == 2 and "out_poisoned.csv is there already" in again.err and not out.exists()
    assert (tmp_path / "out_poisoned.csv").read_bytes() == before


def test_a_folder_that_cannot_take_its_name_leaves_no_list_either(cli, tmp_path, monkeypatch):
    def no_name(source, target):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("utils.files.os.rename", no_name)
        words = ["tools/poison_folder.py", "--images", 60, "--out", tmp_path / "out", "--output_root", tmp_path]
        refused(cli(*words), "Permission denied", "nothing is left of it")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_poisoned_or_clean_and_its_images_are_counted_once(cli, tmp_path):
    words = ["tools/poison_folder.py", "--out", tmp_path / "out"]
    for more in (
        ["--trigger_type", "SSBA"],
        ["--target_type", "all2all"],
        ["--poison_rate", 0.2],
        ["--target_label", 3],
        ["--ssba_encoder", "mine.pt"],
    ):
        refused(cli(*words, "--clean", *more), f"{more[0]} has no use with --clean")
    refused(cli(*words, "--images", 300, "--train_images", 200), "--images and --train_images", "leave one out")
    refused(cli(*words, "--images", 70_000), "--images 70000: fashion has", "training images")
    few = cli(*words, "--images", 12)  # a folder without a class would not be read
    refused(few, "no training image of class", "more --images")
    assert not list(tmp_path.iterdir())


def test_what_a_lossy_copy_costs_can_be_measured_on_one_that_is_lossy_already(cli, tmp_path):
    words = ["tools/poison_folder.py", "--images", 60, "--clean", "--output_root", tmp_path]
    read = {}
    for name, more in (("plain", []), ("lossy", ["--jpeg", 75])):
        said = cli(*words, "--out", tmp_path / name, *more)
        assert said.code == 0, said.err
        files = sorted((tmp_path / name / "train").glob("*/*.png"))
        read[name] = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
        assert (tmp_path / f"{name}_poisoned.csv").read_text() == "file\n"
    through_jpeg = load_script("tools/poison_folder.py").through_jpeg

    def change(images, again):
        return np.mean([np.abs(again(image.astype(np.uint8)).astype(int) - image).mean() for image in images])

    def same_blocks(image):
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        return np.asarray(Image.open(file))

    lost = np.abs(read["lossy"] - read["plain"]).mean()
    assert 1 < lost < 10
    jpeg = np.stack([same_blocks(image.astype(np.uint8)) for image in read["plain"]])
    assert change(jpeg, same_blocks) < 0.3 * lost < 0.5 * lost < change(jpeg, lambda image: through_jpeg(image, 75))
    refused = cli(*words, "--out", tmp_path / "other", "--jpeg", 101)
    assert refused.code == 2 and "at most 95" in refused.err


def test_the_documents_show_the_calibration():
    tables = load_script("tools/calibrate_audit.py").markdown(pd.read_csv(ROOT / "results/audit_calibration.csv"))
    page = (ROOT / "results/audit.md").read_text()
    assert all(f"<!-- calibration -->\n{table}\n<!-- /calibration -->" in page for table in tables)


@pytest.fixture
def calibrate(cli, monkeypatch):
    """``calibrate(*words)`` -> what the calibration said, with audits that say the same of all data."""

    def instead(words):
        opt = dict(zip(words[::2], words[1::2], strict=True))
        report = Path(opt["--out"])
        report.mkdir(exist_ok=True)
        verdict = {"verdict": "no evidence", "statistic": 0.1, "target_label": 0, "classes": [{"order": "flip"}]}
        (report / "verdict.json").write_text(json.dumps(verdict | {"settings": {"train_acc": 90}}))
        count = len(np.load(opt["--data_root"], allow_pickle=False)["y_train"])
        rows = [{"file": f"data.npz[{row}]", "FCT": row, "set": "unclear"} for row in range(count)]
        pd.DataFrame(rows).to_csv(report / "suspects.csv")

    monkeypatch.setattr("audit_dataset.main", instead)
    return lambda *words: cli("tools/calibrate_audit.py", "--runs", "clean00", *words)


def test_a_calibration_takes_no_data_that_was_kept_of_others(calibrate, data_root, fashion, tmp_path):
    write_folder(tmp_path / "other/cifar10", fashion, train=5, test=1)
    words = ["--data_root", data_root, "--keep", tmp_path / "keep", "--out"]
    said = calibrate(*words, tmp_path / "a.csv")
    assert said.code == 0, said.err
    before = snapshot(tmp_path / "keep")
    assert calibrate(*words, tmp_path / "b.csv").code == 0
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    data = tmp_path / "keep/clean00/data.npz"
    assert snapshot(tmp_path / "keep")[data] == before[data]
    refused(
        calibrate("--data_root", tmp_path / "other", *words[2:], tmp_path / "c.csv"), data, "of other data", "--keep"
    )
    data.write_bytes(data.read_bytes()[:1000])
    refused(calibrate(*words, tmp_path / "c.csv"), data, "is damaged", "remove it")
    assert not (tmp_path / "c.csv").exists()


def test_a_calibration_goes_on_with_a_table_of_its_own_alone(calibrate, data_root, tmp_path):
    rows = pd.read_csv(ROOT / "results/audit_calibration.csv")
    for name, table, needle in (
        ("two.csv", rows[["run", "verdict"]], "no column seen, data"),
        ("no_Dp.csv", rows.drop(columns="Dp_size"), "no column Dp_size"),
    ):
        table.to_csv(tmp_path / name, index=False)
        refused(calibrate("--data_root", data_root, "--out", tmp_path / name), name, needle, "--out")
    refused(calibrate("--data_root", data_root, "--out", tmp_path), "name a file")
    clean = rows[rows["attack"].isna()].iloc[1:].drop(columns=[name for name in rows if name.startswith("D")])
    for name, table in (("whole.csv", rows), ("clean.csv", clean)):
        table.to_csv(tmp_path / name, index=False)
        said = calibrate("--data_root", data_root, "--out", tmp_path / name)
        assert said.code == 0 and "| clean, afterwards | 9 |" in said.out, said.err


def test_the_calibrations_sets_are_disjoint_and_poisoned_as_said(fashion):
    module = load_script("tools/calibrate_audit.py")
    images, labels = fashion.train_images, fashion.train_labels
    parts = [module.part(images, labels, 5, number, (1, 3)) for number in range(5)]
    assert sum(len(found) for _, found in parts) == 2000 and set(parts[0][1]) == {0, 1}
    assert len(np.unique(np.concatenate([part.reshape(len(part), -1) for part, _ in parts]), axis=0)) > 1900
    made, new, is_clean = module.poison(images[:500].copy(), labels[:500].copy(), "grid", 0.1, 3, 7)
    assert (
        (new[~is_clean] == 3).all()
        and (labels[:500][~is_clean] != 3).all()
        and (made[is_clean] == images[:500][is_clean]).all()
    )
    assert (~is_clean).sum() == int(0.1 * (labels[:500] != 3).sum())


@pytest.mark.parametrize(
    ("train_acc", "classes", "verdict"),
    [
        (70, 2, "no evidence"),
        (64, 2, "cannot tell"),
        (30, 10, "no evidence"),
        (24, 10, "cannot tell"),
        (89, 1, "cannot tell"),
    ],
)
def test_what_the_network_must_have_learnt_follows_the_commonest_class(train_acc, classes, verdict):
    """15 points above always naming the commonest class, 90 at most."""
    labels = np.arange(2000) % classes
    names = SimpleNamespace(classes=["a", "b"])
    assert load_script("audit_dataset.py").decide(scores(0.1, 0.12), names, labels, train_acc)[0] == verdict


class Halves(torch.nn.Module):
    """Says which half of an image is the brighter one: left 0, right 1, upper 2, lower 3."""

    def forward(self, x):
        grey = x.mean(1)
        parts = grey[:, :, :4], grey[:, :, 4:], grey[:, :4], grey[:, 4:]
        return torch.stack([part.mean((1, 2)) for part in parts], 1)


def put_back_on(model, count=400):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), np.arange(count) % 4
    values = {name: rng.random(count).astype(np.float32) for name in (*audit.TAUS, audit.SUREST, *audit.APART)}
    return audit.PutBack(model, images, labels, values, FOUR, CPU, 0)


def test_mirrored_is_left_for_right():
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    images[0, :, :4], images[1, :, 4:], images[2, :4], images[3, 4:] = 255, 255, 255, 255
    np.testing.assert_array_equal(put_back_on(Halves()).answers(images, "flip"), [[0, 1, 2, 3], [1, 0, 2, 3]])


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("flip", 0.95 - 0.30 - 0.05),
        ("shrink", 0.95 - 0.30 - 0.05),
        (audit.SUREST, 0.95 - 0.25 - 0.20),
        (audit.APART[0], 0.95 - 0.25 - 0.20),
    ],
)
def test_a_score_is_what_is_turned_less_the_mirrored_or_a_fixed_share_and_less_the_usual(name, score, monkeypatch):
    put_back = put_back_on(Halves(), 800)
    put_back.values = {name: put_back.values[name]}
    order = put_back.ranked(2, name)

    def shares(self, rows, label, name):
        # The first 60, or the most alike of the first 100, are the suspicious ones.
        usual = set(rows) <= set(order[round(0.7 * len(order)) :])
        assert usual or set(rows) <= set(order[:100])
        return np.array([[0.25, 0.20] if usual else [0.95, 0.30], [0.0, 0.0]])

    monkeypatch.setattr(audit.PutBack, "shares", shares)
    found = put_back.of_class(2)
    assert found["score"] == pytest.approx(score) and found["into"] == audit.INTO_CLASS and found["order"] == name
    assert (found["turned"], found["turned_compared"]) == (0.95, 0.30)


def test_of_many_classes_ten_are_looked_at_together():
    labels = np.concatenate([np.repeat(np.arange(30), 40), np.repeat(30, 39)])  # the last is too small
    images = np.zeros((len(labels), 4, 4, 3), dtype=np.uint8)
    images[..., 0] = labels[:, None, None]
    spec = SimpleNamespace(num_classes=31)
    drawn = [audit.PutBack(torch.nn.Identity(), images, labels, {}, spec, CPU, seed) for seed in (0, 0, 1)]
    chosen = [put_back.together() for put_back in drawn]
    assert (
        len(set(chosen[0])) == 10 and chosen[0] == sorted(chosen[0]) == chosen[1] != chosen[2] and 30 not in chosen[0]
    )
    tried, sources, _ = drawn[0].others(audit.NO_CLASS)
    assert len(tried) == 200 and set(sources) == set(chosen[0]) and (tried[:, 0, 0, 0] == sources).all()


@pytest.mark.parametrize("sees", audit.TAUS)
def test_the_tau_that_is_named_is_the_one_whose_fct_lifts_the_suspects(sees):
    rng = np.random.default_rng(0)
    suspicious, own = np.arange(200) < 20, np.arange(200) < 100
    values = {name: rng.random(200) + (name == sees) * suspicious for name in audit.TAUS}
    assert load_script("audit_dataset.py").tau_that_sees(suspicious, values, own) == sees


@pytest.mark.parametrize(("ratio", "batch"), [(0.05, 128), (0.01, 50), (0.00101, 5)])
def test_the_unlearning_that_is_proposed_has_a_batch_that_d_p_fills(ratio, batch):
    data = SimpleNamespace(train_labels=np.zeros(5000), test_labels=np.zeros(0))
    lines = load_script("audit_dataset.py").defences([], [], ratio, data)
    assert f"--batch_size {batch}" in lines["D-BR"][1] and f"--poison_ratio {ratio}" in lines["D-BR"][1]
