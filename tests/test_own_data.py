"""Data of the user's own: folders and .npz files of every shape, and all steps on them without a ground truth."""

import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_all, write_folder
from PIL import Image

from utils import images as image_files
from utils.device import Runtime
from utils.errors import UserError
from utils.fct import compute_fct
from utils.files import read_json
from utils.images import StreamedImages, decode
from utils.loading import load_dataset
from utils.own_data import StoredImages
from utils.paths import data_name

CPU = Runtime(torch.device("cpu"), torch.float32)


def picture(size=(32, 32), mode="RGB", seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode)


def fill(folder, names=("a", "b"), count=3, size=(32, 32)):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(size, seed=10 * number + i).save(folder / name / f"{i}.png")
    return folder


def state(folder):
    return {os.fspath(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(folder.rglob("*"))}


def load(root, tmp_path, **more):
    return load_dataset("folder", root, cache=tmp_path / "cache", **more)


# What is read


def test_an_image_that_can_be_read_again_is_read_again(tmp_path, monkeypatch):
    fill(tmp_path / "data/train", ["a", "b"])
    whole = image_files.open_image

    def fails(path):
        if os.path.basename(path) == "1.png":
            raise OSError("the disk is not well")
        return whole(path)

    with monkeypatch.context() as unwell:
        unwell.setattr(image_files, "open_image", fails)
        assert len(load(tmp_path / "data", tmp_path).train_labels) == 4
        assert len(load(tmp_path / "data", tmp_path).train_labels) == 4
    mended = load(tmp_path / "data", tmp_path)
    assert len(mended.train_labels) == 6 and not mended.skipped


def test_images_of_every_kind_are_read_once_and_the_folder_is_not_written_to(tmp_path, capsys):
    root = tmp_path / "my data"
    fill(root / "train", ["<i>it's & 100%", "älg 猫"])
    place = root / "train/<i>it's & 100%"
    for number, (mode, size) in enumerate([("L", (40, 30)), ("P", (20, 20)), ("RGBA", (33, 47)), ("1", (32, 32))]):
        picture(size, mode, number).save(place / f"odd {number}.png")
    (place / "broken \"'<.png").write_bytes(b"\x89PNG no")
    os.symlink("loop.png", place / "loop.png")
    (place / "folder.png").mkdir()
    (place / "notes.txt").write_text("no image")
    before = state(root)
    dataset = load(root, tmp_path)
    said = capsys.readouterr().out
    assert "32x32" in said and "3 of 13 images" in said
    assert sorted(os.path.basename(name) for name in dataset.skipped) == ["broken \"'<.png", "folder.png", "loop.png"]
    assert dataset.classes == ["<i>it's & 100%", "älg 猫"] and np.bincount(dataset.train_labels).tolist() == [7, 3]
    assert isinstance(dataset.train_images, StoredImages) and len(dataset.test_labels) == 0
    for row, file in enumerate(dataset.train_images.files):
        with Image.open(file) as image:
            whole = np.asarray(image.convert("RGB").resize((32, 32), Image.BILINEAR))
        np.testing.assert_array_equal(dataset.train_images[row : row + 1][0], whole)
    np.testing.assert_array_equal(dataset.train_images.subset(np.array([5, 2]))[:], dataset.train_images[[5, 2]])
    assert state(root) == before

    store = next((tmp_path / "cache").rglob("train_32_*.bin"))
    stamp = store.stat().st_mtime_ns
    assert load(root, tmp_path).record == dataset.record and store.stat().st_mtime_ns == stamp
    Image.new("RGB", (32, 32), "red").save(root / "train/älg 猫/0.png")
    assert (load(root, tmp_path).train_images[[7]] == [255, 0, 0]).all()
    next((tmp_path / "cache").rglob("train_32_*.bin")).write_bytes(b"short")
    assert (load(root, tmp_path).train_images[[7]] == [255, 0, 0]).all()
    for damaged in (tmp_path / "cache").rglob("*.json"):
        damaged.write_text("{")
    assert load(root, tmp_path).record == load(root, tmp_path).record
    with pytest.raises(UserError, match=r"3 of the images.*broken"):
        load(root, tmp_path, strict=True)


def test_a_run_keeps_its_images_when_another_decodes_a_changed_folder(tmp_path):
    fill(tmp_path / "data/train")
    running = load(tmp_path / "data", tmp_path)
    before = running.train_images[:]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "data/train/a/0.png")
    other = load(tmp_path / "data", tmp_path)
    assert (running.train_images[:] == before).all() and (other.train_images[[0]] == [255, 0, 0]).all()
    store, _ = sorted((tmp_path / "cache").rglob("train_32*"))  # and its record; nothing of the folder as it was
    os.truncate(store, 32)
    with pytest.raises(UserError, match="cut short"):
        other.train_images[:]


def test_the_order_in_which_files_were_written_does_not_matter(tmp_path):
    root, copy = fill(tmp_path / "one/train", ["b", "a"], count=12), tmp_path / "two/train"
    for file in sorted(root.rglob("*.png"), reverse=True):
        place = copy / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    first, second = (load(folder.parent, tmp_path / folder.parent.name) for folder in (root, copy))
    for dataset, folder in ((first, root), (second, copy)):
        names = [os.path.relpath(file, folder) for file in dataset.train_images.files]
        assert names == sorted(f"{label}/{number}.png" for label in "ab" for number in range(12))
    np.testing.assert_array_equal(first.train_images[:], second.train_images[:])
    assert first.train_labels.tolist() == second.train_labels.tolist() == [0] * 12 + [1] * 12
    assert first.record["train"]["sha256"] == second.record["train"]["sha256"]


@pytest.mark.parametrize(
    ("side", "size", "kind"), [(47, 32, StoredImages), (48, 64, StoredImages), (100, 224, StreamedImages)]
)
def test_the_size_follows_the_median_of_the_shorter_sides(tmp_path, side, size, kind):
    root = tmp_path / "data"
    fill(root / "train", size=(side + 40, side))
    picture((5, 5)).save(root / "train/a/small.png")
    dataset = load(root, tmp_path)
    assert dataset.train_images.shape == (7, size, size, 3) and type(dataset.train_images) is kind
    assert load(root, tmp_path, image_size=48).train_images.shape[1] == 48


def test_test_images_may_be_in_val_and_lack_a_class(tmp_path):
    root = tmp_path / "data"
    fill(root / "train", ["a", "b", "c"])
    fill(root / "val", ["c", "a"], count=1)
    dataset = load(root, tmp_path)
    assert dataset.test_labels.tolist() == [0, 2] and len(dataset.test_images) == 2


def test_what_a_desktop_leaves_behind_hides_no_images(tmp_path, capsys):
    root = tmp_path / "data"
    fill(root / "train", ["a", "b"])
    fill(root / "val", ["a", "b"], count=2)
    (root / "test").mkdir()
    (root / "test/.DS_Store").write_bytes(b"x")
    (root / "train/a/images").mkdir()  # empty
    next((root / "val/b").iterdir()).write_bytes(b"broken")
    dataset = load(root, tmp_path)
    assert len(dataset.test_images) == 3 and (dataset.train_labels == 0).sum() == (dataset.train_labels == 1).sum() > 0
    assert f"images in {root / 'val'}" in capsys.readouterr().out.replace("\n", " ")


def test_a_palette_with_a_transparent_colour_is_read_without_a_word(tmp_path, recwarn):
    image = picture((8, 8)).quantize(16)
    image.save(tmp_path / "x.png", transparency=bytes(range(16)))
    plain = np.asarray(image.convert("RGB"))
    assert (decode(tmp_path / "x.png", 8, resize=False) == plain).all() and not len(recwarn)


def test_a_folder_is_named_by_itself_however_it_is_spelt(tmp_path, monkeypatch):
    (tmp_path / "my data/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my data/train")
    assert data_name(SimpleNamespace(train_images=None, dataset="folder", data_root="..")) == "folder_my_data"


def test_a_thousand_classes(tmp_path):
    fill(tmp_path / "data/train", [f"{number:04d}" for number in range(1000)], count=1, size=(4, 4))
    dataset = load(tmp_path / "data", tmp_path, image_size=8)
    assert dataset.spec.num_classes == 1000 and (dataset.train_labels == np.arange(1000)).all()


def spoil(case, root):
    """A folder that cannot be used; what the message says."""
    if case == "nothing":
        return "no folder .*train"
    fill(root / "train", ["only"] if case == "one class" else ["a", "b"], count=1)
    if case == "one class":
        return "one class, 'only'"
    if case == "empty class":
        (root / "train/c").mkdir()
        return "train/c holds no image"
    if case == "class loop":
        os.symlink("..", root / "train/c")
        return "train/c holds no image"
    if case == "unknown test class":
        fill(root / "test", ["z"], count=1)
        return "'z', which is not under train"
    for file in (root / "train/a").iterdir():
        file.write_text("broken")
    return "no image of the class 'a'"


@pytest.mark.parametrize(
    "case", ["nothing", "one class", "empty class", "class loop", "unknown test class", "all broken"]
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(cli, tmp_path, case):
    message = spoil(case, tmp_path / "data")
    words = [
        "--dataset",
        "folder",
        "--data_root",
        tmp_path / "data",
        "--output_root",
        tmp_path / "out",
        "--model",
        "resnet10",
    ]
    result = cli("train_attack_noTrans.py", *words)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert re.search(message, result.err), result.err
    assert not list((tmp_path / "out").rglob("*.tar"))


# Arrays


def test_arrays_are_read_and_made_to_size(tmp_path, capsys):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=grey, y_train=np.array([0, 1, 2] * 2, dtype=np.uint8)[:, None])
    dataset = load_dataset("npz", tmp_path / "a.npz")
    assert dataset.train_images.shape == (6, 32, 32, 3) and dataset.test_labels.shape == (0,)
    for made, original in zip(dataset.train_images, grey, strict=True):
        by_pil = np.asarray(Image.fromarray(original).convert("RGB").resize((32, 32), Image.BILINEAR))
        assert np.abs(made.astype(int) - by_pil).max() <= 1
    colour = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "b.npz", x_train=colour, y_train=[0, 1, 0, 1], x_test=colour[:2], y_test=[1, 1])
    dataset = load_dataset("npz", tmp_path / "b.npz")
    assert (dataset.train_images == colour).all() and dataset.test_labels.tolist() == [1, 1]
    assert dataset.classes == ["0", "1"] and "32x32" in capsys.readouterr().out


IMAGES = np.zeros((4, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, "x_train"),
        ({"x_train": IMAGES}, "y_train"),
        ({"x_train": IMAGES.astype(float), "y_train": [0, 1, 0, 1]}, "float64"),
        ({"x_train": IMAGES[..., :2], "y_train": [0, 1, 0, 1]}, "not uint8"),
        ({"x_train": IMAGES[:0], "y_train": []}, "no image"),
        ({"x_train": IMAGES, "y_train": [0, 1, 0]}, "4 integers"),
        ({"x_train": IMAGES, "y_train": [0.0, 1, 0, 1]}, "4 integers"),
        ({"x_train": IMAGES, "y_train": [0, 2, 0, 2]}, "0, 1, 2"),
        ({"x_train": IMAGES, "y_train": [-1, 1, 0, 1]}, "-1"),
        ({"x_train": IMAGES, "y_train": [0, 0, 0, 0]}, "one class"),
        ({"x_train": IMAGES, "y_train": [0, 1, 0, 1], "x_test": IMAGES, "y_test": [0, 1, 2, 3]}, "0, 1, 2"),
        ({"x_train": np.array([{}] * 4), "y_train": [0, 1, 0, 1]}, "allow_pickle"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_dataset("npz", tmp_path / "a.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK no")
    np.save(tmp_path / "b.npy", IMAGES)
    for name, message in (
        ("a.npz", "no .npz file"),
        ("b.npy", "no .npz file"),
        ("c.npz", "no file .*c.npz"),
    ):
        with pytest.raises(UserError, match=message):
            load_dataset("npz", tmp_path / name)


# The steps


@pytest.fixture(scope="module")
def folder(fashion, tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "my data"
    write_folder(root, fashion, train=40, test=5)
    return root


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """The output root of every step on the folder."""
    out = tmp_path_factory.mktemp("out")
    assert run_all(words_of(folder, out), epochs=1) == [0] * 11
    return out


def words_of(folder, out):
    return ["--dataset", "folder", "--data_root", folder, "--model", "resnet10", "--output_root", out]


def test_every_step_runs_without_a_ground_truth(ran):
    place = ran / "saved/backdoored_model/poison_rate_unknown"
    noted = set()
    for log in (*place.rglob("log.csv"), *ran.rglob("ST/save/**/log.csv"), *place.rglob("unlearn_purify.csv")):
        noted |= set(pd.read_csv(log).columns)
    assert "ACC" in noted and not noted & {"ASR", "R_ACC", "ACC_paper"}
    separated = ran / "saved/separated_samples/folder_my_data/resnet10/unknown_0.2_0.05"
    assert not (separated / "detection.json").exists() and not list(ran.rglob("*_clean.txt"))
    samples = np.load(separated / "poison_samples.npy", allow_pickle=False)
    assert samples.dtype.names == ("label", "flag", "index") and len(samples) == 20
    options = read_json(separated / "options.json")["options"]
    assert (options["trigger_type"], options["poison_rate"], options["target_label"]) == ("unknown", "unknown", -1)


def test_values_are_those_of_images_in_memory_at_any_batch_size(cli, folder, ran):
    from models import build_model
    from utils.files import load_tensors
    from utils.weights import load_weights

    path = ran / "saved/backdoored_model/poison_rate_unknown/noTrans_ftsimi/folder_my_data/resnet10/unknown/0.tar"
    saved = np.loadtxt(path.with_name("0_all.txt")).astype(np.float32)
    dataset = load_dataset("folder", folder, cache=ran / "saved/decoded")
    model = build_model("resnet10", "folder", 10)
    load_weights(model, load_tensors(path, "", "")["model"], path)
    whole = dataset.train_images[:]
    for images, batch_size in ((whole, 256), (dataset.train_images, 7)):
        fct, _ = compute_fct(CPU.place(model), images, dataset.spec, CPU, batch_size=batch_size)
        np.testing.assert_allclose(fct, saved, rtol=1e-3, atol=1e-6)


def test_another_folder_does_not_replace_the_first_unasked(cli, folder, ran, tmp_path):
    fill(tmp_path / "my data/train", count=40)
    fill(tmp_path / "others/train", count=40)
    refused = cli("train_attack_noTrans.py", *words_of(tmp_path / "my data", ran), "--epochs", 1, "--batch_size", 64)
    assert refused.code == 2 and "--data_root" in refused.err and "--overwrite" in refused.err
    assert "to go on with it" not in refused.err  # that would be refused too
    assert (
        cli("train_attack_noTrans.py", *words_of(tmp_path / "others", ran), "--epochs", 1, "--batch_size", 64).code == 0
    )


def test_a_folder_that_was_moved_is_the_same_data(cli, folder, ran, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "elsewhere/my data"
    shutil.copytree(ran, out, copy_function=os.link)
    shutil.copytree(folder, moved)
    network = out / "saved/backdoored_model/poison_rate_unknown/withTrans/folder_my_data/resnet10/unknown"
    words = [*words_of(moved, out), "--batch_size", 64]
    more = ["--epochs", 2, "--schedule", 1, "--checkpoint_load", network / "0.tar"]
    said = cli("train_attack_withTrans.py", *words, *more)
    assert said.code == 0 and "Continuing after epoch 0" in said.out, said.err
    place = network.parents[3] / "noTrans_ftsimi/folder_my_data/resnet10/unknown"
    before = (place / "0_all.txt").read_bytes()
    assert cli("calculate_consistency.py", *words_of(moved, out)).code == 0
    assert (place / "0_all.txt").read_bytes() == before


def test_a_folder_that_has_changed_is_noticed(cli, fashion, ran, folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(ran, out, copy_function=os.link)
    changed = folder / "train/class 3/000.png"
    before = changed.read_bytes()
    other = (folder / "train/class 3/001.png").read_bytes()
    try:
        changed.write_bytes(other)
        for script, more in (("calculate_consistency.py", ["--overwrite"]), ("visualize_consistency.py", []),
                             ("separate_samples.py", ["--overwrite"]), ("unlearn_relearn.py", ["--batch_size", 8, "--overwrite"]),
                             ("ST/train_extractor.py", ["--overwrite"])):  # fmt: skip
            refused = cli(script, *words_of(folder, out), *more)
            assert refused.code == 2 and (
                "not the one under --data_root" in refused.err or "has changed" in refused.err
            ), script
        again = "train_attack_withTrans.py", *words_of(folder, out), "--epochs", 1, "--batch_size", 64, "--overwrite"
        assert cli(*again).code == 0
    finally:
        changed.write_bytes(before)
    mixed = cli("unlearn_relearn.py", *words_of(folder, out), "--batch_size", 8, "--overwrite")
    assert mixed.code == 2 and "are of another training set than" in mixed.err


@pytest.mark.parametrize(
    "more",
    [
        ["--trigger_type", "sigTrigger"],
        ["--target_type", "all2all"],
        ["--target_label", 1],
        ["--poison_rate", 0.2],
        ["--ssba_images", "x.npy"],
    ],
)
def test_what_only_a_simulated_attack_has_is_refused(cli, folder, tmp_path, more):
    result = cli("train_attack_noTrans.py", *words_of(folder, tmp_path), *more)
    assert result.code == 2 and f"{more[0]} has no use with --dataset folder" in result.err


def test_image_size_is_for_own_data(cli, tmp_path):
    result = cli("train_attack_noTrans.py", "--dataset", "fashion", "--image_size", 64, "--output_root", tmp_path)
    assert result.code == 2 and "--image_size has no use with --dataset fashion" in result.err


def test_without_test_images_nothing_is_evaluated(cli, fashion, tmp_path):
    images, labels = fashion.train_images[:120], fashion.train_labels[:120]
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels)
    words = ["--dataset", "npz", "--data_root", tmp_path / "a.npz", "--model", "resnet10", "--output_root", tmp_path]
    assert cli("train_attack_noTrans.py", *words, "--epochs", 1).code == 0
    log = pd.read_csv(next(tmp_path.rglob("log.csv")))
    assert "ACC" not in log and len(log) == 1
    result = cli("ST/test.py", *words, "--model_ckpt", "x", "--classifier_ckpt", "y")
    assert result.code == 2


def test_what_needs_a_ground_truth_is_refused(cli, folder, ran, tmp_path):
    result = cli("tools/compare_taus.py", *words_of(folder, ran), "--checkpoint_load",
                 ran / "saved/backdoored_model/poison_rate_unknown/noTrans/folder_my_data/resnet10/unknown/0.tar")  # fmt: skip
    assert result.code == 2 and "ground truth" in result.err
    result = cli("reproduce.py", "--dataset", "folder", "--data_root", folder, "--dry_run")
    assert result.code == 2 and "audit_dataset.py" in result.err


def test_a_jpeg_decoded_at_a_fraction_keeps_the_detail_that_its_size_can_show(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((896, 896), Image.NEAREST).save(tmp_path / "a.jpg", quality=95)
    found = decode(tmp_path / "a.jpg", 224, resize=True).astype(int)
    expected = coarse.repeat(2, 0).repeat(2, 1)  # two pixels a square, but for JPEG's colours
    assert np.abs(found.mean(2) - expected.mean(2)).mean() < 8
