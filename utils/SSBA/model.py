"""Encoder and decoder that hide bits in an image (StegaStamp, Tancik et al. 2020, section 3; SSBA, Li et al. 2021).

Both work at one size, `SIZE`; `utils.SSBA.encode_image` carries the residual over to images of another. The secret
lies on a grid over the image, where StegaStamp spreads it by a dense layer: so every bit is learnt at once and a CPU
trains the networks in minutes.
"""

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 32  # pixels a side
GRID = 10  # bits a side
BITS = GRID * GRID
REACH = 0.25  # largest residual, as a share of the range of a pixel


def _convolution(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """U-Net that looks at an image and a secret and gives the residual that hides the one in the other.

    ``forward`` maps float images (N, 3, SIZE, SIZE) in [0, 1] and float bits (N, BITS) of 0 and 1 to a residual, float
    (N, 3, SIZE, SIZE) within +-`REACH`.
    """

    def __init__(self, width=16):
        super().__init__()
        self.down1 = _convolution(4, width)
        self.down2 = _convolution(width, 2 * width, stride=2)
        self.down3 = _convolution(2 * width, 4 * width, stride=2)
        self.up3 = _convolution(4 * width, 2 * width)
        self.join2 = _convolution(4 * width, 2 * width)
        self.up2 = _convolution(2 * width, width)
        self.join1 = _convolution(2 * width + 4, 2 * width)
        self.residual = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, images, bits):
        secret = F.interpolate((2 * bits - 1).view(-1, 1, GRID, GRID), (SIZE, SIZE))
        inputs = torch.cat([2 * images - 1, secret], 1)
        whole = self.down1(inputs)
        half = self.down2(whole)
        x = self.up3(F.interpolate(self.down3(half), scale_factor=2))
        x = self.up2(F.interpolate(self.join2(torch.cat([half, x], 1)), scale_factor=2))
        return REACH * torch.tanh(self.residual(self.join1(torch.cat([whole, x, inputs], 1))))


class Decoder(nn.Module):
    """Reads the secret: maps float images (N, 3, SIZE, SIZE) in [0, 1] to logits of the bits, float (N, BITS)."""

    def __init__(self, width=32):
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, width), _convolution(width, width), _convolution(width, width), _convolution(width, width)
        )
        self.bits = nn.Conv2d(width, 1, 1)

    def forward(self, images):
        pooled = F.adaptive_avg_pool2d(self.features(2 * images - 1), GRID)
        return self.bits(pooled).flatten(1)
