"""BR step 1: train a backdoored model on the poisoned set with the usual data augmentation (paper section 4.3).

Writes 0.tar, 1.tar, ... (one an epoch, or every --save_freq), log.csv, options.json and samples.png to
saved/backdoored_model/poison_rate_<rate>/withTrans/<dataset>/<model>/<trigger>/.
"""

import torch

from models import build_model
from utils import args
from utils.checkpoints import load_checkpoint
from utils.dataloader_bd import Batches, make_test_sets
from utils.engine import prepare, train_epoch
from utils.errors import UserError, run_script
from utils.figures import sample_sheet
from utils.losses import cross_entropy
from utils.metrics import evaluate
from utils.paths import backdoored_folder, python, shown
from utils.poisoning import poison_training_set
from utils.run import Run
from utils.transforms import CropFlip
from utils.validation import HeldOut, say_choice

STEP = "train_attack_withTrans"


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_training_options(parser, epochs=200, batch_size=128, lr=0.01)
    args.add_step_schedule_options(parser)
    args.add_validation_option(parser, "the training set")
    args.add_resume_option(parser)
    return parser


def train(opt, runtime, step, weight_decay, start_from=None, inputs=()):
    """The whole step; that on ImageNet is the same with another start.

    Args:
        opt: the options; runtime: a `device.Runtime`; step: name of the script; weight_decay: of SGD;
        start_from: called with the new network to give it other weights than random ones, or None; inputs: paths of the files that
        it reads.
    """
    command = f"{python(f'{step}.py')} {args.attack_arguments(opt)}"
    checkpoint = load_checkpoint(opt.checkpoint_load, opt, command, [step]) if opt.checkpoint_load else None

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    tests = make_test_sets(dataset, opt, runtime)
    folder = backdoored_folder(opt, "withTrans")
    held_out = HeldOut(poisoned.labels, opt.val_ratio, opt.seed, step)
    augmentation = CropFlip.of(dataset.spec)
    batches = Batches(
        held_out.rest(poisoned.images),
        held_out.rest(poisoned.labels),
        dataset.spec,
        runtime,
        opt.batch_size,
        opt.seed,
        step,
        augmentation=augmentation,
    )

    torch.manual_seed(opt.seed)
    model = build_model(opt.model, opt.dataset, dataset.spec.num_classes, dataset.spec.size)
    if start_from and not checkpoint:
        start_from(model)
    model = prepare(runtime.place(model), opt, runtime, batches)
    optimizer = runtime.sgd(model.parameters(), lr=opt.lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, opt.schedule, opt.gamma)

    read = () if checkpoint else inputs
    run = Run(opt, step, folder / "options.json", poisoned.digest, inputs=read, data=dataset.record)
    first = run.resume(checkpoint, opt.checkpoint_load, model, optimizer, schedule) if checkpoint else run.start()
    sample_sheet(run.at(folder / "samples.png"), dataset, poisoned, opt)
    run.add(folder / "samples.png")
    del dataset  # in memory the training images are held once, as the victim gets them

    for epoch in range(first, opt.epochs):
        model.train()
        row = train_epoch(model, batches, epoch, cross_entropy, optimizer, runtime, f"{step} epoch {epoch + 1}")
        schedule.step()
        model.eval()
        if held_out:
            row["val_acc"] = held_out.accuracy(model, poisoned.images, batches.normalize, runtime)
        if args.due(opt, epoch):
            row.update(evaluate(model, tests, batches.normalize, runtime))
        paths = [folder / f"{epoch}.tar"] if args.due(opt, epoch, opt.save_freq) else []
        run.finish_epoch(epoch, row, paths, model, optimizer, schedule)
    run.complete()
    if held_out:
        say_choice(run.history, "val_acc", lambda epoch: folder / f"{epoch}.tar", opt.checkpoint_load)
    print(f"Checkpoints are in {shown(folder)}")


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    if opt.dataset == "imagenet":
        raise UserError("on imagenet this step is train_attack_withTrans_imagenet.py")
    train(opt, runtime, STEP, weight_decay=5e-4)


if __name__ == "__main__":
    run_script(main)
