"""The ImageNet subset: streamed from disk, odd files and broken ones, the builder, and every step that works on it."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import load_script
from PIL import Image
from test_bad_input import refused, snapshot
from test_poisoning import options

from models import build_model
from utils import dataloader_bd as bd
from utils import images, poisoning
from utils.device import Runtime
from utils.errors import UserError
from utils.files import read_json, sha256
from utils.images import StreamedImages
from utils.loading import load_dataset
from utils.samples import load_samples
from utils.transforms import CropFlip, rotate
from utils.triggers import apply_trigger

CPU = Runtime(torch.device("cpu"), torch.float32)
SIZES = [(224, 224), (300, 200), (90, 130), (500, 375), (224, 100), (33, 47)]


def write_images(folder, classes=3, train=14, val=4):
    """Photograph-like files: grey, palette, RGBA, JPEG and PNG, of odd sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(count):
                coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                coarse[..., label] //= 3  # so that there is something to learn
                image = Image.fromarray(coarse).resize(SIZES[number % len(SIZES)], Image.BICUBIC)
                mode = ("RGB", "L", "P", "RGBA")[number % 4]
                image.convert(mode).save(place / f"{number:03d}.{'JPEG' if mode in ('RGB', 'L') else 'png'}")
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "sub-imagenet-200")
    (root / "sub-imagenet-200/train/n00000001/002.png").write_bytes(b"\x89PNG broken")
    return root


@pytest.fixture(scope="session")
def dataset(root):
    return load_dataset("imagenet", root)


@pytest.fixture
def words(root):
    def common(output_root):
        return ["--dataset", "imagenet", "--model", "resnet10", "--data_root", root, "--output_root", output_root,
                "--trigger_type", "squareTrigger_imagenet", "--poison_rate", 0.25]  # fmt: skip

    return common


# The data


def test_a_broken_file_is_skipped_with_a_warning_that_names_it_or_refused(root, capsys):
    dataset = load_dataset("imagenet", root)
    said = capsys.readouterr().out
    assert "1 of 42" in said and "n00000001/002.png" in said
    assert len(dataset.train_images) == len(dataset.train_labels) == 41
    assert np.bincount(dataset.train_labels).tolist() == [14, 13, 14]
    assert len(dataset.test_images) == 12 and dataset.spec.num_classes == 3
    with pytest.raises(UserError, match=r"1 of the images .*002\.png"):
        load_dataset("imagenet", root, strict=True)


def test_files_are_tried_once_and_again_when_one_changes(tmp_path, capsys):
    folder = write_images(tmp_path / "sub-imagenet-200", train=3, val=1)
    load_dataset("imagenet", tmp_path)
    stamp = (folder / ".checked_train.json").stat().st_mtime_ns
    load_dataset("imagenet", tmp_path)
    assert (folder / ".checked_train.json").stat().st_mtime_ns == stamp
    (folder / "train/n00000000/000.JPEG").write_bytes(b"now broken")
    assert len(load_dataset("imagenet", tmp_path).train_images) == 8
    (folder / ".checked_train.json").write_text("damaged")
    assert len(load_dataset("imagenet", tmp_path).train_images) == 8


def test_a_file_that_can_be_read_again_is_read_again(tmp_path, monkeypatch):
    write_images(tmp_path / "sub-imagenet-200", train=3, val=1)
    with monkeypatch.context() as unwell:
        whole = images.open_image

        def fails(path):
            if str(path).endswith("001.JPEG"):
                raise OSError("the disk is not well")
            return whole(path)

        unwell.setattr(images, "open_image", fails)
        left = len(load_dataset("imagenet", tmp_path).train_images)
    assert left < 9 == len(load_dataset("imagenet", tmp_path).train_images)


def test_a_link_whose_file_has_moved_counts_as_broken(tmp_path, capsys):
    folder = write_images(tmp_path / "sub-imagenet-200", train=3, val=1)
    (folder / "train/n00000001/link.png").symlink_to(tmp_path / "gone.png")
    assert len(load_dataset("imagenet", tmp_path).train_images) == 9
    assert "link.png" in capsys.readouterr().out


def test_images_of_every_mode_and_size_become_rgb_of_224(dataset):
    images = dataset.train_images
    assert isinstance(images, StreamedImages) and images.shape == (41, 224, 224, 3)
    for row in (0, 1, 2, 3, 7):
        with Image.open(images.files[row]) as image:
            whole = np.asarray(image.convert("RGB").resize((224, 224), Image.BILINEAR))
        difference = abs(images[row : row + 1][0].astype(int) - whole)
        assert difference.mean() < 2  # a JPEG may be decoded at a fraction of its size
        if image.format == "PNG":
            assert difference.max() == 0
    mask = np.zeros(41, dtype=bool)
    mask[[4, 9]] = True
    np.testing.assert_array_equal(images[mask], images[np.array([4, 9])])
    np.testing.assert_array_equal(images.subset(mask)[:1], images[4:5])


# Poisoning and batches


@pytest.mark.parametrize(
    "trigger", ["squareTrigger_imagenet", "signalTrigger_imagenet", "kittyTrigger", "sigTrigger", "SSBA"]
)
def test_streamed_poisoning_is_that_of_images_in_memory(dataset, tmp_path, trigger):
    from utils.SSBA.encode_image import ENCODER

    opt = options(trigger_type=trigger, poison_rate=0.3, ssba_encoder=ENCODER, ssba_images=None, target_label=1)
    poisoned = poisoning.poison_training_set(dataset, opt)
    rows = np.sort(np.random.default_rng(0).permutation(41)[:12])
    decoded = dataset.train_images[rows]
    expected = np.where(poisoned.is_clean[rows, None, None, None], decoded, apply_trigger(trigger, decoded, train=True))
    np.testing.assert_array_equal(poisoned.images[rows], expected)
    assert not poisoned.is_clean[rows].all() and (poisoned.labels[~poisoned.is_clean] == 1).all()
    np.testing.assert_array_equal(poisoned.images.subset(rows[3:])[:], expected[3:])

    tests = bd.make_test_sets(dataset, opt, CPU)
    others = dataset.test_images[dataset.test_labels != 1]
    np.testing.assert_array_equal(tests.triggered_images[:3], apply_trigger(trigger, others, train=False)[:3])
    assert len(tests.triggered_images) == len(tests.attack_labels) == 8


def test_batches_do_not_depend_on_the_workers_and_equal_those_of_an_array(dataset):
    poisoned = poisoning.poison_training_set(dataset, options(trigger_type="squareTrigger_imagenet", poison_rate=0.3))
    augmentation = CropFlip.of(dataset.spec)
    assert (augmentation.padding, augmentation.rotation, augmentation.flip) == (0, 20, True)

    def epoch(images, workers):
        runtime = Runtime(torch.device("cpu"), torch.float32, workers)
        settings = (dataset.spec, runtime, 16, 0, "test")
        batches = bd.Batches(images, poisoned.labels, *settings, augmentation=augmentation, extra=poisoned.index)
        return list(batches.epoch(3))

    in_memory = epoch(poisoned.images[:], 0)
    for workers in (0, 2):
        streamed = epoch(poisoned.images, workers)
        assert len(streamed) == len(in_memory) == 3
        for one, two in zip(streamed, in_memory, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_rotation_at_224_is_torchvisions():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8))
    for degrees in (-17.3, 8.9):
        expected = TF.rotate(TF.to_pil_image(image[0]), degrees)
        found = rotate(image, torch.tensor([degrees], dtype=torch.float64))[0].permute(1, 2, 0).numpy()
        assert (found != np.asarray(expected)).mean() < 0.001


# The steps


def test_every_step_runs_on_it(cli, words, tmp_path, root, dataset):
    common = words(tmp_path)
    ratios = ["--clean_ratio", 0.3, "--poison_ratio", 0.1]
    for name, *more in (
        ("train_attack_noTrans.py", "--epochs", 1, "--batch_size", 16),
        ("finetune_attack_noTrans.py", "--epochs", 1, "--batch_size", 16),
        ("calculate_consistency.py", "--batch_size", 16),
        ("separate_samples.py", *ratios),
        ("train_attack_withTrans_imagenet.py", "--epochs", 1, "--batch_size", 16, "--pretrained", "none"),
        ("unlearn_relearn.py", *ratios, "--epochs", 1, "--batch_size", 4),
    ):
        result = cli(name, *common, *more)
        assert result.code == 0, (name, result.err)
    model = tmp_path / "saved/backdoored_model/poison_rate_0.25/withTrans/imagenet/resnet10/squareTrigger_imagenet"
    assert (model / "0.tar").is_file() and (model / "0_unlearn_purify.tar").is_file()
    assert (model / "samples.png").is_file()
    assert "ASR" in (model / "unlearn_purify.csv").read_text()
    folder = tmp_path / "saved/separated_samples/imagenet/resnet10/squareTrigger_imagenet_0.3_0.1"
    samples = np.load(folder / "clean_samples.npy", allow_pickle=False)
    assert samples.dtype.names == ("label", "flag", "index") and len(samples) == 12

    short = [*common, *ratios, "--epochs", 1, "--batch_size", 16]
    assert cli("ST/train_extractor.py", *short, "--cosine").code == 0
    assert cli("ST/train_classifier.py", *short, "--learning_rate", 0.5).code == 0
    resumed = cli("train_attack_withTrans_imagenet.py", *common, "--epochs", 2, "--batch_size", 16, "--pretrained", "none",
                  "--checkpoint_load", model / "0.tar")  # fmt: skip
    assert resumed.code == 0 and "Continuing after epoch 0" in resumed.out

    parser = cli.module("separate_samples.py").get_parser()
    opt = parser.parse_args([str(word) for word in (*common, *ratios)])
    np.testing.assert_array_equal(load_samples(opt, dataset.spec, [0])["index"], samples["index"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trigger_type", "fourCornerTrigger", "--target_type", "cleanLabel"], "not held in memory"),
        (["--target_label", 3], "classes 0 to 2"),
        (["--strict"], "002.png"),
        (["--dataset", "cifar10"], "train_attack_withTrans.py"),
        (["--pretrained", "imagenet"], "no ImageNet weights of resnet10"),
        (["--pretrained", "missing.pth"], "missing.pth"),
        (["--pretrained", "/"], "is a folder; name a file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(cli, words, tmp_path, more, message):
    result = cli("train_attack_withTrans_imagenet.py", *words(tmp_path), "--epochs", 1, *more)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tar"))


def test_a_file_of_weights_is_an_input_however_it_is_spelt(cli, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("resnet10", "imagenet", 3, 224).state_dict(), tmp_path / "weights.pth")
    step = ["train_attack_withTrans_imagenet.py", *words(tmp_path), "--epochs", 1, "--batch_size", 16]
    assert cli(*step, "--pretrained", "weights.pth").code == 0
    (record,) = tmp_path.rglob("options.json")
    ((name, digest),) = read_json(record)["inputs"].items()
    assert (record.parent / name).resolve() == tmp_path / "weights.pth" and digest == sha256(tmp_path / "weights.pth")
    again = cli(*step, "--pretrained", tmp_path / "x/../weights.pth")
    assert again.code == 0, again.err  # the same setting
    refused(cli(*step, "--pretrained", "none"), "--pretrained", "--overwrite")


def test_the_step_for_small_images_points_to_this_one(cli, words, tmp_path):
    result = cli("train_attack_withTrans.py", *words(tmp_path), "--epochs", 1)
    assert result.code == 2 and "train_attack_withTrans_imagenet.py" in result.err


def test_workers_and_strict_are_refused_for_images_in_memory(cli, tmp_path):
    for extra in (["--workers", 2], ["--strict"]):
        result = cli("train_attack_noTrans.py", "--dataset", "fashion", "--output_root", tmp_path, *extra)
        assert result.code == 2 and f"{extra[0]} has no use" in result.err


def test_without_the_folder_the_builder_is_named(cli, tmp_path):
    result = cli("train_attack_withTrans_imagenet.py", "--data_root", tmp_path, "--output_root", tmp_path)
    assert result.code == 2 and f"build_imagenet_subset.py --imagenet DIR --out {tmp_path}/sub" in result.err


# Weights


def test_weights_of_another_class_count_give_all_but_the_last_layer(tmp_path):
    import torchvision

    from models import build_model
    from models.pretrained import load_pretrained

    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = build_model("resnet18", "imagenet", 7, 224)
    own = model.fc.weight.clone()
    load_pretrained(model, "resnet18", tmp_path / "weights.pth")
    assert torch.equal(model.fc.weight, own) and model.fc.out_features == 7
    theirs.fc = torch.nn.Identity()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().features(image), theirs.eval()(image))

    with pytest.raises(UserError, match=r"do not fit this network: they lack layer1\.2"):
        load_pretrained(build_model("resnet34", "imagenet", 7, 224), "resnet34", tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="weights"):
        load_pretrained(model, "resnet18", tmp_path / "weights.pth")


def test_weights_that_cannot_be_downloaded_are_refused(monkeypatch):
    from urllib.error import URLError

    from models import build_model
    from models.pretrained import load_pretrained

    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match="--pretrained none"):
        load_pretrained(build_model("resnet18", "imagenet", 7, 224), "resnet18", "imagenet")


# The builder


@pytest.mark.parametrize("copy", [False, True])
def test_the_builder_makes_the_subset_and_can_run_again(cli, tmp_path, copy):
    source = write_images(tmp_path / "ImageNet", classes=3, train=2, val=1)
    (tmp_path / "list.txt").write_text("# two of three\nn00000000\nn00000002\n")
    words = ["--imagenet", source, "--out", tmp_path / "data/sub-imagenet-200", "--classes", tmp_path / "list.txt"]
    words += ["--copy"] * copy
    first = cli("tools/build_imagenet_subset.py", *words)
    assert first.code == 0 and "6 images of 2 classes, 6 of them new" in first.out
    (source / "train/n00000000/new.png").write_bytes((source / "train/n00000000/000.JPEG").read_bytes())
    again = cli("tools/build_imagenet_subset.py", *words)
    assert again.code == 0 and "7 images of 2 classes, 1 of them new" in again.out
    found = next((tmp_path / "data").rglob("000.JPEG"))
    assert found.is_symlink() != copy and found.stat().st_size > 0
    assert load_dataset("imagenet", tmp_path / "data").classes == ["n00000000", "n00000002"]


@pytest.fixture
def subset(cli, tmp_path):
    """``subset(classes, *more)`` -> what the builder said of a copy of ImageNet with three classes and three images each."""
    write_images(tmp_path / "ImageNet", classes=3, train=2, val=1)

    def build(classes, *more):
        (tmp_path / "list.txt").write_text("".join(f"n{label:08d}\n" for label in classes))
        words = ["--imagenet", tmp_path / "ImageNet", "--out", tmp_path / "out", "--classes", tmp_path / "list.txt"]
        return cli("tools/build_imagenet_subset.py", *words, *more)

    return build


def test_the_builder_adds_no_classes_to_those_of_another_list(subset, tmp_path):
    assert subset([0, 1]).code == 0
    before = snapshot(tmp_path / "out")
    refused(subset([0, 2]), "out/train holds class folders that are not in --classes: n00000001;", "another --out")
    refused(subset([0], "--out", tmp_path / "ImageNet"), "n00000001, n00000002")
    refused(subset([0, 1, 2], "--out", tmp_path / "ImageNet"), "is a folder of --imagenet itself")
    assert snapshot(tmp_path / "out") == before


def test_the_builder_counts_what_is_there_and_removes_lost_links(subset, tmp_path):
    assert subset([0, 1]).code == 0
    (tmp_path / "ImageNet/train/n00000000/000.JPEG").unlink()
    said = subset([0, 1])
    assert said.code == 0 and "holds 5 images of 2 classes, 0 of them new; 1 links" in said.out
    assert not (tmp_path / "out/train/n00000000/000.JPEG").is_symlink()
    (tmp_path / "ImageNet").rename(tmp_path / "moved")
    said = subset([0, 1], "--imagenet", tmp_path / "moved")
    assert "holds 5 images of 2 classes, 5 of them new; 5 links" in said.out


def test_the_builder_copies_what_it_had_linked(subset, tmp_path):
    assert subset([0, 1]).code == 0
    source = snapshot(tmp_path / "ImageNet")
    said = subset([0, 1], "--copy")
    assert said.code == 0 and "holds 6 images of 2 classes, 6 of them new" in said.out
    files = [file for file in (tmp_path / "out").rglob("*.*") if file.suffix in (".JPEG", ".png")]
    assert len(files) == 6 and not any(file.is_symlink() for file in files)
    assert files[0].read_bytes() == (tmp_path / "ImageNet" / files[0].relative_to(tmp_path / "out")).read_bytes()
    assert "6 images of 2 classes, 0 of them new" in subset([0, 1], "--copy").out
    assert snapshot(tmp_path / "ImageNet") == source


@pytest.mark.parametrize("more", [[], ["--copy"]], ids=str)
def test_a_folder_with_the_name_of_an_image_is_one_line(subset, tmp_path, more):
    (tmp_path / "out/train/n00000000/001.JPEG").mkdir(parents=True)
    refused(subset([0, 1], *more), "out/train/n00000000/001.JPEG", "is no file")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_the_builder_names_a_class_folder_that_is_missing(cli, tmp_path):
    result = cli("tools/build_imagenet_subset.py", "--imagenet", tmp_path, "--out", tmp_path / "out")
    assert result.code == 2 and "400 of 400" in result.err and not (tmp_path / "out").exists()


def test_the_committed_list_has_200_classes():
    builder = load_script("tools/build_imagenet_subset.py")
    ids = builder.read_classes(builder.CLASSES)
    assert len(ids) == 200 and all(len(name) == 9 and name.startswith("n") for name in ids)
