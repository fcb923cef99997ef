"""Peak memory: of the steps on streamed images, which must not grow with their number, and of the extractor on a GPU."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from models import SupConResNet

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


def steps_of(root, output):
    """The steps of SD and BR on the images below ``root``, by script: the words of each command after it."""
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
    return {
        script: [*common, *more, "--workers", 2]
        for script, *more in (
            ("train_attack_noTrans.py", "--epochs", 1),
            ("finetune_attack_noTrans.py", "--epochs", 1, "--checkpoint_load", model),
            ("calculate_consistency.py", *tau, "--checkpoint_load", model),
            ("separate_samples.py", *tau, "--checkpoint_load", model),
            ("train_attack_withTrans.py", "--epochs", 1),
            ("unlearn_relearn.py", "--epochs", 1, "--batch_size", 100),
        )
    }


def peak_of(script, words):
    """Peak resident memory in MB of a step and its worker processes, the largest process."""
    command = [sys.executable, "-c", MEASURE, sys.executable, ROOT / script, *words]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, (script, result.stderr)
    return int(result.stdout)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_a_streamed_folder(tmp_path):
    pytest.importorskip("resource")
    steps = {}
    for count in (2000, 20_000):
        fill(tmp_path / f"{count}/data", count)
        steps[count] = steps_of(tmp_path / f"{count}/data", tmp_path / f"{count}/out")
    for script, words in steps[2000].items():
        few = peak_of(script, words)
        found = [peak_of(script, steps[20_000][script])]
        if found[0] >= 1.05 * few + 20:  # now and then a peak of a few batches; growth is there every time
            found.append(peak_of(script, steps[20_000][script]))
        print(script, few, found)
        assert min(found) < 1.05 * few + 20, (script, few, found)


GIB = 2**30
SMALL_GPU = 8 * GIB
VIEWS = 2 * 512  # images in a batch of the authors' README's extractor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_extractor_keeps_for_the_backward_pass_leaves_room_on_a_gpu_of_8_gb(dtype):
    network = SupConResNet("resnet18", size=32).to(memory_format=torch.channels_last).train()
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    count = 16  # every layer keeps as much again for each further image
    inputs = torch.zeros(count, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        outputs = network(inputs)
    assert outputs.shape[0] == count
    activations = sum(kept.values()) / count * VIEWS
    copies = 3 * sum(weight.nbytes for weight in network.parameters())  # weights, gradients, momentum
    print(f"{dtype}: {activations / GIB:.2f} GiB for the backward pass, {copies / GIB:.2f} GiB of weights")
    assert 2 * GIB < activations < 5 * GIB  # the rest is for the context, cuDNN's workspace and fragments
    assert activations + copies < 0.7 * SMALL_GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("setting", ["off", "auto"])
def test_the_documents_extractor_trains_within_8_gb(setting, precision, cli, tmp_path):
    """The last batch is as much smaller as CIFAR-10's is."""
    device = torch.cuda.current_device()
    whole = torch.cuda.get_device_properties(device).total_memory
    common = ["--dataset", "fashion", "--model", "resnet18", "--train_images", 2384, "--output_root", tmp_path]
    assert cli("tools/ablation_samples.py", *common, "--kind", "random", "--out", tmp_path / "drawn").code == 0
    train = ["--samples", tmp_path / "drawn", "--epochs", 2, "--cosine", "--batch_size", 512, "--compile", setting,
             "--precision", precision]  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (SMALL_GPU - GIB) / whole), device)  # 1 GiB: the context's
    try:
        said = cli("ST/train_extractor.py", *common, *train, "--device", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert said.code == 0, said.err
    found = {
        "compile": setting,
        "precision": precision,
        "peak_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2),
    }
    print(json.dumps(found))
    assert found["peak_gib"] < 7
