"""What happens to users through no malice: odd files of their own, places that cannot be written, commands that do not go together."""

import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, write_folder
from PIL import Image
from test_bad_input import refused, snapshot
from test_pipeline import NO_TRANS, SAMPLES, TUNED, WITH_TRANS

from utils import files, own_data, rows, triggers
from utils.datasets import DATASETS
from utils.device import choose_runtime
from utils.errors import UserError, run_script
from utils.figures import sample_sheet
from utils.files import atomic_write
from utils.images import decode
from utils.loading import load_dataset
from utils.poisoning import poison_training_set
from utils.records import MEASURES, read_figures, read_log


def fill(folder, names, size=(40, 40)):
    """Images of noise under these names."""
    rng = np.random.default_rng(0)
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


# Where results go


def test_a_link_is_written_through_and_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no plain file"), atomic_write(tmp_path / "pipe") as file:
        file.write(b"new")
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]


def test_a_log_that_is_a_device_is_refused_at_once(cli, words, pipeline, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = snapshot(pipeline)
    refused(cli("unlearn_relearn.py", *words(pipeline), "--log", tmp_path / "pipe"), "folder or a device", "--log")
    assert (tmp_path / "pipe").is_fifo() and snapshot(pipeline) == before


def test_a_lock_of_another_run_names_the_option_that_chooses_the_place(tmp_path):
    with closing(files.at_exit):
        files.hold_lock(tmp_path / "verdict.json")
        for more, option in (((), "--output_root"), (("--out",), "--out")):
            with pytest.raises(UserError, match=f"another run .*, or give another {option}$"):
                files.hold_lock(tmp_path / "verdict.json", *more)
    assert not os.listdir(tmp_path)


def test_a_disk_that_is_full_when_a_file_is_closed_is_one_line(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + """
from utils.errors import run_script
from utils.files import atomic_write
def main():
    with atomic_write(sys.argv[1]) as file:  # more than the buffer, less than what it takes to be written at once
        for _ in range(5):
            file.write(b"x" * 3000)
run_script(main)"""
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, preexec_fn=limit
    )
    refused(SimpleNamespace(code=result.returncode, err=result.stderr), "cannot write", "File too large")
    assert not os.listdir(tmp_path)


def test_the_log_of_another_run_is_not_replaced_unasked(cli, words, pipeline, tmp_path):
    step = ["unlearn_relearn.py", *words(pipeline), "--epochs", 1, "--batch_size", 16]
    assert cli(*step, "--checkpoint_save", tmp_path / "a.tar").code == 0
    before = snapshot(tmp_path)
    refused(cli(*step, "--checkpoint_save", tmp_path / "b.tar"), "unlearn_purify.csv", "a.json", "--log")
    assert snapshot(tmp_path) == before
    assert cli(*step, "--checkpoint_save", tmp_path / "b.tar", "--log", tmp_path / "b.csv").code == 0
    assert cli(*step, "--checkpoint_save", tmp_path / "a.tar").code == 0  # its own


def test_a_model_and_a_log_of_one_name_in_two_folders_are_refused(cli, words, pipeline, tmp_path):
    places = ["--checkpoint_save", tmp_path / "models/run1", "--log", tmp_path / "logs/run1"]
    refused(
        cli("unlearn_relearn.py", *words(pipeline), *places), "must have different names"
    )  # they share one till they are complete
    assert not os.listdir(tmp_path)


def test_the_log_that_another_run_took_over_is_not_removed_with_the_earlier_result(cli, words, pipeline, tmp_path):
    step = ["unlearn_relearn.py", *words(pipeline), "--epochs", 1, "--batch_size", 16]
    for more in (["a.tar"], ["b.tar", "--lr", 0.01, "--overwrite"], ["a.tar", "--log", tmp_path / "a.csv"]):
        said = cli(*step, "--checkpoint_save", tmp_path / more[0], *more[1:])
        assert said.code == 0, said.err
    assert "is replaced" in said.out and "removed" not in said.out
    named = json.loads((tmp_path / "b.json").read_text())["outputs"]["unlearn_purify.csv"]
    assert files.sha256(tmp_path / "unlearn_purify.csv") == named
    assert {"a.csv", "a.tar", "b.tar"} <= {*os.listdir(tmp_path)}


def test_a_model_in_the_place_of_the_one_that_is_chosen_is_not_replaced_unasked(cli, words, pipeline, tmp_path):
    step = ["unlearn_relearn.py", *words(pipeline), "--epochs", 1, "--batch_size", 16]
    assert cli(*step, "--checkpoint_save", tmp_path / "m_val.tar", "--log", tmp_path / "a.csv").code == 0
    before = snapshot(tmp_path)
    others = ["--checkpoint_save", tmp_path / "m.tar", "--log", tmp_path / "b.csv", "--val_ratio", 0.2]
    refused(cli(*step, *others), "m_val.tar is of the run that", "--checkpoint_save")
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made_for_the_log_names_its_option(cli, words, pipeline, tmp_path):
    before = snapshot(pipeline)
    said = cli("unlearn_relearn.py", *words(pipeline), "--epochs", 1, "--batch_size", 16, "--overwrite", "--checkpoint_save",
               tmp_path / "a.tar", "--log", "/proc/nowhere/a.csv")  # fmt: skip
    refused(said, "/proc/nowhere", "choose another with --log")
    assert snapshot(pipeline) == before


def raising(error):
    raise error


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(1 << 46),  # 256 TiB
        lambda: raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        lambda: raising(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")),
    ],
)
def test_too_little_memory_of_the_cpu_or_a_gpu_is_one_line(capsys, work):
    with pytest.raises(SystemExit) as stop:
        run_script(work)
    refused(SimpleNamespace(code=stop.value.code, err=capsys.readouterr().err), "out of memory", "--batch_size")


def test_another_error_of_torch_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_script(lambda: raising(RuntimeError("size mismatch")))


@pytest.mark.parametrize(
    ("device", "error", "advice"),
    [
        ("auto", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), "wait until it is free"),
        ("auto", RuntimeError("no kernel image is available for execution on the device"), "--device cpu"),
        ("cuda:1", RuntimeError("invalid device ordinal"), "--device auto"),
    ],
)
def test_a_gpu_that_cannot_be_used_gets_advice_that_helps(monkeypatch, device, error, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: raising(error))
    with pytest.raises(UserError, match=f"--device cuda.* cannot be used here .*; .*{advice}"):
        choose_runtime(device)


def test_a_class_named_like_a_formula_is_drawn(fashion, tmp_path):
    opt = load_script("train_attack_noTrans.py").get_parser().parse_args(["--dataset", "fashion"])
    odd = dataclasses.replace(fashion, classes=["$^$", *fashion.classes[1:]])
    sample_sheet(tmp_path / "a.png", odd, poison_training_set(odd, opt), opt)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_picture_of_no_format_is_refused(cli, tmp_path):
    refused(cli("tools/visualize_triggers.py", "--out", tmp_path / "a.foo"), "a.foo", ".png")
    assert not os.listdir(tmp_path)


def test_the_users_picture_is_not_drawn_over(cli, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"mine")
    refused(cli("tools/draw_kitty.py", "--out", tmp_path / "cat.png"), "another picture", "--overwrite")
    assert (tmp_path / "cat.png").read_bytes() == b"mine"
    for name in ("cat.png", "new.png"):
        assert cli("tools/draw_kitty.py", "--out", tmp_path / name, "--overwrite").code == 0
    assert cli("tools/draw_kitty.py", "--out", tmp_path / "new.png").code == 0  # the same
    assert (tmp_path / "cat.png").read_bytes() == (tmp_path / "new.png").read_bytes()


def test_a_table_of_another_seed_is_not_replaced_unasked(cli, tmp_path):
    (tmp_path / "BadNets-all2one_fashion_manifest.json").write_text(
        '{"options": {"preset": "quick", "dataset": "fashion"}}'
    )
    before = snapshot(tmp_path)
    row = [
        "reproduce.py",
        "--preset",
        "quick",
        "--dataset",
        "fashion",
        "--out",
        tmp_path,
        "--output_root",
        tmp_path / "runs",
    ]
    refused(cli(*row, "--seed", 1), "--seed 0", "--seed 1", "--overwrite")
    refused(cli(*row[:2], "cpu", *row[3:]), "--preset quick", "--preset cpu")
    refused(cli(*row, "--poison_rate", 0.2), "--poison_rate 0.1", "--poison_rate 0.2")
    assert snapshot(tmp_path) == before


# Images


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_grey_of_16_bits_keeps_its_upper_eight(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{kind}")
    found = decode(tmp_path / f"a.{kind}", 32, resize=False)
    for row in range(32):
        for column in range(32):
            assert found[row, column].tolist() == [int(values[row, column]) // 256] * 3
    smaller = decode(tmp_path / f"a.{kind}", 16, resize=True)
    whole = np.asarray(Image.fromarray((values // 256).astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(smaller[..., 0].astype(int) - whole).max() <= 1


@pytest.mark.parametrize("largest", [65535, 4095])
def test_a_pgm_of_more_than_eight_bits_keeps_its_upper_eight(tmp_path, largest):
    values = np.random.default_rng(0).integers(0, largest + 1, (32, 32)).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5\n32 32\n%d\n" % largest + values.tobytes())
    found = decode(tmp_path / "a.pgm", 32, resize=False)
    assert (found == (values.astype(int) * 65535 / largest).round()[..., None] // 256).all()


def test_numbers_of_32_bits_and_pipes_are_no_images(tmp_path):
    Image.fromarray(np.ones((32, 32), np.float32)).save(tmp_path / "a.tif")
    os.mkfifo(tmp_path / "b.png")
    for name, needle in (("a.tif", "32 bits"), ("b.png", "no file")):
        with pytest.raises(UserError, match=needle):
            decode(tmp_path / name, 32, resize=False)


def test_a_pipe_among_the_images_is_skipped_and_never_opened(tmp_path, monkeypatch):
    fill(tmp_path, [f"train/{label}/{number}.png" for label in "ab" for number in range(3)])
    os.mkfifo(tmp_path / "train/a/pipe.png")

    def opened(path, *more, whole=Image.open, **named):
        assert not str(path).endswith("pipe.png"), "this would wait for ever"
        return whole(path, *more, **named)

    monkeypatch.setattr(Image, "open", opened)
    data = own_data.load("folder", tmp_path, DATASETS["folder"], False, None, tmp_path / "cache")
    assert data.skipped == ("train/a/pipe.png",) and len(data.train_labels) == 6


def test_what_an_audit_does_not_look_at_is_told(tmp_path, capsys):
    taken = [f"train/{label}/{number}.png" for label in "ab" for number in range(3)]
    fill(tmp_path, [*taken, "train/a/deep/0.png", "train/c/images/0.gif", "train/c/0.tif"])
    (tmp_path / "train/b/notes.txt").write_text("x")
    data = own_data.load("folder", tmp_path, DATASETS["folder"], False, None, tmp_path / "cache")
    assert len(data.train_labels) == 7  # of c what lies in images/
    said = capsys.readouterr().out
    assert "3 files are left out" in said
    assert all(name in said for name in ("train/a/deep/0.png", "train/c/0.tif", "train/b/notes.txt"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_no_text_are_names(tmp_path):
    fill(tmp_path, [os.fsdecode(b"train/a/caf\xe9.png"), "train/a/1.png", "train/b/2.png", "train/b/3.png"])
    data = own_data.load("folder", tmp_path, DATASETS["folder"], False, None, tmp_path / "cache")
    assert len(data.train_labels) == 4 and len(data.record["train"]["sha256"]) == 64


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "folder", "npz"])
def test_a_data_root_that_cannot_be_looked_at_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot read|no (file|folder)|not under"):
        load_dataset(name, tmp_path / ("x" * 300), cache=tmp_path / "cache")


# Commands


@pytest.mark.parametrize(
    "command, needles",
    [
        ("reproduce.py --table cifar10 --row Trojan --dry_run", ["--row is for one row", "--rows"]),
        ("reproduce.py --table cifar10 --preset paper --dry_run", ["--preset is for one row", "--scale"]),
        ("reproduce.py --table cifar10 --device cpu --devices cuda:0 --dry_run", ["--devices", "leave one out"]),
        ("tools/figure3.py --rows SIG --every_epoch CL --dry_run", ["--every_epoch CL", "--rows SIG"]),
        ("train_attack_noTrans.py --lr 1e39", ["--lr", "out of range", "float32"]),
        ("ST/train_classifier.py --weight_decay 1e300", ["--weight_decay", "out of range"]),
        ("train_attack_withTrans.py --gamma 1e30 --schedule 1 1", ["--gamma", "at most 1"]),  # the rate drops
        ("ST/train_extractor.py --lr_decay_rate 2", ["--lr_decay_rate", "at most 1"]),
        ("ST/train_classifier.py --lr_decay_rate 2", ["--lr_decay_rate", "at most 1"]),
        ("tools/train_ssba.py --steps 10", ["--steps", "at least 20"]),
        ("calculate_gamma.py --target_type all2all --target_label 3", ["--target_label has no use", "all2all"]),
        ("calculate_consistency.py --trans1 flip --trans2 none --draws 5", ["--draws 5 has no use", "--trans1 flip"]),
        ("separate_samples.py --trans1 auto --draws 2", ["--draws 2 has no use with --trans1 auto"]),
        (
            "ST/train_classifier.py --poison_weight 0 --ascent_bound 3",
            ["--ascent_bound has no use", "--poison_weight 0"],
        ),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(cli, tmp_path, command, needles):
    script, *words = command.split()
    refused(cli(script, *words), *needles)


@pytest.mark.parametrize("preset", ["quickstart", "full"])
def test_no_planned_command_names_an_option_that_has_no_use(preset):
    all2all = rows.one_cell("cifar10", "BadNets-all2all", preset, 0, "D-ST", ROOT / "runs")
    all2all.variant = "no_ascent"
    steps, _ = rows.plan(all2all)  # each is parsed and checked
    words = [word for step in steps.values() for word in step.words]
    assert "--target_label" not in words and "--ascent_bound" not in steps["train_classifier"].words
    one = rows.plan(rows.one_cell("cifar10", "Trojan", preset, 0, "D-ST", ROOT / "runs"))[0]
    assert ("--target_label" in one["train_classifier"].words) == (preset == "quickstart")
    assert ("--ascent_bound" in one["train_classifier"].words) == (preset == "full")


def test_step_4_takes_a_checkpoint_alone_and_contradicts_no_option_that_is_given(cli, copy, words, tmp_path):
    path = copy / TUNED / "1.tar"
    assert cli("calculate_gamma.py", "--checkpoint_load", path).code == 0
    said = cli("calculate_gamma.py", "--checkpoint_load", path, "--seed", 3, "--trigger_type", "kittyTrigger")
    refused(said, "was made with --trigger_type gridTrigger --seed 0", "--trigger_type kittyTrigger --seed 3")
    for file in path.parent.glob("1_*"):
        file.unlink()
    said = cli("calculate_gamma.py", "--checkpoint_load", path)
    refused(said, "Make it with: python calculate_consistency.py", "--model resnet10", f"--checkpoint_load {path}")


def test_a_network_of_step_2_whose_step_1_was_run_again_is_not_taken_unasked(cli, copy, words):
    more = ["--epochs", 2, "--batch_size", 64, "--lr", 0.02, "--overwrite"]
    assert cli("train_attack_noTrans.py", *words(copy), *more).code == 0
    for script in ("calculate_consistency.py", "visualize_consistency.py", "separate_samples.py"):
        refused(
            cli(script, *words(copy)), "trained from another", "Train it anew with: python finetune_attack_noTrans.py"
        )
    path = copy / TUNED / "1.tar"
    said = cli("visualize_consistency.py", *words(copy), "--checkpoint_load", path)
    assert said.code == 0 and "Note: " in said.out and "was trained from another" in said.out, said.err


def test_the_passes_of_an_epoch_have_one_order(cli, copy, words, tmp_path):
    """However they are named, it is the same run."""
    common = [*words(copy), "--epochs", 2, "--batch_size", 16, "--passes"]
    said = cli("unlearn_relearn.py", *common, "relearn", "unlearn", "relearn")
    assert said.code == 0 and "would replace" not in said.err, said.err


def test_samples_of_another_attack_are_told_by_their_options(cli, copy, words):
    said = cli("unlearn_relearn.py", *words(copy), "--samples", copy / SAMPLES, "--trigger_type", "kittyTrigger", "--epochs", 2,
               "--checkpoint_load", copy / WITH_TRANS / "1.tar")  # fmt: skip
    refused(said, "gridTrigger", "kittyTrigger")
    assert "although" not in said.err


def test_a_classifier_of_another_extractor_is_made_anew_by_the_command_that_made_it(cli, copy, words):
    assert cli("separate_samples.py", *words(copy), "--clean_per_class", "--overwrite").code == 0
    said = cli("ST/train_classifier.py", *words(copy), "--epochs", 2, "--batch_size", 32, "--learning_rate", 0.5)
    refused(
        said, "was trained with another", "train_extractor.py", "--epochs 2 --batch_size 64 --cosine", "--overwrite"
    )


def test_results_do_not_go_among_the_images(cli, tmp_path):
    for split in ("train", "test"):
        fill(tmp_path / "data" / split, ["a/1.png", "a/2.png", "b/1.png"])
    said = cli(
        "train_attack_noTrans.py",
        "--dataset",
        "folder",
        "--data_root",
        tmp_path / "data",
        "--output_root",
        tmp_path / "data/train",
    )
    refused(said, "--output_root", "lies among the images")
    assert sorted(os.listdir(tmp_path / "data/train")) == ["a", "b"]


def test_the_command_that_makes_a_file_makes_it_there(cli, words, tmp_path):
    root = tmp_path / "a b"
    clean = ["--target_type", "cleanLabel", "--trigger_type", "fourCornerTrigger"]
    said = cli("train_attack_noTrans.py", *words(root), *clean)
    refused(said, "train_clean_withTrans.py", f"--output_root '{root}'", "--data_root")
    refused(
        cli("ST/test.py", *words(root), "--clean_ratio", 0.3), "ST/train_extractor.py", "--clean_ratio 0.3", "--cosine"
    )


def test_a_damaged_log_says_which_step_is_to_be_done_anew(tmp_path):
    step = SimpleNamespace(output=tmp_path / "9.tar")
    whole = "epoch," + ",".join(MEASURES) + "\n"
    for text, needle in (
        ("", "table"),
        ("epoch,ACC\n0,1\n", "ACC_paper"),
        (whole + "-1,1,2,3,4\n", "no epoch"),
        (whole + "0,1,2,,4\n", "no epoch"),
    ):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(UserError, match=needle) as found:
            read_log(step)
        assert "9.tar" in str(found.value)
    (tmp_path / "log.csv").write_text(whole + "-1,9,9,9,9\n0,1,2,3,4\n1,5,6,,8\n")
    assert read_log(step)[list(MEASURES)].to_numpy().tolist() == [[1, 2, 3, 4]]
    (tmp_path / "detection.json").write_text('{"AUROC": 1, "Dp_size": "many"}')
    with pytest.raises(UserError, match="no Dp_size"):
        read_figures(step, tmp_path / "detection.json", ["AUROC", "Dp_size"])
    assert read_figures(step, tmp_path / "detection.json", ["AUROC"])["AUROC"] == 1


def test_too_few_images_are_told_before_any_training(cli, tmp_path):
    fill(tmp_path, [f"data/train/{label}/{number}.png" for label in "ab" for number in range(3)])
    said = cli(
        "audit_dataset.py",
        "--data_root",
        tmp_path / "data",
        "--out",
        tmp_path / "report",
        "--output_root",
        tmp_path / "o",
    )
    refused(said, "too few")
    assert not (tmp_path / "report").exists() and not list(tmp_path.glob("o/**/*.tar"))


def test_what_a_killed_copy_left_is_removed_by_the_next_one(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".copy.{files._HERE}-{gone.pid}-abc.tmp"
    left.mkdir()
    (left / "image.png").write_bytes(b"x")
    with files.new_folder(tmp_path / "copy", "--write_clean") as staging:
        assert staging.name.startswith(f".copy.{files._HERE}-{os.getpid()}-")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_without_the_locks_of_a_unix_no_process_is_asked_whether_it_lives(tmp_path, monkeypatch):
    """Signal 0, which asks that elsewhere, is Ctrl-C to the whole console on Windows."""
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files.os, "kill", lambda pid, number: pytest.fail("a signal was sent"))
    (tmp_path / f".old.{files._HERE}-{os.getpid()}-abc.tmp").touch()
    files.write_json(tmp_path / "x.json", {})
    assert len(list(tmp_path.iterdir())) == 2


def test_files_and_folders_have_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "x.json", {})
        with files.new_folder(tmp_path / "new", "--out"):
            pass
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("x.json", "new")] == ["0o640", "0o750"]


def test_of_files_that_belong_together_none_is_replaced_where_one_is_not_written(tmp_path):
    def stopped(file):
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        files.write_together({tmp_path / "a": lambda file: file.write(b"new"), tmp_path / "b": stopped})
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_record_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied; ask for access"):
        files.read_json(tmp_path / "options.json")


def test_there_is_no_record_below_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    assert files.read_json(tmp_path / "a/options.json") is None


def test_a_step_with_its_standard_error_closed_runs(words, tmp_path):
    command = [
        sys.executable,
        "train_attack_noTrans.py",
        *map(str, words(tmp_path)),
        "--epochs",
        "1",
        "--eval_freq",
        "0",
    ]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Checkpoints are in" in done.stdout


def test_an_empty_test_folder_is_none(cli, tmp_path, fashion):
    write_folder(tmp_path / "mine", fashion, train=4, test=0)
    shutil.rmtree(tmp_path / "mine/test")  # with an empty folder a class
    (tmp_path / "mine/test").mkdir()
    own = ["--dataset", "folder", "--data_root", tmp_path / "mine", "--model", "resnet10", "--output_root", tmp_path]
    assert cli("train_attack_noTrans.py", *own, "--epochs", 1, "--batch_size", 20).code == 0


def test_an_npz_without_its_arrays_tells_those_it_holds(cli, tmp_path):
    np.savez(tmp_path / "x.npz", train_images=np.zeros((4, 32, 32, 3), np.uint8), train_labels=np.arange(4))
    said = cli(
        "train_attack_noTrans.py", "--dataset", "npz", "--data_root", tmp_path / "x.npz", "--output_root", tmp_path
    )
    refused(said, "it has no x_train, but train_images, train_labels")


@pytest.mark.parametrize(
    ("more", "words_of_it"),
    [
        (["--poison_classes", 10], "has the classes 0 to 9"),
        (["--poison_order", ROOT / "README.md"], "is no .npy file of numbers"),
    ],
)
def test_what_step_5_cannot_take_it_refuses_before_it_computes(more, words_of_it, copy, words, cli):
    said = cli("separate_samples.py", *words(copy), "--trans1", "crop", *more)
    refused(said, words_of_it)
    assert "computing them" not in said.out and "allow_pickle" not in said.err


def test_tables_of_a_folder_without_records_are_not_written(cli, tmp_path):
    refused(cli("tools/make_tables.py", "--results", tmp_path), "holds no record of a cell", "reproduce.py")
    assert not list(tmp_path.iterdir())


def test_br_step_2_with_other_ratios_names_the_option_that_keeps_both(copy, words, cli):
    for step in ("separate_samples.py", "unlearn_relearn.py"):
        more = (
            ["--epochs", 1, "--batch_size", 8, "--checkpoint_load", copy / WITH_TRANS / "1.tar"] if "un" in step else []
        )
        said = cli(step, *words(copy), "--clean_ratio", 0.3, *more)
    refused(said, "--clean_ratio 0.3", "or another --checkpoint_save")


def separated(cli, common, root, *ratios):
    """SD by its first network alone, and a backdoored one, in ``root``."""
    first = root / NO_TRANS / "0.tar"
    for step in (
        ["train_attack_noTrans.py", "--epochs", 1, "--batch_size", 64],
        ["calculate_consistency.py", "--checkpoint_load", first],
        ["separate_samples.py", "--checkpoint_load", first, *ratios],
        ["train_attack_withTrans.py", "--epochs", 1, "--batch_size", 64],
    ):
        assert cli(step[0], *common, *step[1:]).code == 0
    return first


def run_printed(said, cwd):
    """Run the command that a message says makes the file, as a shell in ``cwd`` would."""
    command = re.search(r"Make it (?:anew )?with: (.*?)(?:\. Nearest .*)?$", said.err.strip())[1]
    command = re.sub(r"\bpython ", f"{shlex.quote(sys.executable)} ", command, count=1)
    return subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True)


def test_what_was_lost_is_made_anew_by_the_command_that_is_printed(cli, words, tmp_path, monkeypatch):
    common, root = words(tmp_path / "my runs"), tmp_path / "my runs"
    first = separated(cli, common, root)
    samples = root / SAMPLES
    for lost, step in (
        (first.with_name("0_all.txt"), ["calculate_gamma.py", "--checkpoint_load", first]),
        (samples / "poison_samples.npy", ["unlearn_relearn.py", *common, "--epochs", 1, "--batch_size", 8]),
        (first, ["finetune_attack_noTrans.py", *common, "--epochs", 1, "--batch_size", 64]),
    ):
        before = lost.read_bytes()
        lost.unlink()
        monkeypatch.chdir(ROOT / "ST")  # not where it was typed
        said = cli(*step)
        refused(said, "no such file", lost.name, "--overwrite")
        made = run_printed(said, ROOT / "ST")
        assert made.returncode == 0, (said.err, made.stderr)
        assert lost.suffix == ".tar" or lost.read_bytes() == before  # a checkpoint holds the seconds it took
        monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("content", [b"PK\x03\x04cut", b"\x93NUMPY\x01\x00\x0a\x00{'descr': ["], ids=["zip", "header"])
def test_an_npy_of_whatever_damage_is_one_line(content, copy, words, cli, tmp_path):
    (tmp_path / "o.npy").write_bytes(content)
    order = ["--poison_order", tmp_path / "o.npy", "--overwrite"]
    refused(cli("separate_samples.py", *words(copy), *order), "o.npy is no .npy file")
    encoded = ["--trigger_type", "SSBA", "--ssba_images", tmp_path / "o.npy", tmp_path / "o.npy"]
    refused(cli("train_attack_noTrans.py", *words(tmp_path / "out"), *encoded), "o.npy as one plain .npy array")
    samples = copy / SAMPLES / "poison_samples.npy"
    samples.unlink()
    samples.write_bytes(content)
    refused(cli("unlearn_relearn.py", *words(copy), "--overwrite"), "is not a file of separated samples")


def test_a_set_of_one_sample_is_one_line(cli, words, tmp_path):
    separated(cli, words(tmp_path), tmp_path, "--poison_ratio", 0.0025)
    said = cli("unlearn_relearn.py", *words(tmp_path), "--poison_ratio", 0.0025, "--epochs", 1, "--batch_size", 8)
    refused(said, "D_p has 1 samples to train on", "--poison_ratio")


def test_samples_are_told_apart_by_their_folder_and_not_by_how_it_is_spelt(cli, words, copy, tmp_path, monkeypatch):
    extractor = ["ST/train_extractor.py", *words(copy), "--epochs", 1, "--cosine", "--batch_size", 64, "--samples"]
    for name, kind in (("a", "random"), ("b", "oracle")):
        made = cli("tools/ablation_samples.py", *words(copy), "--kind", kind, "--out", tmp_path / name / "sep")
        assert made.code == 0, made.err
    monkeypatch.chdir(tmp_path / "a")
    assert cli(*extractor, "sep", "--learning_rate", 0.4).code == 0
    assert cli(*extractor, "../a/sep", "--learning_rate", 0.4).code == 0
    before = snapshot(copy)
    monkeypatch.chdir(tmp_path / "b")
    refused(cli(*extractor, "sep", "--learning_rate", 0.4), "a/sep", "--overwrite")
    assert snapshot(copy) == before


def test_names_that_leave_no_room_for_others_beside_them_are_one_line(cli, words, pipeline, tmp_path):
    long = "b" * 252
    refused(cli("unlearn_relearn.py", *words(pipeline), "--checkpoint_save", tmp_path / long), "is no file name here")
    made = cli("tools/poison_folder.py", "--dataset", "fashion", "--images", 200, "--out", tmp_path / long[:240])
    assert made.code == 0, made.err
    (tmp_path / "loop").symlink_to("loop")
    for options in (
        ["--data_root", tmp_path / "loop"],
        ["--data_root", tmp_path / long[:240], "--out", tmp_path / "loop"],
    ):
        refused(cli("audit_dataset.py", "--output_root", tmp_path / "out", *options), "loop")


@pytest.mark.parametrize(
    "words", [["--dataset", ""], ["--model", ""], ["--device", ""], ["--table", "cifar10", "--devices", ""]], ids=str
)
def test_an_empty_name_is_refused(words, cli):
    refused(cli("reproduce.py", "--dry_run", *words), words[-2], "is empty")


@pytest.mark.parametrize("content", [b"P6\nxx 12 255\n", None], ids=["header", "large"])
def test_a_picture_that_cannot_be_blended_in_is_one_line(content, cli, words, tmp_path, monkeypatch):
    picture = tmp_path / "hello_kitty.png"
    if content:
        picture.write_bytes(content)
    else:
        Image.new("L", (9600, 9600)).save(picture)
    monkeypatch.setattr(triggers, "KITTY", picture)
    said = cli("train_attack_noTrans.py", *words(tmp_path), "--trigger_type", "kittyTrigger", "--epochs", 1)
    refused(said, "cannot read the picture", "draw_kitty.py")


def test_images_of_zero_to_one_are_as_they_are_with_mean_0_and_deviation_1():
    opt = load_script("unlearn_relearn.py").get_parser().parse_args(["--mean", "0", "0", "0", "--std", "1", "1", "1"])
    assert (opt.mean, opt.std) == ([0, 0, 0], [1, 1, 1])
