"""Somebody else's model: plain state dicts of torchvision's classifiers, cleaned and given back in the same form."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import write_folder
from test_bad_input import refused

from models.foreign import NAMES, build_foreign, is_state_dict, plain_state, precision_of
from utils.datasets import DATASETS, Spec
from utils.errors import UserError
from utils.files import load_tensors

SMALL = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "squeezenet1_1", "shufflenet_v2_x0_5",
         "mnasnet0_5", "googlenet"]  # fmt: skip
LARGE = [
    "resnet34",
    "resnet50",
    "vgg11_bn",
    "alexnet",
    "vit_b_16",
    "inception_v3",
    "convnext_tiny",
    "swin_t",
    "regnet_y_400mf",
]


def spec_of(classes, size=224):
    return Spec(classes, size, (0.5,) * 3, (0.2,) * 3, own=True)


def network(name, classes=7, **more):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **more)


def shake(model):
    """Other numbers in every tensor, those of batch statistics too."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape))
    return model.eval()


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_the_network_is_torchvisions_and_its_state_comes_back(name, tmp_path):
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    original = shake(network(name, **more))
    state = original.state_dict()
    assert is_state_dict(state) and name in NAMES
    size = 299 if name == "inception_v3" else 224
    model = build_foreign(name, state, tmp_path / "x.pth", "folder", spec_of(7, size)).eval()
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), original(x))
    assert model.train()(x).shape == (2, 7)  # some give auxiliary logits then
    given = plain_state(model, precision_of(state))
    assert list(given) == list(state)
    assert all(given[key].dtype == state[key].dtype and given[key].shape == state[key].shape for key in state)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_a_prediction_is_not_rounded_to_bfloat16(name):
    """Of rounded logits the two highest are often equal, and the lower class is taken."""
    model = build_foreign(name, network(name).state_dict(), "x.pth", "folder", spec_of(7))
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        of_training, logits = model.train()(x), model.eval()(x)
    assert of_training.dtype == torch.bfloat16  # as fast as before
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).any()


def test_a_first_layer_of_3x3_is_this_projects(tmp_path, capsys):
    from models import build_model

    state = build_model("resnet18", "cifar10", 7).state_dict()
    model = build_foreign("resnet18", state, tmp_path / "x.pth", "folder", spec_of(7, 32))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7) and "this project's network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("squeezenet1_1", lambda state: state, "another shape in classifier"),
        ("mobilenet_v2", lambda state: state, "lack"),
        ("squeezenet1_1", lambda state: {key: value * float("nan") for key, value in state.items()}, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(name, change, message):
    classes = 7 if "nan" in message or "finite" in message else 8
    with pytest.raises(UserError, match=message):
        build_foreign(name, change(network("squeezenet1_1").state_dict()), "x.pth", "folder", spec_of(classes))


def test_counters_of_batch_norm_that_an_older_torch_did_not_save_are_not_missed():
    state = {name: value for name, value in network("resnet18", 7).state_dict().items() if "tracked" not in name}
    model = build_foreign("resnet18", state, "x.pth", "folder", spec_of(7))
    network("resnet18", 7).load_state_dict(state)  # as torch does
    assert torch.equal(model.network.state_dict()["bn1.weight"], state["bn1.weight"])


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("resnet18", {"conv1.weight": torch.tensor(1.0)}),
        ("vit_b_16", {"encoder.pos_embedding": torch.zeros(3), "conv_proj.weight": torch.zeros(1, 1, 1, 1)}),
        ("vit_b_16", {"encoder.pos_embedding": torch.zeros(1, 197, 768), "conv_proj.weight": torch.tensor(1.0)}),
    ],
)
def test_weights_of_odd_shapes_are_refused(name, state):
    with pytest.raises(UserError, match="fit this network"):
        build_foreign(name, state, "x.pth", "folder", spec_of(7))


def test_a_vision_transformer_says_which_size_it_takes():
    state = {"encoder.pos_embedding": torch.zeros(1, 197, 768), "conv_proj.weight": torch.zeros(768, 3, 16, 16)}
    with pytest.raises(UserError, match="--image_size 224"):
        build_foreign("vit_b_16", state, "x.pth", "folder", spec_of(7, 32))


def test_a_network_that_images_are_too_small_for_is_refused():
    with pytest.raises(UserError, match="alexnet cannot be trained on images of 32 pixels"):
        build_foreign("alexnet", {"x": torch.zeros(1)}, "x.pth", "folder", spec_of(7, 32))


# In unlearn_relearn.py


@pytest.fixture(scope="module")
def place(fashion, tmp_path_factory):
    """A folder, its separated samples (by resnet10), and a model of another kind: root, words."""
    from conftest import run_cli

    root = tmp_path_factory.mktemp("foreign")
    write_folder(root / "data", fashion, train=40, test=5)
    words = ["--dataset", "folder", "--data_root", root / "data", "--output_root", root / "out"]
    assert run_cli("train_attack_noTrans.py", *words, "--model", "resnet10", "--epochs", 1) == 0
    path = root / "out/saved/backdoored_model/poison_rate_unknown/noTrans/folder_data/resnet10/unknown/0.tar"
    assert run_cli("separate_samples.py", *words, "--model", "resnet10", "--checkpoint_load", path) == 0
    torch.save(shake(network("mobilenet_v3_small", 10)).half().state_dict(), root / "theirs.pth")
    return root, words


def unlearn(cli, place, *more, model="mobilenet_v3_small", load="theirs.pth"):
    root, words = place
    samples = root / "out/saved/separated_samples/folder_data/resnet10/unknown_0.2_0.05"
    return cli("unlearn_relearn.py", *words, "--model", model, "--samples", samples, "--checkpoint_load", root / load,
               "--batch_size", 16, *more)  # fmt: skip


def test_a_plain_state_dict_is_cleaned_and_given_back_in_its_form(cli, place):
    root, _ = place
    result = unlearn(cli, place, "--epochs", 2, "--mean", 0.3, 0.3, 0.3, "--std", 0.3, 0.3, 0.3)
    assert result.code == 0 and "theirs_unlearn_purify.pth" in result.out, result.err
    theirs = load_tensors(root / "theirs.pth", "", "")
    cleaned = load_tensors(root / "theirs_unlearn_purify.pth", "", "")
    assert list(cleaned) == list(theirs) and all(cleaned[key].dtype == theirs[key].dtype for key in theirs)
    assert not torch.equal(cleaned["features.0.0.weight"], theirs["features.0.0.weight"])
    assert all(torch.isfinite(value).all() for value in cleaned.values() if value.is_floating_point())
    network("mobilenet_v3_small", 10).load_state_dict(cleaned)
    log = pd.read_csv(root / "unlearn_purify.csv")
    assert (
        log["epoch"].tolist() == [-1, 0, 1] and log["loss_Dp"].notna().sum() == 2 and "ACC" in log and "ASR" not in log
    )
    before = (root / "theirs.pth").read_bytes()

    one = unlearn(cli, place, "--epochs", 1, "--mean", 0.3, 0.3, 0.3, "--std", 0.3, 0.3, 0.3, "--checkpoint_save", root / "b.pth",
                  "--log", root / "b.csv")  # fmt: skip
    assert one.code == 0, one.err
    more = ["--epochs", 2, "--mean", 0.3, 0.3, 0.3, "--std", 0.3, 0.3, 0.3, "--log", root / "b.csv"]
    resumed = unlearn(cli, place, *more, load="b.tar")
    assert resumed.code == 0 and "Continuing after epoch 0" in resumed.out, resumed.err
    again = load_tensors(root / "b.pth", "", "")
    assert all(torch.equal(again[key], cleaned[key]) and again[key].dtype == theirs[key].dtype for key in cleaned)
    assert (root / "theirs.pth").read_bytes() == before


@pytest.mark.parametrize("kind", ["state_dict", "module", "compiled", "step"])
def test_a_state_dict_as_training_scripts_save_it_is_found(cli, place, kind):
    root, _ = place
    plain = load_tensors(root / "theirs.pth", "", "")
    content = {
        "state_dict": {"epoch": 3, "state_dict": plain},
        "module": {f"module.{name}": value for name, value in plain.items()},
        "compiled": {f"_orig_mod.module.{name}": value for name, value in plain.items()},
        "step": {"model": plain, "step": 1000, "optimizer": {}},
    }
    torch.save(content[kind], root / f"{kind}.pth")
    result = unlearn(cli, place, "--epochs", 1, "--log", root / f"{kind}.csv", load=f"{kind}.pth")
    assert result.code == 0 and f"{kind}.pth" in result.out and "take" in result.out, result.err
    assert list(load_tensors(root / f"{kind}_unlearn_purify.pth", "", "")) == list(plain)
    assert f"{kind}_unlearn_purify.pth" in json.loads((root / f"{kind}_unlearn_purify.json").read_text())["outputs"]


@pytest.mark.parametrize(("name", "said"), [("googlenet", True), ("resnet18", False)])
def test_an_input_that_the_network_may_rescale_by_itself_is_told(name, said, capsys):
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    state = torchvision.models.get_model(name, num_classes=10, **more).state_dict()
    build_foreign(name, state, "theirs.pth", "cifar10", DATASETS["cifar10"])
    assert ("give --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5" in capsys.readouterr().out) == said


def test_what_does_not_fit_is_refused_in_one_line(cli, place, tmp_path):
    root, _ = place
    own = root / "out/saved/backdoored_model/poison_rate_unknown/noTrans/folder_data/resnet10/unknown/0.tar"
    np.save(tmp_path / "x.npy", np.zeros(3))
    torch.save({"state_dict": {"a": torch.zeros(1)}}, root / "wrapped.pth")
    eighth = {name: value.to(torch.float8_e4m3fn) for name, value in network("resnet18", 10).state_dict().items()}
    torch.save(eighth, root / "eighth.pth")
    plain = load_tensors(root / "theirs.pth", "", "")
    mixed = {name: value.half() if value.ndim == 4 else value for name, value in plain.items()}
    mixed |= {name: value.float() for name, value in mixed.items() if value.ndim == 1}
    torch.save(mixed, root / "mixed.pth")
    torch.save(network("resnet18", 10), root / "pickled.pth")
    torch.save({name: value.to("meta") for name, value in plain.items()}, root / "meta.pth")
    sparse = {name: value.to_sparse() if value.ndim == 2 else value for name, value in plain.items()}
    torch.save(sparse, root / "sparse.pth")
    torch.save({"model": plain, "model_ema": plain}, root / "two.pth")
    (root / "damaged.pt").write_bytes(b"PK")
    for result, message in (
        (unlearn(cli, place, load="eighth.pth"), "are float8_e4m3fn; convert"),
        (unlearn(cli, place, load="mistyped.pth"), "no such file|names the state dict that is to be cleaned"),
        (unlearn(cli, place, model="resnet18"), "do not fit this network"),
        (unlearn(cli, place, "--checkpoint_save", root / "theirs.pth"), "must have different names"),
        (unlearn(cli, place, "--log", root / "w.csv", load="wrapped.pth"), "do not fit this network"),
        (unlearn(cli, place, load="mixed.pth"), "are float16 and float32; convert"),
        (unlearn(cli, place, "--log", root / "w.csv", load="meta.pth"), "they have no dense values in features"),
        (unlearn(cli, place, "--log", root / "w.csv", load="sparse.pth"), "they have no dense values in classifier"),
        (unlearn(cli, place, load="two.pth"), "holds 2 state dicts, 'model', 'model_ema'"),
        (unlearn(cli, place, load="pickled.pth"), "torch.save(model.state_dict(), FILE)"),
        (unlearn(cli, place, "--samples", tmp_path), f"no separated samples in {tmp_path}; "),
        (unlearn(cli, place, "--mean", 125.3, 123.0, 113.9), "--mean: 125.3 is out of range"),
        (unlearn(cli, place, "--std", 63, 62.1, 66.7), "--std: 63 is out of range"),
        (unlearn(cli, place, load="damaged.pt"), "torch.save(model.state_dict(), FILE)"),
        (unlearn(cli, place, model="resnet10", load=own), "written by"),
    ):
        assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
        assert any(part in result.err for part in message.split("|")), result.err


def test_without_samples_the_option_that_gives_them_is_named(cli, place):
    root, words = place
    more = ["--model", "mobilenet_v3_small", "--checkpoint_load", root / "theirs.pth", "--clean_ratio", 0.3]
    said = cli("unlearn_relearn.py", *words, *more)
    samples = root / "out/saved/separated_samples/folder_data/resnet10/unknown_0.3_0.05"
    refused(
        said, f"go with --samples, such as {samples}, made with: python separate_samples.py", "--model resnet10", "0.3"
    )
    assert "--target_type" not in said.err and "--seed" not in said.err  # nor another option that is at its default


def test_samples_of_another_size_are_told_by_the_option(cli, place):
    refused(unlearn(cli, place, "--image_size", 64), "made with no --image_size", "asked for --image_size 64")


def test_weights_beyond_the_precision_they_are_given_back_in_are_refused():
    model = build_foreign("squeezenet1_1", network("squeezenet1_1").state_dict(), "x.pth", "folder", spec_of(7))
    with torch.no_grad():
        model.network.classifier[1].weight[0, 0] = 70_000.0  # float16 ends at 65 504
    with pytest.raises(UserError, match=r"too large for float16.*\(classifier.1.weight\).*float32"):
        plain_state(model, "float16")
    assert plain_state(model, "bfloat16")["classifier.1.weight"][0, 0].isfinite()


@pytest.mark.parametrize("tested", [True, False], ids=["test images", "none"])
def test_a_network_that_has_diverged_is_no_result(cli, place, tmp_path, tested):
    """Its weights are finite, its outputs are not: `argmax` of these is class 0."""
    root, words = place
    state = network("mobilenet_v3_small", 10).state_dict()
    state["classifier.0.bias"].fill_(1e30)
    state["classifier.3.weight"].fill_(1e30)
    torch.save(state, tmp_path / "diverged.pth")
    if not tested:
        shutil.copytree(root / "data/train", tmp_path / "data/train")
        words = [*words, "--data_root", tmp_path / "data"]
    said = unlearn(cli, (root, words), "--epochs", 1, load=tmp_path / "diverged.pth")
    refused(said, "outputs are not finite for")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["diverged.pth"]


def test_the_epoch_that_held_out_samples_choose_is_there_as_a_state_dict_too(cli, place, tmp_path):
    words = ["--val_ratio", 0.2, "--checkpoint_save", tmp_path / "v.pth", "--epochs"]
    result = unlearn(cli, place, *words, 2, "--unlearn_batch_size", 8)
    assert result.code == 0, result.err
    log = pd.read_csv(tmp_path / "unlearn_purify.csv")
    best = log["val_score"].idxmax()  # its row, of which the first is the model before
    assert f"choose epoch {best} " in result.out and str(tmp_path / "v_val.pth") in result.out
    for name in ("v", "v_val"):
        state = load_tensors(tmp_path / f"{name}.tar", "", "")["model"]
        plain = load_tensors(tmp_path / f"{name}.pth", "", "")
        assert all(torch.equal(state[f"network.{key}"].to(value.dtype), value) for key, value in plain.items())
    assert {"v.pth", "v_val.pth"} <= json.loads((tmp_path / "v.json").read_text())["outputs"].keys()


def test_nothing_of_others_is_replaced_unasked(cli, place, tmp_path):
    notes, theirs, other = (tmp_path / name for name in ("notes.csv", "model.pth", "0.tar"))
    notes.write_text("what,I\nsaw,here\n")
    theirs.write_bytes(b"mine")
    other.write_bytes(b"mine too")
    (tmp_path / "options.json").write_text(json.dumps({"outputs": {"0.tar": ""}}))
    for more, message in (
        (["--log", notes, "--checkpoint_save", tmp_path / "x.pth"], "notes.csv is there already"),
        (["--checkpoint_save", theirs], "model.pth is there already"),
        (["--checkpoint_save", other], "0.tar is of the run that"),
    ):
        refused(unlearn(cli, place, "--epochs", 1, *more), message, "--overwrite")
    assert theirs.read_bytes() == b"mine" and notes.read_text().startswith("what") and other.read_bytes() == b"mine too"


def test_a_finished_run_that_is_asked_to_write_elsewhere_says_that_it_will_not(cli, place, tmp_path):
    words = ["--epochs", 1, "--checkpoint_save"]
    assert unlearn(cli, place, *words, tmp_path / "a.pth").code == 0
    (tmp_path / "elsewhere").mkdir()
    for place_of_it in (tmp_path / "b.pth", tmp_path / "elsewhere/a.pth"):
        said = unlearn(cli, place, *words, place_of_it, "--log", tmp_path / "b.csv", load=tmp_path / "a.tar")
        refused(said, "all 1 epochs are done", "larger --epochs")
        assert not place_of_it.exists() and not (tmp_path / "b.csv").exists()
