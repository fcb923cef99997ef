"""--compile: what is compiled and recorded, that it changes no result, and what happens where it fails."""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_cli
from test_pipeline import NO_TRANS, weights

from models import SupConResNet, build_model
from ST.losses import SupConLoss, contrastive
from utils import compiling
from utils.compiling import LONG, compiled, step_of
from utils.dataloader_bd import Batches
from utils.device import choose_runtime
from utils.engine import prepare, train_epoch
from utils.losses import cross_entropy, negative_cross_entropy
from utils.transforms import ContrastiveView, CropFlip

CPU = choose_runtime("cpu", "float32")


def test_whole_training_batches_alone_are_compiled(monkeypatch):
    used = []

    def compile_(function, **options):
        assert options == {"mode": "default", "dynamic": False}

        def call(inputs):
            used.append(len(inputs))
            return function(inputs)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    torch.manual_seed(0)
    network = build_model("resnet10", "cifar10", 10)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    inputs = torch.randn(6, 3, 32, 32)
    expected = build_model("resnet10", "cifar10", 10)
    expected.load_state_dict(state)
    assert compiled(network, "on", CPU, 6, 32, 1) is network
    after = network.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
    used.clear()
    assert torch.equal(network.train()(inputs), expected.train()(inputs)) and used == [
        6,
        6,
    ]  # forward, and features in it
    assert torch.equal(network.features(inputs), expected.features(inputs)) and used == [6, 6, 6]
    network(inputs[:4])
    network.eval()(inputs)
    network.features(inputs)
    assert used == [6, 6, 6]


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_on_a_cpu_nothing_is_compiled_unasked(setting, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    network = build_model("resnet10", "cifar10", 10)
    before = dict(vars(network))
    assert compiled(network, setting, CPU, 6, 32, 10**9) is network and vars(network) == before


def test_where_compiling_fails_training_goes_on_with_one_line(monkeypatch, words, cli, pipeline, tmp_path):
    def broken(function, **options):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    said = cli("train_attack_noTrans.py", *words(tmp_path), "--epochs", 2, "--batch_size", 64, "--compile", "on")
    assert said.code == 0, said.err
    assert "--compile: not supported here (no compiler); going on without\n" in said.out
    one, other = weights(tmp_path / NO_TRANS / "1.tar"), weights(pipeline / NO_TRANS / "1.tar")
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("setting", "images", "compiles"),
    [("auto", LONG, True), ("auto", LONG - 1, False), ("on", 1, True), ("off", LONG, False)],
)
def test_on_cuda_a_long_run_is_compiled(setting, images, compiles, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("this compiler does not work")

    monkeypatch.setattr(torch, "compile", broken)
    network = build_model("resnet10", "cifar10", 10)
    assert compiled(network, setting, SimpleNamespace(device=torch.device("cuda")), 6, 32, images) is network
    assert ("this compiler does not work" in capsys.readouterr().out) == compiles


# The step as one CUDA graph. Without a GPU: what is recorded is the step itself, and a replay runs it on what it was recorded on.


class _Graph:
    """Stands for a `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        optimizer = self.step.optimizer
        before = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate.item()
        self.step(*self.held)
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


class _Silent:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __call__(self, *batch):
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.optimizer.param_groups)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were recorded, a list; ``graphs.error``: what recording raises, if anything."""

    class Recorded(list):
        error = None

    recorded = Recorded()
    record = compiling.GraphedStep._record

    @contextmanager
    def recording(graph, stream, capture_error_mode):
        if recorded.error:
            raise recorded.error
        recorded.append(graph)
        yield

    def with_step(step, batch):
        plain = step.step
        step.step = _Silent(plain.optimizer)  # recording runs nothing
        try:
            record(step, batch)
        finally:
            step.step = plain
        if step.graph:
            step.graph.step, step.graph.held, step.graph.rates = plain, step.held, step.rates

    stream = SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cpu"))
    monkeypatch.setattr(compiling.GraphedStep, "_record", with_step)
    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda one: nullcontext(),
        "CUDAGraph": _Graph,
        "graph": recording,
        "mem_get_info": lambda device: (1 << 40, 1 << 40),
        "get_per_process_memory_fraction": lambda device: 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    return recorded


def trained(fashion, runtime, setting, bound=None, epochs=3, seed=0, secure=False):
    """Train for some epochs of six batches, the last one smaller, at a learning rate that changes with every batch, a
    classifier or, ``secure``, ST's extractor; return the rows of the epochs, the weights and the network."""
    torch.manual_seed(seed)
    network = runtime.place(SupConResNet("resnet10") if secure else build_model("resnet10", "cifar10", 10))
    images, labels = fashion.train_images[:91], fashion.train_labels[:91]
    more = {"augmentation": CropFlip()}
    if secure:
        more = {"augmentation": ContrastiveView(32), "views": 2, "extra": np.arange(91) % 3 > 0}
    batches = Batches(images, labels, fashion.spec, runtime, 16, seed, "x", **more)
    secured = partial(contrastive, loss_of=SupConLoss())
    network = prepare(network.train(), SimpleNamespace(compile=setting, epochs=epochs), runtime, batches)
    optimizer = runtime.sgd(network.parameters(), 0.1, 5e-4)
    rows = []
    for epoch in range(epochs):

        def set_rate(batch, epoch=epoch):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + batch + 10 * epoch)

        objective = cross_entropy if bound is None else partial(negative_cross_entropy, bound=bound[epoch])
        objective = secured if secure else objective
        row = train_epoch(network, batches, epoch, objective, optimizer, runtime, "x", set_rate)
        rows.append({name: value for name, value in row.items() if name != "seconds"})
        assert isinstance(optimizer.param_groups[0]["lr"], float)
    return rows, {name: value.cpu().clone() for name, value in network.state_dict().items()}, network


def same(rows, expected):
    for one, other in zip(rows, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("secure", [False, True])
def test_a_recorded_step_trains_as_the_step_itself_does(fashion, graphs, monkeypatch, secure):
    expected, weights_expected, _ = trained(fashion, CPU, "off", secure=secure)
    monkeypatch.setattr("utils.engine.step_of", _graphed(step_of))
    found, weights_found, network = trained(fashion, CPU, "off", secure=secure)
    same(found, expected)
    for name, value in weights_expected.items():
        torch.testing.assert_close(weights_found[name], value, rtol=1e-4, atol=1e-6)  # the rate is in float32
    assert [graph.replays for graph in graphs] == [2 + 5 + 5]  # three batches before; the sixth is a smaller one
    assert len(network.graphs) == 1


@pytest.mark.parametrize(("kept", "replays"), [(99, [2 + 5 + 5]), (100, [2, 5, 5])])
def test_a_recorded_step_makes_room_for_the_smaller_last_batch_where_it_has_to(
    fashion, graphs, monkeypatch, kept, replays
):
    """Beside a graph that keeps ``kept`` of 175 bytes the 11 images of a last batch, of 16 in a whole one, want 1.1 * 11 / 16 of that."""
    there = []  # how many graphs were recorded before the one that holds memory
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: there.append(len(graphs)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept * (len(graphs) > there[-1]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (175 - kept, 175))
    expected, _, _ = trained(fashion, CPU, "off")
    monkeypatch.setattr("utils.engine.step_of", _graphed(step_of))
    found, _, _ = trained(fashion, CPU, "off")
    same(found, expected)
    assert [graph.replays for graph in graphs] == replays


def test_a_changed_objective_is_recorded_anew(fashion, graphs, monkeypatch):
    bounds = [50.0, 50.0, 80.0]
    expected, _, _ = trained(fashion, CPU, "off", bounds)
    monkeypatch.setattr("utils.engine.step_of", _graphed(step_of))
    found, _, network = trained(fashion, CPU, "off", bounds)
    same(found, expected)
    assert [graph.replays for graph in graphs] == [2 + 5, 2] and len(network.graphs) == 1


def test_where_recording_fails_training_goes_on_with_one_line(fashion, graphs, monkeypatch, capsys):
    graphs.error = RuntimeError("operation not permitted when stream is capturing\nand more")
    expected, _, _ = trained(fashion, CPU, "off")
    monkeypatch.setattr("utils.engine.step_of", _graphed(step_of))
    found, _, _ = trained(fashion, CPU, "off")
    assert found == expected and not graphs
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "--compile: no CUDA graph here (operation not permitted when stream is capturing); going on without"
    ]


def _graphed(step_of):
    """``step_of`` as if `prepare` had found a GPU."""

    def found(model, *rest):
        if not hasattr(model, "graphs"):
            model.graphs = {}
        return step_of(model, *rest)

    return found


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("bound", [None, [50.0, 50.0, 80.0]])
    def test_a_recorded_step_trains_as_the_step_itself_does(self, fashion, precision, bound, deterministic, capsys):
        runtime = choose_runtime("cuda", precision)
        expected, weights_expected, _ = trained(fashion, runtime, "off", bound)
        found, weights_found, network = trained(fashion, runtime, "auto", bound)
        ((_, graphed),) = network.graphs.values()
        assert graphed.graph and "going on without" not in capsys.readouterr().out
        same(found, expected)
        for name, value in weights_expected.items():
            torch.testing.assert_close(weights_found[name], value, rtol=1e-4, atol=1e-6)

    def test_a_recorded_step_of_the_extractor_trains_as_the_step_itself_does(self, fashion, deterministic):
        runtime = choose_runtime("cuda", "bfloat16")
        expected, _, _ = trained(fashion, runtime, "off", secure=True)
        found, _, network = trained(fashion, runtime, "auto", secure=True)
        ((_, graphed),) = network.graphs.values()
        assert graphed.graph
        same(found, expected)

    @pytest.mark.parametrize("secure", [False, True])
    def test_a_compiled_and_recorded_step_ends_where_the_plain_one_does(self, fashion, capsys, secure):
        runtime = choose_runtime("cuda", "float32")
        expected, _, _ = trained(fashion, runtime, "off", secure=secure)
        found, _, network = trained(fashion, runtime, "on", secure=secure)
        ((_, graphed),) = network.graphs.values()
        assert graphed.graph and "Compiled in" in capsys.readouterr().out
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=2e-3)


@pytest.mark.slow
def test_compiled_training_ends_where_plain_training_does(words, tmp_path, capsys):
    """With a real compiler; one epoch of three batches, the last of them smaller."""
    more = ["--epochs", 1, "--batch_size", 150]
    for setting in ("off", "on"):
        assert run_cli("train_attack_withTrans.py", *words(tmp_path / setting), *more, "--compile", setting) == 0
    said = capsys.readouterr().out
    if "not supported" in said:
        pytest.skip(said.split("--compile: ")[1].splitlines()[0])
    assert "Compiled in" in said
    logs = [pd.read_csv(next((tmp_path / setting).rglob("log.csv"))) for setting in ("off", "on")]
    assert logs[1]["loss"][0] == pytest.approx(logs[0]["loss"][0], rel=2e-3)
