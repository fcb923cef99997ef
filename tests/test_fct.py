"""FCT against a plain loop over single images; the thresholds and the three sets."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from test_bad_input import refused
from test_pipeline import TUNED

from models import build_model
from utils.datasets import DATASETS
from utils.device import Runtime
from utils.errors import UserError
from utils.fct import AUTO, combine, compute_fct, near_a_gamma
from utils.loading import load_dataset
from utils.metrics import auroc
from utils.paths import ROOT
from utils.seeding import generator
from utils.separation import (
    CLEAN,
    POISON,
    clean_of_labels,
    confine,
    gammas_of_distribution,
    gammas_of_ratios,
    ratio_of,
    separate,
    set_sizes,
    share_of,
    two_groups,
)
from utils.transforms import Tau

CPU = Runtime(torch.device("cpu"), torch.float32)
SPEC = DATASETS["fashion"]
COUNT = 24


@pytest.fixture(scope="module")
def images():
    return load_dataset("fashion", ROOT / "dataset").train_images[:COUNT]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model("resnet10", "fashion", 10)
    for module in model.modules():  # running statistics that differ from those of any batch
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def slow_fct(model, images, trans1, trans2, seed, draw):
    """One image at a time; returns the values and the norms of the features."""
    tau = Tau(trans1, trans2, 32)
    table = tau.draw(generator(seed, "tau", draw), len(images))
    values, norms = [], []
    for row, image in enumerate(images):
        picture = torch.tensor(image).permute(2, 0, 1)[None]
        changed = tau.apply(picture, {name: value[row : row + 1] for name, value in table.items()})
        plain, other = (
            model.features(TF.normalize(part / 255, SPEC.mean, SPEC.std))[0].double() for part in (picture, changed)
        )
        values.append(float(sum((plain - other) ** 2) / len(plain)))
        norms.append(float(plain.norm()))
    return np.array(values), np.array(norms)


def slow_combine(values):
    """Sample by sample: the largest number of median absolute deviations that log FCT lies above its median."""

    def middle(numbers):
        ordered = sorted(numbers)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    result = []
    for sample in range(len(values[0])):
        best = None
        for of_tau in values:
            logs = [math.log(value) for value in of_tau if value > 0]
            if of_tau[sample] > 0:
                deviation = middle([abs(value - middle(logs)) for value in logs]) or 1.0
                away = (math.log(of_tau[sample]) - middle(logs)) / deviation
                best = away if best is None else max(best, away)
        result.append(0.0 if best is None else math.exp(min(max(best, -80), 80)))
    return result


def test_auto_combines_its_taus_as_the_loop_does(model, images):
    found, _ = compute_fct(model, images, SPEC, CPU, trans1="auto", seed=3, draws=2)
    single = [sum(slow_fct(model, images, *names, seed=3, draw=draw)[0] for draw in range(2)) / 2 for names in AUTO]
    assert len(single) > 1
    np.testing.assert_allclose(found, slow_combine(single), rtol=1e-3)


def test_combine_with_zeros_equal_values_and_outliers():
    values = np.exp(np.random.default_rng(0).normal(0, 1, (3, 41))).astype(np.float32)
    values[0, :30] = 0  # a collapsed tau
    values[:, 5] = 0
    values[1, 7] = 1e30
    values[2] = 0.25  # a tau that tells nothing: no spread
    values[2, 5] = 0
    found = combine(values)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found, slow_combine(values.astype(float).tolist()), rtol=1e-4)
    assert found[5] == 0 and found.argmax() == 7
    assert (combine(np.zeros((2, 9), np.float32)) == 0).all()


def test_combine_keeps_what_is_not_finite_so_that_it_is_refused():
    values = np.exp(np.random.default_rng(0).normal(0, 1, (2, 40))).astype(np.float32)
    finite = combine(values[:, 2:])
    values[0, 0], values[1, 1] = np.nan, np.inf
    found = combine(values)
    assert np.isnan(found[:2]).all()
    np.testing.assert_array_equal(found[2:], combine(np.where(np.isfinite(values), values, 0))[2:])
    assert np.isfinite(finite).all()


def test_features_that_overflow_stop_step_3_under_auto_too(cli, words, copy):
    path = max((copy / "saved/backdoored_model").rglob("noTrans_ftsimi/**/1.tar"))
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["model"] if name.startswith("layer4") and name.endswith("bn2.weight"))
    content["model"][name] *= 1e38
    torch.save(content, path.with_name("huge.tar"))
    for tau in (["--trans1", "flip", "--trans2", "none"], ["--trans1", "auto"]):
        said = cli("calculate_consistency.py", *words(copy), *tau, "--checkpoint_load", path.with_name("huge.tar"))
        assert said.code == 2 and "FCT is not finite for" in said.err
    assert not path.with_name("huge_all.txt").exists()


def test_a_tau_that_breaks_the_trigger_decides_whichever_it_is():
    rng = np.random.default_rng(1)
    for breaks in (0, 1):
        fct = np.exp(rng.normal(0, 1, (2, 1000))) * np.array([[1.0], [50.0]])  # of different size in the mean
        fct[breaks, :100] *= np.exp(8)
        assert auroc(combine(fct.astype(np.float32)), np.arange(1000) < 100) > 0.99


@pytest.mark.parametrize(
    "pair",
    [("rotate", "affine"), ("flip", "none"), ("crop", "erase"), ("blur", "shrink"), ("vflip", "none")],
    ids="+".join,
)
def test_fct_equals_a_loop_over_single_images(model, images, pair):
    fct, norms = compute_fct(model, images, SPEC, CPU, trans1=pair[0], trans2=pair[1], seed=3)
    values, lengths = slow_fct(model, images, *pair, seed=3, draw=0)
    assert fct.dtype == norms.dtype == np.float32
    np.testing.assert_allclose(fct, values, rtol=1e-4)
    np.testing.assert_allclose(norms, lengths, rtol=1e-4)
    assert fct.min() > 0


def test_tau_is_rotation_and_shift_unless_said_otherwise(model, images):
    np.testing.assert_allclose(
        compute_fct(model, images, SPEC, CPU)[0], slow_fct(model, images, "rotate", "affine", 0, 0)[0], rtol=1e-4
    )


def test_several_draws_are_the_mean_of_single_ones(model, images):
    singles = [slow_fct(model, images, "rotate", "affine", 1, draw)[0] for draw in range(3)]
    fct, _ = compute_fct(model, images, SPEC, CPU, seed=1, draws=3)
    np.testing.assert_allclose(fct, np.mean(singles, axis=0), rtol=1e-4)
    assert abs(singles[0] - singles[1]).max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 7, 23])
def test_fct_does_not_depend_on_the_batch_size(model, images, batch_size):
    expected, _ = compute_fct(model, images, SPEC, CPU)
    np.testing.assert_allclose(compute_fct(model, images, SPEC, CPU, batch_size=batch_size)[0], expected, rtol=1e-4)


def test_fct_of_a_sample_depends_on_its_index_and_on_no_other_sample(model, images):
    expected, norms = compute_fct(model, images, SPEC, CPU)
    others = images[::-1].copy()
    others[5] = images[5]
    fct, _ = compute_fct(model, others, SPEC, CPU)
    assert fct[5] == pytest.approx(expected[5], rel=1e-4)
    moved, moved_norms = compute_fct(model, images[::-1].copy(), SPEC, CPU)
    np.testing.assert_allclose(moved_norms[::-1], norms, rtol=1e-4)
    assert (abs(moved[::-1] - expected) > 1e-3 * expected).mean() > 0.8


def test_some_samples_have_the_fct_that_they_have_among_all(model, images):
    rows = np.arange(1, COUNT, 5)
    some, _ = compute_fct(model, images[rows], SPEC, CPU, draws=2, indices=rows)
    np.testing.assert_allclose(some, compute_fct(model, images, SPEC, CPU, draws=2)[0][rows], rtol=1e-4)


def test_fct_depends_on_the_seed_and_on_no_global_generator(model, images):
    expected, _ = compute_fct(model, images, SPEC, CPU)
    torch.manual_seed(77)
    np.random.seed(77)
    np.testing.assert_array_equal(compute_fct(model, images, SPEC, CPU)[0], expected)
    assert (compute_fct(model, images, SPEC, CPU, seed=1)[0] != expected).mean() > 0.8


def test_fct_is_taken_in_evaluation_mode_and_leaves_the_network_as_it_was(model, images):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected, _ = compute_fct(model.eval(), images, SPEC, CPU)
    fct, _ = compute_fct(model.train(), images, SPEC, CPU)
    np.testing.assert_array_equal(fct, expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_in_bfloat16_the_samples_near_a_threshold_have_their_float32_values(model):
    images = load_dataset("fashion", ROOT / "dataset").train_images[:400]
    exact, _ = compute_fct(model, images, SPEC, CPU)
    rounded, norms = compute_fct(model, images, SPEC, Runtime(CPU.device, torch.bfloat16))
    ranks = np.argsort(np.argsort(rounded))
    near = (abs(ranks - 80) <= 2) | (abs(ranks - 380) <= 2)
    far = (abs(ranks - 80) > 8) & (abs(ranks - 380) > 8)
    np.testing.assert_allclose(rounded[near], exact[near], rtol=1e-4)
    assert np.median(abs(rounded / exact - 1)[far]) > 1e-3
    assert norms.shape == (400,)


def test_near_a_gamma_are_the_ranks_beside_both_splits_less_what_is_zero():
    rng = np.random.default_rng(0)
    fct = rng.permutation(1000).astype(np.float32)
    assert sorted(fct[near_a_gamma(fct)]) == [*range(190, 210), *range(940, 960)]
    collapsed = np.where(fct < 500, 0, fct).astype(np.float32)
    assert sorted(collapsed[near_a_gamma(collapsed)]) == [*range(940, 960)]


def test_fct_of_an_image_that_tau_leaves_alone_is_zero(model, images):
    assert (compute_fct(model, images, SPEC, CPU, trans1="none", trans2="none")[0] == 0).all()


# Thresholds and sets


def distinct(count=100, seed=0):
    return np.random.default_rng(seed).permutation(np.arange(1, count + 1)).astype(np.float32) / 7


def tied(zeros, count=1000):
    """``zeros`` exact zeros among distinct positive values, shuffled."""
    return np.random.default_rng(2).permutation(np.maximum(np.arange(count) - zeros + 1, 0)).astype(np.float32)


def split(fct, clean_ratio=0.2, poison_ratio=0.05, seed=0, gammas=None):
    low, high = gammas or gammas_of_ratios(fct, clean_ratio, poison_ratio)
    flags = separate(fct, low, high, clean_ratio, poison_ratio, seed)
    assert flags.shape == fct.shape and set(flags.tolist()) <= {0, 1, 2}
    return [np.flatnonzero(flags == flag) for flag in (0, 1, 2)]


@pytest.mark.parametrize(
    ("count", "ratio", "size"),
    [(100, 0.29, 29), (50000, 0.05, 2500), (100, 0.57, 57), (1000, 0.001, 1), (9, 0.5, 4), (10, 0.199, 1)],
)
def test_set_sizes_are_the_exact_floor(count, ratio, size):
    assert set_sizes(count, ratio, 0.2)[0] == size
    assert set_sizes(count, 0.2, ratio)[1] == size


@pytest.mark.parametrize(("ratios", "name"), [((0.01, 0.5), "clean_ratio"), ((0.5, 0.01), "poison_ratio")])
def test_a_ratio_of_less_than_one_sample_is_refused(ratios, name):
    with pytest.raises(UserError, match=name):
        set_sizes(50, *ratios)
    with pytest.raises(UserError, match=name):
        gammas_of_ratios(distinct(50), *ratios)


@pytest.mark.parametrize("ratios", [(0.2, 0.05), (0.29, 0.29), (0.5, 0.5), (0.01, 0.01), (0.07, 0.93)], ids=str)
def test_without_ties_the_sets_are_the_lowest_and_the_highest_values(ratios):
    fct = distinct()
    clean, uncertain, poison = split(fct, *ratios)
    n_clean, n_poison = (round(100 * ratio) for ratio in ratios)
    assert sorted(clean) == sorted(np.argsort(fct)[:n_clean])
    assert sorted(poison) == sorted(np.argsort(fct)[100 - n_poison :])
    assert len(uncertain) == 100 - n_clean - n_poison


def test_gammas_are_members_of_their_sets():
    fct = np.arange(1, 101, dtype=np.float32)
    assert gammas_of_ratios(fct, 0.2, 0.05) == (20.0, 96.0)


@pytest.mark.parametrize("zeros", [200, 201, 500, 900, 960, 999, 1000])
def test_with_massive_ties_the_sets_keep_the_size_of_their_ratio_and_share_no_sample(zeros):
    fct = tied(zeros)
    clean, uncertain, poison = split(fct)
    assert (len(clean), len(uncertain), len(poison)) == (200, 750, 50)
    assert (fct[clean] == 0).all()
    assert fct[poison].min() >= fct[uncertain].max()
    assert set(poison) >= set(np.flatnonzero(fct > 0)[np.argsort(fct[fct > 0])][-50:])


def test_ties_at_both_thresholds_leave_the_sets_their_sizes():
    fct = np.repeat(np.array([0, 1, 5], dtype=np.float32), (400, 200, 400))
    clean, _, poison = split(fct)
    assert (len(clean), len(poison)) == (200, 50)
    assert (fct[clean] == 0).all() and (fct[poison] == 5).all()


@pytest.mark.parametrize("ratios", [(0.2, 0.05), (0.5, 0.5)], ids=str)
def test_equal_values_are_separated_by_a_draw(ratios):
    clean, uncertain, poison = split(np.zeros(100, dtype=np.float32), *ratios)
    assert (len(clean), len(poison)) == tuple(round(100 * ratio) for ratio in ratios)
    assert len(clean) + len(uncertain) + len(poison) == 100
    assert clean.max() > 60 and clean.min() < 40  # not simply the first samples


def test_the_draw_among_ties_is_a_function_of_the_seed():
    fct = tied(600)
    first, again, other = (split(fct, seed=seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[2], again[2])
    assert set(first[0]) != set(other[0])
    np.testing.assert_array_equal(first[2], other[2])  # no tie at the upper threshold
    everything = tied(1000)
    assert set(split(everything, seed=4)[2]) != set(split(everything, seed=5)[2])


def test_a_threshold_stricter_than_its_ratio_gives_a_smaller_set():
    fct = np.arange(1, 101, dtype=np.float32)
    clean, _, poison = split(fct, gammas=(10.0, 99.0))
    np.testing.assert_array_equal(fct[clean], np.arange(1, 11))
    np.testing.assert_array_equal(fct[poison], [99, 100])


def test_a_threshold_laxer_than_its_ratio_gives_a_larger_set():
    fct = np.arange(1, 101, dtype=np.float32)
    clean, _, poison = split(fct, gammas=(40.5, 60.0))
    np.testing.assert_array_equal(fct[clean], np.arange(1, 41))
    np.testing.assert_array_equal(fct[poison], np.arange(60, 101))


def test_a_threshold_at_a_tie_of_zeros_gives_the_size_of_the_ratio():
    fct = tied(600)
    clean, _, poison = split(fct, gammas=(0.0, 399.0))
    assert len(clean) == 200 and (fct[clean] == 0).all()
    np.testing.assert_array_equal(np.sort(fct[poison]), [399, 400])


def test_fewer_ties_than_the_ratio_asks_for_are_all_taken():
    fct = tied(30)
    assert sorted(split(fct, gammas=(0.0, 900.0))[0]) == np.flatnonzero(fct == 0).tolist()


def test_samples_beyond_a_threshold_are_always_taken():
    fct = np.repeat(np.array([0, 1, 2, 3], dtype=np.float32), (10, 50, 30, 10))
    clean, _, poison = split(fct, gammas=(1.0, 2.0))
    assert len(clean) == 20 and set(range(10)) <= set(clean)  # ten zeros, and ten of the fifty ones by draw
    assert set(range(90, 100)) <= set(poison)


def test_thresholds_that_overlap_are_refused():
    with pytest.raises(UserError, match="gamma_low"):
        separate(distinct(), 2.0, 1.0, 0.2, 0.05, 0)


@pytest.mark.parametrize(("gammas", "name"), [((-1.0, 5.0), "D_c"), ((5.0, 1e6), "D_p")])
def test_thresholds_that_leave_a_set_empty_are_refused(gammas, name):
    with pytest.raises(UserError, match=name):
        separate(distinct(), *gammas, 0.2, 0.05, 0)


def test_with_labels_every_label_gives_its_share_of_lowest_values_to_the_clean_set():
    fct, labels = distinct(), np.repeat(np.arange(4), (10, 20, 30, 40))
    low, high = gammas_of_ratios(fct, 0.29, 0.05)
    flags = separate(fct, low, high, 0.29, 0.05, 0, labels=labels)
    poison = np.argsort(fct)[95:]
    assert set(np.flatnonzero(flags == 2)) == set(poison)
    for label, size in enumerate((2, 5, 8, 11)):
        rows = np.flatnonzero(labels == label)
        lowest = set(rows[np.argsort(fct[rows])][:size])
        assert set(np.flatnonzero((flags == 0) & (labels == label))) == lowest - set(poison)


def test_even_takes_no_more_of_a_label_than_of_the_median_one():
    fct, labels = distinct(), np.repeat(np.arange(4), (10, 20, 30, 40))
    low, high = gammas_of_ratios(fct, 0.29, 0.05)
    share, even = (separate(fct, low, high, 0.29, 0.05, 0, labels=labels, even=even) for even in (False, True))
    np.testing.assert_array_equal(np.flatnonzero(share == 2), np.flatnonzero(even == 2))
    for label, size in enumerate((2, 5, 7, 7)):  # the median of the sizes is 25
        rows = np.flatnonzero(labels == label)
        lowest = set(rows[np.argsort(fct[rows])][:size])
        assert set(np.flatnonzero((even == 0) & (labels == label))) == lowest - set(np.flatnonzero(even == 2))


def test_even_goes_by_the_median_and_not_by_the_mean():
    fct, labels = distinct(), np.repeat(np.arange(4), (5, 15, 20, 60))
    low, high = gammas_of_ratios(fct, 0.4, 0.05)
    even = separate(fct, low, high, 0.4, 0.05, 0, labels=labels, even=True)
    for label, size in enumerate((2, 6, 7, 7)):  # 0.4 of 17.5, the median; of 25, the mean, it would be 10
        rows = np.flatnonzero(labels == label)
        lowest = set(rows[np.argsort(fct[rows])][:size])
        assert set(np.flatnonzero((even == 0) & (labels == label))) == lowest - set(np.flatnonzero(even == 2))


def test_with_labels_a_sample_taken_as_poisoned_is_never_taken_as_clean():
    fct, labels = np.arange(100, dtype=np.float32), np.repeat([0, 1], (90, 10))  # all of label 1 is poisoned
    flags = separate(fct, 19.0, 90.0, 0.2, 0.1, 0, labels=labels)
    assert (flags[90:] == 2).all()
    np.testing.assert_array_equal(np.flatnonzero(flags == 0), np.arange(18))


def test_what_another_poisoned_set_leaves_of_a_label_goes_into_the_clean_set():
    fct, labels = distinct(), np.repeat(np.arange(4), (10, 20, 30, 40))
    fct[labels == 1] += 1000  # a label that tau upsets: D_p by FCT takes some of what its share would be
    low, high = gammas_of_ratios(fct, 0.85, 0.15)
    by_fct = separate(fct, low, high, 0.85, 0.15, 0, labels=labels)
    assert ((by_fct == CLEAN) & (labels == 1)).sum() == 5  # of 17
    confined = confine(by_fct, fct, labels == 3, 0.15, 0)
    flags = clean_of_labels(confined, fct, labels, 0.85, 0)
    np.testing.assert_array_equal(flags == POISON, confined == POISON)
    for label, size in enumerate((8, 17, 25, 34)):
        rows = np.flatnonzero(labels == label)
        lowest = set(rows[np.argsort(fct[rows])][:size])
        assert set(np.flatnonzero((flags == CLEAN) & (labels == label))) == lowest - set(
            np.flatnonzero(flags == POISON)
        )


@pytest.mark.parametrize(("ratio", "reason"), [(0.2, "lies in D_p"), (0.01, "less than one sample")])
def test_why_no_label_gives_anything_is_said(ratio, reason):
    labels = np.arange(100) % 10
    with pytest.raises(UserError, match=reason):
        separate(distinct(), 0.0, 0.0 if ratio == 0.2 else 14.0, ratio, 0.05, 0, labels=labels)


def test_no_set_is_silently_empty_where_both_thresholds_are_one_tied_value():
    fct = np.repeat(np.array([0, 1], dtype=np.float32), (30, 70))
    assert [len(part) for part in split(fct, gammas=(1.0, 1.0))] == [95, 0, 5]


def test_where_a_gamma_given_by_hand_lies_beyond_the_ratio_all_values_equal_to_it_are_taken():
    values = np.array([0.0] * 20 + [1.0] * 30 + [2.0] * 35 + [3.0] * 10 + [4.0] * 5, dtype=np.float32)
    flags = separate(values, 1.0, 3.0, 0.2, 0.05, 0)  # 20 lie below, 5 above: as many as the ratios give
    assert [(flags[values == value] == 0).mean() for value in range(5)] == [1, 1, 0, 0, 0]
    assert [(flags[values == value] == 2).mean() for value in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("count", [20, 60])
def test_a_network_that_has_collapsed_has_fct_zero_in_bfloat16_too(count):
    model = build_model("resnet10", "fashion", 10)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    fct, norms = compute_fct(model, np.zeros((count, 32, 32, 3), np.uint8), SPEC, runtime)
    assert not fct.any() and not norms.any()


def test_values_of_another_precision_are_computed_anew(copy, words, cli):
    said = cli("separate_samples.py", *words(copy), "--precision", "bfloat16", "--overwrite")
    assert said.code == 0 and "computing them" in said.out
    same = cli("visualize_consistency.py", *words(copy), "--precision", "float32")
    assert same.code == 0 and "computing them" not in same.out


@pytest.mark.parametrize("script", ["calculate_consistency.py", "separate_samples.py"])
def test_float32_is_what_auto_takes_for_fct_and_no_other_work(script, copy, words, cli):
    assert cli(script, *words(copy), "--precision", "float32").code == 0
    refused(cli(script, *words(copy), "--precision", "bfloat16"), "--precision bfloat16", "--overwrite")


def test_step_4_takes_no_values_of_a_network_that_was_replaced(copy, words, cli):
    path, other = (copy / TUNED / name for name in ("1.tar", "0.tar"))
    path.unlink()
    path.write_bytes(other.read_bytes())
    refused(cli("calculate_gamma.py", *words(copy)), "has been replaced since")


def test_step_3_that_sees_no_backdoor_leaves_no_order(copy, words, cli):
    stale = copy / TUNED / "1_order.npy"
    np.save(stale, np.ones(400, np.float32))
    assert cli("calculate_consistency.py", *words(copy), "--overwrite").code == 0 and not stale.exists()


def test_a_tau_that_changes_nothing_is_refused(copy, words, cli):
    for name in ("none", "flip", "vflip"):
        said = cli("calculate_consistency.py", *words(copy), "--trans1", name, "--trans2", name)
        refused(said, f"{name} --trans2 {name}", "every FCT is zero")


@pytest.mark.parametrize(("count", "whole"), [(189, 2000), (1, 300), (5, 70000), (2, 3)])
def test_a_ratio_takes_the_count_it_was_made_of(count, whole):
    assert share_of(ratio_of(count, whole), whole) == count


def test_two_groups_with_a_shallow_valley_are_one_and_gamma_p_is_certain():
    rng = np.random.default_rng(0)

    def values(distance):
        return np.exp(np.r_[rng.normal(0, 1, 4000), rng.normal(distance, 1, 4000)]).astype(np.float32)

    assert gammas_of_distribution(values(2.5)) is None
    # Of two equal normal distributions the upper one is nine times as likely ln(9) / 5 above the middle.
    assert np.log(gammas_of_distribution(values(5))["gamma_high"]) == pytest.approx(2.5 + np.log(9) / 5, abs=0.1)


def test_values_most_of_which_are_equal_have_no_two_groups():
    for count in (4, 60):  # above every quantile lie four values, or none
        values = np.r_[np.full(100 - count, 0.1), np.full(count, 0.2)].astype(np.float32)
        assert two_groups(np.log(values).astype(np.float64))[1] is None and gammas_of_distribution(values) is None


def test_gamma_low_does_not_count_where_every_label_gives_its_share():
    fct, labels = np.arange(100.0), np.arange(100) % 10
    flags = separate(fct, 39.0, 30.0, 0.4, 0.05, 0, labels)
    assert (flags == POISON).sum() == 70 and (flags == CLEAN).sum() == 30
