"""The pictures: a sheet of clean and triggered images, and the histogram of FCT."""

import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from utils.errors import UserError
from utils.files import atomic_write
from utils.poisoning import paint

CLEAN_COLOUR, POISONED_COLOUR = "#3b6fb6", "#d1495b"


def save_figure(figure, path):
    """Write a figure in the format of its file name, whole or not at all, and close it. Raises `UserError` for a name that has
    no such format."""
    if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: a picture's name ends in .png, .jpg, .svg or .pdf")
    with atomic_write(path) as file:
        draw(figure, file, path.suffix.lstrip("."))


def draw(figure, file, kind, dpi=120):
    """Write a figure to an open file as ``kind`` (png, jpg) and close it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a class name that matplotlib's font has no letters for
        figure.savefig(file, format=kind, dpi=dpi)
    plt.close(figure)


def sample_sheet(path, dataset, poisoned, opt, columns=8):
    """Draw ``columns`` poisoned training images: as they were, as the victim gets them, and ten times the difference. Of
    data of the user's own, a few images of the first classes.

    Args:
        path: `Path` of the picture; dataset: a `datasets.Dataset`; poisoned: its `poisoning.PoisonedSet`;
        opt: the options of the attack.
    """
    if poisoned.is_clean is None:
        return class_sheet(path, dataset, columns)
    rows = np.flatnonzero(~poisoned.is_clean)
    rows = rows[np.linspace(0, len(rows) - 1, min(columns, len(rows))).astype(int)]
    clean, triggered = dataset.train_images[rows], poisoned.images[rows]
    step = max(1, len(dataset.test_images) // columns)
    test = paint(dataset, opt, np.arange(len(dataset.test_images))[::step][:columns], train=False)
    lines = [
        ("clean", clean, [dataset.classes[label] for label in poisoned.true_labels[rows]]),
        ("poisoned", triggered, [dataset.classes[label] for label in poisoned.labels[rows]]),
        ("difference x 10", tenfold_difference(triggered, clean), ()),
        ("triggered test", test, ()),
    ]
    attack = f"{opt.dataset}, {opt.trigger_type}, {opt.target_type}"
    count = f"{(~poisoned.is_clean).sum()} of {len(poisoned.labels)} training images are poisoned"
    save_figure(image_table(lines, f"{attack}: {count}"), path)


def class_sheet(path, dataset, columns=8, most=12):
    """Draw the first ``columns`` training images of each class, of ``most`` classes at most.

    Args:
        path: `Path` of the picture; dataset: a `datasets.Dataset`.
    """
    lines = [
        (name, dataset.train_images[np.flatnonzero(dataset.train_labels == label)[:columns]], ())
        for label, name in enumerate(dataset.classes[:most])
    ]
    title = f"{len(dataset.train_labels)} training images of {len(dataset.classes)} classes"
    save_figure(image_table(lines, title), path)


def tenfold_difference(images, others):
    """Ten times the difference of images from ``others``, uint8 (n, H, W, 3) all, grey where there is none."""
    return np.clip(128 + 10 * (images.astype(int) - others), 0, 255).astype(np.uint8)


def image_table(lines, title=""):
    """A figure of lines of images, all in one axis, for with an axis each it takes four times as long.

    Args:
        lines: triples of what stands left of a line, its images uint8 (n, H, W, 3), and the texts above these, at most n;
        title: what stands above all.
    """
    columns = max(len(images) for _, images, _ in lines)
    figure = plt.figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.text(columns / 2, 0.12, title, fontsize=10, ha="center", va="center")
    top = 0.25 if title else 0.05  # in units of one image and the gap beside it, from above
    for name, images, texts in lines:
        top += 0.15 if len(texts) else 0
        axis.text(-0.1, top + 0.5, short(name, 16), fontsize=8, rotation=90, ha="center", va="center")
        for column, image in enumerate(images):
            axis.imshow(image, extent=(column, column + 0.97, top + 0.97, top), interpolation="nearest")
        for column, text in enumerate(texts):
            axis.text(column + 0.48, top - 0.02, short(text, 16), fontsize=7, ha="center", va="bottom")
        top += 1.03
    axis.set(xlim=(-0.22, columns), ylim=(top, 0))
    axis.set_axis_off()
    figure.set_size_inches(1.15 * (columns + 0.22), 1.15 * top)
    return figure


def plain(text):
    """A name from the user's disk as matplotlib shows it: no mathematics, no control characters, no half letters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown.encode(errors="replace").decode().replace("$", r"\$")


def short(name, most=22):
    """A class name that fits into a picture, see `plain`."""
    return plain(name if len(name) <= most else f"{name[: most - 1]}…")


def fct_histogram(fct, is_clean, title, gammas=None, bins=80, names=("clean", "poisoned")):
    """A figure of one `draw_histogram` with axes named and a title."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    draw_histogram(axis, fct, is_clean, gammas, bins, names)
    axis.set_xlabel(r"FCT, $\Delta_{trans}(x; \tau, f)$ (logarithmic)")
    axis.set_ylabel("samples (linear to 10, then logarithmic)")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    return figure


def draw_histogram(axis, fct, is_clean, gammas=None, bins=80, names=("clean", "poisoned")):
    """Histogram of FCT, clean and poisoned samples (or two other ``names``) beside each other, on a logarithmic axis.

    Values of exactly zero, which a logarithmic axis cannot show, get a bar of their own on the left with their share.

    Args:
        axis: of matplotlib; fct: float (N,); is_clean: bool (N,), which only colours the bars, or None; gammas: pair
        (gamma_c, gamma_p) to draw, or None; bins: how many.
    """
    positive = fct[fct > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1e-6, 1.0)
    low, high = 10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high) + 1e-9)
    edges = np.geomspace(low, high, bins + 1)
    decades = np.log10(high / low)
    zero = np.array([low / 10 ** (0.12 * decades), low / 10 ** (0.07 * decades)])  # a bar left of the axis proper

    kinds = [("samples", slice(None), CLEAN_COLOUR)]
    if is_clean is not None:
        kinds = [(names[0], is_clean, CLEAN_COLOUR), (names[1], ~is_clean, POISONED_COLOUR)]
    for name, members, colour in kinds:
        values = fct[members]
        label = f"{name} ({len(values)})"
        axis.hist(values[values > 0], edges, color=colour, alpha=0.65, label=label)
        zeros = int((values == 0).sum())
        if zeros:
            axis.bar(zero[0], zeros, zero[1] - zero[0], align="edge", color=colour, alpha=0.65)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(0, (30 if (fct == 0).any() else 4) * axis.get_ylim()[1])  # room for the note on zeros
    if (fct == 0).any():
        axis.set_xlim(left=zero[0] / 10 ** (0.03 * decades))
        axis.axvline(low, color="grey", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"exactly 0:\n{(fct == 0).sum()} ({100 * np.mean(fct == 0):.3g} %)",
            (zero[0], 0.98),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            zorder=3,  # above the line of gamma_c, which stands there when it is zero
        )
    if gammas:
        for gamma, name, style in zip(gammas, (r"$\gamma_c$", r"$\gamma_p$"), ("--", "-."), strict=True):
            place = gamma if gamma > 0 else zero[1]
            axis.axvline(place, color="black", linewidth=1.2, linestyle=style, label=f"{name} = {gamma:.4g}")
