"""Whole tables: cells, variants, their records, and the tables made of them beside the paper's figures."""

import json
import math
import re
import shlex
import shutil
import threading
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, load_script
from PIL import Image
from test_bad_input import snapshot

from utils.errors import UserError
from utils.paths import secure_folder
from utils.records import MEASURES, cell_line, read_cells
from utils.rows import PRESETS, ROWS, TABLES, VARIANTS, changed, one_cell, plan, separating_step
from utils.steps import Step, StepError, run

TINY = {
    "attack": "--target_label 2",
    "train_attack_noTrans": "--epochs 1 --batch_size 64 --eval_freq 0",
    "finetune_attack_noTrans": "",
    "tau": "--trans1 shrink --trans2 none",
    "ratios": "--clean_ratio 0.25 --poison_ratio 0.05",
    "separate_samples": "--clean_per_class",
    "train_attack_withTrans": "--epochs 1 --batch_size 64",
    "unlearn_relearn": "--epochs 3 --batch_size 16 --lr 0.01",
    "train_extractor": "--epochs 1 --cosine --batch_size 64",
    "train_classifier": "--epochs 2 --learning_rate 0.5 --batch_size 32",
}


@pytest.fixture
def words(data_root, tmp_path, monkeypatch, in_process):
    monkeypatch.setitem(PRESETS, "quick", TINY)
    return ["--table", "cifar10", "--scale", "quick", "--rows", "BadNets-all2one", "--data_root", data_root,
            "--output_root", tmp_path / "runs", "--out", tmp_path / "results"]  # fmt: skip


def test_a_tables_cells_are_run_recorded_and_not_run_again(words, tmp_path, cli, monkeypatch):
    # Whether a network of one epoch shows a backdoor is up to the processor's rounding; here none does.
    monkeypatch.setattr("utils.audit.POISONED_FROM", math.inf)
    said = cli("reproduce.py", *words)
    assert said.code == 0, said.err
    root, out = tmp_path / "runs/quick_seed0", tmp_path / "results"
    trained = root / "saved/backdoored_model/poison_rate_0.1/withTrans/cifar10/resnet10/gridTrigger"
    log = pd.read_csv(trained / "log.csv").iloc[-1]
    unlearned = pd.read_csv(trained / "unlearn_purify.csv")
    cell = json.loads((out / "cifar10/BadNets-all2one_D-BR_quick_seed0.json").read_text())
    measures = ["ACC", "ACC_paper", "ASR", "R_ACC"]
    assert cell["before"] == pytest.approx(log[measures].to_dict())
    assert cell["after"] == pytest.approx(unlearned.iloc[-1][measures].to_dict())
    of_epochs = unlearned[unlearned["epoch"] >= 0]
    best = max(of_epochs.to_dict("records"), key=lambda row: row["ACC_paper"] - row["ASR"])
    assert cell["paper_selection"]["epoch"] == best["epoch"] + 1 and cell["paper_selection"]["ASR"] == best["ASR"]
    assert cell["epochs"] == {"train_attack_noTrans": 1, "train_attack_withTrans": 1, "unlearn_relearn": 3}
    assert cell["training_images"] == 400 and cell["data_source"] == "image folder" and cell["hardware"]
    assert re.search(rf"Running on \S+, {cell['precision']}\n", said.out)
    assert len(cell["commands"]) == len(cell["seconds"]) == 7 and all(s >= 0 for s in cell["seconds"].values())
    assert cell["detection"] == json.loads(next(root.rglob("detection.json")).read_text())
    assert "--checkpoint_load" in cell["commands"][1]  # there is no step 2, whose checkpoint would be the default

    secure = json.loads((out / "cifar10/BadNets-all2one_D-ST_quick_seed0.json").read_text())
    tested = json.loads(next(root.rglob("*_test.json")).read_text())
    assert secure["after"] == pytest.approx({name: tested[name] for name in measures})
    assert secure["before"] == cell["before"]

    lines = pd.read_csv(out / "cifar10.csv")
    assert lines["defence"].tolist() == ["D-BR", "D-ST"]
    assert lines["ASR"].tolist() == [cell["after"]["ASR"], secure["after"]["ASR"]]

    (out / "cifar10.csv").unlink()  # as where a run was killed between a record and the table
    again = cli("reproduce.py", *words)
    assert pd.read_csv(out / "cifar10.csv").equals(lines)
    assert again.code == 0 and again.out.count("is there already") == 2 and "] python" not in again.out
    other = cli("reproduce.py", *words, "--precision", "float32")
    assert other.code == 2 and "made by other commands" in other.err and "--overwrite" in other.err

    # An interrupted table goes on with the cell that has no record; its finished steps are not run again.
    (out / "cifar10/BadNets-all2one_D-ST_quick_seed0.json").unlink()
    rest = cli("reproduce.py", *words)
    assert (
        rest.out.count("is there already") == 1
        and rest.out.count("(already there)") == rest.out.count("] python ") == 9
    )

    # Variants have records and a table of their own, and leave the cells' checkpoints alone.
    kept = (trained / "0_unlearn_purify.tar").read_bytes()
    varied = cli("reproduce.py", *words, "--ablations", "unlearn_only", "oracle")
    assert varied.code == 0, varied.err
    lines = pd.read_csv(out / "cifar10_ablations.csv")
    assert sorted(zip(lines["defence"], lines["variant"], strict=True)) == [
        ("D-BR", "oracle"), ("D-BR", "unlearn_only"), ("D-ST", "oracle")
    ]  # fmt: skip
    assert (trained / "0_unlearn_purify.tar").read_bytes() == kept
    assert lines.set_index(["defence", "variant"]).loc[("D-BR", "oracle"), "Dp_precision"] == 100
    only = pd.read_csv(trained / "unlearn_purify_unlearn_only.csv")
    assert only["loss_Dp"].notna().sum() == 3 and "loss_Dc" not in only
    assert len(pd.read_csv(out / "cifar10.csv")) == 2

    # One that has nothing to be made of does not keep the next from running.
    stopped = cli("reproduce.py", *words, "--defences", "D-BR", "--ablations", "likeness", "random_clean")
    assert stopped.code == 2 and "1 of 2 cells are not done: BadNets-all2one_D-BR_quick_seed0_likeness: " in stopped.err
    assert "(step 3) saw no backdoor" in stopped.err
    assert sorted(pd.read_csv(out / "cifar10_ablations.csv")["variant"]) == [
        "oracle",
        "oracle",
        "random_clean",
        "unlearn_only",
    ]

    rate = cli("reproduce.py", *words, "--poison_rate", "0.2", "--dry_run")
    assert "quick_seed0_rate_0.2" in rate.out and "--poison_rate 0.2" in rate.out
    # Another network is no cell of the table, and no reason to refuse for the one that is there.
    network = cli("reproduce.py", *words, "--model", "resnet18", "--dry_run")
    assert "D-BR_quick_seed0_resnet18" in network.out and "--model resnet18" in network.out
    assert "seed0_resnet" not in cli("reproduce.py", *words, "--model", "resnet10", "--dry_run").out


def test_the_tables_own_poison_rate_is_no_other_setting(cli, tmp_path):
    def commands(*more):
        words = ["--table", "cifar10", "--scale", "cpu", "--rows", "SIG", "--defences", "D-BR", "--dry_run"]
        return cli("reproduce.py", *words, "--output_root", tmp_path, *more).out

    assert commands("--poison_rate", 0.1) == commands()
    assert "--poison_rate 0.05" in commands("--poison_rate", 0.05)


def test_the_paper_scale_is_the_documents_commands(cli, tmp_path):
    said = cli("reproduce.py", "--table", "cifar10", "--dry_run", "--output_root", tmp_path).out
    commands = [line.split("python ")[1] for line in said.splitlines() if "python " in line]
    assert said.count("\n# ") + said.startswith("# ") == 14
    assert sum("train_attack_withTrans.py" in command and "--epochs 200" in command for command in commands) == 7
    assert all("--train_images" not in command and "--model resnet18" in command for command in commands)
    assert not any(tmp_path.iterdir())


def test_the_full_scale_trains_as_the_paper_and_separates_as_long(cli, tmp_path):
    words = ["--table", "cifar10", "--rows", "SIG", "--dry_run", "--output_root", tmp_path]
    options = {}  # by scale and script, but for what names the folder
    for scale in ("paper", "full", "long"):
        lines = cli("reproduce.py", *words, "--scale", scale, "--model", "resnet18").out.splitlines()
        commands = [shlex.split(line.split("  # ")[0]) for line in lines if "python " in line]
        options[scale] = {
            script: [word for word in more if f"{scale}_seed0" not in word] for _, script, *more in commands
        }
    full, paper, long = (options[scale] for scale in ("full", "paper", "long"))
    for script in ("train_attack_noTrans.py", "train_attack_withTrans.py"):
        assert full[script] == paper[script] != long[script]
    for script in ("calculate_consistency.py", "separate_samples.py"):
        assert full[script] == long[script] != paper[script]
    assert full["unlearn_relearn.py"][-5:] == ["--epochs", "5", "--lr", "0.0004", "--drop_doubtful"]
    assert "--epochs 200 --learning_rate 0.5 " in " ".join(full["ST/train_extractor.py"])
    assert full["ST/train_extractor.py"][-2:] == ["--positives", "unsuspected"]
    assert "--epochs 10 --learning_rate 5 --batch_size 512 --ascent_bound 10" in " ".join(
        full["ST/train_classifier.py"]
    )
    assert "finetune_attack_noTrans.py" in paper.keys() - full.keys()


def test_a_dry_run_is_a_list_of_commands_with_what_each_waits_for(cli, tmp_path):
    said = cli("reproduce.py", "--table", "cifar10", "--rows", "SIG", "CL", "--dry_run", "--output_root", tmp_path).out
    lines = [line for line in said.splitlines() if not line.startswith("# ")]
    assert len(lines) == len(set(lines)) == 2 * 8 + 1 + 2 * 3  # the steps of SD are there once a row; CL has one more
    waits = {}
    for line in lines:
        assert shlex.split(line, comments=True)[0] == "python"  # a shell runs it as it stands
        number, _, after = line.split("  # ")[1].partition(": ")
        waits[int(number)] = [int(word) for word in after.removeprefix("after ").split()] if after != "first" else []
    assert list(waits) == list(range(1, len(lines) + 1))
    assert all(other < number for number, others in waits.items() for other in others)
    unlearning = next(number for number, line in enumerate(lines, 1) if "unlearn_relearn.py" in line)
    needs = [lines[number - 1].split()[1] for number in waits[unlearning]]
    assert needs == ["train_attack_withTrans.py", "separate_samples.py"]


@pytest.mark.parametrize("devices", [["cpu", "cuda:7"], ["cpu,cuda:7"]], ids=str)
def test_rows_run_at_once_on_devices_in_turn_and_one_failure_stops_no_other(tmp_path, monkeypatch, capsys, devices):
    reproduce = load_script("reproduce.py")
    ran, together = [], threading.Barrier(3, timeout=30)

    def fake(cell, steps, resolved, table, stop, quiet=False):
        assert quiet
        if cell.defences == ["D-BR"]:
            together.wait()  # passes only where three rows run at the same time
        ran.append((cell.row, cell.defences[0], cell.device))
        if cell.row == "Trojan":
            raise StepError("no such luck", steps["train_attack_noTrans"].command)

    monkeypatch.setattr(reproduce, "_run_cell", fake)
    words = ["--table", "cifar10", "--rows", "SIG", "CL", "Trojan", "--jobs", "3", "--devices", *devices]
    with pytest.raises(
        UserError, match=r"2 of 6 cells are not done: Trojan_D-BR_paper_seed0: no such luck; Trojan_D-ST_.* before"
    ):
        reproduce.main([*words, "--output_root", str(tmp_path)])
    assert set(ran) == {("SIG", "D-BR", "cpu"), ("SIG", "D-ST", "cpu"), ("CL", "D-BR", "cuda:7"), ("CL", "D-ST", "cuda:7"),
                        ("Trojan", "D-BR", "cpu")}  # fmt: skip


def test_a_step_of_several_rows_writes_to_the_rows_log(tmp_path, capfd):
    log = tmp_path / "row.log"
    log.write_text("of the step before\n")
    step = Step("calculate_gamma.py", ["--checkpoint_load", "none.tar"], tmp_path / "x", tmp_path / "x.json", [])
    with pytest.raises(UserError, match=r"code 2.*row\.log"):
        run({"gamma": step}, SimpleNamespace(overwrite=False), tmp_path / "seconds.json", log)
    before, said = log.read_text().splitlines()
    assert before == "of the step before" and said.startswith("calculate_gamma.py: error: no such file: ")
    assert "calculate_gamma.py: error" not in "".join(capfd.readouterr())


def test_bad_tables_end_with_code_2(cli, tmp_path):
    for words, part in (
        (["--table", "cifar10", "--row", "SIG"], "--rows"),
        (["--table", "imagenet", "--scale", "cpu"], "imagenet has --scale paper"),
        (["--table", "imagenet", "--rows", "SIG"], "the paper has no row SIG on imagenet"),
        (["--rows", "SIG"], "give --table"),
        (["--jobs", "2"], "give --table"),
        (["--table", "cifar10", "--ablations", "authors_mask", "--defences", "D-BR"], "no variant of D-BR"),
        (
            ["--table", "cifar10", "--ablations", "finetune", "bounded", "--defences", "D-BR"],
            "bounded is no variant of D-BR",
        ),
        (["--table", "cifar11"], "invalid choice"),
        (["--table", "cifar10", "--devices", "cpu,abacus"], "abacus is no device"),
        (["--table", "cifar10", "--device", "abacus"], "abacus is no device"),
    ):
        result = cli("reproduce.py", "--dry_run", "--output_root", tmp_path, *words)
        assert result.code == 2 and part in result.err and len(result.err.strip().splitlines()) == 1


def test_every_variant_changes_its_defences_commands(cli, tmp_path):
    for defence, variants in VARIANTS.items():
        words = [
            "--table",
            "cifar10",
            "--scale",
            "cpu",
            "--rows",
            "CL",
            "--defences",
            defence,
            "--output_root",
            tmp_path,
        ]
        base = cli("reproduce.py", *words, "--dry_run").out
        for variant in variants:
            said = cli("reproduce.py", *words, "--dry_run", "--ablations", variant).out
            for step, changes in variants[variant].items():
                if step == "samples":
                    assert (
                        "tools/ablation_samples.py" in said
                        and f"--kind {changes} " in said
                        and "ablation_samples" not in base
                    )
                    continue
                ours, theirs = (
                    [shlex.split(line) for line in text.splitlines() if f"{step}.py" in line] for text in (said, base)
                )
                pairs = []
                for word in shlex.split(changes):  # an option with its values
                    if word.startswith("--"):
                        pairs.append([word])
                    else:
                        pairs[-1].append(word)
                joined = [" ".join(words) + " " for words in (ours[-1], theirs[-1])]
                assert all(f"{' '.join(pair)} " in joined[0] for pair in pairs), (variant, joined)
                assert not all(f"{' '.join(pair)} " in joined[1] for pair in pairs), variant


@pytest.mark.parametrize(("positives", "first"), [("authors", "authors_mask"), ("unsuspected", "unsuspected")])
def test_variants_that_begin_alike_share_an_extractor(positives, first, cli, tmp_path):
    words = ["--table", "cifar10", "--rows", "CL", "--defences", "D-ST", "--output_root", tmp_path, "--dry_run"]
    said = cli("reproduce.py", *words, "--ablations", first, f"{positives}_bounded", "bounded").out
    extractors = [line for line in said.splitlines() if "ST/train_extractor.py" in line]
    assert [f"--positives {positives}" in line for line in extractors] == [True, False]
    assert said.count("ST/train_classifier.py") == said.count("ST/test.py") == 3


def test_changed_puts_options_in_the_place_of_those_that_are_there():
    assert changed(["--a", "1", "--b", "2", "3", "--c"], "--b 4 --d") == ["--a", "1", "--c", "--b", "4", "--d"]
    assert changed(["--lr", "0.1"], "") == ["--lr", "0.1"]


# make_tables


def cell(row, defence, seed, scale="cpu", table="cifar10", rule="last epoch", commands=(), **after):
    before = {"ACC": 80.0 + seed, "ACC_paper": 79.0 + seed, "ASR": 99.0, "R_ACC": 1.0}
    after = {"ACC": 78.0, "ACC_paper": 77.5, "ASR": 0.25, "R_ACC": 75.0} | after
    return {
        "table": table, "row": row, "defence": defence, "scale": scale, "seed": seed, "before": before, "after": after,
        "rule": rule, "commands": commands,
        "paper_selection": {"epoch": 3, **after}, "detection": {"AUROC": 0.99}, "versions": {"torch": "2"}, "seconds": {"a": 1},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "paper.csv").write_bytes((ROOT / "results/paper.csv").read_bytes())

    def add(*args, **more):
        one = cell(*args, **more)
        name = f"{one['row']}_{one['defence']}_{one['scale']}_seed{one['seed']}.json"
        (tmp_path / "cifar10" / name).write_text(json.dumps(one))

    add("SIG", "D-BR", 0, ASR=0.5)
    add("SIG", "D-BR", 1, ASR=1.5)
    add("SIG", "D-BR", 0, scale="quick", ASR=50.0)
    add("CL", "D-BR", 0, ASR=7.0)
    add("CL", "D-BR", 0, scale="paper", ACC_paper=92.5, ASR=0.0)
    named = ["python x.py --epochs 2 --precision bfloat16", "python y.py"]
    add("CL", "D-BR", 0, scale="full", rule="the first", commands=named, ACC_paper=91.5, ASR=0.5)
    add("CL", "D-ST", 0, scale="full", ACC_paper=90.5, ASR=1.5)
    add("BadNets-all2all", "D-ST", 0, ACC_paper=58.0)
    add("BadNets-all2all", "D-ST", 0, scale="long", ACC_paper=66.0)
    return tmp_path


def test_tables_show_paper_ours_and_difference_and_what_was_not_run(results, cli):
    said = cli("tools/make_tables.py", "--results", results)
    assert said.code == 0, said.err
    lines = {tuple(line.split(" | ")[:2]): line for line in (results / "tables.md").read_text().splitlines()}
    sig = lines["| SIG", "D-BR"].split(" | ")
    spread = np.std([0.5, 1.5], ddof=1)
    assert sig[2:5] == ["92.73 / 0.24", f"77.50 ± 0.00 / 1.00 ± {spread:.2f}", "-15.23 / +0.76"]
    assert sig[8] == "cpu, 2 seeds"
    assert "`--scale cpu --rows SIG --defences D-BR --seeds 0 1`" in sig[9]
    assert "`python reproduce.py --table cifar10` and the options" in (results / "tables.md").read_text()
    named = next(line for line in (results / "tables.md").read_text().splitlines() if "full (the first)" in line)
    assert named.endswith("`--scale full --rows CL --defences D-BR --precision bfloat16` |")
    nothing_run = (results / "tables.md").read_text().split("**CIFAR-100**: not run")[1]
    assert "\n| Trojan | 75.75 / 100.00 | 74.52 / 0.00 | 68.04 / 0.08 |\n" in nothing_run
    backdoored = lines["| SIG", "backdoored"].split(" | ")
    assert backdoored[3].startswith("79.50 ± 0.71 / 99.00") and backdoored[4] == "-13.38 / -0.69"
    of_cl = [
        line.split(" | ") for line in (results / "tables.md").read_text().splitlines() if line.startswith("| CL |")
    ]
    assert [(cells[1], cells[3], cells[4], cells[8]) for cells in of_cl] == [
        ("backdoored", "79.00 / 99.00", "-14.20 / +5.66", "paper"),
        ("D-BR", "92.50 / 0.00", "+0.42 / +0.00", "paper"),
        ("D-BR", "91.50 / 0.50", "-0.58 / +0.50", "full (the first)"),
        ("D-ST", "90.50 / 1.50", "+0.04 / -4.90", "full"),
    ]
    longer = lines["| BadNets-all2all", "D-ST"].split(" | ")  # before cpu
    assert longer[3] == "66.00 / 0.25" and longer[8] == "long" and "--scale long --rows BadNets-all2all" in longer[9]
    assert "not run" in lines["| SIG", "D-ST"] and "not run" in lines["| Trojan", "backdoored"]
    tex = (results / "tables.tex").read_text()
    assert tex.count(r"\begin{tabular}") == 3 == tex.count(r"\end{tabular}") and r"ACC\_paper" in tex
    widths = {line.count("&") for line in tex.splitlines() if line.endswith(r"\\")}
    assert len(widths) <= 1
    assert (results / "cifar10.png").stat().st_size > 10_000 and not (results / "imagenet.png").exists()


def test_a_row_that_the_papers_table_lacks_stands_below_its_rows(results, cli, monkeypatch):
    (results / "cifar10/SSBA_D-BR_cpu_seed0.json").write_text(json.dumps(cell("SSBA", "D-BR", 0, ASR=2.5)))
    assert cli("tools/make_tables.py", "--results", results).code == 0
    table = (results / "tables.md").read_text().split("**CIFAR-100**")[0]
    lines = [line.split(" | ") for line in table.strip().splitlines()]
    assert [line[:5] for line in lines[-2:]] == [
        ["| SSBA", "backdoored", "", "79.00 / 99.00", ""],
        ["| SSBA", "D-BR", "", "77.50 / 2.50", ""],
    ]
    assert lines[-1][-1] == "`--scale cpu --rows SSBA --defences D-BR` |" and "nan" not in table
    module, drawn = load_script("tools/make_tables.py"), []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    paper = pd.read_csv(results / "paper.csv")
    _, of_table, _ = next(module.tables(results, paper))
    module.picture(results / "x.png", "cifar10", paper, of_table)
    of_asr = drawn[0].axes[4]  # of D-BR
    assert [label.get_text() for label in of_asr.get_xticklabels()] == [*TABLES["cifar10"], "SSBA"]
    assert of_asr.containers[1][-1].get_height() == 2.5


def test_seeds_of_several_precisions_have_a_command_each_and_a_selection_that_is_not_told_is_not_shown(results, cli):
    for seed, more in enumerate(({"paper_selection": None, "commands": ["python x.py --precision bfloat16"]}, {})):
        path = results / f"cifar10/SIG_D-BR_cpu_seed{seed}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    path = results / "cifar10/CL_D-ST_full_seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"paper_selection": None}))
    said = cli("tools/make_tables.py", "--results", results)
    assert said.code == 0, said.err
    lines = {tuple(line.split(" | ")[:2]): line for line in (results / "tables.md").read_text().splitlines()}
    sig, cl = lines["| SIG", "D-BR"].split(" | "), lines["| CL", "D-ST"].split(" | ")
    one, other = (
        "--scale cpu --rows SIG --defences D-BR --precision bfloat16",
        "--scale cpu --rows SIG --defences D-BR --seeds 1",
    )
    assert sig[7] == "77.50 / 1.50" and sig[9] == f"`{one}; {other}` |"
    assert cl[7] == "" and "nan" not in (results / "tables.md").read_text()


def test_variants_come_beside_the_defence_as_it_is(results, cli):
    folder = results / "cifar10_ablations"
    folder.mkdir()
    for variant, seed, scale, asr in (
        ("relearn_only", 0, "cpu", 98.0),
        ("unlearn_only", 1, "cpu", 3.0),
        ("unlearn_only", 0, "cpu", 1.0),
        ("finetune", 1, "cpu", 97.0),
        ("oracle", 0, "quick", 2.0),
        ("rate_0.01", 0, "cpu", 4.0),
        ("rate_0.01_oracle", 0, "cpu", 5.0),
        ("random", 0, "cpu", 96.0),
    ):
        one = {**cell("SIG", "D-BR", seed, scale=scale, ASR=asr), "variant": variant}
        if variant == "random":
            one["before"] = one["before"] | {"ACC": 82.5}
        (folder / f"SIG_D-BR_{scale}_seed{seed}_{variant}.json").write_text(json.dumps(one))
    assert cli("tools/make_tables.py", "--results", results).code == 0
    text = (results / "tables.md").read_text().split("**CIFAR-10, variants**")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| SIG")]
    # before, then as in rows.VARIANTS; ASR is the sixth column
    assert [(row[2], row[5], row[7]) for row in rows] == [
        ("backdoored", "99.00 ± 0.00", "cpu, 2 seeds"),
        ("as it is", f"1.00 ± {np.std([0.5, 1.5], ddof=1):.2f}", "cpu, 2 seeds"),
        ("unlearn_only", f"2.00 ± {np.std([1, 3], ddof=1):.2f}", "cpu, 2 seeds"),
        ("relearn_only", "98.00", "cpu"),
        ("finetune", "97.00", "cpu, seed 1"),
        ("random, from 82.50 / 99.00", "96.00", "cpu"),
        ("rate_0.01, backdoored", "99.00", "cpu"),
        ("rate_0.01, as it is", "4.00", "cpu"),
        ("rate_0.01, oracle", "5.00", "cpu"),
    ]
    assert len(pd.read_csv(results / "cifar10_ablations.csv")) == 8


@pytest.mark.parametrize("setting", ["", "rate_0.01", "resnet18_nopool"])
def test_a_variants_name_and_its_setting_are_told_apart(setting):
    split_variant = load_script("tools/make_tables.py").split_variant
    for defence, variants in VARIANTS.items():
        for name in ["", *variants]:
            assert split_variant("_".join(filter(None, [setting, name])), defence) == (setting, name)


def test_the_readme_gets_the_tables_between_its_markers_and_nothing_else(results, cli, tmp_path):
    readme = tmp_path / "README.md"
    middle = "".join(f"<!-- table {name} -->\nold\n<!-- /table {name} -->\nkept {name}\n" for name in TABLES)
    readme.write_text(f"before\n{middle}after\n")
    assert cli("tools/make_tables.py", "--results", results, "--readme", readme).code == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table cifar10 -->\n**CIFAR-10**") and "old" not in text
    assert (
        text.endswith("<!-- /table imagenet -->\nkept imagenet\nafter\n")
        and "kept cifar10\n<!-- table cifar100" in text
    )
    readme.write_text("no markers")
    refused = cli("tools/make_tables.py", "--results", results, "--readme", readme)
    assert refused.code == 2 and "markers" in refused.err and readme.read_text() == "no markers"


def test_tables_go_to_the_one_document_that_has_their_markers(results, cli, tmp_path):
    first, second = tmp_path / "README.md", tmp_path / "page.md"
    marked = {name: f"<!-- table {name} -->\nold\n<!-- /table {name} -->\n" for name in TABLES}
    first.write_text(marked["cifar10"] + marked["cifar100"])
    second.write_text("page\n" + marked["imagenet"])
    words = ("tools/make_tables.py", "--results", results, "--readme", first, second)
    assert cli(*words).code == 0
    assert "**CIFAR-10**" in first.read_text() and "**ImageNet subset**" not in first.read_text()
    assert second.read_text().startswith("page\n<!-- table imagenet -->\n**ImageNet subset**")
    before = first.read_text()
    second.write_text(marked["imagenet"] + marked["cifar10"])
    refused = cli(*words)
    assert refused.code == 2 and "page.md" in refused.err and "<!-- table cifar10 -->" in refused.err
    assert first.read_text() == before and "old" in second.read_text()


PAPERS_HEAD = b"table,row,model,ACC,ASR\n"


@pytest.mark.parametrize(
    "name, content",
    [
        *(
            ("paper.csv", content)
            for content in (
                b"\xff\xfe\x00",
                b"",
                PAPERS_HEAD,
                PAPERS_HEAD + b"cifar10,SIG,D-BR,92%,1\n",
                PAPERS_HEAD + b"cifar10,,D-BR,92,1\n",
                PAPERS_HEAD + b"cifar9,SIG,D-BR,92,1\n",
                PAPERS_HEAD + 2 * b"cifar10,SIG,D-BR,92,1\n",
            )
        ),
        *(("README.md", content) for content in (None, b"\xff\xfe\x00", b"")),
    ],
)
def test_a_missing_or_strange_file_is_one_line_and_nothing_is_written(name, content, results, cli, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"<!-- table {table} -->\n<!-- /table {table} -->\n" for table in TABLES))
    strange = results / name if name == "paper.csv" else readme
    strange.unlink()
    if content is not None:
        strange.write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = cli("tools/make_tables.py", "--results", results, "--readme", readme)
    assert refused.code == 2 and name in refused.err and refused.err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_without_a_file_of_its_own_a_folder_stands_beside_the_bundled_papers_figures(results, cli):
    assert cli("tools/make_tables.py", "--results", results).code == 0
    written = (results / "tables.md").read_text()
    (results / "paper.csv").unlink()
    assert cli("tools/make_tables.py", "--results", results).code == 0
    assert (results / "tables.md").read_text() == written and not (results / "paper.csv").exists()


@pytest.mark.parametrize(
    "change",
    [{"versions": []}, {"versions": {}}, {"before": []}, {"detection": None}, {"seconds": {"a": "b"}}, {"paper_selection": "x"},
     {"commands": [1]}, {"commands": None}, {"after": {"ACC": "x"}}, {"seed": True}, {"before": dict.fromkeys(MEASURES, -5.0)},
     {"after": dict.fromkeys(MEASURES, True)}, {"after": dict.fromkeys(MEASURES, 101.0)}, None],
    ids=str,
)  # fmt: skip
def test_a_strange_record_is_named(results, cli, change):
    strange = [] if change is None else cell("SIG", "D-BR", 3) | change
    (results / "cifar10/strange.json").write_text(json.dumps(strange))
    refused = cli("tools/make_tables.py", "--results", results)
    assert refused.code == 2 and "strange.json" in refused.err and refused.err.count("\n") == 1


@pytest.mark.parametrize("name", ["tables.md", "tables.tex", "cifar10.csv", "cifar10.png"])
def test_files_of_the_users_own_are_no_tables_to_replace(results, cli, name):
    (results / name).write_text("my notes\n")
    before = snapshot(results)
    refused = cli("tools/make_tables.py", "--results", results)
    assert refused.code == 2 and f"{name} is no " in refused.err and refused.err.count("\n") == 1
    assert snapshot(results) == before


@pytest.mark.parametrize(("name", "content"), [("cifar10/notes.json", '{"a": 1}'), ("cifar10.csv", "a,b\n1,2\n")])
def test_a_strange_file_among_the_records_is_named_before_any_step(cli, tmp_path, name, content, monkeypatch):
    monkeypatch.setattr("utils.steps.run_apart", lambda *_, **__: pytest.fail("a step is run"))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / name).write_text(content)
    words = ["--table", "cifar10", "--scale", "quick", "--rows", "SIG", "--output_root", tmp_path / "runs"]
    said = cli("reproduce.py", *words, "--out", tmp_path)
    assert said.code == 2 and name in said.err and (tmp_path / name).read_text() == content


@pytest.mark.parametrize("name", ["paper.csv", "mine_fct.jpg"])
def test_a_row_replaces_no_file_of_the_users_own(cli, tmp_path, name, monkeypatch):
    monkeypatch.setattr("utils.steps.run_apart", lambda *_, **__: pytest.fail("a step is run"))
    (tmp_path / name).write_text("theirs")
    words = ["--row", "SIG", "--preset", "quick", "--output_root", tmp_path / "runs", "--out", tmp_path]
    said = cli("reproduce.py", *words, "--name", name.split("_")[0].removesuffix(".csv"))
    assert said.code == 2 and f"{name} is of no result of this script" in said.err
    assert (tmp_path / name).read_text() == "theirs"


@pytest.mark.parametrize("change", [{}, {"table": "cifar100"}, {"seed": 1}, {"variant": "rate_0.01"}], ids=str)
def test_a_record_in_the_place_of_another_is_named(results, cli, change):
    """A copy, for one, would count as one more seed."""
    record = results / "cifar10/CL_D-BR_cpu_seed0.json"
    if change:
        record.write_text(json.dumps(json.loads(record.read_text()) | change))
    else:
        record = record.with_stem("copy of CL")
        record.write_bytes((results / "cifar10/CL_D-BR_cpu_seed0.json").read_bytes())
    refused = cli("tools/make_tables.py", "--results", results)
    assert refused.code == 2 and record.name in refused.err and "holds the cell" in refused.err


def test_the_papers_figures_are_complete():
    paper = pd.read_csv(ROOT / "results/paper.csv")
    for table, rows in TABLES.items():
        part = paper[paper["table"] == table]
        assert tuple(dict.fromkeys(part["row"])) == rows
        models = ["backdoored", "D-BR"] + ["D-ST"] * (table != "imagenet")
        assert part["model"].tolist() == models * len(rows)
    assert set().union(*TABLES.values()) <= set(ROWS)


def test_the_readme_shows_the_tables_of_the_records():
    module, results = load_script("tools/make_tables.py"), ROOT / "results"
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "results/cifar10.md").read_text()
    for table, _, rows in module.tables(results, pd.read_csv(results / "paper.csv")):
        text = module.markdown(table, rows)
        assert f"<!-- table {table} -->\n{text}\n<!-- /table {table} -->" in readme
    for table, rows in module.ablations(results):
        text = module.ablations_markdown(table, rows)
        assert f"<!-- table {table}_ablations -->\n{text}\n<!-- /table {table}_ablations -->" in page
    for path in (ROOT / "results").glob("cifar10*/*.json"):  # every record is of a command that this version still has
        record = json.loads(path.read_text())
        assert re.fullmatch(r"python [A-Za-z_/]+\.py( .*)?", record["commands"][-1])
        assert record["scale"] in ("cpu", "long", "full", "paper") and record["commit"]


def test_the_readmes_table_of_d_br_is_of_the_records():
    lines = pd.read_csv(ROOT / "results/cifar10.csv", keep_default_na=False)
    lines = lines[(lines["defence"] == "D-BR") & (lines["variant"] == "")].set_index(["row", "scale", "seed"])

    def cell(row, scale, seed=0):
        line = lines.loc[row, scale, seed]
        return tuple(
            f"{line[first]:.2f} / {line[last]:.2f}" for first, last in (("before_ACC", "before_ASR"), ("ACC", "ASR"))
        )

    text = (ROOT / "README.md").read_text().split("- **D-BR**: ACC / ASR of the last epoch")[1].split("Bold: ASR")[0]
    table = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("  | ")][
        2:
    ]
    assert [row[0] for row in table] == list(TABLES["cifar10"])
    for row, *shown in table:
        found = [part.replace("*", "").replace(" ¹", "") for part in shown]
        (before, paper), (of_full, full) = cell(row, "paper"), cell(row, "full")
        assert found == [before, paper, full, *(" → ".join(cell(row, "long", seed)) for seed in (0, 1))]
        assert ("¹" in shown[2]) == (of_full != before)
        for part, name, seed in zip(shown[1:], ("paper", "full", "long", "long"), (0, 0, 0, 1), strict=True):
            line = lines.loc[row, name, seed]
            both = line["ASR"] <= 1 and line["before_ACC"] - line["ACC"] <= 1.5
            assert ("**" in part) == both, (row, name, seed)


def test_the_readmes_table_of_d_st_is_of_the_records_where_there_are_some():
    """Of CL's third figure, BadNets with D_p by FCT and most of the last column there is none: results/cifar10.md."""
    whole, varied = (
        pd.read_csv(ROOT / f"results/{name}.csv", keep_default_na=False) for name in ("cifar10", "cifar10_ablations")
    )
    lines = pd.concat([whole, varied])
    lines = lines[(lines["defence"] == "D-ST") & (lines["scale"] == "long")].set_index(["row", "variant", "seed"])

    def cell(row, variant="", seed=0, when=""):
        line = lines.loc[row, variant, seed]
        return f"{line[f'{when}ACC']:.2f} / {line[f'{when}ASR']:.2f}"

    text = (ROOT / "README.md").read_text().split("- **D-ST: whose labels teach")[1].split("¹ Not bounded")[0]
    table = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("  | ")][
        2:
    ]
    table = {row: [re.sub("[*¹²³]", "", part).strip() for part in shown] for row, *shown in table if row in ROWS}
    assert list(table) == list(TABLES["cifar10"])
    for row, (before, as_in_the_paper, unsuspected, without) in table.items():
        assert [before, as_in_the_paper] == [cell(row, when="before_"), cell(row)]
        if row == "CL":
            assert without == cell(row, "without_poison")
            continue
        variant = "unsuspected" if row == "BadNets-all2one" else "unsuspected_bounded"
        first, _, second = unsuspected.partition("; seed 1 ")
        assert first.strip() == cell(row, variant)
        assert second == (cell(row, variant, 1) if (row, variant, 1) in lines.index else "")


def test_a_plan_of_every_cell_resolves(tmp_path):
    parser = load_script("reproduce.py").get_parser()
    for row, preset in product(ROWS, PRESETS):
        opt = parser.parse_args(["--row", row, "--preset", preset, "--output_root", str(tmp_path)])
        opt.variant = None
        steps, _ = plan(opt)
        names = list(steps)
        assert all(names.index(name) > names.index(other) for name, step in steps.items() for other in names
                   if steps[other] in step.needs)  # fmt: skip


def test_a_pass_left_out_leaves_out_what_needs_both(tmp_path):
    parser = load_script("reproduce.py").get_parser()
    for variant in VARIANTS["D-BR"]:
        opt = parser.parse_args(
            ["--row", "SIG", "--preset", "long", "--defences", "D-BR", "--output_root", str(tmp_path)]
        )
        opt.variant = variant
        options = plan(opt)[0]["unlearn_relearn"].options()
        assert options.drop_doubtful == (len(options.passes) == 2)
        assert options.ascent_bound == (100 if variant == "no_bound" else 15 if variant == "fixed_bound" else 20)


# Figure 3


def runs_nothing_again(tool, words, count, capsys):
    """A second run finds all ``count`` steps there."""
    capsys.readouterr()
    tool.main(list(map(str, words)))
    said = capsys.readouterr().out
    assert said.count("(already there)") == said.count("] python ") == count


def test_figure_3_shows_each_row_before_and_after_step_2(data_root, tmp_path, monkeypatch, in_process, capsys):
    monkeypatch.setitem(PRESETS, "quick", TINY)
    figure3 = load_script("tools/figure3.py")
    monkeypatch.setattr(figure3, "STEP_2", "--epochs 2 --batch_size 64 --eval_freq 0")
    words = ["--scale", "quick", "--rows", "BadNets-all2one", "--every_epoch", "BadNets-all2one", "--data_root", data_root,
             "--output_root", tmp_path / "runs", "--out", tmp_path / "results"]  # fmt: skip
    figure3.main(list(map(str, words)))
    lines = pd.read_csv(tmp_path / "results/figure3_quick.csv")
    assert list(zip(lines["row"], lines["epoch"], strict=True)) == [
        ("BadNets-all2one", 0), ("BadNets-all2one", 1), ("BadNets-all2one", 2)
    ]  # fmt: skip
    place = tmp_path / "runs/quick_seed0_figure3/saved/backdoored_model/poison_rate_0.1/noTrans_ftsimi/cifar10/resnet10"
    clean, poisoned = (np.loadtxt(place / f"gridTrigger/1_{kind}.txt") for kind in ("clean", "poison"))
    pairs = [(bad > good) + 0.5 * (bad == good) for bad in poisoned for good in clean]
    line = lines.iloc[2]
    assert line["AUROC"] == pytest.approx(np.mean(pairs))
    assert line["FCT_clean"] == pytest.approx(np.median(clean)) and line["FCT_poisoned"] == pytest.approx(
        np.median(poisoned)
    )
    log = pd.read_csv(place / "gridTrigger/log.csv")
    assert line["feature_norm"] == pytest.approx(log["feature_norm"].iloc[1]) and np.isnan(
        lines["feature_norm"].iloc[0]
    )
    assert line["Dc_smallest_class"] <= 10 <= line["Dc_largest_class"]  # 100 samples of ten classes
    with Image.open(tmp_path / "results/figure3_quick.png") as picture:
        assert picture.size[1] > 200
    runs_nothing_again(figure3, words, 5, capsys)
    figure3.main([*map(str, words), "--model", "preactresnet10"])  # beside the other's
    assert "--model preactresnet10" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "results/figure3_quick_preactresnet10.csv")) == 3
    assert pd.read_csv(tmp_path / "results/figure3_quick.csv").equals(lines)


def test_figure_3_keeps_the_rows_of_an_earlier_run(data_root, tmp_path, monkeypatch, in_process, capsys):
    monkeypatch.setitem(PRESETS, "quick", TINY)
    figure3 = load_script("tools/figure3.py")
    monkeypatch.setattr(figure3, "STEP_2", "--epochs 1 --batch_size 64 --eval_freq 0")
    drawn = []
    monkeypatch.setattr(figure3, "draw", lambda path, rows, ratios: drawn.append(list(rows)))
    table = tmp_path / "results/figure3_quick.csv"

    def figure(*rows):
        words = ["--scale", "quick", "--rows", *rows, "--data_root", data_root, "--output_root", tmp_path / "runs", "--out",
                 tmp_path / "results"]  # fmt: skip
        figure3.main(list(map(str, words)))
        return table.read_text().splitlines()

    trojan = figure("Trojan")
    both = figure("BadNets-all2one")
    assert both[0] == trojan[0] and both[3:] == trojan[1:] and [line[:7] for line in both[1:3]] == ["BadNets"] * 2
    assert drawn == [["Trojan"], ["BadNets-all2one", "Trojan"]]
    next(tmp_path.glob("runs/*/saved/backdoored_model/poison_rate_0.1/noTrans/*/*/trojanTrigger/0.tar")).unlink()
    capsys.readouterr()
    assert figure("BadNets-all2one") == both and drawn[-1] == ["BadNets-all2one"]
    assert "Trojan stays in the table" in capsys.readouterr().out
    for strange in (b"a,b\n1,2\n", b"", b"\x89PNG", b"row,epoch\nnone,1\n"):
        table.write_bytes(strange)
        with pytest.raises(UserError, match=r"figure3_quick\.csv is (no|not|another)"):
            figure("Trojan")
        assert table.read_bytes() == strange


# D-ST over the extractor's epochs


def test_the_curve_of_d_st_has_a_classifier_for_every_extractor_on_it(
    data_root, tmp_path, monkeypatch, in_process, capsys
):
    monkeypatch.setitem(PRESETS, "quick", TINY)
    curve = load_script("tools/secure_curve.py")
    words = ["--scale", "quick", "--epochs", "2", "--every", "1", "--data_root", data_root,
             "--output_root", tmp_path / "runs", "--out", tmp_path / "results"]  # fmt: skip
    curve.main(list(map(str, words)))
    table = pd.read_csv(tmp_path / "results/secure_curve_BadNets-all2one_quick.csv", index_col="epoch")
    assert table.index.tolist() == [1, 2]
    root = tmp_path / "runs/quick_seed0_curve"
    log = pd.read_csv(next(root.rglob("SupCon_*/log.csv")))
    assert table["loss"].tolist() == pytest.approx(log["loss"].tolist(), abs=6e-4)  # the table is rounded
    assert table["seconds"].tolist() == pytest.approx(log["seconds"].cumsum().tolist(), abs=0.6)
    saved = next(root.rglob("SupCon_*/last.pth")).parent
    for epoch in (1, 2):  # each is tested with the extractor of its epoch
        record = json.loads(next((root / f"classifier_{epoch}").rglob("*_test.json")).read_text())
        for measure in ("ACC", "ASR", "ASR_clean"):
            assert table.loc[epoch, measure] == pytest.approx(record[measure], abs=6e-3)
        assert Path(record["options"]["model_ckpt"]) == saved / f"ckpt_epoch_{epoch - 1}.pth"
        assert any(name.endswith(f"{saved.name}/ckpt_epoch_{epoch - 1}.pth") for name in record["inputs"])
    with Image.open(tmp_path / "results/secure_curve_BadNets-all2one_quick.png") as picture:
        assert picture.size[1] > 200
    runs_nothing_again(curve, words, 10, capsys)
    before = snapshot(tmp_path / "results")
    with pytest.raises(UserError, match="is of 2 other epochs"):  # two there, one now
        curve.main([*map(str, words), "--every", "2"])
    (saved / "ckpt_epoch_0.pth").unlink()  # as a run with a larger --every would have left it
    with pytest.raises(UserError, match="no checkpoint of epoch 1 was kept"):
        curve.main(list(map(str, words)))
    assert snapshot(tmp_path / "results") == before


@pytest.mark.parametrize("variant", VARIANTS["D-ST"])
def test_a_variants_curve_has_the_steps_of_the_variant_and_finds_what_they_write(tmp_path, variant):
    """Beside reproduce.py's own steps of it, and where each step says itself that it writes."""
    curve = load_script("tools/secure_curve.py")
    words = ["--scale", "cpu", "--row", "Trojan", "--variant", variant, "--epochs", "4", "--every", "2"]
    opt = curve.get_parser().parse_args([*words, "--output_root", str(tmp_path)])
    steps, results = curve.steps_of(opt, tmp_path)
    cell = one_cell("cifar10", "Trojan", "cpu", 0, "D-ST", tmp_path)
    cell.variant = variant
    usual = plan(cell)[0]
    extractor, samples = steps["train_extractor"].options(), separating_step(steps).output.parent
    assert extractor.epochs == 4 and (extractor.samples or samples) == samples
    assert {name: vars(extractor)[name] for name in ("positives", "drop_poison")} == {
        name: vars(usual["train_extractor"].options())[name] for name in ("positives", "drop_poison")
    }
    for epoch in (2, 4):
        trained, tested = steps[f"classifier of epoch {epoch}"], steps[f"test of epoch {epoch}"]
        options, own = trained.options(), usual["train_classifier"].options()
        apart = {"output_root", "ckpt", "samples", "defaults"}
        assert {k: v for k, v in vars(options).items() if k not in apart} == {
            k: v for k, v in vars(own).items() if k not in apart
        }
        assert options.samples == samples and variant in options.output_root.name
        assert options.ckpt == steps["train_extractor"].output.with_name(f"ckpt_epoch_{epoch - 1}.pth")
        folder = secure_folder(options) / trained.module().run_name(options)
        assert trained.output.parent == trained.record.parent == folder
        assert tested.options().classifier_ckpt == trained.output and results[epoch].parent == folder


def test_epochs_that_were_measured_before_stay_in_the_table_of_figure_3():
    join = load_script("tools/figure3.py").with_earlier_epochs
    earlier = [{"row": "SIG", "epoch": str(epoch), "FCT_clean": f"0.{epoch}12345"} for epoch in range(3)]
    now = [{"row": "SIG", "epoch": epoch, "FCT_clean": float(f"0.{epoch}12345")} for epoch in (0, 2)]
    assert join(now, earlier) == [now[0], earlier[1], now[1]] and join(now, []) == now
    now[1]["FCT_clean"] *= 1.01  # trained anew
    assert join(now, earlier) == now


def test_a_curve_whose_end_would_not_be_shown_is_refused(cli, tmp_path):
    said = cli("tools/secure_curve.py", "--epochs", "10", "--every", "4", "--output_root", tmp_path)
    assert said.code == 2 and "no multiple of --every 4" in said.err and not any(tmp_path.iterdir())


def test_a_record_without_an_auroc_is_one(tmp_path):
    """Where every sample is poisoned there is none."""
    path = next((ROOT / "results/cifar10").glob("*.json"))
    record = json.loads(path.read_text())
    record["detection"]["AUROC"] = float("nan")
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / path.name).write_text(json.dumps(record))
    (found,) = read_cells(tmp_path / "cifar10")
    assert np.isnan(cell_line(found)["AUROC"])


def test_in_a_clone_every_committed_cell_is_there_already(cli, tmp_path, monkeypatch):
    """Each by itself, as a user would ask for it: none is run anew, and none refused as made by other commands."""

    def run_apart(script, *_, **__):
        raise UserError(f"{script} is run")

    monkeypatch.setattr("utils.steps.run_apart", run_apart)
    shutil.copytree(ROOT / "results/cifar10", tmp_path / "cifar10")
    shutil.copytree(ROOT / "results/cifar10_ablations", tmp_path / "cifar10_ablations")
    asked = set()
    for path in [*tmp_path.glob("*/*.json")]:
        record = json.loads(path.read_text())
        words = ["--table", "cifar10", "--scale", record["scale"], "--rows", record["row"], "--seeds", record["seed"]]
        words += ["--defences", record["defence"], "--out", tmp_path]
        if record["variant"]:
            words += [
                "--ablations" if record["variant"] in VARIANTS[record["defence"]] else "--model",
                record["variant"],
            ]
        if " --precision " in record["commands"][0]:
            words += ["--precision", record["precision"]]
        asked.add((path.parent.name, record["scale"]))
        said = cli("reproduce.py", *words)
        assert said.code == 0 and f"{path.name} is there already" in said.out, (path.name, said.err, said.out[-500:])
    assert asked >= set(product(["cifar10"], ["cpu", "long", "full", "paper"])) | {("cifar10_ablations", "cpu")}


def test_the_committed_records_were_made_by_the_commands_that_are_planned_today():
    def options(command):  # without places, machine, precision, and how often the test sets were looked at
        return re.sub(r"\S*/\S*|--(device|precision|data_root|output_root|eval_freq) \S+", "", command).split()

    checked = set()
    for path in (ROOT / "results/cifar10").glob("*.json"):
        record = json.loads(path.read_text())
        cell = one_cell(
            "cifar10", record["row"], record["scale"], record["seed"], record["defence"], Path("/elsewhere")
        )
        planned = [options(step.command) for step in plan(cell)[0].values()]
        assert planned == [options(command) for command in record["commands"]], path.name
        checked.add(record["scale"])
    assert {"cpu", "long", "paper"} <= checked


def test_the_picture_has_our_bars_beside_the_papers(results, monkeypatch):
    module, drawn = load_script("tools/make_tables.py"), []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    paper = pd.read_csv(results / "paper.csv")
    table, lines, _ = next(module.tables(results, paper))
    module.picture(results / "x.png", table, paper, lines)
    axes, names = np.array(drawn[0].axes).reshape(2, 3), list(TABLES["cifar10"])
    known = {(row, model): (acc, asr) for _, row, model, acc, asr in
             paper[paper["table"] == "cifar10"][["table", "row", "model", "ACC", "ASR"]].itertuples(index=False)}  # fmt: skip
    own = {
        ("SIG", "D-BR"): (77.5, 1.0),
        ("CL", "D-BR"): (92.5, 0.0),
        ("CL", "D-ST"): (90.5, 1.5),
        ("SIG", "backdoored"): (79.5, 99.0),
    }
    for column, model in enumerate(("backdoored", "D-BR", "D-ST")):
        for line in (0, 1):
            theirs, ours = ([bar.get_height() for bar in bars] for bars in axes[line, column].containers)
            assert theirs == [known[name, model][line] for name in names]
            for name in names:
                if (name, model) in own:
                    assert ours[names.index(name)] == pytest.approx(own[name, model][line])
        assert axes[0, column].get_title() == model


@pytest.mark.parametrize(("defence", "best"), [("D-BR", 2), ("D-ST", 1)])
def test_the_papers_selection_is_the_highest_acc_less_asr_in_br_and_the_highest_acc_in_st(
    defence, best, tmp_path, monkeypatch
):
    module, written = load_script("reproduce.py"), {}
    monkeypatch.setattr(module, "write_cell", lambda path, cell, inputs, **content: written.update(content))

    def step(name, rows=None):
        (tmp_path / name).mkdir()
        record = tmp_path / name / "options.json"
        content = {"options": {"precision": "float32"}, "data": {"source": "x", "train": {"samples": 400}}}
        record.write_text(json.dumps(content))
        if rows is not None:
            pd.DataFrame(rows).to_csv(tmp_path / name / "log.csv", index=False)
        options = lambda: SimpleNamespace(choose="last", device="cpu", log=tmp_path / name / "log.csv")  # noqa: E731
        return SimpleNamespace(output=tmp_path / name / "out.json", record=record, options=options)

    def row(epoch, whole, paper, asr):
        return {"epoch": epoch, "ACC": whole, "ACC_paper": paper, "ASR": asr, "R_ACC": 7.0}

    rows = [row(-1, 99, 99, 0), row(0, 95, 80, 60), row(1, 70, 75, 5), row(2, 80, 85, 50), row(3, 60, 60, 0)]
    steps = {"train_attack_withTrans": step("a", [row(0, 90, 91, 100)]), "separate_samples": step("b")}
    (tmp_path / "b/detection.json").write_text("{}")
    if defence == "D-BR":
        steps["unlearn_relearn"] = step("c", rows)
    else:
        steps |= {"train_classifier": step("c", rows[1:]), "test": step("d")}
        (tmp_path / "d/out.json").write_text(json.dumps(row(3, 60, 60, 0)))
    cell = SimpleNamespace(
        defences=[defence], device="cpu", precision="bfloat16", row="CL", preset="cpu", seed=0, variant_name=""
    )
    resolved = SimpleNamespace(dataset="cifar10", poison_rate=0.1, model="resnet10")
    module._record_cell(tmp_path / "x.json", cell, steps, resolved, {})
    assert written["paper_selection"] == {
        "epoch": best,
        **{name: rows[best][name] for name in ("ACC", "ACC_paper", "ASR", "R_ACC")},
    }
    assert written["before"]["ACC"] == 90 and written["after"]["ASR"] == 0 and written["rule"] == "last epoch"
    assert written["precision"] == "float32"  # the step was there already, from a run in that
