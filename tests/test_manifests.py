"""Every run says what it read and wrote; --verify holds the files against it."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_cli
from test_bad_input import refused
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS

from utils import manifest as manifest_module
from utils.files import sha256
from utils.steps import Step

MANIFESTS = [
    *(f"{folder}/options.json" for folder in (NO_TRANS, TUNED, WITH_TRANS, SAMPLES, EXTRACTOR, CLASSIFIER)),
    *(f"{TUNED}/1_{kind}.json" for kind in ("fct", "gamma", "histogram")),
    f"{WITH_TRANS}/1_unlearn_purify.json",
    f"{CLASSIFIER}/ckpt_epoch_1_test.json",
]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_run_says_its_command_options_versions_inputs_and_outputs(pipeline, name):
    content = json.loads((pipeline / name).read_text())
    assert content["command"].split()[0].endswith(".py") and content["options"]["dataset"] == "cifar10"
    assert set(content["versions"]) == {"python", "torch", "torchvision"}
    for kind in ("inputs", "outputs"):
        for file, digest in content[kind].items():
            assert sha256((pipeline / name).parent / file) == digest, file
    made = {"gamma", "1_test"}
    assert content["outputs"] or any(part in name for part in made)
    assert content["inputs"] or name.startswith((NO_TRANS, WITH_TRANS))  # those read the data alone
    if "gamma" not in name and not name.startswith(EXTRACTOR):
        assert content["data"]["train"]["samples"] == 400 and len(content["data"]["test"]["sha256"]) == 64


def test_the_files_of_a_step_are_its_outputs(pipeline):
    outputs = {name: set(json.loads((pipeline / name).read_text())["outputs"]) for name in MANIFESTS}
    assert outputs[f"{NO_TRANS}/options.json"] == {"0.tar", "1.tar", "log.csv", "samples.png"}
    assert outputs[f"{SAMPLES}/options.json"] == {
        "clean_samples.npy", "poison_samples.npy", "suspicious_samples.npy", "detection.json"
    }  # fmt: skip
    assert outputs[f"{EXTRACTOR}/options.json"] == {"ckpt_epoch_0.pth", "ckpt_epoch_1.pth", "last.pth", "log.csv"}
    assert outputs[f"{WITH_TRANS}/1_unlearn_purify.json"] == {"1_unlearn_purify.tar", "unlearn_purify.csv"}


def test_verify_passes_whole_results_and_names_what_was_changed_or_lost(cli, copy):
    said = cli("reproduce.py", "--verify", copy)
    assert said.code == 0 and "files are what their manifests tell of" in said.out
    for name in (f"{NO_TRANS}/1.tar", f"{SAMPLES}/poison_samples.npy", f"{WITH_TRANS}/unlearn_purify.csv"):
        path = copy / name
        content = path.read_bytes()
        path.unlink()
        refused(cli("reproduce.py", "--verify", copy), name, "is missing")
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(cli("reproduce.py", "--verify", copy), name, "is not what")
        path.write_bytes(content)
    (copy / "classes.json").write_text("[1, 2, 3]")  # the user's own
    assert cli("reproduce.py", "--verify", copy).code == 0
    refused(cli("reproduce.py", "--verify", copy, "--table", "cifar10"), "has no use for --table")
    record = copy / NO_TRANS / "options.json"
    half = record.read_bytes()[:500]
    record.unlink()
    record.write_bytes(half)  # what it tells of is not known any more
    refused(cli("reproduce.py", "--verify", copy), "options.json")


def test_verify_follows_the_chain_and_says_what_is_not_here(cli, copy, tmp_path):
    (copy / NO_TRANS / "0.tar").unlink()
    assert cli("reproduce.py", "--verify", copy / SAMPLES).code == 0  # does not build on it
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(copy / SAMPLES / "options.json", alone)
    for name in json.loads((alone / "options.json").read_text())["outputs"]:
        shutil.copy(copy / SAMPLES / name, alone)
    said = cli("reproduce.py", "--verify", alone)
    assert said.code == 0 and "not here, so not checked" in said.out and "4 files are" in said.out
    (alone / "options.json").unlink()
    refused(cli("reproduce.py", "--verify", alone), "no manifest")


def test_a_continued_run_keeps_the_inputs_it_began_with(words, copy, cli):
    common = [*words(copy), "--batch_size", 16, "--epochs", 3]
    assert run_cli("unlearn_relearn.py", *common, "--checkpoint_load", copy / WITH_TRANS / "1_unlearn_purify.tar") == 0
    content = json.loads((copy / WITH_TRANS / "1_unlearn_purify.json").read_text())
    assert "1.tar" in content["inputs"] and "1_unlearn_purify.tar" not in content["inputs"]
    assert content["checkpoint_load"] == "1.tar" and content["epochs_done"] == 3
    assert cli("reproduce.py", "--verify", copy / WITH_TRANS).code == 0


def test_the_committed_results_are_what_their_manifests_tell_of(cli, tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")  # elsewhere: a user's own saved/ may be of another run
    said = cli("reproduce.py", "--verify", tmp_path / "results")
    written = [json.loads(path.read_text())["outputs"] for path in (ROOT / "results").glob("*_manifest.json")]
    assert len(written) == 3 and all(len(outputs) == 3 for outputs in written)
    assert said.code == 0 and "9 files are" in said.out and "not here" in said.out


def test_of_several_processes_the_first_alone_looks_at_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "leads", lambda: False)
    manifest_module.write_options(tmp_path / "x.json", SimpleNamespace(), outputs=[tmp_path / "not there yet"])
    assert not list(tmp_path.iterdir())


def test_verify_follows_the_manifests_of_inputs_elsewhere(cli, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    data, record = tmp_path / "b/data.bin", tmp_path / "b/options.json"
    data.write_bytes(b"1")
    record.write_text(json.dumps({"inputs": {}, "outputs": {"data.bin": sha256(data)}}))
    content = {"inputs": {"../b/options.json": sha256(record)}, "outputs": {}}
    (tmp_path / "a/m.json").write_text(json.dumps(content))
    assert "2 files are" in cli("reproduce.py", "--verify", tmp_path / "a").out
    data.write_bytes(b"2")
    refused(cli("reproduce.py", "--verify", tmp_path / "a"), "data.bin is not what")


def test_a_copied_run_is_done_by_what_its_records_tell_whatever_the_times(copy, words):
    """`cp -r` gives the copies the time of copying, in an order of its own."""
    last = next((copy / "ST/save").rglob("last.pth"))
    classifier = next((copy / "ST/save").rglob("Linear_*/ckpt_epoch_1.pth"))
    common = [*map(str, words(copy)), "--epochs", "2"]
    more = ["--batch_size", "64", "--cosine", "--save_freq", "1"]
    first = Step("ST/train_extractor.py", [*common, *more], last, last.with_name("options.json"), [])
    more = ["--batch_size", "32", "--learning_rate", "0.5"]
    step = Step("ST/train_classifier.py", [*common, *more], classifier, classifier.with_name("options.json"), [first])
    assert first.is_done() and step.is_done()
    later = classifier.stat().st_mtime + 100
    os.utime(last, (later, later))
    assert step.is_done()
    for record, kind, name, done in (
        (step.record, "inputs", None, False),  # an older record, of which the times alone tell
        (step.record, "inputs", os.path.relpath(last, classifier.parent), False),
        (first.record, "outputs", "last.pth", False),  # trained anew
    ):
        before = record.read_text()
        content = json.loads(before)
        content[kind] = {} if name is None else content[kind] | {name: "0" * 64}
        record.unlink()
        record.write_text(json.dumps(content))
        assert step.is_done() == done, name
        record.write_text(before)
    assert step.is_done()
