"""Run every numbered step of one row of the paper's tables, or of a whole table, as the commands a user would type, and
show the result.

Each command is printed before it runs (--dry_run: only printed). A step whose output is there already, made with the same
options from what is there, is skipped. The table goes to <out>/<name>.csv, the pictures beside it to <out>/<name>_samples.png
and <out>/<name>_fct.jpg; <out>/<name>_manifest.json says what all of it was made from, and --verify holds the files against it.

With --table the cells of a table (row, defence, seed) are run one after the other; the steps write below
<output_root>/<scale>_seed<seed>/. A finished cell is one record, <out>/<table>/<row>_<defence>_<scale>_seed<seed>.json, and is
not run again; all of them together are <out>/<table>.csv. tools/make_tables.py sets them beside the paper's.
"""

import sys

from utils import forked

if __name__ == "__main__":
    forked.begin(sys.argv)  # what the steps need is imported there while this script imports its own


import re
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain, product

import pandas as pd

from utils import args
from utils.checkpoints import precision_of_run
from utils.device import choose_runtime
from utils.errors import UserError, refuse_several_processes, run_script
from utils.files import bytes_writer, csv_writer, make_folder, read_json, read_record, refuse_users_own, write_together
from utils.manifest import conflict, made_with, plain_options, verify, write_options
from utils.metrics import SELECTED_BY
from utils.paths import ROOT, attack_and_ratios, python, quoted, shown
from utils.records import (
    DETECTION,
    LAST,
    MEASURES,
    cell_name,
    check_place,
    collect,
    epochs_of,
    hardware,
    measured,
    read_figures,
    read_log,
    write_cell,
)
from utils.rows import (
    DEFENCES,
    PRESETS,
    ROWS,
    SCALES,
    TABLES,
    VARIANTS,
    plan,
    preset_data,
    separating_step,
    trained_step,
    unlearning_log,
)  # fmt: skip
from utils.steps import StepError, end_steps, list_commands, run, say_where


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--row", choices=tuple(ROWS), help="attack, by its name in the paper; default: BadNets-all2one")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="options of the steps; default: paper")
    parser.add_argument("--table", choices=tuple(TABLES), help="run a whole table of the paper, cell by cell")
    parser.add_argument("--rows", choices=tuple(ROWS), nargs="+", help="with --table: these rows; default: the paper's")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        help="with --table: the preset of its steps; full: paper with our SD and a shorter BR; cpu: for two cores, long: less shortened; "
        "default: paper",
    )
    parser.add_argument(
        "--ablations", choices=sorted({name for variants in VARIANTS.values() for name in variants}), nargs="*",
        help="with --table: not the cells but these variants of their defence, a part left out or exchanged; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--jobs",
        type=args.positive_int,
        help="with --table: so many rows at once, each to a log of its own; default: 1",
    )
    parser.add_argument(
        "--devices", type=args.devices, nargs="+", metavar="DEVICE",
        help="with --table: the rows take turns on these, such as cuda:0,cuda:1",
    )  # fmt: skip
    parser.add_argument("--seeds", type=args.natural, nargs="+", help="with --table: one cell a seed; default: 0")
    parser.add_argument("--defences", choices=DEFENCES, nargs="+", help="what to run; default: both")
    parser.add_argument(
        "--dataset", type=args.word, help="data set; default: cifar10, with the preset quickstart fashion"
    )
    parser.add_argument("--model", type=args.word, help="network; default: the preset's")
    parser.add_argument("--out", type=args.path, default=ROOT / "results", help="folder of the table and the pictures")
    parser.add_argument(
        "--name", type=args.file_name, help="name of the table; default: the preset's, or row and data set"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--verify", type=args.path, metavar="FOLDER",
        help="run nothing; hold the results in FOLDER, and what they were made from, against their manifests",
    )  # fmt: skip
    args.add_overwrite_option(parser)
    for name, kind in (
        ("seed", args.natural),
        ("poison_rate", args.share),
        ("device", args.device),
        ("precision", args.word),
    ):
        parser.add_argument(f"--{name}", type=kind, help="given to every step")
    for name in ("data_root", "output_root"):
        parser.add_argument(f"--{name}", type=args.path, help="given to every step")
    return parser


def settled(options):
    """Options (dict) of a row with the defaults in the place of those that were not named, which mean the same."""
    dataset, model = preset_data(options.get("preset"))
    usual = {
        "dataset": dataset,
        "model": model,
        "seed": 0,
        "poison_rate": args.ATTACK_DEFAULTS["poison_rate"],
        "precision": "auto",
    }
    return {**options, **{name: value for name, value in usual.items() if options.get(name) is None}}


def refuse_other_result(path, opt, files, ledger):
    """Refuse to replace the table whose manifest is ``path`` where it is of another row, preset, data set, model, seed or rate, or
    where there is none and one of the ``files`` (paths) is the user's own, unless --overwrite is given; the ``ledger`` (path), its
    steps' seconds, is removed then."""
    record = read_record(path)
    if not record and not opt.overwrite:
        refuse_users_own(files, "result", "--name or --out")
    wanted = settled(plain_options(opt))
    held = settled(made_with(record, opt)) if record else wanted
    differ = conflict(held, wanted, ("row", "preset", "dataset", "model", "seed", "poison_rate", "precision"))
    lost = [name for name in held.get("defences") or DEFENCES if name not in (opt.defences or DEFENCES)]
    if lost and not opt.overwrite:
        raise UserError(
            f"{shown(path)} and the table beside it hold {' and '.join(lost)} too; give another --name or --out, or --overwrite"
        )
    if differ and not opt.overwrite:
        raise UserError(
            f"{shown(path)} and the table beside it are of {differ[0]}, not of {differ[1]}; give another --name or --out, or --overwrite"
        )
    if differ:  # the seconds kept there are of other steps
        ledger.unlink(missing_ok=True)


def detected_by(steps, names=()):
    """How well SD detected, as separate_samples.py wrote it, with the ``names`` at least; samples of another origin have fewer."""
    step = separating_step(steps)
    return read_figures(step, step.output.with_name("detection.json"), names)


def result_rows(steps):
    """One dict a model: ACC, ACC_paper, ASR, R_ACC, and beside the defences how well SD detected; percentages but AUROC."""
    measures = list(MEASURES)
    rows = [{"model": "backdoored", **read_log(trained_step(steps)).iloc[-1][measures]}]
    detection = detected_by(steps, DETECTION[1:4])
    detected = {name: detection.get(name) for name in DETECTION[:4]}  # AUROC is None where every sample is poisoned
    if "unlearn_relearn" in steps:
        result = read_log(steps["unlearn_relearn"], unlearning_log(steps)).iloc[-1]
        rows.append({"model": "D-BR", **result[measures], **detected})
    if "test" in steps:
        result = read_figures(steps["test"], steps["test"].output, measures)
        rows.append({"model": "D-ST", **{name: result[name] for name in measures}, **detected})
    return rows


def cells_of(opt):
    """The cells of ``opt.table`` in the order they run, each as the options of one row; all of D-BR comes before D-ST,
    which takes the longest and uses D-BR's separated samples and backdoored model."""
    scale, paper_rows = opt.scale or "paper", TABLES[opt.table]
    for name in ("row", "preset", "dataset", "seed", "name"):
        if getattr(opt, name) is not None:
            raise UserError(f"--{name} is for one row; with --table give --rows, --scale and --seeds")
    if opt.device and opt.devices:
        raise UserError("--devices says where the rows run, and --device too; leave one out")
    if opt.table == "imagenet" and scale != "paper":
        raise UserError(f"--scale {scale} is for the tables of cifar10 and cifar100; imagenet has --scale paper alone")
    defences = opt.defences or (DEFENCES[:1] if opt.table == "imagenet" else DEFENCES)
    root, cells = opt.output_root or ROOT / "runs", []
    if opt.poison_rate == args.ATTACK_DEFAULTS["poison_rate"]:  # the tables' own
        opt.poison_rate = None
    rate = [] if opt.poison_rate is None else [f"rate_{opt.poison_rate}"]
    setting = [
        *rate,
        *([] if opt.model in (None, preset_data(scale)[1]) else [opt.model]),
    ]  # what is not the table's own
    for defence, seed, row in product(defences, opt.seeds or [0], opt.rows or paper_rows):
        one = {"row": row, "preset": scale, "dataset": opt.table, "seed": seed, "defences": [defence]}
        one["output_root"] = root / "_".join([scale, f"seed{seed}", *rate])
        variants = [None] if opt.ablations is None else opt.ablations or list(VARIANTS[defence])
        for variant in variants:
            if variant is None or variant in VARIANTS[defence]:
                name = "_".join([*setting, *([variant] if variant else [])])
                cells.append(Namespace(**{**vars(opt), **one, "variant": variant, "variant_name": name}))
    strange = [name for name in opt.ablations or [] if not any(name in VARIANTS[defence] for defence in defences)]
    if strange:
        raise UserError(f"{' '.join(strange)} is no variant of {' or '.join(defences)}")
    return cells


def run_table(opt):
    """Run the cells of a table that are not done yet, each to its record, and write the table's CSV."""
    cells = cells_of(opt)
    rows = list(dict.fromkeys((cell.row, cell.seed) for cell in cells))
    devices = list(chain.from_iterable(opt.devices or []))
    for cell in cells:
        if devices:
            cell.device = devices[rows.index((cell.row, cell.seed)) % len(devices)]
    plans = [(cell, *plan(cell)) for cell in cells]  # so that a bad option is found before hours of work
    table = opt.out / f"{opt.table}{'_ablations' * any(cell.variant_name for cell in cells)}.csv"
    if opt.dry_run:
        numbers = {}
        for cell, steps, _ in plans:
            print(f"# {_name_of(cell)}")
            list_commands(steps, numbers, opt.overwrite)
        return

    make_folder(table.with_suffix(""), "--out")
    check_place(table)
    say_where()
    stop, several, failed, stopped = threading.Event(), (opt.jobs or 1) > 1, set(), []

    def attempt(cell, steps, resolved):
        """Run a cell. One that stops does not keep those from running that have no step that ended so."""
        if failed.isdisjoint(step.command for step in steps.values()):
            try:
                _run_cell(cell, steps, resolved, table, stop, several)
                return
            except UserError as error:
                if stop.is_set():  # interrupted, which this script says once
                    return
                failed.update([error.command] if isinstance(error, StepError) else [])
                reason = str(error)
        else:
            reason = "it has a step that ended so before"
        stopped.append(f"{_name_of(cell)}: {reason}")
        print(f"{_name_of(cell)} is not done: {reason}", flush=True)

    def run_row(row):  # its cells share steps, so they run one after the other
        for cell, steps, resolved in plans:
            if (cell.row, cell.seed) == row:
                attempt(cell, steps, resolved)

    if several:
        with ThreadPoolExecutor(opt.jobs) as pool:
            try:
                running = [pool.submit(run_row, row) for row in rows]
                while wait(running, timeout=1).not_done:  # in parts, for Windows lets nothing in between
                    pass
            except BaseException:  # Ctrl-C, SIGTERM
                pool.shutdown(wait=False, cancel_futures=True)
                end_steps(stop)
                raise
        for one in running:
            one.result()  # raises what is no user's mistake
    else:
        for cell, steps, resolved in plans:
            attempt(cell, steps, resolved)
    if stopped:
        raise UserError(f"{len(stopped)} of {len(cells)} cells are not done: {'; '.join(stopped[:3])}")
    collect(table.with_suffix(""), table)  # a run that was killed may have left a record out
    place = "" if table.parent == ROOT / "results" else f" --results {quoted(table.parent)}"
    print(f"The table is {shown(table)}; beside the paper's: {python('tools/make_tables.py')}{place}")


def _name_of(cell):
    return cell_name(cell.row, cell.defences[0], cell.preset, cell.seed, cell.variant_name)


def _run_cell(cell, steps, resolved, table, stop, quiet=False):
    """Run what is not done of a cell, record it, and write the CSV ``table``; ``stop``: see `steps.run`; ``quiet``: what the steps say
    goes to a log."""
    name, folder = _name_of(cell), table.with_suffix("")
    record = folder / f"{name}.json"
    print(f"Cell {name}", flush=True)
    variant = f"_{cell.defences[0]}_{cell.variant_name}" if cell.variant_name else ""
    ledger = cell.output_root / f"{resolved.dataset}_{cell.row}{variant}_seconds.json"
    commands, held = [step.command for step in steps.values()], read_json(record)
    if held and not cell.overwrite:
        made_by = held.get("commands")
        if not isinstance(made_by, list) or list(map(_work, map(str, made_by))) != list(map(_work, commands)):
            raise UserError(
                f"{shown(record)} was made by other commands; give --overwrite to make it anew, or another --out"
            )
        print(f"{shown(record)} is there already")
        return
    make_folder(ledger.parent)
    seconds = run(steps, cell, ledger, cell.output_root / f"{name}.log" if quiet else None, stop)
    _record_cell(record, cell, steps, resolved, {"commands": commands, "seconds": seconds})
    with _collecting:
        collect(folder, table)
    made = read_json(record)
    for when in ("before", "after"):
        print(f"{name}, {when}: " + "  ".join(f"{key} {value:.2f}" for key, value in made[when].items()), flush=True)


def _work(command):
    """A command without what changes no figure of a record: the device, and how often a training, but for the last epoch, which
    always is, was evaluated."""
    command = re.sub(r" --device \S+", "", command)
    return re.sub(r" --eval_freq \S+", "", command) if command.startswith("python train_") else command


_collecting = threading.Lock()


def _record_cell(path, cell, steps, resolved, made):
    """Write the record of a finished cell; ``made``: its commands and seconds."""
    trained = trained_step(steps)
    before = read_log(trained).iloc[-1]
    (defence,) = cell.defences
    if defence == "D-BR":
        last = steps["unlearn_relearn"]
        log = read_log(last, unlearning_log(steps))
        after = log.iloc[-1]
    else:
        log, last = read_log(steps["train_classifier"]), steps["test"]
        after = read_figures(last, last.output, MEASURES)
    _, score = SELECTED_BY[defence]
    best = log.loc[score(log).idxmax()]
    data = read_json(trained.record)["data"]
    options = trained.options()
    record = read_record(trained.record)
    # A step that was there already may have run on another machine; an older record names the option alone.
    precision = precision_of_run(record)
    precision = precision or choose_runtime(options.device, made_with(record, options)["precision"]).precision
    content = {
        "table": resolved.dataset, "row": cell.row, "defence": defence, "scale": cell.preset, "seed": cell.seed,
        "variant": cell.variant_name, "poison_rate": resolved.poison_rate,
        "model": resolved.model, "data_source": data["source"], "training_images": data["train"]["samples"],
        "epochs": {name: epochs_of(step) for name, step in steps.items() if epochs_of(step)},
        "before": measured(before), "after": measured(after),
        "rule": LAST, "paper_selection": {"epoch": int(best["epoch"]) + 1, **measured(best)},
        "detection": detected_by(steps),
        "hardware": hardware(cell.device), "precision": precision, **made,
    }  # fmt: skip
    inputs = [trained.record, separating_step(steps).output.with_name("options.json"), last.record]
    write_cell(path, cell, inputs, **content)


def main(argv=None):
    parser = get_parser()
    opt = parser.parse_args(argv)
    refuse_several_processes()
    if opt.verify:
        for name, value in vars(opt).items():
            if name != "verify" and value != parser.get_default(name):
                raise UserError(f"--verify runs nothing and has no use for --{name}; leave one out")
        found = verify(opt.verify)
        for path in found["absent"]:
            print(f"not here, so not checked: {shown(path)}")
        print(f"{len(found['whole'])} files are what their manifests tell of")
        return
    if opt.table:
        run_table(opt)
        return
    for name in ("rows", "scale", "seeds", "ablations", "jobs", "devices"):
        if getattr(opt, name) is not None:
            raise UserError(f"--{name} is for a whole table; give --table too, or --row and --preset for one row")
    opt.row, opt.preset, opt.variant = opt.row or "BadNets-all2one", opt.preset or "paper", None
    steps, resolved = plan(opt)
    name = opt.name or ("quickstart" if opt.preset == "quickstart" else f"{opt.row}_{resolved.dataset}")
    if opt.dry_run:
        list_commands(steps, {}, opt.overwrite)
        return
    make_folder(opt.out, "--out")
    pictures = {
        opt.out / f"{name}_samples.png": steps["train_attack_noTrans"].output.with_name("samples.png"),
        opt.out / f"{name}_fct.jpg": steps["visualize_consistency"].output,
    }
    ledger = opt.out / f"{name}_seconds.json"
    refuse_other_result(opt.out / f"{name}_manifest.json", opt, [opt.out / f"{name}.csv", *pictures], ledger)
    started = time.perf_counter()
    say_where()
    seconds = run(steps, opt, ledger)

    rows = result_rows(steps)
    writers = {opt.out / f"{name}.csv": csv_writer(rows)}
    for target, source in pictures.items():
        if source.is_file():
            writers[target] = bytes_writer(source.read_bytes())
        else:  # it was removed since its step was done
            print(f"{shown(source)} is not there any more, so {target.name} is not written")
    outputs = {opt.out / file: digest for file, digest in write_together(writers).items()}
    commands = {"seconds": seconds, "commands": [step.command for step in steps.values()]}
    inputs = [step.record for step in steps.values()]
    write_options(opt.out / f"{name}_manifest.json", opt, inputs=inputs, outputs=outputs, **commands)

    print(
        f"\n{opt.row} on {resolved.dataset}, {resolved.model}, {attack_and_ratios(resolved)} (last epochs; per cent, AUROC in 0-1)"
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.2f}", na_rep=""))
    auroc = rows[-1].get("AUROC")
    print(f"AUROC of FCT: {'none, for no sample is clean' if auroc is None else f'{auroc:.4f}'}")
    known = "" if len(seconds) == len(steps) else f" ({len(seconds)} of {len(steps)}, the others were there already)"
    print(
        f"Steps took {sum(seconds.values()) / 60:.1f} min in all{known}, {(time.perf_counter() - started) / 60:.1f} min of it now"
    )
    table, *drawn = outputs
    print(f"Table {shown(table)}, pictures " + " and ".join(map(shown, drawn)))


if __name__ == "__main__":
    run_script(main)
