"""The cells of the paper's tables that were run: one JSON a cell under results/<table>/, and all of a table as one CSV.

A cell is a row (an attack) and a defence, at one scale and one seed.
"""

import platform
from pathlib import Path

import torch

from utils.device import cores
from utils.errors import UserError
from utils.files import read_json, read_record, read_table, read_text, write_json, write_rows
from utils.manifest import manifest
from utils.metrics import MEASURES
from utils.paths import quoted, shown
from utils.rows import DEFENCES

DETECTION = ("AUROC", "Dp_precision", "Dp_recall", "Dc_contamination", "Dp_size", "Dc_size")
LAST = "last epoch"  # the rule that chose the epoch of a cell's result, but where its record says otherwise
KEYS = ("table", "row", "defence", "scale", "seed")


def cell_name(row, defence, scale, seed, variant=""):
    """Name of a cell's file without its suffix."""
    return "_".join([row, defence, scale, f"seed{seed}", *([variant] if variant else [])])


def hardware(device):
    """The processor, or the GPU, that ``device`` (an option of the steps, or None) means, in words."""
    cuda = torch.cuda.is_available() if device in (None, "auto") else device.startswith("cuda")
    if cuda:
        return f"1 {torch.cuda.get_device_name(device if ':' in str(device) else 0)}"
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # another system than Linux
    return f"{cores()} cores of {name}"


def log_of(step, columns, path=None):
    """The CSV that a `steps.Step` kept, as a DataFrame with ``columns`` of numbers beside ``epoch``; ``path``: if not log.csv beside
    its output. Raises `UserError` where it is no such log."""
    path, kinds = path or step.output.with_name("log.csv"), {"epoch": int, **dict.fromkeys(columns, float)}
    return read_table(path, kinds, f"rm {quoted(step.output)}, and this command again", dtype=kinds)


def read_log(step, path=None):
    """The rows of a training's log in which the test sets were looked at, as a DataFrame; the one before training left out.

    Args:
        step: the `steps.Step` that wrote it; path: of the CSV, if not log.csv beside the step's output.

    Raises:
        UserError: where it is no such log, or has no such row.
    """
    path = path or step.output.with_name("log.csv")
    rows = log_of(step, MEASURES, path)
    rows = rows[(rows["epoch"] >= 0) & rows["ASR"].notna()]
    if rows.empty:
        raise UserError(f"{shown(path)} has no epoch in which the test sets were looked at; {_anew(step)}")
    return rows


def read_figures(step, path, names):
    """The dict in a JSON file (``path``) that a `steps.Step` wrote. Raises `UserError` where one of the numbers ``names`` is not there."""
    content = read_json(path) or {}
    lacks = [name for name in names if not isinstance(content.get(name), (int, float))]
    if lacks:
        raise UserError(f"{shown(path)} has no {', '.join(lacks)}; {_anew(step)}")
    return content


def _anew(step):
    return f"remove {shown(step.output)} and run this again, which makes both anew"


def measured(row):
    """The measures of one row of a log as a dict."""
    return {name: float(row[name]) for name in MEASURES}


def write_cell(path, opt, inputs, **content):
    """Write the record of a cell (path of the JSON); ``inputs``: what it was read from."""
    write_json(path, {**manifest(path, opt, inputs=inputs, outputs=[]), **content})


def read_cells(folder):
    """All records in ``folder``, sorted by file name.

    Raises:
        UserError: for a file that is no record of a cell, or of another than its name says, such as a copy, which would count as one
        more seed.
    """
    cells = []
    for path in sorted(Path(folder).glob("*.json")):
        cell = read_json(path)
        if not _is_cell(cell):
            raise UserError(
                f"{path} is no record of a cell; remove it, or make it with: python reproduce.py --table ..."
            )
        name = cell_name(*(cell[key] for key in KEYS[1:]), cell.get("variant"))
        if path.stem != name or path.parent.name not in (cell["table"], f"{cell['table']}_ablations"):
            raise UserError(f"{path} holds the cell {cell['table']}/{name}; give it that name, or remove it")
        cells.append(cell)
    return cells


def check_place(table):
    """Refuse to write records beside the CSV ``table``, and it, where one of the records there is none, or the CSV is another table.

    Raises:
        UserError: see `read_cells`.
    """
    read_cells(table.with_suffix(""))
    refuse_other_file(table, ",".join(KEYS))


def refuse_other_file(path, start):
    """Raise a `UserError` where the file ``path`` is there and begins with other words than ``start``, so that it is not ours to
    replace."""
    if path.exists() and not read_text(path, "this command, with another folder").startswith(start):
        raise UserError(f"{shown(path)} is no table of this project; move it away, or choose another folder")


def _is_cell(cell):
    """Whether what a JSON file holds has what `cell_line` and the tables read of a record."""
    parts = {name: cell.get(name) for name in ("before", "after", "detection", "versions")}
    parts |= {name: cell.get(name) or {} for name in ("seconds", "paper_selection")}
    words = [cell.get(name, "") for name in ("table", "row", "scale", "variant", "rule")]
    commands = cell.get("commands", [])
    if (
        any(name not in cell for name in KEYS)
        or not all(isinstance(part, dict) for part in parts.values())
        or "torch" not in parts["versions"]
        or not all(isinstance(word, str) for word in words)
        or cell["defence"] not in DEFENCES
        or type(cell["seed"]) is not int
        or not isinstance(commands, list)
    ):
        return False
    shares = [parts[name].get(measure) for name in ("before", "after") for measure in MEASURES]
    selected = {name: parts["paper_selection"].get(name) for name in ("epoch", *MEASURES)}
    shares += [selected[name] for name in MEASURES if selected[name] is not None]
    numbers = [*parts["seconds"].values(), *([] if selected["epoch"] is None else [selected["epoch"]])]
    detected = [parts["detection"].get(name) for name in DETECTION]  # AUROC is NaN where every sample is poisoned
    return (
        all(type(share) in (int, float) and 0 <= share <= 100 for share in shares)  # NaN compares false
        and all(type(number) in (int, float) and 0 <= number < 1e300 for number in numbers)
        and all(isinstance(number, (int, float, type(None))) for number in detected)
        and all(isinstance(command, str) for command in commands)
    )


def cell_line(cell):
    """A record as one flat dict, a line of the table's CSV. ``best_``: by the paper's selection, on the test set."""
    line = {name: cell[name] for name in KEYS}
    line |= {"variant": cell.get("variant", ""), "rule": cell.get("rule", LAST)}
    line |= {f"before_{name}": cell["before"].get(name) for name in MEASURES}
    line |= {name: cell["after"].get(name) for name in MEASURES}
    line |= {f"best_{name}": (cell.get("paper_selection") or {}).get(name) for name in ("epoch", *MEASURES)}
    line |= {name: cell["detection"].get(name) for name in DETECTION}
    line |= {"model": cell.get("model"), "training_images": cell.get("training_images")}
    seconds = cell.get("seconds") or {}
    line |= {"seconds": round(sum(seconds.values())), "hardware": cell.get("hardware")}
    line |= {"precision": cell.get("precision")}
    # Steps that were there already when the cell was run, of which the record tells no time.
    line |= {"steps_not_timed": max(0, len(cell.get("commands") or []) - len(seconds))}
    return line | {"torch": cell["versions"]["torch"], "commit": cell.get("commit")}


def collect(folder, out):
    """Write all records in ``folder`` as one CSV (path ``out``), a line a cell."""
    write_rows(out, [cell_line(cell) for cell in read_cells(folder)])


def epochs_of(step):
    """Epochs that a step's record tells of, or None for a step without epochs."""
    return (read_record(step.record) or {}).get("epochs_done")
