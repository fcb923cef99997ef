"""reproduce.py: the commands of a row, what it skips, and its table; and (slow) what the quickstart must reach."""

import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, load_script, run_cli

from utils.errors import UserError
from utils.rows import PRESET_DATA, PRESETS, plan

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


def test_a_row_runs_ends_in_a_table_and_is_skipped_the_second_time(data_root, tmp_path, monkeypatch, capfd, in_process):
    reproduce = load_script("reproduce.py")
    monkeypatch.setitem(PRESETS, "quickstart", TINY)
    monkeypatch.setitem(PRESET_DATA, "quickstart", ("cifar10", "resnet10"))
    words = [
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


def test_a_failing_step_stops_the_row_with_its_own_message(tmp_path, capfd):
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
    assert run_cli("reproduce.py", *words, "--out", tmp_path / "results") == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 2 and said[0].startswith("train_attack_noTrans.py: error:") and "code 2" in said[1]


@pytest.mark.slow
def test_the_quickstart_reaches_what_the_readme_says(tmp_path):
    command = [sys.executable, "reproduce.py", "--preset", "quickstart", "--output_root", tmp_path, "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    table = pd.read_csv(tmp_path / "quickstart.csv", index_col="model")
    assert table.loc["backdoored", "ASR"] >= 95
    assert table.loc["D-BR", "ASR"] <= 3 and table.loc["D-BR", "ACC"] >= table.loc["backdoored", "ACC"] - 3
    assert table.loc["D-ST", "ASR"] <= 5 and table.loc["D-ST", "ACC"] >= 80
    assert table.loc["D-BR", "Dp_precision"] >= 99 and table.loc["D-BR", "Dc_contamination"] <= 0.1
