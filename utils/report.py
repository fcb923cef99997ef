"""The report of an audit: its pictures, and one page of HTML that holds them and opens from disk."""

import base64
import html
import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from utils.figures import CLEAN_COLOUR, POISONED_COLOUR, draw, image_table, short
from utils.separation import POISON

SHEET_CLASSES, SHEET_COLUMNS = 10, 10


def png(figure):
    """The figure as the bytes of a PNG; closes it."""
    buffer = io.BytesIO()
    draw(figure, buffer, "png", 110)
    return buffer.getvalue()


def class_bars(labels, flags, classes, target, most=40):
    """Which classes the suspects pile up in: their share of D_p beside their share of the training set, of the ``most``
    classes with most suspects. labels, flags: int64 (N,); target: a class to mark, or None. PNG bytes."""
    whole = np.bincount(labels, minlength=len(classes)) / len(labels)
    suspects = labels[flags == POISON]
    share = np.bincount(suspects, minlength=len(classes)) / max(1, len(suspects))
    order = np.argsort(-share, kind="stable")[:most]
    figure, axis = plt.subplots(figsize=(7.5, 1.2 + 0.24 * len(order)), layout="constrained")
    place = np.arange(len(order))
    colours = [POISONED_COLOUR if label == target else CLEAN_COLOUR for label in order]
    axis.barh(place - 0.2, 100 * share[order], 0.4, color=colours, label="share of D_p")
    axis.barh(place + 0.2, 100 * whole[order], 0.4, color="#bbbbbb", label="share of the training set")
    axis.set_yticks(place, [short(classes[label]) for label in order], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("per cent")
    axis.legend(fontsize=8)
    return png(figure)


def contact_sheet(images, labels, rank, fct, classes, target):
    """The most suspicious samples of each class, by their ``rank`` (int (N,), from 1), the classes with the highest FCT first
    (``target``, where there is one, before them). images: as `datasets.Dataset` has them. PNG bytes."""
    tops = {label: np.flatnonzero(labels == label) for label in range(len(classes))}
    tops = {label: own[np.argsort(rank[own])][:SHEET_COLUMNS] for label, own in tops.items()}
    order = sorted(tops, key=lambda label: (label != target, -fct[tops[label]].mean()))[:SHEET_CLASSES]
    lines = [(classes[label], images[tops[label]], [f"{value:.3g}" for value in fct[tops[label]]]) for label in order]
    return png(image_table(lines))


def likeness_picture(like, suspicious, name):
    """Histogram of `audit.likeness` of the samples of the class ``name``, those of D_p apart. like: float (n,); suspicious: bool
    (n,). PNG bytes."""
    figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    bins = np.linspace(like.min(), like.max(), 61)
    for members, label, colour in ((~suspicious, "the others", CLEAN_COLOUR), (suspicious, "D_p", POISONED_COLOUR)):
        axis.hist(like[members], bins=bins, color=colour, alpha=0.75, label=f"{label} ({members.sum()})")
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.set_xlabel("likeness to the group that gave the class away, in standard deviations")
    axis.set_ylabel(f"images of {short(name)}")
    axis.legend(fontsize=8)
    return png(figure)


def strongest_region(difference, deviation, count):
    """Where a mean difference stands out most: (top, left, side) in pixels of a square of an eighth of the image.

    Args:
        difference: float (H, W, 3), mean image of the suspects minus that of the others; deviation: float (H, W, 3), of the
        suspects; count: how many they are.
    """
    side = max(3, len(difference) // 8)
    score = (np.abs(difference) / (deviation / np.sqrt(count) + 4)).mean(2)
    sums = np.lib.stride_tricks.sliding_window_view(score, (side, side)).sum((2, 3))
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(top), int(left), side


def pattern_picture(suspects, others, name):
    """The mean image of the suspects of a class, that of the others, and their difference with its strongest region marked.

    Args:
        suspects, others: uint8 (n, H, W, 3); name: of the class.

    Returns:
        (PNG bytes, (top, left, side) of the region in pixels).
    """
    suspects, others = suspects.astype(np.float32), others.astype(np.float32)
    difference = suspects.mean(0) - others.mean(0)
    region = strongest_region(difference, suspects.std(0), len(suspects))
    scale = 127 / max(1.0, np.abs(difference).max())
    pictures = {
        f"mean of {len(suspects)} suspects of {short(name)}": suspects.mean(0),
        f"mean of {len(others)} others of it": others.mean(0),
        f"difference x {scale:.2g}, grey is none": 128 + scale * difference,
        "standard deviation of the suspects": suspects.std(0),
    }
    figure, axes = plt.subplots(1, 4, figsize=(10, 3), layout="constrained")
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture.clip(0, 255).astype(np.uint8), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(title, fontsize=8)
    for axis in axes[[0, 2, 3]]:
        top, left, side = region
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="#ff2020", linewidth=1.5))
    return png(figure), region


def put_back_picture(before, after, predicted, classes):
    """Other classes' images before and after what the suspects share was put on them, with what the network then says.

    Args:
        before, after: uint8 (n, H, W, 3); predicted: int (2, n), its answers; classes: names.
    """
    names = [[classes[answer] for answer in answers] for answers in predicted]
    return png(image_table([("before", before, names[0]), ("after", after, names[1])]))


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
.verdict { padding: 1em 1.2em; border-radius: .5em; font-size: 1.15em }
.poisoned { background: #fbe3e4 } .no { background: #e2f2e6 } .cannot { background: #fdf3d6 }
table { border-collapse: collapse; font-size: .85em } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
td { overflow-wrap: anywhere } img { max-width: 100% } pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap }
figure { margin: 1em 0 } figcaption { font-size: .85em; color: #555 }
"""


def text(value):
    """Any text from the user's disk as HTML that shows it and does nothing else."""
    letters = (letter if letter.isprintable() else "\ufffd" for letter in str(value))
    return html.escape("".join(letters).encode(errors="replace").decode())


def link(path):
    """A file as a link to it on disk, which shows its name."""
    return f'<a href="{html.escape(Path(path).absolute().as_uri())}">{text(Path(path).name)}</a>'


def picture(name, content, caption):
    """A picture (PNG bytes) inside the page, with a link to the same file ``name`` beside the page."""
    data = base64.b64encode(content).decode()
    return (
        f'<figure><a href="{text(name)}"><img alt="{text(caption)}" src="data:image/png;base64,{data}"></a>'
        f"<figcaption>{text(caption)} ({text(name)})</figcaption></figure>"
    )


def table(head, rows):
    """Rows (lists of HTML) under a ``head`` (a list, or None)."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def page(title, kind, verdict, sections):
    """One self-contained page. title, verdict: text; kind: the banner's class; sections: pairs of heading (text) and body
    (HTML)."""
    body = "".join(f"<h2>{text(heading)}</h2>{content}" for heading, content in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f'<body><h1>{text(title)}</h1><p class="verdict {kind}">{text(verdict)}</p>{body}</body></html>'
    )
