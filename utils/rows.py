"""What a row of the paper's tables is, and the numbered steps that it takes: commands, outputs, and what each builds on."""

import shlex
from argparse import Namespace
from pathlib import Path

from utils import args
from utils.datasets import DATASETS
from utils.errors import UserError
from utils.paths import backdoored_folder, benign_folder, secure_folder, separated_folder, typed
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
        # 90 MB a checkpoint; the authors' README's commands keep all 200.
        "train_clean_withTrans": "--epochs 200 --save_freq 10",
        "train_attack_withTrans": "--epochs 200 --save_freq 10",
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
# The paper's network and epochs with our SD, for its step 2 and its tau lose most rows (README: figure 3), a bound, and the epoch in
# which the backdoor is farthest away (results/paper.md).
PRESETS["full"] = PRESETS["paper"] | {
    "finetune_attack_noTrans": "",
    "tau": "--trans1 auto",
    "separate_samples": "--clean_per_class",
    "unlearn_relearn": "--epochs 20 --ascent_bound 10 --choose forgotten",
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
# The public board's network, with as many images as it can learn from in an hour of one core.
PRESETS["board"] = PRESETS["long"] | {
    "attack": "--train_images 10000",
    "train_attack_noTrans": "--epochs 5 --lr 0.01 --batch_size 64 --eval_freq 0",
    "train_attack_withTrans": "--epochs 16 --lr 0.01 --schedule 10 14 --batch_size 64 --eval_freq 0",
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
        "finetune": {"unlearn_relearn": "--passes relearn --lr 0.01"},  # plain fine-tuning on D_c, at training's rate
        "random_clean": {"samples": "random_clean"},
        "random": {"samples": "random"},
        "oracle": {"samples": "oracle"},
        "likeness": {"samples": "likeness"},
    },
    "D-ST": {
        "no_ascent": {"train_classifier": "--poison_weight 0"},
        "authors_mask": {"train_extractor": "--positives authors"},
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
    return opt.defences or DEFENCES


def without_attack(words):
    """The places in ``words`` (options, each followed by one value) that a step on clean data takes."""
    taken = {f"--{name}" for name in ("dataset", "train_images", "model", "seed", "data_root", "output_root")}
    return [place + i for place in range(0, len(words), 2) if words[place] in taken for i in (0, 1)]


def resolve(opt, ratios):
    """The options as the steps see them: a parsed namespace of data set, attack and ``ratios`` (words), and the common words."""
    target_type, trigger_type = ROWS[opt.row]
    dataset, model = preset_data(opt.preset)
    if (opt.dataset or dataset) in DATASETS and DATASETS[opt.dataset or dataset].own:
        raise UserError("this poisons a data set to show the defences; for data of your own: python audit_dataset.py")
    if (opt.dataset or dataset) == "imagenet":
        if opt.row not in ON_IMAGENET:
            raise UserError(f"the paper has no row {opt.row} on imagenet; it has {', '.join(ON_IMAGENET)}")
        trigger_type = ON_IMAGENET[opt.row]
        if "D-ST" in defences_of(opt):
            raise UserError("the paper's table of imagenet has D-BR alone; add --defences D-BR")
    words = ["--dataset", opt.dataset or dataset, "--model", opt.model or model, "--trigger_type", trigger_type]
    if target_type != "all2one":
        words += ["--target_type", target_type]
    words += shlex.split(PRESETS[opt.preset]["attack"])
    for name in ("poison_rate", "seed", "data_root", "output_root"):
        value = getattr(opt, name)
        if value is not None:
            words += [f"--{name}", typed(value.absolute()) if isinstance(value, Path) else str(value)]
    parser = args.Parser("")
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_ratio_options(parser)
    resolved = args.check(parser.parse_args([*words, *ratios]))
    where = [
        word for name in ("device", "precision") if getattr(opt, name) for word in (f"--{name}", getattr(opt, name))
    ]
    return resolved, words, where


def one_cell(table, row, scale, seed, defence, output_root, data_root=None, model=None):
    """The options of one cell as `plan` takes them, all others left to the steps."""
    given = {"row": row, "preset": scale, "dataset": table, "seed": seed, "defences": [defence]}
    left = dict.fromkeys(("poison_rate", "device", "precision", "variant"))
    return Namespace(**given, **left, model=model, output_root=output_root, data_root=data_root)


def plan(opt, **own):
    """The steps of the row in the order they run, by name, and the options that `resolve` gives. ``opt.variant``: one of
    `VARIANTS`, which changes the steps of the defence, or None; ``own``: options of steps in the place of the preset's."""
    preset = {name: shlex.split(text) for name, text in {**PRESETS[opt.preset], **own}.items()}
    ratios = preset["ratios"]
    resolved, words, where = resolve(opt, ratios)
    changes = VARIANTS[defences_of(opt)[0]][opt.variant] if opt.variant else {}
    steps = {}

    def add(name, script, more, output, record, needs=(), computes=True):
        all_words = [*words, *more, *(where if computes else [])]
        steps[name] = Step(script, all_words, output, record, [steps[need] for need in needs])

    def epochs(name):
        return int(preset[name][preset[name].index("--epochs") + 1])

    def train(name, stage, needs=()):
        folder = backdoored_folder(resolved, stage)
        add(name, f"{name}.py", preset[name], folder / f"{epochs(name) - 1}.tar", folder / "options.json", needs)
        return steps[name].output

    benign = []
    if resolved.trigger_type == "fourCornerTrigger":
        benign = ["train_clean_withTrans"]
        folder, clean = benign_folder(resolved), [words[i] for i in without_attack(words)]
        more = preset["train_clean_withTrans"]
        output = folder / f"{epochs('train_clean_withTrans') - 1}.tar"
        steps["train_clean_withTrans"] = Step(
            "train_clean_withTrans.py", [*clean, *more, *where], output, folder / "options.json", []
        )

    # SD
    network, features, load = "train_attack_noTrans", train("train_attack_noTrans", "noTrans", benign), []
    if preset["finetune_attack_noTrans"]:
        network, features = "finetune_attack_noTrans", train("finetune_attack_noTrans", "noTrans_ftsimi", [network])
    else:  # step 2's last checkpoint is what the next steps would take by themselves
        load = ["--checkpoint_load", typed(features)]
    tau, of_values = [*preset["tau"], *load], ["calculate_consistency"]
    fct, gamma, histogram = (
        features.with_name(f"{features.stem}_{kind}.json") for kind in ("fct", "gamma", "histogram")
    )
    add("calculate_consistency", "calculate_consistency.py", tau, fct, fct, [network])
    picture = features.with_suffix(".jpg")
    add("visualize_consistency", "visualize_consistency.py", [*tau, *ratios], picture, histogram, of_values)
    add("calculate_gamma", "calculate_gamma.py", [*ratios, *load], gamma, gamma, of_values, computes=False)
    separated = separated_folder(resolved) / "options.json"
    more = [*tau, *ratios, *preset["separate_samples"]]
    add("separate_samples", "separate_samples.py", more, separated, separated, of_values)
    samples, chosen = "separate_samples", []
    if "samples" in changes:
        folder = separated_folder(resolved) / changes["samples"]
        more = [*ratios, "--kind", changes["samples"], "--out", typed(folder)]
        record = folder / "options.json"
        add("ablation_samples", "tools/ablation_samples.py", more, record, record, [samples], computes=False)
        samples, chosen = "ablation_samples", ["--samples", typed(folder)]

    # BR
    attack = "train_attack_withTrans" + "_imagenet" * (resolved.dataset == "imagenet")
    model = train(attack, "withTrans", benign)
    if "D-BR" in defences_of(opt):
        name = "unlearn_purify" + f"_{opt.variant}" * bool(opt.variant)
        saved = model.with_name(f"{model.stem}_{name}.tar")
        own = changed(preset["unlearn_relearn"], changes.get("unlearn_relearn", ""))
        if "--passes" in own:  # a single pass takes nothing along
            own = [word for word in own if word != "--drop_doubtful"]
        more = [*ratios, *own, *chosen]
        if opt.variant:
            more += ["--checkpoint_save", typed(saved), "--log", typed(saved.with_name(f"{name}.csv"))]
        add("unlearn_relearn", "unlearn_relearn.py", more, saved, saved.with_suffix(".json"), [attack, samples])

    # ST
    if "D-ST" in defences_of(opt):
        apart = (
            opt.variant and not {"samples", "train_extractor"} & changes.keys()
        )  # the variant is the classifier's alone
        for name, output, needs in (
            ("train_extractor", "last.pth", samples),
            ("train_classifier", "ckpt_epoch_{}.pth", "train_extractor"),
        ):
            own, root = words, resolved.output_root
            if opt.variant and not (apart and name == "train_extractor"):  # a folder of its own for what is different
                root = resolved.output_root / f"D-ST_{opt.variant}"
                chosen = ["--samples", typed(separated_folder(resolved) / changes.get("samples", ""))]
                own = changed(words, f"--output_root {shlex.quote(typed(root))}")
            more = changed(preset[name], changes.get(name, ""))
            step = Step(f"ST/{name}.py", [*own, *ratios, *more, *chosen, *where], Path(), Path(), [steps[needs]])
            folder = secure_folder(Namespace(**{**vars(resolved), "output_root": root}))
            folder = folder / step.module().run_name(step.options())
            step.output, step.record = folder / output.format(epochs(name) - 1), folder / "options.json"
            steps[name] = step
        last = steps["train_classifier"].output
        paths = ["--model_ckpt", typed(steps["train_extractor"].output), "--classifier_ckpt", typed(last)]
        steps["train_classifier"].words += ["--ckpt", typed(steps["train_extractor"].output)]
        result = last.with_name(f"{last.stem}_test.json")
        add("test", "ST/test.py", [*ratios, *paths], result, result, ["train_classifier"])
    return steps, resolved


def changed(words, changes):
    """``words`` (options and their values) with the options in the text ``changes`` in the place of theirs."""
    words, new = list(words), shlex.split(changes)
    for word in new:
        if word in words and word.startswith("--"):
            first = words.index(word)
            last = next((i for i in range(first + 1, len(words)) if words[i].startswith("--")), len(words))
            del words[first:last]
    return [*words, *new]


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
