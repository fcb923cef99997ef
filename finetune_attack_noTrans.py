"""SD step 2: fine-tune the backdoored model with the intra-class loss alone (paper section 4.1, L_intra), so that
poisoned samples of the target class move away from clean ones. Model, optimizer and schedule go on from step 1.

Writes 0.tar, 1.tar, ..., log.csv and options.json to
saved/backdoored_model/poison_rate_<rate>/noTrans_ftsimi/<dataset>/<model>/<trigger>/.
"""

import torch

from models import build_model
from utils import args
from utils.checkpoints import latest_checkpoint, load_checkpoint, load_schedule, refuse_rising_rate
from utils.dataloader_bd import Batches, make_test_sets
from utils.engine import prepare, train_epoch
from utils.errors import UserError, run_script
from utils.fct import COLLAPSED, zeros_of_some
from utils.losses import intra_class
from utils.metrics import evaluate
from utils.paths import backdoored_folder, python, relative, shown
from utils.poisoning import poison_training_set
from utils.run import Run

STEP = "finetune_attack_noTrans"
BEFORE = "train_attack_noTrans"


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_training_options(parser, epochs=10, batch_size=128, lr=None)
    parser.add_argument(
        "--checkpoint_load",
        type=args.file,
        help="checkpoint of step 1, or of this step to continue; default: step 1's last",
    )
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    command = f"{python(f'{BEFORE}.py')} {args.attack_arguments(opt)} --epochs 2"
    path = opt.checkpoint_load or latest_checkpoint(backdoored_folder(opt, "noTrans"), 2, command)
    checkpoint = load_checkpoint(path, opt, command, [BEFORE, STEP])

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    tests = make_test_sets(dataset, opt, runtime)
    folder = backdoored_folder(opt, "noTrans_ftsimi")
    batches = Batches(poisoned.images, poisoned.labels, dataset.spec, runtime, opt.batch_size, opt.seed, STEP)

    model = runtime.place(build_model(opt.model, opt.dataset, dataset.spec.num_classes, dataset.spec.size))
    model = prepare(model, opt, runtime, batches, unused=True)
    # The checkpoint of step 1 brings the rate, the momentum and the place in the schedule.
    optimizer = runtime.sgd(model.parameters(), lr=0.01, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    of_step_1 = relative(path, folder)
    run = Run(opt, STEP, folder / "options.json", poisoned.digest, data=dataset.record, checkpoint_load=of_step_1)
    load_schedule(schedule, checkpoint["schedule"], path)
    refuse_rising_rate(schedule, opt.epochs - (checkpoint["epoch"] + 1) * (checkpoint["step"] == STEP), path)
    spec = dataset.spec
    del dataset  # in memory the training images are held once, as the victim gets them
    first = run.resume(checkpoint, path, model, optimizer)  # the schedule is loaded above
    del checkpoint  # 90 MB of resnet18

    for epoch in range(first, opt.epochs):
        of_one_class = batches.of_one_class(epoch)
        if of_one_class == len(batches):
            raise UserError("every batch holds a single class, for which L_intra is zero; use a larger --batch_size")
        if of_one_class:
            print(
                f"{of_one_class} of {len(batches)} batches hold a single class, for which L_intra is zero; a larger --batch_size has fewer"
            )
        model.train()
        row = train_epoch(model, batches, epoch, intra_class, optimizer, runtime, f"{STEP} epoch {epoch + 1}")
        schedule.step()
        row["zeros"] = zeros_of_some(model, poisoned.images, spec, runtime, opt.seed, opt.batch_size)
        if args.due(opt, epoch):
            model.eval()
            row.update(evaluate(model, tests, batches.normalize, runtime))
        run.finish_epoch(epoch, row, [folder / f"{epoch}.tar"], model, optimizer, schedule)
        if row["zeros"] > COLLAPSED:
            print(f"The features are collapsing: FCT is exactly zero for {row['zeros']:.1f} % of the training images looked at. An "
                  "earlier epoch's checkpoint may separate better; compare them with calculate_consistency.py")  # fmt: skip
    run.complete()
    print(f"Checkpoints are in {shown(folder)}")


if __name__ == "__main__":
    run_script(main)
