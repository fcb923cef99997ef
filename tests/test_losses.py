"""The losses against slow loops written from the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SameBatches
from torch import nn

from models.resnet import SupConResNet
from ST.losses import SupConLoss, authors_mask, contrastive, mixed_cross_entropy, trusted_mask
from utils.device import choose_runtime
from utils.engine import train_epoch
from utils.losses import ASCENT_BOUND, cross_entropy, intra_class, intra_class_loss, negative_cross_entropy


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


# L_intra and the cross-entropies


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 9], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_intra_class_loss_equals_a_double_loop(labels):
    features = randn(8, 16) + 0.5
    classes = sorted(set(labels))
    means = {}
    for label in classes:
        rows = [features[row].double() for row in range(8) if labels[row] == label]
        means[label] = sum(rows) / len(rows)
    total = 0.0
    for one in classes:
        for two in classes:
            if one != two:
                total += float(means[one] @ means[two] / (means[one].norm() * means[two].norm()))
    result = intra_class_loss(features, torch.tensor(labels), 10)
    assert result.item() == pytest.approx(total / len(classes) ** 2, abs=1e-6)


def test_intra_class_loss_keeps_its_precision_under_autocast():
    features, labels = (
        1 + 0.01 * randn(64, 32),
        torch.arange(64) % 10,
    )  # cosines near one, as when the features collapse
    features.requires_grad_()
    expected = torch.autograd.grad(intra_class_loss(features, labels, 10), features)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = intra_class_loss(features, labels, 10)
    assert loss.item() == pytest.approx(intra_class_loss(features, labels, 10).item(), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0], expected)


def test_intra_class_loss_of_equal_class_means_counts_the_pairs_of_different_classes():
    assert intra_class_loss(torch.ones(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), 3).item() == pytest.approx(6 / 9)


def test_intra_class_loss_of_a_single_class_has_no_pair():
    features = randn(4, 8).requires_grad_()
    loss = intra_class_loss(features, torch.full((4,), 3), 10)
    loss.backward()
    assert loss.item() == 0 and features.grad.abs().max() < 1e-6


def test_intra_class_objective_reads_the_features_and_logs_their_norm():
    model = nn.Module()
    model.features, model.fc = nn.Flatten(), nn.Linear(12, 3)
    inputs, labels = randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    loss, sums = intra_class(model, inputs, labels)
    torch.testing.assert_close(loss, intra_class_loss(inputs.flatten(1), labels, 3))
    assert sums["feature_norm"].item() == pytest.approx(sum(image.norm().item() for image in inputs), rel=1e-5)
    assert sums["correct"] == (model.fc(inputs.flatten(1)).argmax(1) == labels).sum()


def test_negative_cross_entropy_has_the_opposite_value_and_gradient():
    model = nn.Linear(5, 4)
    inputs, labels = randn(7, 5), torch.arange(7) % 4
    found = []
    for objective in (cross_entropy, negative_cross_entropy):
        model.zero_grad()
        loss, sums = objective(model, inputs, labels)
        loss.backward()
        found.append((loss.detach(), model.weight.grad.clone(), model.bias.grad.clone()))
        assert sums["correct"] == (model(inputs).argmax(1) == labels).sum()
    torch.testing.assert_close(found[0][0], -found[1][0])
    for up, down in zip(found[0][1:], found[1][1:], strict=True):
        assert up.abs().sum() > 0 and torch.equal(up, -down)
    torch.testing.assert_close(found[0][0], F.cross_entropy(model(inputs), labels))


def test_the_guard_of_the_ascent_holds_the_samples_beyond_it_and_no_others():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    inputs = torch.tensor([[0.0, 99.0], [0.0, 101.0], [3.0, 1.0]])  # cross-entropy for label 0: 99, 101, small
    loss, sums = negative_cross_entropy(model, inputs, torch.zeros(3, dtype=torch.int64))
    each = F.cross_entropy(model(inputs), torch.zeros(3, dtype=torch.int64), reduction="none")
    assert sums["at_bound"] == 1
    _, sums = negative_cross_entropy(model, inputs, torch.zeros(3, dtype=torch.int64), bound=each[0].item())
    assert sums["at_bound"] == 1  # what lies at the bound is not beyond it
    torch.testing.assert_close(loss, -(each[0] + ASCENT_BOUND + each[2]) / 3)
    loss.backward()
    guarded = model.weight.grad.clone()
    model.zero_grad()
    (-F.cross_entropy(model(inputs[[0, 2]]), torch.zeros(2, dtype=torch.int64), reduction="sum") / 3).backward()
    torch.testing.assert_close(guarded, model.weight.grad)


# The supervised contrastive loss


def slow_supcon(features, mask, temperature, base_temperature):
    count, views, _ = features.shape
    points = [(sample, view) for sample in range(count) for view in range(views)]

    def power(one, two):
        return math.exp(float(features[one].double() @ features[two].double()) / temperature)

    total = 0.0
    for anchor in points:
        rest = [point for point in points if point != anchor]
        denominator = sum(power(anchor, point) for point in rest)
        positives = [point for point in rest if mask[anchor[0]][point[0]]]
        terms = [-math.log(power(anchor, point) / denominator) for point in positives]
        total += sum(terms) / len(positives)
    return temperature / base_temperature * total / len(points)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperatures", [(0.1, 0.07), (0.5, 0.5)], ids=str)
def test_supcon_loss_equals_the_formula(views, temperatures):
    features = unit(7, views, 12)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 1])
    mask = trusted_mask(labels, torch.tensor([1, 1, 1, 1, 0, 0, 1]).bool())
    result = SupConLoss(*temperatures)(features, mask)
    assert result.item() == pytest.approx(slow_supcon(features, mask.tolist(), *temperatures), rel=1e-5)


def test_supcon_loss_keeps_its_precision_under_autocast():
    features, mask = unit(7, 2, 12), torch.eye(7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        loss = SupConLoss()(features, mask)
    assert loss.item() == pytest.approx(slow_supcon(features, mask.tolist(), 0.1, 0.07), rel=1e-5)


def test_contrastive_network_gives_float32_vectors_of_length_one_under_autocast():
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = SupConResNet("resnet10")(randn(4, 3, 32, 32))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


def test_supcon_loss_takes_the_documented_temperatures():
    features, mask = unit(5, 2, 8), torch.eye(5, dtype=torch.bool)
    assert SupConLoss()(features, mask).item() == pytest.approx(slow_supcon(features, mask, 0.1, 0.07), rel=1e-5)


def test_supcon_loss_without_a_mask_is_simclrs():
    features = unit(6, 2, 10)
    flat = torch.cat([features[:, 0], features[:, 1]])
    logits = flat @ flat.T / 0.1
    logits.fill_diagonal_(-math.inf)
    partner = torch.arange(12).roll(6)
    expected = F.cross_entropy(logits, partner) * 0.1 / 0.07
    torch.testing.assert_close(SupConLoss()(features), expected)


def test_supcon_loss_is_finite_where_all_features_are_equal():
    features = torch.ones(4, 2, 1).requires_grad_()
    loss = SupConLoss()(features)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7) * 0.1 / 0.07, rel=1e-5)
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 8), (4, 1, 8), (4, 2, 3, 8)])
def test_supcon_loss_refuses_features_of_another_shape(shape):
    with pytest.raises(ValueError, match="features"):
        SupConLoss()(unit(*shape))


@pytest.mark.parametrize("shape", [(8, 8), (4,), (4, 5)])
def test_supcon_loss_refuses_a_mask_of_another_shape(shape):
    with pytest.raises(ValueError, match="mask"):
        SupConLoss()(unit(4, 2, 8), torch.ones(shape, dtype=torch.bool))


def test_the_authors_mask_lets_an_untrusted_sample_be_a_positive_of_a_trusted_one():
    labels, trusted = torch.tensor([3, 3, 3, 4]), torch.tensor([True, False, True, False])
    found = authors_mask(labels, trusted).tolist()
    for i in range(4):
        for j in range(4):
            assert found[i][j] == (i == j or (bool(trusted[i]) and int(labels[i]) == int(labels[j])))
    assert found[0][1] and not trusted_mask(labels, trusted)[0, 1]


@pytest.mark.parametrize("one_trusted", [True, False])
@pytest.mark.parametrize("other_trusted", [True, False])
@pytest.mark.parametrize("same_class", [True, False])
def test_two_samples_are_positives_only_if_both_are_trusted_and_of_one_class(one_trusted, other_trusted, same_class):
    mask = trusted_mask(torch.tensor([3, 3 if same_class else 4]), torch.tensor([one_trusted, other_trusted]))
    together = one_trusted and other_trusted and same_class
    assert mask.tolist() == [[True, together], [together, True]]
    assert mask.dtype == torch.bool


def test_a_sample_not_trusted_is_set_in_neither_row_nor_column():
    labels, trusted = torch.zeros(6, dtype=torch.int64), torch.tensor([1, 1, 1, 0, 0, 1]).bool()
    mask = trusted_mask(labels, trusted)
    for row in range(6):
        for column in range(6):
            assert mask[row, column] == (row == column or bool(trusted[row] and trusted[column]))


@pytest.mark.parametrize("trusted_too", [True, False])
def test_the_gradient_attracts_a_sample_of_the_class_only_if_it_is_trusted(trusted_too):
    # All views are orthogonal, so the gradient at one of them tells how the loss weighs each of the others.
    features = torch.eye(12).view(6, 2, 12).clone().requires_grad_()
    labels, trusted = torch.tensor([0, 0, 0, 1, 2, 3]), torch.tensor([True, True, trusted_too, True, True, True])
    SupConLoss()(features, trusted_mask(labels, trusted)).backward()
    pull = -torch.einsum("ivd,jwd->ivjw", features.grad, features.detach())
    assert (pull[0, :, 1] > 0).all()  # two samples of D_c
    for one, two in ((0, 2), (2, 0), (1, 2), (2, 1)):
        assert ((pull[one, :, two] > 0) == trusted_too).all()
    assert (pull[0, :, 3] < 0).all()
    assert (pull[2, 0, 2, 1] > 0) and (pull[2, 1, 2, 0] > 0)  # a sample's own views always attract


# The classifier's loss


@pytest.mark.parametrize("members", [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
@pytest.mark.parametrize("weight", [0.001, 0.5])
@pytest.mark.parametrize("bound", [math.inf, 2.0])
def test_mixed_cross_entropy_equals_a_loop(members, weight, bound):
    logits, labels = (randn(5, 4, seed=2) * 3).requires_grad_(), torch.tensor([0, 1, 2, 3, 0])
    sums, counts, above = [0.0, 0.0], [0, 0], []
    for row, label, member in zip(logits.tolist(), labels.tolist(), members, strict=True):
        each = math.log(sum(math.exp(value) for value in row)) - row[label]
        above.append(not member and each > bound)
        sums[member] += bound if above[-1] else each
        counts[member] += 1
    poison, clean = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
    trusted = torch.tensor(members).bool()
    result = mixed_cross_entropy(logits, labels, trusted, weight, bound)
    assert result.item() == pytest.approx(clean - weight * poison, rel=1e-5)
    result.backward()  # above the bound a sample of D_p moves nothing
    assert (logits.grad == 0).all(1).tolist() == above and (bound == math.inf or any(above) or 0 not in members)
    if weight == 0.001 and bound == math.inf:
        assert mixed_cross_entropy(logits, labels, trusted).item() == result.item()


# What an epoch reports of a loss


def test_an_epoch_sums_in_float32_what_a_network_gives_in_bfloat16():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def objective(model, inputs, labels):
        loss = model(inputs).mean() * 0 + 5
        assert loss.dtype == torch.bfloat16
        return loss, {"feature_norm": loss.detach() * 3}

    found = train_epoch(model, SameBatches(1000, 1), 0, objective, optimizer, choose_runtime("cpu", "bfloat16"), "x")
    assert (found["loss"], found["feature_norm"]) == (5, 15)


def test_first_views_are_paired_with_the_second_ones_of_the_same_samples():
    vectors = F.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    labels, trusted = torch.tensor([0, 1, 2, 0]), torch.ones(4, dtype=torch.int64)
    loss, _ = contrastive(lambda inputs: inputs, vectors, labels, trusted, SupConLoss())
    pairs = torch.stack([torch.stack([vectors[i], vectors[i + 4]]) for i in range(4)])
    torch.testing.assert_close(loss, SupConLoss()(pairs, labels[:, None] == labels))


def test_an_epochs_loss_is_the_mean_over_samples():
    model = torch.nn.Linear(1, 1)
    optimizer, runtime = torch.optim.SGD(model.parameters(), lr=0.0), choose_runtime("cpu", "float32")
    objective = lambda model, inputs, labels: (model(inputs).mean() * 0 + 5, {})  # noqa: E731
    assert train_epoch(model, SameBatches(4, 2), 0, objective, optimizer, runtime, "x")["loss"] == 5


def test_a_sample_whose_cross_entropy_is_infinite_leaves_the_other_set_alone():
    logits = torch.tensor([[3e38, -3e38], [0.0, 0.0]], requires_grad=True)
    labels, trusted = torch.tensor([1, 0]), torch.tensor([False, True])
    loss = mixed_cross_entropy(logits, labels, trusted, poison_weight=0.5, bound=10)
    torch.testing.assert_close(loss, torch.tensor(math.log(2) - 5))
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0][1]).all()
