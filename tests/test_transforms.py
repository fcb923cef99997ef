"""The batched transforms against torchvision's own functions, image by image."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from utils import transforms as T

COUNT = 24


def pictures(count=COUNT, size=32, seed=0):
    """Half noise, half smooth, uint8 (N, 3, size, size)."""
    images = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed))
    smooth = TF.resize(images[::2, :, :4, :4].float(), [size, size], antialias=True)
    images[::2] = smooth.round().clamp(0, 255).long()
    return images.to(torch.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def on_pil(image, function):
    changed = function(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def pil_rotate(image, degrees):
    return on_pil(image, lambda pil: TF.rotate(pil, degrees))


def each(function, images, *parameters):
    """Stack of ``function(image, parameters of that image)``."""
    values = [value.tolist() for value in parameters]
    return torch.stack([function(image, *row) for image, *row in zip(images, *values, strict=True)])


# The functions


@pytest.mark.parametrize("padding", [4, 2])
def test_crop_and_flip_equal_torchvisions(padding):
    images = pictures(200)
    view = T.CropFlip(padding=padding)
    parameters = view.draw(rng(), 200)

    def slow(image, down, right, flip):
        image = TF.crop(TF.pad(image, [padding] * 4), padding - down, padding - right, 32, 32)
        return TF.hflip(image) if flip else image

    expected = each(slow, images, parameters["down"], parameters["right"], parameters["flip"])
    assert torch.equal(view.apply(images, parameters), expected)


def test_crop_and_flip_with_rotation_rotates_last():
    images = pictures()
    view = T.CropFlip(rotation=15)
    parameters = view.draw(rng(), COUNT)
    assert parameters["degrees"].abs().max() <= 15
    plain = T.CropFlip().apply(images, parameters)
    expected = each(pil_rotate, plain, parameters["degrees"])
    assert (view.apply(images, parameters) == expected).float().mean() >= 0.999


@pytest.mark.parametrize("size", [32, 33])
def test_rotation_equals_pils_at_nearest_pixel(size):
    images = pictures(100, size)
    degrees = torch.from_numpy(rng().uniform(-180, 180, 100))
    expected = each(pil_rotate, images, degrees)
    assert (T.rotate(images, degrees) == expected).float().mean() >= 0.999


@pytest.mark.parametrize("size", [32, 33])
def test_rotation_by_multiples_of_90_degrees_is_exact(size):
    images = pictures(7, size)
    degrees = torch.tensor([-180.0, -90, 0, 90, 180, 270, 360], dtype=torch.float64)
    expected = [image.rot90(int(angle) // 90 % 4, (1, 2)) for image, angle in zip(images, degrees, strict=True)]
    assert torch.equal(T.rotate(images, degrees), torch.stack(expected))


def test_affine_shift_equals_pils():
    images = pictures(100)
    parameters = T.Tau("affine", "none", 32).draw(rng(), 100)

    def slow(image, down, right):
        return on_pil(image, lambda pil: TF.affine(pil, 0, [right, down], 1, 0, InterpolationMode.NEAREST))

    expected = each(slow, images, parameters["0.down"], parameters["0.right"])
    assert torch.equal(T.Tau("affine", "none", 32).apply(images, parameters), expected)


def test_blur_equals_torchvisions():
    images = pictures(60)
    sigma = torch.from_numpy(rng().uniform(0.1, 2, 60))
    expected = each(lambda image, s: TF.gaussian_blur(image, [15, 15], [s, s]), images, sigma)
    result = T.gaussian_blur(images, sigma)
    assert result.dtype == torch.uint8
    difference = (result.int() - expected.int()).abs()
    assert difference.max() <= 1  # torchvision computes in float32
    assert (difference > 0).float().mean() < 1e-3
    exact = each(lambda image, s: TF.gaussian_blur(image.double(), [15, 15], [s, s]), images, sigma)
    assert torch.equal(result, (exact + 0.5 + 1e-6).floor().to(torch.uint8))


def test_erase_equals_torchvisions():
    images = pictures(100).clamp(min=1)
    parameters = T.Tau("erase", "none", 32).draw(rng(), 100)
    box = [parameters[f"0.{name}"] for name in ("top", "left", "height", "width")]
    expected = each(lambda image, *place: TF.erase(image, *place, torch.tensor(0, dtype=torch.uint8)), images, *box)
    assert torch.equal(T.erase(images, *box), expected)
    assert torch.equal((expected == 0).sum((1, 2, 3)), 3 * box[2] * box[3])


def test_resized_crop_equals_torchvisions_bilinear():
    images = pictures(60)
    parameters = T.ContrastiveView(32).draw(rng(), 60)
    box = [parameters[name] for name in ("top", "left", "height", "width")]
    for values, extreme in zip(box, ([0, 31], [0, 30], [32, 1], [32, 2]), strict=True):
        values[:2] = torch.tensor(extreme)  # the whole image, and two pixels in a corner

    def slow(image, *place):
        return TF.resized_crop(image / 255, *place, [32, 32], InterpolationMode.BILINEAR, antialias=True)

    torch.testing.assert_close(T.resized_crop(images, *box), each(slow, images, *box), rtol=0, atol=1e-5)


COLOURS = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3))).T.reshape(3, 9, 3)  # greys and primaries too


@pytest.mark.parametrize(
    ("name", "low", "high"), [("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2), ("hue", -0.5, 0.5)]
)
def test_colour_change_equals_torchvisions(name, low, high):
    own, theirs = (getattr(module, f"adjust_{name}") for module in (T, TF))
    for images in (pictures() / 255, COLOURS.expand(COUNT, -1, -1, -1), torch.full((COUNT, 3, 4, 4), 0.3)):
        factor = torch.from_numpy(rng().uniform(low, high, COUNT)).float()
        torch.testing.assert_close(own(images, factor), each(theirs, images, factor), rtol=0, atol=1e-5)


def test_contrastive_view_equals_the_slow_pipeline_in_its_order_of_operations():
    images = pictures(150)
    view = T.ContrastiveView(32)
    parameters = view.draw(rng(), 150)
    before = images.clone()
    result = view.apply(images, parameters)
    assert torch.equal(images, before)
    assert result.dtype == torch.float32
    operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for row, image in enumerate(images):
        own = {name: value[row].tolist() for name, value in parameters.items()}
        box = [own[name] for name in ("top", "left", "height", "width")]
        expected = TF.resized_crop(image / 255, *box, [32, 32], antialias=True)
        expected = TF.hflip(expected) if own["flip"] else expected
        if own["jitter"]:
            for number in own["order"]:
                expected = operations[number](expected, own["factors"][number])
        expected = TF.rgb_to_grayscale(expected, 3) if own["grey"] else expected
        torch.testing.assert_close(result[row], expected, rtol=0, atol=2e-5)


# The draws


def check_boxes(box, size, scale, ratio):
    """Rectangles lie inside the image and have, before rounding to pixels, an area and an aspect within bounds."""
    top, left, height, width = (box[name].double() for name in ("top", "left", "height", "width"))
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size).all() and (left + width <= size).all()
    assert ((height + 0.5) * (width + 0.5) >= scale[0] * size * size).all()
    assert ((height - 0.5) * (width - 0.5) <= scale[1] * size * size).all()
    assert ((width + 0.5) / (height - 0.5) >= ratio[0]).all()
    assert ((width - 0.5) / (height + 0.5) <= ratio[1]).all()
    assert (top == 0).any() and (left == 0).any() and (top + height == size).any() and (left + width == size).any()
    area = height * width / size**2
    middle = (scale[0] + scale[1]) / 2
    assert abs(area.mean() - middle) < 0.06


def test_draws_of_a_contrastive_view_have_the_documented_ranges_and_frequencies():
    parameters = T.ContrastiveView(32).draw(rng(), 10000)
    check_boxes(parameters, 32, (0.2, 1), (3 / 4, 4 / 3))
    for name, probability in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2)):
        assert abs(parameters[name].double().mean() - probability) < 0.02
    factors = parameters["factors"]
    assert factors.shape == (10000, 4)
    assert factors[:, :3].min() >= 0.6 and factors[:, :3].max() <= 1.4 and factors[:, 3].abs().max() <= 0.1
    assert (factors[:, :3].amin(0) < 0.61).all() and (factors[:, :3].amax(0) > 1.39).all()
    assert factors[:, 3].min() < -0.099 and factors[:, 3].max() > 0.099
    torch.testing.assert_close(factors.mean(0), torch.tensor([1, 1, 1, 0.0]), rtol=0, atol=0.01)
    order = parameters["order"]
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(10000, 4))
    assert all((order[:, turn].bincount(minlength=4) > 2300).all() for turn in range(4))


def test_draws_of_crop_and_flip_have_the_documented_ranges():
    parameters = T.CropFlip().draw(rng(), 10000)
    for name in ("down", "right"):
        assert parameters[name].unique().tolist() == list(range(-4, 5))
    assert abs(parameters["flip"].double().mean() - 0.5) < 0.02
    assert not T.CropFlip(flip=False).draw(rng(), 1000)["flip"].any()


def test_draws_of_tau_have_the_documented_ranges():
    draws = {name: T.Tau(name, "none", 32).draw(rng(), 10000) for name in T.TAU_NAMES}
    degrees = draws["rotate"]["0.degrees"]
    assert -180 <= degrees.min() < -179 and 179 < degrees.max() <= 180 and abs(degrees.mean()) < 5
    for axis in ("0.down", "0.right"):
        assert draws["affine"][axis].unique().tolist() == list(range(-6, 7))  # 20 % of 32 is 6.4
        assert draws["crop"][axis].unique().tolist() == list(range(-4, 5))
    sigma = draws["blur"]["0.sigma"]
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2
    erased = {name[2:]: value for name, value in draws["erase"].items()}
    check_boxes(erased, 32, (0.2, 0.3), (0.5, 2))
    assert (erased["width"] >= erased["height"]).all() and (erased["width"] > 1.5 * erased["height"]).any()
    assert draws["flip"] == draws["none"] == {}


def test_affine_shift_is_a_share_of_the_image_side():
    assert T.Tau("affine", "none", 64).draw(rng(), 10000)["0.down"].abs().max() == 13  # 12.8, rounded


def test_no_two_parameters_are_drawn_alike():
    parameters = T.Tau("affine", "affine", 32).draw(rng(), 1000)
    for one, two in itertools.combinations(parameters.values(), 2):
        assert (one == two).double().mean() < 0.2
    view = T.ContrastiveView(32).draw(rng(), 1000)
    for one, two in itertools.combinations(("flip", "jitter", "grey"), 2):
        assert (view[one] & view[two]).any() and (view[one] & ~view[two]).any() and (~view[one] & view[two]).any()


@pytest.mark.parametrize("make", [lambda: T.Tau("rotate", "erase", 32), lambda: T.ContrastiveView(32)])
def test_equal_generator_and_count_give_equal_draws(make):
    one, two, other = (make().draw(rng(seed), 50) for seed in (3, 3, 4))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(len(value) == 50 for value in one.values())


# Tau


@pytest.mark.parametrize("pair", list(itertools.product(T.TAU_NAMES, repeat=2)), ids="+".join)
def test_every_pair_of_tau_keeps_shape_and_dtype_and_the_input(pair):
    images = pictures(6)
    before = images.clone()
    tau = T.Tau(*pair, 32)
    result = tau.apply(images, tau.draw(rng(), 6))
    assert result.shape == images.shape and result.dtype == torch.uint8
    assert torch.equal(images, before)
    is_identity = pair in (("none", "none"), ("flip", "flip"), ("vflip", "vflip"))
    assert torch.equal(result, images) == is_identity


def test_tau_flip_is_always_a_flip():
    images = pictures()
    for pair in (("flip", "none"), ("none", "flip")):
        tau = T.Tau(*pair, 32)
        assert torch.equal(tau.apply(images, tau.draw(rng(), COUNT)), TF.hflip(images))
    tau = T.Tau("vflip", "none", 32)
    assert torch.equal(tau.apply(images, tau.draw(rng(), COUNT)), TF.vflip(images))


def exactly_shrunk(images, small):
    """Bilinear with antialiasing in whole numbers, halves up: float64 (N, 3, small, small) of uint8 (N, 3, size, size)."""
    size = images.shape[2]
    scale, rows, wholes = Fraction(size, small), [], []
    for place in range(small):
        centre = (place + Fraction(1, 2)) * scale
        row = [max(Fraction(0), 1 - abs(pixel + Fraction(1, 2) - centre) / scale) for pixel in range(size)]
        row = [weight / sum(row) for weight in row]
        whole = math.lcm(*(weight.denominator for weight in row))
        rows.append([int(weight * whole) for weight in row])
        wholes.append(whole)
    weights, wholes = np.array(rows), np.array(wholes)
    total, whole = weights @ images.astype(np.int64) @ weights.T, wholes[:, None] * wholes
    return ((2 * total + whole) // (2 * whole)).astype(float)


@pytest.mark.parametrize("size", [28, 32, 64])
def test_tau_shrink_is_pillows_resize_and_torchvisions_mirrored_padding(size):
    images = pictures(size=size)
    tau = T.Tau("shrink", "none", size)
    found = tau.apply(images, tau.draw(rng(), len(images)))
    margin = size // 8

    def slow(pil):
        small = pil.resize([size - 2 * margin] * 2, Image.Resampling.BILINEAR)
        return TF.pad(small, margin, padding_mode="reflect")

    expected = torch.stack([on_pil(image, slow) for image in images])
    assert (found.int() - expected.int()).abs().max() <= 1  # Pillow computes in whole numbers
    exact = torch.from_numpy(exactly_shrunk(images.numpy(), size - 2 * margin))
    assert torch.equal(found, F.pad(exact, [margin] * 4, mode="reflect").to(torch.uint8))


def test_tau_applies_its_second_part_to_the_result_of_its_first():
    images = pictures()
    tau = T.Tau("rotate", "affine", 32)
    parameters = tau.draw(rng(), COUNT)
    turned = T.rotate(images, parameters["0.degrees"])
    expected = T.shift(turned, parameters["1.down"], parameters["1.right"])
    assert torch.equal(tau.apply(images, parameters), expected)


@pytest.mark.parametrize("name", T.TAU_NAMES)
def test_tau_on_a_part_of_the_samples_equals_that_part_of_tau(name):
    images = pictures()
    tau = T.Tau(name, "none", 32)
    parameters = tau.draw(rng(), COUNT)
    rows = torch.tensor([7, 2, 19])
    some = tau.apply(images[rows], {key: value[rows] for key, value in parameters.items()})
    assert torch.equal(some, tau.apply(images, parameters)[rows])


@pytest.mark.parametrize("name", T.TAU_NAMES)
def test_tau_of_a_sample_does_not_depend_on_how_many_samples_there_are(name):
    tau = T.Tau(name, "affine", 32)
    few, many = tau.draw(rng(), 7), tau.draw(rng(), 3000)
    assert few.keys() == many.keys() and few
    for key, value in few.items():
        assert torch.equal(value, many[key][:7])
        assert not torch.equal(many[key][:1000], many[key][1024:2024])  # blocks are not copies of each other


# On a GPU

EXACT = [
    T.CropFlip(rotation=15),
    T.Tau("rotate", "affine", 32),
    T.Tau("erase", "crop", 32),
    T.Tau("flip", "vflip", 32),
    T.Tau("shrink", "none", 32),
    T.Tau("blur", "none", 32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("view", [*EXACT, T.ContrastiveView(32)])
def test_a_gpu_finds_the_same_pixels(view):
    images = pictures(1000)
    parameters = view.draw(rng(), len(images))
    here, there = view.apply(images.clone(), parameters), view.apply(images.to("cuda"), parameters).cpu()
    assert here.dtype == there.dtype
    if view in EXACT:
        assert torch.equal(here, there)
    else:
        assert (here.double() - there.double()).abs().max() <= 1e-4  # float32's rounding


@pytest.mark.parametrize("threads", [1, 2])
def test_the_views_of_large_images_do_not_depend_on_their_company_or_the_threads(threads):
    view, before = T.ContrastiveView(224), torch.get_num_threads()
    drawn = view.draw(np.random.default_rng(0), 8)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (8, 3, 224, 224), dtype=np.uint8))
    together = view.apply(images, drawn)
    torch.set_num_threads(threads)
    try:
        alone = [
            view.apply(images[i : i + 1], {name: part[i : i + 1] for name, part in drawn.items()}) for i in range(8)
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(alone), together)
