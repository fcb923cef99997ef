"""Data sets: the bundled one, image folders and their cache, torchvision's files; files written whole or not at all."""

import gzip
import io
import json
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_folder
from PIL import Image
from test_bad_input import refused, snapshot

from utils.datasets import DATASETS, fewer_images
from utils.device import choose_runtime
from utils.errors import UserError
from utils.files import atomic_write, csv_writer, json_writer
from utils.images import in_threads, list_images, name_below, whole_rows
from utils.loading import load_dataset
from utils.transforms import ContrastiveView, CropFlip


def test_the_bundled_set_is_balanced_padded_and_has_the_stated_statistics(fashion):
    assert fashion.train_images.shape == (10000, 32, 32, 3) and fashion.test_images.shape == (2000, 32, 32, 3)
    assert (
        np.bincount(fashion.train_labels).tolist() == [1000] * 10
        and np.bincount(fashion.test_labels).tolist() == [200] * 10
    )
    assert (
        not fashion.train_images[:, :2].any() and (fashion.train_images[..., 0] == fashion.train_images[..., 2]).all()
    )
    scaled = fashion.train_images[..., 0] / 255
    assert scaled.mean() == pytest.approx(DATASETS["fashion"].mean[0], abs=1e-4)
    assert scaled.std() == pytest.approx(DATASETS["fashion"].std[0], abs=1e-4)
    assert (ROOT / "dataset/fashion/LICENSE.txt").is_file()


def write_idx(folder, images, labels):
    """The four files of Fashion-MNIST, with these arrays in both splits."""
    for stem in ("train", "t10k"):
        for name, array in ((f"{stem}-images-idx3", images), (f"{stem}-labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_the_bundled_sets_builder_replaces_no_file_unasked(cli, tmp_path):
    (tmp_path / "source").mkdir()
    write_idx(tmp_path / "source", np.arange(40 * 784).reshape(40, 28, 28) % 251, np.arange(40) % 10)
    words = ["tools/build_fashion.py", "--source", tmp_path / "source", "--out", tmp_path / "data/fashion/fashion.npz"]
    said = cli(*words)
    assert said.code == 0, said.err
    assert load_dataset("fashion", tmp_path / "data").train_images.shape == (40, 32, 32, 3)
    before = snapshot(tmp_path)
    refused(cli(*words), "fashion.npz is there already", "--overwrite")
    refused(cli(*words[:3]), "dataset/fashion/fashion.npz is there already", "--overwrite")
    refused(cli(*words, "--over"), "--over")  # no abbreviations
    refused(cli(*words[:4], tmp_path / ("x" * 300)), "more than 255 bytes")
    refused(cli(*words[:4], tmp_path), "name a file")
    assert snapshot(tmp_path) == before
    assert cli(*words, "--overwrite").code == 0 and snapshot(tmp_path) != before


@pytest.mark.parametrize(
    ("images", "labels"),
    [((40, 28, 28), (30,)), ((40, 28, 28), (40, 2)), ((40,), (40,)), ((40, 28, 27), (40,)), ((0, 28, 28), (0,))],
    ids=str,
)
def test_images_and_labels_that_are_not_of_each_other_make_no_set(images, labels, cli, tmp_path):
    write_idx(tmp_path, np.zeros(images), np.zeros(labels))
    before = snapshot(tmp_path)
    refused(cli("tools/build_fashion.py", "--source", tmp_path, "--out", tmp_path / "new/x.npz"), images, labels)
    assert snapshot(tmp_path) == before and not (tmp_path / "new").exists()


def test_an_image_folder_is_read_in_the_order_of_its_names_and_from_its_cache(fashion, tmp_path):
    write_folder(tmp_path / "cifar10", fashion, train=3, test=1)
    dataset = load_dataset("cifar10", tmp_path)
    first = np.concatenate([np.flatnonzero(fashion.train_labels == label)[:3] for label in range(10)])
    assert (dataset.train_images == fashion.train_images[first]).all() and (
        dataset.train_labels == fashion.train_labels[first]
    ).all()
    assert dataset.classes[1] == "class 1" and len(dataset.test_labels) == 10

    cache = next((tmp_path / "cifar10").glob(".decoded_train*"))
    stamp = cache.stat().st_mtime_ns
    assert (load_dataset("cifar10", tmp_path).train_images == dataset.train_images).all()
    assert cache.stat().st_mtime_ns == stamp

    changed = tmp_path / "cifar10/train/class 0/000.png"
    Image.new("RGB", (32, 32), "red").save(changed)
    assert (load_dataset("cifar10", tmp_path).train_images[0] == [255, 0, 0]).all()

    cache.write_bytes(b"damaged")
    assert (load_dataset("cifar10", tmp_path).train_images[0] == [255, 0, 0]).all()


def test_torchvision_files_are_found(tmp_path, monkeypatch):
    import torchvision

    class Fake:
        classes = tuple("abcdefghij")

        def __init__(self, root, train, download):
            assert root == tmp_path / "cifar10" and download
            self.data, self.targets = (
                np.zeros((20 if train else 10, 32, 32, 3), np.uint8),
                [0, 1] * (10 if train else 5),
            )

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.source == "torchvision" and dataset.train_labels.dtype == np.int64 and len(dataset.test_labels) == 10


def test_a_download_that_fails_says_where_to_put_the_files(tmp_path, monkeypatch):
    import torchvision

    def fail(root, train, download):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "kind", "made"), [("cifar10", "CIFAR10", "."), ("gtsrb", "GTSRB", "gtsrb")])
def test_a_folder_that_torchvision_made_before_failing_is_removed(name, kind, made, tmp_path, monkeypatch):
    import torchvision

    def fail(root, **_):
        (root / made).mkdir(parents=True)
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets, kind, fail)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_dataset(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_traffic_signs_of_all_sizes_become_32(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(43):
            folder = tmp_path / "gtsrb" / split / f"{label:05d}"
            folder.mkdir(parents=True)
            size = (int(rng.integers(15, 250)), int(rng.integers(15, 250)))
            Image.new("RGB", size, (label, 2 * label, 255 - label)).save(folder / "00000_00000.ppm")
    dataset = load_dataset("gtsrb", tmp_path)
    assert dataset.train_images.shape == (43, 32, 32, 3) and dataset.spec.num_classes == 43
    for label, image in zip(dataset.test_labels, dataset.test_images, strict=True):
        assert (image == [label, 2 * label, 255 - label]).all()


def test_traffic_signs_come_from_torchvisions_files_too(tmp_path, monkeypatch):
    import torchvision

    for split in ("train", "test"):
        Image.new("RGB", (50, 40), "blue").save(tmp_path / f"{split}.ppm")

    class Fake:
        def __init__(self, root, split, download):
            (tmp_path / "gtsrb").mkdir(exist_ok=True)
            self._samples = [(str(tmp_path / f"{split}.ppm"), 7)] * 3

    monkeypatch.setattr(torchvision.datasets, "GTSRB", Fake)
    monkeypatch.setattr("utils.loading.listing_digest", lambda folder, files: "any")
    dataset = load_dataset("gtsrb", tmp_path)
    assert (dataset.train_images == [0, 0, 255]).all() and dataset.test_labels.tolist() == [7, 7, 7]


@pytest.mark.parametrize("root", ["/somewhere/data", ".", "data/"])
def test_files_are_listed_by_their_names_below_the_folder(tmp_path, monkeypatch, root):
    root = Path(root.replace("/somewhere", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.PNG", "a/images/0.jpg", "a/left_out.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(b"x")
    files, labels, names = list_images(root / "train")
    assert (labels.tolist(), names) == ([0, 1, 1], ["a", "b"])
    wanted = ["train/a/images/0.jpg", "train/b/1.PNG", "train/b/2.png"]
    assert [name_below(root, file) for file in files] == wanted
    assert [Path(file).relative_to(root) for file in files] == [Path(name) for name in wanted]
    assert whole_rows(root, files, wanted[1:2]).tolist() == [0, 2]


@pytest.mark.parametrize(("size", "others"), [(1000, False), (50_000, True)], ids=["small", "large"])
def test_threads_read_what_is_not_small_and_the_order_stays(tmp_path, size, others):
    files = [tmp_path / f"{number}.bin" for number in range(20)]
    for file in files:
        file.write_bytes(bytes(size))
    found = in_threads(lambda file: (file, threading.current_thread()), files, None)
    assert [file for file, _ in found] == files
    assert {thread is threading.main_thread() for _, thread in found} == {not others}


def test_tiny_imagenet_is_read_as_it_is_handed_out(tmp_path):
    names = [f"n{label:08d}" for label in range(200)]
    lines = []
    for label, name in enumerate(names):
        folder = tmp_path / "tiny/train" / name / "images"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), (label, 0, 0)).save(folder / f"{name}_0.png")
    images = tmp_path / "tiny/val/images"
    images.mkdir(parents=True)
    for number, label in enumerate((5, 199, 0)):
        Image.new("L", (64, 64), label).save(images / f"val_{number}.png")
        lines.append(f"val_{number}.png\t{names[label]}\t0\t0\t62\t62")
    (tmp_path / "tiny/val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "tiny/test/images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "tiny/test/images/test_0.png")  # without labels, so of no use
    dataset = load_dataset("tiny", tmp_path)
    assert dataset.train_images.shape == (200, 64, 64, 3) and dataset.test_labels.tolist() == [5, 199, 0]
    assert (dataset.train_images[..., 0] == dataset.train_labels[:, None, None]).all()
    assert (dataset.test_images[..., 1] == dataset.test_labels[:, None, None]).all()
    (images / "val_1.png").unlink()
    with pytest.raises(UserError, match=r"val_1\.png"):
        load_dataset("tiny", tmp_path)
    (tmp_path / "tiny/val/val_annotations.txt").write_text("val_0.png\tn99999999\n")
    with pytest.raises(UserError, match="val_annotations"):
        load_dataset("tiny", tmp_path)


def test_a_data_set_that_cannot_be_downloaded_says_where_it_belongs(tmp_path):
    with pytest.raises(UserError, match=r"tiny/train/<class>"):
        load_dataset("tiny", tmp_path)


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_rows_of_a_csv_may_have_different_keys():
    for rows, columns in (
        ([{"a": 1, "b": 2, "c": 3}, {"a": 4, "c": 5}], "a,b,c"),
        ([{"epoch": -1, "x": 1, "y": 2}, {"epoch": 0, "loss": 3}], "epoch,x,y,loss"),  # an epoch that was not evaluated
    ):
        file = io.BytesIO()
        csv_writer(rows)(file)
        lines = file.getvalue().decode().splitlines()
        assert lines[0] == columns and len(lines) == 3
        read = pd.read_csv(io.BytesIO(file.getvalue()))
        assert [{k: v for k, v in row.items() if v == v} for row in read.to_dict("records")] == rows


def test_traffic_signs_are_mirrored_in_no_step():
    for name, flip in (("cifar10", True), ("gtsrb", False)):
        spec = DATASETS[name]
        drawn = (
            ContrastiveView(32, spec.flip).draw(np.random.default_rng(0), 100),
            CropFlip.of(spec).draw(np.random.default_rng(0), 100),
        )
        assert spec.flip == flip and all(parameters["flip"].any().item() == flip for parameters in drawn)


def test_precision_follows_the_request(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_runtime("cpu", "bfloat16").dtype == torch.bfloat16
    assert choose_runtime("cpu", "float32").dtype == torch.float32
    assert not torch.backends.cudnn.allow_tf32
    with choose_runtime("cpu", "bfloat16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_fct_on_a_gpu_is_that_of_the_cpu(fashion):
    from models import build_model
    from utils.fct import compute_fct

    torch.manual_seed(0)
    model = build_model("resnet10", "fashion", 10)
    values = []
    for device in ("cpu", "cuda"):
        runtime = choose_runtime(device, "float32")
        values.append(compute_fct(runtime.place(model), fashion.train_images[:256], fashion.spec, runtime)[0])
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-6)


def test_fewer_images_takes_the_same_share_of_every_class(fashion):
    fewer = fewer_images(fashion, 1003)
    assert np.bincount(fewer.train_labels).tolist() == [101, 101, 101] + [100] * 7
    rows = [int(np.flatnonzero((fashion.train_images == image).all((1, 2, 3)))[0]) for image in fewer.train_images[:20]]
    assert rows == sorted(rows) and (fashion.train_labels[rows] == fewer.train_labels[:20]).all()
    again = fewer_images(fashion, 1003)
    assert (again.train_images == fewer.train_images).all() and fewer.record == again.record
    assert fewer.test_images is fashion.test_images and "1003 of 10000" in fewer.source
    for count in (9, 10_001):
        with pytest.raises(UserError, match=f"--train_images {count}"):
            fewer_images(fashion, count)


def test_what_is_no_number_is_null_in_json():
    written = io.BytesIO()
    json_writer(
        {"AUROC": float("nan"), "more": [{"loss": float("inf")}, 1.5], "path": Path("a"), "one": np.float64("nan")}
    )(written)

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(written.getvalue(), parse_constant=refuse)
    assert read == {"AUROC": None, "more": [{"loss": None}, 1.5], "path": "a", "one": None}
