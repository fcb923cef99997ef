"""ST step 2: train a linear classifier on the frozen extractor with the mixed cross-entropy (paper section 4.2):
down on D_c, and by a small weight up on D_p.

Writes ckpt_epoch_0.pth, ckpt_epoch_1.pth, ... (one an epoch), log.csv and options.json to
ST/save/poison_rate_<rate>/SupCon_models/<dataset>/<model>/<trigger>_<clean_ratio>_<poison_ratio>/Linear_.../.
"""

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from models import SupConResNet, logits_of
from ST.losses import classify
from utils import args
from utils.checkpoints import SECURE_IDENTITY, anew_of, latest_of_runs, load_checkpoint, refuse_other_inputs
from utils.dataloader_bd import Batches, make_test_sets
from utils.distributed import parallel
from utils.engine import train_epoch
from utils.errors import UserError, run_script
from utils.metrics import evaluate, say_selection
from utils.paths import python, relative, secure_folder, shown
from utils.poisoning import refuse_other_trigger
from utils.run import Run
from utils.samples import images_of, load_samples, record_of_samples, sample_files
from utils.separation import CLEAN, POISON
from utils.transforms import ContrastiveView
from utils.validation import HeldOut, say_choice
from utils.weights import load_weights

STEP = "train_classifier"
BEFORE = "train_extractor"


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_ratio_options(parser)
    args.add_training_options(parser, epochs=10, batch_size=512, lr=5.0, lr_name="--learning_rate", compiles=False)
    parser.add_argument("--weight_decay", type=args.number(float, 0), default=0, help="weight decay of SGD")
    parser.add_argument(
        "--lr_decay_epochs",
        type=args.positive_int,
        nargs="+",
        default=[60, 75, 90],
        help="epochs at which the rate drops",
    )
    parser.add_argument("--lr_decay_rate", type=args.share, default=0.2, help="what the rate is multiplied by there")
    parser.add_argument(
        "--poison_weight", type=args.number(float, 0), default=0.001, help="weight of the ascent on D_p"
    )
    parser.add_argument(
        "--ascent_bound", type=args.positive, metavar="NATS",
        help="not in the paper: a sample of D_p whose cross-entropy is above it pushes no further; default: there is none",
    )  # fmt: skip
    args.add_samples_option(parser)
    args.add_validation_option(parser, "D_c")
    parser.add_argument(
        "--ckpt", type=args.file, help="extractor of ST step 1; default: the newest last.pth of these options"
    )
    args.add_resume_option(parser)
    return parser


def run_name(opt):
    """Name of the run's folder, as the authors' README has it: decay_0 without a decay."""
    decay = opt.weight_decay or 0
    return f"Linear_{opt.dataset}_{opt.model}_lr_{opt.learning_rate}_decay_{decay}_bsz_{opt.batch_size}"


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    if opt.ascent_bound is not None and not opt.poison_weight:
        raise UserError("--ascent_bound has no use with --poison_weight 0, which makes no ascent; leave it out")
    command = f"{python(f'ST/{BEFORE}.py')} {args.secure_arguments(opt)} --cosine"
    path = opt.ckpt or latest_of_runs(secure_folder(opt), "SupCon_*/last.pth", command, "--ckpt")
    of_extractor = load_checkpoint(path, opt, command, [BEFORE], SECURE_IDENTITY)
    own, load = f"{python(f'ST/{STEP}.py')} {args.secure_arguments(opt)}", opt.checkpoint_load
    checkpoint = load_checkpoint(load, opt, own, [STEP], SECURE_IDENTITY) if load else None
    dataset = args.load_data(opt)
    samples = load_samples(opt, dataset.spec, [CLEAN, POISON])
    again = f"{anew_of(path, f'ST/{BEFORE}.py', command)}; or give its own samples by --samples"
    refuse_other_inputs(of_extractor, path, sample_files(opt, [CLEAN, POISON]), again)
    samples_record, made = record_of_samples(opt)
    refuse_other_trigger(dataset, opt, made, shown(samples_record))
    print(f"The samples are those of {shown(samples_record.parent)}")
    tests = make_test_sets(dataset, opt, runtime)
    folder = secure_folder(opt) / run_name(opt)
    images = images_of(samples, dataset, opt)
    # Of D_p the ascent alone is made; whether it is forgotten says nothing of ACC, so D_c is held out by itself.
    in_clean = np.flatnonzero(samples["flag"] == CLEAN)
    held_out = HeldOut(samples["label"], opt.val_ratio, opt.seed, STEP, among=in_clean)
    batches = Batches(
        held_out.rest(images), held_out.rest(samples["label"]), dataset.spec, runtime, opt.batch_size, opt.seed, STEP,
        augmentation=ContrastiveView(dataset.spec.size, dataset.spec.flip), extra=held_out.rest(samples["flag"]) == CLEAN,
    )  # fmt: skip

    extractor = SupConResNet(opt.model, size=dataset.spec.size)
    load_weights(extractor, of_extractor["model"], path)
    extractor = runtime.place(extractor).eval()
    torch.manual_seed(opt.seed)
    classifier = nn.Linear(extractor.encoder.feature_size, dataset.spec.num_classes).to(runtime.device)
    classifier = parallel(classifier, runtime)
    optimizer = runtime.sgd(classifier.parameters(), lr=opt.learning_rate, weight_decay=opt.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, opt.lr_decay_epochs, opt.lr_decay_rate)

    bound = math.inf if opt.ascent_bound is None else opt.ascent_bound
    objective = partial(classify, extractor=extractor, poison_weight=opt.poison_weight, bound=bound)

    def network(images):
        return logits_of(classifier, extractor.features(images))

    inputs = [path, *sample_files(opt, [CLEAN, POISON])]
    run = Run(
        opt, STEP, folder / "options.json", made.get("poisoned_digest"), inputs=inputs, data=dataset.record,
        ckpt=relative(path, folder),
    )  # fmt: skip
    del dataset  # its training images: those of the separated samples are all that is needed
    first = run.resume(checkpoint, load, classifier, optimizer, schedule) if checkpoint else run.start()

    for epoch in range(first, opt.epochs):
        row = train_epoch(classifier, batches, epoch, objective, optimizer, runtime, f"{STEP} epoch {epoch + 1}")
        schedule.step()
        if held_out:
            row["val_acc_Dc"] = held_out.accuracy(network, images, batches.normalize, runtime)
        if args.due(opt, epoch):
            row.update(evaluate(network, tests, batches.normalize, runtime))
        run.finish_epoch(epoch, row, [folder / f"ckpt_epoch_{epoch}.pth"], classifier, optimizer, schedule)
    run.complete()
    if held_out:
        say_choice(run.history, "val_acc_Dc", lambda epoch: folder / f"ckpt_epoch_{epoch}.pth", load)
    say_selection(run.history, "D-ST")
    print(f"Checkpoints are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
