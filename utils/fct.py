"""Feature consistency towards transformations: FCT of every sample, computed, kept and read (paper section 4.1).

FCT(x) = mean over feature dimensions of (e(x) - e(tau(x)))^2.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from models import build_model
from utils import args
from utils.checkpoints import IDENTITY, latest_checkpoint, load_checkpoint, refuse_other_data
from utils.dataloader_bd import Normalize, fetch, hold
from utils.distributed import gather, part
from utils.errors import UserError, require_file
from utils.files import array_writer, read_record, sha256, text_writer, write_together
from utils.images import rows_of
from utils.manifest import anew, as_written, is_other, of_other_data, write_options
from utils.paths import backdoored_folder, python, shown
from utils.progress import progress
from utils.seeding import generator
from utils.transforms import Tau
from utils.weights import load_weights

SD_STEPS = ("finetune_attack_noTrans", "train_attack_noTrans")
AUTO = (("flip", "none"), ("shrink", "none"))  # the two tau that --trans1 auto combines
COLLAPSED = 1.0  # per cent of the samples with an FCT of exactly zero, above which the features count as collapsed


def compute_fct(
    model, images, spec, runtime, *, trans1="rotate", trans2="affine", seed=0, draws=1, batch_size=256, indices=None
):
    """FCT of every image, with tau a function of the seed, the draw and the sample's index alone.

    A pass in bfloat16 settles all samples but those near the ranks at which the paper's ratios split them; these are computed
    again in float32 (see `near_a_gamma`), so that by these ratios almost all samples come into the set that float32 puts them in.

    Args:
        model: a network with ``features``; it is put into evaluation mode.
        images: uint8 (N, H, W, 3), an array or streamed; spec: the data set's `datasets.Spec`; runtime: a
        `device.Runtime`.
        trans1, trans2: see `transforms.Tau`; trans1 "auto" combines the FCT of several tau, see `combine`;
        draws: how many draws of tau are averaged.
        batch_size: images a forward pass; the values do not depend on it but for the last bits.
        indices: of the samples, int64 (N,), where the images are some of a set; default: 0 to N - 1.

    Returns:
        (fct, norms): float32 (N,) each; norms are the lengths of e(x).
    """
    taus = [Tau(*names, images.shape[1]) for names in (AUTO if trans1 == "auto" else [(trans1, trans2)])]
    indices = np.arange(len(images)) if indices is None else indices

    def table_of(tau, draw):
        table = tau.draw(generator(seed, "tau", draw), int(indices.max(initial=-1)) + 1)
        return {name: value[indices] for name, value in table.items()}

    tables = [[table_of(tau, draw) for draw in range(draws if tau.is_random else 1)] for tau in taus]

    def one_value(of_taus):
        return combine(of_taus.T) if trans1 == "auto" else of_taus[:, 0]

    held = hold(images, runtime)
    common = Normalize(spec, runtime.device), list(zip(taus, tables, strict=True)), batch_size
    of_taus, norms = _fct_of_rows(model, held, np.arange(len(images)), runtime, *common)
    if runtime.dtype != torch.float32:
        near = near_a_gamma(one_value(of_taus))
        exact = replace(runtime, dtype=torch.float32)
        if len(near):
            of_taus[near], norms[near] = _fct_of_rows(model, held, near, exact, *common)
    return one_value(of_taus), norms


@torch.inference_mode()
def _fct_of_rows(model, held, rows, runtime, normalize, drawn_taus, batch_size):
    """FCT of the samples ``rows``, int64 (M,), under each of the T taus: float32 (M, T), and the norms of e(x), float32 (M,).
    ``drawn_taus``: (tau, the tables of its draws) for each of them."""
    model.eval()

    def features(batch):
        with runtime.autocast():
            return model.features(normalize(batch)).float()

    fct, norms = [], []
    splits = list(part(torch.from_numpy(rows)).split(batch_size))
    for chosen, batch in zip(progress(splits, "FCT", len(splits)), fetch(held, splits, runtime), strict=True):
        plain = features(batch)
        of_taus = []
        for tau, tables in drawn_taus:
            total = 0
            for table in tables:
                changed = tau.apply(batch, {name: value[chosen] for name, value in table.items()})
                total = total + (plain - features(changed)).square().mean(1)
            of_taus.append(total / len(tables))
        fct.append(torch.stack(of_taus, 1))
        norms.append(plain.norm(dim=1))
    return tuple(gather(torch.cat(parts), len(rows)).cpu().numpy() for parts in (fct, norms))


def zeros_of(fct):
    """Per cent of FCT, float32 (N,), that is exactly zero."""
    return 100 * float((fct == 0).mean())


def zeros_of_some(model, images, spec, runtime, seed, batch_size, some=512):
    """How far the features have collapsed: per cent of ``some`` training images, drawn by the seed, whose FCT under the paper's tau, in
    float32, is exactly zero. Arguments otherwise as of `compute_fct`; ``images`` are all of the training set."""
    rows = np.sort(generator(seed, "watched").permutation(len(images))[:some])
    exact = replace(runtime, dtype=torch.float32)
    fct, _ = compute_fct(model, rows_of(images, rows), spec, exact, seed=seed, batch_size=batch_size, indices=rows)
    return zeros_of(fct)


def near_a_gamma(fct, reach=0.01):
    """The samples whose rank lies within ``reach`` times N of a rank at which the paper's alpha_c and alpha_p split the
    samples, int64 (M,), ascending. Not those of FCT zero: these have collapsed, and their order is a draw.

    Args:
        fct: float32 (N,); reach: share of N; rounding to bfloat16 moves a sample by far less than 0.01 (results/speed.md).
    """
    order = np.argsort(fct, kind="stable")
    near = np.concatenate(
        [
            order[max(0, round((split - reach) * len(fct))) : round((split + reach) * len(fct))]
            for split in (args.RATIOS["clean_ratio"], 1 - args.RATIOS["poison_ratio"])
        ]
    )
    return np.sort(near[fct[near] > 0])


def combine(fct):
    """One value a sample from the FCT of several tau (not in the paper; README: choosing tau).

    A tau that breaks the trigger lifts the poisoned samples far above the bulk, one that does not leaves them in it. So
    log FCT of each tau is measured from its median, in units of its median absolute deviation, and the largest counts.
    Uses no label. A sample whose FCT is exactly zero under every tau stays at zero, one whose FCT is not finite under some is NaN.

    Args:
        fct: float32 (T, N), not negative.

    Returns:
        float32 (N,), positive where some tau has an effect: e to that number of deviations, kept within e^-80 and e^80.
    """
    largest = np.full(fct.shape[1], -np.inf)
    for values in fct.astype(np.float64):
        moved = (values > 0) & np.isfinite(values)
        if moved.any():
            logs = np.log(values[moved])
            centre = np.median(logs)
            deviation = np.median(np.abs(logs - centre)) or 1.0
            largest[moved] = np.maximum(largest[moved], (logs - centre) / deviation)
    combined = np.where(np.isinf(largest), 0, np.exp(largest.clip(-80, 80)))
    return np.where(np.isfinite(fct).all(0), combined, np.nan).astype(np.float32)


def sd_path(opt):
    """Path of the checkpoint that SD steps 3 to 5 look at, ``--checkpoint_load`` or step 2's last, and the command making it."""
    command = f"{python('finetune_attack_noTrans.py')} {args.attack_arguments(opt)} --epochs 10"
    return opt.checkpoint_load or latest_checkpoint(backdoored_folder(opt, "noTrans_ftsimi"), 10, command), command


def sd_checkpoint(opt):
    """As `sd_path`; a `UserError` where there is no such file, or it is step 2's and step 1 has been run again since. Of a file that
    ``--checkpoint_load`` names the latter is said alone."""
    path, command = sd_path(opt)
    require_file(path, command)
    record = read_record(path.with_name("options.json")) or {}
    of_it = record.get("outputs", {}).get(path.name) is not None
    for name, digest in record.get("inputs", {}).items() if of_it else ():
        before = path.parent / name
        if before.is_file() and sha256(before) != digest:
            what = f"{shown(path)} was trained from another {shown(before)} than is there now"
            if not opt.checkpoint_load:
                raise UserError(f"{what}. Train it anew with: {anew(record, f'{SD_STEPS[0]}.py', command)}")
            print(f"Note: {what}")
    return path, command


def beside_checkpoint(opt):
    """The option that chooses the folder of what step 3 writes: beside the checkpoint."""
    return "--checkpoint_load" if opt.checkpoint_load else "--output_root"


def fct_runtime(opt, runtime):
    """The `device.Runtime` in which FCT is computed: in float32 unless ``--precision`` names another; ``opt.ran_in``, which a record
    tells, becomes that."""
    if opt.precision == "auto":  # as `settle_fct_precision` says
        runtime = replace(runtime, dtype=torch.float32)
    opt.ran_in = runtime.record
    return runtime


def saved_or_new_fct(path, command, dataset, poisoned, opt, runtime):
    """FCT of the poisoned training set: the values that step 3 saved for this checkpoint and these options, else computed.

    Returns:
        (fct, sources): float32 (N,), in sample order; dict, the path of the file that was read and its SHA-256, or nothing.

    Raises:
        UserError: for a checkpoint that does not fit the options or the data.
    """
    saved = _saved_fct(path, opt, dataset, len(poisoned.labels))
    if saved is None:
        print("No FCT values of this checkpoint and these options are saved; computing them")
        _, model = sd_network(path, command, dataset, poisoned, opt, runtime)
        return fct_of_network(path, model, runtime, dataset, poisoned, opt)[0], {}
    refuse_other_data(load_checkpoint(path, opt, command, SD_STEPS), poisoned.digest, path, opt)
    return saved


def sd_network(path, command, dataset, poisoned, opt, runtime):
    """The checkpoint of a step of SD, and its network on the device. Raises `UserError` for a checkpoint that does not fit the options
    or the data."""
    checkpoint = load_checkpoint(path, opt, command, SD_STEPS)
    refuse_other_data(checkpoint, poisoned.digest, path, opt)
    model = build_model(opt.model, opt.dataset, dataset.spec.num_classes, dataset.spec.size)
    load_weights(model, checkpoint["model"], path)
    return checkpoint, runtime.place(model)


def fct_of_network(path, model, runtime, dataset, poisoned, opt):
    """FCT of the poisoned training set under the network of the checkpoint ``path``, as `sd_network` gives it. Says how far the
    features have collapsed.

    Returns:
        FCT, float32 (N,), in sample order; the figures of that collapse, a dict: zeros (per cent of the samples whose FCT is exactly
        zero) and feature_norm (mean length of e(x)).
    """
    options = {"trans1": opt.trans1, "trans2": opt.trans2, "draws": opt.draws, "batch_size": opt.batch_size}
    fct, norms = compute_fct(model, poisoned.images, dataset.spec, runtime, seed=opt.seed, **options)
    if not np.isfinite(fct).all():
        raise UserError(f"{path}: FCT is not finite for {(~np.isfinite(fct)).sum()} samples; use an earlier checkpoint")
    zeros, norm = zeros_of(fct), float(norms.mean())
    print(f"FCT of {len(fct)} samples: median {np.median(fct):.4g}, largest {fct.max():.4g}, "
          f"exactly zero {zeros:.2f} %; mean feature norm {norm:.4g}")  # fmt: skip
    if zeros > COLLAPSED:
        print(f"Warning: {zeros:.1f} % of the samples have the same features before and after tau. Unless these are images that tau "
              "leaves as they are, such as blank ones, the network has collapsed. "
              "Ties at a threshold are broken by a seeded draw; a checkpoint of an earlier epoch, or of step 1, orders them")  # fmt: skip
    return fct, {"zeros": zeros, "feature_norm": norm}


def settle_fct_precision(*settings):
    """Name in options (dicts) of a step that takes FCT the precision that it takes it in where they say auto, in place."""
    for options in settings:
        if options.get("precision") == "auto":
            options["precision"] = "float32"


def step_3_record(path, opt, data):
    """The record of step 3 (dict) beside the checkpoint ``path``, where it is of that checkpoint, these options and the training set
    that ``data``, a `datasets.Dataset.record`, tells of; else None."""
    record = read_record(fct_path(path, "fct.json")) or {}
    found = dict(record.get("options", {}))
    wanted = {name: getattr(opt, name) for name in (*IDENTITY, *args.TAU_DEFAULTS, "precision")}
    settle_fct_precision(found, wanted)
    fits = wanted.items() <= found.items() and record.get("inputs", {}).get(path.name) == sha256(path)
    return record if fits and not of_other_data(record, data) else None


def fct_path(path, kind):
    """Path of ``<epoch>_<kind>`` beside the checkpoint ``<epoch>.tar``."""
    return path.with_name(f"{path.stem}_{kind}")


def save_fct(path, digest, fct, dataset, poisoned, opt, order=None, **found):
    """Write the values beside the checkpoint ``path``, in sample order, one a line. ``digest``: of the checkpoint that they are of;
    ``order``: what `audit.likeness_of` gave, for ``<epoch>_order.npy``, or None; ``found``: what else the record tells.

    ``<epoch>_all.txt`` and the table ``<epoch>_fct.csv`` (index, label, FCT) serve the next steps; ``_clean.txt`` and
    ``_poison.txt`` split the values by the ground truth, where it is known, for plots alone.
    """
    kinds = {"all": slice(None)}
    if poisoned.is_clean is not None:
        kinds |= {"clean": poisoned.is_clean, "poison": ~poisoned.is_clean}
    writers = {
        fct_path(path, f"{kind}.txt"): text_writer("".join(f"{float(value)!r}\n" for value in fct[keep]))
        for kind, keep in kinds.items()
    }
    table = pd.DataFrame({"index": poisoned.index, "label": poisoned.labels, "FCT": fct.astype(np.float64)})
    writers[fct_path(path, "fct.csv")] = text_writer(table.to_csv(index=False))
    if order is not None:
        writers[fct_path(path, "order.npy")] = array_writer(order)
    digests = write_together(writers)
    if order is None:  # what an earlier run left there
        fct_path(path, "order.npy").unlink(missing_ok=True)
    outputs = {path.with_name(name): digest for name, digest in digests.items()}
    record, inputs = fct_path(path, "fct.json"), {path: digest}
    settings = {"step": "calculate_consistency", "data": dataset.record, **found}
    write_options(record, opt, inputs=inputs, outputs=outputs, **settings)


def load_fct(path, command):
    """The values of ``<epoch>_all.txt`` beside a checkpoint, float32 (N,).

    Raises:
        UserError: where the file is missing (``command`` makes it) or is not a list of finite numbers.
    """
    record = read_record(fct_path(path, "fct.json")) or {}
    again = anew(record, "calculate_consistency.py", command)
    source = require_file(fct_path(path, "all.txt"), again if record else command)
    try:
        values = np.loadtxt(source, dtype=np.float64, ndmin=1) if source.stat().st_size else np.zeros(0)
    except (ValueError, OSError) as error:
        raise UserError(f"{shown(source)} is not one number a line ({error}). Make it anew with: {again}") from None
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values >= 0)).all():
        raise UserError(
            f"{shown(source)} holds no values, or some that are negative or not finite. Make it anew with: {again}"
        )
    if is_other(record, "outputs", source) or (Path(path).is_file() and is_other(record, "inputs", path)):
        raise UserError(
            f"{shown(source)} is not what the run wrote that {shown(fct_path(path, 'fct.json'))} tells of, or {shown(path)} "
            f"has been replaced since. Make it anew with: {again}"
        )
    return values.astype(np.float32)


def _saved_fct(path, opt, dataset, count):
    """What step 3 saved, as `saved_or_new_fct` gives it, or None where it is not there or not of these options and ``count`` samples."""
    record, source = step_3_record(path, opt, dataset.record), fct_path(path, "all.txt")
    if not record or not as_written(record, source):
        return None
    fct = load_fct(path, python("calculate_consistency.py"))
    return (fct, {source: record["outputs"][source.name]}) if len(fct) == count else None
