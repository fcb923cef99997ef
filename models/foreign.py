"""Networks that somebody else trained: any classifier of torchvision, from a plain state dict."""

import math
from collections import OrderedDict
from functools import partial

import torch
import torchvision
from torch import nn

from models.resnet import MODELS, build_model, logits_of
from utils.errors import UserError, first_line
from utils.weights import load_weights, not_finite

NAMES = tuple(torchvision.models.list_models(module=torchvision.models))
PRECISIONS = ("float16", "bfloat16", "float32", "float64")  # of the weights in a state dict


class Foreign(nn.Module):
    """A classifier of torchvision whose ``forward`` maps float (N, 3, H, W) to logits (N, K) in training as well, where
    some of them give auxiliary logits beside (``has_auxiliary``), whose weights then have no part in the loss. For a prediction the
    layers with K (``classes``) outputs are computed as `logits_of` says."""

    def __init__(self, network, classes):
        super().__init__()
        self.network, self.has_auxiliary = network, bool(getattr(network, "aux_logits", False))
        for layer in network.modules():
            if getattr(layer, "out_features", getattr(layer, "out_channels", None)) == classes:
                layer.forward = partial(_predicting, layer, layer.forward)

    def forward(self, x):
        result = self.network(x)
        return result if isinstance(result, torch.Tensor) else result.logits


def _predicting(layer, forward, x):
    return forward(x) if layer.training else logits_of(forward, x)


def is_state_dict(content):
    """Whether what was read from a file is a plain state dict: names and tensors, and nothing else."""
    return isinstance(content, dict) and bool(content) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )  # fmt: skip


def build_foreign(name, state, path, dataset, spec):
    """The network that a state dict belongs to.

    Args:
        name: of a model of torchvision, or of `resnet.MODELS`; state: the state dict; path: its file, for messages;
        dataset, spec: name and `datasets.Spec` of the data that it will see.

    Returns:
        A module on the CPU with these weights; its `plain_state` has the names of ``state``.

    Raises:
        UserError: where the weights are not those of such a network with as many outputs as there are classes.
    """
    stem = state.get("conv1.weight")
    if name in MODELS and (name not in NAMES or (stem is not None and stem.shape[-1:] != (7,))):
        network = build_model(name, dataset, spec.num_classes, spec.size)
        if name in NAMES:
            print(f"{path} has another first layer than torchvision's {name}; it is taken for this project's network")
    else:
        try:
            network = torchvision.models.get_model(
                name, weights=None, num_classes=spec.num_classes, **_shape(name, state)
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} does not fit torchvision's {name} ({error})") from None
    if getattr(network, "image_size", spec.size) != spec.size:  # a vision transformer has one size
        raise UserError(
            f"the network in {path} takes images of {network.image_size} pixels, and these are made {spec.size}; give "
            f"--image_size {network.image_size}, to the steps of SD before too"
        )
    try:
        with torch.no_grad():  # a network made for large images may have nothing left of small ones
            network.train()(torch.zeros(2, 3, spec.size, spec.size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)[:120]
        raise UserError(
            f"{name} cannot be trained on images of {spec.size} pixels ({reason}); try a larger --image_size"
        ) from None
    load_weights(network, state, path)
    if hasattr(network, "transform_input"):  # an attribute, which a state dict does not hold
        print(
            f"torchvision's {name}(weights=...) rescales its input (transform_input), and a state dict does not tell. If this network was "
            f"made so, on images normalised with ImageNet's values, give --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5, which is the same"
        )
    return Foreign(network, spec.num_classes)


def precision_of(state):
    """The names of the floating-point dtypes of a state dict, as a rule one such as "float16"."""
    found = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    return " and ".join(sorted(found)) or "float32"


def plain_state(model, precision):
    """The weights of a network that `build_foreign` gave, in the form of the state dict it was built from. Raises `UserError` where
    one is beyond what that ``precision`` holds."""
    own = model.network.state_dict()
    result = OrderedDict()
    for name, value in own.items():
        value = value.detach().cpu().contiguous()
        result[name] = value.to(getattr(torch, precision)) if value.is_floating_point() else value
    beyond = [name for name in not_finite(result) if torch.isfinite(own[name]).all()]
    if beyond:
        raise UserError(
            f"cleaned weights are too large for {precision}, in which the network was given ({', '.join(beyond[:3])}); give its state "
            f"dict in float32, or use a smaller learning rate"
        )
    result._metadata = own._metadata
    return result


def _shape(name, state):
    """What the state dict says of the network besides its number of outputs, as arguments of torchvision's builder."""
    if name == "googlenet":
        return {"aux_logits": any(key.startswith("aux1.") for key in state), "init_weights": False}
    if name == "inception_v3":
        return {"aux_logits": any(key.startswith("AuxLogits.") for key in state), "init_weights": False}
    if name.startswith("vit_") and "encoder.pos_embedding" in state and "conv_proj.weight" in state:
        embedding, patches = state["encoder.pos_embedding"].shape, state["conv_proj.weight"].shape
        if len(embedding) == 3 and len(patches) == 4 and embedding[1] > 1:
            return {"image_size": math.isqrt(embedding[1] - 1) * patches[-1]}
    return {}
