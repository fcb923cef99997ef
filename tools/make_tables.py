"""The paper's tables with our figures beside them, from the records of reproduce.py --table.

Reads <results>/<table>/*.json and paper.csv there, or where it is not there the one in results/; writes <results>/<table>.csv,
tables.md, tables.tex and <table>.png, and puts the Markdown between the markers of --readme. Of a cell that was run at several
scales the paper's counts, with full in a line below it, else full, else long, else cpu; quick never does. Several seeds are
shown as mean ± standard deviation; a row that the paper's table lacks stands below its rows. Of a table of which nothing was
run the Markdown has the paper's figures alone. Where there are variants of reproduce.py --ablations
(<results>/<table>_ablations/*.json), they come as a table of their own, beside the defence as it is.
"""

import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from utils import args
from utils.errors import UserError, require_folder, run_script
from utils.figures import save_figure
from utils.files import read_table, read_text, text_writer, write_together
from utils.paths import ROOT, python, quoted, shown
from utils.records import KEYS, LAST, MEASURES, cell_line, collect, read_cells, refuse_other_file
from utils.rows import ROWS, VARIANTS

TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet subset"}
PAPER = {"table": str, "row": str, "model": str, "ACC": float, "ASR": float}  # columns of paper.csv
SHOWN_SCALES = ("paper", "full", "long", "cpu")  # the first that a cell has
HEAD = ["attack", "model", "paper: ACC / ASR", "ours: ACC_paper / ASR", "difference", "ACC", "R_ACC",
        "best on the test set", "scale, seeds", "made by"]  # fmt: skip
NOT_RUN = "not run"
ABLATIONS_HEAD = ["attack", "defence", "variant", "ACC", "ACC_paper", "ASR", "R_ACC", "scale, seeds"]


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--results", type=args.path, default=ROOT / "results", help="folder of the records")
    parser.add_argument(
        "--readme", type=args.path, nargs="+", help="files whose tables, between their markers, are replaced"
    )
    return parser


def ours(lines, row, model, scales=SHOWN_SCALES):
    """The cells (a DataFrame, one line a seed) that are shown for a row and a model, of the first of ``scales`` that has any;
    ``backdoored`` takes what a D-BR cell, or else a D-ST cell, had before the defence. Empty where none was run."""
    if lines.empty:
        return lines
    lines = lines[(lines["row"] == row) & (lines["variant"] == "")]
    for scale in scales:
        for defence in ("D-BR", "D-ST") if model == "backdoored" else (model,):
            part = lines[(lines["scale"] == scale) & (lines["defence"] == defence)].sort_values("seed")
            if len(part) and model == "backdoored":
                measures = [name.removeprefix("before_") for name in part if name.startswith("before_")]
                part = part.drop(columns=measures).rename(columns={f"before_{name}": name for name in measures})
            if len(part):
                return part
    return lines.iloc[:0]


def spread(values):
    """A mean as text, with its standard deviation where there are several values."""
    text = f"{values.mean():.2f}"
    return text if len(values) < 2 else f"{text} ± {values.std():.2f}"


def options_of(part):
    """The options, beside --table, of the command that makes the cells of ``part``, or of several where their seeds name several
    precisions."""
    return "; ".join(_options_of(same) for _, same in part.groupby("named", sort=False))


def _options_of(part):
    line = part.iloc[0]
    seeds = " ".join(map(str, part["seed"]))
    seeds = "" if seeds == "0" else f" --seeds {seeds}"
    return f"--scale {line['scale']} --rows {line['row']} --defences {line['defence']}{seeds}{line['named']}"


def precision_named(cell):
    """Words on the precision that the commands of a record name, empty where they leave it to the steps."""
    named = re.search(r" --precision \w+", " ".join(cell.get("commands", [])))
    return named[0] if named else ""


def seeds_of(part):
    """Words on the seeds of ``part``, empty for seed 0 alone."""
    if len(part) > 1:
        return f", {len(part)} seeds"
    return f", seed {part['seed'].iloc[0]}" if part["seed"].any() else ""


def rule_of(part, model):
    """Words on the epoch of ``part``, empty for the last."""
    rule = part["rule"].iloc[0]
    return "" if rule == LAST or model == "backdoored" else f" ({rule})"


def split_variant(variant, defence):
    """A record's variant as its setting (another poison rate, another network; "" for the table's own) and its name in
    `rows.VARIANTS` ("" for the defence as it is), the longest that fits: "authors_bounded" is not "bounded" of "authors"."""
    fitting = (name for name in VARIANTS[defence] if f"_{variant}".endswith(f"_{name}"))
    name = max(fitting, key=len, default="")
    return variant.removesuffix(name).removesuffix("_"), name


def ablations(results):
    """Of each table with variants (`rows.VARIANTS`) its name and the lines of theirs, lists of text under `ABLATIONS_HEAD`;
    so with the cells of another poison rate or network."""
    for table in TITLES:
        cells, varied = (
            pd.DataFrame([cell_line(cell) for cell in read_cells(results / name)])
            for name in (table, f"{table}_ablations")
        )
        if varied.empty:
            continue
        lines, rows = pd.concat([cells, varied]), []
        names = [split_variant(*pair) for pair in zip(lines["variant"], lines["defence"], strict=True)]
        lines["setting"], lines["part"] = zip(*names, strict=True)
        for row, defence, scale, setting in itertools.product(
            ROWS, VARIANTS, SHOWN_SCALES, sorted(set(lines["setting"]))
        ):
            cell = {"row": row, "defence": defence, "scale": scale, "setting": setting}
            of_cell = lines[(lines[list(cell)] == pd.Series(cell)).all(axis=1)]
            if not of_cell["variant"].any():
                continue
            where = f"{setting}, " if setting else ""
            before = of_cell.drop_duplicates("seed")  # the network of the first; what began from another says so
            values = [spread(before[f"before_{name}"]) for name in MEASURES]
            rows.append([row, "", f"{where}backdoored", *values, scale + seeds_of(before)])
            for part in ("", *VARIANTS[defence]):
                of_it = of_cell[of_cell["part"] == part]
                if len(of_it):
                    values = [spread(of_it[name]) for name in MEASURES]
                    what = where + (part or "as it is") + from_another(of_it, before)
                    rows.append([row, defence, what, *values, scale + seeds_of(of_it)])
        yield table, rows


def from_another(lines, before):
    """What a line of variants says of the network it began from where that is another than the one whose line stands above it;
    ``lines``, ``before``: the records of the variant and of those networks, DataFrames, the latter with one a seed."""
    names = ["before_ACC", "before_ASR"]
    above = before.set_index("seed").loc[lines["seed"], names]
    if (above.to_numpy() == lines[names].to_numpy()).all():
        return ""
    return f", from {' / '.join(spread(lines[name]) for name in names)}"


def cells_shown(table, paper, lines):
    """The paper's cells of a table, and below them, without figures, ours of rows that it lacks; a DataFrame with the columns `PAPER`."""
    cells = paper[paper["table"] == table]
    further = [row for row in ROWS if len(lines) and row not in set(cells["row"]) and row in set(lines["row"])]
    pairs = itertools.product(further, dict.fromkeys(cells["model"]))
    more = [{"table": table, "row": row, "model": model} for row, model in pairs if len(ours(lines, row, model))]
    return pd.concat([cells, pd.DataFrame(more).reindex(columns=[*PAPER]).astype(PAPER)]) if more else cells


def body(table, paper, lines):
    """The lines of one table as lists of text, one list an attack and model, under `HEAD`."""
    rows = []
    for cell in cells_shown(table, paper, lines).to_dict("records"):
        part = ours(lines, cell["row"], cell["model"])
        theirs = "" if np.isnan(cell["ACC"]) else f"{cell['ACC']:.2f} / {cell['ASR']:.2f}"
        start = [cell["row"], cell["model"], theirs]
        if part.empty:
            rows.append([*start, NOT_RUN, *[""] * (len(HEAD) - len(start) - 1)])
            continue
        parts = [part]
        if part["scale"].iloc[0] == "paper" and cell["model"] != "backdoored":
            parts.append(ours(lines, cell["row"], cell["model"], ["full"]))
        rows += [[*start, *figures(cell, one)] for one in parts if len(one)]
    return rows


def figures(cell, part):
    """What a line of a table says of the cells ``part``, from the fourth column of `HEAD` on; ``cell``: the paper's."""
    pairs = [] if np.isnan(cell["ACC"]) else [("ACC_paper", "ACC"), ("ASR", "ASR")]
    differences = " / ".join(f"{part[own].mean() - cell[theirs]:+.2f}" for own, theirs in pairs)
    chosen = part.dropna(subset=["best_ACC_paper", "best_ASR"])  # a record need not tell of the paper's selection
    told = cell["model"] != "backdoored" and len(chosen)
    best = f"{spread(chosen['best_ACC_paper'])} / {spread(chosen['best_ASR'])}" if told else ""
    return [
        f"{spread(part['ACC_paper'])} / {spread(part['ASR'])}", differences, spread(part["ACC"]), spread(part["R_ACC"]), best,
        f"{part['scale'].iloc[0]}{rule_of(part, cell['model'])}{seeds_of(part)}", options_of(part),
    ]  # fmt: skip


def markdown(table, rows):
    """One table in Markdown, a line an attack and model; a line an attack where none was run."""
    if all(row[3] == NOT_RUN for row in rows):
        theirs = {}
        for attack, model, figures_of_paper, *_ in rows:
            theirs.setdefault(attack, {})[model] = figures_of_paper
        models = list(dict.fromkeys(row[1] for row in rows))
        lines = [[attack, *(of_attack[model] for model in models)] for attack, of_attack in theirs.items()]
        return grid(f"**{TITLES[table]}**: not run; the paper's ACC / ASR", ["attack", *models], lines)
    title = (
        f"**{TITLES[table]}**, each line by `python reproduce.py --table {table}` and the options in its last column"
    )
    return grid(title, HEAD, [[*row[:-1], f"`{row[-1]}`" if row[-1] else ""] for row in rows])


def grid(title, head, rows):
    """Lists of text as a table in Markdown, below its title."""
    lines = [title, "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ablations_markdown(table, rows):
    """The variants of one table in Markdown."""
    return grid(f"**{TITLES[table]}, variants**", ABLATIONS_HEAD, rows)


def latex(table, rows):
    """One table in LaTeX (package booktabs), without the commands."""

    def escaped(text):
        return text.replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$")

    lines = [rf"% {TITLES[table]}", r"\begin{tabular}{ll" + "r" * (len(HEAD) - 4) + "l}", r"\toprule"]
    lines += [" & ".join(map(escaped, HEAD[:-1])) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row[:-1])) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def picture(path, table, paper, lines):
    """ACC_paper and ASR of every row as bars, the paper's beside ours."""
    cells = cells_shown(table, paper, lines)
    models = list(dict.fromkeys(cells["model"]))
    names = list(dict.fromkeys(cells["row"]))
    figure, axes = plt.subplots(2, len(models), figsize=(4.4 * len(models), 6), layout="constrained", sharey="row")
    places = np.arange(len(names))
    for column, model in enumerate(models):
        parts = [ours(lines, name, model) for name in names]
        for axis, ours_name, paper_name in zip(axes[:, column], ("ACC_paper", "ASR"), ("ACC", "ASR"), strict=True):
            theirs = cells[cells["model"] == model].set_index("row")[paper_name].reindex(names)
            axis.bar(places - 0.2, theirs, 0.4, color="#b8bec6", label="paper")
            found = [part[ours_name].mean() if len(part) else np.nan for part in parts]
            bars = axis.bar(places + 0.2, found, 0.4, color="#3b6fb6", label="ours")
            for place, bar, part in zip(places, bars, parts, strict=True):
                if part.empty:
                    axis.text(
                        place + 0.2, 1, "not run", rotation=90, ha="center", va="bottom", fontsize=7, color="#666"
                    )
                else:
                    height = bar.get_height()
                    axis.text(place + 0.2, height + 1, f"{height:.1f}", ha="center", va="bottom", fontsize=7)
            axis.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
            axis.set_ylim(0, 112)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(model)
    axes[0, 0].set_ylabel("ACC without the target class, %")
    axes[1, 0].set_ylabel("ASR, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", fontsize=8, ncols=2)
    found = [part for model in models for name in names if len(part := ours(lines, name, model))]
    scales, rules = (sorted({part[column].iloc[0] for part in found}) for column in ("scale", "rule"))
    title = f"{TITLES[table]}: ours at scale {' and '.join(scales) or '(not run)'}, {' or '.join(rules)}"
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def replace_between(texts, marker, content):
    """Put ``content`` between its markers in the one of ``texts`` ({path: text}, changed in place) that has them; a
    `UserError` where none has, or more than one."""
    first, last = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    found = [path for path, text in texts.items() if first in text or last in text]
    if len(found) != 1 or texts[found[0]].count(first) != 1 or texts[found[0]].count(last) != 1:
        documents = ", ".join(shown(path) for path in texts)
        raise UserError(f"the markers {first} and {last} must stand once each, in one document; looked at: {documents}")
    head, rest = texts[found[0]].split(first)
    texts[found[0]] = f"{head}{first}\n{content}\n{last}{rest.split(last)[1]}"


def tables(results, paper):
    """Of each table its name, its records in ``results`` as a DataFrame (see `records.cell_line`), and its `body`."""
    for table in TITLES:
        cells = read_cells(results / table)
        lines = pd.DataFrame([cell_line(cell) | {"named": precision_named(cell)} for cell in cells])
        yield table, lines, body(table, paper, lines)


def made_by(document):
    """What a message says makes a document (path)."""
    inside = document.absolute().is_relative_to(ROOT)
    return f"git checkout {quoted(document)}" if inside else "your editor, with the markers of the README's tables"


def papers_figures(path):
    """The paper's figures in the CSV ``path``, a DataFrame with the columns `PAPER`. Raises `UserError` where it is no such table."""
    bundled = path == ROOT / "results/paper.csv"
    command = "git checkout results/paper.csv" if bundled else f"rm {quoted(path)}, without which ours is taken"
    paper = read_table(path, PAPER, command, dtype=PAPER, keep_default_na=False)
    odd = ~(paper["table"].isin(TITLES) & paper["row"].isin(ROWS) & paper["model"].isin(("backdoored", *VARIANTS)))
    odd |= paper.duplicated(["table", "row", "model"])
    if paper.empty or odd.any():
        what = "it has no line"
        if odd.any():
            what = f"its line {odd.idxmax() + 2} is of no table, row and model, or there twice"
        raise UserError(f"{shown(path)} does not hold the paper's figures: {what}. Mend it, or: {command}")
    return paper


def refuse_what_is_not_ours(results, names):
    """Raise a `UserError` where the folder ``results`` holds a file of the user's own that has the name of one of ours; ``names``: of
    the CSVs, without suffix."""
    refuse_other_file(results / "tables.md", "**")
    refuse_other_file(results / "tables.tex", "% ")
    for name in names:
        table, drawn = (results / f"{name}{suffix}" for suffix in (".csv", ".png"))
        refuse_other_file(table, ",".join(KEYS))
        if drawn.exists() and not table.exists():  # ours lies beside its table
            raise UserError(f"{shown(drawn)} is no picture of this project; move it away, or choose another folder")


def main(argv=None):
    opt = get_parser().parse_args(argv)
    require_folder(
        opt.results, f"its records are made with: {python('reproduce.py')} --table cifar10 --out {quoted(opt.results)}"
    )
    own, bundled = (folder / "paper.csv" for folder in (opt.results, ROOT / "results"))
    paper = papers_figures(own if own.exists() else bundled)
    documents = {path: read_text(path, made_by(path)) for path in opt.readme or []}
    texts, tex = {}, []
    shown_tables, shown_ablations = list(tables(opt.results, paper)), list(ablations(opt.results))
    if not any(len(lines) for _, lines, _ in shown_tables) and not shown_ablations:
        raise UserError(
            f"{shown(opt.results)} holds no record of a cell; make one with: {python('reproduce.py')} --table cifar10 --out "
            f"{quoted(opt.results)}"
        )
    for table, _, rows in shown_tables:
        texts[table] = markdown(table, rows)
        tex.append(latex(table, rows))
    for table, rows in shown_ablations:
        texts[f"{table}_ablations"] = ablations_markdown(table, rows)
    for table, content in texts.items() if documents else ():
        replace_between(documents, f"table {table}", content)

    written = [table for table, lines, _ in shown_tables if len(lines)]
    refuse_what_is_not_ours(opt.results, [*written, *(f"{table}_ablations" for table, _ in shown_ablations)])
    for table, lines, _ in shown_tables:
        if len(lines):
            collect(opt.results / table, opt.results / f"{table}.csv")
            picture(opt.results / f"{table}.png", table, paper, lines)
    for table, _ in shown_ablations:
        collect(opt.results / f"{table}_ablations", opt.results / f"{table}_ablations.csv")
    print("\n\n".join(texts.values()))
    writers = {
        opt.results / "tables.md": text_writer("\n\n".join(texts.values()) + "\n"),
        opt.results / "tables.tex": text_writer("\n\n".join(tex) + "\n"),
    }
    writers |= {path: text_writer(text) for path, text in documents.items()}
    write_together(writers)
    drawn = [opt.results / f"{table}{suffix}" for table in written for suffix in (".csv", ".png")]
    drawn += [opt.results / f"{table}_ablations.csv" for table, _ in shown_ablations]
    print(f"Written: {', '.join(shown(path) for path in (*drawn, *writers))}")


if __name__ == "__main__":
    run_script(main)
