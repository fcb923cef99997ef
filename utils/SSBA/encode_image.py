"""Hide the secret of a trained encoder in images of any size, and read it from them."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from utils.errors import UserError
from utils.files import load_tensors
from utils.paths import ROOT, shown
from utils.SSBA.model import BITS, SIZE, Decoder, Encoder
from utils.weights import load_weights

ENCODER = ROOT / "trigger/ssba_encoder.pt"
COMMAND = "python tools/train_ssba.py --dataset fashion cifar10"
BATCH = 16  # small enough for the cache: three times as fast in float64 as 128


def encode_images(images, path=ENCODER):
    """Add to every image the residual that hides the encoder's fixed secret.

    Images of another size than the encoder's are shrunk for it to look at, and its residual is enlarged (both
    bilinear). Computed in float64 on the CPU, so that every machine rounds to the same bytes.

    Args:
        images: uint8 (N, H, W, 3), untouched; path: file that ``tools/train_ssba.py`` wrote.

    Returns:
        A new uint8 array (N, H, W, 3).

    Raises:
        UserError: where the file is missing, damaged or not an encoder.
    """
    encoder, _, secret = load_networks(path, path.stat().st_mtime_ns if path.is_file() else 0)
    result = np.empty_like(images)
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = as_floats(images[start : start + BATCH])
            residual = encoder(_resize(batch, (SIZE, SIZE)), secret.expand(len(batch), -1))
            changed = (255 * (batch + _resize(residual, batch.shape[2:]))).round().clamp(0, 255)
            result[start : start + BATCH] = changed.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result


def decode_images(images, path=ENCODER):
    """The bits that the decoder reads in uint8 images (N, H, W, 3), and the secret: bool (N, BITS) and (BITS,).

    Raises:
        UserError: where the file is missing, damaged or not an encoder.
    """
    _, decoder, secret = load_networks(path, path.stat().st_mtime_ns if path.is_file() else 0)
    with torch.inference_mode():
        parts = [
            decoder(_resize(as_floats(images[start : start + BATCH]), (SIZE, SIZE))) > 0
            for start in range(0, len(images), BATCH)
        ]
    return torch.cat(parts).numpy(), secret[0].bool().numpy()


def as_floats(images):
    """uint8 (N, H, W, 3) -> float64 tensor (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255


def _resize(images, size):
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


@lru_cache(maxsize=2)
def load_networks(path, changed=0):
    """(encoder, decoder, secret float64 (1, BITS)) of a file; ``changed`` (its time) makes a replaced file count."""
    content = load_tensors(path, COMMAND, "SSBA encoder")
    encoder, decoder = Encoder(), Decoder()
    secret = content.get("secret") if isinstance(content, dict) else None
    if not _is_secret(secret) or not {"encoder", "decoder"} <= content.keys():
        raise UserError(f"{shown(path)} is no SSBA encoder: it lacks a secret of {BITS} bits. Make it with: {COMMAND}")
    load_weights(encoder, content["encoder"], path)
    load_weights(decoder, content["decoder"], path)
    secret = secret.double()[None]
    return encoder.double().eval(), decoder.double().eval(), secret


def _is_secret(value):
    """Whether a value from a file is a dense tensor (BITS,) of zeros and ones."""
    if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided or value.is_quantized:
        return False
    return value.shape == (BITS,) and bool(((value == 0) | (value == 1)).all())
