"""The separated samples on disk: plain ``.npy`` files with a structured dtype and a record of how they were made."""

from copy import copy
from functools import partial

import numpy as np

from models import MODELS
from utils import args
from utils.checkpoints import SECURE_IDENTITY, refuse_other, refuse_other_data
from utils.errors import UserError, nearest_existing, require_file
from utils.files import BROKEN, array_writer, read_record
from utils.manifest import anew, is_other, of_other_data
from utils.paths import python, samples_folder, shown
from utils.poisoning import poison_training_set
from utils.separation import CLEAN, POISON, UNCERTAIN

FILES = {CLEAN: "clean_samples.npy", UNCERTAIN: "suspicious_samples.npy", POISON: "poison_samples.npy"}


def sample_dtype(shape):
    """image uint8 ``shape`` (H, W, 3), label int64, flag uint8 (0 in D_c, 1 in D_u, 2 in D_p), index int64 (the place in
    the training set). ``shape`` None: without the image, as for a data set that is streamed from disk."""
    image = [] if shape is None else [("image", np.uint8, shape)]
    return np.dtype([*image, ("label", np.int64), ("flag", np.uint8), ("index", np.int64)])


def sample_writers(folder, poisoned, flags):
    """Functions that write one file a set, by path, for `files.write_together`. ``flags`` int64 (N,), as `separation.separate`
    gives them; labels are those the victim has."""
    in_memory = isinstance(poisoned.images, np.ndarray)

    def write(file, flag):
        rows = np.flatnonzero(flags == flag)
        samples = np.empty(len(rows), dtype=sample_dtype(poisoned.images.shape[1:] if in_memory else None))
        if in_memory:
            samples["image"] = poisoned.images[rows]
        samples["label"] = poisoned.labels[rows]
        samples["flag"], samples["index"] = flag, poisoned.index[rows]
        array_writer(samples)(file)

    return {folder / name: partial(write, flag=flag) for flag, name in FILES.items()}


def load_samples(opt, spec, flags):
    """Read the sets that separate_samples.py wrote for these options.

    Args:
        opt: the options; those in ``opt.samples`` may come from another network; spec: of the data set; flags: which
        sets, of `separation.CLEAN`, `UNCERTAIN`, `POISON`.

    Returns:
        A structured array (N,), see `sample_dtype`, the sets one after the other.

    Raises:
        UserError: for a file that is missing, damaged or not of this kind, or samples of another attack or seed.
    """
    folder = samples_folder(opt)
    ratios = f"--clean_ratio {opt.clean_ratio} --poison_ratio {opt.poison_ratio}"
    finder, given = opt, getattr(opt, "samples", None)
    # A network from elsewhere is cleaned with samples that one of ours has found; --samples names what was made by other options.
    if given or opt.model not in MODELS:
        finder = copy(opt)
        finder.model, finder.samples = opt.model if opt.model in MODELS else "resnet10", None
    command = f"{python('separate_samples.py')} {args.attack_arguments(finder)} {ratios}"
    if finder is not opt and not (folder / "options.json").is_file():
        what = f"there are no separated samples in {shown(folder)}" if given else f"{opt.model} separates no samples"
        near = f". Nearest existing path: {nearest_existing(folder)}" if given else ""
        raise UserError(
            f"{what}; those of a network of this project go with --samples, such as {shown(samples_folder(finder))}, made with: "
            f"{command}{near}"
        )
    record = read_record(require_file(folder / "options.json", command))
    _refuse_other_options(record, opt)
    again = anew(record, "separate_samples.py", command)
    parts = []
    for flag in flags:
        path = require_file(folder / FILES[flag], again)
        try:
            part = np.load(path, allow_pickle=False, mmap_mode="r")
            if not isinstance(part, np.ndarray) or part.ndim != 1 or part.dtype != sample_dtype(
                None if spec.streamed else (spec.size, spec.size, 3)
            ):  # fmt: skip
                raise ValueError("it holds other arrays than samples of this data set")
            if len(part) and not (part["flag"] == flag).all():
                raise ValueError("it holds samples of another set")
            if len(part) and (
                part["label"].min() < 0 or part["label"].max() >= spec.num_classes or part["index"].min() < 0
            ):
                raise ValueError(f"a label is not 0 to {spec.num_classes - 1}, or an index below 0")
        except (*BROKEN, TypeError) as error:
            raise UserError(
                f"{shown(path)} is not a file of separated samples ({error}). Make it anew with: {again}"
            ) from None
        if is_other(record, "outputs", path):
            raise UserError(
                f"{shown(path)} is not what the run wrote that options.json beside it tells of; it was changed, or a run was "
                f"killed at its end. Make it anew with: {again}"
            )
        parts.append(part)
    return np.concatenate(parts)


def _refuse_other_options(record, opt):
    """Raise a `UserError` where the ``record`` of samples (dict) tells of other options; of which network they are is told by
    ``opt.samples``, where that is given."""
    names = [name for name in SECURE_IDENTITY if name != "model" or not getattr(opt, "samples", None)]
    refuse_other(record.get("options", {}), opt, f"the samples in {shown(samples_folder(opt))}", names)


def record_of_samples(opt):
    """Path of the record of the samples of these options, and what it holds (dict); nothing where it is missing."""
    path = samples_folder(opt) / "options.json"
    return path, read_record(path) or {}


def refuse_samples_of_other_data(opt, digest, path):
    """Raise a `UserError` where the separated samples are of another training set than the checkpoint ``path``, whose poisoned
    set has the ``digest``; None: of a network from elsewhere nobody knows. Of the data at hand see `images_of`."""
    folder, record = samples_folder(opt), record_of_samples(opt)[1]
    _refuse_other_options(record, opt)
    found = record.get("poisoned_digest", digest)
    if digest is not None and found != digest:
        raise UserError(
            f"the samples in {shown(folder)} are of another training set than {shown(path)}, although the options agree; run SD, "
            f"and BR step 1, on the same data"
        )


def load_order(path, count, command):
    """Numbers (``count``,) of an .npy file that puts the training samples in order, for D_p; ``command`` makes it where it is
    missing.

    Raises:
        UserError: for a file that is missing, or holds something else, or numbers that are not finite.
    """
    try:
        # Mapped, for its header may say that it is larger than the memory.
        order = np.load(require_file(path, command), allow_pickle=False, mmap_mode="r")
    except BROKEN:
        raise UserError(f"{shown(path)} is no .npy file of numbers; it is made with: {command}") from None
    if not isinstance(order, np.ndarray) or order.shape != (count,) or order.dtype.kind not in "fiu":
        held = f"{order.dtype} {order.shape}" if isinstance(order, np.ndarray) else "several arrays"
        raise UserError(
            f"{shown(path)} must hold one number a training sample, ({count},), not {held}; it is made with: {command}"
        )
    if not np.isfinite(order).all():
        raise UserError(f"{shown(path)} holds values that are not finite; it is made with: {command}")
    return np.array(order)


def images_of(samples, dataset, opt):
    """The images of samples that `load_samples` gave: theirs, or where they hold none, for the data set is streamed, those
    of the training set, poisoned as the options say, which are read when they are needed.

    Raises:
        UserError: where the training set is not the one that was separated.
    """
    path, record = record_of_samples(opt)
    if of_other_data(record, dataset.record):
        refuse_other(record.get("options", {}), opt, shown(path), ["image_size"])
        raise UserError(
            f"the data under {shown(opt.data_root)} has changed since {shown(path)} was written; run SD again"
        )
    if not dataset.spec.streamed:
        return samples["image"]
    poisoned = poison_training_set(dataset, opt)
    refuse_other_data(record, poisoned.digest, shown(path), opt)
    return poisoned.images.subset(samples["index"])


def sample_files(opt, flags):
    """Paths of the files of the sets ``flags`` of these options."""
    return [samples_folder(opt) / FILES[flag] for flag in flags]
