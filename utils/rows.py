"""What a row of the paper's tables is, and the numbered steps that it takes: commands, outputs, and what each builds on."""

import shlex
from argparse import Namespace
from functools import cached_property
from pathlib import Path

from models import pretrained
from utils import args
from utils.datasets import DATASETS
from utils.errors import UserError
from utils.manifest import of_other_data
from utils.paths import ROOT, backdoored_folder, benign_folder, secure_folder, separated_folder, typed
from utils.poisoning import poison_training_set
from utils.steps import Step

# Rows of the paper's tables: (target_type, trigger_type).
ROWS = {
    "BadNets-all2one": ("all2one", "gridTrigger"),
    "BadNets-all2all": ("all2all", "squareTrigger"),
    "Trojan": ("all2one", "trojanTrigger"),
    "Blend-Strip": ("all2one", "signalTrigger"),
    "Blend-Kitty": ("all2one", "kittyTrigger"),
    "SIG": ("cleanLabel", "sigTrigger"),
    "CL": ("cleanLabel", "fourCornerTrigger"),
    "SSBA": ("all2one", "SSBA"),
}
ON_IMAGENET = {  # the rows that the paper has there, and its triggers
    "BadNets-all2one": "squareTrigger_imagenet",
    "Blend-Strip": "signalTrigger_imagenet",
    "Blend-Kitty": "kittyTrigger",
    "SSBA": "SSBA",
}

TABLES = {
    "cifar10": ("BadNets-all2one", "BadNets-all2all", "Trojan", "Blend-Strip", "Blend-Kitty", "SIG", "CL"),
    "cifar100": ("BadNets-all2one", "Trojan", "Blend-Strip", "Blend-Kitty"),
    "imagenet": tuple(ON_IMAGENET),
}
SCALES = ("paper", "full", "long", "cpu", "quick")
DEFENCES = ("D-BR", "D-ST")

# Options of each step besides those of data set and attack. "paper": as the authors' README gives them.
PRESETS = {
    "paper": {
        "attack": "",
        "train_attack_noTrans": "--epochs 2",
        "finetune_attack_noTrans": "--epochs 10",
        "tau": "",
        "ratios": "--clean_ratio 0.2 --poison_ratio 0.05",
        "separate_samples": "",
        # 90 MB a checkpoint; the authors' README's commands keep all 200. Looking at both test sets takes an eighth of a GPU's time.
        "train_clean_withTrans": "--epochs 200 --save_freq 10 --eval_freq 10",
        "train_attack_withTrans": "--epochs 200 --save_freq 10 --eval_freq 10",
        "train_attack_withTrans_imagenet": "--epochs 25 --lr 0.001 --gamma 0.1 --schedule 15 20",
        "unlearn_relearn": "--epochs 20",
        "train_extractor": "--epochs 200 --learning_rate 0.5 --temp 0.1 --cosine --save_freq 20 --batch_size 512",
        "train_classifier": "--epochs 10 --learning_rate 5 --batch_size 512",
    },
    # A whole table on two cores: a lighter network, fewer epochs (README: the paper's tables).
    "cpu": {
        "attack": "",
        "train_attack_noTrans": "--epochs 2 --lr 0.05 --eval_freq 0",
        "finetune_attack_noTrans": "",  # left out: so early it does harm, and this tau does not need it
        "tau": "--trans1 auto",
        "ratios": "--clean_ratio 0.4 --poison_ratio 0.05",
        "separate_samples": "--clean_per_class --clean_even",
        "train_clean_withTrans": "--epochs 6 --lr 0.05 --schedule 4 --eval_freq 0",
        "train_attack_withTrans": "--epochs 12 --lr 0.05 --schedule 8 11 --eval_freq 0",
        "unlearn_relearn": "--epochs 14 --lr 0.0004 --ascent_bound 15 --bound_growth 1.5 --eval_freq 2",
        "train_extractor": "--epochs 10 --learning_rate 0.1 --temp 0.1 --cosine --batch_size 128",
        "train_classifier": "--epochs 10 --learning_rate 0.05 --lr_decay_epochs 6 8 --batch_size 128 --eval_freq 5",
    },
    # Whether every command runs; its figures mean nothing.
    "quick": {
        "attack": "--train_images 2000",
        "train_attack_noTrans": "--epochs 1 --eval_freq 0",
        "finetune_attack_noTrans": "--epochs 1 --eval_freq 0",
        "tau": "",
        "ratios": "--clean_ratio 0.2 --poison_ratio 0.05",
        "separate_samples": "--clean_per_class",
        "train_clean_withTrans": "--epochs 1 --eval_freq 0",
        "train_attack_withTrans": "--epochs 1 --eval_freq 0",
        "unlearn_relearn": "--epochs 1 --batch_size 64",
        "train_extractor": "--epochs 1 --cosine --batch_size 128",
        "train_classifier": "--epochs 1 --learning_rate 0.05 --batch_size 128",
    },
    "quickstart": {
        "attack": "--target_label 8",
        "train_attack_noTrans": "--epochs 3 --lr 0.05",
        "finetune_attack_noTrans": "--epochs 4 --eval_freq 0",
        "tau": "--trans1 flip --trans2 none",
        "ratios": "--clean_ratio 0.4 --poison_ratio 0.05",
        "separate_samples": "--clean_per_class",
        "train_clean_withTrans": "--epochs 8 --lr 0.05 --schedule 5 7 --eval_freq 4",
        "train_attack_withTrans": "--epochs 8 --lr 0.05 --schedule 5 7 --eval_freq 4",
        "unlearn_relearn": "--epochs 14 --lr 0.0004 --batch_size 64",
        "train_extractor": "--epochs 12 --learning_rate 0.1 --temp 0.1 --cosine --batch_size 128",
        "train_classifier": "--epochs 10 --learning_rate 0.05 --lr_decay_epochs 6 8 --batch_size 128 --eval_freq 0",
    },
}
# As cpu, but the networks are trained for longer, D_p is of what step 3 finds alike, and the bound stays: for a faster processor,
# or more time.
PRESETS["long"] = PRESETS["cpu"] | {
    "ratios": "--clean_ratio 0.55 --poison_ratio 0.05",
    "separate_samples": "--clean_per_class --clean_even --poison_alike",
    "train_attack_withTrans": "--epochs 30 --lr 0.05 --schedule 18 26 --eval_freq 0",
    "unlearn_relearn": "--epochs 8 --lr 0.0004 --ascent_bound 20 --drop_doubtful --eval_freq 2",
    "train_extractor": "--epochs 30 --learning_rate 0.1 --temp 0.1 --cosine --batch_size 128",
    "train_classifier": PRESETS["cpu"]["train_classifier"] + " --poison_weight 0.01",
}
# The paper's networks and epochs, with SD as at scale long, BR at four times the paper's rate, and of ST an extractor that learns from
# all labels but D_p's, and a bound (results/paper.md, results/cifar10.md).
PRESETS["full"] = PRESETS["paper"] | {
    "finetune_attack_noTrans": "",
    **{name: PRESETS["long"][name] for name in ("tau", "ratios", "separate_samples")},
    "unlearn_relearn": "--epochs 5 --lr 0.0004 --drop_doubtful",
    "train_extractor": PRESETS["paper"]["train_extractor"] + " --positives unsuspected",
    "train_classifier": PRESETS["paper"]["train_classifier"] + " --ascent_bound 10",
}
# The public board's network, with as many images as it can learn from in an hour or two of two cores.
PRESETS["board"] = PRESETS["long"] | {
    "attack": "--train_images 10000",
    "train_attack_noTrans": "--epochs 5 --lr 0.01 --batch_size 64 --eval_freq 0",
    "train_attack_withTrans": "--epochs 32 --lr 0.01 --schedule 30 --batch_size 64 --eval_freq 0",
    "unlearn_relearn": "--epochs 10 --lr 0.0004 --batch_size 64 --unlearn_batch_size 32 --ascent_bound 20 --drop_doubtful --eval_freq 0",
    "train_extractor": "--epochs 15 --learning_rate 0.1 --temp 0.1 --cosine --batch_size 128",
}
# What removes the backdoor? Defences with a part left out or exchanged; "samples": see tools/ablation_samples.py.
VARIANTS = {
    "D-BR": {
        "unlearn_only": {"unlearn_relearn": "--passes unlearn"},
        "relearn_only": {"unlearn_relearn": "--passes relearn"},
        "no_bound": {"unlearn_relearn": "--ascent_bound 100 --bound_growth 1"},
        "fixed_bound": {"unlearn_relearn": "--ascent_bound 15 --bound_growth 1"},
        "drop_doubtful": {"unlearn_relearn": "--drop_doubtful"},
        "stay_dropped": {"unlearn_relearn": "--drop_doubtful --stay_dropped"},
        "finetune": {"unlearn_relearn": "--passes relearn --lr 0.01"},  # plain, at the paper's training rate
        "random_clean": {"samples": "random_clean"},
        "random": {"samples": "random"},
        "oracle": {"samples": "oracle"},
        "likeness": {"samples": "likeness"},
    },
    "D-ST": {
        "no_ascent": {"train_classifier": "--poison_weight 0"},
        "bounded": {"train_classifier": "--ascent_bound 10"},
        "authors_mask": {"train_extractor": "--positives authors"},
        "unsuspected": {"train_extractor": "--positives unsuspected"},
        "authors_bounded": {"train_extractor": "--positives authors", "train_classifier": "--ascent_bound 10"},
        "unsuspected_bounded": {"train_extractor": "--positives unsuspected", "train_classifier": "--ascent_bound 10"},
        "without_poison": {
            "train_extractor": "--positives unsuspected --drop_poison",
            "train_classifier": "--ascent_bound 10",
        },
        "random": {"samples": "random"},
        "oracle": {"samples": "oracle"},
        "likeness": {"samples": "likeness"},
    },
}

PRESET_DATA = {
    "quickstart": ("fashion", "resnet10"),
    "long": ("cifar10", "resnet10"),
    "board": ("cifar10", "preactresnet18"),
    "cpu": ("cifar10", "resnet10"),
    "quick": ("cifar10", "resnet10"),
}


def preset_data(preset):
    """Data set and network of a preset where none is named."""
    return PRESET_DATA.get(preset, ("cifar10", "resnet18"))


def defences_of(opt):
    """The defences that a row has: those asked for, else both."""
    return opt.defences or DEFENCES


def without_attack(words):
    """Of ``words`` (options, each followed by one value) those that a step on clean data takes."""
    taken = {f"--{name}" for name in ("dataset", "train_images", "model", "seed", "data_root", "output_root")}
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if pair[0] in taken for word in pair]


def resolve(opt, ratios):
    """The options as the steps see them: a parsed namespace of data set, attack and ``ratios`` (words), and the common words."""
    target_type, trigger_type = ROWS[opt.row]
    usual_dataset, usual_model = preset_data(opt.preset)
    dataset, model = opt.dataset or usual_dataset, opt.model or usual_model
    if dataset in DATASETS and DATASETS[dataset].own:
        raise UserError("this poisons a data set to show the defences; for data of your own: python audit_dataset.py")
    if dataset == "imagenet":
        if opt.row not in ON_IMAGENET:
            raise UserError(f"the paper has no row {opt.row} on imagenet; it has {', '.join(ON_IMAGENET)}")
        if "train_attack_withTrans_imagenet" not in PRESETS[opt.preset]:
            raise UserError(f"--preset {opt.preset} has no BR step 1 on imagenet; give --preset paper")
        if opt.model not in (None, *pretrained.NAMES):
            names = ", ".join(pretrained.NAMES)
            raise UserError(
                f"BR step 1 begins with torchvision's ImageNet weights, and of {opt.model} there are none; of {names}"
            )
        trigger_type = ON_IMAGENET[opt.row]
        if "D-ST" in defences_of(opt):
            raise UserError("the paper's table of imagenet has D-BR alone; add --defences D-BR")
    words = ["--dataset", dataset, "--model", model, "--trigger_type", trigger_type]
    if target_type != "all2one":
        words += ["--target_type", target_type]
    attack = shlex.split(PRESETS[opt.preset]["attack"])
    words += without(attack, ["--target_label"]) if target_type == "all2all" else attack
    for name in ("poison_rate", "seed", "data_root", "output_root"):
        value = getattr(opt, name)
        if value is not None:
            words += [f"--{name}", typed(value.absolute()) if isinstance(value, Path) else str(value)]
    parser = args.Parser("")
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_ratio_options(parser)
    resolved = args.parse(parser, [*words, *ratios], ROOT)
    where = []
    for name in ("device", "precision"):
        if getattr(opt, name):
            where += [f"--{name}", getattr(opt, name)]
    return resolved, words, where


def one_cell(table, row, scale, seed, defence, output_root, data_root=None, model=None):
    """The options of one cell as `plan` takes them, all others left to the steps."""
    given = {"row": row, "preset": scale, "dataset": table, "seed": seed, "defences": [defence]}
    left = dict.fromkeys(("poison_rate", "device", "precision", "variant"))
    return Namespace(**given, **left, model=model, output_root=output_root, data_root=data_root)


def plan(opt, **replaced):
    """The steps of the row in the order they run, by name, and the options that `resolve` gives. ``opt.variant``: one of
    `VARIANTS`, which changes the steps of the defence, or None; ``replaced``: options of steps in the place of the preset's."""
    row = _Row(opt, {name: shlex.split(text) for name, text in {**PRESETS[opt.preset], **replaced}.items()})
    row.add_benign_model()
    row.add_sd()
    row.add_backdoored_model()
    if "D-BR" in defences_of(opt):
        row.add_br()
    if "D-ST" in defences_of(opt):
        row.add_st()
    training_set = TrainingSet(row.resolved)
    for step in row.steps.values():
        step.of_this_set = training_set.is_of
    return row.steps, row.resolved


class TrainingSet:
    """The training set that the ``resolved`` options give, to tell whether a step was run on it or on another that had its place:
    other images under --data_root, another picture or network behind the trigger. It is read when first asked about."""

    def __init__(self, resolved):
        self.resolved = resolved

    @cached_property
    def record(self):
        """What its `Dataset.record` says, or None where it is not here or cannot be read, of which the steps tell."""
        spec = DATASETS[self.resolved.dataset]
        place = Path(self.resolved.data_root) / (spec.folder or self.resolved.dataset)
        if self.resolved.dataset != "fashion" and not place.is_dir():  # else torchvision would download it
            return None
        try:
            return args.load_data(self.resolved).record
        except UserError:
            return None

    @cached_property
    def digest(self):
        """Its `PoisonedSet.digest`, or None where the attack lacks a file, such as a benign model that is yet to be trained."""
        try:
            return poison_training_set(args.load_data(self.resolved), self.resolved).digest
        except UserError:
            return None

    def is_of(self, made):
        """Whether a step's record (dict) is of this set; True where that cannot be told."""
        if self.record is None:
            return True
        if of_other_data(made, self.record):
            return False
        return made.get("poisoned_digest") is None or self.digest in (None, made["poisoned_digest"])


class _Row:
    """The `steps` of a row of the tables, added one part after the other; ``preset``: words by step."""

    def __init__(self, opt, preset):
        self.opt, self.preset, self.ratios = opt, preset, preset["ratios"]
        self.resolved, self.words, self.where = resolve(opt, self.ratios)
        self.changes = VARIANTS[defences_of(opt)[0]][opt.variant] if opt.variant else {}
        self.steps, self.benign = {}, []
        self.samples = "separate_samples"  # the step that makes D_c and D_p
        self.chosen = []  # the words that name its folder, where that is not the usual one

    def add(self, name, script, more, output, record, needs=(), computes=True):
        words = [*self.words, *more, *(self.where if computes else [])]
        self.steps[name] = Step(script, words, output, record, [self.steps[need] for need in needs])

    def epochs(self, name):
        return int(self.preset[name][self.preset[name].index("--epochs") + 1])

    def add_training(self, name, stage, needs=()):
        """A training on the poisoned set; its last checkpoint."""
        folder = backdoored_folder(self.resolved, stage)
        output = folder / f"{self.epochs(name) - 1}.tar"
        self.add(name, f"{name}.py", self.preset[name], output, folder / "options.json", needs)
        return output

    def add_benign_model(self):
        """What CL perturbs its images against."""
        if self.resolved.trigger_type == "fourCornerTrigger":
            name, folder = "train_clean_withTrans", benign_folder(self.resolved)
            words = [*without_attack(self.words), *self.preset[name], *self.where]
            output = folder / f"{self.epochs(name) - 1}.tar"
            self.steps[name] = Step(f"{name}.py", words, output, folder / "options.json", [])
            self.benign = [name]

    def add_sd(self):
        network, load = "train_attack_noTrans", []
        features = self.add_training(network, "noTrans", self.benign)
        if self.preset["finetune_attack_noTrans"]:
            network = "finetune_attack_noTrans"
            features = self.add_training(network, "noTrans_ftsimi", ["train_attack_noTrans"])
        else:  # step 2's last checkpoint is what the next steps would take by themselves
            load = ["--checkpoint_load", typed(features)]
        tau, ratios, of_values = [*self.preset["tau"], *load], self.ratios, ["calculate_consistency"]
        fct, gamma, histogram = (
            features.with_name(f"{features.stem}_{kind}.json") for kind in ("fct", "gamma", "histogram")
        )
        self.add("calculate_consistency", "calculate_consistency.py", tau, fct, fct, [network])
        picture = features.with_suffix(".jpg")
        self.add("visualize_consistency", "visualize_consistency.py", [*tau, *ratios], picture, histogram, of_values)
        self.add("calculate_gamma", "calculate_gamma.py", [*ratios, *load], gamma, gamma, of_values, computes=False)
        separated = separated_folder(self.resolved) / "options.json"
        more = [*tau, *ratios, *self.preset["separate_samples"]]
        self.add("separate_samples", "separate_samples.py", more, separated, separated, of_values)
        if "samples" in self.changes:
            folder = separated_folder(self.resolved) / self.changes["samples"]
            more = [*ratios, "--kind", self.changes["samples"], "--out", typed(folder)]
            record = folder / "options.json"
            self.add(
                "ablation_samples", "tools/ablation_samples.py", more, record, record, [self.samples], computes=False
            )
            self.samples, self.chosen = "ablation_samples", ["--samples", typed(folder)]

    def add_backdoored_model(self):
        self.attack = "train_attack_withTrans" + ("_imagenet" if self.resolved.dataset == "imagenet" else "")
        self.backdoored = self.add_training(self.attack, "withTrans", self.benign)

    def add_br(self):
        name = f"unlearn_purify_{self.opt.variant}" if self.opt.variant else "unlearn_purify"
        saved = self.backdoored.with_name(f"{self.backdoored.stem}_{name}.tar")
        more = changed(self.preset["unlearn_relearn"], self.changes.get("unlearn_relearn", ""))
        if "--passes" in more:  # a single pass takes nothing along
            more = without(more, ["--drop_doubtful", "--stay_dropped"])
        more = [*self.ratios, *more, *self.chosen]
        if self.opt.variant:
            more += ["--checkpoint_save", typed(saved), "--log", typed(saved.with_name(f"{name}.csv"))]
        needs = [self.attack, self.samples]
        self.add("unlearn_relearn", "unlearn_relearn.py", more, saved, saved.with_suffix(".json"), needs)

    def add_st(self):
        extractor = self.add_secure("train_extractor", "last.pth", self.samples)
        last = f"ckpt_epoch_{self.epochs('train_classifier') - 1}.pth"
        classifier = self.add_secure("train_classifier", last, "train_extractor")
        paths = ["--model_ckpt", typed(extractor), "--classifier_ckpt", typed(classifier)]
        self.steps["train_classifier"].words += ["--ckpt", typed(extractor)]
        result = classifier.with_name(f"{classifier.stem}_test.json")
        self.add("test", "ST/test.py", [*self.ratios, *paths], result, result, ["train_classifier"])

    def add_secure(self, name, output, needs):
        """A training of ST, which names its folder by its own options; its ``output`` (a name) there, as a path."""
        words, root, chosen = self.words, self.resolved.output_root, self.chosen
        until = {
            key: more for key, more in self.changes.items() if name != "train_extractor" or key != "train_classifier"
        }
        if until:  # what is different has a folder of its own, which variants that begin alike share
            owner = next(variant for variant, changes in VARIANTS["D-ST"].items() if changes in (until, self.changes))
            root = root / f"D-ST_{owner}"
            chosen = ["--samples", typed(separated_folder(self.resolved) / self.changes.get("samples", ""))]
            words = changed(words, f"--output_root {shlex.quote(typed(root))}")
        more = changed(self.preset[name], self.changes.get(name, ""))
        if name == "train_classifier" and self.opt.variant == "no_ascent":  # so none to be bounded
            more = without(more, ["--ascent_bound"])
        step = Step(
            f"ST/{name}.py", [*words, *self.ratios, *more, *chosen, *self.where], Path(), Path(), [self.steps[needs]]
        )
        folder = secure_folder(Namespace(**{**vars(self.resolved), "output_root": root}))
        folder = folder / step.module().run_name(step.options())
        step.output, step.record = folder / output, folder / "options.json"
        self.steps[name] = step
        return step.output


def changed(words, changes):
    """``words`` (options and their values) with the options in the text ``changes`` in the place of theirs."""
    new = shlex.split(changes)
    return [*without(words, [word for word in new if word.startswith("--")]), *new]


def without(words, names):
    """``words`` (options and their values) without the options ``names``."""
    words = list(words)
    for name in names:
        if name in words:
            first = words.index(name)
            last = next((i for i in range(first + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[first:last]
    return words


def unlearning_log(steps):
    """CSV of unlearn_relearn.py."""
    options = steps["unlearn_relearn"].options()
    return options.log or steps["unlearn_relearn"].output.with_name("unlearn_purify.csv")


def separating_step(steps):
    """The step that made the samples which the defence takes."""
    return steps["ablation_samples" if "ablation_samples" in steps else "separate_samples"]


def trained_step(steps):
    """BR step 1, on whichever data set."""
    return next(step for name, step in steps.items() if name.startswith("train_attack_withTrans"))
