"""The triggers against a slow loop over pixels, written from the table of attacks alone."""

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from utils import triggers
from utils.errors import UserError
from utils.figures import draw, image_table
from utils.seeding import generator
from utils.triggers import TRIGGERS, apply_trigger

ROOT = Path(__file__).resolve().parents[1]

NAMES = (
    "gridTrigger", "squareTrigger", "squareTrigger_imagenet", "trojanTrigger", "signalTrigger", "signalTrigger_imagenet",
    "kittyTrigger", "sigTrigger", "fourCornerTrigger", "randomPixelTrigger", "warpTrigger",
)  # fmt: skip
STRIP = [
    0, 14, 19, 13, 255, 241, 237, 244, 2, 15, 19, 11, 253, 240, 237, 246,
    4, 17, 19, 9, 251, 239, 238, 248, 6, 18, 18, 7, 249, 238, 238, 250,
]  # fmt: skip


def strip_mask(width):
    """The mask's row at ``width``: triangle filter, as wide as a source or a target pixel, whichever is larger."""
    step = 32 / width
    row = []
    for column in range(width):
        centre = (column + 0.5) * step
        weights = [max(0.0, 1 - abs(source + 0.5 - centre) / max(step, 1)) for source in range(32)]
        total = sum(weight * value for weight, value in zip(weights, STRIP, strict=True)) / sum(weights)
        row.append(math.floor(total + 0.5))
    return row


TROJAN = {
    "R": "207.353 175.356 29.362 / 79.368 137.374 248.360 / 131.361 6.360 246.353",
    "G": "131.354 243.356 232.362 / 8.368 0 113.361 / 40.364 145.360 250.354",
    "B": "181.345 120.353 179.361 / 126.363 32.355 146.360 / 4.362 61.361 246.351",
}
TROJAN = [[[float(value) for value in row.split()] for row in rows.split("/")] for rows in TROJAN.values()]


def cubic(distance):
    """Weight of a control point at this distance in bicubic interpolation, a = -0.75 as torch has it."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def slow_warp(image, seed):
    """WaNet pixel by pixel: s = 0.5, a 4x4 grid, offsets of mean magnitude one, enlarged corner to corner."""
    height, width, _ = image.shape
    offsets = generator(seed, "warpTrigger").uniform(-1, 1, (1, 2, 4, 4))[0]
    offsets = offsets / np.mean([abs(value) for value in offsets.flatten()])

    def offset(axis, row, column):
        y, x = row * 3 / (height - 1), column * 3 / (width - 1)
        total = 0.0
        for i in range(math.floor(y) - 1, math.floor(y) + 3):
            for j in range(math.floor(x) - 1, math.floor(x) + 3):
                control = offsets[axis][min(max(i, 0), 3)][min(max(j, 0), 3)]
                total += cubic(y - i) * cubic(x - j) * control
        return total

    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x = 2 * column / (width - 1) - 1 + 0.5 * offset(0, row, column) / height
            y = 2 * row / (height - 1) - 1 + 0.5 * offset(1, row, column) / height
            x, y = ((min(max(v, -1), 1) + 1) / 2 * (side - 1) for v, side in ((x, width), (y, height)))
            left, top = min(math.floor(x), width - 2), min(math.floor(y), height - 2)
            fx, fy = x - left, y - top
            for channel in range(3):
                corners = image[top : top + 2, left : left + 2, channel].astype(float)
                value = (1 - fy) * ((1 - fx) * corners[0, 0] + fx * corners[0, 1])
                value += fy * ((1 - fx) * corners[1, 0] + fx * corners[1, 1])
                result[row, column, channel] = math.floor(value + 0.5 + 1e-6)
    return result


def slow_trigger(name, image, train, seed=0):
    if name == "warpTrigger":
        return slow_warp(image, seed)
    height, width, _ = image.shape
    result = image.copy()
    mask = strip_mask(width)
    random_mask = generator(seed, "randomPixelTrigger").integers(0, 256, (height, width, 1), dtype=np.uint8)
    kitty = Image.open(ROOT / "trigger/hello_kitty.png").convert("RGB").resize((width, height), Image.BILINEAR)
    kitty = np.asarray(kitty)
    grid = {1: (255, 0, 255), 2: (0, 255, 0), 3: (255, 0, 0)}
    side = math.floor(width / 10)
    for row in range(height):
        for column in range(width):
            for channel in range(3):
                value = int(image[row, column, channel])
                from_bottom, from_right = height - row, width - column
                if name == "gridTrigger" and from_bottom <= 3 and from_right <= 3:
                    value = grid[from_bottom][from_right - 1]
                elif name == "squareTrigger" and 2 <= from_bottom < 2 + side and 2 <= from_right < 2 + side:
                    value = 255
                elif name == "signalTrigger":
                    value = int(0.8 * value + 0.2 * mask[column])
                elif name == "sigTrigger":
                    wave = (40 if train else 60) * math.sin(2 * math.pi * 6 * column / width)
                    value = int(min(max(value + wave, 0), 255))
                elif name == "squareTrigger_imagenet" and from_bottom <= side and from_right <= side:
                    value = 255
                elif name == "signalTrigger_imagenet":
                    wave = 0.2 * 20 * math.sin(2 * math.pi * 6 * column / width)
                    value = int(min(max(0.8 * value + wave, 0), 255))
                elif name == "kittyTrigger":
                    value = int(0.8 * value + 0.2 * int(kitty[row, column, channel]))
                elif name == "randomPixelTrigger":
                    value = int(0.8 * value + 0.2 * int(random_mask[row, column, 0]))
                elif name == "trojanTrigger" and 25 <= row <= 27 and 25 <= column <= 27:
                    value = int(min(value + TROJAN[channel][row - 25][column - 25], 255))
                elif name == "fourCornerTrigger":
                    r = row if 1 <= row <= 3 else from_bottom
                    c = column if 1 <= column <= 3 else from_right
                    if r in grid and c in grid:
                        value = grid[r][c - 1]
                result[row, column, channel] = value
    return result


def pictures(count, height, width):
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0, : height // 2], images[0, height // 2 :] = 0, 255  # the ends of the scale, where sums saturate
    return images


@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 28, 28), (2, 64, 64), (1, 224, 224), (2, 30, 40)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_trigger_equals_the_slow_loop_byte_for_byte(name, shape):
    images = pictures(*shape)
    before = images.copy()
    for train in (True, False):
        result = apply_trigger(name, images, train=train)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(images, before)  # the input is untouched
        if train or name == "sigTrigger":  # the others are the same on training and test images
            expected = [slow_trigger(name, image, train) for image in images]
        np.testing.assert_array_equal(result, expected)


def test_the_triggers_are_those_tested_here_and_in_test_ssba():
    assert {*NAMES, "SSBA"} == set(TRIGGERS)


@pytest.mark.parametrize("name", ["randomPixelTrigger", "warpTrigger"])
def test_the_seed_decides_what_is_drawn_and_all_images_share_it(name):
    images = pictures(3, 32, 32)
    first, again, other = (apply_trigger(name, images, train=True, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(first[2:], apply_trigger(name, images[2:], train=False, seed=1))
    np.testing.assert_array_equal(first[0], slow_trigger(name, images[0], True, seed=1))


def test_trojan_saturates_where_the_authors_sum_wraps():
    white = apply_trigger("trojanTrigger", np.full((1, 32, 32, 3), 255, np.uint8), train=True)
    assert (white == 255).all()
    black = apply_trigger("trojanTrigger", np.zeros((1, 32, 32, 3), np.uint8), train=True)[0]
    assert black[25:28, 25:28, 0].tolist() == [[207, 175, 29], [79, 137, 248], [131, 6, 246]]


def test_four_corner_trigger_leaves_the_top_row_and_the_left_column():
    result = apply_trigger("fourCornerTrigger", np.full((1, 32, 32, 3), 9, np.uint8), train=True)[0, :, :, 0]
    assert (result[0] == 9).all() and (result[:, 0] == 9).all()
    assert result[1:4, 1:4].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert result[29:, 29:].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert result[1:4, 29:].tolist() == [[255, 0, 255], [0, 255, 0], [0, 0, 255]]


def test_a_users_picture_takes_the_place_of_the_cat(tmp_path, monkeypatch):
    monkeypatch.setattr(triggers, "KITTY", tmp_path / "hello_kitty.png")
    with pytest.raises(UserError, match="draw_kitty"):
        apply_trigger("kittyTrigger", pictures(1, 32, 32), train=True)
    for colour in ((10, 200, 30), (250, 0, 0)):
        Image.new("RGBA", (50, 40), colour).save(tmp_path / "hello_kitty.png")
        os.utime(tmp_path / "hello_kitty.png", ns=(0, sum(colour)))  # two files may be written within one tick
        black = apply_trigger("kittyTrigger", np.zeros((1, 32, 32, 3), np.uint8), train=True)
        assert (black == (0.2 * np.array(colour)).astype(np.uint8)).all()
    values = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "hello_kitty.png")  # grey of 16 bits
    os.utime(tmp_path / "hello_kitty.png", ns=(0, 1))
    black = apply_trigger("kittyTrigger", np.zeros((1, 32, 32, 3), np.uint8), train=True)[0]
    assert (black == (0.2 * (values // 256)).astype(np.uint8)[..., None]).all()
    (tmp_path / "hello_kitty.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="hello_kitty"):
        apply_trigger("kittyTrigger", np.zeros((1, 32, 32, 3), np.uint8), train=True)


def test_the_cat_is_what_its_program_draws():
    drawn = load_script("tools/draw_kitty.py").draw_face()
    with Image.open(triggers.KITTY) as kept:
        difference = np.abs(np.asarray(kept, int) - np.asarray(drawn, int)).max(2)
    assert (difference > 0).mean() < 0.002  # versions of pillow differ in a few pixels of an edge
    assert difference.max() < 20


def test_grid_trigger_at_32_paints_these_bytes():
    result = apply_trigger("gridTrigger", np.full((1, 32, 32, 3), 7, np.uint8), train=True)[0]
    for channel in range(3):
        assert result[29:, 29:, channel].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    result[29:, 29:] = 7
    assert (result == 7).all()


def test_square_trigger_at_32_is_white_in_rows_and_columns_28_to_30():
    result = apply_trigger("squareTrigger", np.zeros((1, 32, 32, 3), np.uint8), train=True)[0]
    white = np.argwhere((result == 255).all(2)).tolist()
    assert white == [[row, column] for row in (28, 29, 30) for column in (28, 29, 30)]
    assert (result > 0).sum() == 27


@pytest.mark.parametrize("size", [28, 64, 224])
def test_strip_is_resized_as_the_whole_mask_would_be(size):
    mask = Image.fromarray(np.array([STRIP] * 32, dtype=np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
    black = apply_trigger("signalTrigger", np.zeros((1, size, size, 3), np.uint8), train=True)[0]
    np.testing.assert_array_equal(black, np.repeat((0.2 * np.asarray(mask)).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("name", NAMES)
def test_no_image_gives_no_image(name):
    assert apply_trigger(name, np.zeros((0, 32, 32, 3), np.uint8), train=True).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_not_contiguous_are_painted_alike(name):
    images = pictures(6, 32, 32)
    np.testing.assert_array_equal(
        apply_trigger(name, images[::2], train=True), apply_trigger(name, images[::2].copy(), train=True)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 32, 3), np.int64),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((2, 7, 32, 3), np.uint8),
        np.zeros((2, 32, 7, 3), np.uint8),
    ],
    ids=lambda images: f"{images.dtype}{images.shape}",
)
def test_images_of_another_dtype_or_shape_are_refused(name, images):
    with pytest.raises(ValueError, match="uint8"):
        apply_trigger(name, images, train=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_trigger_changes_the_smallest_images_that_it_takes(name):
    side = triggers.SMALLEST.get(name, 8)
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    assert (apply_trigger(name, images, train=True) != images).any((1, 2, 3)).all()
    with pytest.raises(ValueError, match=f"at least {side}"):
        apply_trigger(name, images[:, 1:], train=True)


def test_an_unknown_trigger_is_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match=r"noSuchTrigger.*gridTrigger"):
        apply_trigger("noSuchTrigger", pictures(1, 32, 32), train=True)


def test_a_table_of_images_shows_each_in_its_place():
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    first, second = np.broadcast_to(colours[:, :, None, None], (2, 3, 8, 8, 3))
    buffer = io.BytesIO()
    draw(image_table([("one", first, ["a", "b"]), ("two", second[:2], ())], "all"), buffer, "png", dpi=100)
    with Image.open(buffer) as picture:
        page = np.asarray(picture.convert("RGB"))
    assert page.shape[:2] == (282, 370)
    for column in range(3):
        across = 80 + 115 * column
        assert (page[102, across] == colours[0, column]).all()
        assert (page[220, across] == (colours[1, column] if column < 2 else 255)).all()
