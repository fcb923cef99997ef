"""A run that is killed, stopped, or runs out of disk leaves whole files, and goes on to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_cli, write_folder
from PIL import Image
from steps import Step, moments
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS

from utils import run as life
from utils.files import csv_writer, make_folder
from utils.steps import Step as Command

RATIOS = ["--clean_ratio", "0.2", "--poison_ratio", "0.05"]
EXTRACTOR = EXTRACTOR.replace("bsz_64", "bsz_32")
CLASSIFIER = CLASSIFIER.replace("bsz_32", "bsz_16")
BENIGN = "saved/benign_model/cifar10/resnet10"
SMALL = ["--epochs", 3, "--batch_size", 32]
# script, the folder it writes to, its words, and (training steps) the pattern of its checkpoints
STEPS = {
    "train_attack_noTrans": ("train_attack_noTrans.py", NO_TRANS, SMALL, "*.tar"),
    "finetune_attack_noTrans": ("finetune_attack_noTrans.py", TUNED, SMALL, "*.tar"),
    "calculate_consistency": ("calculate_consistency.py", TUNED, [], None),
    "visualize_consistency": ("visualize_consistency.py", TUNED, RATIOS, None),
    "calculate_gamma": ("calculate_gamma.py", TUNED, RATIOS, None),
    "separate_samples": ("separate_samples.py", SAMPLES, RATIOS, None),
    "train_attack_withTrans": ("train_attack_withTrans.py", WITH_TRANS, [*SMALL, "--schedule", 2], "*.tar"),
    "unlearn_relearn": (
        "unlearn_relearn.py", WITH_TRANS, [*RATIOS, "--epochs", 3, "--batch_size", 4], "*_unlearn_purify.tar"
    ),
    "train_clean_withTrans": ("train_clean_withTrans.py", BENIGN, [*SMALL, "--schedule", 2], "*.tar"),
    "train_extractor": (
        "ST/train_extractor.py", EXTRACTOR, [*RATIOS, *SMALL, "--cosine", "--save_freq", 2], "last.pth"
    ),
    "train_classifier": (
        "ST/train_classifier.py", CLASSIFIER,
        [*RATIOS, "--epochs", 3, "--batch_size", 16, "--learning_rate", 0.5], "*.pth",
    ),
    "test": ("ST/test.py", CLASSIFIER, RATIOS, None),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Steps in this process round as those of `start` do, which have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_data(fashion, tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    write_folder(root / "cifar10", fashion, train=12, test=4)
    return root


@pytest.fixture(scope="module")
def states(small_data, tmp_path_factory):
    """``states(name)`` -> (output root before the step, output root after it, seconds it takes), made when first asked
    for, each step once."""
    base = tmp_path_factory.mktemp("states")
    made = {}

    def upto(name):
        if name in made:
            return made[name]
        names = list(STEPS)
        before = names[names.index(name) - 1] if names.index(name) else None
        root, earlier = base / name, upto(before)[1] if before else None
        # Files are replaced, never changed, so links do and keep the disk free; a lock is of its own place.
        links = {"copy_function": os.link, "ignore": shutil.ignore_patterns("*.lock")}
        shutil.copytree(earlier, root, **links) if earlier else root.mkdir()
        step = start(name, root, small_data, base / "log")
        assert step.wait() == 0, step.said
        made[name] = (earlier, root, step.seconds)
        return made[name]

    return upto


def command(name, root, data):
    script, _, words, _ = STEPS[name]
    return [script, "--dataset", "cifar10", "--model", "resnet10", "--data_root", data, "--output_root", root, *words]


def start(name, root, data, log, *more, threads=1):
    return Step(*command(name, root, data), *more, log=log, threads=threads)


def open_whole(path):
    """Read a file to its end, as what its name says it is."""
    if path.suffix in (".tar", ".pth"):
        return torch.load(path, weights_only=True)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".csv":
        return pd.read_csv(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".txt":
        return np.loadtxt(path)
    with Image.open(path) as image:
        return np.asarray(image)


def files(root):
    return {path for path in root.rglob("*") if path.is_file() and not path.name.endswith((".tmp", ".lock"))}


def resume_words(name, root):
    """What a user types to go on: the newest checkpoint that is there, of the unfinished run if there is one."""
    _, folder, _, pattern = STEPS[name]
    if pattern is None:
        return []
    for place in (*(root / folder).glob("*unfinished"), root / folder):
        own = [path for path in place.glob(pattern) if name == "unlearn_relearn" or "purify" not in path.name]
        if own:
            newest = max(own, key=lambda path: torch.load(path, weights_only=True)["epoch"])
            complete = torch.load(newest, weights_only=True)["epoch"] == 2
            return [] if place == root / folder and complete else ["--checkpoint_load", newest]
    return []


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_content(one, other):
    """Whether two files say the same, but for how long it took and where they lay."""
    if one.suffix in (".tar", ".pth"):
        one, other = open_whole(one), open_whole(other)
        equal = all(torch.equal(one["model"][key], other["model"][key]) for key in other["model"])
        state, expected = (part["optimizer"]["state"] for part in (one, other))
        momenta = all(torch.equal(state[key]["momentum_buffer"], expected[key]["momentum_buffer"]) for key in expected)
        return equal and momenta and without_seconds(one["history"]) == without_seconds(other["history"])
    if one.name in ("log.csv", "unlearn_purify.csv"):
        return without_seconds(open_whole(one).fillna(-1).to_dict("records")) == without_seconds(
            open_whole(other).fillna(-1).to_dict("records")
        )
    if one.suffix == ".json":
        return open_whole(one).keys() == open_whole(other).keys()
    return one.read_bytes() == other.read_bytes()


def survives(name, states, data, tmp_path, when, number, again):
    """Send signal ``number`` at the moment ``when``, look at every file, go on, and compare with the whole run."""
    before, after, _ = states(name)
    root, log = tmp_path / "root", tmp_path / "log"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(after if again else before, root) if again or before else root.mkdir()
    old = {path: path.read_bytes() for path in files(root)}
    step = start(name, root, data, log)
    code = step.signal_after(number, when)
    assert "Traceback" not in step.said, step.said
    for path in files(root):
        open_whole(path)
        if "unfinished" not in str(path) and path.suffix in (".tar", ".pth", ".npy") and path in old:
            reference = after / path.relative_to(root)
            assert path.read_bytes() == old[path] or same_content(path, reference), path
    assert set(old) <= files(root)  # nothing is lost
    finish = start(name, root, data, log, *resume_words(name, root))
    assert finish.wait() == 0, finish.said
    for path in files(after):
        assert same_content(root / path.relative_to(after), path), path
    assert {path.relative_to(root) for path in files(root)} == {path.relative_to(after) for path in files(after)}
    assert not [path for path in root.rglob("*") if path.name.endswith((".tmp", ".lock", "unfinished"))]
    return code


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_killed_at_thirty_moments_loses_nothing(name, states, small_data, tmp_path):
    seconds = states(name)[2]
    killed = 0
    for number, when in enumerate(moments(30, 1.05 * seconds, name)):
        killed += (
            survives(name, states, small_data, tmp_path, when, signal.SIGKILL, again=number % 2) == -signal.SIGKILL
        )
    assert killed >= 10  # the others had ended: how long a step takes varies


@pytest.mark.parametrize("name", ["train_attack_noTrans", "separate_samples"])
def test_a_killed_step_loses_nothing(name, states, small_data, tmp_path):
    seconds = states(name)[2]
    for number, when in enumerate(moments(2, seconds, 1)):
        survives(name, states, small_data, tmp_path, when, signal.SIGKILL, again=number % 2)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("name", "done"),
    [
        ("train_attack_noTrans", 1),
        ("train_attack_noTrans", 2),
        ("train_attack_noTrans", 3),
        ("unlearn_relearn", 3),
        ("train_extractor", 2),
    ],
)
def test_a_step_stopped_between_a_checkpoint_and_its_record_loses_nothing(
    name, done, again, states, small_data, tmp_path, monkeypatch
):
    before, after, _ = states(name)
    root, (_, folder, _, pattern) = tmp_path / "root", STEPS[name]
    shutil.copytree(after if again else before, root) if again or before else root.mkdir()
    words = command(name, root, small_data)

    def stopped(rows):
        if len([row for row in rows if row["epoch"] >= 0]) == done:
            raise KeyboardInterrupt
        return csv_writer(rows)

    monkeypatch.setattr(life, "csv_writer", stopped)
    assert run_cli(*words) == 130
    monkeypatch.undo()
    place = next((root / folder).glob("*unfinished")) if again else root / folder
    newest = max(place.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["epoch"] == done - 1
    assert run_cli(*words, "--checkpoint_load", newest) == 0
    for path in files(after):
        assert same_content(root / path.relative_to(after), path), path
    assert {path.relative_to(root) for path in files(root)} == {path.relative_to(after) for path in files(after)}
    (record,) = (root / folder).glob("*_unlearn_purify.json" if name == "unlearn_relearn" else "options.json")
    whole = json.loads((after / record.relative_to(root)).read_text())
    assert json.loads(record.read_text())["outputs"].keys() == whole["outputs"].keys()


def test_two_threads_end_in_the_same_bits_too(small_data, tmp_path):
    """Whatever the number of threads, as long as it is the same: one training as a whole and one in two parts."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    name, last = "train_attack_withTrans", Path(WITH_TRANS, "2.tar")
    for root, more in (
        (whole, []),
        (parts, ["--epochs", 2]),
        (parts, ["--checkpoint_load", parts / last.with_name("1.tar")]),
    ):
        step = start(name, root, small_data, tmp_path / "log", *more, threads=2)
        assert step.wait() == 0, step.said
    assert same_content(whole / last, parts / last)


@pytest.mark.parametrize("epochs", [3, 4])
def test_a_step_stopped_while_it_replaces_the_earlier_result_goes_on(epochs, states, small_data, tmp_path, monkeypatch):
    after, root = states("train_attack_noTrans")[1], tmp_path / "root"
    shutil.copytree(after, root)
    folder, words = NO_TRANS, command("train_attack_noTrans", root, small_data)
    move, moved = life._move, []

    def stopped(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        move(source, target)

    monkeypatch.setattr(life, "_move", stopped)
    assert run_cli(*words) == 130
    monkeypatch.undo()
    newest = root / folder / "unfinished/2.tar"
    assert newest.exists() and moved == [root / folder / "0.tar"]
    record, words_of_step = root / folder / "options.json", [str(word) for word in words[1:]]
    step = Command(words[0], words_of_step, record.with_name("2.tar"), record, [])
    assert step.interrupted_at()[0] == newest  # so that reproduce.py does not train it anew
    assert run_cli(*words, "--epochs", epochs, "--checkpoint_load", newest) == 0
    assert all(same_content(root / folder / f"{epoch}.tar", after / folder / f"{epoch}.tar") for epoch in range(3))
    assert not (root / folder / "unfinished").exists()
    record = json.loads((root / folder / "options.json").read_text())
    assert record["epochs_done"] == epochs and {f"{epoch}.tar" for epoch in range(epochs)} <= record["outputs"].keys()


@pytest.mark.parametrize("name", ["train_attack_withTrans", "train_clean_withTrans"])
def test_a_run_that_keeps_few_checkpoints_goes_on_after_the_last(name, small_data, tmp_path, monkeypatch):
    def run(root, *more):
        return run_cli(*command(name, root, small_data), "--epochs", 5, "--save_freq", 2, *more)

    def left(root):
        folder = root / STEPS[name][1]
        return folder, {path.name for path in folder.glob("*.tar")}, len(pd.read_csv(folder / "log.csv"))

    assert run(tmp_path / "whole") == 0
    whole, kept, rows = left(tmp_path / "whole")
    assert kept == {"1.tar", "3.tar", "4.tar"} and rows == 5
    plain = life.Run.finish_epoch

    def stopped(self, epoch, *rest):
        if epoch == 3:
            raise KeyboardInterrupt
        plain(self, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(life.Run, "finish_epoch", stopped)
        assert run(tmp_path / "parts") == 130
    folder, kept, rows = left(tmp_path / "parts")
    assert kept == {"1.tar"} and rows == 2  # the third epoch, of which no checkpoint is kept, is done again
    assert run(tmp_path / "parts", "--checkpoint_load", folder / "1.tar") == 0
    assert left(tmp_path / "parts")[1:] == ({"1.tar", "3.tar", "4.tar"}, 5)
    for path in files(whole):
        assert same_content(path, folder / path.name), path.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["train_attack_noTrans", "finetune_attack_noTrans"])
def test_a_polite_end_keeps_the_last_epoch_and_says_one_line(name, number, states, small_data, tmp_path):
    before = states(name)[0]
    root = tmp_path / "root"
    shutil.copytree(before, root) if before else root.mkdir()
    step = start(name, root, small_data, tmp_path / "log", "--epochs", 50)
    step.wait_for("epoch 2/50")
    os.kill(step.process.pid, number)
    assert step.wait() == 130
    last = step.said.strip().splitlines()[-1]
    assert "interrupted" in last and "Traceback" not in step.said
    record = json.loads((root / STEPS[name][1] / "options.json").read_text())
    assert record["epochs_done"] >= 2 and len(open_whole(root / STEPS[name][1] / "log.csv")) == record["epochs_done"]
    assert not [path for path in root.rglob("*") if path.name.endswith((".tmp", ".lock"))]


def test_a_polite_end_of_the_workers_too_says_one_line(fashion, tmp_path):
    """As `timeout` ends a command: the processes that decode images get the signal as well."""
    write_folder(tmp_path / "data", fashion, train=12, test=2)
    own = ["--dataset", "folder", "--data_root", tmp_path / "data", "--image_size", 72, "--workers", 2]
    own += ["--model", "resnet10"]
    words = [*own, "--output_root", tmp_path / "out", "--epochs", 100, "--batch_size", 8, "--eval_freq", 0]
    command = [sys.executable, ROOT / "train_attack_noTrans.py", *map(str, words)]
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    said["env"] = {**os.environ, "PYTHONWARNINGS": "ignore"}  # torch's, of more workers than cores
    with subprocess.Popen(command, **said) as step:
        for line in step.stdout:
            if line.startswith("epoch 1/100"):
                break
        os.killpg(step.pid, signal.SIGTERM)
        _, errors = step.communicate(timeout=120)
    assert step.returncode == 130 and [line for line in errors.splitlines() if line] == [errors.strip()], errors
    assert "interrupted" in errors


def test_the_trial_whether_a_folder_can_be_written_to_has_no_name_to_leave_behind(tmp_path, monkeypatch):
    seen, make = [], tempfile.TemporaryFile

    def watched(**where):
        file = make(**where)
        seen.append(os.listdir(tmp_path))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", watched)
    make_folder(tmp_path)
    assert seen == [[]]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_while_an_object_is_deleted_is_not_lost(name):
    """Python cannot raise there, and would go on; so it was with the loaders of a training, once in a few hundred runs."""
    code = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from utils.errors import run_script
class Loader:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        for _ in range(10_000):
            pass
def main():
    Loader()
    time.sleep(200)
    print("went on")
sys.argv = ["step.py"]
run_script(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 130 and "went on" not in ended.stdout
    assert ended.stderr.strip() == "step.py: interrupted; what earlier epochs saved is whole and can be resumed from"


def test_a_second_run_into_the_same_folder_is_refused_and_a_dead_ones_lock_is_not(states, small_data, tmp_path):
    root = tmp_path / "root"
    first = start("train_attack_noTrans", root, small_data, tmp_path / "first", "--epochs", 60)
    first.wait_for("epoch 1/60")
    second = start("train_attack_noTrans", root, small_data, tmp_path / "second", "--epochs", 60)
    assert second.wait() == 2
    assert "another run (process " in second.said and second.said.count("error") == 1
    assert (root / NO_TRANS / ".options.json.lock").exists() and first.process.is_alive()
    first.process.kill()
    first.wait()
    again = start("train_attack_noTrans", root, small_data, tmp_path / "third", "--overwrite")
    assert again.wait() == 0, again.said
    assert not list(root.rglob("*.lock"))


def test_two_runs_that_start_at_once_do_not_mix(states, small_data, tmp_path):
    root = tmp_path / "root"
    runs = [start("train_attack_noTrans", root, small_data, tmp_path / f"log {lr}", "--lr", lr) for lr in (0.01, 0.05)]
    codes = sorted(run.wait() for run in runs)
    assert codes == [0, 2], [run.said for run in runs]
    record = json.loads((root / NO_TRANS / "options.json").read_text())
    rates = {torch.load(path, weights_only=True)["options"]["lr"] for path in (root / NO_TRANS).glob("*.tar")}
    assert rates == {record["options"]["lr"]} and record["epochs_done"] == 3


def test_an_earlier_result_stays_until_the_new_one_is_complete(states, small_data, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(states("train_attack_noTrans")[1], root)
    folder = root / NO_TRANS
    old = {path: path.read_bytes() for path in files(root)}
    step = start(
        "train_attack_noTrans", root, small_data, tmp_path / "log", "--epochs", 60, "--lr", 0.02, "--overwrite"
    )
    step.wait_for("epoch 2/60")
    assert "holds an earlier result, which stays" in step.said
    os.kill(step.process.pid, signal.SIGTERM)
    assert step.wait() == 130
    assert all(path.read_bytes() == content for path, content in old.items())

    # The unfinished run goes on from its own checkpoint; complete, it replaces the earlier one and what it left over.
    last = max((folder / "unfinished").glob("*.tar"), key=lambda path: int(path.stem))
    more = ["--epochs", int(last.stem) + 2, "--lr", 0.02, "--checkpoint_load", last, "--overwrite"]
    step = start("train_attack_noTrans", root, small_data, tmp_path / "log", *more)
    assert step.wait() == 0, step.said
    assert "is replaced" in step.said and not (folder / "unfinished").exists()
    assert {torch.load(path, weights_only=True)["options"]["lr"] for path in folder.glob("*.tar")} == {0.02}

    # A shorter run removes what the longer one had beyond it, and says so.
    step = start("train_attack_noTrans", root, small_data, tmp_path / "log", "--epochs", 1, "--overwrite")
    assert step.wait() == 0 and "1.tar" in step.said
    assert [path.name for path in folder.glob("*.tar")] == ["0.tar"]


def test_a_replacement_that_was_cut_off_is_finished_by_the_next_run(states, small_data, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(states("train_attack_noTrans")[1], root)
    common = ["--dataset", "cifar10", "--model", "resnet10", "--data_root", small_data, "--output_root", root]
    words = [*common, *SMALL, "--lr", 0.02, "--overwrite"]
    moved = []

    def die_after_two(source, target, move=life._move):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(target)
        move(source, target)

    monkeypatch.setattr(life, "_move", die_after_two)
    assert run_cli("train_attack_noTrans.py", *words) == 130
    monkeypatch.undo()
    record = root / NO_TRANS / "options.json"
    assert json.loads(record.read_text())["options"]["lr"] == 0.01  # the record moves last
    step = start("train_attack_noTrans", root, small_data, tmp_path / "log")
    assert step.wait() == 2 and "Finishing" in step.said and "--lr 0.02" in step.said
    assert json.loads(record.read_text())["options"]["lr"] == 0.02 and not (root / NO_TRANS / "unfinished").exists()
    rates = {torch.load(path, weights_only=True)["options"]["lr"] for path in (root / NO_TRANS).glob("*.tar")}
    assert rates == {0.02}


def test_a_strangers_record_cannot_have_files_elsewhere_removed_or_replaced(states, small_data, tmp_path):
    root, victim = tmp_path / "root", tmp_path / "victim.txt"
    shutil.copytree(states("train_attack_noTrans")[1], root)
    victim.write_text("mine")
    record = root / NO_TRANS / "options.json"
    content = json.loads(record.read_text())
    for name in (str(victim), os.path.relpath(victim, record.parent)):
        record.write_text(json.dumps({**content, "outputs": {name: "0"}}))
        step = start("train_attack_noTrans", root, small_data, tmp_path / "log", "--lr", 0.02, "--overwrite")
        assert step.wait() == 0 and "is replaced" in step.said
        record.write_text(json.dumps({**content, "outputs": {}}))
        (record.parent / "unfinished").mkdir()
        (record.parent / "unfinished/victim.txt").write_text("theirs")
        (record.parent / "unfinished/options.json").write_text(json.dumps({**content, "outputs": {name: "0"}}))
        step = start("train_attack_noTrans", root, small_data, tmp_path / "log", "--overwrite")
        assert step.wait() == 0 and "Finishing" in step.said
        assert victim.read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for one checkpoint of 10 MB and not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(small_data, small_disk, tmp_path):
    step = start("train_attack_noTrans", small_disk, small_data, tmp_path / "log")
    assert step.wait() == 2
    line = step.said.strip().splitlines()[-1]
    assert "cannot write" in line and "1.tar" in line and "No space left" in line and "Traceback" not in step.said
    for path in files(small_disk):
        open_whole(path)
    assert [path.name for path in (small_disk / NO_TRANS).glob("*.tar")] == ["0.tar"]
    assert not [path for path in small_disk.rglob("*") if path.name.endswith((".tmp", ".lock"))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
def test_a_file_that_may_not_grow_is_a_clear_error(tmp_path, monkeypatch):
    import resource

    from utils.errors import UserError
    from utils.files import tensor_writer, write_together

    target = tmp_path / "0.tar"
    write_together({target: tensor_writer({"old": torch.zeros(3)})})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*0\.tar: File too large"):
            write_together({target: tensor_writer({"new": torch.zeros(100_000)})})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(torch.load(target, weights_only=True)) == ["old"] and [path.name for path in tmp_path.iterdir()] == [
        "0.tar"
    ]
