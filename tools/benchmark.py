"""How fast every stage is beside the usual PyTorch code for it, in the same run.

The plain reference is written here as most repositories have it: PIL images through torchvision's transforms, one at a time,
in a DataLoader with 2 workers, which keep running from round to round, normalised image by image, float32, contiguous format;
FCT from pairs of images, separation by batches of one. Both do the same work on the same images, turn about (A B A B), after
one round that is not counted. Prints a table and writes it (--out) with a bar picture beside it: medians of the seconds, the
ratio plain / ours with its least and largest pair, images a second, peak memory; on CUDA also the share of the bfloat16 peak
that a large matrix product reaches.
"""

import statistics
import sys
import time
from argparse import Namespace
from functools import lru_cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from models import MODELS, SupConResNet, build_model
from models.resnet import with_plain_convolutions
from ST.losses import SupConLoss, classify, contrastive, mixed_cross_entropy, trusted_mask
from utils import args
from utils.dataloader_bd import Batches, Normalize, TestSets, hold
from utils.device import cores
from utils.engine import prepare, train_epoch
from utils.errors import UserError, run_script
from utils.fct import compute_fct, fct_runtime
from utils.figures import save_figure
from utils.files import check_outputs, make_folder, read_table, write_rows
from utils.loading import load_dataset
from utils.losses import cross_entropy, intra_class, intra_class_loss, negative_cross_entropy
from utils.metrics import evaluate
from utils.paths import ROOT, shown
from utils.records import hardware
from utils.separation import gammas_of_ratios, separate
from utils.transforms import ContrastiveView, CropFlip
from utils.triggers import GRID, apply_trigger

WORKERS = 2
COLUMNS = ("stage", "ours_s", "plain_s", "ratio", "images_per_s")  # some, by which a table is known as the benchmark's


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--stages", choices=tuple(STAGES), nargs="+", help="these alone")
    parser.add_argument("--model", choices=tuple(MODELS), default="resnet18", help="network")
    parser.add_argument("--images", type=args.number(int, 64), help="images a stage; default: 384, with --quick 64")
    parser.add_argument("--rounds", type=args.positive_int, help="how often each is timed; default: 3, with --quick 1")
    parser.add_argument("--batch_size", type=args.number(int, 2), default=128, help="images a batch")
    parser.add_argument("--quick", action="store_true", help="within a minute on two cores; too short for good figures")
    parser.add_argument(
        "--out", type=args.file_beside(".png"), default=ROOT / "results/benchmark.csv", help="the table"
    )
    args.add_compile_option(parser)
    args.add_device_options(parser, decodes=False)
    args.add_overwrite_option(parser, "a file that is no benchmark's; a benchmark's is replaced without")
    return parser


class Work:
    """What the stages work on: images uint8 (N, 32, 32, 3), labels int64 (N,), the data set's spec, and the options."""

    def __init__(self, opt, runtime):
        data = load_dataset("fashion", ROOT / "dataset")
        count = opt.images or (64 if opt.quick else 384)
        if count > len(data.train_images):
            raise UserError(f"--images {count}: the bundled data has {len(data.train_images)} training images")
        self.runtime, self.batch_size, self.spec = runtime, opt.batch_size, data.spec
        self.images, self.labels = data.train_images[:count], data.train_labels[:count]
        self.pil = [Image.fromarray(image) for image in self.images]
        self.model, self.opt = opt.model, opt
        self.trusted = np.arange(count) % 2 == 0
        self.fct_runtime = fct_runtime(opt, runtime)

    def network(self, plain):
        torch.manual_seed(0)
        network = build_model(self.model, "cifar10", 10)
        return with_plain_convolutions(network).to(self.runtime.device) if plain else self.runtime.place(network)

    def trained(self, network, batches, lr=0.01):
        """Our network as the steps train it on ``batches``, and its optimizer."""
        network = prepare(network.train(), Namespace(compile=self.opt.compile, epochs=1), self.runtime, batches)
        return network, self.runtime.sgd(network.parameters(), lr, 5e-4)

    def batches(self, name, **more):
        return Batches(self.images, self.labels, self.spec, self.runtime, self.batch_size, 0, name, **more)

    def loader(self, *change, pairs=False, batch_size=None, shuffle=True):
        """The usual loader; with ``pairs`` of the image as it is and changed, else changed alone."""
        end = [transforms.ToTensor(), transforms.Normalize(self.spec.mean, self.spec.std)]
        changed, plain = transforms.Compose([*change, *end]), transforms.Compose(end)
        data = Plain(self.pil, self.labels, [plain, changed] if pairs else [changed])
        return loader_of(data, batch_size or self.batch_size, shuffle)

    def to_device(self, *tensors):
        return [tensor.to(self.runtime.device) for tensor in tensors]


def loader_of(data, batch_size, shuffle=True):
    """The usual loader. Its processes begin in the round that is not counted: in an epoch of 50 000 images that is nothing, in a
    round of few it would be much of the time."""
    return DataLoader(data, batch_size, shuffle, num_workers=WORKERS, persistent_workers=True)


class Plain(Dataset):
    """Images of PIL, each changed when it is asked for, in as many ways as there are ``changes``."""

    def __init__(self, images, labels, changes):
        self.images, self.labels, self.changes = images, labels, changes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return *(change(self.images[row]) for change in self.changes), int(self.labels[row]), row


CROP_FLIP = (transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip())
VIEW = (
    transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
    transforms.RandomHorizontalFlip(),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
)
TAU = (transforms.RandomRotation(180), transforms.RandomAffine(0, translate=(0.2, 0.2)))


class TwoViews:
    """Two changes of one image, stacked."""

    def __init__(self, change):
        self.change = change

    def __call__(self, image):
        return torch.stack([self.change(image), self.change(image)])


def sgd(model, lr=0.01):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# Each stage: (ours, plain), functions without arguments that do the whole of it once.


def poisoning(work):
    def plain():
        poisoned = []
        for image in work.pil:
            pixels = np.array(image)
            for row in range(3):
                for column in range(3):
                    for channel in range(3):
                        pixels[-1 - row, -1 - column, channel] = GRID[row, column]
            poisoned.append(Image.fromarray(pixels))

    return lambda: apply_trigger("gridTrigger", work.images, train=True), plain


def training(work):
    own, theirs = work.network(False), work.network(True).train()
    batches, their_optimizer = work.batches("training", augmentation=CropFlip()), sgd(theirs)
    own, optimizer = work.trained(own, batches)
    loader = work.loader(*CROP_FLIP)

    def plain():
        total = correct = 0
        for inputs, labels, _ in loader:
            inputs, labels = work.to_device(inputs, labels)
            logits = theirs(inputs)
            loss = F.cross_entropy(logits, labels)
            step(their_optimizer, loss)
            total += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()

    return lambda: train_epoch(own, batches, 0, cross_entropy, optimizer, work.runtime, "training"), plain


def intra_class_epoch(work):
    own, theirs = work.network(False), work.network(True).train()
    batches, their_optimizer = work.batches("intra"), sgd(theirs)
    own, optimizer = work.trained(own, batches)
    loader = work.loader()

    def plain():
        for inputs, labels, _ in loader:
            inputs, labels = work.to_device(inputs, labels)
            loss = intra_class_loss(theirs.features(inputs), labels, theirs.fc.out_features)
            step(their_optimizer, loss)
            loss.item()

    return lambda: train_epoch(own, batches, 0, intra_class, optimizer, work.runtime, "intra"), plain


def fct(work):
    own, theirs = work.network(False).eval(), work.network(True).eval()
    loader = work.loader(*TAU, pairs=True, shuffle=False)
    runtime = work.fct_runtime

    def plain():
        values = []
        with torch.no_grad():
            for image, changed, _, _ in loader:
                image, changed = work.to_device(image, changed)
                values += ((theirs.features(image) - theirs.features(changed)) ** 2).mean(1).tolist()

    return lambda: compute_fct(own, work.images, work.spec, runtime, seed=0), plain


def separation(work):
    """Ours takes the values that the step before saved, as separate_samples.py does; the plain one computes them again."""
    theirs = work.network(True).eval()
    values, _ = compute_fct(work.network(False).eval(), work.images, work.spec, work.fct_runtime, seed=0)
    loader = work.loader(*TAU, pairs=True, batch_size=1, shuffle=False)
    low, high = gammas_of_ratios(values, 0.2, 0.05)

    def plain():
        sets = {"clean": [], "poison": [], "suspicious": []}
        with torch.no_grad():
            for image, changed, label, row in loader:
                image, changed = work.to_device(image, changed)
                value = ((theirs.features(image) - theirs.features(changed)) ** 2).mean().item()
                name = "clean" if value <= low else "poison" if value >= high else "suspicious"
                sets[name].append((np.asarray(work.pil[row.item()]), label.item()))

    def ours():
        flags = separate(values, *gammas_of_ratios(values, 0.2, 0.05), 0.2, 0.05, 0)
        return [(work.images[flags == flag], work.labels[flags == flag]) for flag in range(3)]

    return ours, plain


def extractor(work):
    own = work.runtime.place(SupConResNet(work.model))
    theirs = with_plain_convolutions(SupConResNet(work.model)).train().to(work.runtime.device)
    trusted = work.trusted
    batches = work.batches("extractor", augmentation=ContrastiveView(32), views=2, extra=trusted)
    own, optimizer = work.trained(own, batches)
    their_optimizer, loss_of = sgd(theirs), SupConLoss()
    change = transforms.Compose([*VIEW, transforms.ToTensor(), transforms.Normalize(work.spec.mean, work.spec.std)])
    loader = loader_of(Plain(work.pil, work.labels, [TwoViews(change)]), work.batch_size)

    objective = partial(contrastive, loss_of=loss_of)

    def plain():
        for views, labels, rows in loader:
            views, labels = work.to_device(torch.cat([views[:, 0], views[:, 1]]), labels)
            features = torch.stack(theirs(views).chunk(2), 1)
            mask = trusted_mask(labels, torch.from_numpy(trusted[rows.numpy()]).to(labels.device))
            loss = loss_of(features, mask)
            step(their_optimizer, loss)
            loss.item()

    return lambda: train_epoch(own, batches, 0, objective, optimizer, work.runtime, "extractor"), plain


def classifier(work):
    encoder = work.runtime.place(SupConResNet(work.model)).eval()
    their_encoder = with_plain_convolutions(SupConResNet(work.model)).eval().to(work.runtime.device)
    own, theirs = (nn.Linear(encoder.encoder.feature_size, 10).to(work.runtime.device) for _ in range(2))
    optimizer, their_optimizer = sgd(own), sgd(theirs)
    batches = work.batches("classifier", augmentation=ContrastiveView(32), extra=work.trusted)
    loader = work.loader(*VIEW)

    objective = partial(classify, extractor=encoder)

    def plain():
        for inputs, labels, rows in loader:
            inputs, labels = work.to_device(inputs, labels)
            with torch.no_grad():
                features = their_encoder.features(inputs)
            in_clean = torch.from_numpy(work.trusted[rows.numpy()]).to(labels.device)
            loss = mixed_cross_entropy(theirs(features), labels, in_clean)
            step(their_optimizer, loss)
            loss.item()

    return lambda: train_epoch(own, batches, 0, objective, optimizer, work.runtime, "classifier"), plain


def unlearning(work):
    """One pass up and one down; half of the images each."""
    own, theirs = work.network(False), work.network(True).train()
    their_optimizer, half = sgd(theirs, 1e-4), len(work.labels) // 2
    parts = [(work.images[:half], work.labels[:half]), (work.images[half:], work.labels[half:])]
    settings = (work.spec, work.runtime, work.batch_size, 0, "unlearning")
    up, down = (Batches(images, labels, *settings, augmentation=CropFlip()) for images, labels in parts)
    own, optimizer = work.trained(own, down, lr=1e-4)
    end = [transforms.ToTensor(), transforms.Normalize(work.spec.mean, work.spec.std)]
    change = transforms.Compose([*CROP_FLIP, *end])
    loaders = [
        loader_of(Plain(pil, labels, [change]), work.batch_size)
        for pil, labels in ((work.pil[:half], work.labels[:half]), (work.pil[half:], work.labels[half:]))
    ]

    def ours():
        train_epoch(own, up, 0, negative_cross_entropy, optimizer, work.runtime, "unlearn")
        train_epoch(own, down, 0, cross_entropy, optimizer, work.runtime, "relearn")

    def plain():
        for sign, loader in zip((-1, 1), loaders, strict=True):
            for inputs, labels, _ in loader:
                inputs, labels = work.to_device(inputs, labels)
                loss = sign * F.cross_entropy(theirs(inputs), labels)
                step(their_optimizer, loss)
                loss.item()

    return ours, plain


def evaluation(work):
    """Both test sets, clean and triggered."""
    own, theirs = work.network(False).eval(), work.network(True).eval()
    triggered = apply_trigger("gridTrigger", work.images, train=False)
    labels = torch.from_numpy(work.labels).to(work.runtime.device)
    held = [hold(images, work.runtime) for images in (work.images, triggered)]
    everything = torch.arange(len(labels), device=labels.device)
    tests = TestSets(held[0], labels, everything, held[1], torch.zeros_like(labels), labels)
    normalize = Normalize(work.spec, work.runtime.device)
    end = transforms.Compose([transforms.ToTensor(), transforms.Normalize(work.spec.mean, work.spec.std)])
    loaders = [
        loader_of(Plain([Image.fromarray(image) for image in images], work.labels, [end]), work.batch_size, False)
        for images in (work.images, triggered)
    ]  # fmt: skip

    def plain():
        with torch.no_grad():
            for loader in loaders:
                correct = 0
                for inputs, wanted, _ in loader:
                    inputs, wanted = work.to_device(inputs, wanted)
                    correct += (theirs(inputs).argmax(1) == wanted).sum().item()

    return lambda: evaluate(own, tests, normalize, work.runtime), plain


STAGES = {
    "poisoning": poisoning, "training epoch": training, "L_intra epoch": intra_class_epoch, "FCT": fct,
    "separation": separation, "extractor epoch": extractor, "classifier epoch": classifier,
    "unlearn + relearn epoch": unlearning, "evaluation": evaluation,
}  # fmt: skip
PASSES = {
    "training epoch": 3,
    "L_intra epoch": 3,
    "unlearn + relearn epoch": 3,
    "FCT": 2,
    "evaluation": 2,
}  # passes an image


def timed(run, device):
    """(seconds, peak resident memory in MB, peak memory of the GPU in MB) of one run."""
    peak = _reset_peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    gpu = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else float("nan")
    return seconds, peak(), gpu


def _reset_peak():
    """Begin to watch the resident memory; the function returned gives its peak in MB, NaN where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return lambda: float("nan")

    def peak():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    return peak


@lru_cache  # measured once, not for every stage
def bfloat16_peak(device):
    """Operations a second of a large bfloat16 matrix product, which stands for what the GPU can do."""
    one = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = statistics.median(timed(lambda: one @ one, device)[0] for _ in range(10))
    return 2 * 8192**3 / seconds


def compare(name, work, rounds):
    """One line of the table."""
    ours, plain = STAGES[name](work)
    ours()
    plain()
    times = {"ours": [], "plain": []}
    for _ in range(rounds):
        for kind, run in (("ours", ours), ("plain", plain)):
            times[kind].append(timed(run, work.runtime.device))
    seconds = {kind: [one[0] for one in found] for kind, found in times.items()}
    ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["plain"], strict=True)]
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    line = {
        "stage": name, "ours_s": medians["ours"], "plain_s": medians["plain"], "ratio": medians["plain"] / medians["ours"],
        "ratio_least": min(ratios), "ratio_most": max(ratios), "images_per_s": len(work.labels) / medians["ours"],
        "plain_images_per_s": len(work.labels) / medians["plain"], "peak_rss_mb": max(one[1] for one in times["ours"]),
        "plain_peak_rss_mb": max(one[1] for one in times["plain"]), "peak_gpu_mb": max(one[2] for one in times["ours"]),
    }  # fmt: skip
    if work.runtime.device.type == "cuda" and name in PASSES:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work.network(False).eval()(torch.zeros(1, 3, 32, 32, device=work.runtime.device))
        operations = counter.get_total_flops() * PASSES[name] * len(work.labels)
        line["bf16_peak_share"] = operations / medians["ours"] / bfloat16_peak(work.runtime.device)
    return line


def duration(seconds):
    """Seconds as text, from a minute on in minutes."""
    return f"{seconds:.2g} s" if seconds < 60 else f"{seconds / 60:.3g} min"


def markdown(table):
    """The table (a DataFrame as --out has it) as the README shows it."""
    head = ["stage", "ours, images/s", "plain, images/s", "times as fast (least to most)", "50 000 images: ours", "plain",
            "peak memory: ours", "plain"]  # fmt: skip
    on_gpu = bool(table["peak_gpu_mb"].notna().any())
    if on_gpu:
        head += ["of the GPU: ours", "share of its bfloat16 peak"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in table.to_dict("records"):
        ratios = f"{row['ratio']:.3g} ({row['ratio_least']:.3g} to {row['ratio_most']:.3g})"
        rates = [row["images_per_s"], row["plain_images_per_s"]]
        cells = [*(f"{rate:.3g}" for rate in rates), ratios, *(duration(50_000 / rate) for rate in rates)]
        memory = ["peak_rss_mb", "plain_peak_rss_mb", *(["peak_gpu_mb"] if on_gpu else [])]
        cells += [f"{row[name]:.0f} MB" for name in memory]
        if on_gpu:
            share = row["bf16_peak_share"]
            cells.append("" if np.isnan(share) else f"{100 * share:.2g} %")
        lines.append(f"| {row['stage']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(table, title):
    """A figure of the ratios, with their least and largest, in the table (a DataFrame as --out has it)."""
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(table) + 1.2), layout="constrained")
    places = np.arange(len(table))[::-1]
    axis.barh(places, table["ratio"], color="#3b6fb6")
    errors = [table["ratio"] - table["ratio_least"], table["ratio_most"] - table["ratio"]]
    axis.errorbar(table["ratio"], places, xerr=np.clip(errors, 0, None), fmt="none", color="black", capsize=3)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(places, table["stage"])
    axis.set_xlabel("times as fast as the plain code (logarithmic)")
    axis.set_title(title, fontsize=9)
    return figure


def is_benchmark(path):
    """Whether a file is a table of this script."""
    try:
        read_table(path, COLUMNS, "")
    except UserError:
        return False
    return True


def main(argv=None):
    opt = get_parser().parse_args(argv)
    picture = opt.out.with_suffix(".png")
    check_outputs([opt.out, picture], opt.overwrite or is_benchmark(opt.out))
    make_folder(opt.out.absolute().parent, "--out")
    runtime = args.runtime_of(opt)
    work = Work(opt, runtime)
    rounds = opt.rounds or (1 if opt.quick else 3)
    lines = []
    for name in opt.stages or STAGES:
        lines.append(compare(name, work, rounds))
        print("{stage}: ours {ours_s:.3g} s, plain {plain_s:.3g} s, {ratio:.2f} times".format(**lines[-1]), flush=True)
    rounded = [{name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in line.items()} for line in lines]
    write_rows(opt.out, rounded)

    table = pd.DataFrame(lines)
    title = f"{opt.model}, {runtime}, {hardware(opt.device)}, {cores()} cores seen"
    save_figure(bars(table, title), picture)
    print(f"{len(work.labels)} images, batches of {opt.batch_size}, {rounds} rounds, {runtime}, {hardware(opt.device)}")
    print(markdown(table))
    print(f"The table is {shown(opt.out)}, the picture {shown(picture)}")


if __name__ == "__main__":
    run_script(main)
