"""The separated samples on disk: plain ``.npy`` files with a structured dtype and a record of how they were made."""

import numpy as np

from utils import args
from utils.checkpoints import IDENTITY, refuse_other
from utils.errors import UserError, require_file
from utils.files import atomic_write, read_json
from utils.paths import separated_folder, shown

CLEAN, UNCERTAIN, POISON = 0, 1, 2
FILES = {CLEAN: "clean_samples.npy", UNCERTAIN: "suspicious_samples.npy", POISON: "poison_samples.npy"}


def sample_dtype(shape):
    """image uint8 ``shape`` (H, W, 3), label int64, flag uint8 (0 in D_c, 1 in D_u, 2 in D_p), index int64."""
    return np.dtype([("image", np.uint8, shape), ("label", np.int64), ("flag", np.uint8), ("index", np.int64)])


def save_samples(folder, poisoned, flags):
    """Write one file a set. ``flags`` int64 (N,), as `fct.separate` gives them; labels are those the victim has."""
    for flag, name in FILES.items():
        rows = np.flatnonzero(flags == flag)
        samples = np.empty(len(rows), dtype=sample_dtype(poisoned.images.shape[1:]))
        samples["image"], samples["label"] = poisoned.images[rows], poisoned.labels[rows]
        samples["flag"], samples["index"] = flag, poisoned.index[rows]
        with atomic_write(folder / name) as file:
            np.save(file, samples, allow_pickle=False)


def load_samples(opt, flags):
    """Read the sets that separate_samples.py wrote for these options.

    Args:
        opt: the options; flags: which sets, of `CLEAN`, `UNCERTAIN`, `POISON`.

    Returns:
        A structured array (N,), see `sample_dtype`, the sets one after the other.

    Raises:
        UserError: for a file that is missing, damaged or not of this kind, or samples of another attack or seed.
    """
    folder = separated_folder(opt)
    ratios = f"--clean_ratio {opt.clean_ratio} --poison_ratio {opt.poison_ratio}"
    command = f"python separate_samples.py {args.attack_arguments(opt)} {ratios}"
    record = read_json(require_file(folder / "options.json", command))
    refuse_other(record.get("options", {}), opt, f"the samples in {shown(folder)}", IDENTITY)
    parts = []
    for flag in flags:
        path = require_file(folder / FILES[flag], command)
        try:
            part = np.load(path, allow_pickle=False, mmap_mode="r")
            if part.dtype != sample_dtype(part.dtype["image"].shape):
                raise ValueError(f"its dtype is {part.dtype}")
        except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
            raise UserError(
                f"{shown(path)} is not a file of separated samples ({error}). Make it anew with: {command}"
            ) from None
        parts.append(part)
    return np.concatenate(parts)
