"""Several processes on one training give what one gives: on the CPU, with gloo and two processes."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import ROOT, run_cli, write_folder
from steps import Step
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS, weights
from torch import nn

from utils import distributed
from utils.distributed import SharedBatchNorm, device_of


def on_several(script, *words, log, count=2):
    """Run a script as torchrun starts it, in ``count`` processes; return what the first said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    steps = [
        Step(script, *words, log=f"{log}.{rank}", env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    codes = [step.wait() for step in steps]
    assert codes == [0] * count, "".join(step.said for step in steps)
    assert not any(step.said.strip() for step in steps[1:]), "another process than the first prints"
    assert f"{count} processes" in steps[0].said
    return steps[0].said


BENIGN = "saved/benign_model/cifar10/resnet10"
RATIOS = ["--clean_ratio", 0.2, "--poison_ratio", 0.05]
# Few steps, for what is rounded otherwise grows about tenfold a step here; 133 is no multiple of two.
STEPS = {
    "train_attack_noTrans.py": (NO_TRANS, "0.tar", ["--epochs", 1, "--batch_size", 133]),
    "finetune_attack_noTrans.py": (TUNED, "0.tar", ["--epochs", 1, "--batch_size", 133]),
    "train_attack_withTrans.py": (WITH_TRANS, "0.tar", ["--epochs", 1, "--batch_size", 133]),
    "train_clean_withTrans.py": (BENIGN, "0.tar", ["--epochs", 1, "--batch_size", 133]),
    "unlearn_relearn.py": (WITH_TRANS, "1_unlearn_purify.tar",
                           [*RATIOS, "--epochs", 1, "--batch_size", 13, "--drop_doubtful"]),
    "ST/train_extractor.py": (EXTRACTOR.replace("bsz_64", "bsz_133"), "last.pth",
                              [*RATIOS, "--epochs", 1, "--batch_size", 133, "--cosine"]),
    "ST/train_classifier.py": (CLASSIFIER.replace("bsz_32", "bsz_33"), "ckpt_epoch_0.pth",
                               [*RATIOS, "--epochs", 1, "--batch_size", 33, "--learning_rate", 0.5]),
}  # fmt: skip


def exact_normalisation(network, runtime, unused=False):
    """Of one process: torch's own normalisation on a CPU is off by up to 1e-4 of the variance, more than what is tested."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm
    return network


# Those that go by the same code as another are slow tests.
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("train_clean_withTrans.py", "train_attack_noTrans.py") else []
        )
        for name in STEPS
    ],
)
def test_two_processes_train_what_one_trains(script, pipeline, words, tmp_path, monkeypatch):
    folder, name, more = STEPS[script]
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        shutil.copytree(pipeline, root, copy_function=os.link)
        (root / folder / name).unlink(missing_ok=True)
    more = [*more, "--overwrite", "--precision", "float32"]  # rounding alone would hide what differs in bfloat16
    on_several(script, *words(roots[1]), *more, log=tmp_path / "said")
    monkeypatch.setattr("utils.engine.parallel", exact_normalisation)
    monkeypatch.setattr(distributed._Sum, "apply", lambda value: value)
    assert run_cli(script, *words(roots[0]), *more) == 0
    before, after = (weights(root / folder / name) for root in roots)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
    log = "unlearn_purify.csv" if script == "unlearn_relearn.py" else "log.csv"
    one, two = (pd.read_csv(root / folder / log) for root in roots)
    assert one.columns.tolist() == two.columns.tolist()
    for column in one.columns.drop("seconds"):
        np.testing.assert_allclose(
            two[column], one[column], rtol=1e-3, atol=1.2 if column.isupper() else 0.3, err_msg=column
        )
    assert not list((roots[1] / folder).glob("*unfinished"))


@pytest.mark.slow
def test_two_processes_clean_a_network_with_auxiliary_outputs(copy, words, tmp_path):
    """Outputs of which the loss makes no use."""
    network = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    more = ["--model", "googlenet", "--samples", copy / SAMPLES, "--checkpoint_load", tmp_path / "theirs.pth"]
    more += [*RATIOS, "--epochs", 1, "--batch_size", 8]
    on_several("unlearn_relearn.py", *words(copy), *more, log=tmp_path / "said")
    cleaned = torch.load(tmp_path / "theirs_unlearn_purify.pth", weights_only=True)
    network.load_state_dict(cleaned)
    assert not torch.equal(cleaned["fc.weight"], torch.load(tmp_path / "theirs.pth", weights_only=True)["fc.weight"])


def test_two_processes_measure_and_separate_as_one(copy, pipeline, words, tmp_path):
    shutil.rmtree(copy / SAMPLES)
    for name in ("1_all.txt", "1_fct.json"):
        (copy / TUNED / name).unlink()
    on_several("calculate_consistency.py", *words(copy), log=tmp_path / "fct")
    one, two = (np.loadtxt(root / TUNED / "1_all.txt") for root in (pipeline, copy))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-7)
    on_several("separate_samples.py", *words(copy), *RATIOS, log=tmp_path / "sets")
    for kind in ("clean", "poison", "suspicious"):
        first, second = (np.load(root / SAMPLES / f"{kind}_samples.npy")["index"] for root in (pipeline, copy))
        assert (first == second).all()


def test_a_mistake_ends_both_and_is_told(words, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    steps = [
        Step("finetune_attack_noTrans.py", *words(tmp_path), log=tmp_path / f"log{rank}",
             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    assert [step.wait() for step in steps] == [2, 2]
    assert "train_attack_noTrans.py" in steps[0].said
    # Nobody stops the second here, as torchrun does, so in the end it says what it has met.
    assert steps[1].said.startswith("finetune_attack_noTrans.py: error: process 1: no such file")


@pytest.mark.parametrize("seconds", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_torchrun_lets_the_first_process_say_what_is_wrong(words, tmp_path, seconds):
    late = tmp_path / "late.py"  # the first process comes to the mistake so much after the other
    late.write_text(
        "import os, runpy, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils import args\n"
        "start = args.start\n"
        f"args.start = lambda *given: [start(*given), time.sleep({seconds} * (os.environ['RANK'] == '0'))][0]\n"
        f"runpy.run_path({str(ROOT / 'finetune_attack_noTrans.py')!r}, run_name='__main__')\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        late,
        *words(tmp_path),
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and done.stderr.count("train_attack_noTrans.py") == 1, done.stderr
    assert "interrupted" not in done.stderr


def test_shared_normalisation_of_one_process_is_torchs(monkeypatch):
    monkeypatch.setattr(distributed._Sum, "apply", lambda value: value)
    torch.manual_seed(0)
    theirs, own = nn.BatchNorm2d(5), SharedBatchNorm(5)
    for module in (theirs, own):
        nn.init.uniform_(module.weight.data.copy_(torch.arange(5.0)), 0.5, 1.5)
    own.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 5, 4, 4) * 3 + 1
    grads = []
    for module in (theirs, own):
        inputs = x.clone().requires_grad_()
        result = module(inputs)
        (result**3).sum().backward()
        grads.append((result.detach(), inputs.grad, module.weight.grad, module.running_mean, module.running_var))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(own.eval()(x), theirs.eval()(x))


def test_a_process_without_images_sends_its_statistics_on_a_gpu_as_the_others_do(monkeypatch):
    """torch's normalisation takes the dtype of what it sends from its input where that is empty, else it is float32."""
    seen = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: seen.append(x.dtype) or 2 * x)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    names = list(network.state_dict())
    network[1].__class__ = distributed.SHARED[type(network[1])]
    for count, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            found = network(torch.ones(count, 3, 8, 8))
        assert found.dtype == torch.bfloat16 and seen.pop() == dtype
    found.sum().backward()
    assert network[0].weight.grad is not None and list(network.state_dict()) == names


def test_without_torchrun_nothing_is_shared():
    rows = torch.arange(7)
    assert distributed.world() == 1 and distributed.leads()
    assert torch.equal(distributed.part(rows), rows) and distributed.gather(rows, 7) is rows
    network = nn.Linear(2, 2)
    assert distributed.parallel(network, None) is network


def test_each_process_takes_the_gpu_of_its_number_on_its_own_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    # Eight processes, four a machine, the last of the second.
    for name, value in {"WORLD_SIZE": 8, "RANK": 7, "LOCAL_RANK": 3}.items():
        monkeypatch.setenv(name, str(value))
    assert [device_of(name) for name in ("auto", "cuda", "cpu", "cuda:1")] == ["cuda:3", "cuda:3", "cpu", "cuda:1"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert device_of("auto") == "auto"


def test_three_processes_on_data_of_the_users_own_that_was_never_decoded(fashion, tmp_path, monkeypatch):
    """The last batch has two images, so that one process has none of it; the images are decoded by the first process alone."""
    write_folder(tmp_path / "data", fashion, train=40, test=5)
    common = ["--dataset", "folder", "--data_root", tmp_path / "data", "--model", "resnet10", "--precision", "float32"]
    more = [*common, "--epochs", 1, "--batch_size", 199]
    folder = "saved/backdoored_model/poison_rate_unknown/withTrans/folder_data/resnet10/unknown"
    on_several("train_attack_withTrans.py", *more, "--output_root", tmp_path / "three", log=tmp_path / "said", count=3)
    monkeypatch.setattr("utils.engine.parallel", exact_normalisation)
    monkeypatch.setattr(distributed._Sum, "apply", lambda value: value)
    assert run_cli("train_attack_withTrans.py", *more, "--output_root", tmp_path / "one") == 0
    one, three = (pd.read_csv(tmp_path / root / folder / "log.csv") for root in ("one", "three"))
    assert three["loss"][0] == pytest.approx(one["loss"][0], rel=1e-3)


@pytest.mark.slow
def test_a_state_dict_cleaned_by_two_processes_has_its_own_names(copy, words, tmp_path):
    network = torchvision.models.squeezenet1_1(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    more = ["--model", "squeezenet1_1", "--samples", copy / SAMPLES, "--checkpoint_load", tmp_path / "theirs.pth"]
    own = [word for word in words(copy) if word not in ("--model", "resnet10")]
    on_several("unlearn_relearn.py", *own, *more, *RATIOS, "--epochs", 1, "--batch_size", 16, log=tmp_path / "said")
    cleaned = torch.load(tmp_path / "theirs_unlearn_purify.pth", weights_only=True)
    network.load_state_dict(cleaned)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("UserError('its own')", "its own"),
        ("torch.OutOfMemoryError('CUDA')", "out of memory; what was saved is whole. Use a smaller --batch_size"),
    ],
)
def test_a_mistake_that_another_process_than_the_first_meets_is_told(tmp_path, error, said):
    (tmp_path / "x.py").write_text(
        f"import torch\nfrom utils.errors import UserError, run_script\n\ndef main():\n    raise {error}\n\nrun_script(main)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, tmp_path / "x.py"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"x.py: error: process 1: {said}\n")
