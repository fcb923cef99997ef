"""Run every numbered step of one row of the paper's tables, as the commands a user would type, and show the result.

Each command is printed before it runs (--dry_run: only printed). A step whose output is there already, made with the
same options and newer than what it was made from, is skipped. The table goes to <out>/<name>.csv, the pictures beside
it to <out>/<name>_samples.png and <out>/<name>_fct.jpg; <out>/<name>_manifest.json says what all of it
was made from, and --verify holds the files against it.
"""

import shlex
import time
from pathlib import Path

import pandas as pd

from utils import args
from utils.datasets import DATASETS
from utils.errors import UserError, run_script
from utils.files import make_folder, read_json, write_rows, write_together
from utils.manifest import verify, write_options
from utils.paths import (
    ROOT,
    attack_and_ratios,
    backdoored_folder,
    benign_folder,
    secure_folder,
    separated_folder,
    shown,
    typed,
)
from utils.steps import Step, run

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

# Options of each step besides those of data set and attack. "paper": as the user's document gives them.
PRESETS = {
    "paper": {
        "attack": "",
        "train_attack_noTrans": "--epochs 2",
        "finetune_attack_noTrans": "--epochs 10",
        "tau": "",
        "ratios": "--clean_ratio 0.2 --poison_ratio 0.05",
        "separate_samples": "",
        "train_clean_withTrans": "--epochs 200",
        "train_attack_withTrans": "--epochs 200",
        "train_attack_withTrans_imagenet": "--epochs 25 --lr 0.001 --gamma 0.1 --schedule 15 20",
        "unlearn_relearn": "--epochs 20",
        "train_extractor": "--epochs 200 --learning_rate 0.5 --temp 0.1 --cosine --save_freq 20 --batch_size 512",
        "train_classifier": "--epochs 10 --learning_rate 5 --batch_size 512",
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
PRESET_DATA = {"quickstart": ("fashion", "resnet10")}


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument(
        "--row", choices=tuple(ROWS), default="BadNets-all2one", help="attack, by its name in the paper"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="paper", help="options of the steps")
    parser.add_argument("--defences", choices=("D-BR", "D-ST"), nargs="+", default=["D-BR", "D-ST"], help="what to run")
    parser.add_argument("--dataset", help="data set; default: cifar10, with the preset quickstart fashion")
    parser.add_argument("--model", help="network; default: resnet18, with the preset quickstart resnet10")
    parser.add_argument("--out", type=args.path, default=ROOT / "results", help="folder of the table and the pictures")
    parser.add_argument("--name", help="name of the table; default: the preset's, or row and data set")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--verify", type=args.path, metavar="FOLDER",
        help="run nothing; hold the results in FOLDER, and what they were made from, against their manifests",
    )  # fmt: skip
    args.add_overwrite_option(parser)
    for name, kind in (("seed", args.natural), ("poison_rate", args.share), ("device", str), ("precision", str)):
        parser.add_argument(f"--{name}", type=kind, help="given to every step")
    for name in ("data_root", "output_root"):
        parser.add_argument(f"--{name}", type=args.path, help="given to every step")
    return parser


def without_attack(words):
    """The places in ``words`` (options, each followed by one value) that a step on clean data takes."""
    taken = {f"--{name}" for name in ("dataset", "model", "seed", "data_root", "output_root")}
    return [place + i for place in range(0, len(words), 2) if words[place] in taken for i in (0, 1)]


def resolve(opt):
    """The options as the steps see them: a parsed namespace of data set, attack and ratios, and the common words."""
    target_type, trigger_type = ROWS[opt.row]
    dataset, model = PRESET_DATA.get(opt.preset, ("cifar10", "resnet18"))
    if (opt.dataset or dataset) in DATASETS and DATASETS[opt.dataset or dataset].own:
        raise UserError("this poisons a data set to show the defences; for data of your own: python audit_dataset.py")
    if (opt.dataset or dataset) == "imagenet":
        if opt.row not in ON_IMAGENET:
            raise UserError(f"the paper has no row {opt.row} on imagenet; it has {', '.join(ON_IMAGENET)}")
        trigger_type = ON_IMAGENET[opt.row]
        if "D-ST" in opt.defences:
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
    ratios = shlex.split(PRESETS[opt.preset]["ratios"])
    resolved = args.check(parser.parse_args([*words, *ratios]))
    where = [
        word for name in ("device", "precision") if getattr(opt, name) for word in (f"--{name}", getattr(opt, name))
    ]
    return resolved, words, where, ratios


def plan(opt):
    """The steps of the row in the order they run, by name."""
    resolved, words, where, ratios = resolve(opt)
    preset = {name: shlex.split(text) for name, text in PRESETS[opt.preset].items()}
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

    if resolved.trigger_type == "fourCornerTrigger":
        folder, clean = benign_folder(resolved), [words[i] for i in without_attack(words)]
        more = preset["train_clean_withTrans"]
        output = folder / f"{epochs('train_clean_withTrans') - 1}.tar"
        steps["train_clean_withTrans"] = Step(
            "train_clean_withTrans.py", [*clean, *more, *where], output, folder / "options.json", []
        )
    train("train_attack_noTrans", "noTrans", ["train_clean_withTrans"] * ("train_clean_withTrans" in steps))
    features = train("finetune_attack_noTrans", "noTrans_ftsimi", ["train_attack_noTrans"])
    fct = features.with_name(f"{features.stem}_fct.json")
    tau, picture = preset["tau"], features.with_suffix(".jpg")
    add("calculate_consistency", "calculate_consistency.py", tau, fct, fct, ["finetune_attack_noTrans"])
    record = features.with_name(f"{features.stem}_histogram.json")
    more = [*tau, *ratios]
    add("visualize_consistency", "visualize_consistency.py", more, picture, record, ["calculate_consistency"])
    gamma = features.with_name(f"{features.stem}_gamma.json")
    add("calculate_gamma", "calculate_gamma.py", ratios, gamma, gamma, ["calculate_consistency"], computes=False)
    separated = separated_folder(resolved) / "options.json"
    more = [*tau, *ratios, *preset["separate_samples"]]
    add("separate_samples", "separate_samples.py", more, separated, separated, ["calculate_consistency"])
    attack = "train_attack_withTrans" + "_imagenet" * (resolved.dataset == "imagenet")
    model = train(attack, "withTrans", ["train_clean_withTrans"] * ("train_clean_withTrans" in steps))
    if "D-BR" in opt.defences:
        saved = model.with_name(f"{model.stem}_unlearn_purify.tar")
        more = [*ratios, *preset["unlearn_relearn"]]
        needs = [attack, "separate_samples"]
        add("unlearn_relearn", "unlearn_relearn.py", more, saved, saved.with_suffix(".json"), needs)
    if "D-ST" in opt.defences:
        for name, output, needs in (
            ("train_extractor", "last.pth", "separate_samples"),
            ("train_classifier", "ckpt_epoch_{}.pth", "train_extractor"),
        ):
            step = Step(f"ST/{name}.py", [*words, *ratios, *preset[name], *where], Path(), Path(), [steps[needs]])
            folder = secure_folder(resolved) / step.module().run_name(step.options())
            step.output, step.record = folder / output.format(epochs(name) - 1), folder / "options.json"
            steps[name] = step
        last = steps["train_classifier"].output
        paths = ["--model_ckpt", typed(steps["train_extractor"].output), "--classifier_ckpt", typed(last)]
        steps["train_classifier"].words += ["--ckpt", typed(steps["train_extractor"].output)]
        result = last.with_name(f"{last.stem}_test.json")
        add("test", "ST/test.py", [*ratios, *paths], result, result, ["train_classifier"])
    return steps, resolved


def table(steps, resolved):
    """One dict a model: ACC, ACC_paper, ASR, R_ACC, and beside the defences how well SD detected; percentages but AUROC."""
    measures = ["ACC", "ACC_paper", "ASR", "R_ACC"]
    trained = next(step for name, step in steps.items() if name.startswith("train_attack_withTrans"))
    trained = pd.read_csv(trained.output.with_name("log.csv")).iloc[-1]
    rows = [{"model": "backdoored", **trained[measures]}]
    detection = read_json(separated_folder(resolved) / "detection.json")
    detected = {name: detection[name] for name in ("AUROC", "Dp_precision", "Dp_recall", "Dc_contamination")}
    if "unlearn_relearn" in steps:
        last = pd.read_csv(steps["unlearn_relearn"].output.with_name("unlearn_purify.csv")).iloc[-1]
        rows.append({"model": "D-BR", **last[measures], **detected})
    if "test" in steps:
        result = read_json(steps["test"].output)
        rows.append({"model": "D-ST", **{name: result[name] for name in measures}, **detected})
    return rows


def main(argv=None):
    opt = get_parser().parse_args(argv)
    if opt.verify:
        found = verify(opt.verify)
        for path in found["absent"]:
            print(f"not here, so not checked: {shown(path)}")
        print(f"{len(found['whole'])} files are what their manifests tell of")
        return
    steps, resolved = plan(opt)
    name = opt.name or ("quickstart" if opt.preset == "quickstart" else f"{opt.row}_{resolved.dataset}")
    if opt.dry_run:
        run(steps, opt, opt.out / f"{name}_seconds.json")
        return
    make_folder(opt.out)
    started = time.perf_counter()
    seconds = run(steps, opt, opt.out / f"{name}_seconds.json")

    rows = table(steps, resolved)
    write_rows(opt.out / f"{name}.csv", rows)
    pictures = {
        f"{name}_samples.png": steps["train_attack_noTrans"].output.with_name("samples.png"),
        f"{name}_fct.jpg": steps["visualize_consistency"].output,
    }
    for target, source in pictures.items():
        write_together({opt.out / target: lambda file, source=source: file.write(source.read_bytes())})
    outputs = [opt.out / target for target in (f"{name}.csv", *pictures)]
    commands = {"seconds": seconds, "commands": [step.command for step in steps.values()]}
    inputs = [step.record for step in steps.values()]
    write_options(opt.out / f"{name}_manifest.json", opt, inputs=inputs, outputs=outputs, **commands)

    print(
        f"\n{opt.row} on {resolved.dataset}, {resolved.model}, {attack_and_ratios(resolved)} (last epochs; per cent, AUROC in 0-1)"
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.2f}", na_rep=""))
    print(f"AUROC of FCT: {rows[-1].get('AUROC', float('nan')):.4f}")
    print(
        f"Steps took {sum(seconds.values()) / 60:.1f} min in all, {(time.perf_counter() - started) / 60:.1f} min of it now"
    )
    print(
        f"Table {shown(opt.out / f'{name}.csv')}, pictures "
        + " and ".join(shown(opt.out / target) for target in pictures)
    )


if __name__ == "__main__":
    run_script(main)
