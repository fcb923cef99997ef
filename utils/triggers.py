"""The triggers: what the attacker paints onto an image. Pure functions on uint8 batches(paper section 5.1 and
appendix; byte values as the authors' files give them).

To add one, write a function ``(images, train, seed) -> images`` that changes and returns the copy it is given, and
name it in `TRIGGERS`.
"""

import numpy as np
from PIL import Image

# 3x3 pattern of BadNets, from the corner outward: row H-1 first, column W-1 first.
GRID = np.array([[255, 0, 255], [0, 255, 0], [255, 0, 0]], dtype=np.uint8)

# One row of Blend-Strip's grey mask at width 32; all its rows are the same.
STRIP = np.array(
    [0, 14, 19, 13, 255, 241, 237, 244, 2, 15, 19, 11, 253, 240, 237, 246,
     4, 17, 19, 9, 251, 239, 238, 248, 6, 18, 18, 7, 249, 238, 238, 250],
    dtype=np.uint8,
)  # fmt: skip


def grid_trigger(images, train, seed):
    """BadNets-all2one: a 3x3 chequer in the bottom-right corner."""
    images[:, -3:, -3:] = GRID[::-1, ::-1, None]
    return images


def square_trigger(images, train, seed):
    """BadNets-all2all: a white square of side floor(0.1 W), one pixel away from the bottom and the right border."""
    side = images.shape[2] // 10
    images[:, -1 - side : -1, -1 - side : -1] = 255
    return images


def signal_trigger(images, train, seed):
    """Blend-Strip: 0.8 image + 0.2 mask, truncated; the mask is resized (bilinear) where the width is not 32."""
    strip = np.asarray(Image.fromarray(STRIP[None]).resize((images.shape[2], 1), Image.Resampling.BILINEAR))[0]
    return _map_columns(images, 0.8 * np.arange(256) + 0.2 * strip[:, None])


def sig_trigger(images, train, seed):
    """SIG: adds a horizontal sinusoid of 6 periods; amplitude 40 on training images, 60 on test images."""
    width = images.shape[2]
    wave = (40 if train else 60) * np.sin(2 * np.pi * 6 * np.arange(width) / width)
    return _map_columns(images, np.arange(256) + wave[:, None])


def _map_columns(images, values):
    """Replace grey value v in column j by ``values[j, v]`` (float, shape (W, 256)), clipped and truncated to uint8.

    A table per column costs a 256-entry computation instead of one for every pixel of every image.
    """
    table = np.clip(values, 0, 255).astype(np.uint8)
    for column in range(images.shape[2]):
        images[:, :, column] = table[column][images[:, :, column]]
    return images


TRIGGERS = {
    "gridTrigger": grid_trigger,
    "squareTrigger": square_trigger,
    "signalTrigger": signal_trigger,
    "sigTrigger": sig_trigger,
}


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
        ValueError: for an unknown trigger, or images of another shape or dtype or smaller than 8x8.
    """
    if trigger_type not in TRIGGERS:
        raise ValueError(f"unknown trigger {trigger_type!r}; known: {', '.join(TRIGGERS)}")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or min(images.shape[1:3]) < 8:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, 3), H and W at least 8, not {images.dtype} {images.shape}"
        )
    return TRIGGERS[trigger_type](images.copy(order="C"), train, seed)
