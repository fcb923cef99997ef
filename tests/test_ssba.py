"""SSBA: the bundled encoder hides its secret, differs from image to image, and its trainer learns; images made elsewhere."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, run_all
from PIL import Image
from test_bad_input import refused, snapshot
from test_poisoning import make_dataset, options

from utils import dataloader_bd as bd
from utils import poisoning, triggers
from utils.device import Runtime
from utils.errors import UserError
from utils.poisoning import paint
from utils.SSBA.encode_image import ENCODER, as_floats, decode_images, encode_images, load_networks
from utils.SSBA.model import BITS, SIZE
from utils.triggers import apply_trigger

CPU = Runtime(torch.device("cpu"), torch.float32)


def ssba(tmp_path, **changes):
    return options(
        trigger_type="SSBA", dataset="cifar10", ssba_encoder=ENCODER, ssba_images=None, output_root=tmp_path, **changes
    )


@pytest.fixture(scope="module")
def held_out(fashion):
    return fashion.test_images[:200]


@pytest.fixture(scope="module")
def encoded(held_out):
    return apply_trigger("SSBA", held_out, train=False)


def test_the_bundled_file_is_small():
    assert ENCODER.stat().st_size < 2e6


def test_the_decoder_reads_the_secret_in_held_out_images(encoded):
    bits, secret = decode_images(encoded)
    assert (bits == secret).mean() >= 0.95
    assert 30 < secret.sum() < 70  # a secret of all zeros could be read anywhere


def test_the_decoder_does_not_read_the_secret_in_clean_images(held_out):
    bits, secret = decode_images(held_out)
    assert (bits == secret).mean() < 0.75


def test_the_residual_is_faint_and_differs_from_image_to_image(held_out, encoded):
    difference = encoded.astype(float) - held_out
    psnr = 10 * np.log10(255**2 / (difference**2).mean((1, 2, 3)))
    assert psnr.mean() >= 28
    assert difference.std(0).mean() > 0.5  # grey levels
    flat = difference.reshape(len(difference), -1)
    alike = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
    assert alike.mean() < 0.95


def test_encoding_equals_a_plain_loop_over_single_images(held_out, encoded):
    encoder, _, secret = load_networks(ENCODER)
    for image, found in zip(held_out[:5], encoded[:5], strict=True):
        x = torch.from_numpy(image.astype(np.float64) / 255).permute(2, 0, 1)[None]
        with torch.no_grad():
            y = torch.round(255 * (x + encoder(x, secret))).clamp(0, 255)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, y.astype(np.uint8))


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (224, 224), (40, 60)], ids=str)
def test_the_secret_survives_in_images_of_another_size(held_out, size):
    large = torch.nn.functional.interpolate(as_floats(held_out[:8]), size, mode="bilinear")
    images = (255 * large).round().to(torch.uint8).permute(0, 2, 3, 1).numpy().copy()
    before = images.copy()
    result = apply_trigger("SSBA", images, train=True)
    np.testing.assert_array_equal(images, before)
    assert result.shape == images.shape
    if min(size) >= SIZE:
        bits, secret = decode_images(result)
        assert (bits == secret).mean() > 0.9


def test_batches_do_not_matter(held_out, encoded):
    np.testing.assert_array_equal(encode_images(held_out[130:140]), encoded[130:140])


def test_a_missing_or_hostile_encoder_is_refused(tmp_path, held_out):
    with pytest.raises(UserError, match="train_ssba"):
        encode_images(held_out[:1], tmp_path / "none.pt")
    torch.save({"encoder": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no SSBA encoder"):
        encode_images(held_out[:1], tmp_path / "other.pt")
    torch.save({"encoder": load_script}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="not opened"):
        encode_images(held_out[:1], tmp_path / "hostile.pt")


@pytest.mark.parametrize(
    "secret",
    [torch.zeros(BITS, device="meta"), torch.full((BITS,), torch.nan), torch.full((BITS,), 0.5), torch.ones(BITS).to_sparse(),
     torch.ones(BITS, 1), [0] * BITS, None],
    ids=["meta", "nan", "half", "sparse", "shape", "list", "none"],
)  # fmt: skip
def test_a_secret_that_is_no_bits_is_refused(secret, tmp_path):
    torch.save({**torch.load(ENCODER, weights_only=True), "secret": secret}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="lacks a secret of 100 bits"):
        load_networks(tmp_path / "odd.pt")


def test_encoded_images_are_kept_and_made_anew_when_damaged(tmp_path, capsys):
    dataset, rows = make_dataset(), np.arange(300)
    first = paint(dataset, ssba(tmp_path), rows, train=True)
    assert "they are kept" in capsys.readouterr().out
    np.testing.assert_array_equal(first, apply_trigger("SSBA", dataset.train_images[:300], train=True))
    np.testing.assert_array_equal(paint(dataset, ssba(tmp_path), rows, train=True), first)
    assert "they are kept" not in capsys.readouterr().out
    (kept,) = (tmp_path / "saved/poisoned_images/cifar10").iterdir()
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(paint(dataset, ssba(tmp_path), rows, train=True), first)
    assert "they are kept" in capsys.readouterr().out


def test_images_encoded_elsewhere_are_taken_in_sample_order(tmp_path):
    dataset = make_dataset()
    np.save(tmp_path / "train.npy", 255 - dataset.train_images)
    np.save(tmp_path / "test.npy", 255 - dataset.test_images)
    opt = ssba(tmp_path)
    opt.ssba_images = [tmp_path / "train.npy", tmp_path / "test.npy"]
    poisoned = poisoning.poison_training_set(dataset, opt)
    chosen = ~poisoned.is_clean
    np.testing.assert_array_equal(poisoned.images[chosen], 255 - dataset.train_images[chosen])
    np.testing.assert_array_equal(poisoned.images[~chosen], dataset.train_images[~chosen])
    tests = bd.make_test_sets(dataset, opt, CPU)
    expected = 255 - dataset.test_images[dataset.test_labels != 0]
    np.testing.assert_array_equal(tests.triggered_images.permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((400, 32, 32, 3), np.float32), "uint8"),
        (np.zeros((399, 32, 32, 3), np.uint8), "sample order"),
        (np.array([{"pickled": 1}], dtype=object), "cannot read"),
    ],
    ids=["dtype", "count", "pickle"],
)
def test_images_of_another_shape_or_kind_are_refused(tmp_path, array, message):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    opt = ssba(tmp_path)
    opt.ssba_images = [tmp_path / "train.npy"]
    with pytest.raises(UserError, match=message):
        poisoning.poison_training_set(make_dataset(), opt)
    np.save(tmp_path / "train.npy", make_dataset().train_images)
    with pytest.raises(UserError, match="no second file"):
        bd.make_test_sets(make_dataset(), opt, CPU)


def test_steps_on_separated_samples_refuse_another_trigger_than_theirs(cli, words, tmp_path):
    content = torch.load(ENCODER, weights_only=True)
    torch.save({**content, "secret": 1 - content["secret"]}, tmp_path / "mine.pt")
    common = [*words(tmp_path / "out"), "--trigger_type", "SSBA"]
    assert run_all([*common, "--ssba_encoder", tmp_path / "mine.pt"], epochs=1) == [0] * 11
    before = snapshot(tmp_path / "out")
    for script in ("unlearn_relearn.py", "ST/train_classifier.py", "ST/test.py"):
        again = [] if script == "ST/test.py" else ["--overwrite"]
        refused(cli(script, *common, *again), "carry another trigger", "an encoder")  # which was forgotten
    assert snapshot(tmp_path / "out") == before


def test_a_picture_behind_the_trigger_that_was_replaced_is_noticed(tmp_path, monkeypatch):
    dataset, opt = make_dataset(), options(trigger_type="kittyTrigger")
    made = {"poisoned_digest": poisoning.poison_training_set(dataset, opt).digest}
    poisoning.refuse_other_trigger(dataset, opt, made, "0.tar")
    Image.fromarray(255 - np.asarray(Image.open(triggers.KITTY).convert("RGB"))).save(tmp_path / "other.png")
    monkeypatch.setattr(triggers, "KITTY", tmp_path / "other.png")
    poisoning.refuse_other_trigger(dataset, opt, {"poisoned_digest": None}, "0.tar")  # an older one does not say
    with pytest.raises(UserError, match="carry another trigger"):
        poisoning.refuse_other_trigger(dataset, opt, made, "0.tar")


@pytest.mark.slow
def test_the_trainer_learns_bits_and_writes_what_the_trigger_reads(cli, tmp_path, held_out):
    out = tmp_path / "new/encoder.pt"
    words = ["--steps", 60, "--batch_size", 16, "--image_weight", 1, "--ramp", 1000, "--data_root", ROOT / "dataset"]
    result = cli("tools/train_ssba.py", *words, "--out", out)
    assert result.code == 0, result.err
    losses = [float(line.split("bits ")[1].split()[0]) for line in result.out.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.66 < losses[0]  # log 2 = 0.693 is guessing
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["held_out"]["fashion"]["bit_accuracy"] > 0.6
    assert (encode_images(held_out[:2], out) != held_out[:2]).any()


def test_an_encoder_is_not_replaced_unasked(cli, tmp_path):
    (tmp_path / "encoder.pt").write_bytes(b"mine")
    (tmp_path / "other.json").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    before = snapshot(tmp_path)
    for name, needle in (("encoder.pt", "encoder.pt is there already"), ("other.pt", "other.json is there already")):
        refused(cli("tools/train_ssba.py", "--out", tmp_path / name), needle, "--overwrite")
    refused(cli("tools/train_ssba.py", "--overwrite", "--out", tmp_path / "folder"), "name a file")
    refused(cli("tools/train_ssba.py", "--out", tmp_path / ("x" * 253)), "too long")
    refused(cli("tools/train_ssba.py", "--out", tmp_path / "new.pt", "--workers", 2), "--workers")
    assert snapshot(tmp_path) == before


def test_an_encoder_whose_training_diverged_replaces_none(cli, tmp_path):
    (tmp_path / "encoder.pt").write_bytes(b"mine")
    (tmp_path / "encoder.json").write_bytes(b"mine")
    before = snapshot(tmp_path)
    words = ["--steps", 20, "--lr", 1e8, "--batch_size", 2, "--out", tmp_path / "encoder.pt", "--overwrite"]
    refused(cli("tools/train_ssba.py", *words, "--device", "cpu"), "not finite after step 20", "--lr")
    assert snapshot(tmp_path) == before


def test_the_record_beside_the_bundled_encoder_says_how_it_was_made():
    record = json.loads(ENCODER.with_suffix(".json").read_text())
    assert record["options"]["steps"] > 0
    assert all(part["bit_accuracy"] >= 0.95 and part["psnr_db"] >= 28 for part in record["held_out"].values())


def test_what_is_kept_of_other_images_is_not_taken(tmp_path):
    opt = SimpleNamespace(trigger_type="SSBA", output_root=tmp_path, dataset="cifar10")
    for value in (1, 2):
        images = np.full((64, 8, 8, 3), value, np.uint8)
        kept = poisoning._kept(opt, {"encoder": "x"}, images, True, lambda images=images: images)
        assert (kept == value).all()
