"""Peak memory of the steps on streamed images, which must not grow with their number."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(code)
"""


def fill(root, count):
    """``count`` JPEG files of 96x96 in four classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / "train" / f"class {number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = (rng.integers(0, 128, (6, 6, 3)) + 30 * (number % 4)).astype(np.uint8)
        Image.fromarray(coarse).resize((96, 96), Image.BICUBIC).save(folder / f"{number}.jpg", quality=80)


def peaks(root, output):
    """Peak resident memory in MB of each step of SD and BR and their worker processes, the largest process of each."""
    pytest.importorskip("resource")
    common = [
        "--dataset",
        "folder",
        "--data_root",
        root,
        "--image_size",
        72,
        "--model",
        "resnet10",
        "--output_root",
        output,
    ]
    tau = ["--trans1", "flip", "--trans2", "none"]
    model = output / "saved/backdoored_model/poison_rate_unknown/noTrans/folder_data/resnet10/unknown/0.tar"
    found = {}
    for script, *more in (
        ("train_attack_noTrans.py", "--epochs", 1),
        ("finetune_attack_noTrans.py", "--epochs", 1, "--checkpoint_load", model),
        ("calculate_consistency.py", *tau, "--checkpoint_load", model),
        ("separate_samples.py", *tau, "--checkpoint_load", model),
        ("train_attack_withTrans.py", "--epochs", 1),
        ("unlearn_relearn.py", "--epochs", 1, "--batch_size", 100),
    ):
        command = [sys.executable, "-c", MEASURE, sys.executable, ROOT / script, *common, *more, "--workers", 2]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, (script, result.stderr)
        found[script] = int(result.stdout)
    return found


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_a_streamed_folder(tmp_path):
    found = {}
    for count in (2000, 20_000):
        fill(tmp_path / f"{count}/data", count)
        found[count] = peaks(tmp_path / f"{count}/data", tmp_path / f"{count}/out")
    print(found)
    for script, peak in found[2000].items():
        assert found[20_000][script] < 1.05 * peak + 20, (script, found)
