"""Train a benign model on the clean training set with the usual data augmentation; the CL attack perturbs its images
against it (paper appendix; Turner et al. 2019).

Writes 0.tar, 1.tar, ... (one an epoch, or every --save_freq), log.csv and options.json to saved/benign_model/<dataset>/<model>/.
"""

import torch

from models import build_model
from utils import args
from utils.checkpoints import CLEAN_IDENTITY, load_checkpoint
from utils.dataloader_bd import Batches, make_test_sets
from utils.engine import prepare, train_epoch
from utils.errors import run_script
from utils.losses import cross_entropy
from utils.metrics import evaluate
from utils.paths import benign_folder, clean_arguments, python, shown
from utils.run import Run
from utils.transforms import CropFlip

STEP = "train_clean_withTrans"
IDENTITY = (*CLEAN_IDENTITY, "seed")


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_device_options(parser)
    args.add_training_options(parser, epochs=200, batch_size=128, lr=0.01)
    args.add_step_schedule_options(parser)
    args.add_resume_option(parser)
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    command = f"{python(f'{STEP}.py')} {clean_arguments(opt)}"
    checkpoint = load_checkpoint(opt.checkpoint_load, opt, command, [STEP], IDENTITY) if opt.checkpoint_load else None

    dataset = args.load_data(opt)
    tests = make_test_sets(dataset, opt, runtime, attack=False)
    folder = benign_folder(opt)
    augmentation = CropFlip.of(dataset.spec)
    batches = Batches(
        dataset.train_images,
        dataset.train_labels,
        dataset.spec,
        runtime,
        opt.batch_size,
        opt.seed,
        STEP,
        augmentation=augmentation,
    )

    torch.manual_seed(opt.seed)
    model = runtime.place(build_model(opt.model, opt.dataset, dataset.spec.num_classes, dataset.spec.size))
    model = prepare(model, opt, runtime, batches)
    optimizer = runtime.sgd(model.parameters(), lr=opt.lr, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, opt.schedule, opt.gamma)

    run = Run(opt, STEP, folder / "options.json", None, data=dataset.record, names=IDENTITY)
    first = run.resume(checkpoint, opt.checkpoint_load, model, optimizer, schedule) if checkpoint else run.start()

    for epoch in range(first, opt.epochs):
        model.train()
        row = train_epoch(model, batches, epoch, cross_entropy, optimizer, runtime, f"{STEP} epoch {epoch + 1}")
        schedule.step()
        if args.due(opt, epoch):
            model.eval()
            row.update(evaluate(model, tests, batches.normalize, runtime))
        paths = [folder / f"{epoch}.tar"] if args.due(opt, epoch, opt.save_freq) else []
        run.finish_epoch(epoch, row, paths, model, optimizer, schedule)
    run.complete()
    print(f"Checkpoints are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
