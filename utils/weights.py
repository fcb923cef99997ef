"""Weights from a file into a network, checked first."""

from collections import OrderedDict

import torch

from utils.errors import UserError


def load_weights(module, state, path):
    """Load a state dict into ``module``. Batch norm's counters, which files of older versions of torch lack, stay the module's.

    Raises:
        UserError: that names the first keys which are missing, foreign, of another shape or kind, or not finite.
    """
    own = module.state_dict()
    state = state if isinstance(state, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tensors |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    odd = [name for name, value in tensors.items() if value.is_meta or value.layout != torch.strided]
    both = [name for name in own if name in tensors and name not in odd]
    faults = {
        "lack": [name for name in own if name not in tensors],
        "hold the foreign": [str(name) for name in state if name not in own],
        "have no dense values in": odd,
        "have another shape in": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in both
            if tensors[name].shape != own[name].shape
        ],
        "have another kind of number in": [
            f"{name} {tensors[name].dtype}, not {own[name].dtype}"
            for name in both
            if tensors[name].is_floating_point() != own[name].is_floating_point() or tensors[name].is_complex()
        ],
        "are not finite in": not_finite({name: tensors[name] for name in both}),
    }
    found = [f"{what} {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for what, names in faults.items() if names]
    if found:
        raise UserError(f"the weights in {path} do not fit this network: they {'; they '.join(found)}"[:600])
    whole = OrderedDict(tensors)  # with the versions of the layers, which a few of torchvision's networks ask for
    whole._metadata = getattr(state, "_metadata", None) or own._metadata
    module.load_state_dict(whole)


def not_finite(state):
    """Names of the tensors in a state dict that hold an infinity or no number."""
    return [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
