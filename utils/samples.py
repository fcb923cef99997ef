"""The separated samples on disk: plain ``.npy`` files with a structured dtype and a record of how they were made."""

import numpy as np

from utils import args
from utils.checkpoints import IDENTITY, refuse_other
from utils.datasets import DATASETS
from utils.errors import UserError, require_file
from utils.files import atomic_write, read_json
from utils.paths import separated_folder, shown

CLEAN, UNCERTAIN, POISON = 0, 1, 2
FILES = {CLEAN: "clean_samples.npy", UNCERTAIN: "suspicious_samples.npy", POISON: "poison_samples.npy"}


def sample_dtype(shape):
    """image uint8 ``shape`` (H, W, 3), label int64, flag uint8 (0 in D_c, 1 in D_u, 2 in D_p), index int64 (the place in
    the training set). ``shape`` None: without the image, as for a data set that is streamed from disk."""
    image = [] if shape is None else [("image", np.uint8, shape)]
    return np.dtype([*image, ("label", np.int64), ("flag", np.uint8), ("index", np.int64)])


def save_samples(folder, poisoned, flags):
    """Write one file a set. ``flags`` int64 (N,), as `fct.separate` gives them; labels are those the victim has."""
    in_memory = isinstance(poisoned.images, np.ndarray)
    for flag, name in FILES.items():
        rows = np.flatnonzero(flags == flag)
        samples = np.empty(len(rows), dtype=sample_dtype(poisoned.images.shape[1:] if in_memory else None))
        if in_memory:
            samples["image"] = poisoned.images[rows]
        samples["label"] = poisoned.labels[rows]
        samples["flag"], samples["index"] = flag, poisoned.index[rows]
        with atomic_write(folder / name) as file:
            np.save(file, samples, allow_pickle=False)


def load_samples(opt, flags, with_images=False):
    """Read the sets that separate_samples.py wrote for these options.

    Args:
        opt: the options; flags: which sets, of `CLEAN`, `UNCERTAIN`, `POISON`; with_images: whether the step cannot do
        without the images, which samples of a streamed data set do not hold.

    Returns:
        A structured array (N,), see `sample_dtype`, the sets one after the other.

    Raises:
        UserError: for a file that is missing, damaged or not of this kind, or samples of another attack or seed.
    """
    if with_images and DATASETS[opt.dataset].streamed:
        raise UserError(
            f"ST needs its images in memory, and {opt.dataset} is streamed from disk; the paper's ImageNet table has D-BR "
            "alone: python unlearn_relearn.py"
        )
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
            if part.dtype != sample_dtype(None if DATASETS[opt.dataset].streamed else part.dtype["image"].shape):
                raise ValueError(f"its dtype is {part.dtype}")
        except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
            raise UserError(
                f"{shown(path)} is not a file of separated samples ({error}). Make it anew with: {command}"
            ) from None
        parts.append(part)
    return np.concatenate(parts)
