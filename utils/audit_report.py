"""What audit_dataset.py found, in files: report.html with its pictures, suspects.csv and verdict.json."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from utils import report
from utils.audit import APART, INTO_EACH, OTHERS, SHRINK, SUREST, among, classes_of, rule_of
from utils.figures import fct_histogram
from utils.files import bytes_writer, csv_writer, json_writer, text_writer, write_together
from utils.seeding import generator
from utils.separation import CLEAN, POISON, UNCERTAIN

SETS = {CLEAN: "D_c", UNCERTAIN: "D_u", POISON: "D_p"}
ORDERS = {"flip": "most sensitive to a mirror", "rotate": "most sensitive to the paper's transform",
          SHRINK: "most sensitive to being made smaller", SUREST: "of which the network is surest",
          **dict.fromkeys(APART, "at one end of where the network's features put the class")}  # fmt: skip
PICTURES = ("likeness", "histogram", "classes", "suspects", "pattern", "put_back")
# The files of a report, written together.
REPORT = ("verdict.json", "report.html", "suspects.csv", *(f"{name}.png" for name in PICTURES))


def name_of(dataset, row):
    """Where the training image ``row`` comes from: its file below data_root, or its place in the array."""
    if dataset.name == "npz":
        return f"x_train[{row}]"
    return os.path.relpath(dataset.train_images.files[row], dataset.source)


def write_report(out, opt, dataset, labels, flags, fct, like, content, best, put_back):
    """All files of the report, together; where the shared pattern is strongest is added to ``content``. The images of D_p come first,
    by ``like`` where it was taken by that, then the others, by FCT."""
    classes, target = dataset.classes, content["target_label"]
    in_poison = flags == POISON
    first = np.where(in_poison, fct if like is None else like, -np.inf)
    order = np.lexsort((np.arange(len(fct)), -fct, -first))
    rank = np.empty(len(fct), dtype=np.int64)
    rank[order] = np.arange(1, len(fct) + 1)
    rows = [
        {"file": name_of(dataset, row), "class": classes[labels[row]], "FCT": float(fct[row]), "rank": int(rank[row]),
         "set": SETS[flags[row]]}
        for row in order
    ]  # fmt: skip
    pictures = {
        "classes": report.class_bars(labels, flags, classes, target),
        "suspects": report.contact_sheet(dataset.train_images, labels, rank, fct, classes, target),
    }
    if like is not None:
        own = labels == target
        pictures["likeness"] = report.likeness_picture(like[own], in_poison[own], classes[target])
    best = best or {"label": 0, "order": "flip", "group": "first 20"}
    own = put_back.ranked(best["label"], best["order"])
    group = put_back.groups(best["label"], best["order"]).get(best["group"], own[: len(own) // 2 + 1])
    rest = dataset.train_images[np.sort(own[len(own) // 2 :][:500])]
    name = classes[best["label"]]
    pictures["pattern"], region = report.pattern_picture(dataset.train_images[np.sort(group)], rest, name)
    drawn = np.sort(generator(opt.seed, "audit", "shown").permutation(np.flatnonzero(labels != best["label"]))[:10])
    before = dataset.train_images[drawn]
    after = put_back.pattern(group, best["label"], best["order"]).put_on(before, rule_of(best["order"]).change)
    both = np.concatenate([before.astype(np.float32), after])
    answers = classes_of(put_back.model, both, dataset.spec, put_back.runtime).reshape(2, -1)
    pictures["put_back"] = report.put_back_picture(before, after.clip(0, 255).astype(np.uint8), answers, classes)
    content["strongest_region"] = dict(zip(("top", "left", "side"), region, strict=True))

    title = f"{len(fct)} images, tau {content['settings']['tau']}"
    pictures["histogram"] = report.png(fct_histogram(fct, ~in_poison, title, names=("not in D_p", "D_p")))

    writers = {out / "suspects.csv": csv_writer(rows)}
    writers |= {out / f"{name}.png": bytes_writer(data) for name, data in pictures.items()}
    writers[out / "verdict.json"] = json_writer(content)
    writers[out / "report.html"] = text_writer(page(dataset, labels, flags, fct, order, content, pictures, best))
    write_together(writers)
    if like is None:  # what an earlier verdict left there
        (out / "likeness.png").unlink(missing_ok=True)


def words_of(row, labels):
    """Which samples a row of `PutBack.of_class` is about, in words. labels: int64 (N,)."""
    if row["group"] == "alike":
        return f"of the {among((labels == row['label']).sum())} {ORDERS[row['order']]} the {row['size']} most alike"
    return f"the {row['size']} {ORDERS[row['order']]}"


def page(dataset, labels, flags, fct, order, content, pictures, best):
    """The report as HTML."""
    text, classes, verdict = report.text, dataset.classes, content["verdict"]
    counts, settings = content["counts"], content["settings"]
    score = "–" if content["statistic"] is None else f"{content['statistic']:.2f}"
    if verdict == "poisoned":
        into = "one class for each class of theirs" if best["into"] == INTO_EACH else "it"
        rule = rule_of(best["order"])
        changed = "made smaller" if rule.compared == SHRINK else "mirrored"
        of_which = "the class that are like this group"
        if best["into"] == INTO_EACH:
            of_which = "all classes that are like the group of highest score of their class"
        means = (
            f"What some images of the class {classes[content['target_label']]} share ({words_of(best, labels)}) turns "
            f"{100 * best['turned']:.0f} % of {OTHERS} images of other classes into {into}, though it changes them by no more than "
            f"{rule.change:g} grey levels, and {100 * best['turned_compared']:.0f} % once these are {changed}. "
            f"D_p below holds the images of {of_which} in the network's features. Not all of them need to be poisoned, and some "
            "that are may be missing."
        )
    elif verdict == "no evidence":
        means = (
            "No class has images that share something which acts as a trigger. This is no proof: see the README for the "
            "attacks and rates that the test misses. Unlearning is not recommended: D_p would be clean images."
        )
    else:
        means = "The data, or what the network has learnt of it, does not decide it. Unlearning is not recommended."
    numbers = [
        ["score (highest of the classes)", score],
        ["poisoned from", str(content["threshold"])],
        ["no evidence below", str(content["no_evidence_below"])],
        ["images, classes, side", f"{counts['images']}, {counts['classes']}, {settings['image_size']}"],
        ["D_p, D_u, D_c", f"{counts['D_p']}, {counts['D_u']}, {counts['D_c']}"],
        ["files that cannot be read", str(counts["skipped"])],
        [
            "network, epochs, batch size, learning rate, seed",
            ", ".join(str(settings[name]) for name in ("model", "epochs", "batch_size", "lr", "seed")),
        ],
        ["training accuracy", f"{settings['train_acc']:.1f} %"],
    ]
    if not content["thresholds_calibrated_for_these_settings"]:
        means += (
            " The thresholds were found with other settings of the network or on other sorts of data, so their error rates do not "
            "hold here."
        )
    head = ["class", "images", "in D_p", "score", "turned", "mirrored or smaller", "usual for the class", "into",
            "group"]  # fmt: skip
    by_class = []
    inside = Counter(labels[flags == POISON].tolist())
    for row in content["classes"][:40]:
        by_class.append(
            [text(row["class"]), str((labels == row["label"]).sum()), str(inside[row["label"]]), f"{row['score']:.2f}",
             *(f"{row[name]:.2f}" for name in ("turned", "turned_compared", "usual")), row["into"], words_of(row, labels)]
        )  # fmt: skip
    top = [row for row in order if flags[row] == POISON][:100]
    suspects = []
    for place, row in enumerate(top, 1):
        file = name_of(dataset, row)
        if dataset.name == "folder":
            file = f"{report.link(dataset.train_images.files[row])} in {text(os.path.dirname(file))}"
        suspects.append([str(place), file, text(classes[labels[row]]), f"{fct[row]:.4g}"])
    captions = {
        "likeness": "How like that group the images of the class are, in the network's features",
        "histogram": "FCT of all images",
        "classes": "In which classes the suspects pile up",
        "suspects": "The most suspicious images of each class, with their FCT",
        "pattern": "What the group of highest score shares; where it stands out most is marked",
        "put_back": "That is put on images of other classes; above each, what the network says",
    }
    first = '<p>All images, the most suspicious first: <a href="suspects.csv">suspects.csv</a>. The first of D_p:</p>'
    sections = [
        ("What this means", f"<p>{text(means)}</p>"),
        ("Numbers", report.table(None, numbers)),
        ("Pictures", "".join(report.picture(f"{name}.png", pictures[name], captions[name]) for name in PICTURES if name in pictures)),
        ("Classes", report.table(head, by_class)),
        ("Suspects", first + report.table(["rank", "file", "class", "FCT"], suspects)),
    ]  # fmt: skip
    if dataset.skipped:
        names = "".join(f"<li>{text(name)}</li>" for name in dataset.skipped[:1000])
        sections.append(("Files that could not be read", f"<ul>{names}</ul>"))
    if content["commands"]:
        ways = {
            "D-BR": "a model trained on this data, and the backdoor removed from it",
            "D-ST": "a model trained from scratch",
        }
        body = "".join(
            f"<p>{text(name)}, {ways[name]}:</p><pre>{text_lines(lines)}</pre>"
            for name, lines in content["commands"].items()
        )
        if content["write_clean"]:
            body += f"<p>A copy of the folder without D_p:</p><pre>{text(content['write_clean'])}</pre>"
        sections.append(("The way out", "<p>In the folder of this project:</p>" + body))
    kind = {"poisoned": "poisoned", "no evidence": "no", "cannot tell": "cannot"}[verdict]
    return report.page(f"Audit of {Path(dataset.source).name}", kind, content["headline"], sections)


def text_lines(lines):
    """Commands (list of str) as HTML, one a line."""
    return "\n".join(report.text(line) for line in lines)
