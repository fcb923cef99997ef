"""ST step 1: train a secure feature extractor by semi-supervised contrastive learning (paper section 4.2).

Samples of D_c attract the D_c samples of their class; those of D_p and D_u only their own other view. --positives unsuspected
takes D_u for D_c here; with authors D_c attracts all samples of its class. --drop_poison leaves D_p out. Writes last.pth every
epoch, ckpt_epoch_<n>.pth every --save_freq epochs, log.csv and options.json to
ST/save/poison_rate_<rate>/SupCon_models/<dataset>/<model>/<trigger>_<clean_ratio>_<poison_ratio>/SupCon_.../.
"""

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from models import SupConResNet
from ST.losses import SupConLoss, authors_mask, contrastive, trusted_mask
from utils import args
from utils.checkpoints import SECURE_IDENTITY, load_checkpoint
from utils.dataloader_bd import Batches
from utils.engine import prepare, train_epoch
from utils.errors import UserError, run_script
from utils.paths import python, samples_folder, secure_folder, shown
from utils.run import Run
from utils.samples import images_of, load_samples, sample_files
from utils.separation import CLEAN, POISON, UNCERTAIN
from utils.transforms import ContrastiveView

STEP = "train_extractor"
WARM_FROM, WARM_EPOCHS = 0.01, 10
DROPS = (700, 800, 900)
# Which samples may be each other's positives, and the sets whose labels the extractor trusts.
POSITIVES = {
    "paper": (trusted_mask, [CLEAN]),
    "authors": (authors_mask, [CLEAN]),
    "unsuspected": (trusted_mask, [CLEAN, UNCERTAIN]),
}


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_ratio_options(parser)
    args.add_training_options(parser, epochs=200, batch_size=512, lr=0.5, lr_name="--learning_rate", evaluates=False)
    parser.add_argument("--weight_decay", type=args.number(float, 0), default=1e-4, help="weight decay of SGD")
    parser.add_argument("--temp", type=args.positive, default=0.1, help="temperature of the loss")
    parser.add_argument(
        "--cosine", action="store_true", help="cosine schedule; without it the rate drops at lr_decay_epochs"
    )
    parser.add_argument(
        "--lr_decay_epochs",
        type=args.positive_int,
        nargs="+",
        help="epochs at which the rate drops without --cosine; default: 700 800 900",
    )
    parser.add_argument(
        "--lr_decay_rate",
        type=args.share,
        default=0.1,
        help="factor of a drop; --cosine ends at its cube times learning_rate",
    )
    parser.add_argument(
        "--save_freq", type=args.positive_int, default=20, help="epochs between checkpoints that are kept"
    )
    parser.add_argument(
        "--positives", choices=tuple(POSITIVES), default="paper",
        help="paper: samples of D_c attract those of D_c with their label; authors: those of D_p and D_u with it too, as the "
        "authors' code has it: many more labels, of which some are poisoned; unsuspected (not in the paper): D_u is taken for D_c, "
        "so that all labels but those of D_p count",
    )  # fmt: skip
    parser.add_argument(
        "--drop_poison", action="store_true",
        help="not in the paper: leave D_p out, whose samples else attract their own other view and repel all others; only for a D_p that "
        "has all poisoned samples, for that is also what keeps out those that it lacks",
    )  # fmt: skip
    args.add_samples_option(parser)
    parser.add_argument("--trial", type=args.natural, default=0, help="names the folder of repeated runs")
    args.add_resume_option(parser)
    return parser


def learning_rate(opt, epoch, batch, batches):
    """Rate for a batch (epochs and batches counted from 0): cosine or stepwise; above 256 samples a batch a linear
    warm-up over 10 epochs (Khosla et al. 2020, the published training schedule)."""

    def after(epochs):
        if opt.cosine:
            least = opt.learning_rate * opt.lr_decay_rate**3
            return least + (opt.learning_rate - least) * (1 + math.cos(math.pi * epochs / opt.epochs)) / 2
        return opt.learning_rate * opt.lr_decay_rate ** sum(epochs > drop for drop in opt.lr_decay_epochs or DROPS)

    if opt.batch_size > 256 and epoch < WARM_EPOCHS:
        share = (batch + epoch * batches) / (WARM_EPOCHS * batches)
        return WARM_FROM + share * (after(WARM_EPOCHS) - WARM_FROM)
    return after(epoch + 1)


def run_name(opt):
    """Name of the run's folder, as the authors' README has it."""
    name = f"SupCon_{opt.dataset}_{opt.model}_lr_{opt.learning_rate}_decay_{opt.weight_decay}_bsz_{opt.batch_size}"
    return f"{name}_temp_{opt.temp}_trial_{opt.trial}{'_cosine' * opt.cosine}{'_warm' * (opt.batch_size > 256)}"


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    if opt.cosine and opt.lr_decay_epochs:
        raise UserError("--lr_decay_epochs has no use with --cosine; leave one out")
    command = f"{python(f'ST/{STEP}.py')} {args.secure_arguments(opt)} --cosine"
    load = opt.checkpoint_load
    checkpoint = load_checkpoint(load, opt, command, [STEP], SECURE_IDENTITY) if load else None
    sets = [CLEAN, UNCERTAIN, POISON]
    dataset = args.load_data(opt)
    samples = load_samples(opt, dataset.spec, sets)
    if opt.drop_poison:
        samples = samples[samples["flag"] != POISON]
        print(
            "Note: poisoned samples that D_p lacks can plant the backdoor in this extractor, as they hardly do where D_p trains it too"
        )
    folder = secure_folder(opt) / run_name(opt)
    mask, trusted = POSITIVES[opt.positives]
    batches = Batches(
        images_of(samples, dataset, opt), samples["label"], dataset.spec, runtime, opt.batch_size, opt.seed, STEP,
        augmentation=ContrastiveView(dataset.spec.size, dataset.spec.flip), views=2, extra=np.isin(samples["flag"], trusted),
    )  # fmt: skip
    print(f"{len(samples)} samples of {shown(samples_folder(opt))}, {(samples['flag'] == CLEAN).sum()} of them in D_c")
    if opt.batch_size > 256 and opt.epochs < 2 * WARM_EPOCHS:
        print(f"Note: with a batch above 256 the learning rate goes from {WARM_FROM:g} to where the schedule is after "
              f"{WARM_EPOCHS} epochs; {opt.epochs} see little of {opt.learning_rate:g}. Take more --epochs, or a --batch_size "
              "up to 256")  # fmt: skip

    torch.manual_seed(opt.seed)
    model = runtime.place(SupConResNet(opt.model, size=dataset.spec.size))
    model = prepare(model, opt, runtime, batches)
    optimizer = runtime.sgd(model.parameters(), lr=opt.learning_rate, weight_decay=opt.weight_decay)
    objective = partial(contrastive, loss_of=SupConLoss(opt.temp), mask=mask)

    run = Run(opt, STEP, folder / "options.json", None, inputs=sample_files(opt, sets), data=dataset.record)
    del dataset  # its training images: those of the separated samples are all that is needed
    first = run.resume(checkpoint, load, model, optimizer) if checkpoint else run.start()

    for epoch in range(first, opt.epochs):

        def set_rate(batch, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(opt, epoch, batch, len(batches))

        model.train()
        row = train_epoch(model, batches, epoch, objective, optimizer, runtime, f"{STEP} epoch {epoch + 1}", set_rate)
        paths = [folder / f"ckpt_epoch_{epoch}.pth"] if (epoch + 1) % opt.save_freq == 0 else []
        run.finish_epoch(epoch, row, [*paths, folder / "last.pth"], model, optimizer)
    run.complete()
    print(f"Checkpoints are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
