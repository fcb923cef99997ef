"""What a GPU would have to wait for, found without one: the steps on torch's meta device, whose tensors have no values.

There an operation that needs values on the host fails, as `nonzero` and `unique` do, a tensor left on the CPU does not fit the
others, and what goes to the device and what is read from it can be counted.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_cli
from pretend import allow_meta
from test_pipeline import EXTRACTOR, NO_TRANS, SAMPLES, WITH_TRANS
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from utils import dataloader_bd, device, engine, fct, transforms
from utils.datasets import DATASETS
from utils.device import Runtime, send
from utils.fct import _fct_of_rows
from utils.metrics import predict
from utils.run import Run

META = Runtime(torch.device("meta"), torch.float32)


class _Uploads(TorchDispatchMode):
    """The sizes of the tensors that go to the meta device while this is entered and ``watching``."""

    def __init__(self):
        super().__init__()
        self.watching, self.sizes = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.watching and isinstance(result, torch.Tensor) and result.device.type == "meta":
            self.sizes += [
                part.numel() for part in args if isinstance(part, torch.Tensor) and part.device.type == "cpu"
            ]
        return result


@pytest.fixture
def meta(monkeypatch):
    """The meta device in the place of a GPU; a namespace of ``read``, how often a value was read from it, ``uploads``, and
    ``sent``, the sizes that went through `send`. The values read are so large that they pass for finite and as wanted."""
    found = SimpleNamespace(read=0, uploads=_Uploads(), sent=[])
    item = torch.Tensor.item

    def read(tensor):
        if tensor.device.type != "meta":
            return item(tensor)
        found.read += 1
        return 10**9

    def told(values, place):
        if found.uploads.watching and place.type == "meta" and values.device.type == "cpu":
            found.sent.append(values.numel())
        return send(values, place)

    monkeypatch.setattr(torch.Tensor, "item", read)
    allow_meta(monkeypatch)
    for module in (device, transforms, dataloader_bd):
        monkeypatch.setattr(module, "send", told)
    with found.uploads:
        yield found


RATIOS = ["--clean_ratio", "0.2", "--poison_ratio", "0.05"]
TRAININGS = {  # script: samples a batch, its other options
    "train_attack_noTrans.py": (5, []),
    "finetune_attack_noTrans.py": (64, ["--checkpoint_load", f"{NO_TRANS}/1.tar"]),
    "train_attack_withTrans.py": (5, []),
    "unlearn_relearn.py": (16, [*RATIOS, "--checkpoint_load", f"{WITH_TRANS}/1.tar"]),
    "ST/train_extractor.py": (64, [*RATIOS, "--cosine", "--samples", SAMPLES]),
    "ST/train_classifier.py": (32, [*RATIOS, "--samples", SAMPLES, "--ckpt", f"{EXTRACTOR}/last.pth"]),
}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("script", TRAININGS)
def test_an_epoch_asks_the_device_for_nothing_but_its_sums(script, meta, words, copy, monkeypatch):
    batch_size, more = TRAININGS[script]
    more = [copy / word if "/" in word else word for word in more]
    epochs, plain = [], engine.train_epoch

    def watched(model, batches, *rest):
        before, meta.uploads.watching = meta.read, True
        result = plain(model, batches, *rest)
        meta.uploads.watching = False
        sums = len(result) - 1  # without the seconds
        epochs.append((meta.read - before, sums + 1))  # and whether they are finite
        return result

    monkeypatch.setattr(engine, "train_epoch", watched)
    monkeypatch.setattr(fct, "zeros_of_some", lambda *_: 0.0)  # after the epoch of SD step 2, and it goes to the host
    monkeypatch.setattr(dataloader_bd, "TOGETHER", 3 * batch_size)
    monkeypatch.setattr(Run, "finish_epoch", lambda run, epoch, row, *rest: run.history.append({"epoch": epoch, **row}))
    own = ["--epochs", 1, "--batch_size", batch_size, "--overwrite", "--device", "meta", "--precision", "float32"]
    assert run_cli(script, *words(copy), *own, *more) == 0
    assert epochs and all(read == allowed for read, allowed in epochs)
    assert meta.uploads.sizes and meta.uploads.sizes == meta.sent  # a plain copy to the device would wait for it
    assert batch_size < max(meta.sent) <= 3 * batch_size  # a number a sample, and nothing that has pixels


@pytest.mark.parametrize("name", transforms.TAU_NAMES)
def test_fct_and_evaluation_work_on_the_device(name, meta):
    images = np.zeros((48, 32, 32, 3), dtype=np.uint8)
    held, normalize = dataloader_bd.hold(images, META), dataloader_bd.Normalize(DATASETS["cifar10"], META.device)
    model = META.place(build_model("resnet10", "cifar10", 10))
    tau = transforms.Tau(name, "none", 32)
    tables = [tau.draw(np.random.default_rng(0), len(images)) for _ in range(2)]
    meta.uploads.watching = True
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # its last step, to the host
        _fct_of_rows(model, held, np.arange(len(images)), META, normalize, [(tau, tables)], 24)
    assert predict(model, held, normalize, META).shape == (48,)
    # 15: a row of the kernel
    assert meta.uploads.sizes == meta.sent and max(meta.sent) <= (24 * 15 if name == "blur" else 48)


@pytest.mark.parametrize(("side", "at_once"), [(32, 64), (28, 64), (64, 16), (224, 1)])
def test_fewer_large_images_are_augmented_at_once_on_a_gpu(side, at_once, meta):
    images, labels = np.zeros((4, side, side, 3), np.uint8), np.zeros(4, np.int64)
    assert dataloader_bd.Batches(images, labels, DATASETS["cifar10"], META, 64, 0, "x").at_once == at_once


@pytest.mark.parametrize(
    ("side", "on_cpu", "on_gpu"), [(32, 250, 2000), (64, 62, 500), (28, 250, 2000), (1000, 32, 32)]
)
def test_evaluation_takes_more_images_at_once_on_a_gpu(side, on_cpu, on_gpu, meta):
    for device_of, size in ((torch.device("cpu"), on_cpu), (META.device, on_gpu)):
        held = torch.empty(2 * size + 1, 3, side, side, dtype=torch.uint8, device=device_of)
        splits = dataloader_bd.evaluation_splits(held)
        assert [len(rows) for rows in splits] == [size, size, 1]
        assert torch.cat(splits).tolist() == list(range(2 * size + 1))


def test_what_is_sent_to_cuda_is_pinned_and_not_waited_for():
    asked = []
    pinned = SimpleNamespace(to=lambda *place, **how: asked.append((*place, how)))
    for kind, values in (
        ("cuda", SimpleNamespace(device=torch.device("cpu"), pin_memory=lambda: pinned)),
        ("cuda", SimpleNamespace(device=torch.device("cuda"), to=pinned.to)),
        ("mps", SimpleNamespace(device=torch.device("cpu"), to=pinned.to)),
    ):
        send(values, torch.device(kind))
    assert asked == [
        (torch.device(kind), {"non_blocking": waits})
        for kind, waits in (("cuda", True), ("cuda", False), ("mps", False))
    ]


def test_where_a_device_has_no_float64_the_cpu_computes():
    assert [device.exact_device(torch.device(kind)).type for kind in ("cpu", "cuda", "mps")] == ["cpu", "cuda", "cpu"]
