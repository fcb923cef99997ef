"""BR step 2: remove the backdoor by unlearning D_p and relearning D_c (paper section 4.3).

Each epoch is one pass of gradient ascent on the cross-entropy over D_p, then one of descent over D_c. Writes the model
(--checkpoint_save) and, a row an epoch, the log (--log), whose first row, epoch -1, is the model before.

--checkpoint_load may also be a plain state dict of any classifier of torchvision, which --model names. The cleaned one is
then such a file too; a checkpoint to continue from is beside it.
"""

from dataclasses import replace
from functools import partial

import torch

from models import MODELS, build_model
from models.foreign import NAMES, build_foreign, plain_state
from utils import args
from utils.checkpoints import load_optimizer
from utils.dataloader_bd import Batches, make_test_sets
from utils.distributed import rank
from utils.engine import prepare, train_epoch
from utils.errors import UserError, run_script
from utils.files import tensor_writer
from utils.losses import ASCENT_BOUND, cross_entropy, negative_cross_entropy
from utils.metrics import evaluate
from utils.paths import relative, shown
from utils.poisoning import refuse_other_trigger
from utils.removal import STEP, load_start, places_of, refuse_lost_choice, refuse_to_replace, summarise, take_choice
from utils.run import Run
from utils.samples import images_of, load_samples, record_of_samples, refuse_samples_of_other_data, sample_files
from utils.seeding import generator
from utils.separation import CLEAN, POISON
from utils.transforms import CropFlip
from utils.unlearning import Dropped, bound_of, sample_losses
from utils.validation import HeldOut, is_best, say_choice
from utils.weights import load_weights

PASSES = ("unlearn", "relearn")  # of an epoch, in their order


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser, (*MODELS, *(name for name in NAMES if name not in MODELS)))
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_ratio_options(parser)
    args.add_training_options(parser, epochs=20, batch_size=128, lr=1e-4)
    parser.add_argument(
        "--checkpoint_load",
        type=args.file,
        help="the backdoored model, a model of this step to continue, or a plain state dict; default: BR step 1's last",
    )
    parser.add_argument(
        "--checkpoint_save",
        type=args.file,
        help="the cleaned model; default: <checkpoint_load>_unlearn_purify.tar, of a plain state dict .pth; of a model of "
        "this step that goes on, itself",
    )
    args.add_samples_option(parser)
    args.add_validation_option(parser, "D_c and of D_p")
    parser.add_argument(
        "--passes", choices=PASSES, nargs="+", default=list(PASSES),
        help="which of the two passes an epoch has; fewer than both are for comparison",
    )  # fmt: skip
    parser.add_argument(
        "--unlearn_batch_size", type=args.number(int, 2),
        help="samples of D_p a step; default: --batch_size, as in the paper. The few steps of a small D_p are undone by those of D_c",
    )  # fmt: skip
    parser.add_argument(
        "--ascent_bound", type=args.positive, default=ASCENT_BOUND, metavar="NATS",
        help="a sample of D_p whose cross-entropy is above this pushes no further; the default stops none in the paper's setting",
    )  # fmt: skip
    parser.add_argument(
        "--bound_growth", type=args.number(float, 1), default=1.0, metavar="FACTOR",
        help="the ascent_bound grows so after an epoch in which it held a tenth of D_p back and D_p stayed known; 1: it stays",
    )  # fmt: skip
    parser.add_argument(
        "--drop_doubtful", action="store_true",
        help="not in the paper: an epoch's descent leaves out the samples of D_c that its ascent took along with D_p",
    )  # fmt: skip
    parser.add_argument(
        "--stay_dropped", action="store_true",
        help="with --drop_doubtful: where over a tenth would be left out, those last left out are, in place of none",
    )  # fmt: skip
    for name, kind in (("mean", args.number(float, 0, 1)), ("std", args.share)):
        parser.add_argument(
            f"--{name}", type=kind, nargs=3, metavar=("R", "G", "B"),
            help="plain state dict: what its images are normalised with, for values in 0-1; default: the data set's",
        )  # fmt: skip
    parser.add_argument(
        "--log", type=args.file, help="CSV of the epochs; default: unlearn_purify.csv beside checkpoint_save"
    )
    return parser


def refuse_contradictions(opt):
    """Raise a `UserError` where an option contradicts another, and tell of one that has no use beside another."""
    if opt.drop_doubtful and len(opt.passes) < len(PASSES):
        raise UserError(
            "--drop_doubtful says what the descent leaves out after an ascent; give both --passes, or leave it out"
        )
    if opt.stay_dropped and not opt.drop_doubtful:
        raise UserError("--stay_dropped is about what --drop_doubtful leaves out; give both")
    if "unlearn" not in opt.passes:
        usual = get_parser().get_default
        of_ascent = ("unlearn_batch_size", "ascent_bound", "bound_growth")
        given = [f"--{name}" for name in of_ascent if getattr(opt, name) != usual(name)]
        if given:
            print(f"Note: {', '.join(given)} says how D_p is unlearnt, which is not among the --passes")
    if opt.bound_growth > 1 and opt.ascent_bound >= ASCENT_BOUND:
        raise UserError(f"--bound_growth has no use without an --ascent_bound below {ASCENT_BOUND:g}, where it ends")


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    opt.passes = [name for name in PASSES if name in opt.passes]
    refuse_contradictions(opt)
    path, checkpoint, plain = load_start(opt)
    resumed = checkpoint["step"] == STEP
    places = places_of(opt, path, resumed, plain)
    if not opt.overwrite:
        refuse_to_replace(places, path)

    dataset = args.load_data(opt)
    spec = replace(dataset.spec, mean=tuple(opt.mean or dataset.spec.mean), std=tuple(opt.std or dataset.spec.std))
    refuse_samples_of_other_data(opt, checkpoint["poisoned_digest"], path)
    samples_record, made = record_of_samples(opt)
    refuse_other_trigger(dataset, opt, made, shown(samples_record))
    print(f"The samples are those of {shown(samples_record.parent)}")
    tests = make_test_sets(dataset, opt, runtime)
    unlearn_batch_size = opt.unlearn_batch_size or opt.batch_size
    augmentation = CropFlip(flip=spec.flip_relearn)  # 4 pixels of crop on every data set

    def batches_of(flag, size):
        name, samples = f"{STEP} {flag}", load_samples(opt, spec, [flag])
        images, labels = images_of(samples, dataset, opt), samples["label"]
        held_out = HeldOut(labels, opt.val_ratio, opt.seed, name)
        batches = Batches(held_out.rest(images), held_out.rest(labels), spec, runtime, size, opt.seed, name,
                          augmentation=augmentation)  # fmt: skip
        return batches, held_out, images

    to_unlearn, *held_out_of_Dp = batches_of(POISON, unlearn_batch_size)
    to_relearn, *held_out_of_Dc = batches_of(CLEAN, opt.batch_size)
    if len(to_unlearn.labels) < 2 or len(to_relearn.labels) < 2:
        raise UserError(
            f"D_p has {len(to_unlearn.labels)} samples to train on and D_c {len(to_relearn.labels)}, and batch statistics need two; "
            f"separate with a larger --poison_ratio or --clean_ratio"
        )
    if "unlearn" in opt.passes and unlearn_batch_size > len(to_unlearn.labels):
        raise UserError(
            f"a batch of {unlearn_batch_size} is larger than D_p, {len(to_unlearn.labels)} samples; give --unlearn_batch_size "
            f"{len(to_unlearn.labels)}, or less for more steps an epoch"
        )

    if plain:
        state = {name.removeprefix("network."): value for name, value in checkpoint["model"].items()}
        model = build_foreign(opt.model, state, path, opt.dataset, spec)
    else:
        model = build_model(opt.model, opt.dataset, spec.num_classes, spec.size)
        load_weights(model, checkpoint["model"], path)
    network = runtime.place(model)
    model = prepare(network, opt, runtime, to_relearn, unused=plain and network.has_auxiliary)
    optimizer = runtime.sgd(model.parameters(), lr=opt.lr, weight_decay=5e-4)
    inputs = [*([] if resumed else [path]), *sample_files(opt, [POISON, CLEAN])]
    beside = [*places.results, *places.choices]
    run = Run(
        opt, STEP, places.record, checkpoint["poisoned_digest"], inputs=inputs, data=dataset.record, log=places.log,
        beside=beside, option="--checkpoint_save", checkpoint_load=relative(path, places.save.parent),
    )  # fmt: skip
    dataset = None  # its training images: those of the separated samples are all that is needed
    model.eval()
    dropped = Dropped(opt.stay_dropped)
    if resumed:
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        refuse_lost_choice(places, "val_score", checkpoint["history"], path)
        dropped.load(checkpoint["schedule"], len(to_relearn.labels), path)
        first = run.take_history(checkpoint, path)
        take_choice(run, places, path)
    else:
        first = run.start()
        measures = {
            "loss_Dp_after": sample_losses(model, to_unlearn, runtime).mean().item(),
            **evaluate(model, tests, to_relearn.normalize, runtime),
        }
        run.history.append({"epoch": -1, **measures})
        print("before  " + "  ".join(f"{name} {value:g}" for name, value in measures.items()))
    del checkpoint  # the model has its weights

    for epoch in range(first, opt.epochs):
        # Networks from elsewhere may have dropout.
        own = [rank()] if rank() else []  # each process has its own part of a batch
        torch.manual_seed(int(generator(opt.seed, STEP, epoch, *own).integers(2**63)))
        model.train()
        row = {"seconds": 0}
        if "unlearn" in opt.passes:
            bound = bound_of(opt, run.history, spec.num_classes)
            ascent = partial(negative_cross_entropy, bound=bound)
            up = train_epoch(model, to_unlearn, epoch, ascent, optimizer, runtime, f"unlearn epoch {epoch + 1}")
            row["loss_Dp"] = -up["loss"]  # during the ascent
            row["at_bound"] = up["at_bound"]  # share of D_p that the guard of the ascent held
            row["train_acc_Dp"] = up["train_acc"]
            if opt.bound_growth > 1:
                row["bound"] = bound
            row["seconds"] += up["seconds"]
        if "relearn" in opt.passes:
            taken = to_relearn
            if opt.drop_doubtful:
                taken, row["dropped"] = dropped.rest(model, to_relearn, to_unlearn, spec.num_classes, runtime)
            down = train_epoch(model, taken, epoch, cross_entropy, optimizer, runtime, f"relearn epoch {epoch + 1}")
            row["loss_Dc"] = down["loss"]  # during the descent
            row["train_acc_Dc"] = down["train_acc"]
            row["seconds"] += down["seconds"]
        model.eval()
        if opt.val_ratio:
            for name, (held_out, images) in (("val_acc_Dc", held_out_of_Dc), ("val_acc_Dp", held_out_of_Dp)):
                row[name] = held_out.accuracy(model, images, to_relearn.normalize, runtime)
            row["val_score"] = row["val_acc_Dc"] - row["val_acc_Dp"]
        # what of the ascents so far has outlived the descents
        row["loss_Dp_after"] = sample_losses(model, to_unlearn, runtime).mean().item()
        chosen = places.choices if opt.val_ratio and is_best(row, "val_score", run.history) else []
        if args.due(opt, epoch):
            row.update(evaluate(model, tests, to_relearn.normalize, runtime))
        states = [*(places.results if epoch + 1 == opt.epochs else []), *chosen[1:]]
        results = {place: tensor_writer(plain_state(network, opt.foreign)) for place in states}
        # What this run goes on from is written last: a kill before it means that the epoch is done again.
        # In the place of a schedule, which BR has not, the checkpoint keeps what was last dropped.
        run.finish_epoch(epoch, row, [*chosen[:1], places.save], model, optimizer, dropped, results)

    run.complete()
    summarise(run.history)
    if opt.val_ratio:
        say_choice(run.history, "val_score", lambda epoch: places.choices[-1], by="most right of D_c less D_p")
    if plain:
        print(f"The cleaned state dict is {shown(places.results[0])}; to continue, give {shown(places.save)}")
    print(f"The model is {shown(places.save)}, the log {shown(places.log)}")


if __name__ == "__main__":
    run_script(main)
