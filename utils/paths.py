"""Where the steps put what they make: the folders of the authors' README, each named once."""

import os
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def data_name(opt):
    """How folders name the data set; a part of it by its size, data of the user's own by its folder or file as well."""
    if opt.train_images is not None:
        return f"{opt.dataset}_{opt.train_images}"
    if opt.dataset not in ("folder", "npz"):
        return opt.dataset
    root = Path(os.path.abspath(opt.data_root))  # without the dots of "DIR/.."
    name = root.stem if opt.dataset == "npz" else root.name
    return f"{opt.dataset}_{re.sub('[^A-Za-z0-9._-]+', '_', name)[:60]}"


def backdoored_folder(opt, stage):
    """Folder of a model trained on poisoned data; ``stage`` is noTrans, noTrans_ftsimi or withTrans."""
    rate = f"poison_rate_{opt.poison_rate}"
    return opt.output_root / "saved/backdoored_model" / rate / stage / data_name(opt) / opt.model / opt.trigger_type


def benign_folder(opt):
    """Folder of the model trained on clean data."""
    return opt.output_root / "saved/benign_model" / data_name(opt) / opt.model


def attack_and_ratios(opt):
    """``<trigger>_<clean_ratio>_<poison_ratio>``, as the authors' README names the folders of separated samples."""
    return f"{opt.trigger_type}_{opt.clean_ratio}_{opt.poison_ratio}"


def separated_folder(opt):
    """Folder of the three sample files that SD ends in."""
    return opt.output_root / "saved/separated_samples" / data_name(opt) / opt.model / attack_and_ratios(opt)


def samples_folder(opt):
    """Folder of the sample files that a step of ST or BR reads: ``--samples`` where it is given, else `separated_folder`."""
    return getattr(opt, "samples", None) or separated_folder(opt)


def secure_folder(opt):
    """Folder under which ST keeps its extractors and classifiers."""
    rate = f"poison_rate_{opt.poison_rate}"
    return opt.output_root / "ST/save" / rate / "SupCon_models" / data_name(opt) / opt.model / attack_and_ratios(opt)


def decoded_folder(opt):
    """Folder of what is decoded of data of the user's own."""
    return opt.output_root / "saved/decoded"


def poisoned_folder(opt):
    """Folder of the poisoned images that take long to make."""
    return opt.output_root / "saved/poisoned_images" / opt.dataset


def shown(path):
    """``path`` as the user would type it: relative to the current folder where it lies below it."""
    try:
        return os.fspath(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)


def real(path):
    """``path`` as an absolute one without links. `Path.resolve` ends in an error where one leads to itself; this leaves that to
    whoever opens it."""
    return Path(os.path.realpath(path))


def relative(path, folder):
    """``path`` as seen from ``folder``, text; as an absolute one where no way leads there, as between two drives of Windows."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return os.path.abspath(path)


def quoted(path):
    """`shown`, as a word of a command."""
    return shlex.quote(shown(path))


def python(script, folder=None):
    """The words that run a ``script`` (its path in the repository) from a ``folder``, by default the current one, which is ST/ for
    some."""
    folder = folder or Path.cwd()
    inside = folder.is_relative_to(ROOT)
    return f"python {shlex.quote(os.path.relpath(ROOT / script, folder) if inside else os.fspath(ROOT / script))}"


def typed(path):
    """A path as a user would type it in the folder of the repository, where reproduce.py and the audit run theirs."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def arguments(opt, always, others):
    """The options ``always``, and of the ``others`` those that are not the default (names), as the user would type them, for
    messages and commands."""
    defaults, words = getattr(opt, "defaults", {}), []
    for name in [*always, *others]:
        value = getattr(opt, name)
        if name in always or value != defaults.get(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(quoted(one) if isinstance(one, Path) else shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def clean_arguments(opt):
    """As `args.attack_arguments`, for the benign model, which knows of no attack."""
    return arguments(opt, ["dataset", "model"], ["data_root", "train_images", "seed", "output_root"])
