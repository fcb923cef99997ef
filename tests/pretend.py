"""A device that is not there: tensors which say that they live on torch's ``meta`` device, and hold their values beside.

Every operation on them is done on the CPU with what they hold, unless a tensor that stayed on the CPU takes part, as no GPU would
allow either. So a whole step can be run as on a GPU, and must give what it gives on the CPU.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LACKS = set()  # dtypes that the device has not
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}  # may have one foot on either side


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; ``held``: its values, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, held):
        assert held.dtype not in LACKS, f"{held.dtype} on a device that has none"
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _do(function, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """While entered, what is made on or moved to ``meta`` is an `Elsewhere`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _do(function, args, kwargs or {})


class _FromValues(TorchFunctionMode):
    """`torch.tensor` of numbers, which otherwise would forget them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def _do(function, args, kwargs):
    """One operation of torch, on either device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    device = kwargs.get("device")
    if not there and (device is None or torch.device(device).type != "meta"):
        return function(*args, **kwargs)
    stayed = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    if there and kwargs.get("dtype") in LACKS:
        raise AssertionError(f"{function} makes {kwargs['dtype']} of what lies on a device that has none")
    if there and stayed and function not in MOVES:
        raise AssertionError(f"{function} has tensors on two devices: {[tuple(tensor.shape) for tensor in tensors]}")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    back = {id(tensor.held): tensor for tensor in there}
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if device is not None and torch.device(device).type == "cpu":
        return result
    if function is torch.ops.aten.copy_.default and not isinstance(args[0], Elsewhere):
        return result
    return tree_map(lambda leaf: _there(leaf, back), result)


def _there(leaf, back):
    """A result on the device; what was changed in place stays the tensor it was."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return back[id(leaf)] if id(leaf) in back else Elsewhere(leaf)


def _held(leaf):
    return leaf.held if isinstance(leaf, Elsewhere) else leaf


def allow_meta(monkeypatch):
    """Let ``--device meta`` be a device of the scripts; without autocast, which torch has not for it."""
    autocast, known = torch.autocast, torch.amp.is_autocast_available

    def cast(kind, *more, **named):
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *more, **named)

    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: kind == "meta" or known(kind))
    monkeypatch.setattr(torch, "autocast", cast)


@contextlib.contextmanager
def pretended(monkeypatch):
    """While entered, ``--device meta`` is a device that computes."""
    allow_meta(monkeypatch)
    with _FromValues(), Pretending():
        yield
