"""One training on several processes, one a GPU, started by torchrun; without torchrun nothing here has an effect.

Every process takes its part of each batch, and what the network gives is gathered, so that every loss is that of the whole
batch whatever its form; batch statistics are of the whole batch too. K processes then give what one gives, but for rounding.
"""

import inspect
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError, at_exit, first_line, processes_wanted


def world():
    """How many processes work on this."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def leads():
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def device_of(name):
    """The device that ``--device`` means in this process: with auto or cuda, the GPU of its number on this machine."""
    if processes_wanted() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return name


def join(device):
    """Meet the other processes that torchrun started, if it did.

    Args:
        device: a torch device; GPUs talk by NCCL, CPUs by Gloo.

    Raises:
        UserError: where they cannot be met.
    """
    if processes_wanted() < 2 or world() > 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # The others wait while the first decodes a large folder; of one that is gone they hear at once.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
        # One that ends at once, by a mistake, must not end while another is still on its way here. NCCL is told the GPU: it would
        # guess it from the rank, and another than this process has where machines have more GPUs than processes.
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"the processes cannot meet ({reason}); start them with torchrun --nproc_per_node=K") from None
    at_exit.callback(dist.destroy_process_group)


@contextmanager
def leader_first():
    """What is within is done by the first process alone, and then by the others, who find what it has left on disk."""
    if not leads():
        dist.barrier()
    yield
    if leads() and world() > 1:
        dist.barrier()


def part(rows):
    """This process's part of ``rows`` (a tensor (N, ...)): the pieces of all, in the order of their ranks, are ``rows``."""
    return rows.tensor_split(world())[rank()]


def gather(own, total):
    """The pieces of all processes, one after the other: (total, ...) from (n, ...), where n is the length that `part` gives
    this process of ``total``. For what follows to be differentiated every process must do the same with the result."""
    return _Gather.apply(own, total) if world() > 1 else own


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, own, total):
        sizes = [len(piece) for piece in torch.arange(total).tensor_split(world())]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        context.first, context.size = sum(sizes[: rank()]), len(own)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(context, gradient):
        # Each process has the gradient of the whole loss; DistributedDataParallel takes their mean, not their sum.
        return gradient[context.first : context.first + context.size] * world(), None


class _Sum(torch.autograd.Function):
    """Sum of a tensor over all processes, and of its gradients."""

    @staticmethod
    def forward(context, value):
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' images, on a CPU; torch's SyncBatchNorm is for GPUs alone."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        across = (0, 2, 3)
        count = _Sum.apply(torch.tensor(float(x.numel() // x.shape[1])))
        shape = (1, -1, 1, 1)
        mean = _Sum.apply(x.float().sum(across)) / count
        centred = x.float() - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(across)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, for a process that has no image of a batch too: under autocast torch sends its statistics in bfloat16, where the
    other processes send theirs in float32."""

    def forward(self, x):
        return super().forward(x) if len(x) else super().forward(x.float()).to(x.dtype)


class _Entry(nn.Module):
    """One forward for the two that the objectives call, so that gradients are shared whichever it is."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, features):
        return self.network.features(inputs) if features else self.network(inputs)


SHARED = {nn.BatchNorm2d: SharedBatchNorm, nn.SyncBatchNorm: SyncBatchNorm}


class Parallel:
    """A network that several processes train. Within `batch` it is called with this process's part and gives the result of
    the whole batch; otherwise, and for everything else, it is the network itself."""

    def __init__(self, network, device, unused):
        if device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        for module in network.modules():
            if type(module) in SHARED:
                module.__class__ = SHARED[type(module)]  # the weights and their names stay
        self.network, self._total, self._views = network, None, 1
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        self._entry = DistributedDataParallel(
            _Entry(network), **{buffers: False}, find_unused_parameters=unused,
            device_ids=[device] if device.type == "cuda" else None,
        )  # fmt: skip

    def batch(self, total, views):
        """Expect a batch of ``total`` samples over all processes, each in so many views; None: no longer."""
        self._total, self._views = total, views

    def _whole(self, inputs, features):
        if self._total is None:
            return self.network.features(inputs) if features else self.network(inputs)
        found = self._entry(inputs, features)
        return torch.cat([gather(view, self._total) for view in found.chunk(self._views)])

    def __call__(self, inputs):
        return self._whole(inputs, False)

    def features(self, inputs):
        return self._whole(inputs, True)

    def __getattr__(self, name):
        return getattr(self.network, name)


def parallel(network, runtime, unused=False):
    """The network as it is trained: itself, or where there are several processes as `Parallel`.

    Args:
        network: on its device; runtime: a `device.Runtime`; unused: whether the loss leaves some weights without a gradient.
    """
    return network if world() == 1 else Parallel(network, runtime.device, unused)
