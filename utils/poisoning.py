"""What the attacker makes of a data set: which samples are poisoned, their labels, and their images; what CL and SSBA need for that
from disk.

What takes a network to make is kept in saved/poisoned_images/, with its settings, and made once.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from utils.adversarial import EPSILON, STEP_SIZE, STEPS, load_benign_model, perturb
from utils.checkpoints import latest_checkpoint, refuse_other_data
from utils.errors import UserError, nearest_existing, require_file
from utils.files import BROKEN, atomic_write, load_npz, make_folder, sha256
from utils.images import StreamedImages
from utils.paths import benign_folder, clean_arguments, poisoned_folder, python, shown
from utils.seeding import generator
from utils.separation import share_of
from utils.SSBA.encode_image import encode_images
from utils.triggers import apply_trigger

TARGET_TYPES = ("all2one", "all2all", "cleanLabel")

FROM_A_FILE = ("SSBA", "kittyTrigger")  # triggers that test images get from a file

WORTH_KEEPING = 64  # fewer images are made anew each time


@dataclass(frozen=True)
class PoisonedSet:
    """A training set as the victim gets it, and what only an evaluation may look at.

    ``images`` uint8 (N, H, W, 3), an array or `TriggeredImages`, ``labels`` int64 (N,), ``index`` int64 (N,): the sample's
    place in the data set. ``digest``: SHA-256 of which samples are poisoned and how; of data of the user's own, of that data.
    ``true_labels`` int64 (N,) and ``is_clean`` bool (N,) are the ground truth: no defence step reads them. Of data of the
    user's own they are None.
    """

    images: "np.ndarray | TriggeredImages"
    labels: np.ndarray
    true_labels: np.ndarray | None
    is_clean: np.ndarray | None
    index: np.ndarray
    digest: str


class TriggeredImages:
    """Streamed images, some of them with the trigger painted on when they are decoded; indexed like the array uint8
    (N, H, W, 3) they stand for.

    Args:
        images: an `images.StreamedImages`; chosen: bool (N,), which carry the trigger; paint: see `painter`.
    """

    decodes = True

    def __init__(self, images, chosen, paint):
        self.images, self.chosen, self.paint = images, chosen, paint

    @property
    def shape(self):
        return self.images.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        """uint8 (n, H, W, 3) of the chosen rows (a slice, indices or a mask)."""
        images, chosen = self.images[rows], self.chosen[rows]
        if chosen.any():
            images[chosen] = self.paint(images[chosen])
        return images

    def subset(self, rows):
        """The chosen rows, not decoded yet."""
        return TriggeredImages(self.images.subset(rows), self.chosen[rows], self.paint)


def attack_label(labels, target_type, target_label, num_classes):
    """The labels (int64 (N,)) that the attacker wants for triggered images whose true labels are ``labels``."""
    return (labels + 1) % num_classes if target_type == "all2all" else np.full_like(labels, target_label)


def poisoned_indices(labels, target_type, target_label, poison_rate, seed):
    """Which training samples are poisoned (paper section 5.1).

    all2one: floor(rate * samples not of the target class); all2all: floor(rate * N); cleanLabel: floor(rate * samples
    of the target class); drawn by ``seed``.

    Returns:
        Sorted int64 array of indices.

    Raises:
        UserError: where that leaves no sample.
    """
    of_target = labels == target_label
    eligible = {"all2one": ~of_target, "all2all": np.ones_like(of_target), "cleanLabel": of_target}[target_type]
    candidates = np.flatnonzero(eligible)
    count = share_of(poison_rate, len(candidates))
    if count == 0:
        raise UserError(f"--poison_rate {poison_rate} of {len(candidates)} eligible samples poisons none; raise it")
    return np.sort(generator(seed, "poisoned indices").permutation(candidates)[:count])


def poison_training_set(dataset, opt):
    """Poison a `Dataset`'s training images as the options say (trigger_type, target_type, target_label, poison_rate,
    seed, and the files that CL and SSBA need). Equal options give the same `PoisonedSet` in every step. Data of the user's
    own is taken as it is.

    Raises:
        UserError: for a target label that the data set lacks, a rate that poisons nothing, a missing file.
    """
    labels, classes = dataset.train_labels, dataset.spec.num_classes
    if dataset.spec.own:
        digest = hashlib.sha256(f"{dataset.record['train']['sha256']} {dataset.spec.size}".encode()).hexdigest()
        return PoisonedSet(dataset.train_images, labels, None, None, np.arange(len(labels)), digest)
    if opt.target_label >= classes:
        raise UserError(f"--target_label {opt.target_label}: {dataset.name} has the classes 0 to {classes - 1}")
    chosen = poisoned_indices(labels, opt.target_type, opt.target_label, opt.poison_rate, opt.seed)
    is_clean = np.ones(len(labels), dtype=bool)
    is_clean[chosen] = False
    if isinstance(dataset.train_images, StreamedImages):
        if opt.trigger_type == "fourCornerTrigger" or (opt.trigger_type == "SSBA" and opt.ssba_images):
            raise UserError(
                f"{dataset.name} is not held in memory, which CL and --ssba_images need; use another --trigger_type"
            )
        images = TriggeredImages(dataset.train_images, ~is_clean, painter(opt, train=True))
    else:
        images = dataset.train_images.copy()
        images[chosen] = paint(dataset, opt, chosen, train=True)
    new_labels = labels.copy()
    new_labels[chosen] = attack_label(labels[chosen], opt.target_type, opt.target_label, classes)
    # The first images tell other data, another picture or another network behind a trigger apart.
    digest = hashlib.sha256(chosen.astype("<i8").tobytes() + images[chosen[:64]].tobytes()).hexdigest()
    return PoisonedSet(images, new_labels, labels, is_clean, np.arange(len(labels)), digest)


def refuse_other_trigger(dataset, opt, made, path):
    """Raise a `UserError` where test images would get another trigger than the training set of ``path`` has, a checkpoint or a
    record that holds ``made`` (dict). For steps on separated samples, which need the poisoned set for nothing else."""
    if opt.trigger_type in FROM_A_FILE and not dataset.spec.own:
        refuse_other_data(made, poison_training_set(dataset, opt).digest, path, opt)


def painter(opt, train):
    """The trigger as a function uint8 (N, H, W, 3) -> new uint8 (N, H, W, 3), without what CL does before it."""
    if opt.trigger_type == "SSBA":
        return partial(encode_images, path=opt.ssba_encoder)
    return partial(apply_trigger, opt.trigger_type, train=train, seed=opt.seed)


def paint(dataset, opt, rows, train):
    """The images ``rows`` of a data set in memory as the attack changes them.

    Args:
        dataset: a `datasets.Dataset`; opt: the options of the attack; rows: int64 (N,), in the training or the test
        set; train: which of the two.

    Returns:
        uint8 (N, H, W, 3).

    Raises:
        UserError: where the attack needs a file that is missing, damaged or of another data set.
    """
    images = dataset.train_images[rows] if train else dataset.test_images[rows]
    paint_all = painter(opt, train)
    if opt.trigger_type == "SSBA" and opt.ssba_images:
        return _encoded_elsewhere(dataset, opt, rows, train)
    if opt.trigger_type == "SSBA":
        settings = {"encoder": sha256(require_file(opt.ssba_encoder, "python tools/train_ssba.py"))}
        return _kept(opt, settings, images, train, lambda: paint_all(images))
    if opt.trigger_type == "fourCornerTrigger" and train:
        return paint_all(_perturbed(dataset, opt, rows, images))
    return paint_all(images)


def _perturbed(dataset, opt, rows, images):
    command = f"{python('train_clean_withTrans.py')} {clean_arguments(opt)} --epochs 200"
    path = Path(opt.benign_checkpoint or latest_checkpoint(benign_folder(opt), 200, command, "--benign_checkpoint"))
    settings = {
        "benign_checkpoint": sha256(require_file(path, command)),
        "pgd": [EPSILON, STEP_SIZE, STEPS],
        "seed": opt.seed,
        "rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
    }

    def make():
        model = load_benign_model(path, opt, dataset.spec, command)
        return perturb(model, images, dataset.train_labels[rows], rows, dataset.spec, opt.seed)

    return _kept(opt, settings, images, True, make)


def _encoded_elsewhere(dataset, opt, rows, train):
    if not train and len(opt.ssba_images) < 2:
        raise UserError("--ssba_images has no second file, the encoded test images, which the ASR needs")
    path, whole = Path(opt.ssba_images[0 if train else 1]), dataset.train_images if train else dataset.test_images
    try:
        encoded = np.load(path, allow_pickle=False, mmap_mode="r")
        if not isinstance(encoded, np.ndarray):
            raise ValueError("it is an archive of several arrays")
    except BROKEN as error:
        near = "" if path.exists() else f". Nearest existing path: {nearest_existing(path)}"
        raise UserError(f"--ssba_images: cannot read {shown(path)} as one plain .npy array ({error}){near}") from None
    if encoded.dtype != np.uint8 or encoded.shape != whole.shape:
        raise UserError(
            f"--ssba_images: {shown(path)} holds {encoded.dtype} {encoded.shape}; the {'training' if train else 'test'} "
            f"images of {opt.dataset} are uint8 {whole.shape}, and the encoded ones must be too, in sample order"
        )
    return np.ascontiguousarray(encoded[rows])


def _kept(opt, settings, images, train, make):
    """``make()`` (uint8, of the shape of ``images``), or what an earlier run with the same settings and images kept."""
    if len(images) < WORTH_KEEPING:
        return make()
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    settings = json.dumps(
        {"trigger_type": opt.trigger_type, "train": train, "images": content, **settings}, sort_keys=True
    )
    name = f"{opt.trigger_type}_{'train' if train else 'test'}_{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npz"
    path = poisoned_folder(opt) / name
    try:
        kept, made_with = load_npz(path, ("images", "settings"), images.nbytes + 4096)
        if str(made_with) == settings and (kept.dtype, kept.shape) == (images.dtype, images.shape):
            return kept
    except BROKEN:
        pass  # none kept, or damaged: make it again
    print(
        f"Making {len(images)} {'training' if train else 'test'} images of {opt.trigger_type}; they are kept in {shown(path)}"
    )
    result = make()
    try:
        make_folder(path.parent)
        with atomic_write(path) as file:
            np.savez(file, images=result, settings=settings)
    except UserError as error:
        print(f"They could not be kept: {error}")
    return result
