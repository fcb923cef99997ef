"""SD step 1: train a backdoored model on the poisoned set without any data augmentation (paper section 4.1).

Writes 0.tar, 1.tar, ... (one an epoch), log.csv, options.json and samples.png to
saved/backdoored_model/poison_rate_<rate>/noTrans/<dataset>/<model>/<trigger>/.
"""

import torch

from models import build_model
from utils import args
from utils.checkpoints import load_checkpoint, refuse_rising_rate
from utils.dataloader_bd import Batches, make_test_sets
from utils.engine import prepare, train_epoch
from utils.errors import run_script
from utils.figures import sample_sheet
from utils.losses import cross_entropy
from utils.metrics import evaluate
from utils.paths import backdoored_folder, python, shown
from utils.poisoning import poison_training_set
from utils.run import Run

STEP = "train_attack_noTrans"


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_training_options(parser, epochs=2, batch_size=128, lr=0.01)
    parser.add_argument(
        "--cosine_epochs",
        type=args.positive_int,
        default=100,
        help="T_max: epochs in which the cosine takes the rate to 0",
    )
    args.add_resume_option(parser)
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    command = f"{python(f'{STEP}.py')} {args.attack_arguments(opt)}"
    checkpoint = load_checkpoint(opt.checkpoint_load, opt, command, [STEP]) if opt.checkpoint_load else None

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    tests = make_test_sets(dataset, opt, runtime)
    folder = backdoored_folder(opt, "noTrans")
    batches = Batches(poisoned.images, poisoned.labels, dataset.spec, runtime, opt.batch_size, opt.seed, STEP)

    torch.manual_seed(opt.seed)
    model = runtime.place(build_model(opt.model, opt.dataset, dataset.spec.num_classes, dataset.spec.size))
    model = prepare(model, opt, runtime, batches)
    optimizer = runtime.sgd(model.parameters(), lr=opt.lr, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=opt.cosine_epochs)
    refuse_rising_rate(schedule, opt.epochs)

    run = Run(opt, STEP, folder / "options.json", poisoned.digest, data=dataset.record)
    first = run.resume(checkpoint, opt.checkpoint_load, model, optimizer, schedule) if checkpoint else run.start()
    if first < opt.epochs:
        sample_sheet(run.at(folder / "samples.png"), dataset, poisoned, opt)
        run.add(folder / "samples.png")
    del dataset  # in memory the training images are held once, as the victim gets them

    for epoch in range(first, opt.epochs):
        model.train()
        row = train_epoch(model, batches, epoch, cross_entropy, optimizer, runtime, f"{STEP} epoch {epoch + 1}")
        schedule.step()
        if args.due(opt, epoch):
            model.eval()
            row.update(evaluate(model, tests, batches.normalize, runtime))
        run.finish_epoch(epoch, row, [folder / f"{epoch}.tar"], model, optimizer, schedule)
    run.complete()
    print(f"Checkpoints are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
