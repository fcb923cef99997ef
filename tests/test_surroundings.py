"""What surrounds a script: the folder it is started in, files it may not read, disks and shared memory that are full, workers that
die."""

import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, write_folder
from PIL import Image
from test_bad_input import refused
from test_pipeline import TUNED

from utils import audit, dataloader_bd, device, files
from utils.dataloader_bd import Views, fetch, workers_that_fit
from utils.device import Runtime, choose_runtime
from utils.errors import UserError
from utils.files import sha256
from utils.images import StreamedImages
from utils.paths import relative
from utils.rows import one_cell, plan
from utils.transforms import CropFlip

DRY_RUNS = [
    ("reproduce.py", "--table", "cifar10", "--scale", "cpu", "--rows", "BadNets-all2one"),
    ("reproduce.py", "--row", "CL", "--preset", "quick", "--output_root", ROOT / "runs"),
    ("tools/secure_curve.py", "--scale", "cpu", "--epochs", 4, "--every", 2),
    ("tools/figure3.py", "--scale", "cpu", "--rows", "SIG"),
]


@pytest.mark.parametrize("command", DRY_RUNS, ids=lambda command: " ".join(map(str, command[:3])))
def test_the_commands_are_the_same_from_every_folder(command, cli, monkeypatch, tmp_path):
    found = []
    for place in (ROOT, tmp_path):
        monkeypatch.chdir(place)
        said = cli(*command, "--dry_run")
        assert said.code == 0, said.err
        found.append([line for line in said.out.splitlines() if "python " in line])
    assert all(line.startswith("python ") for line in found[0]) and len(found[0]) > 3
    assert found[1] == [f"cd {ROOT} && {line}" for line in found[0]]  # each is a job of its own


@pytest.mark.parametrize(
    ("quota", "found"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 1000), ("", 1000), (None, 1000)]
)
def test_a_containers_share_of_the_processor_counts(quota, found, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1000), raising=False)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert device.cores(tmp_path / "cpu.max") == found


def test_more_threads_than_the_container_may_use_are_not_taken(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "cores", lambda: 1)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's own word
        choose_runtime("cpu")
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        choose_runtime("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_without_a_folder_for_temporary_files_a_script_says_so(monkeypatch, capsys, cli):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    refused(cli("calculate_gamma.py"), "set TMPDIR")
    assert cli("calculate_gamma.py", "--help").code == 0


def test_between_two_drives_paths_are_absolute(monkeypatch, tmp_path):
    def of_windows(path, start):
        raise ValueError(f"path is on mount 'D:', start on mount {start}")

    assert relative(tmp_path / "a/b", tmp_path / "c") == "../a/b"
    monkeypatch.setattr(os.path, "relpath", of_windows)
    assert relative(tmp_path / "a", tmp_path / "c") == str(tmp_path / "a")


def test_a_step_is_found_done_from_every_folder(monkeypatch, tmp_path):
    outputs = []
    for place in (ROOT, tmp_path):
        monkeypatch.chdir(place)
        steps, resolved = plan(one_cell("cifar10", "SIG", "cpu", 0, "D-ST", ROOT / "runs"))
        assert steps["train_classifier"].options().ckpt == steps["train_extractor"].output
        outputs.append(([step.output for step in steps.values()], resolved.output_root))
    assert outputs[0] == outputs[1] and outputs[0][1] == ROOT / "runs"


def test_the_audit_takes_data_of_the_repository_from_every_folder(monkeypatch, tmp_path):
    module = load_script("audit_dataset.py")
    monkeypatch.chdir(tmp_path)
    opt = module.get_parser().parse_args(["--data_root", str(ROOT / "photos"), "--output_root", str(ROOT / "mine")])
    resolved, words, _ = module.resolve(opt)
    assert (resolved.data_root, resolved.output_root) == (ROOT / "photos", ROOT / "mine")
    assert words[words.index("--data_root") + 1] == "photos"  # as it is typed in the folder of the repository


@pytest.mark.parametrize("name", ["a/b", "..", "/x", ""])
def test_the_name_of_a_table_is_no_path(cli, tmp_path, name):
    refused(cli("reproduce.py", "--dry_run", "--output_root", tmp_path, "--name", name), "--name")


def test_the_audit_does_not_write_among_the_images(cli, fashion, tmp_path, monkeypatch):
    write_folder(tmp_path / "own", fashion, train=3, test=1)
    before = sorted(tmp_path.rglob("*"))
    for name in ("--out", "--output_root"):
        said = cli("audit_dataset.py", "--data_root", tmp_path / "own", name, tmp_path / "own/train/new")
        refused(said, name, "among the images")
    monkeypatch.chdir(tmp_path / "own/test")
    refused(cli("audit_dataset.py", "--data_root", ".."), "--out report")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/train").symlink_to(tmp_path / "own/train")
    before = sorted(tmp_path.rglob("*"))
    for name in ("--out", "--output_root", "--write_clean"):
        said = cli("audit_dataset.py", "--data_root", tmp_path / "linked", name, tmp_path / "linked/train/new")
        refused(said, "among the images" if name != "--write_clean" else "lies in the folder that is audited")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_may_not_be_read_is_one_line(cli, words, copy, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", denied, raising=False)  # root may read everything
    with pytest.raises(UserError, match=r"no permission to read .*1\.tar"):
        sha256(copy / TUNED / "1.tar")
    refused(cli("calculate_gamma.py", *words(copy)), "no permission to read", "1_all.txt")
    monkeypatch.undo()
    monkeypatch.setattr(torch, "load", denied)
    refused(cli("unlearn_relearn.py", *words(copy)), "no permission to read")


def test_a_full_disk_under_the_log_is_one_line():
    program = "import sys; from utils.errors import run_script; sys.argv = ['x.py']; run_script(lambda: print('a line ' * 99))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write what it prints" in done.stderr


def test_an_empty_number_of_processes_is_one(monkeypatch):
    from utils.errors import processes_wanted

    for value, count in (("", 1), ("3", 3)):
        monkeypatch.setenv("WORLD_SIZE", value)
        assert processes_wanted() == count
    monkeypatch.delenv("WORLD_SIZE")
    assert processes_wanted() == 1


def streamed(tmp_path, count):
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return StreamedImages(sorted(tmp_path.glob("*.png")), 32)


DECODE = """
import sys, torch
from utils.dataloader_bd import fetch
from utils.device import Runtime
from utils.errors import run_script
from utils.images import StreamedImages
def main():
    images = StreamedImages([sys.argv[1]], 32)
    print(next(fetch(images, [torch.arange(1)], Runtime(torch.device("cpu"), torch.float32, 1))).shape)
run_script(main)
"""
FORK = """
import sys
from utils import forked
forked.begin(sys.argv)
process = forked.context.Process(target=print, args=("forked",))
process.start()
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the length of a socket's name is Linux's")
@pytest.mark.parametrize("program", [DECODE, FORK], ids=["worker", "fork server"])
def test_a_deep_folder_for_temporary_files_does_not_stop_the_workers(program, tmp_path):
    deep = tmp_path / ("t" * 100)
    deep.mkdir()
    streamed(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "0.png"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "TMPDIR": str(deep)})  # fmt: skip
    assert done.returncode == 0 and done.stdout in ("torch.Size([1, 3, 32, 32])\n", "forked\n"), done.stderr
    assert not any(deep.iterdir())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_while_workers_decode_is_one_line(tmp_path, workers):
    images = streamed(tmp_path, 4)
    (tmp_path / "2.png").unlink()
    batches = fetch(images, list(torch.arange(4).split(2)), Runtime(torch.device("cpu"), torch.float32, workers))
    assert next(batches).shape == (2, 3, 32, 32)
    with pytest.raises(UserError, match=r"2\.png") as found:
        next(batches)
    assert "Traceback" not in str(found.value)


def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch):
    def killed(*_, **__):
        yield torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(dataloader_bd, "DataLoader", killed)
    batches = fetch(streamed(tmp_path, 1), [torch.arange(1)], Runtime(torch.device("cpu"), torch.float32, 1))
    next(batches)
    with pytest.raises(UserError, match="fewer --workers"):
        next(batches)


def test_no_more_workers_than_shared_memory_has_room_for(tmp_path, monkeypatch, capsys):
    images, splits = streamed(tmp_path, 8), list(torch.arange(8).split(4))
    batch = 4 * 32 * 32 * 3
    views = Views(CropFlip(), [{}, {}])
    dataloader_bd._tell_once.cache_clear()
    for room, change, expected in (
        (100 * batch, None, 8),
        (7 * batch, None, 2),
        (7 * 8 * batch, views, 2),
        (batch, None, 0),
    ):
        monkeypatch.setattr(
            dataloader_bd.os, "statvfs", lambda path, room=room: SimpleNamespace(f_bavail=room // 4, f_frsize=4)
        )
        assert workers_that_fit(8, images, splits, change) == expected
    assert capsys.readouterr().out.count("--shm-size") == 2  # once for each number


@pytest.mark.parametrize(
    "error", [MemoryError, RuntimeError, NotImplementedError, AttributeError, OverflowError, KeyError]
)
def test_whatever_a_reader_raises_of_a_broken_image_it_is_skipped(error, tmp_path, monkeypatch, fashion):
    from utils.datasets import DATASETS
    from utils.own_data import load

    write_folder(tmp_path / "own", fashion, train=3, test=1)
    bad = sorted((tmp_path / "own/train").rglob("*.png"))[4]
    opened = Image.open

    def reader(file, *more, **named):
        if str(file) == str(bad) or getattr(file, "name", None) == str(bad):
            raise error("Failed to decode image")
        return opened(file, *more, **named)

    monkeypatch.setattr(Image, "open", reader)
    data = load("folder", tmp_path / "own", DATASETS["folder"], False, None, tmp_path / "cache")
    assert len(data.train_labels) == 29 and [name for name in data.skipped if bad.name in name]


def test_one_label_for_all_shows_no_backdoor():
    images, labels, spec = (
        np.zeros((99, 4, 4, 3), dtype=np.uint8),
        np.zeros(99, dtype=np.int64),
        SimpleNamespace(num_classes=2),
    )
    row, words, order = audit.sign_of_backdoor(None, images, labels, np.zeros(99), ["a", "b"], spec, None, 0)
    assert row is None and order is None and "one label" in words
