"""Every trigger and target type through the command line; CIFAR-100 through every step; the gallery."""

import math
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, load_script
from PIL import Image
from test_bad_input import refused

from utils import fct
from utils.files import sha256
from utils.triggers import TRIGGERS

TYPE = {"squareTrigger": "all2all", "sigTrigger": "cleanLabel"}


@pytest.mark.parametrize("trigger", [name for name in TRIGGERS if name != "fourCornerTrigger"])  # CL: test_clean_label
def test_sd_runs_with_every_trigger(cli, words, tmp_path, trigger):
    attack = [*words(tmp_path), "--trigger_type", trigger, "--target_type", TYPE.get(trigger, "all2one")]
    attack += ["--poison_rate", 0.5]
    folder = tmp_path / "saved/backdoored_model/poison_rate_0.5/noTrans/cifar10/resnet10" / trigger
    assert cli("train_attack_noTrans.py", *attack, "--epochs", 1, "--batch_size", 64).code == 0
    result = cli("separate_samples.py", *attack, "--checkpoint_load", folder / "0.tar")
    assert result.code == 0, result.err
    with Image.open(folder / "samples.png") as picture:
        assert picture.width > 500
    row = pd.read_csv(folder / "log.csv").iloc[-1]
    assert 0 <= row.ASR <= 100 and 0 <= row.ACC <= 100


def test_tau_auto_goes_through_the_steps_and_refuses_a_second_part(cli, words, tmp_path, pipeline, data_root):
    checkpoint = pipeline / "saved/backdoored_model/poison_rate_0.1/noTrans/cifar10/resnet10/gridTrigger/1.tar"
    mine = tmp_path / "1.tar"
    mine.write_bytes(checkpoint.read_bytes())
    auto = [*words(tmp_path), "--trans1", "auto", "--checkpoint_load", mine]
    for name in ("calculate_consistency.py", "visualize_consistency.py", "separate_samples.py"):
        result = cli(name, *auto)
        assert result.code == 0, result.err
    assert "computing them" not in result.out  # step 5 took the values that step 3 saved
    values = np.loadtxt(tmp_path / "1_all.txt")
    assert (values > 0).all() and abs(np.median(np.log(values))) < 3  # deviations from the middle, not raw FCT
    result = cli("calculate_consistency.py", *auto, "--trans2", "blur")
    assert result.code == 2 and "--trans2 blur has no use" in result.err


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
    """100 classes of noise around a colour of their own."""
    root, rng = tmp_path_factory.mktemp("cifar100"), np.random.default_rng(0)
    colours = rng.integers(20, 236, (100, 1, 1, 3))
    for split, count in (("train", 4), ("test", 1)):
        for label in range(100):
            folder = root / "cifar100" / split / f"{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = np.clip(colours[label] + rng.integers(-20, 20, (32, 32, 3)), 0, 255)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def test_cifar100_goes_through_sd_st_and_br(cli, cifar100, tmp_path):
    common = ["--dataset", "cifar100", "--model", "resnet10", "--data_root", cifar100, "--output_root", tmp_path]
    common += ["--trigger_type", "trojanTrigger", "--poison_rate", 0.2]
    ratios = ["--clean_ratio", 0.2, "--poison_ratio", 0.05]
    for name, *more in (
        ("train_attack_noTrans.py", "--epochs", 1, "--batch_size", 64),
        ("finetune_attack_noTrans.py", "--epochs", 1, "--batch_size", 64),
        ("separate_samples.py", *ratios, "--clean_per_class", "--clean_ratio", 0.25),
        ("separate_samples.py", *ratios),
        ("train_attack_withTrans.py", "--epochs", 1, "--batch_size", 64),
        ("unlearn_relearn.py", *ratios, "--epochs", 1, "--batch_size", 16),
        ("ST/train_extractor.py", *ratios, "--epochs", 1, "--batch_size", 64),
        ("ST/train_classifier.py", *ratios, "--epochs", 1, "--batch_size", 32),
        ("ST/test.py", *ratios),
    ):
        result = cli(name, *common, *more)
        assert result.code == 0, (name, result.err)
    assert "ASR" in result.out
    samples = np.load(tmp_path / "saved/separated_samples/cifar100/resnet10/trojanTrigger_0.2_0.05/clean_samples.npy")
    assert len(samples) == 80 and samples["label"].max() > 50


def test_the_gallery_shows_every_trigger(cli, tmp_path):
    result = cli("tools/visualize_triggers.py", "--data_root", ROOT / "dataset", "--out", tmp_path / "new/gallery.png")
    assert result.code == 0, result.err
    with Image.open(tmp_path / "new/gallery.png") as picture:
        assert picture.width > 100 * len(TRIGGERS)


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        (["--index", 123456789], "training images 0 to 9999"),
        (["--data_root", "/nope"], "leave out --data_root"),
        (["--out", "mine.png"], "mine.png is there already; give --overwrite"),
        (["--out", "."], "name a file"),
    ],
)
def test_the_gallery_is_of_the_image_that_was_named_and_replaces_none(more, needle, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_bytes(b"mine")
    refused(cli("tools/visualize_triggers.py", "--out", "new/gallery.png", *more), needle)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"] and (
        tmp_path / "mine.png"
    ).read_bytes() == b"mine"


def test_a_pipe_that_closes_early_leaves_no_traceback(tmp_path):
    command = shlex.join([sys.executable, "reproduce.py", "--dry_run", "--output_root", str(tmp_path)]) + " | head -1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("python train_attack_noTrans.py ") and "Traceback" not in result.stderr


def test_every_row_of_the_papers_tables_has_its_commands(cli, tmp_path):
    rows = {
        "BadNets-all2one": "gridTrigger",
        "BadNets-all2all": "squareTrigger --target_type all2all",
        "Trojan": "trojanTrigger",
        "Blend-Strip": "signalTrigger",
        "Blend-Kitty": "kittyTrigger",
        "SIG": "sigTrigger --target_type cleanLabel",
        "CL": "fourCornerTrigger --target_type cleanLabel",
        "SSBA": "SSBA",
    }
    for row, attack in rows.items():
        said = cli("reproduce.py", "--dry_run", "--row", row, "--output_root", tmp_path).out
        assert f"train_attack_withTrans.py --dataset cifar10 --model resnet18 --trigger_type {attack}" in said
        benign = "train_clean_withTrans.py --dataset cifar10 --model resnet18 --output_root"
        assert (benign in said) == (row == "CL")
    imagenet = {"BadNets-all2one": "squareTrigger_imagenet", "Blend-Strip": "signalTrigger_imagenet",
                "Blend-Kitty": "kittyTrigger", "SSBA": "SSBA"}  # fmt: skip
    for row, trigger in imagenet.items():
        words = ["--dry_run", "--row", row, "--output_root", tmp_path, "--dataset", "imagenet"]
        said = cli("reproduce.py", *words, "--defences", "D-BR").out
        command = f"train_attack_withTrans_imagenet.py --dataset imagenet --model resnet18 --trigger_type {trigger}"
        assert command in said and "ST/" not in said
        assert cli("reproduce.py", *words).code == 2
    assert cli("reproduce.py", "--dry_run", "--row", "Trojan", "--dataset", "imagenet").code == 2


def test_taus_are_compared_on_one_checkpoint(cli, words, tmp_path, pipeline, monkeypatch):
    found_fct = []

    def kept(*args, plain=fct.compute_fct, **options):
        found_fct.append(plain(*args, **options))
        return found_fct[-1]

    monkeypatch.setattr(fct, "compute_fct", kept)
    checkpoint = pipeline / "saved/backdoored_model/poison_rate_0.1/noTrans/cifar10/resnet10/gridTrigger/1.tar"
    whole = cli("tools/compare_taus.py", *words(tmp_path), "--checkpoint_load", checkpoint, "--out", tmp_path / "taus")
    assert whole.code == 0, whole.err
    of_all = [values for values, _ in found_fct]
    (path,) = (tmp_path / "taus").glob("*.csv")
    assert path.name == "cifar10_resnet10_gridTrigger_all2one_0.1_train_attack_noTrans_1.csv"
    table = pd.read_csv(path)
    assert table.tau.tolist() == [
        "rotate + affine",
        "rotate",
        "affine",
        "flip",
        "crop",
        "blur",
        "erase",
        "shrink",
        "auto",
    ]
    assert table.AUROC.between(0, 1).all() and table.Dp_precision.between(0, 100).all()
    for name, *tau in (("rotate + affine",), ("auto", "--trans1", "auto")):  # what the steps themselves find
        said = cli("separate_samples.py", *words(tmp_path / name), "--checkpoint_load", checkpoint, *tau)
        assert said.code == 0, said.err
        found = next((tmp_path / name).rglob("detection.json"))
        expected = pd.read_json(found, typ="series")
        row = table.set_index("tau").loc[name]
        assert abs(row.AUROC - expected.AUROC) < 1e-4
        assert abs(row.Dp_precision - expected.Dp_precision) < 1e-3
    found_fct.clear()
    part = cli("tools/compare_taus.py", *words(tmp_path), "--checkpoint_load", checkpoint, "--every", 2,
               "--out", tmp_path / "taus")  # fmt: skip
    assert part.code == 0 and "200 samples" in part.out
    for (values, _), all_values in zip(found_fct, of_all, strict=True):  # each sample has the tau of the whole set
        np.testing.assert_allclose(values, all_values[::2], rtol=1e-4, atol=1e-9)
    ratios = cli("tools/compare_taus.py", *words(tmp_path), "--checkpoint_load", checkpoint, "--auto",
                 "--poison_ratios", 0.02, 0.1, "--out", tmp_path / "taus")  # fmt: skip
    assert ratios.code == 0, ratios.err
    names = ["", "_every_2", "_poison_ratios_0.02_0.1_auto"]  # none has replaced another
    assert {file.name for file in path.parent.glob("*.csv")} == {f"{path.stem}{more}.csv" for more in names}
    table = pd.read_csv(path.with_stem(path.stem + names[-1])).set_index(["tau", "ratios"])
    assert len(table) == 3 * 9
    of_flip = table.loc["flip"]
    assert of_flip.loc["0.2 0.02", "Dp_size"] == 8 and of_flip.loc["0.2 0.1", "Dp_size"] == 40
    said = cli("separate_samples.py", *words(tmp_path / "tenth"), "--checkpoint_load", checkpoint, "--poison_ratio", 0.1,
               "--trans1", "flip", "--trans2", "none")  # fmt: skip
    assert said.code == 0, said.err
    expected = pd.read_json(next((tmp_path / "tenth").rglob("detection.json")), typ="series")
    assert abs(of_flip.loc["0.2 0.1", "Dp_recall"] - expected.Dp_recall) < 1e-3

    before = path.read_bytes()
    both = ["--poison_ratio", 0.1, "--poison_ratios", 0.02]
    refused(cli("tools/compare_taus.py", *words(tmp_path), "--checkpoint_load", checkpoint, *both), "give one of them")
    record = path.with_suffix(".json")
    record.write_text(record.read_text().replace(sha256(checkpoint), "0" * 64))  # as of another network's table
    again = ["--checkpoint_load", checkpoint, "--out", tmp_path / "taus"]
    refused(cli("tools/compare_taus.py", *words(tmp_path), *again), "is of another checkpoint", "--overwrite")
    assert path.read_bytes() == before

    by_label = cli("tools/compare_taus.py", *words(tmp_path), "--checkpoint_load", checkpoint, "--per_class",
                   "--out", tmp_path / "by_label")  # fmt: skip
    assert by_label.code == 0, by_label.err
    of_flip = pd.read_csv(next((tmp_path / "by_label").glob("*.csv"))).set_index(["tau", "ratios"]).loc["flip"]
    for name, options in (("per class", ["--clean_per_class"]), ("even", ["--clean_per_class", "--clean_even"])):
        said = cli("separate_samples.py", *words(tmp_path / name), "--checkpoint_load", checkpoint, *options,
                   "--trans1", "flip", "--trans2", "none")  # fmt: skip
        assert said.code == 0, said.err
        expected = pd.read_json(next((tmp_path / name).rglob("detection.json")), typ="series")
        assert of_flip.loc[f"0.2 0.05 {name}", "Dc_size"] == expected.Dc_size
        assert abs(of_flip.loc[f"0.2 0.05 {name}", "Dc_contamination"] - expected.Dc_contamination) < 1e-3


def test_fct_within_labels_is_measured_from_each_labels_median(cli, words, tmp_path, pipeline):
    within = load_script("tools/compare_taus.py").within_labels
    rng = np.random.default_rng(0)
    labels, fct = rng.integers(0, 3, 60), rng.random(60).astype(np.float32) + 0.1
    found = within(fct * 10.0 ** labels.astype(np.float32), labels)
    for label in range(3):
        logs = np.log(fct[labels == label].astype(np.float64)) + label * math.log(10)
        centre = np.median(logs)
        expected = np.exp((logs - centre) / np.median(np.abs(logs - centre)))
        np.testing.assert_allclose(found[labels == label], expected, rtol=1e-4)

    checkpoint = pipeline / "saved/backdoored_model/poison_rate_0.1/noTrans/cifar10/resnet10/gridTrigger/1.tar"
    said = cli(
        "tools/compare_taus.py", *words(tmp_path), "--checkpoint_load", checkpoint, "--within_labels", "--out", tmp_path
    )
    assert said.code == 0, said.err
    table = pd.read_csv(next(tmp_path.glob("*.csv"))).set_index("tau")
    assert len(table) == 18 and table.loc["flip, within labels", "AUROC"] != table.loc["flip", "AUROC"]
