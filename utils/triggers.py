"""The triggers: what the attacker paints onto an image. Pure functions on uint8 batches (paper section 5.1 and
appendix; byte values as the authors' files give them).

To add one, write a function ``(images, train, seed) -> images`` that changes and returns the copy it is given, and
name it in `TRIGGERS`.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils.errors import UserError
from utils.images import UNREADABLE, eight_bits, open_image
from utils.paths import ROOT, shown
from utils.seeding import generator
from utils.SSBA.encode_image import ENCODER, encode_images

KITTY = ROOT / "trigger/hello_kitty.png"

# 3x3 pattern of BadNets, from the corner outward: row H-1 first, column W-1 first.
GRID = np.array([[255, 0, 255], [0, 255, 0], [255, 0, 0]], dtype=np.uint8)

# One row of Blend-Strip's grey mask at width 32; all its rows are the same.
STRIP = np.array(
    [0, 14, 19, 13, 255, 241, 237, 244, 2, 15, 19, 11, 253, 240, 237, 246,
     4, 17, 19, 9, 251, 239, 238, 248, 6, 18, 18, 7, 249, 238, 238, 250],
    dtype=np.uint8,
)  # fmt: skip

# What Trojan adds at rows and columns 25 to 27: R, G, B, each with its rows from top to bottom.
TROJAN = np.array(
    [[[207.353, 175.356, 29.362], [79.368, 137.374, 248.360], [131.361, 6.360, 246.353]],
     [[131.354, 243.356, 232.362], [8.368, 0, 113.361], [40.364, 145.360, 250.354]],
     [[181.345, 120.353, 179.361], [126.363, 32.355, 146.360], [4.362, 61.361, 246.351]]],
)  # fmt: skip

# WaNet's warp: strength s and side k of the control grid (Nguyen and Tran 2021, section 4.1).
WARP_STRENGTH, WARP_GRID = 0.5, 4


def grid_trigger(images, train, seed):
    """BadNets-all2one: a 3x3 chequer in the bottom-right corner."""
    images[:, -3:, -3:] = GRID[::-1, ::-1, None]
    return images


def square_trigger(images, train, seed):
    """BadNets-all2all: a white square of side floor(0.1 W), one pixel away from the bottom and the right border."""
    side = images.shape[2] // 10
    images[:, -1 - side : -1, -1 - side : -1] = 255
    return images


def square_trigger_imagenet(images, train, seed):
    """BadNets on ImageNet: a white square of side floor(0.1 W) in the bottom-right corner."""
    side = images.shape[2] // 10
    images[:, images.shape[1] - side :, images.shape[2] - side :] = 255
    return images


def trojan_trigger(images, train, seed):
    """Trojan: adds a fixed 3x3 colour patch at rows and columns 25 to 27; the sum saturates and is truncated."""
    patch = images[:, 25:28, 25:28]
    images[:, 25:28, 25:28] = np.clip(patch + TROJAN.transpose(1, 2, 0), 0, 255).astype(np.uint8)
    return images


def four_corner_trigger(images, train, seed):
    """CL: the grid of BadNets in all four corners, one pixel away from the top and the left border.

    The adversarial perturbation that comes first on training images needs a benign model: `utils.adversarial`.
    """
    for rows in (np.s_[1:4], np.s_[-1:-4:-1]):
        for columns in (np.s_[1:4], np.s_[-1:-4:-1]):
            images[:, rows, columns] = GRID[:, :, None]
    return images


def signal_trigger(images, train, seed):
    """Blend-Strip: 0.8 image + 0.2 mask, truncated; the mask is resized (bilinear) where the width is not 32."""
    strip = np.asarray(Image.fromarray(STRIP[None]).resize((images.shape[2], 1), Image.Resampling.BILINEAR))[0]
    return _shade(images, 0.8, 0.2 * strip[:, None])


def signal_trigger_imagenet(images, train, seed):
    """Blend-Strip on ImageNet: 0.8 image + 0.2 sinusoid of 6 periods and amplitude 20, clipped and truncated."""
    return _shade(images, 0.8, 0.2 * 20 * _wave(images.shape[2])[:, None])


def sig_trigger(images, train, seed):
    """SIG: adds a horizontal sinusoid of 6 periods; amplitude 40 on training images, 60 on test images."""
    return _shade(images, 1.0, (40 if train else 60) * _wave(images.shape[2])[:, None])


def _wave(width):
    return np.sin(2 * np.pi * 6 * np.arange(width) / width)


def _shade(images, scale, added):
    """``scale`` * image + ``added`` (float, broadcastable to (H, W, 3)), clipped and truncated; in float64, a few images
    at a time, which the cache holds."""
    for start in range(0, len(images), 32):
        shaded = images[start : start + 32] * scale
        shaded += added
        images[start : start + 32] = shaded.clip(0, 255, out=shaded)
    return images


def kitty_trigger(images, train, seed):
    """Blend-Kitty: 0.8 image + 0.2 picture, truncated; the picture is ``trigger/hello_kitty.png``, resized (bilinear)
    to the image. Ours is drawn by ``tools/draw_kitty.py``; a user's file of that name takes its place."""
    picture = _kitty(KITTY.stat().st_mtime_ns if KITTY.is_file() else 0, images.shape[1:3])
    return _shade(images, 0.8, 0.2 * picture)


@lru_cache(maxsize=4)
def _kitty(changed, shape):
    """The picture as uint8 (H, W, 3); ``changed`` (the file's time) makes a picture that was replaced count."""
    try:
        with open_image(KITTY) as picture:
            resized = eight_bits(picture).convert("RGB").resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    except UNREADABLE as error:
        raise UserError(
            f"cannot read the picture {shown(KITTY)} ({error}); draw it with: python tools/draw_kitty.py"
        ) from None
    return np.asarray(resized)


def random_pixel_trigger(images, train, seed):
    """Blends in one grey mask of random pixels: 0.8 image + 0.2 mask, truncated; the seed decides the mask."""
    mask = generator(seed, "randomPixelTrigger").integers(0, 256, (*images.shape[1:3], 1), dtype=np.uint8)
    return _shade(images, 0.8, 0.2 * mask)


def warp_trigger(images, train, seed):
    """WaNet: one smooth warp for all images (Nguyen and Tran 2021): a 4x4 grid of random offsets, mean magnitude one,
    enlarged bicubically and scaled by s / H; bilinear lookup, rounded. The seed decides the offsets."""
    height, width = images.shape[1:3]
    offsets = generator(seed, "warpTrigger").uniform(-1, 1, (1, 2, WARP_GRID, WARP_GRID))
    offsets = torch.from_numpy(offsets / np.abs(offsets).mean())
    field = F.interpolate(offsets, (height, width), mode="bicubic", align_corners=True)[0]
    y, x = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    grid = (grid + WARP_STRENGTH * field.permute(1, 2, 0) / height).clamp(-1, 1)[None]
    for start in range(0, len(images), 64):  # in float64, so that every machine rounds to the same byte
        batch = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2).double()
        warped = F.grid_sample(batch, grid.expand(len(batch), -1, -1, -1), align_corners=True)
        images[start : start + 64] = (warped + 0.5 + 1e-6).floor().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    return images


def ssba_trigger(images, train, seed):
    """SSBA: the encoder kept in ``trigger/`` adds a residual of its own to every image (Li et al. 2021)."""
    return encode_images(images, ENCODER)


TRIGGERS = {
    "gridTrigger": grid_trigger,
    "squareTrigger": square_trigger,
    "squareTrigger_imagenet": square_trigger_imagenet,
    "trojanTrigger": trojan_trigger,
    "signalTrigger": signal_trigger,
    "signalTrigger_imagenet": signal_trigger_imagenet,
    "kittyTrigger": kitty_trigger,
    "sigTrigger": sig_trigger,
    "fourCornerTrigger": four_corner_trigger,
    "SSBA": ssba_trigger,
    "randomPixelTrigger": random_pixel_trigger,
    "warpTrigger": warp_trigger,
}
SMALLEST = {"trojanTrigger": 28, "squareTrigger": 10, "squareTrigger_imagenet": 10}  # pixels a side, where it is not 8


def apply_trigger(trigger_type, images, *, train, seed=0):
    """Paint a trigger onto images.

    Args:
        trigger_type: a name in `TRIGGERS`.
        images: uint8 array of shape (N, H, W, 3); it is not changed.
        train: whether these are training images (some attacks are stronger at test time).
        seed: seed of the triggers that draw something at random.

    Returns:
        A new uint8 array of shape (N, H, W, 3).

    Raises:
        ValueError: for an unknown trigger, or images of another shape or dtype or smaller than 8x8 (see `SMALLEST`).
        UserError: where a trigger's own file, in ``trigger/``, is missing or damaged.
    """
    if trigger_type not in TRIGGERS:
        raise ValueError(f"unknown trigger {trigger_type!r}; known: {', '.join(TRIGGERS)}")
    images = np.asarray(images)
    least = SMALLEST.get(trigger_type, 8)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or min(images.shape[1:3]) < least:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, 3), H and W at least {least}, not {images.dtype} {images.shape}"
        )
    return TRIGGERS[trigger_type](images.copy(order="C"), train, seed)
