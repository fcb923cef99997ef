"""reproduce.py: the commands of a row, what it skips, and its table; and (slow) what the quickstart must reach."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script, run_cli
from PIL import Image
from test_bad_input import refused
from test_pipeline import EXTRACTOR, NO_TRANS, TUNED, same_weights

from utils.errors import UserError
from utils.manifest import write_options
from utils.records import DETECTION, MEASURES
from utils.rows import PRESET_DATA, PRESETS, TrainingSet, one_cell, plan, resolve
from utils.run import Run
from utils.steps import Step, end_steps, run, run_apart

TINY = {
    "attack": "--target_label 2",
    "train_attack_noTrans": "--epochs 1 --batch_size 64",
    "finetune_attack_noTrans": "--epochs 1 --batch_size 64",
    "tau": "--trans1 flip --trans2 none",
    "ratios": "--clean_ratio 0.25 --poison_ratio 0.05",
    "separate_samples": "--clean_per_class",
    "train_attack_withTrans": "--epochs 1 --batch_size 64",
    "unlearn_relearn": "--epochs 1 --batch_size 16",
    "train_extractor": "--epochs 1 --cosine --batch_size 64",
    "train_classifier": "--epochs 1 --learning_rate 0.5 --batch_size 32",
}
COLUMNS = ["model", "ACC", "ACC_paper", "ASR", "R_ACC", "AUROC", "Dp_precision", "Dp_recall", "Dc_contamination"]


def test_a_dry_run_prints_the_documents_commands_and_writes_nothing(cli, tmp_path):
    said = cli("reproduce.py", "--dry_run", "--out", tmp_path / "results", "--output_root", tmp_path / "root")
    commands = [line.split("python ")[1] for line in said.out.splitlines() if "python " in line]
    assert [command.split()[0] for command in commands] == [
        "train_attack_noTrans.py", "finetune_attack_noTrans.py", "calculate_consistency.py", "visualize_consistency.py",
        "calculate_gamma.py",
        "separate_samples.py", "train_attack_withTrans.py", "unlearn_relearn.py",
        "ST/train_extractor.py", "ST/train_classifier.py", "ST/test.py",
    ]  # fmt: skip
    assert commands[0].startswith(
        "train_attack_noTrans.py --dataset cifar10 --model resnet18 --trigger_type gridTrigger"
    )
    assert "--epochs 200 --learning_rate 0.5 --temp 0.1 --cosine --save_freq 20 --batch_size 512" in commands[8]
    assert not list(tmp_path.iterdir())


def test_the_row_names_the_attack(cli, tmp_path):
    said = cli("reproduce.py", "--dry_run", "--row", "SIG", "--output_root", tmp_path, "--defences", "D-BR").out
    assert "--trigger_type sigTrigger --target_type cleanLabel" in said and "ST/" not in said


def test_bad_options_end_with_code_2(cli, tmp_path):
    for words in (["--row", "none"], ["--dataset", "cifar11"], ["--seed", "-3"], ["--poison_rate", "2"]):
        result = cli("reproduce.py", "--dry_run", "--output_root", tmp_path, *words)
        assert result.code == 2 and len(result.err.strip().splitlines()) == 1
    for preset in sorted(PRESETS.keys() - {"paper", "full"}):
        words = ["--row", "BadNets-all2one", "--dataset", "imagenet", "--defences", "D-BR", "--preset", preset]
        result = cli("reproduce.py", "--dry_run", "--output_root", tmp_path, *words)
        assert result.code == 2 and "give --preset paper" in result.err and len(result.err.strip().splitlines()) == 1
    result = cli("reproduce.py", "--table", "imagenet", "--model", "resnet10", "--output_root", tmp_path, "--dry_run")
    assert result.code == 2 and "of resnet10 there are none" in result.err


@pytest.mark.parametrize("words", [["reproduce.py", "--dry_run"], ["audit_dataset.py", "--data_root", "nowhere"]])
def test_under_torchrun_only_steps_run(cli, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli(*words)
    assert result.code == 2 and "without torchrun" in result.err


def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.steps.run_apart", lambda *_: pytest.fail("a step is run"))
    (tmp_path / "file").write_text("")
    words = [
        "--table",
        "cifar10",
        "--scale",
        "quick",
        "--rows",
        "SIG",
        "--output_root",
        tmp_path,
        "--out",
        tmp_path / "file",
    ]
    result = cli("reproduce.py", *words)
    assert result.code == 2 and "--out" in result.err


def test_a_row_runs_ends_in_a_table_and_is_skipped_the_second_time(data_root, tmp_path, monkeypatch, capfd, in_process):
    reproduce = load_script("reproduce.py")
    monkeypatch.setitem(PRESETS, "quickstart", TINY)
    monkeypatch.setitem(PRESET_DATA, "quickstart", ("cifar10", "resnet10"))
    words = [
        "--row",
        "BadNets-all2one",
        "--preset",
        "quickstart",
        "--data_root",
        data_root,
        "--output_root",
        tmp_path,
        "--out",
        tmp_path / "results",
    ]
    reproduce.main(list(map(str, words)))
    first = capfd.readouterr().out
    assert first.count("already there") == 0 and first.count("] python ") == 11

    table = pd.read_csv(tmp_path / "results/quickstart.csv")
    assert table.columns.tolist() == COLUMNS and table["model"].tolist() == ["backdoored", "D-BR", "D-ST"]
    assert table[["ACC", "ACC_paper", "ASR", "R_ACC"]].notna().all(axis=None)
    assert table.loc[1:, "AUROC":].notna().all(axis=None) and table.loc[0, "AUROC":].isna().all()
    assert all((tmp_path / "results" / name).is_file() for name in ("quickstart_samples.png", "quickstart_fct.jpg"))

    reproduce.main(list(map(str, words)))
    assert capfd.readouterr().out.count("already there") == 11

    # A picture that was removed is not made by two trainings; a set of samples that was is made anew, and as it was.
    next(tmp_path.rglob("noTrans/**/samples.png")).unlink()
    next(tmp_path.rglob("clean_samples.npy")).unlink()
    reproduce.main(list(map(str, words)))
    said = capfd.readouterr().out
    assert "samples.png is not there any more" in said and said.count("already there") == 10
    assert "separate_samples.py" in next(line for line in said.splitlines() if "already" not in line)
    for other, needle in ((["--defences", "D-BR"], "hold D-ST too"), (["--precision", "bfloat16"], "--precision")):
        with pytest.raises(UserError, match=needle):
            reproduce.main([*map(str, words), *other])

    # A step that was interrupted runs again although its output is there.
    record = next(tmp_path.rglob("SupCon_*/options.json"))
    whole = record.read_text()
    record.write_text(whole.replace('"epochs_done": 1', '"epochs_done": 0'))
    opt = reproduce.get_parser().parse_args(list(map(str, words)))
    opt.variant = None
    steps = plan(opt)[0]
    assert [name for name, step in steps.items() if not step.is_done()] == ["train_extractor"]
    record.write_text(whole)

    # A step with other options, and all that build on it, run again.
    monkeypatch.setitem(TINY, "train_attack_withTrans", "--epochs 1 --batch_size 32")
    with pytest.raises(UserError, match="ended with code 2"):
        reproduce.main(list(map(str, words)))
    assert "--batch_size 64" in capfd.readouterr().err
    reproduce.main([*map(str, words), "--overwrite"])
    again = capfd.readouterr().out
    assert again.count("already there") == 9
    lines = [line for line in again.splitlines() if "] python " in line and "already there" not in line]
    assert "train_attack_withTrans" in lines[0] and "unlearn_relearn" in lines[1]


def test_a_failing_step_stops_the_row_with_its_own_message(tmp_path):
    words = [
        "--dataset",
        "cifar100",
        "--model",
        "resnet10",
        "--data_root",
        tmp_path / "empty",
        "--output_root",
        tmp_path,
    ]
    (tmp_path / "empty/cifar100/train").mkdir(parents=True)
    command = [sys.executable, "reproduce.py", *words, "--out", tmp_path / "results"]
    # A real process: what a step says goes to its streams.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert len(said) == 2 and said[0].startswith("train_attack_noTrans.py: error:") and "code 2" in said[1]


def steps_of(root, out, common):
    """Trainings of three epochs, on the separated samples under ``root``; what they write is under ``out``."""
    common, ratios = [*map(str, common)], ["--clean_ratio", "0.2", "--poison_ratio", "0.05"]
    trained = root / "saved/backdoored_model/poison_rate_0.1/withTrans/cifar10/resnet10/gridTrigger"
    fresh = [*common[:-1], str(out)]
    secure = root / "ST/save/poison_rate_0.1/SupCon_models/cifar10/resnet10/gridTrigger_0.2_0.05"
    extractor = secure / "SupCon_cifar10_resnet10_lr_0.25_decay_0.0001_bsz_64_temp_0.1_trial_0_cosine"
    classifier = secure / "Linear_cifar10_resnet10_lr_0.25_decay_0_bsz_32"
    attack = out / trained.relative_to(root)
    clean = out / "br/1_clean.tar"
    paths = ["--checkpoint_load", trained / "1.tar", "--checkpoint_save", clean, "--log", out / "br/br.csv"]
    unlearn = [*common, *ratios, *map(str, paths), "--batch_size", "16"]
    extract = [*common, *ratios, "--batch_size", "64", "--cosine", "--learning_rate", "0.25"]
    classify = [*common, *ratios, "--batch_size", "32", "--learning_rate", "0.25"]
    own = "options.json"
    return {  # script, options, last output, record
        "train_attack_withTrans": ("train_attack_withTrans.py", [*fresh, "--batch_size", "64"], attack / "2.tar", attack / own),
        "unlearn_relearn": ("unlearn_relearn.py", unlearn, clean, clean.with_suffix(".json")),
        "train_extractor": ("ST/train_extractor.py", extract, extractor / "last.pth", extractor / own),
        "train_classifier": ("ST/train_classifier.py", classify, classifier / "ckpt_epoch_2.pth", classifier / own),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "train_attack_withTrans",
        "unlearn_relearn",
        pytest.param("train_extractor", marks=pytest.mark.slow),
        "train_classifier",
    ],
)
def test_an_interrupted_training_goes_on_from_its_last_checkpoint(
    name, pipeline, words, tmp_path, monkeypatch, in_process, capfd
):
    finish, opt = Run.finish_epoch, SimpleNamespace(overwrite=False)

    def interrupt(self, epoch, *more):
        if epoch == 2:
            raise KeyboardInterrupt
        finish(self, epoch, *more)

    def again(step, ledger="seconds.json"):
        seconds = run({name: step}, opt, tmp_path / ledger)
        return seconds, capfd.readouterr().out

    def weights(step):
        return torch.load(step.output, weights_only=True)["model"]

    made = {}
    for kind in ("straight", "interrupted"):
        root = tmp_path / kind
        shutil.copytree(pipeline, root, copy_function=os.link)
        script, options, output, record = steps_of(root, root / "out", words(root))[name]
        made[kind] = step = Step(script, [*options, "--epochs", "3"], output, record, [])
        assert not step.is_done() and step.interrupted_at() is None
        if kind == "interrupted":
            monkeypatch.setattr(Run, "finish_epoch", interrupt)
            with pytest.raises(UserError, match="code 130"):
                again(step)
            monkeypatch.setattr(Run, "finish_epoch", finish)
            checkpoint, spent = step.interrupted_at()
            assert not step.is_done() and spent > 0
        seconds, said = again(step)
        assert step.is_done() and step.interrupted_at() is None
    assert f"--checkpoint_load {checkpoint}" in said and "Continuing after epoch 1" in said and seconds[name] >= spent
    other = weights(made["straight"])
    assert all(torch.equal(value, other[key]) for key, value in weights(step).items())

    # The same where an earlier result is still in its place, since what the step builds on was made anew.
    source = tmp_path / "source"
    source.write_text("newer")
    step.needs = [SimpleNamespace(output=source, record=source)]
    assert not step.is_done() and step.interrupted_at() is None
    step.needs = [SimpleNamespace(output=tmp_path / "removed to save space")]
    assert not step.is_done() and step.interrupted_at() is None
    step.needs, step.of_this_set = [], lambda made: False  # another took the place of the set it was trained on
    assert not step.is_done() and step.interrupted_at() is None
    step.needs, step.of_this_set = [SimpleNamespace(output=source, record=source)], None
    opt.overwrite = True  # which replaces what is of other settings, and begins nothing anew
    monkeypatch.setattr(Run, "finish_epoch", interrupt)
    with pytest.raises(UserError, match="code 130"):
        again(step)
    monkeypatch.setattr(Run, "finish_epoch", finish)
    checkpoint, _ = step.interrupted_at()
    assert checkpoint.parent.name.endswith("unfinished")
    _, said = again(step)
    assert f"--checkpoint_load {checkpoint}" in said and "is replaced" in said and step.is_done()
    assert all(torch.equal(value, other[key]) for key, value in weights(step).items())


def test_fct_of_another_precision_is_taken_again_and_a_network_is_not_trained_again(pipeline, words):
    def is_done(script, output, record, *options):
        given = [*map(str, words(pipeline)), *options]
        return Step(script, given, pipeline / output, pipeline / record, []).is_done()

    fct = "calculate_consistency.py", f"{TUNED}/1_all.txt", f"{TUNED}/1_fct.json", "--precision"
    assert is_done(*fct, "auto") and is_done(*fct, "float32") and not is_done(*fct, "bfloat16")
    network = (
        "train_attack_noTrans.py",
        f"{NO_TRANS}/1.tar",
        f"{NO_TRANS}/options.json",
        "--epochs",
        "2",
        "--batch_size",
        "64",
    )
    ran_in = json.loads((pipeline / NO_TRANS / "options.json").read_text())["ran_in"]["precision"]
    asked = {name: is_done(*network, "--precision", name) for name in ("auto", "float32", "bfloat16")}
    assert asked == {"auto": True, "float32": ran_in == "float32", "bfloat16": ran_in == "bfloat16"}


def test_an_interrupted_training_goes_on_in_its_own_precision_alone(copy, words):
    record = copy / NO_TRANS / "options.json"
    content = json.loads(record.read_text())
    ran_in = content["ran_in"]["precision"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[ran_in]
    for held, in_fact, goes_on in (
        ("auto", ran_in, {"auto", ran_in}),
        (ran_in, ran_in, {ran_in}),
        (other, other, {other}),
    ):
        changed = {**content, "epochs_done": 1, "options": {**content["options"], "precision": held}}
        changed["ran_in"] = {**content["ran_in"], "precision": in_fact}
        record.unlink()
        record.write_text(json.dumps(changed))
        for asked in ("auto", "float32", "bfloat16"):
            more = [*map(str, words(copy)), "--epochs", "2", "--batch_size", "64", "--precision", asked]
            step = Step("train_attack_noTrans.py", more, copy / NO_TRANS / "1.tar", record, [])
            assert (step.interrupted_at() is not None) == (asked in goes_on), (held, asked)


@pytest.fixture
def other_data(data_root, tmp_path):
    """A data root with as many images under the same names, each turned to its negative."""
    for path in (data_root / "cifar10").rglob("*.png"):
        place = tmp_path / "other" / path.relative_to(data_root)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(place)
    return tmp_path / "other"


def test_steps_run_on_other_images_or_with_another_trigger_are_not_taken_for_done(
    pipeline, data_root, other_data, tmp_path, monkeypatch
):
    monkeypatch.setitem(PRESETS, "quick", TINY | {"attack": ""})

    def set_of(root, row="BadNets-all2one"):
        opt = one_cell("cifar10", row, "quick", 0, "D-BR", tmp_path, data_root=root)
        return TrainingSet(resolve(opt, [])[0])

    records = [f"{NO_TRANS}/options.json", f"{TUNED}/1_fct.json", f"{EXTRACTOR}/options.json"]
    for record in (json.loads((pipeline / name).read_text()) for name in records):
        assert set_of(data_root).is_of(record) and set_of(tmp_path / "none").is_of(record)
        assert not set_of(other_data).is_of(record)
    kitty = set_of(data_root, "Blend-Kitty")
    record = {"data": kitty.record, "poisoned_digest": kitty.digest}
    assert set_of(data_root, "Blend-Kitty").is_of(record)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "mine.png")
    monkeypatch.setattr("utils.triggers.KITTY", tmp_path / "mine.png")
    assert not set_of(data_root, "Blend-Kitty").is_of(record)


def test_the_result_on_other_images_is_replaced_with_overwrite_alone(cli, copy, words, other_data):
    common = [*words(copy), "--epochs", 1, "--batch_size", 64]
    common[common.index("--data_root") + 1] = other_data
    before = (copy / NO_TRANS / "1.tar").read_bytes()
    said = cli("train_attack_noTrans.py", *common, "--epochs", 2)
    refused(said, f"which --data_root {other_data} would replace; give --overwrite")
    assert (copy / NO_TRANS / "1.tar").read_bytes() == before
    assert cli("train_attack_noTrans.py", *common, "--epochs", 2, "--overwrite").code == 0
    assert (copy / NO_TRANS / "1.tar").read_bytes() != before


def test_a_row_on_other_data_reports_no_figures_of_the_old(
    cli, data_root, other_data, tmp_path, monkeypatch, in_process
):
    monkeypatch.setitem(PRESETS, "quick", TINY | {"attack": ""})
    common = ["--row", "BadNets-all2one", "--preset", "quick", "--defences", "D-BR", "--output_root", tmp_path]
    common += ["--out", tmp_path / "results", "--data_root"]
    assert cli("reproduce.py", *common, data_root, "--name", "a").code == 0
    dry = cli("reproduce.py", *common, other_data, "--dry_run", "--overwrite").out
    assert "already there" not in dry
    assert dry.count(" --overwrite  # ") == 6  # the thresholds and the histogram have none
    said = cli("reproduce.py", *common, other_data, "--name", "b")
    assert said.code == 2 and f"which --data_root {other_data} would replace; give --overwrite" in said.err
    done = cli("reproduce.py", *common, other_data, "--name", "b", "--overwrite")
    assert done.code == 0 and "already there" not in done.out
    of_a, of_b = (json.loads((tmp_path / f"results/{name}_manifest.json").read_text()) for name in "ab")
    assert of_a["commands"] != of_b["commands"] and not any("--overwrite" in command for command in of_b["commands"])
    assert cli("reproduce.py", *common, other_data, "--dry_run").out.count("already there") == 8

    # What waits for a step that is to be run is not there, whatever lies in its place.
    next((tmp_path / "saved").rglob("noTrans/**/0.tar")).unlink()
    dry = cli("reproduce.py", *common, other_data, "--dry_run").out.splitlines()
    waiting = [line.split()[1] for line in dry if "already there" not in line]
    assert "train_attack_withTrans.py" not in waiting and len(waiting) == 7

    # Of another row the seconds kept under this name tell nothing.
    manifest, ledger = (tmp_path / f"results/a_{kind}.json" for kind in ("manifest", "seconds"))
    module = load_script("reproduce.py")
    opt = module.get_parser().parse_args([*map(str, common), str(data_root), "--overwrite"])
    module.refuse_other_result(manifest, opt, [], ledger)
    assert ledger.is_file()
    opt.row = "Trojan"
    module.refuse_other_result(manifest, opt, [], ledger)
    assert not ledger.exists()


def test_a_record_that_is_older_than_an_option_was_made_with_its_default(cli, pipeline, words, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(pipeline, root, copy_function=shutil.copy)
    more = ["--clean_per_class", "--overwrite"]
    assert cli("separate_samples.py", *words(root), *more).code == 0
    record = next((root / "saved/separated_samples").rglob("options.json"))
    content = json.loads(record.read_text())
    assert content["options"].pop("clean_even") is False
    record.write_text(json.dumps(content))

    def step(*options):
        given = [str(word) for word in (*words(root), *options)]
        return Step("separate_samples.py", given, record.with_name("clean_samples.npy"), record, [])

    assert step("--clean_per_class").is_done() and not step("--clean_per_class", "--clean_even").is_done()
    said = cli("separate_samples.py", *words(root), "--clean_per_class", "--clean_even")
    refused(said, "of no --clean_even, which --clean_even would replace")
    assert cli("separate_samples.py", *words(root), "--clean_per_class").code == 0


def test_an_interrupted_training_of_other_options_or_a_damaged_one_begins_anew(
    words, tmp_path, monkeypatch, in_process, capfd
):
    options, folder = [*map(str, words(tmp_path))], tmp_path / "saved/benign_model/cifar10/resnet10"
    assert run_cli("train_clean_withTrans.py", *options, "--epochs", "1", "--batch_size", "64") == 0
    record = json.loads((folder / "options.json").read_text())
    record["options"]["epochs"] = 2  # as if it had been stopped after the first of two
    (folder / "options.json").write_text(json.dumps(record))

    def step(*more):
        return Step("train_clean_withTrans.py", [*options, *more], folder / "1.tar", folder / "options.json", [])

    same = step("--epochs", "2", "--batch_size", "64")
    assert same.interrupted_at()[0] == folder / "0.tar"
    assert step("--epochs", "2", "--batch_size", "32").interrupted_at() is None
    assert step("--epochs", "3", "--batch_size", "64").interrupted_at() is None
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:1000])
    assert same.interrupted_at() is None and "damaged; the step begins anew" in capfd.readouterr().out


# Steps in processes of their own


CLEAN_TRAINING = ["--epochs", "1", "--batch_size", "64", "--precision", "float32"]


@pytest.fixture(scope="module")
def typed(words, tmp_path_factory):
    """A clean training as a user types it: (its output root, what it said)."""
    root = tmp_path_factory.mktemp("typed")
    command = [sys.executable, "train_clean_withTrans.py", *map(str, words(root)), *CLEAN_TRAINING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    return root, done.stdout


@pytest.mark.parametrize("method", ["forkserver", "spawn"])  # on Linux; elsewhere
def test_a_step_run_apart_is_the_command_that_is_printed(method, typed, words, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.forked.context", multiprocessing.get_context(method))
    assert run_apart("train_clean_withTrans.py", [*words(tmp_path), *CLEAN_TRAINING], tmp_path / "log") == 0
    of_typed = typed[1].replace(str(typed[0]), str(tmp_path))
    said, expected = (re.sub("seconds [0-9.]+", "", text) for text in ((tmp_path / "log").read_text(), of_typed))
    assert said == expected
    assert same_weights(*(next(root.rglob("0.tar")) for root in (tmp_path, typed[0])))


@pytest.mark.skipif(sys.platform != "linux", reason="steps are forked on Linux")
def test_the_time_of_a_training_is_in_its_log_too_and_is_of_no_other_step_in_its_folder(pipeline, tmp_path):
    folder, opt = tmp_path / "noTrans", SimpleNamespace(overwrite=False)
    folder.mkdir()
    for name in ("options.json", "log.csv"):
        shutil.copy(pipeline / NO_TRANS / name, folder)
    steps = {
        name: SimpleNamespace(
            record=folder / record, command="python x.py", script="x.py", words_now=lambda _: [], is_done=lambda: True
        )
        for name, record in (("training", "options.json"), ("fct", "1_fct.json"))
    }
    (folder / "1_fct.json").write_text('{"outputs": {"1_all.txt": "0"}}')
    seconds = pd.read_csv(folder / "log.csv")["seconds"].sum()
    assert run(steps, opt, tmp_path / "none.json") == {"training": pytest.approx(seconds, abs=0.06)}
    (tmp_path / "some.json").write_text('{"training": 7.5, "fct": 2.5}')
    assert run(steps, opt, tmp_path / "some.json") == {"training": 7.5, "fct": 2.5}


@pytest.mark.parametrize(("words", "begun"), [("--row SIG", True), ("--row SIG --dry_run", False), ("--help", False)])
def test_what_steps_are_forked_from_begins_before_anything_slow_is_imported(words, begun):
    code = (
        "import sys; from multiprocessing import forkserver; from utils import forked; forked.begin(sys.argv); "
        "print(forkserver._forkserver._forkserver_pid is not None, 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(begun), "False"], done.stderr


@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_ends_reproduce_ends_the_step_too_which_says_so(tmp_path, alone):
    command = [sys.executable, "reproduce.py", "--preset", "quickstart", "--output_root", tmp_path, "--out", tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as running:
        said = []
        for line in running.stdout:
            said.append(line)
            if "Running on" in line:  # the first step is at work
                if alone:
                    running.send_signal(signal.SIGTERM)  # as a scheduler does
                else:
                    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    assert running.returncode == 130, said
    assert sorted(line.split(":")[0] for line in said[-2:]) == ["reproduce.py", "train_attack_noTrans.py"], said


def test_steps_of_other_threads_can_be_ended(words, tmp_path):
    log, more, stop = tmp_path / "log", ["--epochs", "1000", "--batch_size", "64"], threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_apart, "train_clean_withTrans.py", [*words(tmp_path / "out"), *more], log, stop)
        while not running.done() and not (log.exists() and "epoch 1/1000" in log.read_text()):
            time.sleep(0.1)
        end_steps(stop)
        assert running.result() == 130
    assert "train_clean_withTrans.py: interrupted; " in log.read_text().splitlines()[-1]
    with pytest.raises(KeyboardInterrupt):  # none begins after that: a thread may just have been between two steps
        run_apart("train_clean_withTrans.py", [*words(tmp_path / "later"), *more], log, stop)
    assert not (tmp_path / "later").exists()


def test_an_interrupted_table_of_several_jobs_ends_their_steps(tmp_path, monkeypatch, capsys):
    reproduce, ended, begun = load_script("reproduce.py"), threading.Event(), []

    def fake(cell, *rest, **more):
        begun.append(cell.row)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(30)
        raise UserError("train_attack_noTrans.py ended with code 130")

    def end(stop):
        stop.set()
        ended.set()

    monkeypatch.setattr(reproduce, "_run_cell", fake)
    monkeypatch.setattr(reproduce, "end_steps", end)
    words = ["--table", "cifar10", "--rows", "SIG", "CL", "Trojan", "--defences", "D-BR", "--jobs", "2"]
    with pytest.raises(KeyboardInterrupt):
        reproduce.main([*words, "--output_root", str(tmp_path)])
    assert ended.is_set() and len(begun) == 2  # the third row is not begun
    assert "is not done" not in capsys.readouterr().out  # the end of the script says it once


@pytest.mark.slow
def test_the_quickstart_reaches_what_the_readme_says(tmp_path):
    command = [sys.executable, "reproduce.py", "--preset", "quickstart", "--output_root", tmp_path, "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    table = pd.read_csv(tmp_path / "quickstart.csv", index_col="model")
    assert table.loc["backdoored", "ASR"] >= 95
    assert table.loc["D-BR", "ASR"] <= 3 and table.loc["D-BR", "ACC"] >= table.loc["backdoored", "ACC"] - 3
    assert table.loc["D-ST", "ASR"] <= 5 and table.loc["D-ST", "ACC"] >= 80
    assert table.loc["D-BR", "Dp_precision"] >= 99 and table.loc["D-BR", "Dc_contamination"] <= 0.1


def test_the_rows_of_a_result_are_the_last_epochs(tmp_path):
    def step(name, rows):
        (tmp_path / name).mkdir()
        lines = [{"epoch": epoch, **dict.fromkeys(MEASURES, value)} for epoch, value in rows]
        pd.DataFrame(lines).to_csv(tmp_path / name / "log.csv", index=False)
        options = lambda: SimpleNamespace(log=tmp_path / name / "log.csv")  # noqa: E731
        return SimpleNamespace(output=tmp_path / name / "x", options=options)

    steps = {
        "train_attack_withTrans": step("a", [(0, 1.0), (1, 2.0)]),
        "separate_samples": step("b", []),
        "unlearn_relearn": step("c", [(-1, 2.0), (0, 3.0), (1, 4.0)]),
    }
    (tmp_path / "b/detection.json").write_text(json.dumps(dict.fromkeys(DETECTION, 0.5)))
    assert [row["ACC"] for row in load_script("reproduce.py").result_rows(steps)] == [2.0, 4.0]
    without = {**dict.fromkeys(DETECTION, 0.5), "AUROC": None}  # every sample is poisoned
    (tmp_path / "b/detection.json").write_text(json.dumps(without))
    assert [row.get("AUROC", 0) for row in load_script("reproduce.py").result_rows(steps)] == [0, None]


def test_options_that_name_the_defaults_are_no_other_settings(tmp_path):
    module = load_script("reproduce.py")
    opt = module.get_parser().parse_args(["--preset", "quickstart", "--row", "BadNets-all2one"])
    write_options(tmp_path / "m.json", opt)
    named = {
        "row": "BadNets-all2one",
        "preset": "quickstart",
        "seed": 0,
        "dataset": "fashion",
        "model": "resnet10",
        "precision": "auto",
    }
    named = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    module.refuse_other_result(tmp_path / "m.json", module.get_parser().parse_args(named), [], tmp_path / "s.json")
    opt.seed = 1
    with pytest.raises(UserError, match="--seed 1"):
        module.refuse_other_result(tmp_path / "m.json", opt, [], tmp_path / "s.json")


def test_a_row_of_poisoned_samples_alone_ends_in_its_table(cli, tmp_path, monkeypatch):
    """It has no AUROC."""
    rows = [dict.fromkeys(["model", "ACC"], 1.0), {"model": "D-BR", "ACC": 2.0, "AUROC": None}]
    module = load_script("reproduce.py")
    monkeypatch.setattr(module, "result_rows", lambda steps: rows)
    monkeypatch.setattr(module, "run", lambda *_: {})
    monkeypatch.setattr(module, "write_options", lambda *_, **__: None)  # no step has run
    words = ["--row", "BadNets-all2all", "--poison_rate", "1", "--preset", "quick"]
    module.main([*words, "--out", str(tmp_path), "--output_root", str(tmp_path)])
    assert (tmp_path / "BadNets-all2all_cifar10.csv").is_file()
