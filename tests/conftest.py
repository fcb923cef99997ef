"""A small real data set in folder form, and the steps run on it as a user would: by options, on disk."""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import run_script
from utils.loading import load_dataset


def pytest_configure():
    """Under ``pytest -n`` the processes share the cores, and so do those that they start. Started in the background, where a shell
    has Ctrl-C ignored, pytest still has steps that can be interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class SameBatches:
    """``count`` batches of ``size`` samples of label 0 each, as `dataloader_bd.Batches` gives them; the only feature of a sample is the
    number of its batch."""

    streamed = False

    def __init__(self, count, size):
        self.count, self.batch_size, self.labels = count, size, torch.zeros(count * size, dtype=torch.int64)

    def __len__(self):
        return self.count

    def epoch(self, number):
        for batch, labels in enumerate(self.labels.chunk(self.count)):
            yield torch.full((len(labels), 1), float(batch)), labels, None


def load_script(name):
    """The module of a script, e.g. "ST/test.py", loaded from its file without running it."""
    spec = importlib.util.spec_from_file_location("script_" + Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_cli(name, *words):
    """Run a script in this process as the command line would; return the exit code. It prints to sys.stdout."""
    module = load_script(name)
    before = sys.argv
    sys.argv = [name, *map(str, words)]
    try:
        run_script(module.main)
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def cli(capsys):
    """``cli(script, *words)`` -> namespace with code, out and err."""

    def run(name, *words):
        capsys.readouterr()
        code = run_cli(name, *words)
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    run.module = load_script
    return run


@pytest.fixture
def in_process(monkeypatch):
    """The steps in this process, where torch is loaded already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("utils.steps.run_apart", lambda script, words, log=None, stop=None: run_cli(script, *words))


@pytest.fixture(scope="session")
def fashion():
    return load_dataset("fashion", ROOT / "dataset")


def write_folder(root, dataset, train, test):
    """Write the first ``train`` and ``test`` images of each class as <root>/<split>/<class>/*.png."""
    for split, count in (("train", train), ("test", test)):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        for label in np.unique(labels):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for number, row in enumerate(np.flatnonzero(labels == label)[:count]):
                Image.fromarray(images[row]).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="session")
def data_root(fashion, tmp_path_factory):
    """A data root whose cifar10 folder holds 400 + 100 small images (of Fashion-MNIST, which is at hand)."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "cifar10", fashion, train=40, test=10)
    return root


@pytest.fixture(scope="session")
def words(data_root):
    """``words(output_root)`` -> the options that every step of a test run shares."""

    def common(output_root):
        return ["--dataset", "cifar10", "--model", "resnet10", "--data_root", data_root, "--output_root", output_root]

    return common


def run_all(common, epochs=2, device=(), further=None):
    """All numbered steps with small settings; returns the exit codes. ``device``: options of those that compute, which
    calculate_gamma does not; ``further``: more options, by script."""
    ratios = ["--clean_ratio", "0.2", "--poison_ratio", "0.05"]
    steps = [
        ("train_attack_noTrans.py", "--epochs", epochs, "--batch_size", 64),
        ("finetune_attack_noTrans.py", "--epochs", epochs, "--batch_size", 64),
        ("calculate_consistency.py",),
        ("visualize_consistency.py", *ratios),
        ("calculate_gamma.py", *ratios),
        ("separate_samples.py", *ratios),
        ("train_attack_withTrans.py", "--epochs", epochs, "--schedule", 1, "--batch_size", 64),
        ("unlearn_relearn.py", *ratios, "--epochs", epochs, "--batch_size", 16),
        ("ST/train_extractor.py", *ratios, "--epochs", epochs, "--batch_size", 64, "--cosine", "--save_freq", 1),
        ("ST/train_classifier.py", *ratios, "--epochs", epochs, "--batch_size", 32, "--learning_rate", 0.5),
        ("ST/test.py", *ratios),
    ]
    further = further or {}
    return [
        run_cli(name, *common, *(device if name != "calculate_gamma.py" else ()), *more, *further.get(name, ()))
        for name, *more in steps
    ]


@pytest.fixture(scope="session")
def pipeline(words, tmp_path_factory):
    """The output root of one run of every step."""
    root = tmp_path_factory.mktemp("pipeline")
    assert run_all(words(root)) == [0] * 11
    return root


@pytest.fixture
def copy(pipeline, tmp_path):
    """A copy of the pipeline's output whose files are links: to be replaced, not written into."""
    root = tmp_path / "copy"
    shutil.copytree(pipeline, root, copy_function=os.link)
    return root


@pytest.fixture(autouse=True)
def _quiet_bars(monkeypatch):
    monkeypatch.chdir(ROOT)  # messages name scripts and files as they are seen from there
    monkeypatch.setenv("TQDM_DISABLE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
