"""The triggers against a slow loop over pixels, written from the table of attacks alone."""

import math

import numpy as np
import pytest
from PIL import Image

from utils.triggers import apply_trigger

NAMES = ("gridTrigger", "squareTrigger", "signalTrigger", "sigTrigger")
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


def slow_trigger(name, image, train):
    height, width, _ = image.shape
    result = image.copy()
    mask = strip_mask(width)
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
                result[row, column, channel] = value
    return result


def pictures(count, height, width):
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0, : height // 2], images[0, height // 2 :] = 0, 255  # the ends of the scale, where sums saturate
    return images


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 28, 28), (2, 64, 64), (1, 224, 224), (2, 20, 40)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_trigger_equals_the_slow_loop_byte_for_byte(name, shape, train):
    images = pictures(*shape)
    before = images.copy()
    result = apply_trigger(name, images, train=train)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(images, before)  # the input is untouched
    np.testing.assert_array_equal(result, [slow_trigger(name, image, train) for image in images])


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


def test_an_unknown_trigger_is_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match=r"noSuchTrigger.*gridTrigger"):
        apply_trigger("noSuchTrigger", pictures(1, 32, 32), train=True)
