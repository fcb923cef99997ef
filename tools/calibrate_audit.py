"""The error rates of audit_dataset.py: audits of clean and of poisoned sets, by the command line's own code.

Each run takes a part of CIFAR-10 (five disjoint parts) or Fashion-MNIST (six), at most 10 000 images, of all classes or of some,
poisons them or not, and audits them. Some of the runs, `SEEN`, were at hand when the rules and thresholds were chosen; the
others came after. Writes a row a run to --out, and goes on where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import tempfile

import numpy as np
import pandas as pd
import torchvision

import audit_dataset
from utils import args
from utils.audit_report import SETS
from utils.errors import UserError, run_script
from utils.files import BROKEN, atomic_write, check_outputs, load_npz, make_folder, read_json, read_table, write_rows
from utils.loading import load_dataset
from utils.metrics import detection_quality
from utils.paths import ROOT, shown
from utils.poisoning import attack_label, poisoned_indices
from utils.triggers import apply_trigger

PARTS = {"cifar10": 5, "fashionmnist": 6}
IMAGES = 10_000
ALL = tuple(range(10))
EVEN, ODD, LOW, HIGH = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9), (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
CLEAN_RUNS = [
    ("cifar10", 1, ALL), ("fashionmnist", 1, ALL), ("cifar10", 2, ALL), ("fashionmnist", 2, ALL), ("cifar10", 3, EVEN),
    ("fashionmnist", 3, EVEN), ("cifar10", 4, ODD), ("fashionmnist", 4, HIGH), ("cifar10", 0, LOW), ("fashionmnist", 5, LOW),
    ("cifar10", 1, HIGH), ("fashionmnist", 0, ODD), ("cifar10", 2, (3, 5, 8)), ("fashionmnist", 1, (0, 2, 6)),
    ("cifar10", 3, ALL), ("fashionmnist", 3, ALL), ("cifar10", 4, ALL), ("fashionmnist", 4, ALL), ("cifar10", 0, ALL),
    ("fashionmnist", 5, ALL), ("cifar10", 1, (0, 1, 8, 9)), ("fashionmnist", 2, HIGH), ("cifar10", 2, HIGH),
    ("fashionmnist", 0, ALL),
]  # fmt: skip
ATTACKS = {
    "grid": ("gridTrigger", "all2one"), "signal": ("signalTrigger", "all2one"), "kitty": ("kittyTrigger", "all2one"),
    "sig": ("sigTrigger", "cleanLabel"), "ssba": ("SSBA", "all2one"), "trojan": ("trojanTrigger", "all2one"),
    "square": ("squareTrigger", "all2all"), "warp": ("warpTrigger", "all2one"), "noise": ("randomPixelTrigger", "all2one"),
}  # fmt: skip
POISONED_RUNS = [  # data, part, attack, poison rate, target label
    ("cifar10", 1, "grid", 0.1, 3), ("fashionmnist", 1, "grid", 0.1, 2), ("cifar10", 2, "signal", 0.1, 1),
    ("fashionmnist", 2, "signal", 0.1, 9), ("cifar10", 3, "kitty", 0.1, 5), ("fashionmnist", 3, "sig", 0.1, 8),
    ("cifar10", 4, "sig", 0.1, 7), ("fashionmnist", 4, "ssba", 0.1, 3), ("cifar10", 0, "trojan", 0.1, 2),
    ("fashionmnist", 5, "kitty", 0.1, 0), ("cifar10", 1, "ssba", 0.1, 8), ("fashionmnist", 0, "trojan", 0.1, 4),
    ("cifar10", 2, "grid", 0.05, 6), ("fashionmnist", 1, "signal", 0.05, 7), ("cifar10", 3, "signal", 0.02, 4),
    ("fashionmnist", 2, "grid", 0.02, 1), ("cifar10", 4, "square", 0.1, 0), ("fashionmnist", 3, "ssba", 0.05, 5),
    ("cifar10", 0, "kitty", 0.05, 9), ("fashionmnist", 4, "square", 0.1, 0), ("cifar10", 1, "trojan", 0.05, 0),
    ("fashionmnist", 5, "signal", 0.01, 8), ("cifar10", 2, "signal", 0.01, 3), ("fashionmnist", 0, "warp", 0.1, 6),
    ("cifar10", 3, "noise", 0.1, 2), ("fashionmnist", 1, "noise", 0.1, 0), ("cifar10", 4, "warp", 0.1, 1),
    ("cifar10", 0, "ssba", 0.05, 4),
]  # fmt: skip
SEEN = {  # when the rules and thresholds were chosen
    "clean": (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15, 17, 18, 21, 23),
    "poisoned": (*range(14), 16, 17, 18, 19, 21, 22, 26),
}
# What `markdown` reads of every run, and of those that were poisoned.
COLUMNS = ("run", "seen", "data", "attack", "rate", "true_target", "poisoned", "verdict", "score", "target_label")
OF_POISONED = ("Dp_size", "Dp_precision", "Dp_recall", "Dc_contamination")


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument(
        "--data_root", type=args.path, default=ROOT / "dataset", help="folder of cifar10 and fashionmnist"
    )
    parser.add_argument("--out", type=args.file, default=ROOT / "results/audit_calibration.csv", help="the table")
    parser.add_argument(
        "--keep", type=args.path, help="folder in which data and networks stay, so that a later audit need not train"
    )
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="which, such as clean00 poisoned12; default: all")
    return parser


def load(name, root):
    """Training images uint8 (N, 32, 32, 3) and labels int64 (N,)."""
    if name == "cifar10":
        dataset = load_dataset(name, root)
        return dataset.train_images, dataset.train_labels
    try:
        whole = torchvision.datasets.FashionMNIST(root / name, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Fashion-MNIST is not under {root / name} and could not be downloaded ({error})") from None
    grey = np.pad(whole.data.numpy(), ((0, 0), (2, 2), (2, 2)))
    return np.repeat(grey[..., None], 3, axis=3), whole.targets.numpy().astype(np.int64)


def part(images, labels, parts, number, classes):
    """`IMAGES` images of these classes from one of the disjoint parts, in their order, and labels from 0."""
    rows = np.sort(np.random.default_rng(7).permutation(len(labels)).reshape(parts, -1)[number])
    rows = rows[np.isin(labels[rows], classes)]
    if len(rows) > IMAGES:
        rows = rows[np.sort(np.random.default_rng(8).permutation(len(rows))[:IMAGES])]
    return images[rows].copy(), np.searchsorted(classes, labels[rows]).astype(np.int64)


def poison(images, labels, attack, rate, target, seed):
    """Images and labels as the victim gets them, and which are clean (bool (N,))."""
    trigger, kind = ATTACKS[attack]
    rows = poisoned_indices(labels, kind, target, rate, seed)
    images[rows] = apply_trigger(trigger, images[rows], train=True, seed=0)
    labels[rows] = attack_label(labels[rows], kind, target, 10)
    is_clean = np.ones(len(labels), dtype=bool)
    is_clean[rows] = False
    return images, labels, is_clean


def keep_data(path, images, labels):
    """Write the arrays to ``path``. Raises `UserError` where there is such a file with others, on which a kept network was trained."""
    if not path.exists():
        with atomic_write(path) as file:
            np.savez(file, x_train=images, y_train=labels)
        return
    try:
        kept = load_npz(path, ("x_train", "y_train"), 1 << 30)
    except BROKEN as error:
        raise UserError(f"{shown(path)} is damaged ({error}); remove it and run this again") from None
    if not all(np.array_equal(one, other) for one, other in zip(kept, (images, labels), strict=True)):
        raise UserError(
            f"{shown(path)} is of other data than --data_root; remove the folder {shown(path.parent)}, or give another --keep"
        )


def audit(images, labels, is_clean, seed, keep=None):
    """The row of one run: what the audit says of these arrays, and by the ground truth how good its D_p and D_c are. With a
    folder ``keep`` the data and the network stay there."""
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        folder = make_folder(Path(folder).absolute())
        keep_data(folder / "data.npz", images, labels)
        words = [
            "--data_root",
            folder / "data.npz",
            "--out",
            folder / "report",
            "--output_root",
            folder,
            "--seed",
            seed,
        ]
        audit_dataset.main([str(word) for word in words])
        found = read_json(folder / "report/verdict.json")
        table = pd.read_csv(folder / "report/suspects.csv")
    table["row"] = table["file"].str.extract(r"\[(\d+)\]").astype(int)
    table = table.sort_values("row")
    row = {"verdict": found["verdict"], "score": round(found["statistic"], 4), "target_label": found["target_label"],
           "order": found["classes"][0]["order"], "train_acc": round(found["settings"]["train_acc"], 2)}  # fmt: skip
    if not is_clean.all():
        flags = table["set"].map({name: flag for flag, name in SETS.items()}).to_numpy()
        quality = detection_quality(table["FCT"].to_numpy(), flags, is_clean, labels, labels.max() + 1)
        row |= {name: round(quality[name], 3) for name in OF_POISONED}
    return row


def read_rows(path):
    """The rows (list of dict) of an earlier --out, none where there is no such file. Raises `UserError` for another table."""
    if not path.is_file():
        return []
    command = "python tools/calibrate_audit.py --out ANOTHER_FILE"
    rows = read_table(path, COLUMNS, command)
    if rows["attack"].notna().any():
        read_table(path, OF_POISONED, command)  # a table of clean runs alone has no such columns
    return rows.to_dict("records")


def markdown(rows):
    """Two tables of ``rows`` (a DataFrame as --out has it): what was said of which runs, and every poisoned run; for
    results/audit.md."""
    rows = rows.fillna({"attack": ""})
    kinds = {
        "clean, at hand when the rules were chosen": rows[(rows["attack"] == "") & rows["seen"]],
        "clean, afterwards": rows[(rows["attack"] == "") & ~rows["seen"]],
        "poisoned, at hand when the rules were chosen": rows[(rows["attack"] != "") & rows["seen"]],
        "poisoned, afterwards": rows[(rows["attack"] != "") & ~rows["seen"]],
    }
    verdicts = ["poisoned", "cannot tell", "no evidence"]
    lines = [
        "| runs | of them | poisoned | cannot tell | no evidence | scores |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, part in kinds.items():
        if len(part):
            counts = " | ".join(str(int((part["verdict"] == verdict).sum())) for verdict in verdicts)
            lines.append(
                f"| {name} | {len(part)} | {counts} | {part['score'].min():.2f} to {part['score'].max():.2f} |"
            )
    head = ["data", "attack, target type", "rate", "poisoned images", "verdict", "score", "right", "D_p: size, precision, recall",
            "D_c contamination"]  # fmt: skip
    summary = "\n".join(lines)
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows[rows["attack"] != ""].sort_values(["attack", "data", "rate"]).to_dict("records"):
        trigger, kind = ATTACKS[row["attack"]]
        found = row["verdict"] == "poisoned"
        if not found:
            right = ""
        elif kind == "all2all":
            right = "any"
        else:
            right = "yes" if row["target_label"] == row["true_target"] else "no"
        kept = f"{row['Dp_size']:.0f}, {row['Dp_precision']:.1f}, {row['Dp_recall']:.1f}" if found else ""
        lines.append(
            f"| {row['data']} | {trigger}, {kind} | {row['rate']:g} | {row['poisoned']} | {row['verdict']} | {row['score']:.2f} | "
            f"{right} | {kept} | {row['Dc_contamination']:.2f} |"
        )
    return summary, "\n".join(lines)


def main(argv=None):
    opt = get_parser().parse_args(argv)
    runs = {f"clean{i:02d}": (*run, None, 0, 0, 100 + i) for i, run in enumerate(CLEAN_RUNS)}
    runs |= {f"poisoned{i:02d}": (*run[:2], ALL, *run[2:], 200 + i) for i, run in enumerate(POISONED_RUNS)}
    for name in opt.runs or []:
        if name not in runs:
            raise UserError(
                f"--runs {name}: the runs are clean00 to clean{len(CLEAN_RUNS) - 1} and poisoned00 to poisoned{len(POISONED_RUNS) - 1}"
            )
    make_folder(opt.out.absolute().parent, "--out")
    check_outputs([opt.out], overwrite=True)
    done = read_rows(opt.out)
    loaded = {}
    for name in opt.runs or runs:
        data, number, classes, attack, rate, target, seed = runs[name]
        if any(row["run"] == name for row in done):
            continue
        loaded[data] = loaded.get(data) or load(data, opt.data_root.absolute())
        images, labels = part(*loaded[data], PARTS[data], number, classes)
        is_clean = np.ones(len(labels), dtype=bool)
        if attack:
            images, labels, is_clean = poison(images, labels, attack, rate, target, seed)
        row = {"run": name, "seen": int(name[-2:]) in SEEN[name[:-2]], "data": data, "part": number, "classes": " ".join(map(str, classes)),
               "attack": attack or "", "rate": rate, "true_target": target if attack else "", "seed": seed,
               "poisoned": int((~is_clean).sum())}  # fmt: skip
        done.append({**row, **audit(images, labels, is_clean, seed, opt.keep and opt.keep / name)})
        write_rows(opt.out, done)
    print(*markdown(pd.DataFrame(done)), sep="\n\n")
    print(f"The table is {shown(opt.out)}")


if __name__ == "__main__":
    run_script(main)
