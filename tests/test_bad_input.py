"""A user's mistake ends in one line, exit code 2, and nothing on disk changed."""

import fcntl
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_folder
from PIL import Image
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS

SCRIPTS = [
    "train_attack_noTrans.py", "finetune_attack_noTrans.py", "calculate_consistency.py", "visualize_consistency.py",
    "calculate_gamma.py", "separate_samples.py", "train_attack_withTrans.py", "unlearn_relearn.py",
    "train_clean_withTrans.py", "ST/train_extractor.py", "ST/train_classifier.py", "ST/test.py",
]  # fmt: skip


def snapshot(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def refused(result, *needles):
    """Exit code 2 and a single line on stderr that holds every needle."""
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.err, result.err
    for needle in needles:
        assert str(needle) in lines[0], (needle, lines[0])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "words, needle",
    [
        (["--dataset", "cifar11"], "cifar11"),
        (["--model", "lenet"], "lenet"),
        (["--seed", "-1"], "at least 0"),
        (["--no_such_option"], "no_such_option"),
    ],
)
def test_common_options_are_checked(cli, script, words, needle):
    refused(cli(script, *words), needle)


@pytest.mark.parametrize(
    "options, needle",
    [
        (["--poison_rate", "0"], "above 0"),
        (["--poison_rate", "1.5"], "at most 1"),
        (["--poison_rate", "nan"], "out of range"),
        (["--poison_rate", "0.00001"], "raise it"),
        (["--trigger_type", "noTrigger"], "gridTrigger"),
        (["--target_type", "one2one"], "all2one"),
        (["--target_label", "10"], "0 to 9"),
        (["--batch_size", "1"], "at least 2"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "-1"], "above 0"),
        (["--device", "abacus"], "abacus is no device"),
        (["--device", "hpu"], "--device hpu"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--precision", "int4"], "bfloat16"),
    ],
)
def test_a_training_step_checks_its_options_and_leaves_no_file(cli, words, tmp_path, options, needle):
    refused(cli("train_attack_noTrans.py", *words(tmp_path), *options), needle)
    assert not snapshot(tmp_path)


MISSING = [
    ("finetune_attack_noTrans.py", "train_attack_noTrans.py"),
    ("calculate_consistency.py", "finetune_attack_noTrans.py"),
    ("visualize_consistency.py", "finetune_attack_noTrans.py"),
    ("calculate_gamma.py", "finetune_attack_noTrans.py"),
    ("separate_samples.py", "finetune_attack_noTrans.py"),
    ("unlearn_relearn.py", "train_attack_withTrans.py"),
    ("ST/train_extractor.py", "separate_samples.py"),
    ("ST/train_classifier.py", "ST/train_extractor.py"),
    ("ST/test.py", "ST/train_extractor.py"),
]


@pytest.mark.parametrize("script, maker", MISSING)
def test_a_missing_input_names_the_command_that_makes_it_and_the_nearest_path(cli, words, tmp_path, script, maker):
    command = f"python {maker} --dataset cifar10 --model resnet10 --trigger_type gridTrigger"
    refused(cli(script, *words(tmp_path)), "no such file", command, f"Nearest existing path: {tmp_path}")
    assert not snapshot(tmp_path)


@pytest.mark.parametrize(
    "script, option, more, needle",
    [
        ("ST/train_extractor.py", "--samples", [], "python separate_samples.py --dataset cifar10 --model resnet10"),
        ("unlearn_relearn.py", "--checkpoint_load", ["--model", "vgg16"], "--checkpoint_load names the state dict"),
        ("train_attack_noTrans.py", "--ssba_images", ["--trigger_type", "SSBA"], "--ssba_images"),
        ("train_attack_noTrans.py", "--data_root", ["--dataset", "fashion"], "fashion is bundled"),
    ],
)
def test_of_a_missing_file_that_an_option_names_the_nearest_path_is_told(
    cli, words, tmp_path, script, option, more, needle
):
    said = cli(script, *words(tmp_path / "o"), *more, option, tmp_path / "nowhere/x.npy")
    refused(said, needle, f"Nearest existing path: {tmp_path}")
    if option == "--samples":  # the folder that the command named here makes
        assert f"such as {tmp_path}/o/saved/separated_samples/cifar10/resnet10/gridTrigger_0.2_0.05" in said.err


@pytest.mark.parametrize("words", [["reproduce.py", "--verify"], ["tools/make_tables.py", "--results"]], ids=str)
def test_of_a_missing_folder_of_results_the_nearest_path_is_told(cli, tmp_path, words):
    refused(cli(*words, tmp_path / "nowhere"), "no such folder", f"Nearest existing path: {tmp_path} (empty)")


@pytest.mark.parametrize(
    "script, option",
    [
        ("unlearn_relearn.py", "--checkpoint_load"),
        ("finetune_attack_noTrans.py", "--checkpoint_load"),
        ("ST/train_classifier.py", "--ckpt"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_called_one(cli, words, tmp_path, script, option):
    refused(cli(script, *words(tmp_path / "o"), option, tmp_path), f"{tmp_path} is a folder; give the path of a file")


def test_of_a_cleaned_model_that_is_missing_this_step_is_named(cli, words, tmp_path):
    said = cli("unlearn_relearn.py", *words(tmp_path), "--checkpoint_load", tmp_path / "1_unlearn_purify.tar")
    refused(said, "no such file", "Make it with: python unlearn_relearn.py --dataset cifar10")


def test_going_on_is_offered_where_it_is_possible(cli, words, pipeline):
    step = ["train_attack_noTrans.py", *words(pipeline), "--batch_size", 64]
    refused(cli(*step, "--epochs", 9), "--overwrite", "--checkpoint_load CHECKPOINT to go on with it")
    other = cli(*step, "--epochs", 9, "--lr", 0.05)
    refused(other, "--overwrite", "another --output_root")
    assert "to go on with it" not in other.err


def test_the_command_that_a_message_names_makes_what_was_missing(cli, words, tmp_path):
    own = [*words(tmp_path / "my results"), "--seed", 3, "--target_type", "all2all", "--poison_rate", 0.2]
    said = cli("finetune_attack_noTrans.py", *own, "--epochs", 1)
    refused(said, "Make it with: ")
    _, script, *pasted = shlex.split(said.err.split("Make it with: ")[1].split(". Nearest")[0])
    made = cli(script, *pasted, "--epochs", 1, "--batch_size", 64)
    assert made.code == 0, made
    assert cli("finetune_attack_noTrans.py", *own, "--epochs", 1, "--batch_size", 64).code == 0


def test_a_missing_fct_file_names_the_step_before(cli, words, pipeline):
    path = pipeline / NO_TRANS / "0.tar"
    refused(
        cli("calculate_gamma.py", *words(pipeline), "--checkpoint_load", path), "calculate_consistency.py", "0_all.txt"
    )


LOADS = [
    ("train_attack_noTrans.py", "--checkpoint_load", f"{NO_TRANS}/0.tar"),
    ("finetune_attack_noTrans.py", "--checkpoint_load", f"{NO_TRANS}/1.tar"),
    ("calculate_consistency.py", "--checkpoint_load", f"{TUNED}/1.tar"),
    ("visualize_consistency.py", "--checkpoint_load", f"{TUNED}/1.tar"),
    ("separate_samples.py", "--checkpoint_load", f"{TUNED}/1.tar"),
    ("train_attack_withTrans.py", "--checkpoint_load", f"{WITH_TRANS}/0.tar"),
    ("unlearn_relearn.py", "--checkpoint_load", f"{WITH_TRANS}/1.tar"),
    ("ST/train_extractor.py", "--checkpoint_load", f"{EXTRACTOR}/last.pth"),
    ("ST/train_classifier.py", "--ckpt", f"{EXTRACTOR}/last.pth"),
    ("ST/test.py", "--classifier_ckpt", f"{CLASSIFIER}/ckpt_epoch_1.pth"),
]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("script, option, good", LOADS)
def test_damaged_or_hostile_checkpoints_are_refused_and_nothing_is_written(
    cli, words, pipeline, tmp_path, script, option, good
):
    whole = (pipeline / good).read_bytes()
    before = snapshot(pipeline)
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("empty", b""),
        ("text", b"not a checkpoint"),
        ("image", b"\x89PNG"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        refused(cli(script, *words(pipeline), option, path), path)
    hostile, trace = tmp_path / "hostile.tar", tmp_path / "it ran"
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        save({"model": Bomb(trace)}, hostile)
        refused(cli(script, *words(pipeline), option, hostile), hostile)
    parts = torch.load(pipeline / good, weights_only=True)
    without = {key: value for key, value in parts.items() if key != "optimizer"}
    for content in ({"state_dict": {}}, without, {**parts, "options": 3}, [1, 2]):
        foreign = tmp_path / "foreign.tar"
        torch.save(content, foreign)
        refused(cli(script, *words(pipeline), option, foreign), foreign)
    assert not trace.exists()
    assert snapshot(pipeline) == before


@pytest.mark.parametrize("script, option, good", LOADS)
def test_a_checkpoint_of_other_options_is_refused_with_both_values(cli, words, pipeline, script, option, good):
    before = snapshot(pipeline)
    for name, other in (
        ("trigger_type", "squareTrigger"),
        ("poison_rate", "0.2"),
        ("seed", "7"),
        ("target_label", "3"),
    ):
        path = pipeline / good
        result = cli(script, *words(pipeline), option, path, f"--{name}", other)
        if script.startswith("ST/") and name in (
            "trigger_type",
            "poison_rate",
        ):  # other folders: their inputs are missing
            refused(result)
        elif script.startswith("ST/"):
            refused(result, other)
        else:
            refused(result, f"--{name}", other, "was made with" if path.exists() else "")
    assert snapshot(pipeline) == before


def test_a_checkpoint_of_another_network_or_data_set_is_refused(cli, words, pipeline):
    path = pipeline / TUNED / "1.tar"
    result = cli("calculate_consistency.py", *words(pipeline), "--checkpoint_load", path, "--model", "resnet18")
    refused(result, "--model resnet10", "--model resnet18")
    result = cli("calculate_consistency.py", *words(pipeline), "--checkpoint_load", path, "--dataset", "fashion")
    refused(result, "--dataset cifar10", "--dataset fashion")
    result = cli("calculate_consistency.py", *words(pipeline), "--checkpoint_load", pipeline / WITH_TRANS / "1.tar")
    refused(result, "train_attack_withTrans", "finetune_attack_noTrans")


def test_a_checkpoint_of_another_training_set_is_refused(cli, words, pipeline, fashion, tmp_path):
    write_folder(tmp_path / "cifar10", fashion, train=30, test=10)
    common = [*words(pipeline), "--data_root", tmp_path]
    before = snapshot(pipeline)
    for script, path in (("calculate_consistency.py", TUNED), ("finetune_attack_noTrans.py", NO_TRANS)):
        refused(cli(script, *common, "--checkpoint_load", pipeline / path / "1.tar"), "other samples are poisoned")
    assert snapshot(pipeline) == before


def test_weights_that_do_not_fit_are_refused(cli, words, pipeline, tmp_path):
    content = torch.load(pipeline / TUNED / "1.tar", weights_only=True)
    for name, change in (
        ("missing", lambda state: state.pop("fc.bias")),
        ("shape", lambda state: state.update({"fc.bias": torch.zeros(3)})),
        ("foreign", lambda state: state.update({"other.weight": torch.zeros(3)})),
    ):
        state = dict(content["model"])
        change(state)
        torch.save({**content, "model": state}, tmp_path / f"{name}.tar")
        result = cli("calculate_consistency.py", *words(pipeline), "--checkpoint_load", tmp_path / f"{name}.tar")
        refused(result, "do not fit", "fc.bias" if name != "foreign" else "other.weight")


@pytest.mark.parametrize(
    "options, needle",
    [
        (["--poison_ratio", "0.001"], "--poison_ratio 0.001"),
        (["--clean_ratio", "0.7", "--poison_ratio", "0.4"], "overlap"),
        (["--clean_ratio", "0"], "above 0"),
        (["--gamma_low", "2", "--gamma_high", "1"], "above --gamma_high"),
        (["--gamma_high", "1e9"], "D_p is empty"),
        (["--gamma_low", "0"], "D_c is empty"),
    ],
)
def test_ratios_and_gammas_that_leave_a_set_empty_are_refused(cli, words, pipeline, options, needle):
    before = snapshot(pipeline)
    refused(cli("separate_samples.py", *words(pipeline), *options), needle)
    assert snapshot(pipeline) == before


def test_results_of_other_settings_are_not_replaced_unasked(cli, words, pipeline, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(pipeline / "saved", root / "saved")
    before = snapshot(root)
    result = cli("train_attack_noTrans.py", *words(root), "--seed", "1", "--epochs", "1")
    refused(result, "--seed 0", "--seed 1", "--overwrite")
    result = cli("train_attack_noTrans.py", *words(root), "--target_type", "cleanLabel", "--poison_rate", "0.1")
    refused(result, "--target_type all2one", "--overwrite")
    assert snapshot(root) == before
    assert cli("train_attack_noTrans.py", *words(root), "--seed", "1", "--epochs", "1", "--overwrite").code == 0

    # Separated samples of another poison rate go to the same folder by the authors' README: they stay unless asked.
    assert cli("train_attack_noTrans.py", *words(root), "--poison_rate", "0.2", "--epochs", "1").code == 0
    model = root / NO_TRANS.replace("0.1", "0.2") / "0.tar"
    more = ["--poison_rate", "0.2", "--checkpoint_load", model]
    before = (root / SAMPLES / "clean_samples.npy").read_bytes()
    refused(cli("separate_samples.py", *words(root), *more), "--poison_rate 0.1", "--poison_rate 0.2", "--overwrite")
    assert (root / SAMPLES / "clean_samples.npy").read_bytes() == before
    assert cli("separate_samples.py", *words(root), *more, "--overwrite").code == 0
    refused(cli("ST/train_extractor.py", *words(root), "--epochs", "1"), "--poison_rate 0.2")


def test_sample_files_that_are_not_samples_are_refused(cli, words, pipeline, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(pipeline / "saved", root / "saved")
    path = root / SAMPLES / "poison_samples.npy"
    trace = tmp_path / "it ran"
    np.save(tmp_path / "hostile.npy", np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    hostile = (tmp_path / "hostile.npy").read_bytes()
    trace.unlink(missing_ok=True)
    plain = tmp_path / "plain.npy"
    np.save(plain, np.zeros((4, 3)))
    for content in (b"", b"text", path.read_bytes()[:500], hostile, plain.read_bytes()):
        path.write_bytes(content)
        refused(cli("unlearn_relearn.py", *words(root), "--epochs", "1"), "poison_samples.npy", "separate_samples.py")
        refused(cli("ST/train_extractor.py", *words(root), "--epochs", "1"), "poison_samples.npy")
    assert not trace.exists()


def test_broken_or_wrong_data_folders_are_refused(cli, words, data_root, tmp_path):
    def attempt(root, *more):
        options = ["--data_root", root, "--output_root", tmp_path / "out", "--model", "resnet10", "--epochs", "1"]
        return cli("train_attack_noTrans.py", *options, *more)

    copy = tmp_path / "data"
    shutil.copytree(data_root / "cifar10", copy / "cifar100")
    refused(attempt(copy, "--dataset", "cifar100"), "10 classes", "cifar100 has 100")

    (copy / "cifar100").rename(copy / "cifar10")
    victim = copy / "cifar10/train/class 3/005.png"
    good = victim.read_bytes()
    victim.write_bytes(good[:200])
    refused(attempt(copy), victim)
    Image.new("RGB", (40, 30)).save(victim)
    refused(attempt(copy), victim, "40x30")
    victim.write_bytes(good)
    shutil.rmtree(copy / "cifar10/test/class 3")
    refused(attempt(copy), "same class folders", "class 3")
    shutil.rmtree(copy / "cifar10/test")
    refused(attempt(copy), "no folder")
    refused(attempt(copy / "cifar10/train/class 3/000.png"), "000.png")
    assert not snapshot(tmp_path / "out")


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(cli, words, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    refused(cli("train_attack_noTrans.py", *words(blocked)), "cannot write", blocked)
    if os.geteuid():  # root writes anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        refused(cli("train_attack_noTrans.py", *words(locked)), "cannot write", locked)


def test_a_real_process_ends_with_code_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "calculate_gamma.py", "--checkpoint_load", "none.tar"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("calculate_gamma.py: error: no such file")
        and done.stderr.count("\n") == 1
    )


def test_data_on_which_the_method_makes_no_sense_is_refused(cli, words, data_root, tmp_path):
    def attempt(*more):
        return cli("train_attack_noTrans.py", *words(tmp_path / "out"), "--data_root", tmp_path, "--epochs", "1", *more)

    folder = tmp_path / "cifar10"
    shutil.copytree(data_root / "cifar10", folder)
    for image in (folder / "train/class 3").iterdir():
        image.unlink()
    refused(attempt(), "class 3 holds no image")

    # One image a class: nothing is left to poison at 10 %; and with more of it, L_intra has no two samples a class.
    shutil.rmtree(folder)
    for split in ("train", "test"):
        for label in range(10):
            (folder / split / f"class {label}").mkdir(parents=True)
            source = data_root / "cifar10/train/class 3/000.png"
            shutil.copy(source, folder / split / f"class {label}/0.png")
    refused(attempt(), "poisons none")
    for label in range(1, 10):
        shutil.rmtree(folder / f"train/class {label}")
        shutil.rmtree(folder / f"test/class {label}")
    refused(attempt(), "holds 1 classes, cifar10 has 10")
    subset = tmp_path / "sub-imagenet-200"
    for split in ("train", "val"):
        (subset / split / "n01").mkdir(parents=True)
        shutil.copy(folder / "train/class 0/0.png", subset / split / "n01")
    refused(attempt("--dataset", "imagenet"), "one class")


def test_grey_images_count_as_three_equal_channels(cli, words, data_root, tmp_path):
    shutil.copytree(data_root / "cifar10", tmp_path / "cifar10")
    for path in (tmp_path / "cifar10").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    common = ["--epochs", "1", "--batch_size", "64"]
    for root, data in (("grey", tmp_path), ("colour", data_root)):  # the images here are grey, stored as RGB
        assert cli("train_attack_noTrans.py", *words(tmp_path / root), *common, "--data_root", data).code == 0
    one, other = (torch.load(tmp_path / root / NO_TRANS / "0.tar", weights_only=True) for root in ("grey", "colour"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])


def test_batches_of_one_class_stop_step_2_where_all_are_such(cli, words, pipeline, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(pipeline / "saved", root / "saved")
    some = cli("finetune_attack_noTrans.py", *words(root), "--batch_size", 2, "--epochs", 1, "--overwrite")
    assert some.code == 0  # of its two hundred pairs about twenty are of one class
    (number,) = re.findall(r"^(\d+) of 200 batches hold a single class", some.out, re.MULTILINE)
    assert 0 < int(number) < 200

    np.savez(tmp_path / "four.npz", x_train=np.zeros((4, 32, 32, 3), np.uint8), y_train=[0, 0, 1, 1])
    codes = set()
    for seed in range(8):  # of which a third, by chance
        own = ["--dataset", "npz", "--data_root", tmp_path / "four.npz", "--model", "resnet10", "--seed", seed, "--output_root",
               tmp_path / str(seed), "--batch_size", 2, "--epochs", 1]  # fmt: skip
        assert cli("train_attack_noTrans.py", *own).code == 0
        said = cli("finetune_attack_noTrans.py", *own)
        codes.add(said.code)
        if said.code == 2:
            refused(said, "every batch holds a single class", "--batch_size")
        if codes == {0, 2}:
            break
    assert codes == {0, 2}


def test_of_a_step_that_was_interrupted_the_next_says_how_to_end_it(copy, words, cli):
    for folder, script in ((TUNED, "calculate_consistency.py"), (WITH_TRANS, "unlearn_relearn.py")):
        record = copy / folder / "options.json"
        content = json.loads(record.read_text())
        content["options"]["epochs"] = 30
        record.unlink()  # a link to the file of all tests
        record.write_text(json.dumps(content))
        said = cli(script, *words(copy))
        refused(said, "has 2 of 30 epochs", "--checkpoint_load", f"{folder}/1.tar")
        assert "--overwrite" not in said.err


@pytest.mark.parametrize(
    "script, option, other, good",
    [
        ("train_attack_noTrans.py", "--lr", "0.5", f"{NO_TRANS}/0.tar"),
        ("train_attack_withTrans.py", "--batch_size", "50", f"{WITH_TRANS}/0.tar"),
        ("finetune_attack_noTrans.py", "--batch_size", "50", f"{TUNED}/0.tar"),
        ("ST/train_extractor.py", "--temp", "0.5", f"{EXTRACTOR}/last.pth"),
    ],
)
def test_a_run_that_goes_on_keeps_its_settings(cli, words, pipeline, script, option, other, good):
    before = snapshot(pipeline)
    settings = torch.load(pipeline / good, weights_only=True)["options"]
    said = cli(script, *words(pipeline), "--epochs", "3", option, other, "--checkpoint_load", pipeline / good)
    refused(said, f"{option} {settings[option[2:]]}", "not with", f"{option} {other}", "begin anew")
    assert snapshot(pipeline) == before


def test_a_cosine_that_fell_over_other_epochs_does_not_start_over(cli, words, pipeline):
    before, last = snapshot(pipeline), pipeline / EXTRACTOR / "last.pth"
    options = torch.load(last, weights_only=True)["options"]
    assert options["cosine"]
    said = cli("ST/train_extractor.py", *words(pipeline), "--cosine", "--batch_size", options["batch_size"], "--epochs", 9,
               "--checkpoint_load", last)  # fmt: skip
    refused(said, f"of a run with --epochs {options['epochs']}", "not with --epochs 9", "begin anew")
    assert snapshot(pipeline) == before


def test_a_batch_of_one_is_refused_in_both_passes(cli, words, pipeline):
    for option in ("--batch_size", "--unlearn_batch_size"):
        refused(cli("unlearn_relearn.py", *words(pipeline), option, 1), option, "at least 2")


def test_a_classifier_goes_with_its_own_extractor(cli, words, pipeline, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(pipeline, root)
    assert cli("ST/test.py", *words(root)).code == 0
    before = snapshot(root)
    settings = torch.load(root / EXTRACTOR / "last.pth", weights_only=True)["options"]
    cosine = ["--cosine"] * settings["cosine"]
    again = ["--epochs", 1, "--batch_size", settings["batch_size"], "--temp", "0.5", *cosine, "--overwrite"]
    assert cli("ST/train_extractor.py", *words(root), *again).code == 0
    refused(
        cli("ST/test.py", *words(root)),
        "was trained with another",
        "last.pth",
        "ST/train_classifier.py",
        "--model_ckpt",
    )
    newest = max(root.glob("ST/save/**/ckpt_epoch_*.pth"), key=lambda path: "Linear" in str(path))
    options = torch.load(newest, weights_only=True)["options"]
    on = ["--epochs", 9, "--batch_size", options["batch_size"], "--learning_rate", options["learning_rate"]]
    refused(
        cli("ST/train_classifier.py", *words(root), *on, "--checkpoint_load", newest),
        "was trained with another",
        "last.pth",
    )
    tests = [path for path in before if "Linear" in str(path)]
    assert tests and {path: snapshot(root)[path] for path in tests} == {path: before[path] for path in tests}


def test_of_two_extractors_the_classifiers_own_is_named(cli, words, copy):
    other = copy / EXTRACTOR.replace("temp_0.1", "temp_0.2")
    shutil.copytree(copy / EXTRACTOR, other, copy_function=shutil.copyfile)  # its record is newer
    held = torch.load(other / "last.pth", weights_only=True)
    held["model"] = {name: value + 1 for name, value in held["model"].items()}
    torch.save(held, other / "last.pth")
    said = cli("ST/test.py", *words(copy))
    refused(said, f"{other.name}/last.pth", f"or give its own extractor by --model_ckpt {copy / EXTRACTOR}/last.pth")
    assert cli("ST/test.py", *words(copy), *said.err.split()[-2:]).code == 0


@pytest.mark.parametrize(
    ("option", "value"), [("seed", 7), ("poison_rate", 0.5), ("target_label", 3), ("target_type", "all2all")]
)
@pytest.mark.parametrize("script", ["unlearn_relearn.py", "ST/train_extractor.py"])
def test_samples_of_another_attack_are_refused_by_their_folder_too(script, option, value, copy, words, cli):
    record = copy / SAMPLES / "options.json"
    content = json.loads(record.read_text())
    content["options"][option] = value
    record.unlink()  # a link to the file of all tests
    record.write_text(json.dumps(content))
    result = cli(script, *words(copy), "--epochs", 1, "--samples", copy / SAMPLES, "--overwrite")
    assert result.code == 2 and f"--{option} {value}" in result.err


@pytest.mark.parametrize("option", ["clean_ratio", "poison_ratio", "target_label"])
def test_an_extractor_of_other_samples_is_refused(option, words, pipeline, cli):
    value, held = {"clean_ratio": (0.3, 0.2), "poison_ratio": (0.1, 0.05), "target_label": (4, 0)}[option]
    result = cli(
        "ST/train_classifier.py", *words(pipeline), f"--{option}", value, "--ckpt", pipeline / EXTRACTOR / "last.pth"
    )
    assert result.code == 2 and f"--{option} {held}, but this step was asked for --{option} {value}" in result.err


def test_two_unlearnings_at_once_do_not_share_a_log(copy, words, cli):
    log = copy / "both.csv"
    with open(log.with_name(".both.csv.lock"), "w") as held:  # as the other run holds it
        fcntl.flock(held, fcntl.LOCK_EX)
        places = ["--checkpoint_save", copy / "b.tar", "--log", log]
        refused(cli("unlearn_relearn.py", *words(copy), "--epochs", 1, "--batch_size", 16, *places), "is writing", log)
    assert not (copy / "b.tar").exists()


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("calculate_gamma.py", "--checkpoint_load", "."),
        ("unlearn_relearn.py", "--checkpoint_save", "/"),
        ("unlearn_relearn.py", "--log", "x" * 300),
        ("audit_dataset.py", "--write_clean", "x" * 300),
        ("reproduce.py", "--verify", "x" * 300),
    ],
)
def test_names_that_no_file_can_have_are_refused(script, option, value, cli):
    refused(cli(script, option, value), option, "name")
