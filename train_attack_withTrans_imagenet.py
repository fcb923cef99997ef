"""BR step 1 on the ImageNet subset: train a backdoored model from torchvision's ImageNet weights, with rotation and flip
(paper section 5.1 and appendix).

Images are decoded, triggered and augmented by worker processes; they are never all in memory. Writes 0.tar, 1.tar, ...
(one an epoch, or every --save_freq), log.csv, options.json and samples.png to
saved/backdoored_model/poison_rate_<rate>/withTrans/imagenet/<model>/<trigger>/.
"""

from functools import partial
from pathlib import Path

from models.pretrained import load_pretrained
from train_attack_withTrans import train
from utils import args
from utils.errors import UserError, run_script

STEP = "train_attack_withTrans_imagenet"


def weights(text):
    """An argparse type: imagenet, none, or a path that can be a file's."""
    return text if text in ("imagenet", "none") else args.file(text)


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_training_options(parser, epochs=25, batch_size=128, lr=0.001)
    args.add_step_schedule_options(parser)
    args.add_validation_option(parser, "the training set")
    parser.set_defaults(dataset="imagenet", trigger_type="squareTrigger_imagenet", schedule=[15, 20])
    parser.add_argument(
        "--pretrained",
        type=weights,
        default="imagenet",
        help="imagenet: torchvision's weights, downloaded once; none; or the path of a file of such weights",
    )
    args.add_resume_option(parser)
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    if opt.dataset != "imagenet":
        raise UserError(f"this step is for --dataset imagenet; for {opt.dataset}: python train_attack_withTrans.py")
    files = [opt.pretrained] if isinstance(opt.pretrained, Path) else []
    train(opt, runtime, STEP, 1e-4, partial(load_pretrained, name=opt.model, source=opt.pretrained), files)


if __name__ == "__main__":
    run_script(main)
