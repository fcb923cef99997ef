"""The training step as few launches: torch.compile makes fewer, larger kernels, a CUDA graph launches all of them at once."""

import copy
import time
from functools import partial

import torch

from utils.errors import first_line

# Images that a run trains on, all epochs and views counted, from which on compiling is worth its half minute (README: speed).
LONG = 8_000_000


def compiled(network, setting, runtime, count, size, total):
    """Compile a network's ``forward`` and ``features`` in place for whole training batches; evaluation, and a smaller last
    batch, go through the network as it is.

    Args:
        network: on its device; setting: auto (on CUDA, for a long run), on or off; runtime: a `device.Runtime`; count: images
        of a whole batch, all views counted; size: side of an image in pixels; total: how many images the run trains on in all.

    Returns:
        The network. Where compiling fails it stays as it was, which is said in one line.
    """
    if setting == "off" or (setting == "auto" and (runtime.device.type != "cuda" or total < LONG)):
        return network
    started = time.perf_counter()
    try:  # on a copy, so that no weight or batch statistic is touched
        trial = copy.deepcopy(network).train()
        _compile(trial, count)
        with runtime.autocast():
            trial(torch.zeros(count, 3, size, size, device=runtime.device)).float().sum().backward()
    except Exception as error:  # whatever a compiler, a driver or a missing one can raise
        print(f"--compile: not supported here ({first_line(error)[:150]}); going on without", flush=True)
        return network
    _compile(network, count)
    print(
        f"Compiled in {time.perf_counter() - started:.0f} s; the first batch compiles again, from torch's cache",
        flush=True,
    )
    return network


def _compile(network, count):
    for name in ("features", "forward"):  # forward last: it is made of features
        plain = getattr(network, name, None)
        if plain is not None:
            setattr(
                network, name, _choosing(network, plain, torch.compile(plain, mode="default", dynamic=False), count)
            )


def _choosing(network, plain, fast, count):
    """A function that takes ``fast`` for a whole training batch and ``plain`` for what else there is."""

    def call(inputs):
        return (fast if network.training and len(inputs) == count else plain)(inputs)

    return call


class PlainStep:
    """What training does with one batch: forward, loss, backward, optimizer, and the sums of the epoch on the device.

    Args:
        model, objective, optimizer, runtime: as `engine.train_epoch` takes them.
    """

    def __init__(self, model, objective, optimizer, runtime):
        self.model, self.objective, self.optimizer, self.runtime = model, objective, optimizer, runtime
        self.totals = {}  # name: float32 scalar on the device
        # Batches after which all sums were finite, int64 scalar on the device; a sum that once was not stays so.
        self.finite = None

    def begin(self):
        """Start an epoch: all sums are zero."""
        for total in [] if self.finite is None else [*self.totals.values(), self.finite]:
            total.zero_()

    def __call__(self, *batch):
        """Train on a batch: inputs, labels, and what else the objective takes; tensors on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.runtime.autocast():
            loss, sums = self.objective(self.model, *batch)
        loss.backward()
        self.optimizer.step()
        for name, value in {"loss": loss.detach() * len(batch[1]), **sums}.items():
            value = torch.as_tensor(value)
            if name not in self.totals:
                # In float32, for a sum in bfloat16 stops growing; on the device, for reading it would wait for the device.
                self.totals[name] = torch.zeros((), device=value.device)
            self.totals[name].add_(value)
        finite = torch.isfinite(sum(self.totals.values()))
        if self.finite is None:
            self.finite = torch.zeros((), dtype=torch.int64, device=finite.device)
        self.finite.add_(finite)


class GraphedStep:
    """A `PlainStep` that after a few batches is recorded as one CUDA graph, which from then on stands for it: one launch a batch
    in the place of some five hundred. Batches of another size go through the step itself, and so do all where it cannot be
    recorded, which is said in one line.

    The graph keeps a whole batch's memory for itself. Where the device has no room for the smaller last batch beside it, that
    memory is given back first, and the next whole batch is recorded anew.

    Args:
        step: a `PlainStep`; size: samples of a whole batch.
    """

    WARM = 3  # batches before: they choose cuDNN's algorithms and make the optimizer's buffers

    def __init__(self, step, size):
        self.step, self.size, self.warm = step, size, 0
        self.graph, self.kept = None, 0  # the recorded step, and how many bytes of the device it keeps
        self.stream = torch.cuda.Stream(step.runtime.device)

    @property
    def totals(self):
        return self.step.totals

    @property
    def finite(self):
        return self.step.finite

    def begin(self):
        self.step.begin()

    def __call__(self, *batch):
        whole = len(batch[1]) == self.size
        if whole and self.graph is None and self.warm >= self.WARM:
            self._record(batch)
        if whole and self.graph:
            self._replay(batch)
        else:
            if self.graph and self._lacks_room(len(batch[1])):
                self.graph = None
            self._apart(self.step, *batch)
            self.warm += whole

    def _apart(self, function, *arguments):
        """Run ``function`` on the stream that the graph is recorded on, in its turn."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            function(*arguments)
        here.wait_stream(self.stream)

    def _record(self, batch):
        """Record the step on copies of the ``batch``, which it does not train on yet. The learning rate becomes a number on
        the device, for what is recorded stays as it is."""
        groups = self.step.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self.held = [tensor.clone() for tensor in batch]
        self.rates = [torch.tensor(float(rate), device=self.stream.device) for rate in rates]
        self.set_rates = rates
        graph, device = torch.cuda.CUDAGraph(), self.stream.device
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            # Another thread may write a checkpoint or pin memory meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step(*self.held)
            self.graph, self.kept = graph, torch.cuda.memory_reserved(device) - before
        except Exception as error:  # whatever a network or a driver does not take part in
            self.graph = False
            print(f"--compile: no CUDA graph here ({first_line(error)[:150]}); going on without", flush=True)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _lacks_room(self, samples):
        """Whether ``samples`` need more memory than the device has beside what the recorded step keeps."""
        device = self.stream.device
        free, whole = torch.cuda.mem_get_info(device)
        # What a process may take is told by newer versions of torch alone.
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        reserved = torch.cuda.memory_reserved(device)
        unused = max(0, reserved - torch.cuda.memory_allocated(device) - self.kept)
        room = min(free, share * whole - reserved) + unused
        return 1.1 * self.kept * samples / self.size > room

    def _replay(self, batch):
        for held, new in zip(self.held, batch, strict=True):
            held.copy_(new)
        rates = [group["lr"] for group in self.step.optimizer.param_groups]
        if rates != self.set_rates:
            for on_device, rate in zip(self.rates, rates, strict=True):
                on_device.fill_(rate)
            self.set_rates = rates
        self.graph.replay()


def step_of(model, objective, optimizer, runtime, size):
    """The `PlainStep` of a training, a `GraphedStep` where `engine.prepare` gave the model ``graphs``, a dict to keep them in from
    one epoch to the next."""
    step = PlainStep(model, objective, optimizer, runtime)
    graphs = getattr(model, "graphs", None)
    if graphs is None:
        return step
    plain, options = (objective.func, objective.keywords) if isinstance(objective, partial) else (objective, {})
    settings = (options, optimizer, size)
    if plain not in graphs or graphs[plain][0] != settings:
        graphs.pop(plain, None)  # first, so that its memory is free
        graphs[plain] = settings, GraphedStep(step, size)
    return graphs[plain][1]
