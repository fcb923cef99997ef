"""The options that several steps share, so that a name, a default or a check is written once."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from models import MODELS
from utils import distributed
from utils.datasets import DATASETS, SPLITS, fewer_images
from utils.device import PRECISIONS, choose_runtime, cores
from utils.errors import UserError
from utils.loading import load_dataset
from utils.paths import ROOT, arguments, decoded_folder, real, shown
from utils.poisoning import TARGET_TYPES
from utils.SSBA.encode_image import ENCODER
from utils.transforms import DRAWN, TAU_NAMES
from utils.triggers import TRIGGERS

DATA_ROOT = "folder that holds the data sets; of --dataset folder: DIR with train/<class>/*; of --dataset npz: the file"

# What the options of the attack say where nobody knows of one.
UNKNOWN = {"trigger_type": "unknown", "target_type": "unknown", "target_label": -1, "poison_rate": "unknown"}

ATTACK_DEFAULTS = {"trigger_type": "gridTrigger", "target_type": "all2one", "target_label": 0, "poison_rate": 0.1}

# Options that one trigger alone has a use for.
TRIGGER_OPTIONS = {"benign_checkpoint": "fourCornerTrigger", "ssba_encoder": "SSBA", "ssba_images": "SSBA"}


class Options(argparse.Namespace):
    """Options, and beside them the ``defaults`` (dict) of their parser: what a record that lacks one, for it is older than
    the option, was made with; and ``ran_in`` (dict, see `device.Runtime.record`): what "auto" came to."""

    __slots__ = ("defaults", "ran_in")  # so that they are no options themselves


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help shows the defaults."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            if word == "--" or str(word).endswith("=--"):  # argparse takes the value away and checks nothing
                self.error(f"{word} has no use here")
        options, rest = super().parse_known_args(args, Options() if namespace is None else namespace)
        if isinstance(options, Options):
            options.defaults = {action.dest: action.default for action in self._actions if action.dest in options}
        return options, rest

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, []) or action.default is False:  # the option's own text says what that stands for
            return action.help
        return super()._get_help_string(action)


def number(kind, low=None, high=None, low_open=False):
    """An argparse type: an int of 64 bits or a float of 32 within bounds. ``low_open`` leaves out ``low``."""

    def convert(text):
        value = kind(text)
        if not abs(value) < (2**63 if isinstance(value, int) else 2.0**127):  # NaN compares false, so it is refused too
            raise argparse.ArgumentTypeError(
                f"{text:.40} is out of range: it must be finite, an integer within 64 bits, any other within those of float32"
            )
        below = low is not None and (value <= low if low_open else value < low)
        if below or (high is not None and value > high):
            bounds = []
            if low is not None:
                bounds.append(f"{'above' if low_open else 'at least'} {low}")
            if high is not None:
                bounds.append(f"at most {high}")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(bounds)}")
        return value

    convert.__name__ = kind.__name__
    return convert


def file_name(text):
    """An argparse type: a name without a folder."""
    if text != os.path.basename(text) or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text:.40} is no plain name; a folder is chosen by another option")
    return path(text).name


def word(text):
    """An argparse type: a name; an empty one is most often a shell variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def device(text):
    """An argparse type: a device by a name that torch knows, whether or not it is here, or auto."""
    try:
        if word(text) != "auto":
            torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text:.40} is no device that torch knows; such are cpu, cuda and cuda:1"
        ) from None
    return text


def devices(text):
    """An argparse type: `device` names with commas between them, as a list."""
    return [device(name) for name in text.split(",")]


def path(text):
    """An argparse type: a path with a name; an empty one is most often a shell variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    if any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{text[:40]}... has a name of more than 255 bytes")
    return Path(text)


def file(text):
    """An argparse type: a path that can be a file's."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    return path(text)


def file_beside(suffix):
    """An argparse type: a path that can be a file's, beside which another with ``suffix`` in the place of its own is written."""

    def convert(text):
        if file(text).suffix.lower() == suffix:
            raise argparse.ArgumentTypeError(
                f"what is written beside {text:.200} would replace it; name it other than *{suffix}"
            )
        return path(text)

    return convert


positive_int = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, low_open=True)
share = number(float, 0, 1, low_open=True)


def add_data_options(parser, models=tuple(MODELS)):
    """dataset, data_root, model (one of ``models``), seed and where the results go."""
    parser.add_argument(
        "--dataset", choices=tuple(DATASETS), default="cifar10", help="data set; folder or npz: your own, at data_root"
    )
    parser.add_argument("--data_root", type=path, default=ROOT / "dataset", help=DATA_ROOT)
    parser.add_argument(
        "--model", choices=models, default="resnet18", metavar="NAME", help=f"network: {_named(models)}"
    )
    parser.add_argument("--seed", type=natural, default=0, help="decides every random draw")
    parser.add_argument(
        "--output_root", type=path, default=ROOT, help="folder under which saved/ and ST/save/ are kept"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="imagenet, folder: refuse images that cannot be read, instead of skipping them",
    )
    parser.add_argument(
        "--train_images", type=positive_int, metavar="N",
        help="take N training images alone, the same share of every class, to save time; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--image_size",
        type=number(int, 8, 1024),
        help="folder, npz: side in pixels; default: 32, 64 or 224, by the median",
    )


def _named(models):
    return ", ".join(models) if set(models) <= set(MODELS) else f"{', '.join(MODELS)}, or any classifier of torchvision"


def load_data(opt):
    """The `datasets.Dataset` that the options name."""
    with distributed.leader_first():  # what is decoded, or downloaded, once
        dataset = load_dataset(opt.dataset, opt.data_root, opt.strict, opt.image_size, decoded_folder(opt))
    return dataset if opt.train_images is None else fewer_images(dataset, opt.train_images)


def add_attack_options(parser):
    """Which attack the training set suffered."""
    parser.add_argument(
        "--trigger_type",
        choices=tuple(TRIGGERS),
        default=ATTACK_DEFAULTS["trigger_type"],
        help="what the trigger looks like",
    )
    parser.add_argument(
        "--target_type",
        choices=TARGET_TYPES,
        default=ATTACK_DEFAULTS["target_type"],
        help="which samples get which label",
    )
    parser.add_argument(
        "--target_label",
        type=natural,
        default=ATTACK_DEFAULTS["target_label"],
        help="target class of all2one and cleanLabel",
    )
    parser.add_argument(
        "--poison_rate",
        type=share,
        default=ATTACK_DEFAULTS["poison_rate"],
        help="share of the eligible training samples poisoned",
    )
    parser.add_argument(
        "--benign_checkpoint",
        type=file,
        help="fourCornerTrigger: checkpoint of train_clean_withTrans.py; default: its last",
    )
    parser.add_argument("--ssba_encoder", type=file, default=ENCODER, help="SSBA: file of tools/train_ssba.py")
    parser.add_argument(
        "--ssba_images",
        type=path,
        nargs="+",
        metavar="FILE.npy",
        help="SSBA: all training (and all test) images encoded elsewhere, uint8 (N, H, W, 3) in sample order",
    )


RATIOS = {"clean_ratio": 0.2, "poison_ratio": 0.05}  # the paper's


def add_ratio_options(parser):
    """alpha_c and alpha_p, which also name the folder of the separated samples."""
    helps = "alpha_c: share of all samples taken as clean", "alpha_p: share of all samples taken as poisoned"
    for (name, value), text in zip(RATIOS.items(), helps, strict=True):
        parser.add_argument(f"--{name}", type=share, default=value, help=text)


def add_samples_option(parser):
    parser.add_argument(
        "--samples", type=path, help="folder of separated samples, of any network; default: that of these options"
    )


def add_device_options(parser, decodes=True):
    """Where and how precisely to compute; ``decodes``: whether images may be decoded by worker processes."""
    parser.add_argument(
        "--device", type=device, default="auto", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bfloat16 where the hardware has it"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run: torch's deterministic algorithms (on CUDA as far as there are such)",
    )
    if not decodes:
        parser.set_defaults(workers=None)
        return
    parser.add_argument(
        "--workers",
        type=number(int, 0, 256),
        help="imagenet, folder of images above 64 pixels: processes that decode; default: one a core, 8 at most",
    )


def add_training_options(parser, epochs, batch_size, lr, lr_name="--lr", evaluates=True, compiles=True):
    """Epochs, batch size, learning rate, evaluation, and replacing an earlier run of other settings; ``lr`` None: the
    checkpoint decides it."""
    parser.add_argument("--epochs", type=positive_int, default=epochs, help="epochs in all, a resumed run's included")
    parser.add_argument("--batch_size", type=number(int, 2), default=batch_size, help="samples a batch")
    if lr is not None:
        parser.add_argument(lr_name, type=positive, default=lr, help="learning rate")
    if evaluates:
        parser.add_argument(
            "--eval_freq",
            type=natural,
            default=1,
            help="evaluate every so many epochs and after the last; 0: the last only",
        )
    add_overwrite_option(parser)
    if compiles:
        add_compile_option(parser)


def add_resume_option(parser):
    parser.add_argument("--checkpoint_load", type=file, help="continue after this checkpoint of this step")


def add_compile_option(parser):
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto",
        help="of the training step; on: torch.compile, and on CUDA a CUDA graph; auto: on CUDA the graph, and for a long run both",
    )  # fmt: skip


def add_validation_option(parser, of):
    parser.add_argument(
        "--val_ratio",
        type=number(float, 0, 0.9),
        default=0.0,
        help=f"share of {of} held out of the training, to choose an epoch by without the test set; 0: none",
    )


def add_overwrite_option(parser, what="results of other settings in the same folder"):
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_runner_options(parser):
    """Of a tool that runs numbered steps and draws what they give."""
    parser.add_argument("--seed", type=natural, default=0, help="given to every step")
    parser.add_argument("--data_root", type=path, help="given to every step")
    parser.add_argument("--output_root", type=path, default=ROOT / "runs", help="folder of the steps' results")
    parser.add_argument("--out", type=path, default=ROOT / "results", help="folder of the picture and the table")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    add_overwrite_option(parser)


TAU_DEFAULTS = {"trans1": "rotate", "trans2": "affine", "draws": 1}


def add_tau_options(parser):
    """tau, the transform of FCT."""
    parser.add_argument(
        "--trans1",
        choices=(*TAU_NAMES, "auto"),
        default=TAU_DEFAULTS["trans1"],
        help="first part of the transform; auto (not in the paper): flip and shrink, whichever moves a sample more",
    )
    parser.add_argument(
        "--trans2", choices=TAU_NAMES, default=TAU_DEFAULTS["trans2"], help="second part of the transform"
    )
    parser.add_argument(
        "--draws", type=positive_int, default=TAU_DEFAULTS["draws"], help="draws of the transform whose FCT is averaged"
    )


def add_fct_options(parser):
    """What steps 3 to 5 of SD compute FCT by: tau, and the network."""
    add_tau_options(parser)
    parser.add_argument(
        "--batch_size", type=positive_int, default=256, help="images a forward pass; FCT is the same but for rounding"
    )
    parser.add_argument("--checkpoint_load", type=file, help="checkpoint of step 2 (or 1); default: step 2's last")


def fct_arguments(options):
    """What decides FCT beside the attack, as the user would type it, for commands: tau and ``--precision`` where they are in
    ``options`` (dict) and not the default."""
    given = {name: options[name] for name, default in TAU_DEFAULTS.items() if options.get(name, default) != default}
    if options.get("precision") == "bfloat16":  # auto is float32 there
        given["precision"] = "bfloat16"
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items())


def check(opt, base=None):
    """Checks that look at several options, or at more than their spelling. ``base``: the folder in which paths are meant, where
    that is not the current one. Raises `UserError`."""
    for name, value in vars(opt).items() if base else ():
        setattr(opt, name, _each_path(base.__truediv__, value))
    streamed = DATASETS[opt.dataset].streamed  # the number of classes is then what the folder holds
    if DATASETS[opt.dataset].own:
        _forget_the_attack(opt)
        if opt.train_images is not None:
            raise UserError(f"--train_images has no use with --dataset {opt.dataset}: your own data is taken as it is")
    elif opt.image_size is not None:
        raise UserError(
            f"--image_size has no use with --dataset {opt.dataset}, whose images have one size; leave it out"
        )
    elif hasattr(opt, "target_label"):
        classes = DATASETS[opt.dataset].num_classes
        if opt.target_label >= classes and not streamed:
            raise UserError(f"--target_label {opt.target_label}: {opt.dataset} has the classes 0 to {classes - 1}")
        if opt.target_type == "all2all" and opt.target_label != _attack_defaults(opt)["target_label"]:
            raise UserError(
                "--target_label has no use with --target_type all2all, which relabels every class to the next; leave it out"
            )
        for name, trigger in TRIGGER_OPTIONS.items():
            if getattr(opt, name) not in (None, ENCODER) and opt.trigger_type != trigger:
                raise UserError(f"--{name} has no use with --trigger_type {opt.trigger_type}; it belongs to {trigger}")
        if opt.ssba_images and opt.train_images is not None:
            raise UserError(
                "--ssba_images holds all images in sample order, which --train_images leaves out; leave one out"
            )
        if len(opt.ssba_images or []) > 2:
            raise UserError("--ssba_images takes one file, the training images, or two, the training and test images")
    if not streamed and (opt.strict or getattr(opt, "workers", None) is not None):
        name = "strict" if opt.strict else "workers"
        raise UserError(f"--{name} has no use with --dataset {opt.dataset}, which is held in memory; leave it out")
    if hasattr(opt, "clean_ratio"):
        several = getattr(opt, "poison_ratios", None)  # in the place of the one
        name, ratio = ("poison_ratios", max(several)) if several else ("poison_ratio", opt.poison_ratio)
        if opt.clean_ratio + ratio > 1:
            raise UserError(f"--clean_ratio {opt.clean_ratio} and --{name} {ratio} overlap: their sum is above 1")
    if getattr(opt, "trans1", None) == "auto" and opt.trans2 not in ("affine", "none"):
        raise UserError(f"--trans2 {opt.trans2} has no use with --trans1 auto, which decides both parts; leave it out")
    if hasattr(opt, "trans1") and opt.trans1 == opt.trans2 in ("none", "flip", "vflip"):  # twice a mirror is none
        raise UserError(
            f"--trans1 {opt.trans1} --trans2 {opt.trans2} change no image, so that every FCT is zero; name one that does, or one alone "
            f"and none beside it"
        )
    if hasattr(opt, "trans1") and opt.draws > 1 and (opt.trans1 == "auto" or not DRAWN & {opt.trans1, opt.trans2}):
        tau = "auto" if opt.trans1 == "auto" else f"{opt.trans1} --trans2 {opt.trans2}"
        raise UserError(f"--draws {opt.draws} has no use with --trans1 {tau}, which draws nothing; leave it out")
    for name in ("data_root", "output_root"):
        if hasattr(opt, name):
            setattr(opt, name, getattr(opt, name).absolute())
    if opt.dataset == "folder" and hasattr(opt, "output_root"):
        refuse_places_in_the_data(opt, ["output_root"])
    # In a record these mean the same from every folder, however they are spelt.
    for name in ("samples", "pretrained", *TRIGGER_OPTIONS):
        if hasattr(opt, name):
            setattr(opt, name, _each_path(real, getattr(opt, name)))
    return opt


def refuse_places_in_the_data(opt, names):
    """Raise a `UserError` where an option (``names``) would have something written among the user's own images, which would be taken
    for a class."""
    for name in names:
        place = real(getattr(opt, name))
        for split in SPLITS:
            if place.is_relative_to(real(opt.data_root / split)):
                raise UserError(
                    f"--{name} {shown(place)} lies among the images of --data_root; give a place outside them"
                )


def _each_path(change, value):
    """``value`` with the paths in it, if there are any, changed by a function."""
    if isinstance(value, list):
        return [_each_path(change, one) for one in value]
    return change(value) if isinstance(value, Path) else value


def _attack_defaults(opt):
    """Values (dict) of the attack's options that the user did not ask for: a script may have its own."""
    return ATTACK_DEFAULTS | getattr(opt, "defaults", {})


def _forget_the_attack(opt):
    """Of data of the user's own nobody knows the attack: put `UNKNOWN` in the place of its options."""
    defaults = _attack_defaults(opt)
    for name, value in UNKNOWN.items():
        if hasattr(opt, name):
            if getattr(opt, name) != defaults[name]:
                raise UserError(f"--{name} has no use with --dataset {opt.dataset}: your own data is taken as it is")
            setattr(opt, name, value)
    for name in TRIGGER_OPTIONS:
        if getattr(opt, name, None) not in (None, ENCODER):
            raise UserError(f"--{name} has no use with --dataset {opt.dataset}: your own data is taken as it is")


def parse(parser, argv=None, base=None):
    """Parse and check the options; ``base``: see `check`."""
    return check(parser.parse_args(argv), base)


def start(parser, argv=None, settle=lambda opt, runtime: runtime):
    """Parse and check the options of a script that computes; return them and its `Runtime`, in the precision that ``settle`` chooses."""
    opt = parse(parser, argv)
    runtime = settle(opt, runtime_of(opt))
    opt.ran_in = runtime.record
    several = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    print(f"Running on {runtime}{several}", flush=True)
    return opt, runtime


def runtime_of(opt):
    """The `Runtime` that the options of `add_device_options` choose."""
    workers = min(8, cores()) if opt.workers is None else opt.workers
    runtime = choose_runtime(distributed.device_of(opt.device), opt.precision, workers, opt.deterministic)
    distributed.join(runtime.device)
    return runtime


def due(opt, epoch, every=None):
    """Whether what is done ``every`` so many epochs and after the last, by default evaluating, is due after ``epoch`` (from 0)."""
    every = opt.eval_freq if every is None else every
    return epoch + 1 == opt.epochs or (every and (epoch + 1) % every == 0)


def attack_arguments(opt):
    """The options of data set, attack and places as the user would type them, for messages and commands: those that are not
    the default, the first three always."""
    own = DATASETS[opt.dataset].own
    always = ["dataset", "model", *([] if own else ["trigger_type"])]
    attack = [] if own else ["target_type", "target_label", "poison_rate", *TRIGGER_OPTIONS]
    return arguments(opt, always, ["data_root", "image_size", "train_images", "seed", "output_root", *attack])


def secure_arguments(opt):
    """As `attack_arguments`, for the steps of ST and BR: with the ratios that name the folder of the separated samples."""
    return " ".join([attack_arguments(opt), arguments(opt, [], RATIOS)]).strip()


def table_and_seed(opt):
    """What the name of a picture or table says of --table and --seed: the parts (str) that are not the default."""
    return [*([opt.table] if opt.table != "cifar10" else []), *([f"seed{opt.seed}"] if opt.seed else [])]


def of_record(options):
    """The options of data set and attack that a record tells of, as a namespace.

    Args:
        options: dict, as `manifest.plain_options` makes it; a name that it has not gets the default.

    Raises:
        SystemExit: with code 2 and one line, for a value that the option would not take.
    """
    parser, words = Parser(""), []
    add_data_options(parser)
    add_attack_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        value = options.get(name)
        if value is None or value == default or (name in UNKNOWN and value == UNKNOWN[name]):
            continue
        values = value if isinstance(value, list) else [value]
        if name in ("data_root", "output_root", *TRIGGER_OPTIONS):  # paths of the repository are kept relative to it
            values = [ROOT / str(one) for one in values]
        words += [f"--{name}", *map(str, [] if value is True else values)]
    return parser.parse_args(words)


def add_step_schedule_options(parser):
    """The stepwise learning-rate schedule of BR step 1, and how many of its checkpoints are kept."""
    parser.add_argument(
        "--schedule", type=positive_int, nargs="+", default=[100, 150], help="epochs at which the rate drops"
    )
    parser.add_argument("--gamma", type=share, default=0.1, help="what the rate is multiplied by there")
    parser.add_argument(
        "--save_freq",
        type=positive_int,
        default=1,
        help="keep the checkpoint of every so many epochs and of the last; an interrupted run goes on after the last kept",
    )
