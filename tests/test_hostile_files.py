"""Files from strangers are data: no input of any script runs what a pickle in it says, and odd contents end in one line."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_bad_input import Bomb, refused, snapshot
from test_pipeline import CLASSIFIER, EXTRACTOR, NO_TRANS, SAMPLES, TUNED, WITH_TRANS

from models import build_model
from models.pretrained import load_pretrained
from utils.checkpoints import load_schedule
from utils.errors import UserError
from utils.images import decode

NPY = [f"{SAMPLES}/{kind}_samples.npy" for kind in ("clean", "poison")]
# What a script reads, by the places where the steps before it put it.
READ = {
    "finetune_attack_noTrans.py": [f"{NO_TRANS}/1.tar", f"{NO_TRANS}/options.json", f"{TUNED}/options.json"],
    "calculate_consistency.py": [f"{TUNED}/1.tar", f"{TUNED}/options.json", f"{TUNED}/1_fct.json"],
    "visualize_consistency.py": [f"{TUNED}/1.tar", f"{TUNED}/1_fct.json", f"{TUNED}/1_all.txt"],
    "calculate_gamma.py": [f"{TUNED}/1_all.txt", f"{TUNED}/1_fct.json", f"{TUNED}/options.json"],
    "separate_samples.py": [f"{TUNED}/1.tar", f"{TUNED}/1_fct.json", f"{TUNED}/1_all.txt", f"{SAMPLES}/options.json"],
    "train_attack_noTrans.py": [f"{NO_TRANS}/options.json"],
    "train_attack_withTrans.py": [f"{WITH_TRANS}/options.json"],
    "unlearn_relearn.py": [f"{WITH_TRANS}/1.tar", f"{WITH_TRANS}/options.json", f"{SAMPLES}/options.json", *NPY],
    "ST/train_extractor.py": [f"{SAMPLES}/options.json", f"{SAMPLES}/suspicious_samples.npy", *NPY],
    "ST/train_classifier.py": [f"{EXTRACTOR}/last.pth", f"{SAMPLES}/options.json", *NPY],
    "ST/test.py": [f"{EXTRACTOR}/last.pth", f"{CLASSIFIER}/ckpt_epoch_1.pth"],
}
# Options that name a file, where the file is not one of the above.
NAMED = [
    ("train_attack_noTrans.py", ["--checkpoint_load"]),
    ("finetune_attack_noTrans.py", ["--checkpoint_load"]),
    ("train_attack_withTrans.py", ["--checkpoint_load"]),
    ("train_clean_withTrans.py", ["--checkpoint_load"]),
    ("unlearn_relearn.py", ["--checkpoint_load"]),
    ("ST/train_extractor.py", ["--checkpoint_load"]),
    ("ST/train_classifier.py", ["--checkpoint_load"]),
    ("ST/train_classifier.py", ["--ckpt"]),
    ("ST/test.py", ["--model_ckpt"]),
    ("train_attack_noTrans.py", ["--trigger_type", "fourCornerTrigger", "--benign_checkpoint"]),
    ("train_attack_noTrans.py", ["--trigger_type", "SSBA", "--ssba_encoder"]),
    ("train_attack_noTrans.py", ["--trigger_type", "SSBA", "--ssba_images"]),
    ("train_attack_noTrans.py", ["--dataset", "npz", "--data_root"]),
    ("separate_samples.py", ["--poison_order"]),
]


def hostile(trace):
    """The same attack in the dresses that a file can wear; ``trace`` is the file that it would make."""
    array, archive, stored = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    np.savez(archive, images=np.array([Bomb(trace)], dtype=object), digest=np.array([Bomb(trace)], dtype=object))
    torch.save({"model": Bomb(trace), "step": "train_attack_noTrans"}, stored)
    dresses = pickle.dumps(Bomb(trace)), array.getvalue(), archive.getvalue(), stored.getvalue()
    trace.unlink(missing_ok=True)  # numpy has run it once to measure it
    return dresses


def put(path, content):
    path.unlink()
    path.write_bytes(content)


QUICK = {"train_attack_noTrans.py", "finetune_attack_noTrans.py", "train_attack_withTrans.py", "unlearn_relearn.py",
         "ST/train_extractor.py", "ST/train_classifier.py"}  # fmt: skip


@pytest.mark.parametrize("script", READ)
def test_a_pickle_in_the_place_of_any_input_does_not_run(cli, words, copy, tmp_path, script):
    trace = tmp_path / "it ran"
    more = ["--epochs", 1, "--batch_size", 16] if script in QUICK else []
    for name in READ[script]:
        good = (copy / name).read_bytes()
        for content in hostile(trace):
            put(copy / name, content)
            result = cli(script, *words(copy), *more)
            if name.endswith("_all.txt") and script != "calculate_gamma.py":
                assert result.code == 0 and "computing them" in result.out, result  # not the saved values
            else:
                refused(result, name.rsplit("/", 1)[-1])
            assert not trace.exists(), name
        put(copy / name, good)


@pytest.mark.parametrize("script, option", NAMED, ids=lambda value: str(value))
def test_a_pickle_given_by_an_option_does_not_run(cli, words, copy, tmp_path, script, option):
    trace = tmp_path / "it ran"
    before = snapshot(copy)
    for number, content in enumerate(hostile(trace)):
        path = tmp_path / f"hostile {number}.npy"
        path.write_bytes(content)
        refused(cli(script, *words(copy), *option, path), path)
        assert not trace.exists()
    assert snapshot(copy) == before


def test_a_pickle_in_the_place_of_pretrained_weights_does_not_run(tmp_path):
    trace, path = tmp_path / "it ran", tmp_path / "weights.pth"
    for content in hostile(trace):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.pth"):
            load_pretrained(build_model("resnet18", "imagenet", 7, 224), "resnet18", path)
        assert not trace.exists()


def test_hostile_caches_are_made_again(cli, words, data_root, tmp_path):
    trace, data = tmp_path / "it ran", tmp_path / "data"
    shutil.copytree(data_root, data)
    common = [*words(tmp_path), "--data_root", data, "--epochs", 1, "--batch_size", 64]
    ssba = [*common, "--trigger_type", "SSBA", "--poison_rate", 0.2, "--overwrite"]
    assert cli("train_attack_noTrans.py", *common).code == 0
    assert cli("train_attack_noTrans.py", *ssba).code == 0
    caches = [*data.rglob(".decoded_*.npz"), *(tmp_path / "saved/poisoned_images").rglob("*.npz")]
    assert len(caches) == 4
    whole = {path: path.read_bytes() for path in caches}
    for content in hostile(trace):
        for path in caches:
            path.write_bytes(content)
        assert cli("train_attack_noTrans.py", *ssba).code == 0
        assert not trace.exists()
        assert {path: np.load(path)["images"].tobytes() for path in caches} == {
            path: np.load(io.BytesIO(content))["images"].tobytes() for path, content in whole.items()
        }


def test_torchvisions_pickles_of_cifar_are_not_opened_unless_they_are_the_known_ones(cli, words, tmp_path, monkeypatch):
    trace = tmp_path / "it ran"
    folder = tmp_path / "data/cifar10/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))
    import torchvision.datasets.cifar as cifar

    def no_network(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    refused(
        cli("train_attack_noTrans.py", *words(tmp_path), "--data_root", tmp_path / "data"), "could not be downloaded"
    )
    assert not trace.exists()


def png(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_small_files_that_claim_to_be_huge_do_not_fill_the_memory(cli, words, data_root, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_root, data)
    common = [*words(tmp_path), "--data_root", data, "--epochs", 1]
    victim = data / "cifar10/train/class 3/005.png"
    good = victim.read_bytes()
    for size in ((100_000, 100_000), (11_000, 11_000), (40, 40)):
        victim.write_bytes(png(*size))
        refused(cli("train_attack_noTrans.py", *common), victim)
    victim.write_bytes(good)
    gtsrb = tmp_path / "more/gtsrb"
    for split in ("train", "test"):
        for label in range(43):
            (gtsrb / split / f"{label:02d}").mkdir(parents=True)
            shutil.copy(victim, gtsrb / split / f"{label:02d}/1.png")
    (gtsrb / "train/07/1.png").write_bytes(png(11_000, 11_000))
    result = cli("train_attack_noTrans.py", *words(tmp_path), "--dataset", "gtsrb", "--data_root", tmp_path / "more")
    refused(result, "07/1.png", "121000000 pixels")

    # A cache whose array unpacks to a gigabyte is not unpacked.
    assert cli("train_attack_noTrans.py", *common, "--batch_size", 64).code == 0
    cache = next(data.rglob(".decoded_train_*.npz"))
    digest = np.load(cache)["digest"]
    with zipfile.ZipFile(cache, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in (("digest", digest), ("images", np.zeros((1 << 28,), np.uint8))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.save(file, array)
    assert cache.stat().st_size < 1 << 20
    assert cli("train_attack_noTrans.py", *common, "--batch_size", 64, "--overwrite").code == 0
    assert np.load(cache)["images"].shape == (400, 32, 32, 3)


@pytest.mark.parametrize("count", [10**13, 10**30])
def test_an_array_whose_header_says_that_it_is_huge_is_one_line(cli, words, copy, tmp_path, count):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)})
    labels = io.BytesIO()
    np.save(labels, np.arange(60) % 3)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue() + bytes(1000))
        archive.writestr("y_train.npy", labels.getvalue())
    refused(cli("audit_dataset.py", "--data_root", tmp_path / "x.npz", "--out", tmp_path / "report"), "x.npz")

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    (tmp_path / "order.npy").write_bytes(header.getvalue() + bytes(1000))
    refused(
        cli("separate_samples.py", *words(copy), "--poison_order", tmp_path / "order.npy"), "order.npy is no .npy file"
    )


def test_of_an_image_in_name_alone_no_other_program_is_started(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "eps.png").write_bytes(eps)
    with pytest.raises(UserError, match=r"eps\.png"):
        decode(tmp_path / "eps.png", 32, resize=True)
    assert not (tmp_path / "started").exists()


def changed(content, **entries):
    return {**content, **entries}


BAD_CHECKPOINTS = {
    "epoch is text": (lambda c: changed(c, epoch="1"), "its epoch is a str"),
    "epoch is true": (lambda c: changed(c, epoch=True), "its epoch is a bool"),
    "epoch is negative": (lambda c: changed(c, epoch=-1), "its epoch is -1"),
    "step is a list": (lambda c: changed(c, step=["train_attack_noTrans"]), "its step is a list"),
    "another step": (lambda c: changed(c, step="x" * 1000), "was written by xxx"),
    "options are a list": (lambda c: changed(c, options=[]), "its options is a list"),
    "history of text": (lambda c: changed(c, history=[{"epoch": "0"}]), "history"),
    "history of lists": (lambda c: changed(c, history=[[0]]), "history"),
    "history without epochs": (lambda c: changed(c, history=[{"loss": 1.0}]), "no epoch"),
    "history is empty": (lambda c: changed(c, history=[]), "does not end with its epoch"),
    "history of another epoch": (lambda c: changed(c, history=[{"epoch": 7}]), "does not end with its epoch"),
    "model is a list": (lambda c: changed(c, model=[]), "its model is a list"),
    "no tensors": (lambda c: changed(c, model={"fc.weight": 3}), "lack conv1.weight"),
    "weights are not finite": (
        lambda c: changed(c, model=changed(c["model"], **{"fc.bias": torch.full((10,), float("nan"))})),
        "not finite in fc.bias",
    ),
    "weights are integers": (
        lambda c: changed(c, model=changed(c["model"], **{"fc.bias": torch.zeros(10, dtype=torch.int64)})),
        "torch.int64, not torch.float32",
    ),
    "a batch norm counts in floats": (
        lambda c: changed(c, model=changed(c["model"], **{"bn1.num_batches_tracked": torch.tensor(1.0)})),
        "another kind of number in bn1.num_batches_tracked",
    ),
    "another architecture": (
        lambda c: changed(c, model={f"module.{key}": value for key, value in c["model"].items()}),
        "hold the foreign module.conv1.weight",
    ),
    "no optimizer": (lambda c: changed(c, optimizer={}), "optimizer"),
    "rate is text": (
        lambda c: changed(c, optimizer=changed(c["optimizer"], param_groups=[
            changed(c["optimizer"]["param_groups"][0], lr="fast")])), "its lr is 'fast'"),
    "rate is infinite": (
        lambda c: changed(c, optimizer=changed(c["optimizer"], param_groups=[
            changed(c["optimizer"]["param_groups"][0], lr=float("inf"))])), "its lr is inf"),
    "two groups": (
        lambda c: changed(c, optimizer=changed(c["optimizer"], param_groups=2 * c["optimizer"]["param_groups"])),
        "optimizer",
    ),
    "momentum of another shape": (
        lambda c: changed(c, optimizer=changed(c["optimizer"], state={0: {"momentum_buffer": torch.zeros(3)}})),
        "shape (3,)",
    ),
    "momentum is not finite": (
        lambda c: changed(c, optimizer=changed(c["optimizer"], state={
            0: {"momentum_buffer": torch.full_like(c["model"]["conv1.weight"], float("inf"))}})), "not finite"),
    "schedule is foreign": (lambda c: changed(c, schedule={"step": "x"}), "schedule"),
    "schedule is empty": (lambda c: changed(c, schedule={}), "schedule"),
    "schedule of another kind": (
        lambda c: changed(c, schedule={"milestones": {1: 1}, "gamma": 0.1, "base_lrs": [0.01], "last_epoch": 1}),
        "T_max",
    ),
    "schedule of no epochs": (lambda c: changed(c, schedule=changed(c["schedule"], T_max=0)), "T_max"),
    "schedule is text": (lambda c: changed(c, schedule=changed(c["schedule"], last_epoch="1")), "last_epoch"),
}  # fmt: skip


def test_a_schedule_that_another_version_of_torch_kept_is_taken():
    weight = torch.nn.Parameter(torch.zeros(1))

    def cosine():
        return torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([weight], lr=0.1), T_max=4)

    schedule, other = cosine(), cosine()
    schedule.optimizer.step()
    schedule.step()
    state = {name: value for name, value in schedule.state_dict().items() if name not in ("_is_initial", "verbose")}
    load_schedule(other, {**state, "of_their_own": [1, 2]}, "x.tar")
    assert other.last_epoch == 1 and not hasattr(other, "of_their_own")
    assert other.state_dict() == schedule.state_dict() | {
        name: cosine().state_dict()[name] for name in other.state_dict() if name not in state
    }


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_an_odd_checkpoint_ends_in_one_line_that_names_the_fault(cli, words, copy, tmp_path, fault):
    change, needle = BAD_CHECKPOINTS[fault]
    good = torch.load(copy / NO_TRANS / "0.tar", weights_only=True)
    torch.save(change(good), tmp_path / "odd.tar")
    before = snapshot(copy)
    for script in ("train_attack_noTrans.py", "finetune_attack_noTrans.py"):
        refused(cli(script, *words(copy), "--checkpoint_load", tmp_path / "odd.tar"), tmp_path / "odd.tar", needle)
    assert snapshot(copy) == before


BAD_RECORDS = ["", "[]", "[" * 100_000, '{"options": []}', '{"outputs": 3}', '{"epochs_done": "x"}', "\udcff", "null"]


def test_odd_records_end_in_one_line(cli, words, copy):
    for name, script in (
        (f"{NO_TRANS}/options.json", "finetune_attack_noTrans.py"),
        (f"{TUNED}/1_fct.json", "calculate_gamma.py"),
        (f"{SAMPLES}/options.json", "unlearn_relearn.py"),
    ):
        good = (copy / name).read_bytes()
        for text in BAD_RECORDS:
            put(copy / name, text.encode(errors="surrogateescape"))
            refused(
                cli(script, *words(copy), "--batch_size", 16) if "gamma" not in script else cli(script, *words(copy)),
                name,
            )
        put(copy / name, good)
    put(copy / NO_TRANS / "options.json", json.dumps({"options": {"epochs": "two"}}).encode())
    refused(cli("finetune_attack_noTrans.py", *words(copy)), "options.json is not the record of a step")


def test_sample_files_with_impossible_labels_or_of_another_set_are_refused(cli, words, copy):
    path, options = copy / SAMPLES / "poison_samples.npy", copy / SAMPLES / "options.json"
    good = np.load(path)
    record = json.loads(options.read_text())
    put(options, json.dumps({**record, "outputs": {}}).encode())  # a stranger's, who knows of our manifests
    for name, value, needle in (
        ("label", 10, "0 to 9"),
        ("label", -1, "0 to 9"),
        ("index", -5, "below 0"),
        ("flag", 0, "another set"),
    ):
        bad = good.copy()
        bad[name] = value
        content = io.BytesIO()
        np.save(content, bad)
        put(path, content.getvalue())
        for script in ("unlearn_relearn.py", "ST/train_extractor.py"):
            refused(cli(script, *words(copy), "--epochs", 1, "--batch_size", 16), "poison_samples.npy", needle)
    put(options, json.dumps(record).encode())
    content = io.BytesIO()
    np.save(content, good[::-1].copy())
    put(path, content.getvalue())
    refused(
        cli("unlearn_relearn.py", *words(copy), "--batch_size", 16), "is not what the run wrote", "separate_samples.py"
    )


def test_fct_values_of_a_checkpoint_that_was_replaced_are_not_used(cli, words, copy):
    put(copy / TUNED / "1.tar", (copy / TUNED / "0.tar").read_bytes())
    refused(cli("calculate_gamma.py", *words(copy)), "has been replaced since", "calculate_consistency.py")
    assert "computing them" in cli("separate_samples.py", *words(copy), "--overwrite").out


def test_nothing_in_the_project_unpickles_or_evaluates_text():
    """The calls that could, looked for in the syntax of every file; the two allowed ones are safe by an argument."""
    import ast

    found = []
    for path in [
        *ROOT.glob("*.py"),
        *(p for part in ("ST", "utils", "models", "tools") for p in (ROOT / part).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle") or (
                name == "torch.load" and options.get("weights_only") != "True"
            ) or (name == "np.load" and options.get("allow_pickle") != "False") or options.get("shell") == "True":  # fmt: skip
                found.append(f"{path.name}:{node.lineno} {name}")
    assert not found


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", b"a,b\n1,2\n", b"a\n1,2,3\n4\n1,2,3,4\n"])
@pytest.mark.parametrize(
    ("script", "words", "name"),
    [
        ("tools/build_imagenet_subset.py", ["--imagenet", ".", "--out", "out", "--classes", "file"], "file"),
        ("tools/build_fashion.py", ["--source", ".", "--out", "out/fashion.npz"], "train-images-idx3-ubyte.gz"),
        ("tools/calibrate_audit.py", ["--out", "file"], "file"),
    ],
)
def test_a_strange_file_of_a_tool_is_one_line(script, words, name, content, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(cli(script, *words), name)
    assert [path.name for path in tmp_path.rglob("*")] == [name] and (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("tool", ["figure3", "secure_curve"])
def test_what_stands_where_a_tool_writes_is_looked_at_before_any_step(tool, cli, tmp_path):
    names = {"figure3": ("--rows", "figure3_quick"), "secure_curve": ("--row", "secure_curve_Trojan_quick")}
    option, name = names[tool]
    words = [f"tools/{tool}.py", "--scale", "quick", option, "Trojan", "--output_root", tmp_path / "runs"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{name}.png").write_text("my notes")
    refused(cli(*words, "--out", tmp_path / "own"), f"{name}.png", "--overwrite")
    assert (tmp_path / "own" / f"{name}.png").read_text() == "my notes"
    refused(cli(*words, "--out", tmp_path / "own" / f"{name}.png"), "--out")
    tables = ["row,epoch,FCT_clean\nTrojan,x,1\n", "row,epoch\nTrojan,0\n", "row,epoch,FCT_clean\nTrojan,0,abc\n"]
    for content in tables if tool == "figure3" else ["epoch,ACC\nx,1\n"]:
        (tmp_path / "own" / f"{name}.csv").write_text(content)
        refused(cli(*words, "--out", tmp_path / "own"), f"{name}.csv")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "odd",
    ['"seconds": {"a": null}', '"seconds": {"a": NaN}', '"seconds": {"a": 1e999}', f'"seconds": {{"a": {10**400}}}', '"rule": ["x"]',
     '"rule": null', '"variant": 1', '"variant": null', '"scale": ["cpu"]', '"seed": "0"', '"row": null', '"defence": "D-XX"',
     '"after": {"ACC": NaN, "ACC_paper": 1, "ASR": 1, "R_ACC": 1}', '"after": {"ACC": 1}', '"paper_selection": {"epoch": "x"}'],
)  # fmt: skip
def test_a_damaged_record_of_a_cell_is_one_line(odd, cli, tmp_path):
    (tmp_path / "cifar10").mkdir()
    text = (ROOT / "results/cifar10/SIG_D-BR_cpu_seed0.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "cifar10/x.json").write_text(f"{text}, {odd}}}")  # of two values of a name the last counts
    refused(cli("tools/make_tables.py", "--results", tmp_path), "cifar10/x.json is no record of a cell")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["x.json"]


@pytest.mark.parametrize("content", [None, b"", b"epoch\n0\n", b"epoch,feature_norm,loss,seconds\n0,x,x,x\n"])
@pytest.mark.parametrize("tool", ["figure3", "secure_curve"])
def test_without_the_log_of_a_step_a_figure_is_one_line(tool, content, cli, tmp_path, monkeypatch):
    module = cli.module(f"tools/{tool}.py")
    monkeypatch.setattr(module, "run", lambda steps, opt, record: None)
    monkeypatch.setattr("conftest.load_script", lambda name: module)
    if content is not None:
        step = "finetune_attack_noTrans" if tool == "figure3" else "train_extractor"
        words = ["--output_root", str(tmp_path / "runs"), "--scale", "quick", "--out", str(tmp_path / "out")]
        opt = module.get_parser().parse_args(words)
        root = tmp_path / f"runs/quick_seed0_{'curve' if tool == 'secure_curve' else tool}"
        steps = module.steps_of(opt, "BadNets-all2one" if tool == "figure3" else root)[0]
        log = steps[step].output.with_name("log.csv")
        log.parent.mkdir(parents=True)
        log.write_bytes(content)
    said = cli(f"tools/{tool}.py", "--scale", "quick", "--output_root", tmp_path / "runs", "--out", tmp_path / "out")
    refused(said, "log.csv", "and this command again")
    assert not (tmp_path / "out").exists()


def test_a_compressed_archive_with_bytes_turned_over_is_one_line(cli, tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(
        tmp_path / "x.npz", x_train=rng.integers(0, 9, (60, 28, 28), dtype=np.uint8), y_train=np.arange(60) % 3
    )
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[2000:2040] = b"\xff" * 40
    (tmp_path / "x.npz").write_bytes(content)
    refused(cli("audit_dataset.py", "--data_root", tmp_path / "x.npz", "--out", tmp_path / "report"), "x.npz")
