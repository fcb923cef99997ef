"""torchvision's ResNet with its stem exchanged, in three shapes (authors' models):

- ``pool``: 3x3 stem with max-pool (CIFAR-10 in SD and BR),
- ``plain``: 3x3 stem without max-pool (CIFAR-100 in SD and BR, the encoder of ST),
- ``imagenet``: 7x7 stem with max-pool, as torchvision has it, for images of 100 pixels and more.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck


class PreActBlock(BasicBlock):
    """The basic block with normalisation and ReLU before each convolution (He et al. 2016, Identity Mappings in Deep
    Residual Networks, figure 1 b)."""

    def __init__(self, inplanes, planes, stride=1, downsample=None, *more, **named):
        super().__init__(inplanes, planes, stride, downsample, *more, **named)
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.downsample = None if downsample is None else downsample[0]  # the convolution without its normalisation

    def forward(self, x):
        active = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(active)
        return self.conv2(self.relu(self.bn2(self.conv1(active)))) + identity


def _side_by_side(x, kernel, stride):
    """The pixels that each output pixel of a convolution sees, padding of kernel // 2 included: (N, H, W, C) ->
    (N, H', W', kernel * kernel * C), kernel row by row."""
    padding = kernel // 2
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    return torch.cat([x[slices] for slices in _seen_through(kernel, stride, x.shape)], dim=3)


def _seen_through(kernel, stride, padded):
    """Slices of a padded map of shape (N, H, W, C) for each pixel of the kernel: what all output pixels see there."""
    ends = [(side - kernel) // stride * stride + 1 for side in padded[1:3]]
    for row in range(kernel):
        for column in range(kernel):
            yield slice(None), slice(row, row + ends[0], stride), slice(column, column + ends[1], stride)


class SideBySide(torch.autograd.Function):
    """`_side_by_side` with a gradient that is added up in place; autograd's own fills a map for every slice."""

    @staticmethod
    def forward(ctx, x, kernel, stride):
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        return _side_by_side(x, kernel, stride)

    @staticmethod
    def backward(ctx, upstream):
        count, height, width, channels = ctx.shape
        padding = ctx.kernel // 2
        gradient = upstream.new_zeros(count, height + 2 * padding, width + 2 * padding, channels)
        slices = _seen_through(ctx.kernel, ctx.stride, gradient.shape)
        for seen, part in zip(slices, upstream.split(channels, dim=3), strict=True):
            gradient[seen] += part
        return gradient[:, padding : padding + height, padding : padding + width], None, None


class MatrixOf2x2(torch.autograd.Function):
    """Weights (O, 3, 3, C) -> the matrix (4 O, 4 C) that the convolution of a 2x2 map is: what the input pixels weigh in each
    output pixel is the part of the kernel that lies on the map."""

    PARTS = tuple(
        (slice(None), slice(1 - row, 3 - row), slice(1 - column, 3 - column)) for row in (0, 1) for column in (0, 1)
    )

    @staticmethod
    def forward(ctx, weight):
        ctx.shape = weight.shape
        return torch.stack([weight[part] for part in MatrixOf2x2.PARTS]).flatten(0, 1).flatten(1)

    @staticmethod
    def backward(ctx, upstream):
        gradient = upstream.new_zeros(ctx.shape)
        out_channels, _, _, channels = ctx.shape
        for part, of_pixel in zip(MatrixOf2x2.PARTS, upstream.view(4, out_channels, 2, 2, channels), strict=True):
            gradient[part] += of_pixel
        return gradient


class GradientByProduct(torch.autograd.Function):
    """A convolution with padding of kernel // 2 whose weights' gradient is one matrix product."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        with torch.autocast("cpu", enabled=False):  # both are cast already
            return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        out_channels, channels, kernel, _ = weight.shape
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            stride, padding = [ctx.stride] * 2, [kernel // 2] * 2
            of_x, _, _ = torch.ops.aten.convolution_backward(
                upstream, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, (True, False, False)
            )
        if ctx.needs_input_grad[1]:
            seen = _side_by_side(x.permute(0, 2, 3, 1), kernel, ctx.stride).flatten(0, 2)
            of_weight = upstream.permute(0, 2, 3, 1).flatten(0, 2).T @ seen
            of_weight = of_weight.view(out_channels, kernel, kernel, channels).permute(0, 3, 1, 2)
        return of_x, of_weight, None


def _gradients_by_product():
    """The precisions in which `GradientByProduct` is faster than oneDNN on this processor (measured: 1.4 to 2.1 times with AMX,
    up to 1.3 on AVX2; with AVX-512 alone, in either precision, it takes as long or a tenth longer)."""
    faster = set()
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        faster.add(torch.bfloat16)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        faster.add(torch.float32)
    return faster


class SmallMapConv(nn.Conv2d):
    """A convolution, of padding kernel // 2 and without bias, that knows a faster way to results of up to 4x4 pixels on a CPU.
    oneDNN reaches a fraction of its usual speed there: it computes with the padding too, is slow at the gradient of the
    weights, and on AVX2 multiplies for that image by image. In values that differ by rounding alone, they

    - train as one matrix product where a 3x3 kernel makes 2x2 pixels, else with `GradientByProduct` where that is faster;
    - are evaluated in bfloat16 as a convolution of another shape where a 3x3 kernel makes 2x2 pixels, and in float32 in
      contiguous format. As with torch's own convolution, and other than of a product, the last bits are then the same at
      any batch size, but in float32 at one of a few images.
    """

    LEAST = 64  # channels; what narrower ones gain is too little to see
    BY_PRODUCT = _gradients_by_product()
    CONTIGUOUS = torch.backends.cpu.get_cpu_capability() == "AVX512"  # on AVX2 it is slower so
    kept = None  # in evaluation: of which weight, and this as it is convolved with

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        """float (N, C, H, W) -> float (N, out_channels, H', W')."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = ((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in x.shape[2:])
        if x.device.type != "cpu" or height * width > 16:
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        to_2x2 = kernel == 3 and (height, width) == (2, 2) and (stride == 2 or x.shape[2:] == (2, 2))
        if self.training:
            if to_2x2:
                return self._as_map(F.linear(self._rows(x.to(dtype)), self._matrix(self.weight.to(dtype))))
            if dtype in self.BY_PRODUCT:
                return GradientByProduct.apply(x.to(dtype), self.weight.to(dtype), stride)
        elif not (torch.is_grad_enabled() and self.weight.requires_grad):
            if dtype == torch.float32 and self.CONTIGUOUS:
                weight = self._kept(dtype, torch.Tensor.contiguous)
                return F.conv2d(x.contiguous(), weight, stride=stride, padding=self.padding)
            if dtype == torch.bfloat16 and to_2x2 and (stride == 1 or dtype in self.BY_PRODUCT):
                rows, matrix = self._rows(x.to(dtype)), self._kept(dtype, self._matrix)
                # All images' rows as the pixels of one.
                y = F.conv2d(rows[None, :, None].permute(0, 3, 1, 2), matrix[:, :, None, None])
                return self._as_map(y[0, :, :, 0].T)
        return super().forward(x)

    def _rows(self, x):
        """(N, C, H, W) -> what the pixels of the result see, for `_matrix`: (N, 4 C), at stride 2 (4 N, 9 C)."""
        x = x.permute(0, 2, 3, 1)  # as channels_last has it in memory
        # At stride 1 every output pixel sees every input pixel, so nothing of the product is wasted.
        return x.flatten(1) if self.stride[0] == 1 else SideBySide.apply(x, 3, 2).flatten(0, 2)

    def _matrix(self, weight):
        weight = weight.permute(0, 2, 3, 1)
        return MatrixOf2x2.apply(weight) if self.stride[0] == 1 else weight.flatten(1)

    def _as_map(self, y):
        return y.reshape(-1, 2, 2, self.out_channels).permute(0, 3, 1, 2)

    def _kept(self, dtype, change):
        """``change`` of the weight in ``dtype``, made once for as long as the weight stays what it is."""
        state = dtype, self.weight.data_ptr(), self.weight._version
        if self.kept is None or self.kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # it outlives the mode of this call
                self.kept = state, change(self.weight.detach().to(dtype))
        return self.kept[1]


def with_plain_convolutions(model):
    """The same network, changed in place, with torch's own convolution where it has `SmallMapConv`: what that is compared with."""
    for module in model.modules():
        if isinstance(module, SmallMapConv):
            module.__class__ = nn.Conv2d
    return model


# name: (block, blocks per stage, width of the first stage, stem for images below `LARGE`; None: that of the data set)
MODELS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64, None),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64, None),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64, None),
    # Not in the paper: half as wide and deep as resnet18, for a CPU. It pools in every step, the encoder included: without, a
    # contrastive epoch costs about four times as much.
    "resnet10": (BasicBlock, (1, 1, 1, 1), 32, "pool"),
    # Not in the paper: the network of BackdoorBench's leaderboard. It has no max-pool, no normalisation after its first
    # convolution, and as there none after its last block.
    "preactresnet18": (PreActBlock, (2, 2, 2, 2), 64, "plain"),
    # Not in the paper: to resnet10 what that network is to resnet18.
    "preactresnet10": (PreActBlock, (1, 1, 1, 1), 32, "pool"),
    # Not in the paper: resnet10 without its max-pool, three times as slow for two points of ACC.
    "resnet10_nopool": (BasicBlock, (1, 1, 1, 1), 32, "plain"),
    # On CIFAR-10 not the authors': resnet18 as they have it on CIFAR-100 and in ST, without max-pool.
    "resnet18_nopool": (BasicBlock, (2, 2, 2, 2), 64, "plain"),
}

LARGE = 100  # pixels of an image's side, from which on the stem is ImageNet's


class ResNet(torchvision.models.ResNet):
    """A ResNet whose pooled feature e(x) can be asked for (paper section 4.1, the sensitivity metric).

    ``forward`` maps float (N, 3, H, W) to logits (N, num_classes); ``features`` maps it to e(x), float (N, D) with
    D = ``feature_size`` (512 for resnet18).
    """

    def __init__(self, name, num_classes, stem):
        block, layers, width, _ = MODELS[name]
        super().__init__(block, layers, num_classes=num_classes)
        if width != 64:
            self._narrow(block, layers, width)
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, size, stride=stride, padding=size // 2, bias=False)
        if stem == "plain":
            self.maxpool = nn.Identity()
        if block is PreActBlock:
            self.bn1 = self.relu = nn.Identity()
        self.feature_size = 8 * width * block.expansion
        self.fc = nn.Linear(self.feature_size, num_classes)
        for module in self.modules():  # torchvision's own initialisation, for the layers exchanged above
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.in_channels >= SmallMapConv.LEAST:
                    module.__class__ = SmallMapConv  # a new module would draw weights of its own

    def _narrow(self, block, layers, width):
        """Build the stages again with ``width`` channels in the first; torchvision fixes it at 64."""
        self.inplanes = width
        self.bn1 = nn.BatchNorm2d(width)
        for stage, blocks in enumerate(layers):
            layer = self._make_layer(block, width << stage, blocks, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)

    def features(self, x):
        """Pooled features e(x), float (N, feature_size), of images float (N, 3, H, W)."""
        # The same numbers and gradients as with the ReLU first, on a quarter of the pixels.
        x = self.relu(self.maxpool(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def forward(self, x):
        features = self.features(x)
        return self.fc(features) if self.training else logits_of(self.fc, features)


def logits_of(layer, features):
    """Logits (N, K), float32 (of float64 float64), that the last ``layer`` makes of features (N, D), for a prediction, under autocast
    too. Rounded to bfloat16 the two highest of an image are sometimes equal (2 to 7 in a thousand), and `argmax` then
    takes the lower class, which the default target is."""
    with torch.autocast(features.device.type, enabled=False):
        return layer(features.to(torch.promote_types(features.dtype, torch.float32)))


def _stem(name, size, usual):
    """The stem of a network for images of ``size`` pixels a side; ``usual``: of those that have none of their own."""
    return "imagenet" if size >= LARGE else MODELS[name][3] or usual


class SupConResNet(nn.Module):
    """Encoder and two-layer projection head to 128 numbers of length one (Khosla et al. 2020, section 3.1).

    ``forward`` maps float (N, 3, H, W) to float32 (N, 128), under autocast too; ``features`` is for the linear classifier.

    Args:
        name: a name in `MODELS`; size: side of the images in pixels.
    """

    def __init__(self, name, size=32):
        super().__init__()
        self.encoder = ResNet(name, num_classes=1, stem=_stem(name, size, "plain"))
        size = self.encoder.feature_size
        self.encoder.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(inplace=True), nn.Linear(size, 128))

    def features(self, x):
        """Pooled features, float (N, feature_size), of images float (N, 3, H, W)."""
        return self.encoder.features(x)

    def forward(self, x):
        return F.normalize(self.head(self.features(x)).float(), dim=1)  # in bfloat16 their length would be off by 0.4 %


def build_model(name, dataset, num_classes, size=32):
    """A classifier in the shape that SD and BR use for a data set.

    Args:
        name: a name in `MODELS`.
        dataset: name of the data set; CIFAR-100 has no max-pool (paper appendix, authors' models).
        num_classes: number of logits; size: side of the images in pixels.

    Returns:
        A `ResNet` on the CPU, with weights drawn from torch's global generator.
    """
    return ResNet(name, num_classes, _stem(name, size, "plain" if dataset == "cifar100" else "pool"))
