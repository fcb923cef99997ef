"""The numbered steps through their command lines, on disk: what they write, where, and what it depends on."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script, run_all, run_cli

from utils import fct, figures, poisoning
from utils.device import choose_runtime
from utils.files import read_json, sha256

NO_TRANS = "saved/backdoored_model/poison_rate_0.1/noTrans/cifar10/resnet10/gridTrigger"
TUNED = "saved/backdoored_model/poison_rate_0.1/noTrans_ftsimi/cifar10/resnet10/gridTrigger"
WITH_TRANS = "saved/backdoored_model/poison_rate_0.1/withTrans/cifar10/resnet10/gridTrigger"
SAMPLES = "saved/separated_samples/cifar10/resnet10/gridTrigger_0.2_0.05"
SECURE = "ST/save/poison_rate_0.1/SupCon_models/cifar10/resnet10/gridTrigger_0.2_0.05"
EXTRACTOR = f"{SECURE}/SupCon_cifar10_resnet10_lr_0.5_decay_0.0001_bsz_64_temp_0.1_trial_0_cosine"
CLASSIFIER = f"{SECURE}/Linear_cifar10_resnet10_lr_0.5_decay_0_bsz_32"


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_step_writes_where_the_users_document_says(pipeline):
    for name in (
        *(
            f"{folder}/{file}"
            for folder in (NO_TRANS, TUNED, WITH_TRANS)
            for file in ("0.tar", "1.tar", "log.csv", "options.json")
        ),
        *(f"{TUNED}/1{end}" for end in ("_all.txt", "_clean.txt", "_poison.txt", "_fct.csv", ".jpg")),
        *(f"{SAMPLES}/{kind}_samples.npy" for kind in ("clean", "poison", "suspicious")),
        f"{WITH_TRANS}/1_unlearn_purify.tar",
        f"{WITH_TRANS}/unlearn_purify.csv",
        *(f"{EXTRACTOR}/{file}" for file in ("last.pth", "ckpt_epoch_1.pth", "log.csv", "options.json")),
        *(f"{CLASSIFIER}/{file}" for file in ("ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "log.csv", "options.json")),
    ):
        assert (pipeline / name).is_file(), name
    assert not list(pipeline.rglob("*.tmp"))


def test_checkpoints_say_what_they_were_made_with(pipeline):
    checkpoint = torch.load(pipeline / NO_TRANS / "1.tar", weights_only=True)
    assert (checkpoint["step"], checkpoint["epoch"]) == ("train_attack_noTrans", 1)
    assert checkpoint["optimizer"]["state"] and checkpoint["schedule"]["T_max"] == 100
    expected = {"dataset": "cifar10", "model": "resnet10", "trigger_type": "gridTrigger", "poison_rate": 0.1, "seed": 0}
    assert expected.items() <= checkpoint["options"].items()
    assert len(checkpoint["poisoned_digest"]) == 64
    options = json.loads((pipeline / NO_TRANS / "options.json").read_text())
    assert options["options"]["lr"] == 0.01 and options["versions"]["torch"] == torch.__version__


def test_logs_have_a_row_an_epoch(pipeline):
    for folder in (NO_TRANS, TUNED, WITH_TRANS):
        log = pd.read_csv(pipeline / folder / "log.csv")
        assert log["epoch"].tolist() == [0, 1]
        assert {"loss", "train_acc", "ACC", "ACC_paper", "ASR", "R_ACC", "seconds"} <= set(log)
    log = pd.read_csv(pipeline / WITH_TRANS / "unlearn_purify.csv")
    assert log["epoch"].tolist() == [-1, 0, 1]
    before = pd.read_csv(pipeline / WITH_TRANS / "log.csv").iloc[-1]
    assert log.loc[0, ["ACC", "ASR"]].tolist() == before[["ACC", "ASR"]].tolist()
    assert {"loss_Dp", "loss_Dc", "loss_Dp_after", "seconds"} <= set(log)
    assert log.loc[1:, ["train_acc_Dp", "train_acc_Dc"]].stack().between(0, 100).sum() == 4


def test_fine_tuning_goes_on_with_model_optimizer_and_schedule_of_step_1(pipeline):
    tuned = torch.load(pipeline / TUNED / "0.tar", weights_only=True)
    assert tuned["schedule"]["last_epoch"] == 3  # two epochs of step 1 and one of its own
    assert not same_weights(pipeline / TUNED / "0.tar", pipeline / NO_TRANS / "1.tar")


def test_fct_is_saved_in_sample_order(pipeline):
    table = pd.read_csv(pipeline / TUNED / "1_fct.csv", dtype={"FCT": str})
    values = np.loadtxt(pipeline / TUNED / "1_all.txt")
    assert table["index"].tolist() == list(range(400)) and (table["FCT"].astype(float) == values).all()
    parts = [np.loadtxt(pipeline / TUNED / f"1_{kind}.txt") for kind in ("clean", "poison")]
    assert [len(part) for part in parts] == [364, 36]
    assert sorted(np.concatenate(parts)) == sorted(values)


def test_gamma_prints_values_that_separate_samples_takes(copy, words, cli):
    said = cli("calculate_gamma.py", *words(copy)).out
    gammas = {line.split()[0]: line.split()[1] for line in said.splitlines() if line.startswith("gamma_")}
    values = np.sort(np.loadtxt(copy / TUNED / "1_all.txt"))
    assert (float(gammas["gamma_low"]), float(gammas["gamma_high"])) == (values[79], values[380])
    before = {name: (copy / SAMPLES / name).read_bytes() for name in ("clean_samples.npy", "poison_samples.npy")}
    given = ["--gamma_low", gammas["gamma_low"], "--gamma_high", gammas["gamma_high"], "--batch_size", 1]
    assert cli("separate_samples.py", *words(copy), *given).code == 0
    assert before == {name: (copy / SAMPLES / name).read_bytes() for name in before}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_command_that_step_4_prints_separates_by_its_values(precision, pipeline, words, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    root = tmp_path / "my runs"
    shutil.copytree(pipeline, root, copy_function=os.link)
    more = ["--trans1", "flip", "--trans2", "none", "--precision", precision, "--overwrite"]
    assert cli("calculate_consistency.py", *words(root), *more).code == 0
    place = root / TUNED
    said = cli("calculate_gamma.py", "--clean_ratio", 0.3, "--poison_ratio", 0.05, "--checkpoint_load", place / "1.tar")
    (command,) = [line for line in said.out.splitlines() if line.startswith("Next: ")]
    program, script, *options = shlex.split(command.removeprefix("Next: "))
    assert (program, script) == ("python", "separate_samples.py")
    done = cli(script, *options)
    assert done.code == 0 and "computing them" not in done.out, done.err
    kept = json.loads((place / "1_gamma.json").read_text())["options"]  # what the values are of, and the ratios
    assert (kept["model"], kept["output_root"], kept["clean_ratio"]) == ("resnet10", str(root), 0.3)


def test_separated_samples_are_plain_arrays_that_together_are_the_training_set(pipeline):
    sets = {kind: np.load(pipeline / SAMPLES / f"{kind}_samples.npy", mmap_mode="r", allow_pickle=False)
            for kind in ("clean", "suspicious", "poison")}  # fmt: skip
    assert [len(part) for part in sets.values()] == [80, 300, 20]
    assert sets["clean"].dtype.names == ("image", "label", "flag", "index")
    assert sorted(np.concatenate([part["index"] for part in sets.values()])) == list(range(400))
    assert [set(part["flag"]) for part in sets.values()] == [{0}, {1}, {2}]
    values = np.loadtxt(pipeline / TUNED / "1_all.txt")
    assert values[sets["clean"]["index"]].max() <= values[sets["suspicious"]["index"]].min()
    assert values[sets["poison"]["index"]].min() >= values[sets["suspicious"]["index"]].max()


def test_separation_reuses_saved_values_and_recomputes_the_same(copy, words, cli):
    before = (copy / SAMPLES / "clean_samples.npy").read_bytes()
    assert "computing" not in cli("separate_samples.py", *words(copy)).out
    record = copy / TUNED / "1_fct.json"
    saved = record.read_text()
    record.unlink()
    assert "computing" in cli("separate_samples.py", *words(copy), "--batch_size", 64).out
    record.write_text(saved)
    assert (copy / SAMPLES / "clean_samples.npy").read_bytes() == before
    other_tau = ["--trans1", "flip", "--trans2", "none", "--overwrite"]
    assert "computing" in cli("separate_samples.py", *words(copy), *other_tau).out
    assert (copy / SAMPLES / "clean_samples.npy").read_bytes() != before
    assert cli("separate_samples.py", *words(copy)).code == 2  # the work of another setting
    assert cli("separate_samples.py", *words(copy), "--overwrite").code == 0


def test_step_5_takes_no_values_of_other_data_and_says_how_its_files_are_made_anew(cli, words, copy):
    common, tau = words(copy), ["--trans1", "flip", "--trans2", "none"]
    record = next((copy / "saved/backdoored_model").rglob("noTrans_ftsimi/**/1_fct.json"))
    content = json.loads(record.read_text())
    content["data"]["train"]["sha256"] = "0" * 64
    record.unlink()
    record.write_text(json.dumps(content))
    said = cli("separate_samples.py", *common, *tau, "--clean_per_class", "--overwrite")
    assert said.code == 0 and "computing them" in said.out
    poison = copy / SAMPLES / "poison_samples.npy"
    whole = bytearray(poison.read_bytes())
    whole[-1] ^= 1
    poison.unlink()
    poison.write_bytes(whole)
    said = cli("unlearn_relearn.py", *common, "--batch_size", 8, "--overwrite")
    assert said.code == 2 and "--trans1 flip --trans2 none --clean_per_class --overwrite" in said.err


def test_the_test_step_agrees_with_the_classifiers_log(pipeline):
    result = json.loads((pipeline / CLASSIFIER / "ckpt_epoch_1_test.json").read_text())
    last = pd.read_csv(pipeline / CLASSIFIER / "log.csv").iloc[-1]
    assert [result[name] for name in ("ACC", "ASR", "R_ACC")] == pytest.approx(last[["ACC", "ASR", "R_ACC"]].tolist())


NOT_IN_THE_PAPER = {  # options whose choice of samples, or of an epoch, a ground truth would help
    "train_attack_withTrans.py": ["--val_ratio", 0.2],
    "calculate_consistency.py": ["--trans1", "auto"],
    "calculate_gamma.py": ["--auto"],
    "separate_samples.py": ["--trans1", "auto", "--clean_per_class", "--clean_even", "--poison_alike"],
    "unlearn_relearn.py": [
        "--lr",
        0.001,
        "--ascent_bound",
        3,
        "--bound_growth",
        2,
        "--drop_doubtful",
        "--stay_dropped",
        "--val_ratio",
        0.2,
    ],
    "ST/train_extractor.py": ["--positives", "unsuspected"],
    "ST/train_classifier.py": ["--ascent_bound", 3, "--val_ratio", 0.2],
}


@pytest.mark.parametrize("further", [{}, NOT_IN_THE_PAPER], ids=["paper", "not_in_the_paper"])
def test_no_defence_step_reads_the_ground_truth(pipeline, words, tmp_path, monkeypatch, further):
    if further:
        pipeline, tmp_path = tmp_path / "honest", tmp_path / "scrambled"
        assert run_all(words(pipeline), further=further) == [0] * 11
    honest = poisoning.poison_training_set
    rng = np.random.default_rng(1)

    def scrambled(dataset, opt):
        poisoned = honest(dataset, opt)
        swap = {"true_labels": rng.permutation(poisoned.true_labels), "is_clean": rng.permutation(poisoned.is_clean)}
        assert dataset.record  # of the data as it is
        dataset.train_labels[:] = rng.permutation(dataset.train_labels)
        return poisoning.PoisonedSet(**{**vars(poisoned), **swap})

    monkeypatch.setattr(poisoning, "poison_training_set", scrambled)
    assert run_all(words(tmp_path), further=further) == [0] * 11
    quality = [json.loads((root / SAMPLES / "detection.json").read_text()) for root in (pipeline, tmp_path)]
    assert quality[0] != quality[1]  # the scrambling reached the steps
    compared = 0
    for path in pipeline.rglob("*"):
        other = tmp_path / path.relative_to(pipeline)
        if path.suffix in (".tar", ".pth"):
            assert same_weights(path, other), path
            compared += 1
        elif path.name.endswith(("_all.txt", "_fct.csv", "_order.npy", "samples.npy")):
            assert path.read_bytes() == other.read_bytes(), path
            compared += 1
        elif path.suffix == ".csv":
            logs = [pd.read_csv(one).filter(regex="^val_") for one in (path, other)]
            pd.testing.assert_frame_equal(*logs)
    assert compared >= 15


@pytest.mark.parametrize(
    ("name", "layer", "batches"),
    [
        (f"{NO_TRANS}/1.tar", "bn1", 14), (f"{TUNED}/1.tar", "bn1", 28), (f"{WITH_TRANS}/1.tar", "bn1", 14),
        (f"{WITH_TRANS}/1_unlearn_purify.tar", "bn1", 28), (f"{EXTRACTOR}/last.pth", "encoder.bn1", 14),
    ],
)  # fmt: skip
def test_networks_train_by_the_statistics_of_their_batches(pipeline, name, layer, batches):
    state = torch.load(pipeline / name, weights_only=True)["model"]
    assert state[f"{layer}.num_batches_tracked"] == batches


RESUMED = [
    ("train_attack_noTrans.py", NO_TRANS, "0.tar", "1.tar", ["--epochs", 2, "--batch_size", 64]),
    ("finetune_attack_noTrans.py", TUNED, "0.tar", "1.tar", ["--epochs", 2, "--batch_size", 64]),
    ("train_attack_withTrans.py", WITH_TRANS, "0.tar", "1.tar", ["--epochs", 2, "--schedule", 1, "--batch_size", 64]),
    ("ST/train_extractor.py", EXTRACTOR, "ckpt_epoch_0.pth", "last.pth", ["--epochs", 2, "--batch_size", 64, "--cosine"]),
    ("ST/train_classifier.py", CLASSIFIER, "ckpt_epoch_0.pth", "ckpt_epoch_1.pth",
     ["--epochs", 2, "--batch_size", 32, "--learning_rate", 0.5]),
]  # fmt: skip


@pytest.mark.parametrize(
    "script, folder, first, last, more", RESUMED, ids=lambda value: value if str(value).endswith(".py") else ""
)
def test_a_resumed_run_ends_in_the_same_bits(pipeline, words, tmp_path, script, folder, first, last, more):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(pipeline, root)
    (root / folder / last).unlink()
    assert run_cli(script, *words(root), *more, "--checkpoint_load", root / folder / first) == 0
    assert same_weights(root / folder / last, pipeline / folder / last)
    resumed, whole = (torch.load(base / folder / last, weights_only=True) for base in (root, pipeline))
    for key, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], resumed["optimizer"]["state"][key]["momentum_buffer"])
    columns = [name for name in pd.read_csv(pipeline / folder / "log.csv") if name != "seconds"]
    logs = [pd.read_csv(base / folder / "log.csv")[columns] for base in (root, pipeline)]
    pd.testing.assert_frame_equal(*logs)


def test_unlearning_and_clean_training_resume_in_the_same_bits(pipeline, words, tmp_path):
    start = pipeline / WITH_TRANS / "1.tar"
    common = [*words(pipeline), "--batch_size", 16]
    for name, epochs in (("whole", 2), ("parts", 1)):
        more = ["--checkpoint_save", tmp_path / f"{name}.tar", "--log", tmp_path / f"{name}.csv", "--epochs", epochs]
        assert run_cli("unlearn_relearn.py", *common, "--checkpoint_load", start, *more) == 0
    again = ["--checkpoint_load", tmp_path / "parts.tar", "--log", tmp_path / "parts.csv", "--epochs", 2]
    assert run_cli("unlearn_relearn.py", *common, *again) == 0
    assert same_weights(tmp_path / "whole.tar", tmp_path / "parts.tar")
    assert pd.read_csv(tmp_path / "parts.csv")["epoch"].tolist() == [-1, 0, 1]

    for root, runs in ((tmp_path / "a", [2]), (tmp_path / "b", [1, 2])):
        folder = root / "saved/benign_model/cifar10/resnet10"
        for number, epochs in enumerate(runs):
            more = ["--checkpoint_load", folder / "0.tar"] if number else []
            assert run_cli("train_clean_withTrans.py", *words(root), "--epochs", epochs, "--batch_size", 64, *more) == 0
    assert same_weights(*(tmp_path / root / "saved/benign_model/cifar10/resnet10/1.tar" for root in "ab"))


def test_steps_of_st_run_from_their_own_folder_and_default_paths_are_printed(pipeline, words):
    for cwd, script in ((ROOT / "ST", "test.py"), (ROOT, "ST/test.py")):
        command = [sys.executable, script, *map(str, words(pipeline))]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Using ") == 2 and "ACC_paper" in done.stdout


@pytest.mark.parametrize("folder", [ROOT, ROOT / "ST", ROOT / "results", Path("/")], ids=str)
def test_a_command_in_a_message_runs_in_the_folder_it_is_given_in(folder, monkeypatch, tmp_path, cli, words):
    monkeypatch.chdir(folder)
    for step, before in (
        ("ST/train_classifier.py", "ST/train_extractor.py"),
        ("ST/train_extractor.py", "separate_samples.py"),
    ):
        said = cli(step, *words(tmp_path))
        script = re.search(r"python (\S+\.py)", said.err)[1]
        assert said.code == 2 and Path(script).resolve() == ROOT / before, said.err


def test_the_classifier_tells_the_papers_selection_beside_the_last_epoch(copy, words, cli):
    said = cli(
        "ST/train_classifier.py", *words(copy), "--epochs", 3, "--batch_size", 32, "--learning_rate", 0.5, "--overwrite"
    )
    log = pd.read_csv(next((copy / "ST/save").rglob("Linear_*/log.csv")))
    best = log["ACC"].idxmax()
    assert said.code == 0 and f"Last epoch (3): ACC {log['ACC'].iloc[-1]:.2f}" in said.out
    assert f"selection, by ACC on the test set ({best + 1}): ACC {log['ACC'][best]:.2f}" in said.out


def test_the_documents_commands_are_understood():
    folder = "./saved/backdoored_model/poison_rate_0.1"
    model = f"{folder}/noTrans_ftsimi/cifar10/resnet18/gridTrigger/9.tar"
    common = "--dataset cifar10 --model resnet18 --trigger_type gridTrigger"
    secure = "./save/poison_rate_0.1/SupCon_models/cifar10/resnet18/gridTrigger_0.2_0.05"
    extractor = f"{secure}/SupCon_cifar10_resnet18_lr_0.5_decay_0.0001_bsz_512_temp_0.1_trial_0_cosine_warm"
    classifier = f"{secure}/Linear_cifar10_resnet18_lr_5.0_decay_0_bsz_512"
    commands = {
        "train_attack_noTrans.py": f"{common} --epochs 2",
        "finetune_attack_noTrans.py": f"{common} --epochs 10 --checkpoint_load {folder}/noTrans/cifar10/resnet18/gridTrigger/1.tar",
        "calculate_consistency.py": f"{common} --checkpoint_load {model}",
        "visualize_consistency.py": f"{common} --checkpoint_load {model}",
        "calculate_gamma.py": f"--clean_ratio 0.20 --poison_ratio 0.05 --checkpoint_load {model}",
        "separate_samples.py": f"{common} --batch_size 1 --clean_ratio 0.20 --poison_ratio 0.05 --gamma_low 0.0 "
        f"--gamma_high 19.71682357788086 --checkpoint_load {model}",
        "ST/train_extractor.py": f"{common} --epochs 200 --learning_rate 0.5 --temp 0.1 --cosine --save_freq 20 --batch_size 512",
        "ST/train_classifier.py": f"{common} --epochs 10 --learning_rate 5 --batch_size 512 --ckpt {extractor}/last.pth",
        "ST/test.py": f"{common} --model_ckpt {extractor}/last.pth --classifier_ckpt {classifier}/ckpt_epoch_9.pth",
        "train_attack_withTrans.py": f"{common} --epochs 200",
        "unlearn_relearn.py": f"{common} --epochs 20 --clean_ratio 0.20 --poison_ratio 0.05 --checkpoint_load {folder}/withTrans/199.tar "
        f"--checkpoint_save {folder}/withTrans/199_unlearn_purify.py --log {folder}/withTrans/unlearn_purify.csv",
        "train_clean_withTrans.py": "--dataset cifar10 --model resnet18 --epochs 200",
    }  # fmt: skip
    parsed = {name: load_script(name).get_parser().parse_args(text.split()) for name, text in commands.items()}
    run_name = load_script("ST/train_extractor.py").run_name(parsed["ST/train_extractor.py"])
    assert run_name == extractor.rsplit("/", 1)[1]
    assert (
        load_script("ST/train_classifier.py").run_name(parsed["ST/train_classifier.py"]) == classifier.rsplit("/", 1)[1]
    )


def test_the_histogram_names_the_transform_that_it_is_of(words, copy, cli, monkeypatch):
    titles, draw = [], figures.fct_histogram

    def drawn(fct, is_clean, title, gammas):
        titles.append(title)
        return draw(fct, is_clean, title, gammas)

    monkeypatch.setattr(figures, "fct_histogram", drawn)
    for more in ([], ["--trans1", "flip"], ["--trans1", "auto"]):
        assert cli("visualize_consistency.py", *words(copy), *more).code == 0
    assert [title.split(", ")[3] for title in titles] == ["tau rotate + affine", "tau flip + affine", "tau auto"]


def test_the_same_seed_gives_the_same_files_at_any_batch_size_of_inference(pipeline, words, tmp_path):
    import shutil

    path = tmp_path / "1.tar"
    shutil.copy(pipeline / TUNED / "1.tar", path)
    assert run_cli("calculate_consistency.py", *words(pipeline), "--checkpoint_load", path, "--batch_size", 7) == 0
    one, other = (np.loadtxt(folder / "1_all.txt") for folder in (tmp_path, pipeline / TUNED))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7)


def test_thresholds_that_nobody_gave_may_differ_in_their_last_bits(copy, words, cli, monkeypatch):
    (copy / TUNED / "1_fct.json").unlink()  # so that FCT is computed
    compute = fct.compute_fct
    for change, more, code in ((1, [], 0), (1 + 1e-5, [], 0), (1, ["--gamma_high", 0.01], 2)):
        scaled = lambda *a, change=change, **b: tuple(part * np.float32(change) for part in compute(*a, **b))  # noqa: E731
        monkeypatch.setattr(fct, "compute_fct", scaled)
        assert cli("separate_samples.py", *words(copy), *more).code == code, change


def test_where_nothing_is_left_to_train_nothing_is_written(copy, words, cli, monkeypatch):
    sheet = copy / NO_TRANS / "samples.png"
    before = {path: path.read_bytes() for path in (copy / NO_TRANS).iterdir() if path.is_file()}
    assert sheet in before
    monkeypatch.setitem(plt.rcParams, "figure.facecolor", "red")  # as another version would draw another picture
    more = ["--epochs", 2, "--batch_size", 64, "--checkpoint_load", copy / NO_TRANS / "1.tar"]
    said = cli("train_attack_noTrans.py", *words(copy), *more)
    assert said.code == 0 and "All 2 epochs are done" in said.out, said.err
    assert {path: path.read_bytes() for path in before} == before


def test_gamma_says_how_many_samples_lie_beyond_each(copy, words, cli):
    said = cli("calculate_gamma.py", *words(copy), "--clean_ratio", 0.3, "--poison_ratio", 0.1).out
    assert "120 of 400 samples have FCT <= gamma_low, 40 have FCT >= gamma_high" in said


def test_values_are_of_the_network_they_were_computed_with_though_its_file_is_replaced_meanwhile(
    copy, words, cli, monkeypatch
):
    path, compute = copy / TUNED / "1.tar", fct.compute_fct
    digest = sha256(path)

    def replaced(*given, **named):
        other = (copy / TUNED / "0.tar").read_bytes()
        path.unlink()
        path.write_bytes(other)
        return compute(*given, **named)

    monkeypatch.setattr(fct, "compute_fct", replaced)
    assert cli("calculate_consistency.py", *words(copy), "--overwrite").code == 0
    record = json.loads((copy / TUNED / "1_fct.json").read_text())
    assert record["inputs"] == {"1.tar": digest} != {"1.tar": sha256(path)}


def test_no_decay_has_one_folder_however_it_is_spelt():
    script = load_script("ST/train_classifier.py")
    for words, decay in (([], "0"), (["0"], "0"), (["0.0"], "0"), (["1e-4"], "0.0001")):
        opt = script.get_parser().parse_args(["--weight_decay", *words] if words else [])
        assert f"_decay_{decay}_" in script.run_name(opt)


def test_the_newest_classifier_is_taken(copy, words, cli):
    other = copy / SECURE / "Linear_cifar10_resnet10_lr_0.5_decay_0_bsz_64"
    shutil.copytree(copy / CLASSIFIER, other, copy_function=shutil.copyfile)  # its record is newer
    said = cli("ST/test.py", *words(copy))
    assert said.code == 0 and f"{other.name}/ckpt_epoch_1_test.json" in said.out


def test_the_histogram_has_the_thresholds_of_the_ratios(copy, words, cli, monkeypatch):
    given, draw = [], figures.fct_histogram
    monkeypatch.setattr(figures, "fct_histogram", lambda *a: given.append(a[3]) or draw(*a))
    more = ["--clean_ratio", 0.3, "--poison_ratio", 0.1]
    assert cli("visualize_consistency.py", *words(copy), *more).code == 0
    values = np.sort(np.loadtxt(copy / TUNED / "1_all.txt"))
    assert given == [(values[119], values[360])]


def test_a_class_that_d_c_lacks_is_warned_of(copy, words, cli):
    few = cli("separate_samples.py", *words(copy), "--clean_ratio", 0.01)
    every = cli("separate_samples.py", *words(copy), "--clean_ratio", 0.3, "--clean_per_class")
    assert "holds no sample of some class" in few.out and "holds no sample" not in every.out


def test_a_classifier_takes_no_extractor_of_other_samples(copy, words, cli):
    assert cli("separate_samples.py", *words(copy), "--clean_per_class", "--overwrite").code == 0
    before = (copy / CLASSIFIER / "ckpt_epoch_1.pth").read_bytes()
    said = cli(
        "ST/train_classifier.py", *words(copy), "--epochs", 2, "--batch_size", 32, "--learning_rate", 0.5, "--overwrite"
    )
    assert said.code == 2 and "trained with another" in said.err and "train_extractor.py" in said.err
    assert (copy / CLASSIFIER / "ckpt_epoch_1.pth").read_bytes() == before


def test_the_classifier_of_another_extractor_is_not_replaced_unasked(copy, words, cli):
    more = ["--epochs", 1, "--batch_size", 128, "--trial", 3]
    assert cli("ST/train_extractor.py", *words(copy), *more).code == 0
    own = [*words(copy), "--epochs", 2, "--batch_size", 32, "--learning_rate", 0.5]
    said = cli("ST/train_classifier.py", *own)  # takes the newest
    assert (
        said.code == 2
        and "holds the result of --ckpt" in said.err
        and "trial_3" in said.err
        and "--overwrite" in said.err
    )
    assert cli("ST/train_classifier.py", *own, "--ckpt", copy / EXTRACTOR / "last.pth").code == 0


def test_step_2_of_another_epoch_of_step_1_is_not_replaced_unasked(copy, words, cli):
    own = [*words(copy), "--epochs", 2, "--batch_size", 64]
    said = cli("finetune_attack_noTrans.py", *own, "--checkpoint_load", copy / NO_TRANS / "0.tar")
    assert said.code == 2 and "0.tar" in said.err and "--overwrite" in said.err
    assert cli("finetune_attack_noTrans.py", *own).code == 0


def rewritten(path, **changes):
    """The JSON file with other values, as a file of its own: that of the copy is a link."""
    content = {**read_json(path), **changes}
    path.unlink()
    path.write_text(json.dumps(content))


def test_a_record_tells_in_which_precision_its_step_ran_and_going_on_in_another_is_said(cli, words, copy):
    folder, ran_in = copy / NO_TRANS, choose_runtime().record
    assert read_json(folder / "options.json")["ran_in"] == ran_in
    step = ["train_attack_noTrans.py", *words(copy), "--batch_size", 64]
    more = [*step, "--epochs", 3, "--checkpoint_load", folder / "1.tar", "--precision"]
    (other,) = {"float32", "bfloat16"} - {ran_in["precision"]}
    refused = cli(*more, other)
    assert refused.code == 2 and f"not with --precision {other}" in refused.err
    named = cli(*more, ran_in["precision"])  # what auto came to
    assert named.code == 0 and "Note: the epochs before" not in named.out, named.err
    checkpoint = torch.load(folder / "2.tar", weights_only=True)
    (folder / "2.tar").unlink()
    checkpoint["options"]["precision"] = "auto"
    torch.save({**checkpoint, "ran_in": {"device": "cpu", "precision": other}}, folder / "2.tar")
    elsewhere = cli(*step, "--epochs", 4, "--checkpoint_load", folder / "2.tar")
    assert elsewhere.code == 0 and f"Note: the epochs before were trained in {other}" in elsewhere.out, elsewhere.err


def test_what_was_made_of_saved_fct_says_so_and_that_it_is_float32(cli, words, copy):
    values = {"1_all.txt": sha256(copy / TUNED / "1_all.txt")}
    for path in (f"{TUNED}/1_fct.json", f"{TUNED}/1_histogram.json", f"{SAMPLES}/options.json"):
        record = read_json(copy / path)
        assert record["ran_in"]["precision"] == "float32"  # what --precision auto is for FCT
        found = {name.rsplit("/", 1)[-1]: digest for name, digest in record["inputs"].items()}
        assert values.items() <= (record["outputs"] if "_fct" in path else found).items()
    (copy / TUNED / "1_all.txt").unlink()
    said = cli("separate_samples.py", *words(copy))
    assert said.code == 0 and "computing them" in said.out
    assert not [name for name in read_json(copy / SAMPLES / "options.json")["inputs"] if name.endswith("_all.txt")]


def test_st_takes_the_last_epoch_of_a_complete_run_whatever_the_times_of_its_files(cli, words, copy):
    (classifier,) = copy.glob("ST/save/**/Linear_*/ckpt_epoch_0.pth")
    later = time.time() + 1000
    os.utime(classifier, (later, later))
    said = cli("ST/test.py", *words(copy))
    assert said.code == 0 and "ckpt_epoch_1.pth" in said.out and "ckpt_epoch_0.pth" not in said.out, said.err
    (extractor,) = copy.glob("ST/save/**/SupCon_*/last.pth")
    rewritten(extractor.with_name("options.json"), epochs_done=1)
    for script, option in (("ST/train_classifier.py", "--ckpt"), ("ST/test.py", "--model_ckpt")):
        refused = cli(script, *words(copy))
        assert refused.code == 2 and "has 1 of 2 epochs" in refused.err and option in refused.err
    named = cli("ST/test.py", *words(copy), "--model_ckpt", extractor)
    assert named.code == 0, named.err


@pytest.mark.parametrize("script", ["unlearn_relearn.py", "ST/train_extractor.py", "ST/train_classifier.py"])
def test_samples_of_data_that_was_replaced_since_are_refused(cli, words, copy, script):
    record = copy / SAMPLES / "options.json"
    data = read_json(record)["data"]
    rewritten(record, data={**data, "train": {**data["train"], "sha256": "0" * 64}})
    refused = cli(script, *words(copy), "--overwrite")
    assert refused.code == 2 and "has changed since" in refused.err and "run SD again" in refused.err


def test_samples_of_other_ratios_are_refused(cli, words, copy):
    samples = copy / SAMPLES
    refused = cli("unlearn_relearn.py", *words(copy), "--samples", samples, "--poison_ratio", 0.1)
    assert refused.code == 2 and "--poison_ratio 0.05" in refused.err and "0.1" in refused.err, refused.err
