"""Image transforms on whole batches, every sample with parameters of its own.

A transform has two halves: ``draw(rng, count)`` draws the parameters of ``count`` samples on the CPU, row i for sample
i, and ``apply(images, parameters)`` uses them on a batch. So what happens to a sample depends on the generator, the
sample's index and how many samples there are, not on the batch it falls into or on the device. Parameters are dicts of
tensors on the CPU whose first dimension counts samples; images are uint8 tensors (B, C, H, W) on any device. What is worked
out for every pixel is worked out there, of tau and `CropFlip` in whole numbers or float64 and step by step, so that every device
finds the same; of `ContrastiveView` in float32, which devices round differently.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import rgb_to_grayscale

from utils.device import exact_device, send


def take_pixels(images, rows, columns):
    """Nearest-pixel lookup: output pixel (i, j) of sample b is input pixel (rows[b, i, j], columns[b, i, j]).

    Args:
        images: (B, C, H, W), any dtype.
        rows, columns: int64, broadcastable to (B, H, W); what lies outside the image becomes 0.

    Returns:
        A tensor like ``images``.
    """
    batch, channels, height, width = images.shape
    rows, columns = torch.broadcast_tensors(rows, columns)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    pixels = height * width  # in figures, for a process may have no image of a batch
    flat, inside = (part.to(images.device).reshape(batch, 1, pixels) for part in (flat, inside))
    taken = images.reshape(batch, channels, pixels).gather(2, flat.expand(-1, channels, -1))
    return (taken * inside).view(batch, channels, height, width)


def shift(images, down, right, flip=None):
    """Shift by whole pixels, zero fill; then mirror left-right where ``flip`` (bool (B,)) says so.

    ``down`` and ``right`` are int64 (B,).
    """
    height, width = images.shape[2:]
    device = images.device
    columns = torch.arange(width, device=device).expand(len(images), width)
    if flip is not None:
        columns = torch.where(send(flip, device)[:, None], columns.flip(1), columns)
    rows = torch.arange(height, device=device) - send(down, device)[:, None]
    return take_pixels(images, rows[:, :, None], (columns - send(right, device)[:, None])[:, None, :])


def rotate(images, degrees):
    """Rotate counter-clockwise about the centre by ``degrees`` (float64 (B,)), nearest pixel, zero fill.

    The source pixel is found in float64, sine and cosine on the CPU, so that the same pixel is taken on every device.
    """
    height, width = images.shape[2:]
    device = exact_device(images.device)
    angle = torch.deg2rad(degrees.double())[:, None, None]
    sin, cos = send(angle.sin(), device), send(angle.cos(), device)
    y = (torch.arange(height, dtype=torch.float64, device=device) + 0.5 - height / 2)[:, None]
    x = torch.arange(width, dtype=torch.float64, device=device) + 0.5 - width / 2
    rows = torch.floor(sin * x + cos * y + height / 2).long()
    columns = torch.floor(cos * x - sin * y + width / 2).long()
    return take_pixels(images, rows, columns)


def gaussian_blur(images, sigma, kernel_size=15):
    """Gaussian blur with one ``sigma`` (float (B,), pixels) a sample, reflected at the border; uint8 in and out."""
    half, place = kernel_size // 2, exact_device(images.device)
    offsets = torch.arange(-half, half + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None].double()) ** 2)
    kernel = send(kernel / kernel.sum(1, keepdim=True), place)[:, :, None, None, None]
    x = F.pad(images.to(place).double(), [half] * 4, mode="reflect")  # moved first: mps has no float64 to send
    for axis in (3, 2):  # a sum of shifted images: convolutions round differently from device to device
        side = images.shape[axis]
        x = sum(kernel[:, i] * x.narrow(axis, i, side) for i in range(kernel_size))
    return (x + 0.5 + 1e-6).floor().clamp(0, 255).to(torch.uint8).to(images.device)


def shrink(images):
    """The image at three quarters of its side (bilinear, antialiased), mirrored at its edges to fill the frame; uint8.

    At 32 pixels: 24, and 4 on each side. Left, right, top and bottom stay what they are.
    """
    side, margin = images.shape[2], images.shape[2] // 8
    exact = images.to(exact_device(images.device)).double()
    small = F.interpolate(exact, size=[side - 2 * margin] * 2, mode="bilinear", antialias=True, align_corners=False)
    # At 32 pixels one value in forty lies halfway between two levels: up, by more than what devices round differently.
    small = (small + 0.5 + 1e-6).floor().clamp(0, 255).to(torch.uint8)
    return F.pad(small, [margin] * 4, mode="reflect").to(images.device)


def erase(images, top, left, height, width):
    """Set one rectangle a sample to 0; the four are int64 (B,), in pixels."""
    device = images.device
    rows, columns = (torch.arange(side, device=device) for side in images.shape[2:])
    rows = rows[:, None]
    top, left, height, width = (send(value, device)[:, None, None] for value in (top, left, height, width))
    hole = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return images * ~hole[:, None]


def resized_crop(images, top, left, height, width):
    """Cut one rectangle a sample and enlarge it to the image's size, bilinear.

    Args:
        images: uint8 (B, C, H, W).
        top, left, height, width: int64 (B,), in pixels, inside the image.

    Returns:
        float32 (B, C, H, W) in [0, 1]. Both directions are products with an interpolation matrix a sample.
    """
    device = exact_device(images.device)
    down = _interpolation(top, height, images.shape[2], device).to(images.device)
    across = _interpolation(left, width, images.shape[3], device).to(images.device)
    return down[:, None] @ (images.float() / 255) @ across[:, None].mT


def _interpolation(start, length, size, device):
    """Matrices float32 (B, size, size) that stretch pixels start .. start+length-1 of a line to its whole size."""
    scale = send(length / size, device)[:, None]  # a division, which devices round differently
    start, length = (send(value, device)[:, None] for value in (start, length))
    centre = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * scale - 0.5
    centre = torch.minimum(centre.clamp(min=0), length - 1.0)
    low = centre.floor().long()
    high = torch.minimum(low + 1, length - 1)
    weight = centre - low
    matrix = torch.zeros(len(start), size, size, dtype=torch.float64, device=device)
    matrix.scatter_add_(2, (start + low)[..., None], (1 - weight)[..., None])
    matrix.scatter_add_(2, (start + high)[..., None], weight[..., None])
    return matrix.float()


def adjust_brightness(images, factor):
    """Scale float images (B, 3, H, W) in [0, 1] by ``factor`` (B,), clamped."""
    return _blend(images, torch.zeros_like(images), factor)


def adjust_contrast(images, factor):
    """Blend each float image with the mean of its grey version by ``factor`` (B,)."""
    # In float64, which mps has not: in float32 the sum of a large image depends on the number of threads, and so on --workers.
    exact = torch.float32 if images.device.type == "mps" else torch.float64
    mean = rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True, dtype=exact)
    return _blend(images, mean.to(images.dtype), factor)


def adjust_saturation(images, factor):
    """Blend each float image with its grey version by ``factor`` (B,)."""
    return _blend(images, rgb_to_grayscale(images), factor)


def adjust_hue(images, turns):
    """Turn the hue of float images (B, 3, H, W) in [0, 1] by ``turns`` (B,), in turns of the colour wheel; of the same shape. By the
    hexagonal model of HSV, as torchvision's ``adjust_hue``, but in one step."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turns[:, None, None]
    place = torch.remainder(torch.stack([5 + sixths, 3 + sixths, 1 + sixths], 1), 6)
    return value[:, None] - chroma[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)


def _blend(images, other, factor):
    factor = factor[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp(0, 1)


class CropFlip:
    """Random crop after zero padding, horizontal flip, and a rotation for the data sets that have one: the
    augmentation of BR (paper appendix). uint8 in, uint8 out.

    Parameters: int64 ``down`` and ``right``, bool ``flip``, and with a rotation float64 ``degrees``, each (count,).
    """

    def __init__(self, padding=4, flip=True, rotation=0):
        self.padding, self.flip, self.rotation = padding, flip, rotation

    @classmethod
    def of(cls, spec):
        """The usual augmentation of a data set (`datasets.Spec`)."""
        return cls(spec.padding, spec.flip, spec.rotation)

    def draw(self, rng, count):
        parameters = {
            "down": rng.integers(-self.padding, self.padding + 1, count),
            "right": rng.integers(-self.padding, self.padding + 1, count),
            "flip": rng.random(count) < (0.5 if self.flip else 0),
        }
        if self.rotation:
            parameters["degrees"] = rng.uniform(-self.rotation, self.rotation, count)
        return {name: torch.from_numpy(value) for name, value in parameters.items()}

    def apply(self, images, parameters):
        images = shift(images, parameters["down"], parameters["right"], parameters["flip"])
        return rotate(images, parameters["degrees"]) if self.rotation else images


class ContrastiveView:
    """One view of contrastive learning: resized crop (scale 0.2-1, ratio 3/4-4/3), flip, colour jitter 0.4 0.4 0.4 0.1
    with p 0.8, grey with p 0.2 (Khosla et al. 2020; the defaults of SupContrast's main_supcon.py). uint8 in, float32 in [0, 1] out.
    ``size``: side of the images; ``flip``: whether views are mirrored at all.

    Parameters: int64 ``top``, ``left``, ``height``, ``width``, bool ``flip``, ``jitter``, ``grey``, each (count,); int64 ``order`` of the
    four jitters and their float32 ``factors``, (count, 4).
    """

    def __init__(self, size, flip=True):
        self.size, self.flip = size, flip

    def draw(self, rng, count):
        boxes = _draw_boxes(rng, count, self.size, (0.2, 1.0), (3 / 4, 4 / 3))
        factors = rng.uniform(0.6, 1.4, (count, 3))
        parameters = {
            **boxes,
            "flip": (rng.random(count) < 0.5) & self.flip,
            "jitter": rng.random(count) < 0.8,
            "order": rng.random((count, 4)).argsort(1),
            "factors": np.column_stack([factors, rng.uniform(-0.1, 0.1, count)]).astype(np.float32),
            "grey": rng.random(count) < 0.2,
        }
        return {name: torch.from_numpy(value) for name, value in parameters.items()}

    def apply(self, images, parameters):
        device = images.device
        box = (parameters[name] for name in ("top", "left", "height", "width"))
        images = resized_crop(images, *box)
        images = torch.where(send(parameters["flip"], device)[:, None, None, None], images.flip(3), images)
        operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        order = torch.where(parameters["jitter"][:, None], parameters["order"], -1)
        for turn in range(4):
            for number, operation in enumerate(operations):
                chosen = torch.nonzero(order[:, turn] == number).flatten()
                if len(chosen):
                    factor = send(parameters["factors"][chosen, number], device)
                    chosen = send(chosen, device)
                    images[chosen] = operation(images[chosen], factor)
        grey = send(torch.nonzero(parameters["grey"]).flatten(), device)
        images[grey] = rgb_to_grayscale(images[grey], num_output_channels=3)
        return images


def _draw_boxes(rng, count, size, scale, ratio, attempts=10):
    """Rectangles of random area (share of the image) and aspect ratio (width over height): the first of ten attempts
    that fits, else the whole image, as torchvision's RandomResizedCrop draws them. int64 (count,) each, in pixels."""
    area = rng.uniform(*scale, (count, attempts)) * size * size
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (count, attempts)))
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first = fits.argmax(1)[:, None]
    width, height = (
        np.where(fits.any(1), np.take_along_axis(side, first, 1)[:, 0], size).astype(np.int64)
        for side in (width, height)
    )
    top, left = (np.floor(rng.random(count) * (size - side + 1)).astype(np.int64) for side in (height, width))
    return {"top": top, "left": left, "height": height, "width": width}


# The parts of tau. name: (draw, apply). ``draw(rng, count, size)`` gives the parameters of ``count`` images of ``size`` pixels a side
# as a dict of arrays (count,), and is None where nothing is random; ``apply(images, **parameters)`` changes a batch.
PARTS = {
    "rotate": (lambda rng, count, size: {"degrees": rng.uniform(-180, 180, count)}, rotate),
    "affine": (
        lambda rng, count, size: {
            axis: np.rint(rng.uniform(-0.2 * size, 0.2 * size, count)).astype(np.int64) for axis in ("down", "right")
        },
        shift,
    ),
    "flip": (None, lambda images: images.flip(3)),
    "crop": (lambda rng, count, size: {axis: rng.integers(-4, 5, count) for axis in ("down", "right")}, shift),
    "blur": (lambda rng, count, size: {"sigma": rng.uniform(0.1, 2.0, count)}, gaussian_blur),
    # The authors' ratio 0.5-1 is height over width, as RandomErasing counts it; here it is width over height.
    "erase": (lambda rng, count, size: _draw_boxes(rng, count, size, (0.2, 0.3), (1.0, 2.0)), erase),
    "none": (None, lambda images: images),
    "vflip": (None, lambda images: images.flip(2)),
    "shrink": (None, shrink),
}
TAU_NAMES = tuple(PARTS)
DRAWN = {name for name, (draw, _) in PARTS.items() if draw}  # the others change every image alike


class Tau:
    """The transform of FCT: ``trans1`` and then ``trans2``, each one of `TAU_NAMES` (paper section 4.1).

    rotate: uniform angle in +-180 degrees; affine: shift by up to 20 % in each direction; flip: always; crop: shift by
    up to 4 pixels; blur: 15x15, sigma 0.1-2; erase: a black rectangle of 20-30 % of the area; none. Not in the paper:
    vflip, upside down; shrink, see `shrink`. uint8 in, uint8 out; ``size``: side of the images.

    Parameters: those of a part's draw in `PARTS`, their names after ``0.`` and ``1.``.
    """

    BLOCK = 1024

    def __init__(self, trans1, trans2, size):
        self.parts, self.size = [PARTS[trans1], PARTS[trans2]], size
        self.is_random = any(draw for draw, _ in self.parts)

    def draw(self, rng, count):
        """Parameters of samples 0 to ``count`` - 1. Drawn by blocks of fixed size, each from a generator of its own, so
        that what sample i gets does not depend on how many samples there are."""
        blocks = [self._draw_block(child) for child in rng.spawn(-(-count // self.BLOCK))]
        return {name: torch.cat([block[name] for block in blocks])[:count] for name in blocks[0]}

    def _draw_block(self, rng):
        return {
            f"{number}.{name}": torch.from_numpy(value)
            for number, (draw, _) in enumerate(self.parts)
            if draw
            for name, value in draw(rng, self.BLOCK, self.size).items()
        }

    def apply(self, images, parameters):
        for number, (_, apply) in enumerate(self.parts):
            own = {name[2:]: value for name, value in parameters.items() if name.startswith(f"{number}.")}
            images = apply(images, **own)
        return images
