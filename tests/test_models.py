"""The networks against torchvision's."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import ResNet, SupConResNet, build_model
from models.resnet import SmallMapConv, with_plain_convolutions


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shake(model):
    """Give the normalisations statistics and weights of their own, so that none can stand in for another."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def feature_maps(model, inputs):
    """Shapes of what comes out of the stem's convolution, of its pooling and of the last stage."""
    shapes = []
    for module in (model.conv1, model.maxpool, model.layer4):
        module.register_forward_hook(lambda module, given, result: shapes.append(tuple(result.shape[1:])))
    with torch.no_grad():
        model.eval()(inputs)
    return shapes


@pytest.mark.parametrize(
    ("stem", "shapes"),
    [
        ("pool", [(64, 32, 32), (64, 16, 16), (512, 2, 2)]),
        ("plain", [(64, 32, 32), (64, 32, 32), (512, 4, 4)]),
        ("imagenet", [(64, 16, 16), (64, 8, 8), (512, 1, 1)]),
    ],
)
def test_stem_decides_the_size_of_the_feature_maps(stem, shapes):
    assert feature_maps(ResNet("resnet18", 10, stem), torch.randn(1, 3, 32, 32)) == shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_relu_behind_the_pooling_changes_no_bit_and_no_gradient(dtype):
    model = with_plain_convolutions(build_model("resnet10", "cifar10", 10)).train()
    results = []
    for forward in (model, model._forward_impl):  # the other is torchvision's, which pools after its ReLU
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = forward(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        logits.float().square().sum().backward()
        results.append([logits, *(weight.grad.clone() for weight in model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_preactresnet18_is_the_published_network():
    model = shake(build_model("preactresnet18", "cifar10", 10))
    state, inputs = model.state_dict(), torch.randn(3, 3, 32, 32)

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *parts))

    x = F.conv2d(inputs, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            active = norm(x, f"{name}.bn1")
            shortcut = F.conv2d(active, state[f"{name}.downsample.weight"], stride=2) if stride == 2 else x
            out = F.conv2d(active, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            x = F.conv2d(norm(out, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1) + shortcut
    assert x.shape == (3, 512, 4, 4)
    expected = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-4)
    assert sum(weight.numel() for weight in model.parameters()) == 11_171_146  # as published implementations count


@pytest.mark.parametrize(
    ("name", "dataset", "last"),
    [
        ("resnet18", "cifar10", 2),
        ("preactresnet18", "cifar10", 4),
        ("preactresnet18", "fashion", 4),
        ("resnet18", "cifar100", 4),
        ("resnet10", "fashion", 2),
        ("resnet10", "cifar100", 2),
        ("preactresnet10", "cifar10", 2),
        ("resnet10_nopool", "cifar10", 4),
        ("resnet18_nopool", "cifar10", 4),
        ("resnet10_nopool", "fashion", 4),
    ],
)
def test_classifier_has_the_stem_of_its_data_set(name, dataset, last):
    assert feature_maps(build_model(name, dataset, 10), torch.randn(1, 3, 32, 32))[-1][1:] == (last, last)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet10", 256), ("preactresnet10", 256)],
)
def test_forward_is_the_last_layer_on_the_features(name, size):
    model = shake(build_model(name, "cifar10", 7))
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.features(inputs)
        assert features.shape == (2, size) == (2, model.feature_size)
        assert torch.equal(model(inputs), model.fc(features))
        assert model(inputs).shape == (2, 7)


def test_under_autocast_two_classes_do_not_tie_and_the_lower_does_not_win():
    model = shake(build_model("resnet10", "cifar10", 7))
    with torch.no_grad():
        model.fc.weight[:], model.fc.bias[:] = 0, 100.0  # in bfloat16 the next number is 100.5
        model.fc.bias[5] = 100.1
        inputs = torch.randn(3, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            logits, trained = model(inputs), model.train()(inputs)
    assert logits.dtype == torch.float32 and (logits.argmax(1) == 5).all()
    assert trained.dtype == torch.bfloat16


@pytest.mark.parametrize("stem", ["pool", "plain"])
def test_resnet18_equals_torchvisions_with_its_stem_exchanged(stem):
    own = shake(ResNet("resnet18", 10, stem))
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    if stem == "plain":
        theirs.maxpool = nn.Identity()
    theirs.load_state_dict(own.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own(inputs), theirs.eval()(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_stem_equals_torchvision_exactly(name):
    theirs = shake(getattr(torchvision.models, name)(num_classes=20))
    own = ResNet(name, 20, "imagenet")
    own.load_state_dict(theirs.state_dict())
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(inputs), theirs(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [("resnet18", 512, 4), ("resnet10", 256, 2), ("preactresnet10", 256, 2), ("resnet10_nopool", 256, 4)],
)
def test_contrastive_network_gives_128_numbers_of_length_one(name, size, last):
    model = shake(SupConResNet(name))
    inputs = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        result, features = model(inputs), model.features(inputs)
        assert result.shape == (3, 128)
        torch.testing.assert_close(result.norm(dim=1), torch.ones(3))
        assert features.shape == (3, size)
        projected = model.head(features)
        torch.testing.assert_close(result, projected / projected.norm(dim=1, keepdim=True))
    assert [type(layer) for layer in model.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert feature_maps(model.encoder, inputs)[-1] == (size, last, last)


def test_equal_seeds_give_equal_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model("resnet10", "fashion", 10).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.parametrize("by_product", [True, False])
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize(
    ("stride", "size"),
    [(1, 2), (1, 1), (1, 3), (1, 4), (1, 5), (1, (1, 4)), (2, 4), (2, 2), (2, 3), (2, 7), (2, 8), (2, (3, 8))],
)
def test_a_convolution_of_small_maps_is_the_convolution(stride, size, kernel, by_product, monkeypatch):
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.double} if by_product else set())
    small = SmallMapConv(6, 5, kernel, stride=stride, padding=kernel // 2, bias=False).double()
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.randn(7, 6, height, width, dtype=torch.double, requires_grad=True)
    expected = F.conv2d(x, small.weight, stride=stride, padding=kernel // 2)
    upstream = torch.randn_like(expected)
    results = []
    for y in (small(x), expected):
        results.append((y, *torch.autograd.grad(y, (x, small.weight), upstream)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stride", "size", "kernel", "way"),
    [
        (1, 2, 3, "View"),  # a matrix product throughout, seen as a map again
        (2, 4, 3, "View"),
        (1, 4, 3, "GradientByProduct"),
        (2, 8, 3, "GradientByProduct"),
        (2, 8, 1, "GradientByProduct"),
        (1, 5, 3, "Convolution"),
        (2, 9, 3, "Convolution"),
    ],
)
def test_products_are_taken_on_small_maps_in_training_and_where_they_are_faster(stride, size, kernel, way, monkeypatch):
    small = SmallMapConv(6, 5, kernel, stride=stride, padding=kernel // 2, bias=False)
    x = torch.randn(7, 6, size, size)

    def way_of(layer):
        behind = layer(x).grad_fn
        return (behind.next_functions[0][0] if behind.name() == "PermuteBackward0" else behind).name()

    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.float32})
    assert way_of(small).startswith(way)
    assert way_of(small.eval()).startswith("Convolution")
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", set())
    assert way_of(small.train()).startswith("Convolution" if way == "GradientByProduct" else way)


@pytest.mark.parametrize("asked", [(True, False), (False, True)])
@pytest.mark.parametrize("size", [2, 4])
def test_small_maps_have_the_gradients_that_are_asked_for(size, asked, monkeypatch):
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.float32})
    small = SmallMapConv(6, 5, 3, padding=1, bias=False)
    x = torch.randn(7, 6, size, size)
    for tensor, needed in zip((x, small.weight), asked, strict=True):
        tensor.requires_grad_(needed)
    small(x).sum().backward()
    assert (x.grad is not None, small.weight.grad is not None) == asked
    of_all = (
        torch.randn(7, 6, size, size).copy_(x.detach()).requires_grad_(),
        small.weight.detach().clone().requires_grad_(),
    )
    F.conv2d(*of_all, padding=1).sum().backward()
    for tensor, wanted in zip((x, small.weight), of_all, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, wanted.grad)


@pytest.mark.parametrize("by_product", [True, False])
@pytest.mark.parametrize(("name", "count"), [("resnet18", 19), ("resnet10", 7)])
def test_small_maps_train_as_with_plain_convolutions_and_evaluate_in_the_same_bits(
    name, count, by_product, monkeypatch
):
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.float32} if by_product else set())
    monkeypatch.setattr(SmallMapConv, "CONTIGUOUS", False)  # which has other last bits
    model = build_model(name, "cifar10", 10)
    # All but the stem of resnet18; of resnet10, which is half as wide, those behind the first of its second stage.
    assert sum(isinstance(module, SmallMapConv) for module in model.modules()) == count
    plain = with_plain_convolutions(copy.deepcopy(model))
    assert not any(isinstance(module, SmallMapConv) for module in plain.modules())
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))
    losses = [F.cross_entropy(network.train()(images), labels) for network in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for ours, others in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, others.grad, rtol=1e-3, atol=1e-5)


def convolved(network, images):
    """What a network convolves, (shape, whether it is contiguous) by layer, and its features."""
    inputs = []

    def seen(x, *more, convolve=F.conv2d, **named):
        inputs.append((tuple(x.shape), x.is_contiguous()))
        return convolve(x, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", seen)
        return inputs, network.features(images)


@pytest.fixture
def network_and_images():
    model = build_model("resnet18", "cifar10", 10).eval().to(memory_format=torch.channels_last)
    return model, torch.randn(9, 3, 32, 32).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("contiguous", "layers"), [(True, 10), (False, 0)])
def test_an_evaluation_in_float32_convolves_small_maps_in_contiguous_format(
    contiguous, layers, network_and_images, monkeypatch
):
    monkeypatch.setattr(SmallMapConv, "CONTIGUOUS", contiguous)
    model, images = network_and_images
    with torch.no_grad():
        inputs, found = convolved(model, images)
        torch.testing.assert_close(found, with_plain_convolutions(copy.deepcopy(model)).features(images))
    assert sum(of_one for _, of_one in inputs) == layers  # of stages 3 and 4 eight convolutions of 3x3 and two of 1x1
    inputs, found = convolved(model, images)  # with gradients, as an attack on the network asks for them
    found.sum().backward()
    assert not any(of_one for _, of_one in inputs) and all(
        weight.grad is not None for weight in model.layer4.parameters()
    )
    for weight in model.parameters():
        weight.requires_grad_(False)
    assert sum(of_one for _, of_one in convolved(model, images)[0]) == layers


@pytest.mark.parametrize(
    ("by_product", "shapes"), [(True, [(1, 2304, 36, 1), *[(1, 2048, 9, 1)] * 3]), (False, [(1, 2048, 9, 1)] * 3)]
)
def test_an_evaluation_in_bfloat16_convolves_maps_of_2x2_in_another_shape(
    by_product, shapes, network_and_images, monkeypatch
):
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.bfloat16} if by_product else set())
    model, images = network_and_images
    plain = with_plain_convolutions(copy.deepcopy(model))
    with torch.no_grad():
        exact = plain.features(images)
        with torch.autocast("cpu", torch.bfloat16):
            inputs, found = convolved(model, images)
            others = plain.features(images)
    assert [shape for shape, _ in inputs if shape[0] == 1] == shapes
    errors = [(of_one.float() - exact).norm() / exact.norm() for of_one in (found, others)]
    assert found.dtype == others.dtype and errors[0] < 0.02 and errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(("stride", "size"), [(1, 2), (2, 4), (2, 3)])
def test_maps_of_2x2_evaluated_in_bfloat16_are_those_of_the_convolution_at_any_batch_size(stride, size, monkeypatch):
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.bfloat16})
    small = SmallMapConv(64, 48, 3, stride=stride, padding=1, bias=False).eval()
    x = torch.randn(100, 64, size, size).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = small(x)
        assert small.kept is not None
        for count in (1, 7, 50):
            assert torch.equal(torch.cat([small(part) for part in x.split(count)]), found)
    expected = F.conv2d(x.float(), small.weight.bfloat16().float(), stride=stride, padding=1)
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_change_between_two_evaluations_are_not_the_old_ones(dtype, monkeypatch):
    monkeypatch.setattr(SmallMapConv, "CONTIGUOUS", True)
    small = SmallMapConv(6, 5, 3, padding=1, bias=False).eval()
    x = torch.randn(7, 6, 2, 2)

    @torch.no_grad()
    def is_right(layer):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = layer(x)
        torch.testing.assert_close(found.float(), F.conv2d(x, layer.weight, padding=1), rtol=0.02, atol=0.1)
        return layer.kept[1]

    kept = is_right(small)
    assert is_right(small) is kept
    other = copy.deepcopy(small)
    with torch.no_grad():
        small.weight.mul_(2)
    is_right(small)
    small.load_state_dict({"weight": torch.randn_like(small.weight)})
    is_right(small)
    is_right(other)
    small.weight.grad = torch.ones_like(small.weight)
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    is_right(small)
    small.weight.data = torch.randn_like(small.weight)
    is_right(small)
    assert small.train().kept is None and small.eval().kept is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_inference_has_kept_serves_a_gradient_of_the_images_too(dtype, monkeypatch):
    monkeypatch.setattr(SmallMapConv, "CONTIGUOUS", True)
    small = SmallMapConv(6, 5, 3, padding=1, bias=False).eval().requires_grad_(False)
    x = torch.randn(7, 6, 2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.inference_mode():
            small(x)
            kept = small.kept[1]
        y = small(x)
    assert small.kept[1] is kept
    upstream = torch.randn(7, 5, 2, 2)
    expected = torch.autograd.grad(F.conv2d(x, small.weight, padding=1), x, upstream)
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream.to(y.dtype)), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("stride", "size", "kernel"), [(1, 2, 3), (2, 4, 3), (1, 4, 3), (2, 8, 3), (2, 8, 1)])
def test_small_maps_in_bfloat16_are_as_near_to_the_exact_ones_as_plainly_convolved(stride, size, kernel, monkeypatch):
    monkeypatch.setattr(SmallMapConv, "BY_PRODUCT", {torch.bfloat16})
    torch.manual_seed(0)
    small = SmallMapConv(256, 256, kernel, stride=stride, padding=kernel // 2, bias=False).to(
        memory_format=torch.channels_last
    )
    plain = with_plain_convolutions(copy.deepcopy(small))
    x = torch.randn(32, 256, size, size).to(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(32, 256, size // stride, size // stride)

    def results(layer, dtype):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer(x)
        return y, *torch.autograd.grad(y, (x, layer.weight), upstream.to(y.dtype))

    exact = results(plain, torch.float32)
    for ours, others, wanted in zip(results(small, torch.bfloat16), results(plain, torch.bfloat16), exact, strict=True):
        assert ours.dtype == others.dtype and ours.stride() == others.stride()
        errors = [(found.float() - wanted).norm() / wanted.norm() for found in (ours, others)]
        assert errors[0] < 0.01 and errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (64, 3), (99, 3), (100, 7), (224, 7)])
@pytest.mark.parametrize("name", ["resnet18", "resnet10"])
def test_images_of_100_pixels_and_more_have_the_stem_of_imagenet_whatever_the_data_set(name, size, kernel):
    for network in (build_model(name, "folder", 5, size), SupConResNet(name, size).encoder):
        assert network.conv1.kernel_size == (kernel, kernel) and network.conv1.stride == ((kernel + 1) // 4,) * 2
