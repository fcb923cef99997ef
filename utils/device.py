"""Device, precision and memory layout, chosen once per script."""

import ctypes
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import UserError, at_exit, first_line, is_lack_of_memory

PRECISIONS = ("auto", "float32", "bfloat16")


def cores(quota=Path("/sys/fs/cgroup/cpu.max")):
    """How many processor cores this process may use; in a container that can be fewer than the machine has. ``quota``: the file in
    which Linux says how much of them (cgroups, version 2)."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = map(int, quota.read_text().split())
        return min(seen, max(1, math.ceil(share / period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return seen


@dataclass(frozen=True)
class Runtime:
    """Where and how a network runs: a torch device, the dtype of autocast (float32 means no autocast), and how many
    processes decode the images of a data set that is streamed from disk."""

    device: torch.device
    dtype: torch.dtype
    workers: int = 0

    def place(self, model):
        """The model on the device, its weights in channels_last, which convolutions prefer on CPUs and CUDA."""
        layout = torch.preserve_format if self.device.type == "mps" else torch.channels_last
        return model.to(self.device, memory_format=layout)

    def sgd(self, parameters, lr, weight_decay):
        """SGD with momentum 0.9, on CUDA in one kernel for all weights."""
        fused = True if self.device.type == "cuda" else None
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=fused)

    def autocast(self):
        """Context manager for the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def precision(self):
        """The dtype as ``--precision`` names it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def record(self):
        """What a record says of it: dict of the kind of device and the precision."""
        return {"device": self.device.type, "precision": self.precision}

    def __str__(self):
        return f"{self.device}, {self.precision}"


def choose_runtime(device="auto", precision="auto", workers=0, deterministic=False):
    """Turn the options ``--device``, ``--precision``, ``--workers`` and ``--deterministic`` into a `Runtime`.

    Args:
        device: auto (cuda, else mps, else cpu) or any name torch knows, such as cpu or cuda:1.
        precision: auto (bfloat16 where the hardware computes in it, else float32), float32 or bfloat16.
        workers: processes that decode streamed images; 0: this one.
        deterministic: whether torch is told to use deterministic algorithms until the script ends.

    Raises:
        UserError: for a device this machine has not.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
        found = torch.zeros(1, device=place).device
        if found.type == "cuda":  # what names no device, such as recording a graph, would use the first GPU beside it
            torch.cuda.set_device(found)
        if not torch.amp.is_autocast_available(place.type):
            raise RuntimeError("it has no autocast")
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        first = first_line(error).partition(". ")[0]  # torch goes on with all the devices it knows
        if is_lack_of_memory(error):
            then = "wait until it is free, or give another --device, such as cpu"
        elif device in ("cuda", "mps"):  # auto may take the same
            then = "--device cpu computes on the processor"
        else:
            then = "--device auto takes what there is"
        raise UserError(f"--device {device} cannot be used here ({first}); {then}") from None
    torch.backends.cudnn.allow_tf32 = False  # cuDNN would round float32 to 10 bits, and FCT depend on the device
    if place.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())  # torch does not see a container's share; more threads wait for each other
    if deterministic:
        _be_deterministic(place)
    if precision == "auto":
        precision = "bfloat16" if _computes_bfloat16(place) else "float32"
    return Runtime(place, getattr(torch, precision), workers)


def send(values, device):
    """A tensor in the process's memory, on ``device``. CUDA does not wait for it: a plain ``to`` lets all work that is queued
    there finish first, in every batch."""
    pinned = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=pinned)


def exact_device(device):
    """Where float64 is computed for what lives on ``device``: there, or on the CPU where it has none (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


def _be_deterministic(place):
    """Deterministic algorithms, until the script ends; says what remains."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first matrix product runs
    torch.use_deterministic_algorithms(True, warn_only=place.type != "cpu")
    torch.backends.cudnn.benchmark = False
    at_exit.callback(torch.use_deterministic_algorithms, before[0])
    at_exit.callback(setattr, torch.backends.cudnn, "benchmark", before[1])
    threads = torch.get_num_threads()
    remains = {
        "cpu": f"equal bits on this processor with {threads} threads and this version of torch; others round otherwise",
        "cuda": "what has no deterministic algorithm on CUDA is named in a warning; another model of GPU, or version of "
        "torch, CUDA or cuDNN, rounds otherwise",
    }
    print(f"Deterministic: {remains.get(place.type, 'as far as this device has such algorithms')}")


def _computes_bfloat16(device):
    """Whether the hardware has bfloat16 arithmetic; emulated, it is slower than float32 by a factor of ten."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return False


def keep_freed_memory():
    """Tell glibc to reuse freed memory: a training step otherwise maps and clears the same pages anew (measured at 32x32: 9 %).
    The process grows by some 100 MB over the first minutes, as what is kept fragments."""
    _mallopt(1 << 30)


def give_freed_memory_back():
    """The opposite, for what must not grow: whatever is freed of the size of a layer's output goes back to the system at once.
    By itself glibc does so from 32 MB on, and what is smaller fragments (measured: 400 MB over 20 000 images of 72x72
    pixels, and 15 % of the time of FCT gained)."""
    _mallopt(4 << 20)


def _mallopt(threshold):
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, threshold)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, threshold)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            pass  # another libc, which has its own ways
