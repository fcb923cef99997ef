"""torch.compile for the training step: fewer, larger kernels, and on CUDA one launch for all of them (CUDA graphs)."""

import copy
import time

import torch


def compiled(network, setting, runtime, count, size):
    """Compile a network's ``forward`` and ``features`` in place for whole training batches; evaluation, and a smaller last
    batch, go through the network as it is.

    Args:
        network: on its device; setting: auto (on CUDA), on or off; runtime: a `device.Runtime`; count: images of a whole
        batch, all views counted; size: side of an image in pixels.

    Returns:
        The network. Where compiling fails it stays as it was, which is said in one line.
    """
    if setting == "off" or (setting == "auto" and runtime.device.type != "cuda"):
        return network
    started = time.perf_counter()
    try:  # on a copy, so that no weight or batch statistic is touched
        trial = copy.deepcopy(network).train()
        _compile(trial, runtime, count)
        with runtime.autocast():
            trial(torch.zeros(count, 3, size, size, device=runtime.device)).float().sum().backward()
    except Exception as error:  # whatever a compiler, a driver or a missing one can raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        print(f"--compile: not supported here ({reason}); going on without", flush=True)
        return network
    _compile(network, runtime, count)
    print(
        f"Compiled in {time.perf_counter() - started:.0f} s; the first batch compiles again, from torch's cache",
        flush=True,
    )
    return network


def _compile(network, runtime, count):
    mode = "reduce-overhead" if runtime.device.type == "cuda" else "default"
    for name in ("features", "forward"):  # forward last: it is made of features
        plain = getattr(network, name, None)
        if plain is not None:
            setattr(network, name, _choosing(network, plain, torch.compile(plain, mode=mode, dynamic=False), count))


def _choosing(network, plain, fast, count):
    """A function that takes ``fast`` for a whole training batch and ``plain`` for what else there is."""

    def call(inputs):
        return (fast if network.training and len(inputs) == count else plain)(inputs)

    return call
