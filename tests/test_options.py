"""Every option is used or refused, and no command line ends in a traceback or leaves a file."""

import os
import re
import shutil
import string
import subprocess
import sys

import pytest
from conftest import ROOT, load_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_bad_input import refused, snapshot
from test_pipeline import EXTRACTOR, NO_TRANS, TUNED, WITH_TRANS

from utils.device import choose_runtime

SCRIPTS = [
    "train_attack_noTrans.py", "finetune_attack_noTrans.py", "calculate_consistency.py", "visualize_consistency.py",
    "calculate_gamma.py", "separate_samples.py", "train_attack_withTrans.py", "train_attack_withTrans_imagenet.py",
    "unlearn_relearn.py", "train_clean_withTrans.py", "ST/train_extractor.py", "ST/train_classifier.py", "ST/test.py",
    "reproduce.py",
]  # fmt: skip
PARSERS = {name: load_script(name).get_parser() for name in SCRIPTS}
# Options whose value is a file or folder to read; another value than a good one is a mistake.
READ = {"data_root", "checkpoint_load", "ckpt", "model_ckpt", "classifier_ckpt", "verify"}
# The same options go to every step; this one needs what earlier steps wrote alone, and names the folder in the next command.
UNREAD = {("calculate_gamma.py", "data_root")}
SENSELESS = [
    ["--clean_ratio", "0.9", "--poison_ratio", "0.2"],
    ["--trigger_type", "gridTrigger", "--ssba_images", "x.npy"],
    ["--target_type", "cleanLabel", "--ssba_images", "x.npy"],
    ["--trigger_type", "SSBA", "--ssba_images", "a.npy", "b.npy", "c.npy"],
    ["--trigger_type", "gridTrigger", "--benign_checkpoint", "x.tar"],
    ["--trigger_type", "fourCornerTrigger"],
    ["--target_label", "10"],
    ["--trans1", "auto", "--trans2", "flip"],
    ["--gamma_low", "2", "--gamma_high", "1"],
    ["--gamma_low", "1", "--clean_per_class"],
    ["--clean_even"],
    ["--strict"],
    ["--workers", "2"],
    ["--poison_ratio", "0.001"],
    ["--dataset", "imagenet"],
    ["--dataset", "tiny"],
    ["--device", "cuda:99"],
    ["--device", "meta"],
    ["--poison_rate", "0.001"],
]  # fmt: skip
nasty = st.one_of(
    st.sampled_from(["", " ", "-1", "0", "nan", "inf", "-inf", "1e999", "0x10", "1_", "٣.٣.", "1,5", "None", "9" * 30, "9" * 5000,
                     "--", "-", "x" * 300, "a/" * 3000, "../../nowhere", "~nobody", "\n", "%s %d", "${HOME}", "$(touch x)"]),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30),
    st.floats(allow_nan=True).map(repr),
    st.integers().map(str),
)  # fmt: skip


def is_bad(script, action, text):
    """Whether ``text`` cannot be a value of an option."""
    if action.dest in READ and (script, action.dest) not in UNREAD:
        return True
    if action.dest == "output_root":
        return not text
    if action.choices:
        return text not in action.choices
    if action.type is None:
        return False
    try:
        action.type(text)
    except Exception:
        return True
    return False


@st.composite
def bad_command(draw):
    """(script, words): a command line with one mistake in it."""
    script = draw(st.sampled_from(SCRIPTS))
    actions = [action for action in PARSERS[script]._actions if action.option_strings and action.dest != "help"]
    kind = draw(st.sampled_from(["value", "value", "value", "missing", "unknown", "senseless", "flag"]))
    if kind == "senseless":
        taken = {word for action in actions for word in action.option_strings}
        fitting = [words for words in SENSELESS if all(word in taken for word in words if word.startswith("--"))]
        fitting += [["--batch_size", "1000", "--poison_ratio", "0.04"]] * (script == "unlearn_relearn.py")
        return script, draw(st.sampled_from(fitting)) if fitting else ["--nonsense"]
    if kind == "unknown":
        name = draw(st.text(string.ascii_lowercase + "_", min_size=1, max_size=12))
        words = [f"--{name}"] if f"--{name}" not in PARSERS[script]._option_string_actions else ["--no_such"]
        return script, [*words, *draw(st.lists(nasty, max_size=2))]
    action = draw(st.sampled_from(actions))
    name = action.option_strings[0]
    if action.nargs == 0:
        return script, [f"{name}=yes"]
    if kind == "missing":
        return script, [name]
    text = draw(
        nasty.filter(lambda text: is_bad(script, action, text)) if action.type or action.choices else st.just("")
    )
    return script, [f"{name}={text}"] if action.type or action.choices else [name]


@settings(max_examples=160, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(command=bad_command())
@example(command=("train_attack_noTrans.py", ["--_", "\r"]))
def test_bad_command_lines_end_in_one_line_and_leave_no_file(command, cli, words, pipeline, monkeypatch, tmp_path):
    script, mistake = command
    monkeypatch.chdir(tmp_path)
    before = snapshot(pipeline)
    good = [str(word) for word in words(pipeline)]
    if script == "reproduce.py":
        good += ["--out", str(tmp_path / "results")]
    result = cli(script, *good, *mistake)
    assert result.code == 2, (command, result)
    assert len(result.err.strip().splitlines()) == 1 and "Traceback" not in result.err, (command, result.err)
    assert snapshot(pipeline) == before and not snapshot(tmp_path), command


@pytest.mark.slow
def test_a_path_of_odd_bytes_is_shown_and_no_traceback(tmp_path, data_root):
    odd = os.fsencode(tmp_path) + b"/\xff caf\xc3\xa9"
    command = [sys.executable, "train_attack_noTrans.py", "--model", "resnet10", "--data_root", data_root]
    done = subprocess.run(
        [*command, "--output_root", odd, "--checkpoint_load", odd + b"/x"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1
    done = subprocess.run([*command, "--output_root", odd, "--epochs", "1"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


# What each option is changed to. Its effect: other words or numbers said, other files, or a refusal.
CHANGES = {
    "dataset": "tiny", "data_root": "nowhere", "model": "resnet18", "seed": 1, "output_root": "{other}", "strict": None,
    "trigger_type": "squareTrigger", "target_type": "all2all", "target_label": 3, "poison_rate": 0.3,
    "benign_checkpoint": "x.tar", "ssba_encoder": "x.pt", "ssba_images": "x.npy",
    "device": "abacus", "precision": "bfloat16", "deterministic": None, "workers": 2,
    "epochs": 4, "batch_size": 13, "lr": 0.03, "learning_rate": 0.03, "eval_freq": 0, "overwrite": None,
    "checkpoint_load": "nowhere.tar", "ckpt": "nowhere.pth", "model_ckpt": "nowhere.pth", "classifier_ckpt": "nowhere.pth",
    "trans1": "flip", "trans2": "none", "draws": 3, "clean_ratio": 0.3, "poison_ratio": 0.1, "gamma_low": 1e-3,
    "gamma_high": 0.1, "clean_per_class": None, "clean_even": None, "schedule": 1, "gamma": 0.5, "checkpoint_save": "{other}/own.tar",
    "log": "{other}/own.csv", "weight_decay": 0.1, "temp": 0.5, "cosine": None, "lr_decay_epochs": 1,
    "train_images": 250, "image_size": 64, "compile": "abacus", "cosine_epochs": 2, "auto": None, "poison_classes": 1, "samples": "nowhere",
    "poison_order": "nowhere.npy", "poison_alike": None, "unlearn_batch_size": 8, "bound_growth": 2, "drop_doubtful": None,
    "stay_dropped": None,
    "mean": 0.5, "std": 0.5, "passes": "relearn", "ascent_bound": 0.5, "val_ratio": 0.3,
    "positives": "authors", "drop_poison": None,
    "lr_decay_rate": 0.5, "save_freq": 2, "trial": 1, "poison_weight": 0.5, "pretrained": "nowhere.pth",
}  # fmt: skip
TRAINED = f"{{root}}/{EXTRACTOR}/last.pth"
# Options that change nothing by design, in the steps where they do not: the size of a batch in inference.
INFERENCE = {"calculate_consistency.py", "visualize_consistency.py", "separate_samples.py"}
# The words that a step is run with; two epochs show a schedule at work.
BASE = {
    "train_attack_noTrans.py": ["--epochs", 2],
    "finetune_attack_noTrans.py": ["--epochs", 2],
    "train_attack_withTrans.py": ["--epochs", 3, "--schedule", 2],
    "train_clean_withTrans.py": ["--epochs", 3, "--schedule", 2],
    "unlearn_relearn.py": ["--epochs", 3, "--batch_size", 16],
    "ST/train_extractor.py": ["--epochs", 3, "--batch_size", 128, "--lr_decay_epochs", 2],
    "ST/train_classifier.py": ["--epochs", 3, "--batch_size", 64, "--learning_rate", 0.5, "--lr_decay_epochs", 2, "--ckpt", TRAINED],
}  # fmt: skip


def outcome(cli, root, script, *words):
    """What a run says, without times and places, and the names of the files it leaves."""
    result = cli(script, *words)
    said = re.sub(r"(seconds|about) [0-9.e+]+( min left)?", "", result.out.replace(str(root), "ROOT"))
    pictures = [path.read_bytes() for path in root.rglob("1.jpg")]
    return result.code, said, {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}, pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [name for name in SCRIPTS if name not in ("reproduce.py", "train_attack_withTrans_imagenet.py")]
)
def test_every_option_has_an_effect_or_is_refused(cli, words, pipeline, tmp_path, script):
    def run(number, *change):
        root, other = tmp_path / f"copy{number}", tmp_path / f"other{number}"
        shutil.copytree(pipeline, root, copy_function=os.link)
        base = [str(word).format(root=root) for word in [*words(root), *BASE.get(script, [])]]
        if "overwrite" in {action.dest for action in PARSERS[script]._actions} and "--overwrite" not in change:
            base.append("--overwrite")
        if change == ("--overwrite",):  # another setting, which only this option allows
            base = [word for word in base if word != "--overwrite"]
            change = ["--trans1", "crop"] if "trans1" in PARSERS[script].format_help() else ["--batch_size", "14"]
        result = outcome(cli, root, script, *base, *(str(word).format(other=other) for word in change))
        shutil.rmtree(root)
        return result

    plain = run("plain")
    assert plain[0] == 0, plain
    for number, action in enumerate(PARSERS[script]._actions):
        if action.dest == "help":
            continue
        assert action.dest in CHANGES, f"say in CHANGES how --{action.dest} is tried"
        value = CHANGES[action.dest]
        if action.dest == "precision" and script not in INFERENCE:  # what auto is not; FCT's auto is float32 everywhere
            value = {"bfloat16": "float32", "float32": "bfloat16"}[choose_runtime("cpu", "auto").precision]
        changed = run(number, f"--{action.dest}", *([] if value is None else [value]))
        if action.dest == "batch_size" and script in INFERENCE:
            assert changed == plain
        else:
            assert changed != plain, f"{script} --{action.dest} has no effect"
            assert changed[0] in (0, 2)


def test_the_imagenet_step_refuses_what_it_cannot_use(cli, words, tmp_path):
    refused(cli("train_attack_withTrans_imagenet.py", *words(tmp_path)), "this step is for --dataset imagenet")


@pytest.mark.parametrize(
    "script, more",
    [
        ("tools/poison_folder.py", ["--target_label", 1]),
        ("train_attack_withTrans_imagenet.py", ["--trigger_type", "sigTrigger"]),
    ],
)
def test_a_default_of_the_scripts_own_is_not_told_of_as_if_it_had_been_typed(script, more, cli, tmp_path):
    own = [
        script,
        "--dataset",
        "folder",
        "--data_root",
        tmp_path,
        *(["--out", tmp_path / "x"] if "tools" in script else []),
    ]
    refused(cli(*own), "--dataset folder" if "tools" in script else "for folder: python train_attack_withTrans.py")
    refused(cli(*own, *more), f"{more[0]} has no use with --dataset folder")
    assert not list(tmp_path.iterdir())


def test_of_ratios_that_overlap_the_one_that_was_given_is_named(cli, words, tmp_path):
    own = ["tools/compare_taus.py", *words(tmp_path)]
    refused(cli(*own, "--poison_ratios", 0.02, 0.9), "--clean_ratio 0.2 and --poison_ratios 0.9 overlap")
    said = cli(*own, "--clean_ratio", 0.97, "--poison_ratios", 0.01)  # of the default of --poison_ratio nothing is said
    refused(said, "no such file")


def test_a_batch_larger_than_the_poisoned_set_is_refused(cli, words, pipeline):
    before = snapshot(pipeline)
    refused(
        cli("unlearn_relearn.py", *words(pipeline), "--batch_size", 21),
        "a batch of 21",
        "D_p, 20 samples",
        "--unlearn_batch_size 20",
    )
    assert snapshot(pipeline) == before


def test_outputs_that_are_inputs_or_folders_are_refused(cli, words, pipeline, tmp_path):
    model, before = pipeline / WITH_TRANS / "1.tar", snapshot(pipeline)
    common = [*words(pipeline), "--batch_size", 16, "--checkpoint_load", model]
    refused(cli("unlearn_relearn.py", *common, "--checkpoint_save", model), "different names")
    refused(cli("unlearn_relearn.py", *common, "--log", tmp_path), "is a folder")
    refused(
        cli("unlearn_relearn.py", *common, "--checkpoint_save", tmp_path / "x.tar", "--log", tmp_path / "x.json"),
        "different",
    )
    assert snapshot(pipeline) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, name, needle",
    [
        ("tools/train_ssba.py", "enc.json", "*.json"),
        ("tools/train_ssba.py", ".", "name a file"),
        ("tools/benchmark.py", "bench.PNG", "*.png"),
    ],
)
def test_a_name_that_what_is_written_beside_it_takes_is_refused(script, name, needle, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli(script, "--out", name), "--out", name, needle)
    assert not list(tmp_path.iterdir())


def test_work_of_another_setting_is_not_replaced_unasked(cli, words, pipeline):
    before = snapshot(pipeline)
    for script, more, needles in (
        ("train_attack_noTrans.py", ["--batch_size", 64, "--lr", 0.5, "--epochs", 2], ["--lr 0.01", "--lr 0.5"]),
        ("train_attack_noTrans.py", ["--batch_size", 64, "--epochs", 9], ["--epochs 2", "--checkpoint_load"]),
        ("finetune_attack_noTrans.py", ["--batch_size", 32, "--epochs", 2], ["--batch_size 64"]),
        ("calculate_consistency.py", ["--trans1", "flip"], ["--trans1 rotate"]),
        ("separate_samples.py", ["--checkpoint_load", pipeline / TUNED / "0.tar"], ["0.tar"]),
        ("separate_samples.py", ["--clean_per_class"], ["no --clean_per_class"]),
        ("unlearn_relearn.py", ["--epochs", 2, "--batch_size", 16, "--lr", 0.5], ["--lr 0.0001"]),
        ("ST/train_extractor.py", ["--epochs", 9, "--batch_size", 64, "--cosine"], ["--epochs 2"]),
    ):
        refused(cli(script, *words(pipeline), *more), "--overwrite", *needles)
    assert snapshot(pipeline) == before


def test_the_same_step_again_replaces_its_result_and_says_so(cli, words, pipeline, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(pipeline, root, copy_function=os.link)
    said = cli("train_attack_noTrans.py", *words(root), "--epochs", 2, "--batch_size", 64)
    assert said.code == 0 and "holds an earlier result, which stays" in said.out and "is replaced" in said.out
    assert (root / NO_TRANS / "log.csv").read_text().count("\n") == 3  # a header and two epochs: nothing was appended
