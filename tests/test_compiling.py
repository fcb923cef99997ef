"""--compile: what is compiled, that it changes no result, and what happens where it fails."""

import pandas as pd
import pytest
import torch
from conftest import run_cli
from test_pipeline import NO_TRANS, weights

from models import build_model
from utils.compiling import compiled
from utils.device import choose_runtime

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
    assert compiled(network, "on", CPU, 6, 32) is network
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
    assert compiled(network, setting, CPU, 6, 32) is network and vars(network) == before


def test_where_compiling_fails_training_goes_on_with_one_line(monkeypatch, words, cli, pipeline, tmp_path):
    def broken(function, **options):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    said = cli("train_attack_noTrans.py", *words(tmp_path), "--epochs", 2, "--batch_size", 64, "--compile", "on")
    assert said.code == 0, said.err
    assert "--compile: not supported here (no compiler); going on without\n" in said.out
    one, other = weights(tmp_path / NO_TRANS / "1.tar"), weights(pipeline / NO_TRANS / "1.tar")
    assert all(torch.equal(one[name], other[name]) for name in other)


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
